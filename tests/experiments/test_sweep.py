"""Sweeps: every combination once, whatever dies on the way; mistakes in the file are found before anything runs."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import numpy as np
import pytest
import torch

from hjepa.cli import main
from hjepa.evaluate.plots import sweep_figure
from hjepa.evaluate.primary import crossed_interval, save_hits
from hjepa.evaluate.results import rows_from_csv, sweep_rows, sweep_summary
from hjepa.experiments.notebooks import notebook_digest
from hjepa.experiments.sweep import announcement, gather, load_sweep, run_one, run_sweep
from hjepa.experiments.tour import find_file
from hjepa.files import hold, read_json
from hjepa.versions import versions

PARAMETERS = """
lr: float = 0.1
mode = "fine"
seed = 0
sizes = [32]
threads = 2
run_dir = ""
"""
BODY = """
import json, os, time
from pathlib import Path
with open("started.txt", "a") as log:
    log.write(Path(run_dir).name + "\\n")
broken = mode if not os.path.exists("repaired") else "fine"
if broken == "raises":
    raise ValueError("cannot go on")
if broken == "dies":
    os._exit(1)
if broken == "kills its job":
    os.kill(os.getppid(), 9)
    time.sleep(30)
if broken == "slow":
    time.sleep(3)
if broken != "forgets":
    row = {"encoder": "e", "size": [32, 48], "metric": "knn", "value": lr / 3, "threads": os.environ["OMP_NUM_THREADS"]}
    Path(run_dir, "metrics.json").write_text(json.dumps({"rows": [row]}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sweep"))


def make_folder(path):
    cells = [nbformat.v4.new_code_cell(text) for text in (PARAMETERS, BODY)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path / "tiny.ipynb")
    return path


def write(folder, text, name="s.yaml"):
    text = f"notebook: {folder / 'tiny.ipynb'}\nout: {folder / 'out'}\n{text}"
    (folder / name).write_text(text)
    return folder / name


def started(folder):
    return (folder / "started.txt").read_text().split()


def test_lists_every_combination_once_in_the_order_of_the_file(tmp_path):
    text = "parameters: {mode: x}\ngrid: {lr: [1, 1e-3], sizes: [[8], [16]]}\nseeds: [0, 7]"
    _, runs = load_sweep(write(make_folder(tmp_path), text))
    assert [(r.varied["lr"], r.varied["sizes"], r.varied["seed"]) for r in runs] == [
        (lr, sizes, seed) for lr in (1, 0.001) for sizes in ([8], [16]) for seed in (0, 7)
    ]
    assert all(run.parameters == {"mode": "x", "threads": 1, **run.varied} for run in runs)
    assert len({run.folder for run in runs}) == 8 and runs[0].folder.name.startswith("lr=1,sizes=-8-,seed=0-")


def test_a_run_keeps_its_folder_when_the_grid_grows_or_is_reordered(tmp_path):
    folder = make_folder(tmp_path)
    before = {r.folder for r in load_sweep(write(folder, "grid: {lr: [0.5], mode: [a, b]}"))[1]}
    after = {r.folder for r in load_sweep(write(folder, "grid: {lr: [2, 0.5], mode: [c, b, a]}\nmax_parallel: 7"))[1]}
    other = {r.folder for r in load_sweep(write(folder, "grid: {lr: [0.5], mode: [a, b]}\nparameters: {seed: 1}"))[1]}
    assert before < after and not before & other


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("grid: {larning: [1]}", "unknown parameter 'larning'"),
        ("grid: {lrr: [1]}", "nearest: lr"),
        ("grid: {lr: ['1e-3']}", "lr='1e-3' must be float, not str; it is text: write it without quotes"),
        ("grid: {lr: 0.1}", "grid.lr=0.1 must be a list of one or more values"),
        ("grid: {lr: []}", "must be a list of one or more"),
        ("grid: {lr: [0.1, 0.1]}", "names the same run twice"),
        ("parameters: {mode: 3}", "mode=3 must be str, not int"),
        ("parameters: {lr: 1}\ngrid: {lr: [1]}", "parameter lr is given twice"),
        ("grid: {seed: [1]}\nseeds: [1]", "parameter seed is given twice"),
        ("parameters: {run_dir: x}", "parameter run_dir is set by the sweep itself"),
        ("parameters: {1: x}", "unknown parameter 1"),
        ("seeds: [0.5]", "seeds=[0.5] must be whole numbers"),
        ("seeds: 3", "seeds=3 must be list, not int"),
        ("gird: {lr: [1]}", "unknown key 'gird'; nearest: grid"),
        ("max_parallel: 0", "max_parallel=0 must be at least 1"),
        ("max_parallel: true", "must be int, not bool"),
        ("executor: slrum", "executor='slrum' must be local or slurm; nearest: slurm"),
        (f"seeds: {list(range(200))}\ngrid: {{lr: {list(range(99))}}}", "the grid has 19800 runs, more than 10000"),
    ],
)
def test_mistakes_are_found_before_anything_starts(folder, text, reason, capsys):
    path = write(folder, text, "wrong.yaml")
    assert main(["sweep", str(path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("hjepa: error: ") and line.count("\n") == 1 and reason in line
    assert not (folder / "started.txt").exists()


def edited(folder, old, new):
    path = folder / "tiny.ipynb"
    path.write_text(path.read_text().replace(old, new))


def test_an_edited_notebook_makes_its_runs_again_and_a_new_output_or_text_does_not(tmp_path):
    folder = make_folder(tmp_path)
    file = write(folder, "grid: {lr: [0.5, 1.5]}")
    before = [run.folder for run in load_sweep(file)[1]]
    book = nbformat.read(folder / "tiny.ipynb", 4)
    book.cells.insert(0, nbformat.v4.new_markdown_cell("# a title"))
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", text="said")]
    nbformat.write(book, folder / "tiny.ipynb")
    assert [run.folder for run in load_sweep(file)[1]] == before
    edited(folder, "lr / 3", "lr / 4")
    assert not {run.folder for run in load_sweep(file)[1]} & set(before)
    edited(folder, "lr / 4", "lr / 3")
    assert [run.folder for run in load_sweep(file)[1]] == before
    edited(folder, "lr: float = 0.1", "lr: float = 0.2")  # a default is code too
    assert not {run.folder for run in load_sweep(file)[1]} & set(before)


def test_another_version_of_the_package_makes_runs_again(tmp_path, monkeypatch):
    file = write(make_folder(tmp_path), "seeds: [0]")
    before = load_sweep(file)[1][0].folder
    monkeypatch.setattr("hjepa.experiments.sweep.versions", lambda: {"hjepa": "9.9"})
    assert load_sweep(file)[1][0].folder != before


def test_relative_paths_are_those_of_the_current_folder(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    more = "\\npath = \\\"\\\"\\ndata_root = \\\"data\\\"\\noverrides = []\\nvariants = {}"
    edited(folder, "threads = 2", f"threads = 2{more}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/mine")
    variants = "variants: {a: [train.init_from=runs/a], b: [train.init_from=openmoji-rope]}"
    text = f"parameters: {{data_root: store, mode: path, {variants}}}\n"
    text += 'grid: {path: [photos, ~/photos, /photos, ""], overrides: [%s]}'
    file = write(folder, text % "[data.path=own, data.root=~/x, train.lr=1, data.path=null]")
    runs = load_sweep(file)[1]
    assert [run.parameters["path"] for run in runs] == [f"{tmp_path}/photos", "/mine/photos", "/photos", ""]
    assert runs[0].parameters["data_root"] == f"{tmp_path}/store" and runs[0].parameters["mode"] == "path"
    wanted = [f"data.path={tmp_path}/own", "data.root=/mine/x", "train.lr=1", "data.path=null"]
    assert runs[0].parameters["overrides"] == wanted
    found = runs[0].parameters["variants"]
    assert found == {"a": [f"train.init_from={tmp_path}/runs/a"], "b": ["train.init_from=openmoji-rope"]}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_sweep(file)[1][0].folder != runs[0].folder


def with_recipe(path):
    """A folder whose notebook takes the name of a recipe, usually own.yaml, and measures the number in that file."""
    folder = make_folder(path)
    edited(folder, "threads = 2", 'threads = 2\\nrecipe = \\"own.yaml\\"')
    edited(folder, "lr / 3", "float(Path(recipe).read_text())")
    return folder


def test_an_edited_recipe_makes_its_runs_again(tmp_path, monkeypatch):
    """Named in the file or the notebook's usual one; back to its former text it gives the former runs."""
    folder = with_recipe(tmp_path)
    monkeypatch.chdir(folder)
    for text in ("seeds: [0]\nparameters: {recipe: own.yaml}", "seeds: [1]", "grid: {recipe: [own.yaml]}"):
        file = write(folder, text)
        (folder / "own.yaml").write_text("0.5")
        before = load_sweep(file)[1][0]
        assert run_sweep(file, progress=False) == []
        (folder / "own.yaml").write_text("0.1")
        assert run_sweep(file, progress=False) == []
        assert [row["value"] for row in rows_from_csv(folder / "out" / "table.csv")] == [0.1]
        assert read_json(load_sweep(file)[1][0].folder / "run.json")["recipe"] != before.recipe
        (folder / "own.yaml").write_text("0.5")
        assert load_sweep(file)[1][0].folder == before.folder and before.finished


def test_a_run_reads_the_recipe_that_its_name_stands_for(tmp_path, monkeypatch):
    """Edited after the sweep began: an error before the run starts, and not seen while it goes on."""
    folder = with_recipe(tmp_path)
    edited(folder, "threads = 2", "threads = 2\\nfrom pathlib import Path\\nPath('own.yaml').write_text('0.1')")
    monkeypatch.chdir(folder)
    (folder / "own.yaml").write_text("0.5")
    run, other = load_sweep(write(folder, "seeds: [0, 1]"))[1]
    run_one(str(folder / "tiny.ipynb"), run, 1)
    assert (folder / "own.yaml").read_text() == "0.1"
    assert read_json(run.folder / "metrics.json")["rows"][0]["value"] == 0.5
    run_one(str(folder / "tiny.ipynb"), other, 1)
    assert other.error == f"recipe {folder / 'own.yaml'} was edited since the sweep began; start the sweep again"


def test_runs_made_before_recipes_counted_are_kept_until_the_recipe_is_edited(tmp_path, monkeypatch):
    folder = with_recipe(tmp_path)
    monkeypatch.chdir(folder)
    file = write(folder, "seeds: [0]")
    older = load_sweep(file)[1][0].folder  # without a recipe's file, the name of the folder is the older one
    older.mkdir(parents=True)
    for name, text in (("run.json", '{"state": "finished"}'), ("metrics.json", '{"rows": []}')):
        (older / name).write_text(text)
    made = (older / "run.json").stat().st_mtime
    (folder / "own.yaml").write_text("0.5")
    os.utime(folder / "own.yaml", (made - 60, made - 60))
    run = load_sweep(file)[1][0]
    assert run.folder == older and run.finished
    os.utime(folder / "own.yaml", (made + 60, made + 60))
    assert load_sweep(file)[1][0].folder != older


def test_a_recipe_of_the_current_folder_wins_over_the_packages(tmp_path, monkeypatch):
    """Its path goes to the notebook alone: a run is the same in whatever folder the same text lies."""
    folder, name = with_recipe(tmp_path), "configs/photographs.yaml"
    text = f"seeds: [0]\nparameters: {{recipe: {name}}}"
    seen = {}
    for place, number in (("here", "0.25"), ("there", "0.25"), ("other", "0.5"), ("none", None)):
        (tmp_path / place / "configs").mkdir(parents=True)
        if number:
            (tmp_path / place / name).write_text(number)
        monkeypatch.chdir(tmp_path / place)
        seen[place] = load_sweep(write(folder, text))[1][0]
        assert seen[place].parameters["recipe"] == name
        assert seen[place].recipe_file == str(tmp_path / place / name if number else find_file(name))
    assert seen["here"].folder == seen["there"].folder
    assert len({run.folder for run in seen.values()}) == len({run.recipe for run in seen.values()}) == 3
    monkeypatch.chdir(tmp_path / "other")
    assert run_sweep(write(folder, text), progress=False) == []
    assert [row["value"] for row in rows_from_csv(folder / "out" / "table.csv")] == [0.5]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "[.nan]"])
def test_numbers_that_json_does_not_know_are_refused(tmp_path, value):
    for text in (f"grid: {{lr: [{value}]}}", f"parameters: {{lr: {value}}}", f"parameters: {{sizes: [1, {value}]}}"):
        with pytest.raises(ValueError, match="not finite"):
            load_sweep(write(make_folder(tmp_path), text))


def test_a_measure_that_is_not_finite_is_null_in_results_and_the_run_says_what_made_it(tmp_path, capsys):
    folder = make_folder(tmp_path)
    edited(folder, "lr / 3", "float('nan')")
    file = write(folder, "seeds: [0]")
    assert run_sweep(file, progress=False) == []
    text = (tmp_path / "out" / "results.json").read_text()
    assert "NaN" not in text and json.loads(text)[0]["metrics"]["rows"][0]["value"] is None
    run = load_sweep(file)[1][0]
    record = read_json(run.folder / "run.json")
    assert record["versions"] == versions() and record["notebook"] == notebook_digest(folder / "tiny.ipynb")
    record["versions"]["torch"] = "2.0"
    (run.folder / "run.json").write_text(json.dumps(record))
    assert run_sweep(file, progress=False) == []
    said = capsys.readouterr().err
    assert f"kept 1 finished runs made by other versions: torch 2.0, now {versions()['torch']}" in said


def test_files_that_are_no_sweep_are_refused(tmp_path):
    for text in ("", "3", "[1]", "grid: {}", "notebook: ''", "notebook: nowhere.ipynb"):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError)):
            load_sweep(tmp_path / "s.yaml")


