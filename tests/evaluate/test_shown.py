"""Several placements of a picture are one picture: in the choice, in every interval, in every table."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import nn

from hjepa.evaluate.dense import RawPatches, dense_transfer
from hjepa.evaluate.measures import effective_rank, jackknife_interval
from hjepa.evaluate.primary import saved_hits
from hjepa.evaluate.results import format_table, paired, summarise
from hjepa.evaluate.shown import shown_of, subset
from hjepa.evaluate.transfer import resolution_transfer
from hjepa.inputs import UserError

PLACES = 3


class Noise:
    """Pictures of two classes, hard to tell apart, each in `places` placements of its own noise; ids as `load_data`
    gives them, the first placements of all pictures first."""

    def __init__(self, count: int = 40, places: int = PLACES, only: int | None = None, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        own = torch.randn(count, 3, 8, 8, generator=g) + 0.1 * (torch.arange(count) % 2).view(-1, 1, 1, 1)
        noise = [0.7 * torch.randn(count, 3, 8, 8, generator=g) for _ in range(PLACES)]
        turns = range(places) if only is None else [only]
        self.images = torch.cat([own + noise[turn] for turn in turns])
        self.labels = (torch.arange(count) % 2).repeat(len(turns))
        self.ids = [f"p{i}" + (f"#{turn}" if turn else "") for turn in turns for i in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def at_size(self, size: Any, indices: Any = None) -> torch.Tensor:
        return nn.functional.interpolate(self.images[indices], size)


class Corners(nn.Module):
    """Features of a picture: colours of a few of its pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, :8:2, :8:2].flatten(1)  # at 12 px not the same places


def read(test: Noise, hits: Any = None, **options: Any) -> dict[tuple[str, int], dict[str, Any]]:
    known = Noise(places=1, seed=1)
    rows = resolution_transfer(
        {"e": Corners()}, known, test, train_size=8, sizes=[12], knn_k=3, refit=False, few=10, hits=hits, **options
    )
    return {(row["metric"], row["size"][0]): row for row in rows}


