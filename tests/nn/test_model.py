"""HJEPA: targets pooled on the 2-D grid, gradient on one side only, losses and regularizers held to formulas."""

import itertools
import math
from typing import Any

import pytest
import torch
from builders import MODES, TINY, noisy, pictures
from formulas import pool_cells
from torch import Tensor

from hjepa.nn.encoders import create_encoder
from hjepa.nn.hjepa import (
    HJEPA,
    cell_centres,
    pool_to_level,
    sketched_gaussian_regularizer,
    variance_regularizer,
)
from hjepa.nn.masks import Masks, sample_masks
from hjepa.nn.predictor import Predictor
from hjepa.nn.rope import grid_positions

RAGGED = [(4, 4), (5, 7), (8, 3), (1, 6), (9, 9)]


def build(use_rope: bool = True, use_absolute: bool = False, levels: int = 3, size: int = 32, **options: Any) -> HJEPA:
    torch.manual_seed(0)
    rope = options.pop("rope", None)
    places: dict[str, Any] = {"use_rope": use_rope, "rope_theta": 20.0, "use_absolute": use_absolute, "rope": rope}
    context, target = create_encoder("vit_tiny_patch16_224", size, vit=TINY, **places)
    predictor = Predictor(
        16, 48, 2, 4, levels=levels, grid_size=context.grid_size, num_prefix_tokens=context.num_prefix_tokens, **places
    )
    return HJEPA(context, target, predictor, **({"level_weights": [1.0, 0.5, 0.25][:levels]} | options))


def masks_for(grid: tuple[int, int], batch: int = 2, levels: int = 3) -> Masks:
    return sample_masks(batch, grid, levels=levels, generator=torch.Generator().manual_seed(0))


# the hierarchy


@pytest.mark.parametrize("grid", RAGGED)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_pooling_equals_a_loop_over_cells_of_the_grid(grid: tuple[int, int], level: int) -> None:
    patches = torch.randn(2, grid[0] * grid[1], 5, dtype=torch.float64)
    pooled = pool_to_level(patches, grid, level)
    for sample in range(2):
        torch.testing.assert_close(pooled[sample], pool_cells(patches[sample], grid, level))


def test_the_loop_catches_pooling_over_the_raster_list() -> None:
    """The planted error: windows of four consecutive tokens, which lie in one row and not in a 2 x 2 cell."""
    patches = torch.randn(16, 5, dtype=torch.float64)
    raster = patches.unflatten(0, (4, 4)).mean(1)
    assert raster.shape == pool_cells(patches, (4, 4), 1).shape
    assert (raster - pool_cells(patches, (4, 4), 1)).abs().max() > 0.1


@pytest.mark.parametrize("grid", RAGGED)
def test_a_cell_lies_at_the_mean_of_its_patches(grid: tuple[int, int]) -> None:
    positions = grid_positions(*grid)
    for level in range(4):
        torch.testing.assert_close(cell_centres(positions, grid, level), pool_cells(positions, grid, level))
    assert cell_centres(grid_positions(4, 6), (4, 6), 1)[4].tolist() == [2.5, 2.5]


@pytest.mark.parametrize("size", [(32, 32), (28, 40), (20, 36)])
def test_targets_are_the_pooled_normed_features_of_the_asked_cells(size: tuple[int, int]) -> None:
    model, images, grid = build(), pictures(*size), (size[0] // 4, size[1] // 4)
    noisy(model.target_encoder)
    masks = masks_for(grid)
    features = model.target_encoder(images)[:, 1:]
    features = (features - features.mean(-1, keepdim=True)) / (
        features.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    for level, (targets, index) in enumerate(
        zip(model.make_targets(images, masks, grid), masks.target_idx, strict=True)
    ):
        for sample in range(2):
            expected = pool_cells(features[sample], grid, level)[index[sample]]
            torch.testing.assert_close(targets[sample], expected, atol=1e-5, rtol=1e-4)


def test_predictor_is_asked_at_the_places_of_its_targets() -> None:
    """Position by position: context patches at their own, queries at the centre of their cell."""
    model, masks, grid, seen = build(), masks_for((7, 9)), (7, 9), []
    model.predictor.register_forward_pre_hook(lambda module, args: seen.append(args))
    model.eval()(pictures(28, 36), masks)
    (_, context, queries, asked_grid) = seen[0]
    positions = grid_positions(*grid)
    assert asked_grid == grid and torch.equal(context, positions[masks.context_idx])
    for level, places in enumerate(queries):
        torch.testing.assert_close(places, pool_cells(positions, grid, level)[masks.target_idx[level]])


def test_encoder_and_predictor_share_one_draw_of_augmented_coordinates() -> None:
    model, masks, seen = build(rope={"shift": 0.5, "jitter": 1.5}), masks_for((8, 8)), []
    model.context_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["positions"]), with_kwargs=True
    )
    model.predictor.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    for training in (True, False):
        seen.clear()
        model.train(training)(pictures(32), masks)
        assert torch.equal(seen[0][masks.context_idx], seen[1])
        assert torch.equal(seen[0], grid_positions(8, 8)) is not training


# gradients and learning