def test_slurm_where_there_is_none_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="executor: slurm does not work here"):
        run_sweep(write(make_folder(tmp_path), "executor: slurm\nslurm: {partition: x}"), progress=False)


def test_failing_runs_are_marked_the_others_go_on_and_only_they_run_again(tmp_path, capsys):
    folder = make_folder(tmp_path)
    modes = ["fine", "raises", "dies", "kills its job", "forgets"]
    path = write(folder, f"grid: {{mode: {modes}}}\nparameters: {{lr: 1e-3}}\nmax_parallel: 3")
    assert main(["sweep", str(path)]) == 1
    runs = {run.varied["mode"]: run for run in load_sweep(path)[1]}
    assert [mode for mode, run in runs.items() if run.finished] == ["fine"]
    assert runs["raises"].error == "tiny.ipynb, cell 3: ValueError: cannot go on"
    assert "the kernel died" in runs["dies"].error
    assert "ended without a result" in runs["kills its job"].error
    assert "left no metrics.json" in runs["forgets"].error
    errors = capsys.readouterr().err
    assert "4 failed: " in errors and all(run.folder.name in errors for m, run in runs.items() if m != "fine")

    (folder / "repaired").touch()
    assert main(["sweep", str(path)]) == 0
    assert {mode: started(folder).count(run.folder.name) for mode, run in runs.items()} == {
        mode: 1 if mode == "fine" else 2 for mode in modes
    }
    assert all(run.finished and not run.error for run in runs.values())
    rows = rows_from_csv(folder / "out" / "table.csv")
    assert [(row["setting"], row["size"], row["threads"]) for row in rows] == [
        (f"mode={mode}", (32, 48), 1) for mode in modes
    ]
    assert rows[0]["value"] == pytest.approx(1e-3 / 3, rel=1e-5)
    results = read_json(folder / "out" / "results.json")
    assert [r["parameters"]["mode"] for r in results] == modes and {r["state"] for r in results} == {"finished"}


