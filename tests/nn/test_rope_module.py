"""VisionRoPE2D as a module: coordinate augmentation, learned frequencies, precision, cached tables, bad input."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from builders import OTHER, TRAINED, build_rope, random_qk
from formulas import axial_angles, patch_positions, rotate_rows
from torch import Tensor

from hjepa.nn.rope import CACHED_GRIDS, VisionRoPE2D, grid_positions, rotate

# coordinate augmentation


def fit_line(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Slope about the centre and shift of the centre, of positions on one axis."""
    slope = (after.max() - after.min()) / (before.max() - before.min())
    return float(slope), float((after.max() + after.min() - before.max() - before.min()) / 2)


def test_augmentation_is_one_shift_and_scale_within_its_bounds() -> None:
    rope = build_rope(shift=0.5, jitter=1.5, rescale=2.0)
    positions, seen = grid_positions(*OTHER), []
    torch.manual_seed(0)
    for _ in range(300):
        moved = rope.augment(positions, OTHER)
        lines = [fit_line(positions[:, axis], moved[:, axis]) for axis in range(2)]
        rebuilt = [
            (positions[:, a] - (OTHER[a] - 1) / 2) * lines[a][0] + (OTHER[a] - 1) / 2 + lines[a][1] for a in range(2)
        ]
        torch.testing.assert_close(moved, torch.stack(rebuilt, -1), atol=1e-4, rtol=0)
        seen.append(lines)
    slopes, shifts = torch.tensor(seen).unbind(-1)
    assert slopes.min() > 1 / 3 and slopes.max() < 3 and slopes.log().abs().max() > math.log(2.2)
    jitter = (slopes[:, 0] / slopes[:, 1]).log().abs()
    assert math.log(1.8) < jitter.max() < 2 * math.log(1.5) + 1e-4, "the axes are jittered apart, rescaled together"
    assert (shifts.abs().amax(0) < torch.tensor(OTHER) * 0.25).all() and (shifts.abs().amax(0) > 0.8).all()


def test_augmentation_follows_the_generator_and_is_off_by_default() -> None:
    rope, positions = build_rope(shift=0.5), grid_positions(*TRAINED)
    torch.manual_seed(3)
    first = rope.augment(positions, TRAINED)
    torch.manual_seed(3)
    assert torch.equal(rope.augment(positions, TRAINED), first) and not torch.equal(first, positions)
    assert build_rope().augment(positions, TRAINED) is positions


# learned frequencies


def test_gradient_of_theta_equals_the_derivative_of_the_formula() -> None:
    rope, grid = build_rope(learnable=True), (5, 4)
    q, k = random_qk(grid, heads=1)
    turned = rope(q, k, *grid)
    (turned[0] * k + turned[1] * q.sin()).sum().backward()

    def loss(log_theta: float) -> float:
        angles = axial_angles(patch_positions(*grid), 16, math.exp(log_theta))
        return float((rotate_rows(q, angles) * k + rotate_rows(k, angles) * q.sin()).sum())

    at = math.log(100.0)
    expected = (loss(at + 1e-5) - loss(at - 1e-5)) / 2e-5
    assert rope.log_theta is not None and rope.log_theta.grad is not None
    assert abs(expected) > 1e-2 and float(rope.log_theta.grad[0]) == pytest.approx(expected, rel=1e-3)


def test_gradient_of_mixed_frequencies_equals_finite_differences() -> None:
    rope, grid = build_rope(kind="mixed", num_heads=2, num_layers=2), (5, 4)
    q, k = random_qk(grid)
    (rope(q, k, *grid, layer=1)[0] * k).sum().backward()
    assert rope.mixed is not None and rope.mixed.grad is not None
    assert (rope.mixed.grad[0] == 0).all(), "layer 0 was not used"

    def loss(value: float) -> float:
        frequencies = rope.mixed[1].detach().double()  # type: ignore[index]
        frequencies[1, 0, 3] = value
        row, column = patch_positions(*grid)[:, None, None].unbind(-1)
        angles = (row * frequencies[0] + column * frequencies[1])[:, 0]
        return float((rotate_rows(q[:, :1], angles) * k[:, :1]).sum())

    at = float(rope.mixed.detach()[1, 1, 0, 3])
    expected = (loss(at + 1e-5) - loss(at - 1e-5)) / 2e-5
    assert abs(expected) > 1e-2 and float(rope.mixed.grad[1, 1, 0, 3]) == pytest.approx(expected, rel=1e-3)


