"""Comparisons fixed beforehand: pairs, intervals over seeds and pictures, Holm's adjustment."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from hjepa.evaluate.primary import crossed_interval, holm, primary, save_hits, saved_hits
from hjepa.evaluate.results import paired, rows_from_csv, rows_to_csv

A, B = "rope, interpolated", "absolute, resampled"


def test_holms_adjustment_of_a_case_worked_by_hand():
    """.01 x 4, .02 x 3, .03 x 2 = .06 held at .06, .5 x 1; in the order given."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.2]) == [0.2]


def test_one_value_per_seed_gives_the_paired_t_interval_of_scipy():
    values = np.array([3.0, 1.0, 4.0, 1.5])
    mean, low, high, p = crossed_interval(values[:, None])
    peer = ttest_1samp(values, 0)
    assert p == pytest.approx(peer.pvalue)
    assert (mean, low, high) == pytest.approx((values.mean(), *peer.confidence_interval(0.95)))


def test_differences_that_are_all_alike_have_no_width():
    assert crossed_interval(np.full((3, 5), 2.0)) == (2.0, 2.0, 2.0, 0.0)
    assert crossed_interval(np.zeros((3, 5))) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("over_seeds", "over_pictures"), [(1.0, 6.0), (2.0, 0.0), (0.0, 9.0)])
def test_interval_over_seeds_and_pictures_covers_as_often_as_it_says(over_seeds, over_pictures):
    """7 seeds, 60 pictures, both drawn afresh; an interval over seeds alone covers less where pictures matter."""
    rng, covered, alone = np.random.default_rng(0), [], []
    for _ in range(600):
        effects = over_seeds * rng.normal(size=(7, 1)) + over_pictures * rng.normal(size=60)
        drawn = 3 + effects + 5 * rng.normal(size=(7, 60))
        _, low, high, _ = crossed_interval(drawn)
        covered.append(low <= 3 <= high)
        _, low, high, _ = crossed_interval(drawn.mean(axis=1, keepdims=True))
        alone.append(low <= 3 <= high)
    assert 0.92 < np.mean(covered) < 0.995
    assert over_pictures == 0 or np.mean(alone) < 0.9


def test_variance_over_seeds_and_pictures_follows_from_the_mean_squares_of_the_two_way_layout():
    rng = np.random.default_rng(1)
    d = 2 * rng.normal(size=(5, 1)) + 5 * rng.normal(size=8) + rng.normal(size=(5, 8))
    rows, columns, mean = d.mean(1), d.mean(0), d.mean()
    squares = [
        sum(8 * (row - mean) ** 2 for row in rows) / 4,
        sum(5 * (column - mean) ** 2 for column in columns) / 7,
        sum((d[i, j] - rows[i] - columns[j] + mean) ** 2 for i in range(5) for j in range(8)) / 28,
    ]
    parts = [squares[0] / 40, squares[1] / 40, -squares[2] / 40]
    freedom = sum(parts) ** 2 / sum(part**2 / n for part, n in zip(parts, (4, 7, 28), strict=True))
    assert sum(parts) > 1.3 * max(parts)  # neither factor alone
    _, low, high, _ = crossed_interval(d)
    assert (high - low) / 2 == pytest.approx(student.ppf(0.975, freedom) * math.sqrt(sum(parts)))


def _rows(gains, metric="knn", size=32, **tags):
    """Rows of two encoders whose difference at seed s is gains[s] points."""
    same = {"metric": metric, "size": (size, size), "low": 0.0, "high": 1.0, "n": 100, **tags}
    pairs = [(seed, name, 0.4 + (gain / 100 if name == A else 0)) for seed, gain in enumerate(gains) for name in (A, B)]
    return [{**same, "seed": seed, "encoder": name, "value": value} for seed, name, value in pairs]


def _asked(name, metric="knn", size=32, **tags):
    return {"comparison": name, "a": A, "b": B, "metric": metric, "size": size, **tags}


def test_primary_rows_hold_paired_differences_and_adjusted_p_values(tmp_path):
    rows = _rows([3, 1, 4, 1.5], setting="views") + _rows([0, 1, -1, 0.5], setting="labels")
    found = primary(rows, [_asked("views, half", setting="views"), _asked("labels, half", setting="labels")])
    p = [ttest_1samp(gains, 0).pvalue for gains in ([3, 1, 4, 1.5], [0, 1, -1, 0.5])]
    assert [row["p"] for row in found] == pytest.approx(p)
    assert [row["p_holm"] for row in found] == pytest.approx([2 * min(p), max(p)])
    assert [row["mean"] for row in found] == pytest.approx([2.375, 0.125])
    assert [(row["seeds"], row["interval"], row["reader"]) for row in found] == [(4, "seeds", "knn")] * 2
    rows_to_csv(found, tmp_path / "primary.csv")
    (first, _) = rows_from_csv(tmp_path / "primary.csv")
    assert first["comparison"] == "views, half" and first["size"] == (32, 32)
    assert first["p_holm"] == pytest.approx(found[0]["p_holm"], rel=1e-4)


def test_hits_of_single_pictures_widen_the_interval_to_cover_the_pictures():
    rng = np.random.default_rng(0)
    hits = {(seed, name): rng.random(50) < (0.6 if name == A else 0.4) for seed in range(3) for name in (A, B)}
    rows = [row | {"value": hits[row["seed"], row["encoder"]].mean()} for row in _rows([0, 0, 0])]
    (found,) = primary(rows, [_asked("x")], lambda row: hits[row["seed"], row["encoder"]])
    differences = np.array([100.0 * hits[s, A] - 100.0 * hits[s, B] for s in range(3)])
    assert (found["mean"], found["low"], found["high"], found["p"]) == pytest.approx(crossed_interval(differences))
    assert found["interval"] == "seeds and pictures" and found["mean"] == pytest.approx(differences.mean())


def test_saved_hits_come_back_for_their_own_row_and_for_no_other(tmp_path):
    place = "rope", (32, 48)
    hits = {(*place, "knn"): torch.tensor([True, False, True]), (*place, "probe"): torch.ones(3) > 0}
    save_hits(hits, tmp_path / "hits.npz")
    row = {"encoder": "rope", "size": (32, 48), "metric": "knn"}
    found = saved_hits(row, tmp_path / "hits.npz")
    assert found is not None and found.tolist() == [True, False, True]
    assert saved_hits(row | {"size": (48, 32)}, tmp_path / "hits.npz") is None
    assert saved_hits(row, tmp_path / "none.npz") is None


def test_comparisons_without_two_seeds_and_rows_that_stand_twice_are_refused():
    with pytest.raises(ValueError, match=r"'x' \(rope, interpolated against .* has 1 paired seeds"):
        primary(_rows([1]), [_asked("x")])
    with pytest.raises(ValueError, match="comparison 'x': b='absolute, resampled' is not one of rope, interpolated;"):
        primary([row for row in _rows([1, 2]) if row["encoder"] == A], [_asked("x")])
    with pytest.raises(ValueError, match="stands twice for seed 0"):
        paired(_rows([1, 2]) + _rows([1]), B)


def test_pairs_need_the_same_seed_size_and_metric():
    rows = _rows([1, 2]) + _rows([5], size=64)
    pairs = paired(rows[:-1], B)  # the partner at 64 px is missing
    assert [(row["seed"], math.isclose(row["value"] - base["value"], gain)) for (row, base), gain in
            zip(pairs, (0.01, 0.02), strict=True)] == [(0, True), (1, True)]  # fmt: skip