def test_a_setting_is_named_by_what_differs_between_runs_but_the_seed():
    """Of lists only the items that are not in all of them; rows keep the run's seed."""
    lists = (["a=1", "b=1"], ["a=1", "b=2"], ["a=1"])
    results = [
        {"run": f"{data}{k}{seed}", "parameters": {"data": data, "overrides": words, "seed": seed, "quick": False},
         "metrics": {"rows": [{"metric": "knn"}]}}
        for data in ("x", "y") for k, words in enumerate(lists) for seed in (0, 1)
    ]  # fmt: skip
    found = [(row["setting"], row["seed"]) for row in sweep_rows(results)]
    names = [f"data={data}{more}" for data in ("x", "y") for more in (", b=1", ", b=2", "")]
    assert found == [(name, seed) for name in names for seed in (0, 1)]


def test_a_parameter_that_is_a_list_in_some_runs_alone_is_named_by_its_value():
    given = (None, [32], [8, 16])
    results = [{"run": "r", "parameters": {"sizes": sizes}, "metrics": {"rows": [{}]}} for sizes in given]
    assert [row["setting"] for row in sweep_rows(results)] == ["sizes=None", "sizes=[32]", "sizes=[8, 16]"]


def measured(value, seed, size, home=32):
    """Rows of one encoder at one size: a probe, and the CKA that marks the training size."""
    same = {"encoder": "rope", "size": size, "seed": seed, "low": 0.0, "high": 1.0, "n": 10, "setting": "recipe"}
    cka = 1.0 if size == home else 0.5
    return [same | {"metric": m, "value": v} for m, v in (("probe", value), ("probe_fixed", value), ("knn", value),
                                                          ("effective_rank", 3.0), ("cka", cka))]  # fmt: skip


