"""VisionRoPE2D against the float64 formula: what a rotation must do, under every convention and strategy.

Peers are compared in `test_parity.py`, the in-place path of attention in `test_attention.py`.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from formulas import axial_angles, offset_spread, patch_positions, rotate_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hjepa.frequencies import PARTS
from hjepa.rope import CACHED_GRIDS, STRATEGIES, VisionRoPE2D, grid_positions, rotate

TRAINED = (6, 6)
OTHER = (9, 4)  # another grid than the trained one, longer in rows and shorter in columns
VARIANTS: dict[str, dict[str, Any]] = {
    "axial": {},
    "learnable": {"learnable": True},
    "theta_per_layer": {"num_layers": 2, "theta_per_layer": (100.0, 7.0)},
    "learnable_theta_per_layer": {"num_layers": 2, "theta_per_layer": (100.0, 7.0), "learnable": True},
    "mixed": {"kind": "mixed", "num_heads": 2, "num_layers": 2, "theta": 10.0},
    "mixed_interpolate": {"kind": "mixed", "num_heads": 2, "num_layers": 2, "strategy": "interpolate"},
    "mixed_normalized": {"kind": "mixed", "num_heads": 2, "num_layers": 2, "coordinates": "normalized"},
    "normalized": {"coordinates": "normalized"},
    "fraction": {"fraction": 0.5},
    **{strategy: {"strategy": strategy} for strategy in STRATEGIES},
}


def build(**options: Any) -> VisionRoPE2D:
    torch.manual_seed(0)
    return VisionRoPE2D(**({"dim": 16, "num_patches_per_side": TRAINED, "theta": 100.0} | options))


def random_qk(grid: tuple[int, int], dim: int = 16, heads: int = 2, **where: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, heads, grid[0] * grid[1], dim, generator=generator)
    return q.to(**where), k.to(**where)


def constant_scores(rope: VisionRoPE2D, grid: tuple[int, int], layer: int = 0) -> Tensor:
    """Scores `[heads, N, N]` of one query and one key vector laid on every patch."""
    q, k = random_qk(grid)
    q, k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    q, k = rope(q, k, *grid, layer=layer)
    return (q.double() @ k.double().transpose(-2, -1))[0]


# the formula


@pytest.mark.parametrize("grid", [(7, 28), (28, 7), (14, 14)])
@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_rotation_equals_the_float64_formula(grid: tuple[int, int], theta: float) -> None:
    q, k = random_qk(grid, dim=32, heads=1)
    turned = VisionRoPE2D(32, num_patches_per_side=14, theta=theta)(q, k, *grid)
    angles = axial_angles(patch_positions(*grid), 32, theta)
    for x, y in zip((q, k), turned, strict=True):
        torch.testing.assert_close(y.double(), rotate_rows(x, angles), atol=1e-5, rtol=0)


def test_defaults_are_the_report_s() -> None:
    q, k = random_qk((14, 14), dim=64, heads=1)
    angles = axial_angles(patch_positions(14, 14), 64, 10000.0)
    torch.testing.assert_close(VisionRoPE2D(64)(q, k)[0].double(), rotate_rows(q, angles), atol=1e-5, rtol=0)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8, 20, 32]), st.floats(2, 1e5))
def test_any_grid_head_dim_theta_and_subset_follow_the_formula(
    data: st.DataObject, height: int, width: int, dim: int, theta: float
) -> None:
    rope = VisionRoPE2D(dim, num_patches_per_side=(3, 5), theta=theta)
    kept = data.draw(st.lists(st.integers(0, height * width - 1), min_size=1, unique=True))
    positions = patch_positions(height, width)[kept]
    x = torch.randn(1, 2, len(kept), dim, generator=torch.Generator().manual_seed(0))
    y = rotate(x, rope.table((height, width), index=torch.tensor([kept])).transpose(1, 2))
    expected = rotate_rows(x, axial_angles(positions, dim, theta))
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)


# relative positions


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("grid", [TRAINED, OTHER])
def test_score_depends_only_on_offset(name: str, grid: tuple[int, int]) -> None:
    rope = build(**VARIANTS[name])
    for layer in range(rope.num_layers):
        for scores in constant_scores(rope, grid, layer).detach():
            spread, overall = offset_spread(scores, patch_positions(*grid))
            assert spread < 1e-4, f"layer {layer}: scores at the same offset differ by {spread}"
            assert overall > 0.5, "scores do not tell offsets apart"


@pytest.mark.parametrize("name", VARIANTS)
def test_rotation_keeps_norms_except_for_yarn_s_temperature(name: str) -> None:
    rope, grid = build(**VARIANTS[name]), (9, 8)
    q, k = random_qk(grid)
    for x, y in zip((q, k), rope(q, k, *grid), strict=True):
        grown = (y.norm(dim=-1) / x.norm(dim=-1)).detach()
        length = 1 + 0.1 * math.log(math.sqrt(72 / 36)) if name == "ntk_by_parts" else 1.0
        torch.testing.assert_close(grown, torch.full_like(grown, length), atol=1e-5, rtol=0)


def test_yarn_sharpens_scores_by_the_square_and_only_on_larger_grids() -> None:
    for grid, length in (((12, 12), 1 + 0.1 * math.log(2)), (TRAINED, 1.0), ((3, 3), 1.0)):
        scores = constant_scores(build(strategy="ntk_by_parts"), grid)
        q, k = random_qk(grid)
        own = (q[0, :, 0] * k[0, :, 0]).sum(-1).double()  # a token's score with its own place: no angle between
        torch.testing.assert_close(scores[:, 3, 3], own * length**2, atol=1e-5, rtol=0)


def test_moving_in_y_rotates_only_y_channels() -> None:
    rope = build()
    table = rope.table((6, 6)).unflatten(1, (6, 6))[0, :, :, 0]  # [row, column, pair, 2]
    moved = (table[1:] - table[:-1]).abs().amax(dim=(0, 1, 3))
    assert (moved[:4] > 1e-3).all() and (moved[4:] == 0).all()
    moved = (table[:, 1:] - table[:, :-1]).abs().amax(dim=(0, 1, 3))
    assert (moved[4:] > 1e-3).all() and (moved[:4] == 0).all()


@pytest.mark.parametrize("grid", [(7, 28), (28, 7)])
def test_row_comes_first_and_patches_run_along_rows(grid: tuple[int, int]) -> None:
    assert torch.equal(grid_positions(*grid).double(), patch_positions(*grid))
    table = build().table(grid)[0, :, 0]
    row_angle, column_angle = (torch.atan2(table[..., 1], table[..., 0])[:, pair] for pair in (0, 4))
    step = grid[1]  # one row further
    torch.testing.assert_close(row_angle[step], torch.tensor(1.0))
    torch.testing.assert_close(column_angle[step], torch.tensor(0.0))
    torch.testing.assert_close(column_angle[1], torch.tensor(1.0))


def test_a_fraction_turns_the_first_channels_as_a_smaller_head_would() -> None:
    grid, rope = (5, 7), build(dim=32, fraction=0.5)
    q, k = random_qk(grid, dim=32)
    turned = rope(q, k, *grid)[0]
    small = build(dim=16)(q[..., :16].contiguous(), k[..., :16].contiguous(), *grid)[0]
    assert torch.equal(turned[..., :16], small) and torch.equal(turned[..., 16:], q[..., 16:])


# positions


@pytest.mark.parametrize("name", ["axial", "mixed", "ntk_by_parts", "normalized", "theta_per_layer"])
def test_subset_of_tokens_keeps_its_positions(name: str) -> None:
    rope = build(**VARIANTS[name])
    index = torch.tensor([[30, 2, 17], [5, 35, 0]])
    for layer in range(rope.num_layers):
        full = rope.table(OTHER, layer)
        rows = rope.table(OTHER, layer, index=index)
        by_position = rope.table(OTHER, layer, positions=patch_positions(*OTHER).float()[index])
        for sample in range(2):
            for place, patch in enumerate(index[sample].tolist()):
                assert torch.equal(rows[sample, place], full[0, patch])
                assert torch.equal(by_position[sample, place], full[0, patch])


def test_subset_of_per_sample_positions_is_gathered_per_sample() -> None:
    positions = torch.rand(2, 36, 2) * 5
    index = torch.tensor([[30, 2, 17], [5, 35, 0]])
    rows = build().table(TRAINED, positions=positions, index=index)
    expected = build().table(TRAINED, positions=torch.stack([positions[0, index[0]], positions[1, index[1]]]))
    assert torch.equal(rows, expected)


def test_fractional_centres_rotate_by_the_formula() -> None:
    positions = torch.tensor([[2.5, 4.5], [0.0, 1.0], [5.25, 0.5]])
    q, k = random_qk((3, 1))
    turned = build()(q, k, *TRAINED, positions=positions)[0]
    expected = rotate_rows(q, axial_angles(positions.double(), 16, 100.0))
    torch.testing.assert_close(turned.double(), expected, atol=1e-5, rtol=0)


def test_half_way_is_half_the_rotation() -> None:
    rope = build()
    angles = rope.angles(torch.tensor([[3.0, 5.0], [1.5, 2.5]]), TRAINED)
    torch.testing.assert_close(angles[0], 2 * angles[1])


# strategies


def test_strategies_agree_on_the_training_grid() -> None:
    tables = [build(strategy=strategy).table(TRAINED) for strategy in STRATEGIES]
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], atol=1e-6, rtol=0)


def test_strategies_differ_on_another_grid() -> None:
    tables = [build(strategy=strategy).table(OTHER) for strategy in STRATEGIES]
    for i in range(4):
        for j in range(i):
            assert (tables[i] - tables[j]).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_interpolation_measures_positions_in_picture_widths(kind: str) -> None:
    options: dict[str, Any] = {"kind": kind, "num_heads": 2}
    rope = build(strategy="interpolate", **options)
    rope.load_state_dict(build(**options).state_dict())
    ratio = torch.tensor([TRAINED[0] / OTHER[0], TRAINED[1] / OTHER[1]])
    where = (grid_positions(*OTHER) + 0.5) * ratio - 0.5  # the same point of the picture on the training grid
    expected = build(**options).table(TRAINED, positions=where)
    torch.testing.assert_close(rope.table(OTHER), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["interpolate", "ntk", "ntk_by_parts"])
def test_a_scaled_grid_lies_on_the_picture_it_covers(strategy: str) -> None:
    """The picture's top and left edge, half a patch before the first centre, has the same angle on every grid."""
    edge = torch.tensor([[-0.5, -0.5]])
    on_trained = build(strategy=strategy).angles(edge, TRAINED)
    torch.testing.assert_close(build(strategy=strategy).angles(edge, OTHER), on_trained, atol=1e-5, rtol=0)


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest() -> None:
    rope = build(dim=32, strategy="ntk")
    scaled, _ = rope.scaled_frequencies((12, 18))
    for axis, (scale, first) in enumerate(((2, 0), (3, 8))):
        for i in range(8):
            omega = 100.0 ** (-i / 8)
            assert scaled[axis, 0, first + i].item() == pytest.approx(omega * scale ** (-i / 7), rel=1e-5)


