"""Frozen encoders at many image sizes, checked on stand-ins whose features are known."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hjepa.evaluate.readers import linear_probe
from hjepa.evaluate.results import format_table
from hjepa.evaluate.transfer import (
    DRAWS,
    _few_of,
    _narrow,
    device_named,
    effective_rank,
    encode,
    linear_cka,
    patch_grid,
    pool_tokens,
    raw_pixels,
    resolution_transfer,
    with_strategy,
)
from hjepa.inputs import UserError, size_text
from hjepa.nn.encoders import create_encoder


class PatchMeans(nn.Module):
    """A stand-in encoder: each patch's token is its mean colour, after prefix tokens that are far off."""

    def __init__(self, patch_size: int = 4, num_prefix_tokens: int = 1):
        super().__init__()
        self.patch_size, self.num_prefix_tokens = patch_size, num_prefix_tokens
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, images):
        self.seen.append((self.training, torch.is_grad_enabled()))
        tokens = F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)
        return torch.cat([torch.full((len(images), self.num_prefix_tokens, 3), 1e6), tokens], dim=1)


class Colours:
    """Stand-in pictures: two classes of plain colour with a gradient that tells each picture apart."""

    def __init__(self, n: int, seed: int):
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) * 2 // n
        self.base = torch.randn(n, 3, generator=g) * 0.3 + (self.labels[:, None] * 2.0 - 1) * torch.tensor([1.0, -1, 0])
        self.asked: list[tuple] = []

    def __len__(self):
        return len(self.labels)

    def at_size(self, size, indices=None):
        self.asked.append(size)
        base = self.base if indices is None else self.base[indices]
        return base[:, :, None, None].expand(-1, -1, *size) + torch.linspace(-1, 1, size[0])[:, None]


def test_mean_pool_skips_prefix_tokens_and_equals_mean_colour():
    images = torch.randn(5, 3, 8, 12)
    assert torch.allclose(encode(PatchMeans(), images), images.mean(dim=(2, 3)), atol=1e-6)


def test_pyramid_pool_equals_means_of_whole_and_quarters_on_non_square_grid():
    tokens = torch.randn(2, 4 * 6, 3)
    grid = tokens.view(2, 4, 6, 3)
    whole = grid.mean(dim=(1, 2))
    quarters = [grid[:, r : r + 2, c : c + 3].mean(dim=(1, 2)) for r in (0, 2) for c in (0, 3)]
    expected = torch.stack([whole, *quarters], dim=1)  # [2, 5, 3]
    got = pool_tokens(tokens, (4, 6), "pyramid")
    assert got.shape == (2, 15)
    assert torch.allclose(got[:, :3], whole, atol=1e-6)
    assert torch.allclose(got[:, 3:].view(2, 3, 4).transpose(1, 2), expected[:, 1:], atol=1e-6)


def test_features_do_not_depend_on_batch_size():
    images = torch.randn(7, 3, 8, 8)
    assert torch.equal(encode(PatchMeans(), images, batch_size=2), encode(PatchMeans(), images, batch_size=7))


def test_encode_runs_in_eval_mode_without_gradient_and_restores_train_mode():
    encoder = PatchMeans().train()
    encode(encoder, torch.randn(2, 3, 8, 8))
    assert encoder.seen == [(False, False)]
    assert encoder.training


def test_size_that_is_no_multiple_of_patch_is_refused_with_the_nearest_size():
    with pytest.raises(ValueError, match="30x30 is not a multiple of the patch 8; nearest: 32"):
        patch_grid(30, 8)
    with pytest.raises(ValueError, match="nearest: 8"):
        encode(PatchMeans(), torch.randn(1, 3, 9, 8))


def test_transfer_refuses_bad_training_size_before_any_work():
    data = Colours(8, 0)
    with pytest.raises(ValueError, match="10x10"):
        resolution_transfer({"e": PatchMeans()}, data, data, train_size=10, sizes=[8])
    assert data.asked == []


def test_features_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="not all finite"):
        encode(lambda images: images.flatten(1) / 0, torch.ones(2, 3, 4, 4))