def test_the_interval_is_the_brute_force_bootstrap_that_draws_pictures() -> None:
    """Draw pictures with replacement, join the hits of all their placements, take the mean; a thousand times."""
    hits: dict[Any, torch.Tensor] = {}
    rows = read(Noise(), hits)
    for metric in ("knn", "probe", "probe_few", "retrieval"):
        hit = hits["e", (12, 12), metric].double().numpy()
        by_picture = [[float(hit[turn * 40 + i]) for turn in range(PLACES)] for i in range(40)]
        draws = np.random.default_rng(0).integers(40, size=(1000, 40))
        means = [np.mean([value for i in draw for value in by_picture[i]]) for draw in draws]
        row = rows[metric, 12]
        assert [row["low"], row["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]))
        assert row["value"] == pytest.approx(hit.mean()) and (row["n"], row["placements"]) == (40, PLACES)
    spread = np.std([np.mean(values) for values in by_picture], ddof=1) / 40**0.5  # of a mean of pictures
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_rank_spread_and_cka_leave_all_placements_of_a_picture_out_together() -> None:
    """By sets and loops; as if each row were a picture the interval would be another."""
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).repeat(PLACES, 1)
    features += 0.1 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    pictures = torch.arange(40).repeat(PLACES)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    values = []
    for part in range(10):
        gone = {order[i] for i in range(4 * part, 4 * part + 4)}
        values.append(effective_rank(features[[row for row in range(120) if row % 40 not in gone]]))
    half = student.ppf(0.975, 9) * np.sqrt(9 * np.var(values))
    value, low, high = jackknife_interval(lambda i: effective_rank(features[i]), 120, seed=3, pictures=pictures)
    assert (value, low, high) == pytest.approx((effective_rank(features), value - half, value + half), rel=1e-6)
    _, low_of_rows, high_of_rows = jackknife_interval(lambda i: effective_rank(features[i]), 120, seed=3)
    assert high_of_rows - low_of_rows != pytest.approx(high - low, rel=0.05)
    for count in (1, 2):  # pictures, of three placements each
        some = torch.arange(count).repeat(PLACES)
        value, *ends = jackknife_interval(lambda i: effective_rank(features[i]), len(some), pictures=some)
        assert value > 0 and np.isnan(ends).all()


def test_rank_spread_and_cka_of_an_evaluation_are_of_pictures_too() -> None:
    rows = read(Noise())
    features = Corners()(Noise().at_size((12, 12), torch.arange(120)))
    value, low, high = jackknife_interval(
        lambda i: effective_rank(features[i]), 120, pictures=torch.arange(40).repeat(PLACES)
    )
    row = rows["effective_rank", 12]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((value, low, high), rel=1e-5)
    assert rows["cka", 12]["n"] == rows["feature_std", 12]["n"] == 40


def test_an_accuracy_is_the_mean_of_what_each_placement_gives_by_itself() -> None:
    together, alone = read(Noise()), [read(Noise(only=turn)) for turn in range(PLACES)]
    for metric in ("knn", "probe", "probe_few", "retrieval"):
        values = [rows[metric, 12]["value"] for rows in alone]
        assert together[metric, 12]["value"] == pytest.approx(np.mean(values)) and len(set(values)) > 1
    assert 0 < together["retrieval", 12]["value"] < 1


def test_the_same_pictures_are_chosen_whatever_the_number_of_placements() -> None:
    one, three = shown_of(Noise(places=1), 10, 5), shown_of(Noise(), 10, 5)
    assert torch.equal(one.index, subset(40, 10, 5)) and (one.count, one.placements) == (10, 1)
    assert torch.equal(three.index, torch.cat([one.index + 40 * turn for turn in range(PLACES)]))
    assert three.picture.tolist() == 3 * list(range(10)) and three.turn.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert (three.count, three.placements) == (10, PLACES)
    assert {row["n"] for row in read(Noise(), queries=10).values()} == {10}


def test_one_placement_is_read_as_pictures_without_ids_are() -> None:
    plain = Noise(places=1)
    named = read(Noise(places=1))
    del plain.ids
    plain.__class__ = type("Plain", (Noise,), {"__len__": lambda self: 40})
    assert read(plain) == named and not any("placements" in row for row in named.values())


def test_places_of_single_patches_count_pictures_too() -> None:
    rows = dense_transfer({"e": RawPatches(4)}, Noise(places=1), Noise(), train_size=8, sizes=[16], queries=20)
    assert {(row["n"], row["placements"]) for row in rows} == {(20, PLACES)}
    alone = [
        dense_transfer({"e": RawPatches(4)}, Noise(places=1), Noise(only=turn), train_size=8, sizes=[16], queries=20)
        for turn in range(PLACES)
    ]
    for row, *others in zip(rows, *alone, strict=True):
        assert row["value"] == pytest.approx(np.mean([other["value"] for other in others]))


def test_rows_of_other_numbers_of_placements_are_never_one_table() -> None:
    def row(encoder: str, value: float, **tags: Any) -> dict[str, Any]:
        base = {"encoder": encoder, "size": (64, 64), "metric": "knn", "seed": 0, "n": 40}
        return base | {"value": value, "low": value, "high": value, **tags}

    mixed = [row("rope", 0.5, placements=3), row("absolute", 0.4)]
    with pytest.raises(UserError, match="rows of 'knn' were read in 1 and 3 placements of each picture"):
        format_table(mixed, "knn")
    assert paired(mixed, "absolute") == []
    assert len(paired([mixed[0], row("absolute", 0.4, placements=3)], "absolute")) == 1
    assert sorted(each["value"] for each in summarise([*mixed, row("rope", 0.3)])) == [0.3, 0.4, 0.5]


def test_saved_hits_of_placements_come_back_as_shares_of_pictures(tmp_path) -> None:
    hit = np.array([True, False, True, True, False, False])  # two pictures, the first placements first
    np.savez(tmp_path / "hits.npz", **{"knn at 32: rope": hit})  # type: ignore[arg-type]
    found = saved_hits({"encoder": "rope", "size": (32, 32), "metric": "knn", "placements": 3}, tmp_path / "hits.npz")
    assert found is not None and found.tolist() == pytest.approx([2 / 3, 1 / 3])
