"""Notebooks as functions: their parameters are read and checked before anything runs, failures are one line."""

import io
import json
from pathlib import Path

import nbformat
import pytest

from hjepa.evaluate.results import rows_from_csv
from hjepa.experiments.notebooks import NotebookError, Parameter, check_parameters, execute, find_parameters

CELL = """
# a comment
lr: float = 1e-3  # help
sizes = [
    32,
    48,
]
name = "a"
count: int | None = None
on = True
free = None
derived = len(sizes) * 2
pair = (1, 2)
run_dir = ""
"""


def notebook(path, *cells, tags=("parameters",)):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    book.cells[0].metadata["tags"] = list(tags)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


def test_parameters_are_read_with_defaults_and_annotations(tmp_path):
    assert find_parameters(notebook(tmp_path / "a.ipynb", CELL, "later = 1")) == {
        "lr": Parameter(1e-3, "float"),
        "sizes": Parameter([32, 48]),
        "name": Parameter("a"),
        "count": Parameter(None, "int | None"),
        "on": Parameter(True),
        "free": Parameter(None),
        "derived": Parameter(None),
        "pair": Parameter((1, 2)),
        "run_dir": Parameter(""),
    }


@pytest.mark.parametrize(
    "values",
    [{"lr": 1}, {"lr": 0.1}, {"sizes": []}, {"name": "1e-3"}, {"count": None}, {"count": 3}, {"on": False},
     {"free": "x"}, {"derived": 2}, {"pair": [1]}],
)  # fmt: skip
def test_right_types_pass(tmp_path, values):
    check_parameters(values, find_parameters(notebook(tmp_path / "a.ipynb", CELL)), "here")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"lr": "1e-3"}, "lr='1e-3' must be float, not str; it is text: write it without quotes, such as 1.0e-3"),
        ({"lr": True}, "must be float, not bool"),
        ({"lr": [0.1]}, "must be float, not list"),
        ({"count": 1.0}, "must be int or nothing, not float"),
        ({"count": True}, "must be int or nothing, not bool"),
        ({"on": 1}, "must be bool, not int"),
        ({"name": 1}, "must be str, not int"),
        ({"sizes": 32}, "must be list, not int"),
        ({"learning": 1}, "unknown parameter 'learning'; nearest: none"),
        ({"nam": "x"}, "unknown parameter 'nam'; nearest: name"),
    ],
)
def test_wrong_names_and_types_get_one_line(tmp_path, values, reason):
    with pytest.raises(ValueError) as caught:
        check_parameters(values, find_parameters(notebook(tmp_path / "a.ipynb", CELL)), "here")
    assert str(caught.value).startswith("here: ") and reason in str(caught.value)


def test_files_that_are_no_parameterised_notebook_are_named(tmp_path):
    notebook(tmp_path / "a.ipynb", "x = 1", tags=())
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        find_parameters(tmp_path / "a.ipynb")
    with pytest.raises(FileNotFoundError, match=r"aa\.ipynb does not exist; nearest: .*a\.ipynb"):
        find_parameters(tmp_path / "aa.ipynb")
    with pytest.raises(ValueError, match="not Python: invalid syntax in line 2"):
        find_parameters(notebook(tmp_path / "b.ipynb", "x = 1\ny = = 2"))
    for text in ("", "{}", "[]", '{"cells": [3]}', '{"cells": [{"metadata": {"tags": ["parameters"]}}]}', "\x00"):
        (tmp_path / "c.ipynb").write_text(text)
        with pytest.raises(ValueError, match="is not a notebook"):
            find_parameters(tmp_path / "c.ipynb")