def test_ntk_by_parts_splits_pairs_by_their_turns_over_the_training_grid() -> None:
    rope = build(dim=64, num_patches_per_side=14, theta=10000.0, strategy="ntk_by_parts")
    scaled, _ = rope.scaled_frequencies((28, 28))
    kinds = set()
    for i in range(16):
        omega = 10000.0 ** (-i / 16)
        turns = 14 * omega / (2 * math.pi)
        keep = min(max((turns - PARTS[0]) / (PARTS[1] - PARTS[0]), 0.0), 1.0)
        kinds.add("kept" if keep == 1 else "interpolated" if keep == 0 else "between")
        assert scaled[0, 0, i].item() == pytest.approx(omega * (keep + (1 - keep) / 2), rel=1e-5)
    assert kinds == {"kept", "between", "interpolated"}


def test_strategy_can_be_set_at_test_time() -> None:
    rope = build()
    tables = {}
    for strategy in (*STRATEGIES, "extrapolate", "interpolate"):
        rope.strategy = strategy
        table = rope.table(OTHER)
        assert torch.equal(table, tables.setdefault(strategy, table))
        assert torch.equal(table, build(strategy=strategy).table(OTHER))


def test_normalized_coordinates_span_minus_one_to_one_on_every_grid() -> None:
    rope = build(coordinates="normalized")
    for height, width in (TRAINED, OTHER, (1, 13)):
        angles = rope.angles(grid_positions(height, width), (height, width))[:, 0]
        for n, (row, column) in enumerate(patch_positions(height, width).tolist()):
            for i in range(4):
                turn = 2 * math.pi * 100.0 ** (-i / 4)
                assert angles[n, i].item() == pytest.approx(turn * (2 * (row + 0.5) / height - 1), abs=1e-4)
                assert angles[n, 4 + i].item() == pytest.approx(turn * (2 * (column + 0.5) / width - 1), abs=1e-4)


