"""Formulas and loops in float64 that the layers are held to, written from the papers' equations without the package.

Slow and plain on purpose: one token, one channel pair, one cell at a time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def patch_positions(height: int, width: int) -> Tensor:
    """(row, column) of patch n, counted along the rows: `[height * width, 2]`."""
    return torch.tensor([(n // width, n % width) for n in range(height * width)], dtype=torch.float64)


def axial_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Angle of each pair `[N, dim / 2]`: omega_i = theta^(-4i/dim); first half by the row, second by the column."""
    omega = [theta ** (-4 * i / dim) for i in range(dim // 4)]
    angles = [[row * w for w in omega] + [column * w for w in omega] for row, column in positions.tolist()]
    return torch.tensor(angles, dtype=torch.float64)


def rotation_matrix(angles: Sequence[float]) -> Tensor:
    """The block-diagonal matrix `[D, D]` that turns pair (2i, 2i+1) by the i-th angle."""
    size = 2 * len(angles)
    matrix = [[0.0] * size for _ in range(size)]
    for i, a in enumerate(angles):
        matrix[2 * i][2 * i : 2 * i + 2] = math.cos(a), -math.sin(a)
        matrix[2 * i + 1][2 * i : 2 * i + 2] = math.sin(a), math.cos(a)
    return torch.tensor(matrix, dtype=torch.float64)


def rotate_rows(x: Tensor, angles: Tensor) -> Tensor:
    """`x` `[..., N, D]` with row n turned by `angles[n]` `[D / 2]`, matrix by matrix."""
    rows = [x[..., n, :].double() @ rotation_matrix(angles[n].tolist()).T for n in range(len(angles))]
    return torch.stack(rows, dim=-2)


def attention(x: Tensor, weights: dict[str, Tensor], heads: int, angles: Tensor | None, prefix: int) -> Tensor:
    """Multi-head self-attention of `x` `[B, prefix + N, C]` with rotated queries and keys, head by head, in float64."""
    qkv = x @ weights["qkv.weight"].T + weights["qkv.bias"]
    size = qkv.shape[-1] // (3 * heads)
    out = []
    for head in range(heads):
        q, k, v = (qkv[..., (part * heads + head) * size : (part * heads + head + 1) * size] for part in range(3))
        if angles is not None:
            q = torch.cat((q[:, :prefix], rotate_rows(q[:, prefix:], angles)), dim=1)
            k = torch.cat((k[:, :prefix], rotate_rows(k[:, prefix:], angles)), dim=1)
        scores = q @ k.transpose(1, 2) / math.sqrt(size)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, dim=-1) @ weights["proj.weight"].T + weights["proj.bias"]


def offset_spread(scores: Tensor, positions: Tensor) -> tuple[float, float]:
    """How far scores `[N, N]` differ among pairs of the same offset, at most, and over all pairs."""
    groups: dict[tuple[float, ...], list[float]] = {}
    for i, p in enumerate(positions.tolist()):
        for j, r in enumerate(positions.tolist()):
            groups.setdefault((round(r[0] - p[0], 4), round(r[1] - p[1], 4)), []).append(float(scores[i, j]))
    return max(max(g) - min(g) for g in groups.values()), float(scores.max() - scores.min())


def pool_cells(values: Tensor, grid: tuple[int, int], level: int) -> Tensor:
    """Mean of `[H * W, D]` over the 2^level x 2^level cells of the grid, cell by cell; border cells may be smaller."""
    height, width = grid
    side = 2**level
    cells = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            members = [
                values[row * width + column]
                for row in range(top, min(top + side, height))
                for column in range(left, min(left + side, width))
            ]
            cells.append(torch.stack(members).mean(0))
    return torch.stack(cells)
