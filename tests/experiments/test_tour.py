"""The tour: everything of a run in one fresh folder, mistakes before it starts, failures with their traceback."""

import json
import time

import nbformat
import pytest

from hjepa.cli import main
from hjepa.experiments import tour
from hjepa.experiments.notebooks import NotebookError
from hjepa.experiments.tour import find_file, report, run_tour

PARAMETERS = 'data = "openmoji"\nquick = False\nrun_dir = ""\npath = None\n'
BODY = """
import json
from pathlib import Path
print("training", data, quick, path)
folder = Path(run_dir)
(folder / "rope").mkdir()
(folder / "rope" / "log.jsonl").write_text('{"step": 25, "loss": 0.5}' + chr(10))
(folder / "metrics.json").write_text(json.dumps({"rows": []}))
row = "rope,32x48,probe,0.25,0.2,0.3,9"
(folder / "table.csv").write_text("encoder,size,metric,value,low,high,n" + chr(10) + row + chr(10))
assert data != "cifar10", "no such data here"
"""


@pytest.fixture
def notebook(tmp_path):
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(text) for text in (PARAMETERS, BODY)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, tmp_path / "notebooks" / "tiny.ipynb")
    return tmp_path / "notebooks" / "tiny.ipynb"


def test_one_fresh_folder_holds_everything_and_the_table_is_printed(notebook, tmp_path, capsys):
    folder = run_tour(quick=True, out=tmp_path / "runs", notebook=notebook)
    printed = capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"tiny.ipynb", "tiny.html", "metrics.json", "table.csv", "rope"}
    assert "training openmoji True None" in printed
    assert "probe  32x48\nrope   0.250" in printed and str(folder / "table.csv") in printed
    assert "training openmoji" in (folder / "tiny.html").read_text()
    executed = json.loads((folder / "tiny.ipynb").read_text())
    assert f'run_dir = "{folder}"' in "".join(executed["cells"][1]["source"])


def test_a_failing_notebook_leaves_its_traceback_and_the_earlier_tour_is_kept(notebook, tmp_path):
    (tmp_path / "runs" / "tour-x").mkdir(parents=True)
    with pytest.raises(NotebookError, match="AssertionError: no such data here"):
        run_tour("cifar10", out=tmp_path / "runs", notebook=notebook)
    folder = next(p for p in (tmp_path / "runs").iterdir() if p.name != "tour-x")
    assert "no such data here" in (folder / "tiny.html").read_text()


def test_two_tours_in_one_second_get_two_folders(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(tour, "execute", lambda *_, **__: None)
    folders = {run_tour(out=tmp_path / "runs", notebook=notebook) for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data", "openmoj"], "data set 'openmoj' is not known; choose one of openmoji, "),
        (["--data", "imagefolder"], "imagefolder takes --path FOLDER"),
        (["--path", "."], "no other data set does"),
        (["--data", "imagefolder", "--path", "nowhere"], "--path nowhere: no such folder"),
        (["--datta", "openmoji"], "unrecognized arguments: --datta openmoji"),
    ],
)
def test_mistakes_are_found_before_a_folder_is_made(words, reason, tmp_path, capsys):
    assert main(["tour", *words, "--out", str(tmp_path / "runs")]) == 2
    line = capsys.readouterr().err
    assert reason in line and line.startswith("hjepa: error: ") and line.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_training_progress_is_shown_while_the_kernel_is_busy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour, "WATCH", 0.05)
    (tmp_path / "rope").mkdir()
    with tour._training_lines(tmp_path):
        for step in (25, 50):
            (tmp_path / "rope" / "log.jsonl").write_text(f'{{"step": {step}, "loss": {step / 100}}}\n')
            time.sleep(0.4)
    assert capsys.readouterr().out.splitlines() == ["rope: step 25, loss 0.250", "rope: step 50, loss 0.500"]


def test_report_without_a_table_lists_the_files(tmp_path, capsys):
    (tmp_path / "a.ipynb").touch()
    (tmp_path / ".lock").touch()
    report(tmp_path)
    assert capsys.readouterr().out == f"\nfiles:\n  {tmp_path / 'a.ipynb'}\n"


def test_a_missing_file_of_the_package_is_named():
    assert find_file("configs/default.yaml").is_file()
    with pytest.raises(FileNotFoundError, match=r"^notebooks/99\.ipynb is neither in "):
        find_file("notebooks/99.ipynb")
