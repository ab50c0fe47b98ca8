"""The committed sweeps: tables follow from the metrics, and the metrics from the files in configs/sweeps."""

import csv
import json
from pathlib import Path

import pytest

from hjepa.evaluate.results import sweep_csv, sweep_rows, sweep_summary
from hjepa.experiments.sweep import load_sweep

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = sorted(ROOT.glob("results/sweeps/*/results.json"))
TABLES = sorted(ROOT.glob("results/**/*.csv"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(ROOT / "results")))
def test_every_row_of_a_committed_table_has_as_many_fields_as_its_head(path):
    """A name with a comma that is not quoted shifts all others by one."""
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert len(head) > 1
    assert rows
    assert {len(row) for row in rows} == {len(head)}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_tables_follow_from_the_metrics(path):
    rows = sweep_rows(json.loads(path.read_text()))
    assert (path.parent / "table.csv").read_text() == sweep_csv(rows)
    assert (path.parent / "summary.md").read_text() == sweep_summary(rows)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_runs_are_those_of_the_sweep_file_and_all_finished(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = load_sweep(f"configs/sweeps/{path.parent.name}.yaml")[1]
    results = json.loads(path.read_text())
    asked = [dict(run.parameters) for run in runs]
    for entry, run in zip(results, asked, strict=True):
        if "recipe" not in entry["parameters"]:  # made before there was this parameter, with the one recipe there was
            assert run.pop("recipe") == "configs/masks.yaml"
    assert [entry["parameters"] for entry in results] == asked
    assert {entry["state"] for entry in results} == {"finished"}


def test_every_committed_sweep_is_listed_with_its_command():
    listed = (ROOT / "results" / "README.md").read_text()
    for path in SWEEPS:
        assert f"hjepa sweep configs/sweeps/{path.parent.name}.yaml" in listed