def test_the_summary_holds_means_over_seeds_and_names_the_training_size():
    rows = [row for seed, value in enumerate((0.2, 0.3, 0.4)) for row in measured(value, seed, 32)]
    text = sweep_summary(rows + [row for seed in range(3) for row in measured(0.1, seed, 64)])
    half = 4.302653 * 0.1 / 3**0.5  # Student's t for 2 degrees of freedom
    assert f"0.300 [{0.3 - half:.3f}, {0.3 + half:.3f}]" in text
    assert "Trained at 32 px, 3 seed(s)." in text and "0.100 [0.100, 0.100]" in text


def test_the_summary_counts_gains_over_the_table_seed_by_seed():
    """Values 0.2, 0.3, 0.4 against 0.1, 0.25, 0.1: gains of 10, 5 and 30 points."""
    rows = [row for seed, value in enumerate((0.2, 0.3, 0.4)) for row in measured(value, seed, 32)]
    base = [row for seed, value in enumerate((0.1, 0.25, 0.1)) for row in measured(value, seed, 32)]
    text = sweep_summary(rows + [row | {"encoder": "absolute, resampled"} for row in base])
    half = 4.302653 * (175 / 3) ** 0.5  # of 10, 5, 30: mean 15, variance 175
    assert f"rope   15.0 [{15 - half:.1f}, {15 + half:.1f}]" in text.split("paired by seed")[1]