def test_rotate_has_the_right_gradient_in_both_arguments() -> None:
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    table = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x, table))
    assert torch.autograd.gradgradcheck(rotate, (x, table))


def test_mixed_starts_from_axial_speeds_in_a_random_direction_per_head_and_layer() -> None:
    frequencies = build_rope(dim=32, kind="mixed", num_heads=3, num_layers=2, theta=10.0).mixed
    assert frequencies is not None
    speed = frequencies.norm(dim=1)  # [layers, heads, pairs]
    expected = torch.tensor([10.0 ** (-i / 8) for i in range(8)]).repeat(2).expand(2, 3, 16)
    torch.testing.assert_close(speed.detach(), expected, atol=1e-6, rtol=1e-5)
    first, second = frequencies[..., :8], frequencies[..., 8:]
    torch.testing.assert_close((first * second).sum(1), torch.zeros(2, 3, 8), atol=1e-6, rtol=0)
    direction = torch.atan2(first[:, 0, :, 0], first[:, 1, :, 0]).flatten()
    assert len(direction.detach().round(decimals=4).unique()) == 6


def test_theta_per_layer_gives_each_layer_the_table_of_its_theta() -> None:
    rope = build_rope(num_layers=3, theta_per_layer=(100.0, 20.0, 5.0))
    for table, theta in zip(rope.tables(OTHER), (100.0, 20.0, 5.0), strict=True):
        assert torch.equal(table, build_rope(theta=theta).table(OTHER))


# precision


def test_angles_stay_float32_when_the_model_is_bfloat16() -> None:
    grid = (64, 64)
    for options in ({}, {"learnable": True}, {"kind": "mixed", "num_heads": 2}):
        rope = build_rope(**options)
        table = rope.table(grid).detach()
        cast = copy.deepcopy(rope).to(torch.bfloat16)
        assert torch.equal(cast.table(grid), table) and table.dtype == torch.float32
    q, k = random_qk(grid, heads=1, dtype=torch.bfloat16)
    turned = build_rope().to(torch.bfloat16)(q, k, *grid)[0]
    assert turned.dtype == torch.bfloat16
    few = torch.arange(0, 4096, 97)
    exact = rotate_rows(q[:, :, few], axial_angles(patch_positions(*grid)[few], 16, 100.0))
    error = (turned[:, :, few].double() - exact).abs().max()
    assert error < 2**-8 * exact.abs().max(), "no more than rounding the result to bfloat16 costs"


def test_autocast_does_not_touch_the_angles() -> None:
    rope = build_rope()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = rope.table((64, 64))
    assert torch.equal(table, build_rope().table((64, 64)))


def test_float64_queries_are_rotated_in_float64() -> None:
    q, k = random_qk((3, 3), dtype=torch.float64)
    turned = build_rope()(q, k, 3, 3)[0]
    assert turned.dtype == torch.float64
    expected = rotate_rows(q, axial_angles(patch_positions(3, 3), 16, 100.0))
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


# the cache


def test_a_second_call_on_a_grid_costs_nothing_and_the_cache_stays_small() -> None:
    rope = build_rope()
    assert rope.table(OTHER) is rope.table(OTHER)
    assert all(table is rope.table(OTHER) for table in rope.tables(OTHER))
    for side in range(1, 40):
        rope.table((side, 3))
    assert len(rope._cache) <= CACHED_GRIDS


def test_a_table_first_seen_in_inference_mode_serves_training() -> None:
    rope = build_rope()
    with torch.inference_mode():
        rope(*random_qk(TRAINED))
    q, k = (x.requires_grad_() for x in random_qk(TRAINED))
    (rope(q, k)[0] ** 3).sum().backward()
    assert q.grad is not None and q.grad.abs().max() > 0


def test_learned_tables_are_never_stale() -> None:
    rope = build_rope(learnable=True)
    assert rope.theta == pytest.approx(100.0, rel=1e-5)
    before = rope.table(TRAINED).detach()
    with torch.no_grad():
        rope.log_theta += 1.0  # type: ignore[operator]
    assert not torch.allclose(rope.table(TRAINED), before)
    assert torch.allclose(rope.table(TRAINED), build_rope(theta=100.0 * math.e).table(TRAINED), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "mixed", "num_layers": 2}, {"num_layers": 2, "theta_per_layer": (100.0, 7.0), "learnable": True}],
)
def test_copies_and_pickles_rotate_alike_and_carry_no_cache(options: dict[str, Any]) -> None:
    rope = build_rope(**options)
    table = rope.table(OTHER)
    for other in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert not other._cache and torch.equal(other.table(OTHER), table)
        assert other.strategy == rope.strategy


