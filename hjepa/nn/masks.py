"""Masks: which patches the context encoder sees, and which cells of each level the predictor is asked for.

I-JEPA's multi-block masking (Assran et al., 2023, section 3): four target blocks, one large context block, and the
context loses every patch of a target block. Block shapes are drawn once a batch, places once a sample.

Added for the hierarchy. Level l cuts the patch grid into cells of 2^l x 2^l patches (the last row and column may be
smaller). A cell is a target only if the context sees none of its patches. Small blocks seldom cover a coarse cell, so
each sample also hides one whole cell of the coarsest level; with one level, none.

    patch grid 8 x 8              level 1: 4 x 4 cells         level 2: 2 x 2 cells
    c c c c c . . .               a cell holding any c         the hidden coarsest cell
    c c . . c . . .               is no target                 is always a target
    ...

All samples of a batch keep the same number of tokens: where one has more, a random choice of them is left out, which
is neither seen nor asked for. Nothing is padded. So that one unlucky sample does not starve the batch, twice as many
masks are drawn as needed and the half with more context is kept; where even that leaves a sample without context, the
batch is drawn again from the same generator, DRAWS times at most.

A batch above BLOCK samples is drawn in blocks (`BatchMasks`), so that a process draws its own share and the first
block, which gives the shapes and the numbers of tokens of all.

Not covered: masks along time, masks drawn from the image's content.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 100  # until blocks that fit one batch in ten or more practically always fit
BLOCK = 256  # samples whose masks are drawn together


@dataclass
class Masks:
    """Patches seen, `context_idx` `[B, n]`, and cells asked for, a `target_idx[l]` `[B, m_l]` per level, row-major."""

    context_idx: Tensor
    target_idx: tuple[Tensor, ...]

    def rows(self, rows: slice, views: int = 1) -> "Masks":
        """The masks of some samples; of some pictures, where the samples are `views` views of each, view by view."""
        return self.pick(_samples(len(self.context_idx), rows, views))

    def pick(self, samples: Tensor) -> "Masks":
        """The masks of some samples, by their numbers `[n]`."""
        return Masks(self.context_idx[samples], tuple(t[samples] for t in self.target_idx))

    @staticmethod
    def cat(parts: "Sequence[Masks]") -> "Masks":
        """The samples of several masks with the same numbers of tokens, one after another."""
        if len(parts) == 1:
            return parts[0]
        targets = zip(*(part.target_idx for part in parts), strict=True)
        return Masks(torch.cat([part.context_idx for part in parts]), tuple(map(torch.cat, targets)))

    def to(self, device: torch.device | str) -> "Masks":
        """The masks on a device; copies from pinned memory are not waited for."""
        context_idx, *targets = (t.to(device, non_blocking=True) for t in (self.context_idx, *self.target_idx))
        return Masks(context_idx, tuple(targets))

    def pin_memory(self) -> "Masks":
        """The masks in pinned memory; a DataLoader with pin_memory calls this."""
        return Masks(self.context_idx.pin_memory(), tuple(t.pin_memory() for t in self.target_idx))


def sample_kept(
    batch_size: int, grid_size: tuple[int, int], share: float, generator: torch.Generator | None = None
) -> Masks:
    """A random share of the patches of each sample, nothing asked for: masks without targets.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} of patches kept must be above 0 and at most 1")
    patches = grid_size[0] * grid_size[1]
    order = torch.rand(batch_size, patches, generator=generator).argsort(dim=1)
    return Masks(order[:, : max(1, round(share * patches))].sort(dim=1).values, ())


def _samples(count: int, rows: slice, views: int) -> Tensor:
    """Numbers of the samples of some pictures, of which there are `views` each, view by view: `[n]`, ascending."""
    return torch.arange(count).unflatten(0, (views, -1))[:, rows].flatten()


def level_grid(grid_size: tuple[int, int], level: int) -> tuple[int, int]:
    """Cells of `level` on a patch grid: (height, width), rounded up."""
    return -(-grid_size[0] >> level), -(-grid_size[1] >> level)


