"""The race to a probe's accuracy: the same steps as training, a clock that leaves out the reading, a row for each."""

import csv

import pytest
import torch

from benchmarks import race
from benchmarks.run import processor
from hjepa.hub import load_run
from hjepa.train.loop import train

SMALL = (
    "data.name=imagefolder", "data.image_size=32", "model.embed_dim=24", "model.depth=1", "model.num_heads=2",
    "views.small=1", "train.batch_size=8", "train.threads=1", "train.mixed_precision=no",
)  # fmt: skip


@pytest.fixture
def config(pictures):
    return race.configured(race.RECIPE, 4, [*SMALL, f"data.path={pictures}"])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_race_appends_a_row_with_what_it_depends_on(pictures, tmp_path, capsys):
    table = tmp_path / "race.csv"
    words = ["--steps", "4", "--every", "2", "--table", str(table), *SMALL, f"data.path={pictures}"]
    assert race.main(["--goal", "0", *words]) == 0  # ended by the first reading
    assert race.main(["--goal", "2", *words]) == 1  # by the last step
    first, second = rows(table)
    assert tuple(first) == race.COLUMNS
    assert (first["steps"], first["pictures"], first["schedule_steps"]) == ("2", "16", "4")
    assert (second["steps"], second["pictures"], second["goal"]) == ("4", "32", "2")
    assert (first["processor"], first["threads"], first["precision"]) == (processor(), "1", "float32")
    assert first["recipe"] == "configs/photographs.yaml" and first["overrides"] == " ".join(SMALL)
    assert 0 <= float(first["probe"]) <= 1 and float(first["minutes"]) < 1 and first["date"] and first["instructions"]
    said = capsys.readouterr().out
    assert "16 pictures" in said and "goal 2 NOT reached: 32 pictures" in said


def test_the_clock_leaves_out_the_reading(config):
    class Clock:
        now = 0.0

        def __call__(self):
            Clock.now += 30
            return Clock.now

    def reader(*pictures):
        def read(encoder):
            Clock.now += 1e6
            return 0.0

        Clock.now += 1e6
        return read

    found = race.race(config, 1.0, 2, make_reader=reader, clock=Clock(), say=lambda line: None)
    assert found["minutes"] == 4 * 30 / 60 and found["steps"] == 4


def test_the_steps_are_those_of_training_whatever_is_read_between_them(config, tmp_path):
    seen = []

    def reader(config, known, asked):
        probe = race.Probe(config, known, asked)
        return lambda encoder: (seen.append({k: v.clone() for k, v in encoder.state_dict().items()}), probe(encoder))[1]

    race.race(config, 2.0, 1, make_reader=reader, say=lambda line: None)
    train(config, tmp_path / "run", progress=False)
    trained = load_run(tmp_path / "run")[0].state_dict()
    first, last = (weights["vit.blocks.0.attn.qkv.weight"] for weights in (seen[0], seen[3]))
    assert len(seen) == 4 and not torch.equal(first, last)
    for name, weight in trained.items():
        torch.testing.assert_close(seen[3][name], weight, rtol=0, atol=0)


def test_the_schedule_is_that_of_the_steps_asked_for_with_a_tenth_as_warm_up(pictures):
    config = race.configured(race.RECIPE, 90, [*SMALL, f"data.path={pictures}"])
    assert (config.train.steps, config.train.warmup) == (90, 9)


def test_mistakes_are_told_in_one_line_before_anything_is_trained(pictures, tmp_path, monkeypatch, capsys):
    table = tmp_path / "race.csv"
    monkeypatch.setenv("HJEPA_DATA", str(tmp_path / "nowhere"))
    assert race.main(["--table", str(table)]) == 2
    assert race.main(["--table", str(table), "train.steps=9"]) == 2
    table.write_text("date,speed\n")
    assert race.main(["--table", str(table), *SMALL, f"data.path={pictures}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "HJEPA_DATA" in lines[0] and "--steps" in lines[1] and "other columns" in lines[2]
    assert table.read_text() == "date,speed\n"


def test_the_committed_table_has_these_columns_and_names_no_folder():
    assert all("/" not in row["overrides"] for row in race.rows_of(race.TABLE))