def test_the_figure_has_a_panel_per_setting_with_means_and_intervals_over_seeds():
    rows = [row for seed, value in enumerate((0.2, 0.4)) for size in (32, 64) for row in measured(value, seed, size)]
    rows += [row | {"setting": "other", "value": row["value"] if row["metric"] == "cka" else 0.7} for row in rows]
    panels = sweep_figure(rows).axes
    assert [ax.get_title() for ax in panels] == ["recipe", "other"]
    lines = [{line.get_label(): list(line.get_ydata()) for line in ax.lines}["rope"] for ax in panels]
    assert lines == [pytest.approx([0.3, 0.3]), pytest.approx([0.7, 0.7])]
    heights = [ax.collections[0].get_paths()[0].vertices[:, 1] for ax in panels]
    half = 12.706205 * 0.1  # Student's t for 1 degree of freedom, times the standard error of 0.2 and 0.4
    assert [(band.min(), band.max()) for band in heights] == [
        pytest.approx((0.3 - half, 0.3 + half)), pytest.approx((0.7, 0.7))
    ]  # fmt: skip


def test_a_crowded_figure_leaves_the_ntk_readings_to_the_table():
    names = ["rope, interpolated", "rope, ntk", *(f"other {n}" for n in range(7))]
    rows = [row | {"encoder": name} for name in names for size in (32, 64) for row in measured(0.3, 0, size)]
    drawn = {line.get_label() for line in sweep_figure(rows).axes[0].lines}
    assert "rope, interpolated" in drawn and "rope, ntk" not in drawn
    few = [row for row in rows if row["encoder"] in names[:8]]
    assert "rope, ntk" in {line.get_label() for line in sweep_figure(few).axes[0].lines}


def test_rows_without_one_training_size_are_refused():
    with pytest.raises(ValueError, match="no training size: CKA is 1 at no size"):
        sweep_summary(measured(0.1, 0, 64))


def test_a_killed_sweep_loses_and_doubles_nothing(tmp_path):
    folder = make_folder(tmp_path)
    path = write(folder, "grid: {mode: [slow]}\nseeds: [0, 1, 2]\nmax_parallel: 2")
    sweep = subprocess.Popen([sys.executable, "-m", "hjepa", "sweep", str(path)], stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)  # fmt: skip
    until = time.time() + 60
    while not (folder / "started.txt").exists() and time.time() < until:
        time.sleep(0.1)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert run_sweep(path, progress=False) == []
    assert sorted(started(folder)) == sorted(run.folder.name for run in load_sweep(path)[1])


def test_a_second_sweep_into_the_same_folder_is_refused(tmp_path):
    path = write(make_folder(tmp_path), "seeds: [0]")
    with hold(tmp_path / "out"), pytest.raises(ValueError, match=f"in use by another run, process {os.getpid()}"):
        run_sweep(path, progress=False)


