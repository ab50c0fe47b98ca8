"""Checks of what callers hand to the layers: sizes, indices, masks, positions, names.

Each raises a ValueError of one line that names the value and what is allowed. They cost a look at small integer
tensors; the ones that read values are skipped while torch.compile or an export traces the model.

Not covered: options of VisionRoPE2D (`rope.py`) and whole configs (`config.py`).
"""

from typing import Any

import torch
from torch import Tensor


def square_patch(patch: Any) -> int:
    """The side of a square patch, an int or a pair of equal ints. Raises ValueError on any other."""
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] < 1:
        raise ValueError(f"patch_size={patch} must be a positive int: patches are square")
    return int(sides[0])


def check_tensor(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {value!r:.40}")


def on_cpu(tensor: Tensor) -> bool:
    """Whether a value of the tensor can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def check_index(index: Tensor, batch: int, grid: tuple[int, int]) -> None:
    """Raise ValueError unless `index` is `[batch, n]` int64, n > 0, within the grid and without repeats in a row."""
    check_tensor("context_idx", index)
    patches = grid[0] * grid[1]
    if index.dim() != 2 or index.shape[0] != batch or index.dtype != torch.int64:
        raise ValueError(f"context_idx must be int64 [{batch}, n], got {index.dtype} {list(index.shape)}")
    if index.shape[1] == 0:
        raise ValueError("context_idx is empty: the encoder needs at least one patch of each sample")
    if torch.compiler.is_compiling() or index.is_meta:  # no values to look at
        return
    ordered = index.sort(dim=1).values
    if not on_cpu(index):  # reading a value would wait for the device
        inside = (ordered[:, 0] >= 0) & (ordered[:, -1] < patches)
        once = (ordered[:, 1:] > ordered[:, :-1]).all(1)
        torch._assert_async((inside & once).all(), f"context_idx is not within 0..{patches - 1}, or repeats a patch")
        return
    low, high = int(ordered[:, 0].min()), int(ordered[:, -1].max())
    if low < 0 or high >= patches:
        raise ValueError(f"context_idx has {low}..{high}, the grid {grid} has 0..{patches - 1}")
    repeated = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if repeated.numel():
        raise ValueError(f"context_idx repeats patch {int(repeated[0])} within a sample: each patch at most once")


def as_masked(mask: Tensor) -> Tensor:
    """A mask of numbers, 1 = hidden and 0 = seen, as booleans; booleans as they are. ValueError on other numbers."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        odd = mask[(mask != 0) & (mask != 1)][0]
        raise ValueError(f"mask holds {odd:g}: 1 (hidden) and 0 (seen) are allowed")
    return mask.bool()


def check_masked(is_masked: Tensor, batch: int, patches: int) -> None:
    """Raise ValueError unless `is_masked` is boolean `[batch, patches]` and leaves every sample a visible patch."""
    check_tensor("is_masked", is_masked)
    if is_masked.dtype != torch.bool or is_masked.shape != (batch, patches):
        found = f"{is_masked.dtype} {list(is_masked.shape)}"
        raise ValueError(f"is_masked must be boolean [{batch}, {patches}], got {found}")
    hidden = is_masked.all(dim=1)
    if bool(hidden.any()):
        raise ValueError(
            f"is_masked hides all {patches} patches of sample {int(hidden.int().argmax())}: leave at least one visible"
        )


def check_positions(positions: Tensor, batch: int, grid: tuple[int, int]) -> None:
    """Raise ValueError unless `positions` is `[N, 2]` or `[batch, N, 2]` for the N patches of the grid."""
    check_tensor("positions", positions)
    patches, shape = grid[0] * grid[1], tuple(positions.shape)
    if shape not in ((patches, 2), (batch, patches, 2), (1, patches, 2)):
        raise ValueError(f"positions must be [{patches}, 2] or [{batch}, {patches}, 2] for grid {grid}, got {shape}")