def test_pictures_that_are_bytes_are_not_read_as_if_normalised():
    with pytest.raises(UserError, match=r"images are torch.uint8, .* normalised floats"):
        encode(PatchMeans(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_raw_pixels_at_training_size_are_the_pixels_and_elsewhere_keep_the_picture():
    smooth = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    pixels = raw_pixels((16, 16))
    assert torch.equal(pixels(smooth[..., :16, :16]), smooth[..., :16, :16].flatten(1))
    halves = F.avg_pool2d(smooth, 2).flatten(1)
    assert pixels(smooth).shape == halves.shape
    assert (pixels(smooth) - halves).abs().max() < 0.02


def test_raw_pixels_of_a_larger_image_average_over_every_source_pixel():
    inner = torch.zeros(1, 3, 64, 64)
    for row in range(20, 24):
        dot = inner.clone()
        dot[..., row, 30] = 1
        assert raw_pixels(16)(dot).sum() / 3 == pytest.approx(1 / 16, rel=0.05)  # one pixel of 4x4, wherever


def test_a_probe_of_few_pictures_is_the_mean_of_probes_fitted_on_seeded_draws_of_them():
    """Against the draws made by hand; with as many as there are it is the probe."""
    data, asked, encoder = Colours(60, 0), Colours(200, 1), PatchMeans()
    hits: dict = {}
    read = lambda few: resolution_transfer(  # noqa: E731
        {"e": encoder}, data, asked, train_size=8, sizes=[16], few=few, refit=False, hits=hits
    )
    assert all(row["metric"] != "probe_few" for row in read(None))
    whole = read(60)
    for size in ((8, 8), (16, 16)):
        assert _value(whole, metric="probe_few", size=size) == _value(whole, metric="probe", size=size)
    rows = read(6)
    features = {side: encode(encoder, of.at_size((side, side))) for side, of in ((8, data), (16, asked))}
    right = []
    for draw in range(DRAWS):
        index = torch.randperm(60, generator=torch.Generator().manual_seed(draw))[:6].sort().values
        probe = linear_probe(features[8][index], data.labels[index])
        right.append(probe.predict(features[16].numpy()) == asked.labels.numpy())
    assert hits["e", (16, 16), "probe_few"].numpy() == pytest.approx(np.mean(right, axis=0))
    assert _value(rows, metric="probe_few", size=(16, 16)) == pytest.approx(np.mean(right))
    assert np.unique(np.sum(right, axis=1)).size > 1, "draws that read differently"


@pytest.mark.parametrize("encoder", [PatchMeans(), raw_pixels(32)], ids=["narrow", "reduced first"])
def test_few_pictures_are_of_two_classes_or_more(encoder):
    """Of 40 pictures 10 are of the other class: most pairs hold one class alone, and get one picture of the other."""
    data, asked = Colours(40, 0), Colours(60, 1)
    data.labels = (torch.arange(40) >= 30).long()
    pairs = [torch.randperm(40, generator=torch.Generator().manual_seed(draw))[:2] for draw in range(DRAWS)]
    drawn = [_few_of(data.labels, 2, draw) for draw in range(DRAWS)]
    kept = [len(data.labels[pair].unique()) == 2 for pair in pairs]
    assert any(kept) and not all(kept)
    for pair, own, same in zip(pairs, drawn, kept, strict=True):
        assert len(own.unique()) == 2 == len(data.labels[own].unique()) and pair[0] in own
        assert torch.equal(own, pair.sort().values) is same
    rows = resolution_transfer({"e": encoder}, data, asked, train_size=8, sizes=[], few=2, refit=False)
    assert 0 < _value(rows, metric="probe_few") <= 1


@pytest.mark.parametrize("few", [1, 61])
def test_few_pictures_are_two_or_more_of_the_gallery(few):
    data = Colours(80, 0)
    with pytest.raises(UserError, match=rf"few={few} pictures .*: a gallery of 60 allows 2 to 60"):
        resolution_transfer({"e": PatchMeans()}, data, data, train_size=8, sizes=[], gallery=60, few=few)
    assert data.asked == []


class Movable(PatchMeans):
    """Notes the devices that it is moved to."""

    def to(self, *args, **kwargs):
        self.moved = [*getattr(self, "moved", []), *args]
        return super().to(*args, **kwargs)


def test_encoders_are_moved_to_the_device_and_read_the_same_there():
    """On the CPU: the encoder itself, also behind a view; plain functions stay as they are."""
    encoder, hits = Movable(), [{}, {}]
    encoder.rope = _Rope()
    encoders = {"e": encoder, "view": with_strategy(encoder, "interpolate"), "pixels": raw_pixels(4)}
    read = lambda hits, **where: resolution_transfer(  # noqa: E731
        encoders, Colours(60, 0), Colours(40, 1), train_size=8, sizes=[16], few=20, hits=hits, **where
    )
    plain = read(hits[0])
    assert not hasattr(encoder, "moved"), "without a device, encoders stay where they are"
    assert read(hits[1], device=torch.device("cpu")) == plain
    assert encoder.moved == 2 * [torch.device("cpu")]
    assert hits[0].keys() == hits[1].keys() and all(torch.equal(hits[0][key], hits[1][key]) for key in hits[0])


def test_a_device_is_one_that_is_here(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == device_named("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'cuda:0' is not here; choose one of auto, cpu; nearest: auto"):
        device_named("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("auto") == torch.device("cuda") and device_named("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="choose one of auto, cpu, cuda, cuda:0, cuda:1; nearest: cuda"):
        device_named("cdua")
    for rank, own in (("1", "cuda:1"), ("2", "cuda:0")):  # as torchrun numbers the processes of a machine
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert device_named("auto") == device_named("cuda") == torch.device(own)
        assert device_named("cuda:1") == torch.device("cuda:1") and device_named("cpu") == torch.device("cpu")


class _Rope:
    strategy = "extrapolate"


class Stretchy(PatchMeans):
    """Its tokens are doubled by the strategy "interpolate"; "broken" fails in the middle of the call."""

    def __init__(self):
        super().__init__()
        self.rope = _Rope()

    def forward(self, images):
        if self.rope.strategy == "broken":
            raise RuntimeError("broken")
        return super().forward(images) * (2 if self.rope.strategy == "interpolate" else 1)


def test_strategy_holds_during_the_call_only():
    encoder, images = Stretchy(), torch.randn(3, 3, 8, 8)
    plain = encode(encoder, images)
    assert torch.allclose(encode(with_strategy(encoder, "interpolate"), images), 2 * plain)
    assert encoder.rope.strategy == "extrapolate"
    assert torch.equal(encode(encoder, images), plain)


def test_strategy_is_restored_when_the_call_fails():
    encoder = Stretchy()
    with pytest.raises(RuntimeError, match="broken"):
        with_strategy(encoder, "broken")(torch.randn(1, 3, 8, 8))
    assert encoder.rope.strategy == "extrapolate"


def test_strategy_view_of_an_encoder_is_read_in_eval_mode():
    encoder = Stretchy().train()
    encode(with_strategy(encoder, "interpolate"), torch.randn(1, 3, 8, 8))
    assert encoder.seen == [(False, False)] and encoder.training


def test_strategy_needs_relative_positions():
    with pytest.raises(ValueError, match="has neither"):
        with_strategy(PatchMeans(), "ntk")


def _value(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row["value"]


@pytest.fixture(scope="module")
def colour_rows():
    encoders: dict[str, Any] = {"means": PatchMeans(), "pixels": raw_pixels(8), "shy": Fades()}
    return resolution_transfer(
        encoders, Colours(80, 0), Colours(60, 1), train_size=8, sizes=[8, (8, 16), 16], tags={"seed": 3}
    )


class Fades(PatchMeans):
    """Right at 8 px; elsewhere red shows green and green nothing: the 8 px reader is wrong, a refit right."""

    def forward(self, images):
        if images.shape[-1] != 8:
            images = images[:, [1, 0, 2]] * torch.tensor([1.0, 0, 1])[:, None, None]
        return super().forward(images)


@pytest.mark.parametrize("queries", [1, 2])
def test_one_test_picture_or_two_are_read_without_intervals_of_rank_spread_and_cka(queries):
    rows = resolution_transfer(
        {"means": PatchMeans()}, Colours(40, 0), Colours(30, 1), train_size=8, sizes=[16], queries=queries
    )
    ends = {(row["metric"], size_text(row["size"])): np.isnan([row["low"], row["high"]]).tolist() for row in rows}
    for (metric, _), missing in ends.items():
        assert missing == [metric in ("effective_rank", "feature_std", "cka")] * 2
    assert {row["n"] for row in rows} == {queries} and "means" in format_table(rows, "cka")


def test_transfer_of_size_independent_features_is_perfect(colour_rows):
    for size in [(8, 8), (8, 16), (16, 16)]:
        for metric in ("probe", "probe_refit", "knn", "retrieval"):
            assert _value(colour_rows, encoder="means", size=size, metric=metric) > 0.98, (size, metric)
        assert _value(colour_rows, encoder="means", size=size, metric="cka") == pytest.approx(1, abs=1e-4)


def test_probe_shows_broken_transfer_and_refit_shows_the_features_still_hold_it(colour_rows):
    at = {"encoder": "shy", "size": (16, 16)}
    assert _value(colour_rows, **at, metric="probe") < 0.05
    assert _value(colour_rows, **at, metric="knn") < 0.05
    assert _value(colour_rows, **at, metric="probe_refit") > 0.98
    assert _value(colour_rows, **at, metric="retrieval") < 0.1
    assert 0.1 < _value(colour_rows, **at, metric="cka") < 0.98
    assert _value(colour_rows, encoder="shy", size=(8, 8), metric="cka") == pytest.approx(1)


class Shifts(PatchMeans):
    """Away from 8 px all pictures are greener by the same."""

    def forward(self, images):
        return super().forward(images) + (images.shape[-1] != 8) * torch.tensor([0, 3.0, 0])


@pytest.mark.parametrize("reader", ["probe", "knn"])
def test_a_reader_around_the_mean_of_each_size_does_not_see_a_shift_that_all_pictures_share(reader):
    rows = resolution_transfer({"e": Shifts()}, Colours(80, 0), Colours(60, 1), train_size=8, sizes=[16])
    found = {(row["metric"], row["size"][0]): row["value"] for row in rows}
    assert found[reader, 8] == found[f"{reader}_centred", 8] > 0.98
    assert found[reader, 16] < 0.7 and found[f"{reader}_centred", 16] > 0.98


def test_every_encoder_size_and_metric_has_one_tagged_row_with_its_interval(colour_rows):
    keys = [(row["encoder"], row["size"], row["metric"]) for row in colour_rows]
    assert len(set(keys)) == len(keys) == 3 * 3 * 9
    for row in colour_rows:
        assert row["seed"] == 3 and row["n"] == 60
        assert row["low"] <= row["value"] <= row["high"]


def test_intervals_of_moved_pictures_count_each_picture_once():
    """Placements named "x" and "x#1" against the same pictures under names of their own."""
    widths = []
    for ids in ([f"p{i % 30}" + (f"#{i // 30}" if i >= 30 else "") for i in range(120)], [f"p{i}" for i in range(120)]):
        test = Colours(120, 1)
        test.base = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
        test.labels, test.ids = (torch.arange(120) % 30) % 2, ids
        rows = resolution_transfer({"e": PatchMeans()}, Colours(60, 0), test, train_size=8, sizes=[], refit=False)
        (row,) = [row for row in rows if row["metric"] == "knn"]
        widths.append(row["high"] - row["low"])
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.2)


def test_the_hits_behind_each_share_are_handed_out():
    hits: dict[Any, torch.Tensor] = {}
    data = Colours(40, 0), Colours(30, 1)
    rows = resolution_transfer({"e": Fades()}, *data, train_size=8, sizes=[16], hits=hits)
    metrics = ("probe", "probe_centred", "probe_refit", "knn", "knn_centred", "retrieval")
    assert set(hits) == {("e", (s, s), m) for s in (8, 16) for m in metrics}
    for (_, size, metric), each in hits.items():
        assert each.shape == (30,) and float(each.double().mean()) == _value(rows, size=size, metric=metric)


def test_neighbours_are_at_most_as_many_as_the_gallery_has_pictures():
    rows = resolution_transfer({"e": PatchMeans()}, Colours(6, 0), Colours(9, 1), train_size=8, sizes=[], refit=False)
    few = resolution_transfer(
        {"e": PatchMeans()}, Colours(6, 0), Colours(9, 1), train_size=8, sizes=[], refit=False, knn_k=6
    )
    assert rows == few


def test_pictures_are_drawn_once_per_size_for_all_encoders():
    train, test = Colours(20, 0), Colours(20, 1)
    encoders = {str(i): PatchMeans() for i in range(3)}
    resolution_transfer(encoders, train, test, train_size=8, sizes=[16], knn_k=3, refit=False)
    assert train.asked == [(8, 8)]
    assert test.asked == [(8, 8), (16, 16)]


def test_gallery_and_query_counts_choose_seeded_subsets():
    train, test = Colours(50, 0), Colours(50, 1)
    kwargs: dict[str, Any] = {
        "train_size": 8,
        "sizes": [8],
        "gallery": 20,
        "queries": 10,
        "knn_k": 3,
        "refit": False,
    }
    first, again, other = (
        resolution_transfer({"e": PatchMeans()}, train, test, **kwargs, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert _value(first, metric="knn") == _value(first, metric="probe") == 1  # pictures kept their own labels
    assert {row["n"] for row in first} == {10}
    assert _value(first, metric="effective_rank") != _value(other, metric="effective_rank")


def test_narrowed_wide_features_keep_rank_and_cka():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 50, generator=g), torch.randn(20, 30, generator=g)
    assert _narrow(x).shape == (20, 20)
    assert effective_rank(_narrow(x)) == pytest.approx(effective_rank(x), rel=1e-6)
    assert linear_cka(_narrow(x), _narrow(y)) == pytest.approx(linear_cka(x, y), rel=1e-6)


def test_feature_std_of_features_wider_than_the_pictures_are_many():
    """The narrowing that keeps rank and CKA is a rotation, and a rotation changes the spread per channel."""
    test = Colours(10, seed=1)
    rows = resolution_transfer({"raw": raw_pixels(8)}, Colours(20, seed=0), test, train_size=8, sizes=[], refit=False)
    pixels = test.at_size((8, 8)).flatten(1).double()
    assert pixels.shape == (10, 192)
    expected = (pixels / pixels.norm(dim=1, keepdim=True)).std(0).mean().item()
    assert _value(rows, metric="feature_std") == pytest.approx(expected, rel=1e-6)


def test_strategies_of_a_real_encoder_differ_only_away_from_its_training_size():
    torch.manual_seed(0)
    vit = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder, _ = create_encoder(
        "vit_tiny_patch16_224", 32, use_rope=True, rope_theta=100.0, use_absolute=False, vit=vit
    )
    views = {"plain": encoder, "stretched": with_strategy(encoder, "interpolate")}
    for size, same in [((32, 32), True), ((64, 64), False), ((32, 64), False)]:
        images = torch.randn(4, 3, *size)
        x, y = (encode(view, images, pool="pyramid") for view in views.values())
        assert x.shape == (4, 5 * 32)
        assert torch.allclose(x, y, atol=1e-5) is same
    assert encoder.rope.strategy == "extrapolate"


@pytest.mark.parametrize("use_rope", [False, True])
def test_an_encoder_in_half_precision_is_read_in_its_own(use_rope):
    vit = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder, _ = create_encoder("vit_tiny_patch16_224", 16, use_rope=use_rope, vit=vit)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = encode(encoder, images)
    for dtype in (torch.bfloat16, torch.float64):
        features = encode(encoder.to(dtype), images)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, exact, atol=0.05, rtol=0)
