"""VisionRoPE2D against the float64 formula: what a rotation must do, under every convention and strategy.

Peers are compared in `test_parity.py`; gradients, precision, the cache and bad input are in `test_rope_module.py`.
"""

import math
from typing import Any

import pytest
import torch
from builders import OTHER, TRAINED, build_rope, random_qk
from formulas import axial_angles, offset_spread, patch_positions, rotate_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hjepa.nn.frequencies import PARTS
from hjepa.nn.rope import STRATEGIES, VisionRoPE2D, grid_positions, rotate

VARIANTS: dict[str, dict[str, Any]] = {
    "axial": {},
    "learnable": {"learnable": True},
    "theta_per_layer": {"num_layers": 2, "theta_per_layer": (100.0, 7.0)},
    "learnable_theta_per_layer": {"num_layers": 2, "theta_per_layer": (100.0, 7.0), "learnable": True},
    "mixed": {"kind": "mixed", "num_heads": 2, "num_layers": 2, "theta": 10.0},
    "mixed_interpolate": {"kind": "mixed", "num_heads": 2, "num_layers": 2, "strategy": "interpolate"},
    "mixed_normalized": {"kind": "mixed", "num_heads": 2, "num_layers": 2, "coordinates": "normalized"},
    "fixed": {"kind": "fixed", "theta": 10.0},
    "fixed_interpolate": {"kind": "fixed", "strategy": "interpolate"},
    "normalized": {"coordinates": "normalized"},
    "fraction": {"fraction": 0.5},
    **{strategy: {"strategy": strategy} for strategy in STRATEGIES},
}


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


def test_fixed_directions_equal_the_float64_formula_and_have_no_parameters() -> None:
    """angle_k = w_k (x cos(k a) + y sin(k a)): x the column, y the row, a the golden angle, w_k = theta^(-k/16)."""
    q, k = random_qk((7, 12), dim=32, heads=2)
    rope = VisionRoPE2D(32, num_patches_per_side=14, theta=10.0, kind="fixed")
    golden, pairs = math.pi * (3 - math.sqrt(5)), range(16)
    angles = torch.tensor([
        [10.0 ** (-i / 16) * (x * math.cos(i * golden) + y * math.sin(i * golden)) for i in pairs]
        for y, x in patch_positions(7, 12).tolist()
    ], dtype=torch.float64)  # fmt: skip
    for x, turned in zip((q, k), rope(q, k, 7, 12), strict=True):
        torch.testing.assert_close(turned.double(), rotate_rows(x, angles), atol=1e-5, rtol=0)
    assert not list(rope.parameters()) and not rope.state_dict()
    with pytest.raises(ValueError, match="strategy='ntk' is of kind='axial'"):
        VisionRoPE2D(32, kind="fixed", strategy="ntk")


# relative positions


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("grid", [TRAINED, OTHER])
def test_score_depends_only_on_offset(name: str, grid: tuple[int, int]) -> None:
    rope = build_rope(**VARIANTS[name])
    for layer in range(rope.num_layers):
        for scores in constant_scores(rope, grid, layer).detach():
            spread, overall = offset_spread(scores, patch_positions(*grid))
            assert spread < 1e-4, f"layer {layer}: scores at the same offset differ by {spread}"
            assert overall > 0.5, "scores do not tell offsets apart"


@pytest.mark.parametrize("name", VARIANTS)
def test_rotation_keeps_norms_except_for_yarn_s_temperature(name: str) -> None:
    rope, grid = build_rope(**VARIANTS[name]), (9, 8)
    q, k = random_qk(grid)
    for x, y in zip((q, k), rope(q, k, *grid), strict=True):
        grown = (y.norm(dim=-1) / x.norm(dim=-1)).detach()
        length = 1 + 0.1 * math.log(math.sqrt(72 / 36)) if name == "ntk_by_parts" else 1.0
        torch.testing.assert_close(grown, torch.full_like(grown, length), atol=1e-5, rtol=0)


def test_yarn_sharpens_scores_by_the_square_and_only_on_larger_grids() -> None:
    for grid, length in (((12, 12), 1 + 0.1 * math.log(2)), (TRAINED, 1.0), ((3, 3), 1.0)):
        scores = constant_scores(build_rope(strategy="ntk_by_parts"), grid)
        q, k = random_qk(grid)
        own = (q[0, :, 0] * k[0, :, 0]).sum(-1).double()  # a token's score with its own place: no angle between
        torch.testing.assert_close(scores[:, 3, 3], own * length**2, atol=1e-5, rtol=0)


def test_moving_in_y_rotates_only_y_channels() -> None:
    rope = build_rope()
    table = rope.table((6, 6)).unflatten(1, (6, 6))[0, :, :, 0]  # [row, column, pair, 2]
    moved = (table[1:] - table[:-1]).abs().amax(dim=(0, 1, 3))
    assert (moved[:4] > 1e-3).all() and (moved[4:] == 0).all()
    moved = (table[:, 1:] - table[:, :-1]).abs().amax(dim=(0, 1, 3))
    assert (moved[4:] > 1e-3).all() and (moved[:4] == 0).all()