def sample_masks(
    batch_size: int,
    grid_size: tuple[int, int],
    *,
    levels: int = 3,
    num_targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    generator: torch.Generator | None = None,
) -> Masks:
    """Draw the masks of a batch.

    Args:
        batch_size: samples B.
        grid_size: (height, width) of the patch grid.
        levels: number of levels of the hierarchy, 1 to 4; level 0 is the patches.
        num_targets: target blocks per sample.
        target_scale, target_aspect: range of a block's share of the grid and of its height / width.
        context_scale: range of the context block's share of the grid; its aspect is the grid's own.
        generator: source of randomness.

    Raises:
        ValueError: ranges out of order, or a grid too small to leave every sample a context and a target
            in DRAWS draws.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return MaskShapes(levels, num_targets, target_scale, target_aspect, context_scale).first(
        batch_size, grid_size, generator
    )


class MaskShapes:
    """Draws the first masks of a batch, then more of the same shapes and numbers of tokens.

    Arguments as of `sample_masks`.
    """

    def __init__(
        self,
        levels: int = 3,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
    ) -> None:
        self.levels, self.num_targets = levels, num_targets
        self.target_scale, self.target_aspect, self.context_scale = target_scale, target_aspect, context_scale
        self.shape = (0.0, 0.0, 0.0)  # share of a target block, its aspect, share of the context block
        self.counts: tuple[int, ...] = ()  # of context and targets

    def first(self, samples: int, grid_size: tuple[int, int], generator: torch.Generator | None) -> Masks:
        """Masks of new shapes, with as many tokens as all the samples have."""
        _check(self.levels, self.num_targets, self.target_scale, self.target_aspect, self.context_scale, grid_size)
        for _ in range(DRAWS):
            scale, aspect = _uniform(self.target_scale, generator), _log_uniform(self.target_aspect, generator)
            hidden = self._hidden(2 * samples, grid_size, scale, aspect, generator)
            share = math.sqrt(_uniform(self.context_scale, generator))
            context = _context(hidden, share, generator)
            counts, kept = context.flatten(1).sum(1).topk(samples)
            if counts.min() > 0:
                break
        else:
            raise ValueError(_starved(grid_size, self.target_scale, self.context_scale))
        kept = kept.sort().values
        masks, _ = self._chosen(context[kept], hidden[kept], generator, [None] * (1 + self.levels))
        self.shape = scale, aspect, share
        self.counts = tuple(index.shape[1] for index in (masks.context_idx, *masks.target_idx))
        return masks

    def more(self, samples: int, grid_size: tuple[int, int], generator: torch.Generator | None) -> Masks:
        """Masks of the shapes and numbers of tokens of the last `first`; samples that have fewer are drawn again."""
        scale, aspect, share = self.shape
        found: list[Masks] = []
        missing = samples
        for _ in range(DRAWS):
            hidden = self._hidden(2 * missing, grid_size, scale, aspect, generator)
            context = _context(hidden, share, generator)
            masks, enough = self._chosen(context, hidden, generator, list(self.counts))
            order = context.flatten(1).sum(1).masked_fill(~enough, -1).argsort(descending=True, stable=True)
            kept = order[: min(missing, int(enough.sum()))].sort().values
            found.append(masks.pick(kept))
            missing -= len(kept)
            if not missing:
                return Masks.cat(found)
        raise ValueError(_starved(grid_size, self.target_scale, self.context_scale))

    def _hidden(
        self, drawn: int, grid_size: tuple[int, int], scale: float, aspect: float, generator: torch.Generator | None
    ) -> Tensor:
        """Target blocks and, with several levels, one coarsest cell in each sample: `[drawn, H, W]`, True inside."""
        hidden = torch.zeros(drawn, *grid_size, dtype=torch.bool)
        for _ in range(self.num_targets):
            hidden |= _blocks(drawn, grid_size, *_block_shape(grid_size, scale, aspect), generator)
        return hidden | _coarse_cells(drawn, grid_size, self.levels - 1, generator) if self.levels > 1 else hidden

    def _chosen(
        self, context: Tensor, hidden: Tensor, generator: torch.Generator | None, counts: list[int | None]
    ) -> tuple[Masks, Tensor]:
        """Patches and cells of each sample, `counts` of context and of each level, None as many as all samples have;
        and which samples have that many `[B]`."""
        context_idx, enough = _choose(context.flatten(1), generator, counts[0])
        seen = torch.zeros_like(context.flatten(1)).scatter_(1, context_idx, True).view_as(context)
        targets = []
        for level, count in enumerate(counts[1:]):
            allowed = hidden if level == 0 else ~_any_in_cell(seen, level)
            target, has = _choose(allowed.flatten(1), generator, count)
            targets.append(target)
            enough = enough & has
        return Masks(context_idx, tuple(targets)), enough


class BatchMasks:
    """The masks of a batch of any size, BLOCK samples at a time and only those that are asked for.

    draw(block, samples) gives the masks of a block; the first is drawn at once. Blocks stay as they were drawn.
    """

    def __init__(self, batch_size: int, draw: Callable[[int, int], Masks]) -> None:
        self.batch_size, self.draw = batch_size, draw
        self.blocks: dict[int, Masks] = {}
        self._block(0)

    def rows(self, rows: slice, views: int = 1) -> Masks:
        """`Masks.rows` of the whole batch."""
        samples = _samples(self.batch_size, rows, views)
        block_of = samples // BLOCK
        return Masks.cat([self._block(b).pick(samples[block_of == b] % BLOCK) for b in block_of.unique().tolist()])

    def _block(self, block: int) -> Masks:
        if block not in self.blocks:
            self.blocks[block] = self.draw(block, min(BLOCK, self.batch_size - block * BLOCK))
        return self.blocks[block]


def _context(hidden: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """A context block of `share` of each side without what is hidden: booleans like `hidden`, True inside."""
    height, width = hidden.shape[1:]
    shape = max(1, round(height * share)), max(1, round(width * share))
    return _blocks(len(hidden), (height, width), *shape, generator) & ~hidden


def _uniform(bounds: tuple[float, float], generator: torch.Generator | None) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(torch.rand((), generator=generator))


def _log_uniform(bounds: tuple[float, float], generator: torch.Generator | None) -> float:
    return math.exp(_uniform((math.log(bounds[0]), math.log(bounds[1])), generator))


def _block_shape(grid_size: tuple[int, int], scale: float, aspect: float) -> tuple[int, int]:
    area = scale * grid_size[0] * grid_size[1]
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(height, 1), grid_size[0]), min(max(width, 1), grid_size[1])


def _blocks(
    batch: int, grid_size: tuple[int, int], height: int, width: int, generator: torch.Generator | None
) -> Tensor:
    """One block of the given shape at a random place in each sample: `[B, H, W]` booleans, True inside."""
    top = torch.randint(grid_size[0] - height + 1, (batch, 1), generator=generator)
    left = torch.randint(grid_size[1] - width + 1, (batch, 1), generator=generator)
    rows, columns = torch.arange(grid_size[0]), torch.arange(grid_size[1])
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    return in_rows[:, :, None] & in_columns[:, None, :]


def _coarse_cells(batch: int, grid_size: tuple[int, int], level: int, generator: torch.Generator | None) -> Tensor:
    """One whole cell of `level` in each sample: `[B, H, W]` booleans, True inside."""
    cells = level_grid(grid_size, level)
    row = torch.randint(cells[0], (batch, 1), generator=generator)
    column = torch.randint(cells[1], (batch, 1), generator=generator)
    in_rows = (torch.arange(grid_size[0]) >> level) == row
    in_columns = (torch.arange(grid_size[1]) >> level) == column
    return in_rows[:, :, None] & in_columns[:, None, :]


def _any_in_cell(marked: Tensor, level: int) -> Tensor:
    """Whether a cell of `level` holds any marked patch: `[B, H, W]` -> `[B, cells_h, cells_w]`."""
    side = 1 << level
    pooled = torch.nn.functional.max_pool2d(marked[:, None].float(), side, ceil_mode=True)
    return pooled[:, 0] > 0


def _choose(allowed: Tensor, generator: torch.Generator | None, count: int | None) -> tuple[Tensor, Tensor]:
    """`count` allowed places of each row, None as many as the poorest row has, a random choice, sorted:
    `[B, K]` -> `[B, n]`; and which rows have that many `[B]`."""
    has = allowed.sum(1)
    count = int(has.min()) if count is None else count
    rank = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, 2.0)
    return rank.argsort(dim=1)[:, :count].sort(dim=1).values, has >= count


def _check(
    levels: int,
    num_targets: int,
    target_scale: tuple[float, float],
    target_aspect: tuple[float, float],
    context_scale: tuple[float, float],
    grid_size: tuple[int, int],
) -> None:
    if min(grid_size) < 1:
        raise ValueError(f"grid_size={grid_size[0]}x{grid_size[1]} needs at least one patch per side")
    if not 1 <= levels <= 4:
        raise ValueError(f"levels={levels} must be 1 to 4")
    if num_targets < 1:
        raise ValueError(f"num_targets={num_targets} must be at least 1")
    for name, (low, high), top in (
        ("target_scale", target_scale, 1.0),
        ("target_aspect", target_aspect, math.inf),
        ("context_scale", context_scale, 1.0),
    ):
        if not 0 < low <= high <= top or math.isinf(high):
            raise ValueError(f"{name}=({low}, {high}) needs 0 < low <= high" + ("" if top > 1 else " <= 1"))
    if levels > 1 and max(level_grid(grid_size, levels - 1)) < 2:
        raise ValueError(
            f"levels={levels} makes the whole {grid_size[0]}x{grid_size[1]} grid one cell; at most "
            f"{max(1, (max(grid_size) - 1).bit_length())} levels fit"
        )


def _starved(grid_size: tuple[int, int], target_scale: tuple[float, float], context_scale: tuple[float, float]) -> str:
    return (
        f"the targets left a sample without context on the {grid_size[0]}x{grid_size[1]} grid in {DRAWS} draws: lower "
        f"target_scale={tuple(target_scale)}, raise context_scale={tuple(context_scale)}, or use fewer levels or a "
        "larger grid"
    )
