"""Masks: context and targets apart on every level of the grid, equal counts in a batch, all from one seed."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa.nn import masks as masks_module
from hjepa.nn.masks import BatchMasks, Masks, MaskShapes, level_grid, sample_masks


def draw(batch: int = 8, grid: tuple[int, int] = (14, 14), seed: int = 0, **options: Any) -> Masks:
    return sample_masks(batch, grid, generator=torch.Generator().manual_seed(seed), **options)


def cells_with_context(context: list[int], grid: tuple[int, int], level: int) -> set[int]:
    """Cells of a level that hold a context patch, one patch at a time."""
    side, across = 2**level, math.ceil(grid[1] / 2**level)
    return {(patch // grid[1] // side) * across + patch % grid[1] // side for patch in context}


def check(masks: Masks, grid: tuple[int, int], levels: int, batch: int) -> None:
    """What every draw must keep: ranges, order, no repeats, and no cell asked for that the context sees into."""
    assert len(masks.target_idx) == levels
    for level, index in enumerate((masks.context_idx, *masks.target_idx), start=-1):
        height, width = (math.ceil(side / 2 ** max(level, 0)) for side in grid)
        assert index.dtype == torch.int64 and index.shape[0] == batch and index.shape[1] >= 1
        assert index.min() >= 0 and index.max() < height * width
        assert (index[:, 1:] > index[:, :-1]).all(), "sorted, none twice"
    for sample in range(batch):
        context = masks.context_idx[sample].tolist()
        for level, index in enumerate(masks.target_idx):
            assert not cells_with_context(context, grid, level) & set(index[sample].tolist())


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(4, 17), st.integers(4, 17), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_context_and_targets_are_disjoint_on_every_level(
    height: int, width: int, levels: int, batch: int, seed: int
) -> None:
    grid = (height, width)
    if max(level_grid(grid, levels - 1)) < 2:
        levels -= 1
    try:
        masks = draw(batch, grid, seed, levels=levels, num_targets=2, target_scale=(0.1, 0.2))
    except ValueError as error:  # only where a small grid may truly be used up
        assert "without context" in str(error) and height * width <= 36
        return
    check(masks, grid, levels, batch)


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (7, 28), (28, 7), (9, 13)])
def test_default_masks_of_a_large_batch_keep_a_useful_context(grid: tuple[int, int]) -> None:
    for seed in range(5):
        masks = draw(64, grid, seed)
        check(masks, grid, 3, 64)
        assert masks.context_idx.shape[1] >= 0.15 * grid[0] * grid[1]


def test_every_seed_has_masks_where_most_draws_fit() -> None:
    """A draw that leaves a sample without context is drawn again, so no seed raises; one in a hundred did."""
    for seed in range(1200):
        masks = draw(64, (8, 8), seed, target_scale=(0.15, 0.6))
        assert masks.context_idx.shape[0] == 64 and masks.context_idx.shape[1] >= 1
    again = [draw(64, (8, 8), 51, target_scale=(0.15, 0.6)).context_idx for _ in range(2)]
    assert torch.equal(*again)


def test_same_seed_same_masks_and_another_seed_others() -> None:
    one, same, other = draw(seed=3), draw(seed=3), draw(seed=4)
    assert torch.equal(one.context_idx, same.context_idx)
    assert all(torch.equal(a, b) for a, b in zip(one.target_idx, same.target_idx, strict=True))
    assert one.context_idx.shape != other.context_idx.shape or not torch.equal(one.context_idx, other.context_idx)


def test_samples_of_a_batch_differ() -> None:
    masks = draw(16)
    for index in (masks.context_idx, *masks.target_idx):
        assert len({tuple(row) for row in index.tolist()}) > 8


def test_one_target_block_is_a_rectangle_of_the_asked_size_and_shape() -> None:
    """With one block and one level, the hidden patches of every sample are one rectangle of the drawn shape."""
    for seed in range(20):
        masks = draw(6, (20, 20), seed, levels=1, num_targets=1, target_scale=(0.1, 0.2), target_aspect=(0.5, 2.0))
        for patches in masks.target_idx[0]:
            rows, columns = patches // 20, patches % 20
            height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
            assert len(patches) == height * width
            assert 0.08 <= len(patches) / 400 <= 0.22 and 0.4 <= height / width <= 2.5


def test_blocks_reach_every_place_of_the_grid() -> None:
    seen = torch.zeros(64, dtype=torch.bool)
    for seed in range(10):
        seen[draw(16, (8, 8), seed, levels=1).target_idx[0].flatten()] = True
    assert seen.all()


def test_context_is_the_block_minus_the_targets() -> None:
    masks = draw(1, (10, 10), levels=1, num_targets=1, context_scale=(1.0, 1.0))
    together = torch.cat((masks.context_idx[0], masks.target_idx[0][0]))
    assert torch.equal(together.sort().values, torch.arange(100))


def test_every_sample_has_a_target_on_the_coarsest_level() -> None:
    for levels in (2, 3, 4):
        masks = draw(32, (16, 16), levels=levels, num_targets=1, target_scale=(0.01, 0.02))
        check(masks, (16, 16), levels, 32)


def test_rows_picks_samples_of_every_index() -> None:
    masks = draw(8)
    part = masks.rows(slice(2, 5))
    assert torch.equal(part.context_idx, masks.context_idx[2:5])
    assert all(torch.equal(a, b[2:5]) for a, b in zip(part.target_idx, masks.target_idx, strict=True))


def batch(size: int, seed: int = 5, grid: tuple[int, int] = (14, 14)) -> tuple[BatchMasks, list[int]]:
    """The masks of a batch, and which of its blocks were drawn so far."""
    shapes, drawn = MaskShapes(), []

    def draw(block: int, samples: int) -> Masks:
        drawn.append(block)
        generator = torch.Generator().manual_seed(1000 * seed + block)
        return shapes.more(samples, grid, generator) if block else shapes.first(samples, grid, generator)

    return BatchMasks(size, draw), drawn


def test_a_process_draws_its_own_share_of_a_large_batch_and_the_first_block(monkeypatch) -> None:
    """Eight processes, blocks of 32 in a batch of 200: each draws two or three of seven, and together they have what
    one process has."""
    monkeypatch.setattr(masks_module, "BLOCK", 32)
    whole, _ = batch(200)
    alone = whole.rows(slice(None))
    check(alone, (14, 14), 3, 200)
    for process in range(8):
        rows = slice(25 * process, 25 * (process + 1))
        masks, drawn = batch(200)
        own = masks.rows(rows)
        assert set(drawn) == {0, *range(rows.start // 32, (rows.stop - 1) // 32 + 1)} and len(drawn) == len(set(drawn))
        for part, every in zip((own.context_idx, *own.target_idx), (alone.context_idx, *alone.target_idx), strict=True):
            assert torch.equal(part, every[rows])


def test_views_of_a_large_batch_keep_their_rows(monkeypatch) -> None:
    monkeypatch.setattr(masks_module, "BLOCK", 16)
    masks, _ = batch(60)
    own = masks.rows(slice(3, 9), views=3)
    whole = masks.rows(slice(None)).rows(slice(3, 9), views=3)
    for one, other in zip((own.context_idx, *own.target_idx), (whole.context_idx, *whole.target_idx), strict=True):
        assert torch.equal(one, other)


def test_a_batch_of_one_block_is_what_sample_masks_draws() -> None:
    masks, _ = batch(48)
    one, other = masks.rows(slice(None)), draw(48, (14, 14), 5000)
    assert torch.equal(one.context_idx, other.context_idx)
    assert all(torch.equal(a, b) for a, b in zip(one.target_idx, other.target_idx, strict=True))


@pytest.mark.parametrize("grid", [(8, 8), (9, 13)])
def test_later_blocks_have_the_shapes_and_numbers_of_tokens_of_the_first_and_their_own_places(grid) -> None:
    shapes = MaskShapes(levels=2)
    for seed in range(20):
        first = shapes.first(16, grid, torch.Generator().manual_seed(seed))
        before = shapes.shape
        more = shapes.more(300, grid, torch.Generator().manual_seed(100 + seed))
        check(more, grid, 2, 300)
        assert shapes.shape == before
        assert [t.shape[1] for t in (more.context_idx, *more.target_idx)] == [
            t.shape[1] for t in (first.context_idx, *first.target_idx)
        ]
        assert len({tuple(row) for row in more.context_idx.tolist()}) > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels=0 must be 1 to 4"),
        ({"levels": 5}, "levels=5 must be 1 to 4"),
        ({"num_targets": 0}, "num_targets=0 must be at least 1"),
        ({"target_scale": (0.3, 0.2)}, r"target_scale=\(0.3, 0.2\) needs 0 < low <= high <= 1"),
        ({"target_scale": (0.0, 0.2)}, r"target_scale=\(0.0, 0.2\)"),
        ({"context_scale": (0.5, 1.2)}, r"context_scale=\(0.5, 1.2\)"),
        ({"target_aspect": (float("nan"), 1.0)}, r"target_aspect=\(nan, 1.0\)"),
        ({"target_aspect": (1.0, float("inf"))}, r"target_aspect=\(1.0, inf\)"),
        ({"grid": (4, 4), "levels": 3}, "levels=3 makes the whole 4x4 grid one cell; at most 2 levels fit"),
        ({"grid": (3, 3), "levels": 1, "target_scale": (1.0, 1.0)}, "without context on the 3x3 grid"),
        ({"batch": 0}, "batch_size=0 must be at least 1"),
        ({"grid": (0, 8)}, "grid_size=0x8 needs at least one patch per side"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused_by_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        draw(**options)
    assert "\n" not in str(caught.value)