@pytest.mark.parametrize("grid", [(7, 28), (28, 7)])
def test_row_comes_first_and_patches_run_along_rows(grid: tuple[int, int]) -> None:
    assert torch.equal(grid_positions(*grid).double(), patch_positions(*grid))
    table = build_rope().table(grid)[0, :, 0]
    row_angle, column_angle = (torch.atan2(table[..., 1], table[..., 0])[:, pair] for pair in (0, 4))
    step = grid[1]  # one row further
    torch.testing.assert_close(row_angle[step], torch.tensor(1.0))
    torch.testing.assert_close(column_angle[step], torch.tensor(0.0))
    torch.testing.assert_close(column_angle[1], torch.tensor(1.0))


def test_a_fraction_turns_the_first_channels_as_a_smaller_head_would() -> None:
    grid, rope = (5, 7), build_rope(dim=32, fraction=0.5)
    q, k = random_qk(grid, dim=32)
    turned = rope(q, k, *grid)[0]
    small = build_rope(dim=16)(q[..., :16].contiguous(), k[..., :16].contiguous(), *grid)[0]
    assert torch.equal(turned[..., :16], small) and torch.equal(turned[..., 16:], q[..., 16:])


# positions


@pytest.mark.parametrize("name", ["axial", "mixed", "ntk_by_parts", "normalized", "theta_per_layer"])
def test_subset_of_tokens_keeps_its_positions(name: str) -> None:
    rope = build_rope(**VARIANTS[name])
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
    rows = build_rope().table(TRAINED, positions=positions, index=index)
    expected = build_rope().table(TRAINED, positions=torch.stack([positions[0, index[0]], positions[1, index[1]]]))
    assert torch.equal(rows, expected)


def test_fractional_centres_rotate_by_the_formula() -> None:
    positions = torch.tensor([[2.5, 4.5], [0.0, 1.0], [5.25, 0.5]])
    q, k = random_qk((3, 1))
    turned = build_rope()(q, k, *TRAINED, positions=positions)[0]
    expected = rotate_rows(q, axial_angles(positions.double(), 16, 100.0))
    torch.testing.assert_close(turned.double(), expected, atol=1e-5, rtol=0)


def test_half_way_is_half_the_rotation() -> None:
    rope = build_rope()
    angles = rope.angles(torch.tensor([[3.0, 5.0], [1.5, 2.5]]), TRAINED)
    torch.testing.assert_close(angles[0], 2 * angles[1])


# strategies


def test_strategies_agree_on_the_training_grid() -> None:
    tables = [build_rope(strategy=strategy).table(TRAINED) for strategy in STRATEGIES]
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], atol=1e-6, rtol=0)


def test_strategies_differ_on_another_grid() -> None:
    tables = [build_rope(strategy=strategy).table(OTHER) for strategy in STRATEGIES]
    for i in range(4):
        for j in range(i):
            assert (tables[i] - tables[j]).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["axial", "mixed"])
def test_interpolation_measures_positions_in_picture_widths(kind: str) -> None:
    options: dict[str, Any] = {"kind": kind, "num_heads": 2}
    rope = build_rope(strategy="interpolate", **options)
    rope.load_state_dict(build_rope(**options).state_dict())
    ratio = torch.tensor([TRAINED[0] / OTHER[0], TRAINED[1] / OTHER[1]])
    where = (grid_positions(*OTHER) + 0.5) * ratio - 0.5  # the same point of the picture on the training grid
    expected = build_rope(**options).table(TRAINED, positions=where)
    torch.testing.assert_close(rope.table(OTHER), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["interpolate", "ntk", "ntk_by_parts"])
def test_a_scaled_grid_lies_on_the_picture_it_covers(strategy: str) -> None:
    """The picture's top and left edge, half a patch before the first centre, has the same angle on every grid."""
    edge = torch.tensor([[-0.5, -0.5]])
    on_trained = build_rope(strategy=strategy).angles(edge, TRAINED)
    torch.testing.assert_close(build_rope(strategy=strategy).angles(edge, OTHER), on_trained, atol=1e-5, rtol=0)


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest() -> None:
    rope = build_rope(dim=32, strategy="ntk")
    scaled, _ = rope.scaled_frequencies((12, 18))
    for axis, (scale, first) in enumerate(((2, 0), (3, 8))):
        for i in range(8):
            omega = 100.0 ** (-i / 8)
            assert scaled[axis, 0, first + i].item() == pytest.approx(omega * scale ** (-i / 7), rel=1e-5)


def test_ntk_by_parts_splits_pairs_by_their_turns_over_the_training_grid() -> None:
    rope = build_rope(dim=64, num_patches_per_side=14, theta=10000.0, strategy="ntk_by_parts")
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
    rope = build_rope()
    tables = {}
    for strategy in (*STRATEGIES, "extrapolate", "interpolate"):
        rope.strategy = strategy
        table = rope.table(OTHER)
        assert torch.equal(table, tables.setdefault(strategy, table))
        assert torch.equal(table, build_rope(strategy=strategy).table(OTHER))


def test_normalized_coordinates_span_minus_one_to_one_on_every_grid() -> None:
    rope = build_rope(coordinates="normalized")
    for height, width in (TRAINED, OTHER, (1, 13)):
        angles = rope.angles(grid_positions(height, width), (height, width))[:, 0]
        for n, (row, column) in enumerate(patch_positions(height, width).tolist()):
            for i in range(4):
                turn = 2 * math.pi * 100.0 ** (-i / 4)
                assert angles[n, i].item() == pytest.approx(turn * (2 * (row + 0.5) / height - 1), abs=1e-4)
                assert angles[n, 4 + i].item() == pytest.approx(turn * (2 * (column + 0.5) / width - 1), abs=1e-4)