def test_a_finished_run_needs_its_metrics_too(tmp_path):
    run = load_sweep(write(make_folder(tmp_path), "seeds: [0]"))[1][0]
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text('{"state": "finished"}')
    for text in ("", '{"rows": 3}', "[]", '{"rows": [{"metric": "knn"}'):
        (run.folder / "metrics.json").write_text(text)
        assert not run.finished
    (run.folder / "metrics.json").write_text('{"rows": [{"metric": "knn", "value": 0.5, "seed": 9}]}')
    assert run.finished
    gather([run], tmp_path / "out")
    assert rows_from_csv(tmp_path / "out" / "table.csv") == [
        {"setting": "recipe", "seed": 9, "metric": "knn", "value": 0.5, "run": run.folder.name}
    ]


def finished_runs(path, seconds=90.0):
    """The runs of a sweep as if each had ended: encoder a is right about 6 + seed of 10 pictures, b about 5."""
    runs = load_sweep(path)[1]
    for run in runs:
        right = {"a": 6 + run.parameters["seed"], "b": 5}
        hits = {(name, (32, 32), "knn"): torch.arange(10) < count for name, count in right.items()}
        rows = [{"encoder": n, "size": [32, 32], "metric": "knn", "value": c / 10} for n, c in right.items()]
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.json").write_text(json.dumps({"rows": rows}))
        (run.folder / "run.json").write_text(json.dumps({"state": "finished", "seconds": seconds}))
        save_hits(hits, run.folder / "hits.npz")
    return runs


PRIMARY = """
grid: {mode: [fine, other]}
seeds: [0, 1, 2]
minutes_per_run: 7
primary:
  - {comparison: fine, a: a, b: b, metric: knn, size: 32, setting: mode=fine}
"""


def test_comparisons_of_the_file_are_written_once_all_runs_are_there(tmp_path):
    """Gains of 10, 20 and 30 points, asked of ten pictures: the mean, and the interval over seeds and pictures."""
    path = write(make_folder(tmp_path), PRIMARY)
    sweep, runs = load_sweep(path)
    finished_runs(path)
    (runs[0].folder / "run.json").unlink()
    gather(runs, tmp_path / "out", sweep.primary)
    assert not (tmp_path / "out" / "primary.csv").exists()
    (runs[0].folder / "run.json").write_text('{"state": "finished"}')
    gather(runs, tmp_path / "out", sweep.primary)
    (row,) = rows_from_csv(tmp_path / "out" / "primary.csv")
    assert (row["comparison"], row["reader"], row["size"], row["seeds"]) == ("fine", "knn", (32, 32), 3)
    assert row["mean"] == pytest.approx(20) and row["interval"] == "seeds and pictures"
    assert row["p_holm"] == row["p"] > 0
    seeds_alone = crossed_interval(np.array([[10.0], [20.0], [30.0]]))
    assert row["p"] > seeds_alone[3]  # ten pictures settle less than three seeds seem to


