"""The command of the primary comparisons: its cells, its sealed readings, the number of seeds that a pilot gives."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from benchmarks import evidence
from hjepa.config import flat_config
from hjepa.evaluate.plots import cells_figure
from hjepa.evaluate.results import rows_from_csv

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 40


def write_seed(folder: Path, seed: int, gain: int = 4) -> dict[str, np.ndarray]:
    """Readings of one seed, made up: of 40 pictures rotation gets 10 + gain + seed right, the embedding 10."""
    hits = {}
    for cell in evidence.CELLS:
        simple = (("random init", 3), ("HOG", 7)) if cell == "views, one grid" else ()
        for encoder, right in ((evidence.A, 10 + gain + seed), (evidence.B, 10), *simple):
            for size in (32, 64, 128):
                for metric in evidence.METRICS:
                    hits[evidence.key_of(cell, encoder, (size, size), metric)] = np.arange(PICTURES) < right
    evidence.save(hits, folder / f"seed-{seed}.npz")
    return hits


@pytest.mark.parametrize("cell", evidence.CELLS)
def test_the_two_models_of_a_cell_differ_in_their_positions_alone(cell):
    rope, absolute = (flat_config(config) for config in evidence.configs_of(cell, 3).values())
    assert {key for key in rope if rope[key] != absolute[key]} == {"model.rope.use_rope", "model.use_absolute"}
    assert rope["model.rope.use_rope"] and absolute["model.use_absolute"] and rope["train.seed"] == 3
    assert rope["model.rope.theta"] == 10 and rope["model.embed_dim"] == 128 and rope["train.batch_size"] == 128


def test_the_cells_are_those_of_the_protocol():
    text = (ROOT / "docs" / "protocol.md").read_text()
    assert "120 steps of 128 pictures with views, 240 with labels" in text
    for cell in evidence.CELLS:
        config = flat_config(evidence.configs_of(cell, 0)["rope"])
        assert config["train.steps"] == (120 if cell.startswith("views") else 240)
        grids = (config["views.small"] > 0) if cell.startswith("views") else (len(config["data.train_scales"]) > 1)
        assert grids == ("several" in cell)
    assert len({tuple(sorted(c.items())) for c in evidence.comparisons()}) == 16


def test_stored_hits_come_back_as_they_were_and_make_the_rows(tmp_path):
    stored = write_seed(tmp_path, 0)
    rows = list(evidence.rows_of(tmp_path, [0]))
    assert len(rows) == len(stored)
    for row, hit in rows:
        assert np.array_equal(hit, stored[evidence.key_of(row["cell"], row["encoder"], row["size"], row["metric"])])
        assert row["value"] == hit.mean()


def test_a_picture_in_several_places_counts_by_its_share_and_its_places_are_drawn_together(tmp_path):
    """Two pictures in three places, stored place by place: one is read rightly everywhere, the other nowhere."""
    key = evidence.key_of("views, one grid", evidence.A, (64, 64), "knn")
    evidence.save({key: np.array([1, 0, 1, 0, 1, 0], bool)}, tmp_path / "seed-0.npz", placements=3)
    evidence.save({key: np.array([1, 0, 0, 0, 1, 1], bool)}, tmp_path / "seed-1.npz", placements=3)
    (row, hit), (_, other) = evidence.rows_of(tmp_path, [0, 1])
    assert hit.tolist() == [1, 0] and other == pytest.approx([2 / 3, 1 / 3])
    assert (row["value"], row["low"], row["high"], row["n"]) == (0.5, 0.0, 1.0, 6)


def test_moved_drawings_differ_from_the_photographs_in_their_pictures_alone():
    for cell in evidence.CELLS:
        ours, theirs = (flat_config(evidence.configs_of(cell, 1, data=data)["rope"]) for data in evidence.DATA)
        assert {key for key in ours if ours[key] != theirs[key]} == {
            "data.name", "data.moved", "views.color_jitter", "views.grey",
        }  # fmt: skip


def test_nothing_is_looked_at_before_the_last_seed_is_there(tmp_path, capsys):
    for seed in (0, 1):
        write_seed(tmp_path, seed)
    with pytest.raises(ValueError, match=r"lacks seeds \[2\]"):
        evidence.main(["table", str(tmp_path), "--seeds", "3"])
    assert not list(tmp_path.glob("*.csv")) and capsys.readouterr().out == ""


def test_a_fixed_code_is_a_third_scheme_of_the_same_sixteen(tmp_path):
    """Of 40 pictures the code gets 12 right, the embedding 10, rotation 14, 15 and 16: +5, 0 and a mean of +7.5."""
    for seed in (0, 1, 2):
        ours = write_seed(tmp_path, seed)
        code = {key.replace(evidence.B, evidence.CODE): np.arange(PICTURES) < 12
                for key in ours if evidence.B in key or "HOG" in key}  # fmt: skip
        if seed == 2:
            with pytest.raises(ValueError, match=r"sincos lacks seeds \[2\]"):
                evidence.main(["table", str(tmp_path), "--seeds", "3"])
            assert not list(tmp_path.rglob("*.csv"))
        evidence.save(code, tmp_path / "sincos" / f"seed-{seed}.npz")
    assert evidence.main(["table", str(tmp_path), "--seeds", "3"]) == 0
    found = rows_from_csv(tmp_path / "sincos" / "primary.csv")
    assert len(found) == 16 and all(row["mean"] == pytest.approx(7.5) for row in found)
    assert all(row["mean"] == pytest.approx(12.5) for row in rows_from_csv(tmp_path / "primary.csv"))
    assert "rotation minus code" in (tmp_path / "sincos" / "summary.md").read_text()
    beside = {row["difference"]: row["mean"] for row in rows_from_csv(tmp_path / "secondary.csv")}
    assert beside == pytest.approx({
        "rotation - embedding": 12.5, "rotation - embedding, less that at 64 px": 0, "rotation - code": 7.5,
        "rotation - code, less that at 64 px": 0, "code - embedding": 5,
    })  # fmt: skip
    hog = [row for row in rows_from_csv(tmp_path / "accuracy.csv") if row["encoder"] == "HOG"]
    assert len(hog) == 3 * 6 and {row["value"] for row in hog} == {0.175}  # the copy beside the code is not counted


def test_the_cells_of_the_code_differ_from_the_embeddings_in_the_code_alone():
    for cell in evidence.CELLS:
        absolute, code = (flat_config(evidence.configs_of(cell, 1, [name])[name]) for name in ("absolute", "sincos"))
        assert {key for key in code if code[key] != absolute[key]} == {"model.position_embedding"}


def test_the_table_has_the_sixteen_comparisons_over_seeds_and_pictures(tmp_path):
    """Gains of 4, 5 and 6 pictures in 40."""
    for seed in (0, 1, 2):
        write_seed(tmp_path, seed)
    without = {
        key.replace(evidence.A, "none"): hit
        for key, hit in write_seed(tmp_path, 0).items() if evidence.A in key
    }  # fmt: skip
    evidence.save(without, tmp_path / "control" / "seed-0.npz")
    assert evidence.main(["table", str(tmp_path), "--seeds", "3"]) == 0
    found, rows = (rows_from_csv(tmp_path / name) for name in ("primary.csv", "accuracy.csv"))
    assert {row["encoder"] for row in rows} == {evidence.A, evidence.B, "random init", "HOG", "none"}
    panels = cells_figure(rows, 64).axes
    assert [panel.get_title() for panel in panels[:4]] == list(evidence.CELLS) and len(panels) == 8
    for panel in panels:  # baselines in every panel
        drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines if line.get_label()[0] != "_"}
        for name, value in {evidence.B: 0.25, "HOG": 0.175, "none": 0.35}.items():
            assert drawn[name] == pytest.approx([value] * 3)
    narrow = cells_figure(rows, 64, columns=2, trained={"views, several grids": (32,)}).axes
    assert [panel.get_title() for panel in narrow] == 2 * list(evidence.CELLS)
    assert len({panel.get_ylim() for panel in narrow[:4]}) == 1  # one scale for all panels of a metric
    assert [len(panel.texts) > 1 for panel in narrow] == 4 * [False, True]  # names stand at the right
    for panel in narrow:
        lines = [line.get_xdata()[0] for line in panel.lines if line.get_label() == "_trained too"]
        assert lines == [32] * (panel.get_title() == "views, several grids")
    assert [(r["comparison"], r["size"], r["reader"]) for r in found] == [
        (cell, (size, size), metric) for cell in evidence.CELLS for size in (32, 128) for metric in ("knn", "probe")
    ]
    assert all(r["mean"] == pytest.approx(12.5) and r["seeds"] == 3 for r in found)
    assert {r["interval"] for r in found} == {"seeds and pictures"}
    assert "| labels, one grid | +12.5 [" in (tmp_path / "summary.md").read_text()


def test_the_number_of_seeds_is_the_fewest_whose_interval_is_two_points_to_either_side():
    """Against the definition, written out; at least five and at most twelve."""
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.5, 2.0, 2.5, 9.0):
        differences = scale * rng.normal(size=(16, 2))
        pooled = np.sqrt(np.mean([(a - b) ** 2 / 2 for a, b in differences]))
        wide = [n for n in range(2, 200) if student.ppf(0.975, n - 1) * pooled / np.sqrt(n) <= 2]
        assert evidence.number_of_seeds(differences) == (pytest.approx(pooled), min(max(wide[0], 5), 12))


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/primary/**/primary.csv")), ids=str)
def test_the_committed_table_follows_from_the_committed_readings(path):
    seeds = sorted(int(file.stem.split("-")[1]) for file in path.parent.glob("seed-*.npz"))
    opponent = evidence.CODE if path.parent.name == "sincos" else evidence.B
    folder = path.parent.parent if opponent == evidence.CODE else path.parent
    found = evidence.found_in(evidence.pairs_of(folder, seeds), opponent)
    for row, made in zip(rows_from_csv(path), found, strict=True):
        assert {key: row[key] for key in ("comparison", "reader", "size", "seeds")} == {
            key: made[key] for key in ("comparison", "reader", "size", "seeds")
        }
        assert [row[k] for k in ("mean", "low", "high", "p", "p_holm")] == pytest.approx(
            [made[k] for k in ("mean", "low", "high", "p", "p_holm")], rel=1e-4, abs=1e-4
        )


def test_differences_beside_the_sixteen_follow_from_the_committed_readings():
    """Recomputed from single pictures; the intervals' formula has its own tests."""
    folder = ROOT / "results" / "primary"
    rows = rows_from_csv(folder / "secondary.csv")
    assert len(rows) == 4 * 2 * (8 + 6 + 8)

    def accuracy(place, seed, encoder, size, reader):
        with np.load(folder / place / f"seed-{seed}.npz") as kept:
            packed = kept["; ".join((cell, encoder, str(size), reader))]
            return 100 * np.unpackbits(packed, count=int(kept["pictures"])).mean()

    cell = "labels, one grid"
    for reader in ("knn", "probe"):
        gain = {size: np.mean([accuracy("", s, evidence.A, size, reader) - accuracy("", s, evidence.B, size, reader)
                               for s in range(6)]) for size in (64, 128)}  # fmt: skip
        over = np.mean([accuracy("", s, evidence.B, 128, reader) - accuracy("control", s, "none", 128, reader)
                        for s in range(3)])  # fmt: skip
        found = {row["difference"]: row["mean"] for row in rows
                 if (row["comparison"], row["reader"], row["size"]) == (cell, reader, (128, 128))}  # fmt: skip
        code = np.mean([accuracy("sincos", s, evidence.CODE, 128, reader) - accuracy("", s, evidence.B, 128, reader)
                        for s in range(6)])  # fmt: skip
        expected = {"rotation - embedding": gain[128], "embedding - none": over, "code - embedding": code,
                    "rotation - embedding, less that at 64 px": gain[128] - gain[64]}  # fmt: skip
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