def test_executes_in_its_folder_and_streams_what_it_prints(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    path = notebook(tmp_path / "a.ipynb", "x = 1.0", "import os; open('here', 'w').close(); print('x is', x)")
    stream = io.StringIO()
    execute(path, tmp_path / "out.ipynb", {"x": 1e-7}, cwd=work, stream=stream)
    assert stream.getvalue() == "x is 1e-07\n" and (work / "here").exists()
    assert json.loads((tmp_path / "out.ipynb").read_text())["cells"][-1]["outputs"]


def test_a_failing_cell_is_one_line_and_its_traceback_is_kept(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "x = 1", "y = 1", "raise ValueError('two\\nlines')")
    with pytest.raises(NotebookError, match=r"^a\.ipynb, cell \d: ValueError: two lines$"):
        execute(path, tmp_path / "out.ipynb", {"x": 2}, cwd=tmp_path)
    assert "Traceback" in (tmp_path / "out.ipynb").read_text()


def test_a_dead_kernel_is_reported_and_not_waited_for(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "x = 1", "import os; os._exit(1)")
    with pytest.raises(NotebookError, match="the kernel died"):
        execute(path, tmp_path / "out.ipynb", {"x": 2}, cwd=tmp_path)


# ---- the course's own notebooks, with other parameters than those they are committed with

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
OTHER_PARAMETERS = {
    "06_train.ipynb": {
        "steps": 8, "batch_size": 8, "objective": "both", "start": "", "positions": "absolute", "seed": 3,
    },
    "07_resolution_transfer.ipynb": {
        "steps": 2, "seed": 3, "patch_scale": 2, "positions": ["none", "hybrid", "hybrid_mixed"],
        "strategies": ["ntk", "interpolate"],
        "overrides": ["model.level_weights=[1.0]"],
    },
    "one_run.ipynb": {
        "recipe": "configs/photographs.yaml",
        "variants": {
            "none": ["model.rope.use_rope=false"],
            "fixed": ["model.rope.kind=fixed"],
            "fixed, one head": ["model.rope.kind=fixed", "model.embed_dim=32", "model.num_heads=1"],
        },
        "sizes": [32], "strategies": ["extrapolate"], "split": "test", "dense": True, "seed": 3,
        "overrides": ["data.name=openmoji", "train.steps=2", "train.warmup=1", "train.batch_size=8", "model.depth=2",
                      "evaluate.gallery=60", "evaluate.queries=40"],
    },
}  # fmt: skip


def test_every_notebook_with_parameters_is_run_below():
    tagged = [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb")) if '"parameters"' in path.read_text()]
    assert tagged == list(OTHER_PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_PARAMETERS)
def test_runs_with_other_parameters_and_says_what_each_is(name, tmp_path):
    path, values = NOTEBOOKS / name, OTHER_PARAMETERS[name] | {"run_dir": str(tmp_path / "run")}
    known = find_parameters(path)
    assert all(parameter.annotation for parameter in known.values())
    check_parameters(values, known, name)
    with pytest.raises(ValueError, match="unknown parameter 'run_dirs'; nearest: run_dir"):
        check_parameters({"run_dirs": 3}, known, name)
    with pytest.raises(ValueError, match="seed='3' must be int"):
        check_parameters({"seed": "3"}, known, name)
    assert not any(values.get(key) == parameter.default for key, parameter in known.items())
    execute(path, tmp_path / "out.ipynb", values, cwd=NOTEBOOKS)
    assert any((tmp_path / "run").rglob("metrics.json"))
    if "variants" in values:
        rows = rows_from_csv(tmp_path / "run/table.csv")
        read = {"none", "fixed, extrapolated", "fixed, one head, extrapolated", "random init", "HOG"}
        assert read < {row["encoder"] for row in rows}
        assert {"place", "match_1", "knn", "probe"} < {row["metric"] for row in rows}
    if isinstance(values.get("positions"), list):  # mixed frequencies have no theta, so NTK is left out for them
        table = rows_from_csv(tmp_path / "run/table.csv")
        mixed = {row["encoder"] for row in table if "mixed" in row["encoder"]}
        assert mixed == {"hybrid_mixed, interpolated"}
        assert {"hybrid, ntk", "hybrid, interpolated", "none"} < {row["encoder"] for row in table}


@pytest.mark.slow
def test_training_starts_from_an_encoder_of_drawings_too(tmp_path):
    values = {"start": "openmoji-none", "positions": "none", "objective": "masks", "steps": 4, "batch_size": 8}
    execute(NOTEBOOKS / "06_train.ipynb", tmp_path / "out.ipynb", values | {"run_dir": str(tmp_path)}, cwd=NOTEBOOKS)
    assert (tmp_path / "from-openmoji-none/metrics.json").is_file()