def test_target_gets_no_gradient_and_everything_else_does() -> None:
    model = build(rope={"learnable": True})
    noisy(model.context_encoder), noisy(model.predictor)
    model.train()(pictures(32), masks_for((8, 8))).loss.backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    trained = [p for module in (model.context_encoder, model.predictor) for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert not model.target_encoder.training


@pytest.mark.parametrize(("use_rope", "use_absolute"), MODES)
def test_overfits_one_batch_unless_it_has_no_positions(use_rope: bool, use_absolute: bool) -> None:
    model, images, masks = build(use_rope, use_absolute), pictures(32), masks_for((8, 8))
    noisy(model.target_encoder)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        loss = model(images, masks).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    if use_rope or use_absolute:
        assert losses[-1] < 0.4 * losses[0]
    else:
        assert losses[-1] > 0.5 * losses[0]


def test_without_positions_predictions_of_a_level_are_identical() -> None:
    for use_rope, use_absolute in ((False, False), (True, False), (False, True)):
        model = build(use_rope, use_absolute).eval()
        noisy(model)
        for predictions in model(pictures(32), masks_for((8, 8))).predictions:
            spread = (predictions - predictions[:, :1]).abs().max()
            if predictions.shape[1] > 1:
                assert (spread > 1e-2) if use_rope or use_absolute else (spread < 1e-5)


# the loss


def smooth_l1(difference: Tensor) -> Tensor:
    size = difference.abs()
    return torch.where(size < 1, 0.5 * size**2, size - 0.5).mean()


@pytest.mark.parametrize("distance", ["smooth_l1", "mse"])
@pytest.mark.parametrize("regularizer", ["none", "variance"])
def test_loss_is_the_weighted_sum_of_its_parts(distance: str, regularizer: str) -> None:
    model = build(distance=distance, regularizer=regularizer, regularizer_weight=0.3, level_weights=(1.0, 0.2, 0.7))
    noisy(model)
    masks = masks_for((8, 8))
    out = model.eval()(pictures(32), masks)
    formula = smooth_l1 if distance == "smooth_l1" else lambda difference: difference.square().mean()
    pairs = list(zip(out.predictions, out.targets, strict=True))
    losses = [formula((p - t).double()) for p, t in pairs]
    expected = losses[0] + 0.2 * losses[1] + 0.7 * losses[2]
    term = torch.zeros(())
    if regularizer == "variance":
        term = variance_regularizer(model.context_encoder(pictures(32), masks.context_idx)[:, 1:].mean(1))
    torch.testing.assert_close(out.level_losses.double(), torch.stack(losses).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.regularizer, term.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss.double(), expected + 0.3 * term.double(), atol=1e-4, rtol=1e-4)
    p, t = (x.double() for x in pairs[0])
    cosine = ((p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))).mean()
    torch.testing.assert_close(out.cosine.double(), cosine.detach(), atol=1e-5, rtol=1e-4)


def test_variance_regularizer_equals_the_formula_in_float64() -> None:
    features = torch.randn(20, 4, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    features[:, 1] += features[:, 3]
    rows, means = features.tolist(), features.mean(0).tolist()
    cov = [
        [sum((r[i] - means[i]) * (r[j] - means[j]) for r in rows) / 19 for j in range(4)] for i in range(4)
    ]  # fmt: skip
    hinge = sum(max(0.0, 1 - math.sqrt(cov[i][i] + 1e-4)) for i in range(4)) / 4
    mixed = sum(cov[i][j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    assert float(variance_regularizer(features)) == pytest.approx(hinge + mixed, rel=1e-9)
    with pytest.raises(ValueError, match="needs a batch of at least 2 images, got 1"):
        variance_regularizer(features[:1])


def test_sketched_gaussian_regularizer_equals_the_formula_in_float64() -> None:
    features = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) * 1.7 + 0.4
    torch.manual_seed(5)
    value = float(sketched_gaussian_regularizer(features, directions=4, points=9))
    torch.manual_seed(5)
    sketch = torch.randn(3, 4).double()
    sketch /= sketch.norm(dim=0)
    total = 0.0
    for d in range(4):
        along = (features.double() @ sketch[:, d]).tolist()
        heights = []
        for t in [5 * i / 8 for i in range(9)]:
            real = sum(math.cos(a * t) for a in along) / 30 - math.exp(-t * t / 2)
            imaginary = sum(math.sin(a * t) for a in along) / 30
            heights.append((real**2 + imaginary**2) * math.exp(-t * t / 2))
        total += sum((a + b) / 2 * 5 / 8 for a, b in itertools.pairwise(heights))
    assert value == pytest.approx(2 * 30 * total / 4, rel=1e-4)


def test_regularizers_prefer_spread_features_to_collapsed_ones() -> None:
    torch.manual_seed(0)
    gaussian = torch.randn(256, 8)
    for term in (variance_regularizer, sketched_gaussian_regularizer):
        assert term(gaussian) < 0.2 * term(gaussian * 0.01) and term(gaussian) < 0.2 * term(
            gaussian[:, :1].expand(-1, 8)
        )


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l1"}, r"loss\.kind='l1' is not one of smooth_l1, mse"),
        ({"regularizer": "dropout"}, r"loss\.regularizer='dropout' is not one of none, variance, sketched_gaussian"),
        ({"level_weights": []}, r"level_weights=\[\] must name 1 to 4 levels"),
        ({"level_weights": [1.0] * 5}, "must name 1 to 4 levels"),
    ],
)
def test_options_that_do_not_exist_are_refused_by_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_masks_of_another_depth_or_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="masks have 2 levels, level_weights="):
        build()(pictures(32), masks_for((8, 8), levels=2))
    with pytest.raises(ValueError, match=r"the grid \(4, 4\) has 0\.\.15"):
        build()(pictures(16), masks_for((8, 8)))