def test_axial_rope_adds_nothing_to_a_state_dict() -> None:
    assert build_rope().state_dict() == {} and list(build_rope().parameters()) == []
    assert list(build_rope(learnable=True).state_dict()) == ["log_theta"]
    assert list(build_rope(kind="mixed").state_dict()) == ["mixed"]


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 6}, "dim=6 is not divisible by 4"),
        ({"dim": 0}, "dim=0"),
        ({"theta": 0.0}, "theta=0.0 must be a positive"),
        ({"theta": -3}, "theta=-3 must be a positive"),
        ({"theta": float("nan")}, "theta=nan must be a positive"),
        ({"theta": float("inf")}, "theta=inf must be a positive"),
        ({"theta": "100"}, "theta=100 must be a positive"),
        ({"theta_per_layer": (1.0, 2.0)}, "2 values for 1 layers"),
        ({"theta_per_layer": ()}, "0 values for 1 layers"),
        ({"theta_per_layer": (float("nan"),)}, "theta=nan"),
        ({"num_patches_per_side": 0}, "num_patches_per_side 0 is not understood"),
        ({"num_patches_per_side": (3, -1)}, "num_patches_per_side .* is not understood"),
        ({"num_patches_per_side": "14"}, "num_patches_per_side '14' is not understood"),
        ({"num_patches_per_side": 7.5}, "num_patches_per_side 7.5 is not understood"),
        ({"num_patches_per_side": (3, 4, 5)}, r"num_patches_per_side \(3, 4, 5\) is not understood"),
        ({"kind": "spiral"}, "kind='spiral' is not one of axial, mixed"),
        ({"coordinates": "pixels"}, "coordinates='pixels' is not one of index, normalized"),
        ({"strategy": "yarn"}, "strategy='yarn' is not one of extrapolate, interpolate, ntk, ntk_by_parts"),
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"fraction": 0.3}, "fraction=0.3 of dim=16 must be a multiple of 4"),
        ({"fraction": float("nan")}, "fraction=nan"),
        ({"shift": -1.0}, "shift=-1.0 must be at least 0"),
        ({"jitter": 0.5}, "jitter=0.5"),
        ({"rescale": float("nan")}, "rescale=nan"),
        ({"jitter": float("inf")}, "all finite"),
        ({"kind": "mixed", "learnable": True}, "go with kind='axial'"),
        ({"kind": "mixed", "theta_per_layer": (1.0,)}, "go with kind='axial'"),
        ({"kind": "mixed", "strategy": "ntk"}, "needs theta"),
        ({"kind": "mixed", "strategy": "ntk_by_parts"}, "needs theta"),
        ({"coordinates": "normalized", "strategy": "ntk"}, "leave 'extrapolate'"),
    ],
)
def test_bad_options_are_refused_by_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_rope(**options)
    assert "\n" not in str(caught.value)


def test_a_fraction_that_rounds_to_whole_channels_is_taken() -> None:
    assert build_rope(dim=80, fraction=0.55).rotary_dim == 44  # 80 * 0.55 is 44.00000000000001


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 2, 35, 16), {}, "q has 35 tokens, expected 36"),
        ((1, 2, 37, 16), {}, "prefix tokens are not rotated"),
        ((1, 2, 36, 12), {}, "q has head dim 12, this VisionRoPE2D was built for dim=16"),
        ((1, 3, 36, 16), {"kind": "mixed", "num_heads": 2}, "q has 3 heads, kind='mixed' was built for 2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        build_rope(**options)(x, x)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer=2 is not one of the 2 layers, 0\.\.1"):
        build_rope(kind="mixed", num_layers=2).frequencies(2)


def test_a_table_follows_the_training_grid_that_is_set_later() -> None:
    rope = VisionRoPE2D(16, 8, 4, strategy="interpolate")
    rope.table((8, 8))
    rope.grid_size = (8, 8)
    assert torch.equal(rope.table((8, 8)), VisionRoPE2D(16, 8, 8, strategy="interpolate").table((8, 8)))