# coordinate augmentation


def fit_line(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Slope about the centre and shift of the centre, of positions on one axis."""
    slope = (after.max() - after.min()) / (before.max() - before.min())
    return float(slope), float((after.max() + after.min() - before.max() - before.min()) / 2)


def test_augmentation_is_one_shift_and_scale_within_its_bounds() -> None:
    rope = build(shift=0.5, jitter=1.5, rescale=2.0)
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
    rope, positions = build(shift=0.5), grid_positions(*TRAINED)
    torch.manual_seed(3)
    first = rope.augment(positions, TRAINED)
    torch.manual_seed(3)
    assert torch.equal(rope.augment(positions, TRAINED), first) and not torch.equal(first, positions)
    assert build().augment(positions, TRAINED) is positions


# learned frequencies


def test_gradient_of_theta_equals_the_derivative_of_the_formula() -> None:
    rope, grid = build(learnable=True), (5, 4)
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
    rope, grid = build(kind="mixed", num_heads=2, num_layers=2), (5, 4)
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
    frequencies = build(dim=32, kind="mixed", num_heads=3, num_layers=2, theta=10.0).mixed
    assert frequencies is not None
    speed = frequencies.norm(dim=1)  # [layers, heads, pairs]
    expected = torch.tensor([10.0 ** (-i / 8) for i in range(8)]).repeat(2).expand(2, 3, 16)
    torch.testing.assert_close(speed.detach(), expected, atol=1e-6, rtol=1e-5)
    first, second = frequencies[..., :8], frequencies[..., 8:]
    torch.testing.assert_close((first * second).sum(1), torch.zeros(2, 3, 8), atol=1e-6, rtol=0)
    direction = torch.atan2(first[:, 0, :, 0], first[:, 1, :, 0]).flatten()
    assert len(direction.detach().round(decimals=4).unique()) == 6


def test_theta_per_layer_gives_each_layer_the_table_of_its_theta() -> None:
    rope = build(num_layers=3, theta_per_layer=(100.0, 20.0, 5.0))
    for table, theta in zip(rope.tables(OTHER), (100.0, 20.0, 5.0), strict=True):
        assert torch.equal(table, build(theta=theta).table(OTHER))


# precision


def test_angles_stay_float32_when_the_model_is_bfloat16() -> None:
    grid = (64, 64)
    for options in ({}, {"learnable": True}, {"kind": "mixed", "num_heads": 2}):
        rope = build(**options)
        table = rope.table(grid).detach()
        cast = copy.deepcopy(rope).to(torch.bfloat16)
        assert torch.equal(cast.table(grid), table) and table.dtype == torch.float32
    q, k = random_qk(grid, heads=1, dtype=torch.bfloat16)
    turned = build().to(torch.bfloat16)(q, k, *grid)[0]
    assert turned.dtype == torch.bfloat16
    few = torch.arange(0, 4096, 97)
    exact = rotate_rows(q[:, :, few], axial_angles(patch_positions(*grid)[few], 16, 100.0))
    error = (turned[:, :, few].double() - exact).abs().max()
    assert error < 2**-8 * exact.abs().max(), "no more than rounding the result to bfloat16 costs"


def test_autocast_does_not_touch_the_angles() -> None:
    rope = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = rope.table((64, 64))
    assert torch.equal(table, build().table((64, 64)))


def test_float64_queries_are_rotated_in_float64() -> None:
    q, k = random_qk((3, 3), dtype=torch.float64)
    turned = build()(q, k, 3, 3)[0]
    assert turned.dtype == torch.float64
    expected = rotate_rows(q, axial_angles(patch_positions(3, 3), 16, 100.0))
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


# the cache


def test_a_second_call_on_a_grid_costs_nothing_and_the_cache_stays_small() -> None:
    rope = build()
    assert rope.table(OTHER) is rope.table(OTHER)
    assert all(table is rope.table(OTHER) for table in rope.tables(OTHER))
    for side in range(1, 40):
        rope.table((side, 3))
    assert len(rope._cache) <= CACHED_GRIDS


def test_a_table_first_seen_in_inference_mode_serves_training() -> None:
    rope = build()
    with torch.inference_mode():
        rope.table(TRAINED)
    q, k = (x.requires_grad_() for x in random_qk(TRAINED))
    (rope(q, k)[0] ** 3).sum().backward()
    assert q.grad is not None and q.grad.abs().max() > 0


def test_learned_tables_are_never_stale() -> None:
    rope = build(learnable=True)
    assert rope.theta == pytest.approx(100.0, rel=1e-5)
    before = rope.table(TRAINED).detach()
    with torch.no_grad():
        rope.log_theta += 1.0  # type: ignore[operator]
    assert not torch.allclose(rope.table(TRAINED), before)
    assert torch.allclose(rope.table(TRAINED), build(theta=100.0 * math.e).table(TRAINED), atol=1e-5)


@pytest.mark.parametrize("name", ["axial", "mixed", "learnable_theta_per_layer"])
def test_copies_and_pickles_rotate_alike_and_carry_no_cache(name: str) -> None:
    rope = build(**VARIANTS[name])
    table = rope.table(OTHER)
    for other in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert not other._cache and torch.equal(other.table(OTHER), table)
        assert other.strategy == rope.strategy


def test_axial_rope_adds_nothing_to_a_state_dict() -> None:
    assert build().state_dict() == {} and list(build().parameters()) == []
    assert list(build(learnable=True).state_dict()) == ["log_theta"]
    assert list(build(kind="mixed").state_dict()) == ["mixed"]


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
        ({"num_patches_per_side": 0}, "at least one patch"),
        ({"num_patches_per_side": (3, -1)}, "at least one patch"),
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
        build(**options)
    assert "\n" not in str(caught.value)


def test_a_fraction_that_rounds_to_whole_channels_is_taken() -> None:
    assert build(dim=80, fraction=0.55).rotary_dim == 44  # 80 * 0.55 is 44.00000000000001


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
        build(**options)(x, x)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer=2 is not one of the 2 layers, 0\.\.1"):
        build(kind="mixed", num_layers=2).frequencies(2)