def test_no_table_or_figure_of_earlier_runs_is_left_beside_new_results(tmp_path):
    path = write(make_folder(tmp_path), PRIMARY)
    (sweep, runs), out = load_sweep(path), tmp_path / "out"
    finished_runs(path)
    gather(runs, out, sweep.primary)
    for name in ("summary.md", "figure.png"):
        (out / name).write_text("earlier")
    (runs[0].folder / "run.json").unlink()
    gather(runs, out, sweep.primary)
    assert {item.name for item in out.iterdir() if item.is_file()} == {"results.json", "table.csv"}
    assert len(rows_from_csv(out / "table.csv")) == 10  # of the five runs that are left
    for run in runs[1:]:
        (run.folder / "run.json").unlink()
    gather(runs, out, sweep.primary)
    assert {item.name for item in out.iterdir() if item.is_file()} == {"results.json"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seeds: [0, 1]\nprimary: [{a: x}]", "lacks comparison, b, metric, size"),
        ("seeds: [0]\nprimary: [{comparison: c, a: a, b: b, metric: knn, size: 32}]", "two seeds or more"),
        ("seeds: [0, 1]\nprimary: [{comparison: c, a: a, b: b, metric: knn, size: big}]", "big"),
        (PRIMARY.replace("knn", "knnn"), "comparison 'fine': 'knnn'; nearest: knn"),
        (PRIMARY.replace("setting:", "settings:"), "comparison 'fine': 'settings'; nearest: setting"),
        (PRIMARY.replace("mode=fine", "mode=fin"), "'mode=fin' is not one of mode=fine, mode=other; nearest: mode="),
        (PRIMARY.replace(", setting: mode=fine", ""), "'fine': setting=None is not one of mode=fine, mode=other"),
        ("minutes_per_run: -1", "minutes_per_run=-1 must be a number of minutes"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused_before_anything_runs(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        load_sweep(write(make_folder(tmp_path), text))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (("b: b", "b: c"), "primary.csv: comparison 'fine': b='c' is not one of a, b; nearest: none"),
        (("knn", "accuracy"), "primary.csv: comparison 'fine' (a against b, accuracy at 32 px) has 0 paired seeds"),
        (("setting: mode=fine", "data: x"), "has 0 paired seeds"),
    ],
)
def test_a_comparison_without_rows_is_a_line_after_summary_and_figure(tmp_path, capsys, wrong, reason):
    """Names of encoders, and metrics and tags of a notebook's own, are known only from the rows."""
    path = write(make_folder(tmp_path), PRIMARY.replace(*wrong))
    for run in finished_runs(path):
        cka = {"encoder": "a", "size": [32, 32], "metric": "cka", "value": 1.0, "low": 1.0, "high": 1.0, "n": 10}
        rows = read_json(run.folder / "metrics.json")["rows"]
        rows = [cka, *(row | {"low": 0.0, "high": 1.0, "n": 10, "metric": m} for row in rows for m in ("knn", "probe"))]
        (run.folder / "metrics.json").write_text(json.dumps({"rows": rows}))
    assert main(["sweep", str(path)]) == 2
    out, err = capsys.readouterr()
    assert f"hjepa: error: {reason}" in err if reason.startswith("primary") else reason in err
    assert "## mode=fine" in out
    assert {"results.json", "table.csv", "summary.md", "figure.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "primary.csv").exists()


def test_a_sweep_says_cells_and_minutes_before_it_starts(tmp_path):
    """Six runs of 7 minutes, two at a time: 21; once runs of 90 s are timed, what is left takes as long as those."""
    path = write(make_folder(tmp_path), PRIMARY)
    sweep, runs = load_sweep(path)
    assert "6 of 6 runs to do (2 cells, 3 seeds), 2 at a time, about 21 minutes" in announcement(sweep, runs)
    finished_runs(path, seconds=600)
    for run in runs[:3]:
        (run.folder / "run.json").unlink()
    assert "3 of 6 runs to do (2 cells, 3 seeds), 2 at a time, about 20 minutes" in announcement(sweep, runs)
    unknown = load_sweep(write(tmp_path, "seeds: [4]", "u.yaml"))
    assert "minutes not known before a first run" in announcement(*unknown)


RESUMING = """
import json, os, time
from pathlib import Path
folder = Path(run_dir)
with (folder / "kernels.txt").open("a") as log:
    log.write(f"{os.getpid()}\\n")
resumed = (folder / "half").exists()
(folder / "half").touch()
if not resumed:
    time.sleep(60)
(folder / "metrics.json").write_text(json.dumps({"rows": [{"metric": "resumed", "value": float(resumed), "seed": 0}]}))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="no SIGUSR2 here, the signal of submitit")
def test_a_preempted_job_is_requeued_and_its_notebook_goes_on(tmp_path, monkeypatch):
    """As Slurm preempts: SIGTERM to every process, which the kernel dies of, and a little later submitit's signal."""
    monkeypatch.setitem(globals(), "BODY", RESUMING)
    path = write(make_folder(tmp_path), "seeds: [0]")
    (run,) = load_sweep(path)[1]

    def preempt():
        until = time.time() + 60
        while not (run.folder / "half").exists() and time.time() < until:
            time.sleep(0.1)
        job, kernel = (int((run.folder / name).read_text()) for name in (".lock.pid", "kernels.txt"))
        os.kill(job, signal.SIGTERM)
        os.kill(kernel, signal.SIGTERM)
        time.sleep(8)  # nbclient looks every few seconds whether the kernel lives
        os.kill(job, signal.SIGUSR2)

    with ThreadPoolExecutor(1) as pool:
        preempted = pool.submit(preempt)
        assert run_sweep(path, progress=False) == []
        preempted.result()
    assert len((run.folder / "kernels.txt").read_text().split()) == 2
    assert read_json(run.folder / "metrics.json")["rows"][0]["value"] == 1
