"""Frequencies of 2-D RoPE: how fast each channel pair turns with the row and with the column, on any grid.

Pure functions. F is `[2, heads or 1, pairs]`, radians per patch: F[0] for rows, F[1] for columns.

    axial   F[0] = (w_0 .. w_{n-1}, 0 .. 0), F[1] = (0 .. 0, w_0 .. w_{n-1}), w_i = theta^(-i/n), n = dim/4
            first half of the channels turns with the row, second half with the column (H-JEPA's convention)
    mixed   F is learned, one per layer and head (Heo et al., "Rotary position embedding for vision transformer", 2024)
    fixed   F[0, k] = w_k sin(k a), F[1, k] = w_k cos(k a), w_k = theta^(-2k/dim), k < dim/2, a the golden angle
            every pair has a direction of its own, spread evenly over the circle; nothing is learned (a control for
            mixed; Spiral RoPE, arXiv 2602.03227, is a relative)

A larger grid than the one of training is met by a strategy, which only rescales F (s = grid / training grid, per axis):

    extrapolate   w_i                     positions keep their index, new ones are simply larger
    interpolate   w_i / s                 positions are measured in picture widths (Chen et al., 2023)
    ntk           w_i * s^(-i/(n-1))      the fastest pair keeps its speed, the slowest is interpolated
    ntk_by_parts  between the first two, pair by pair, by its number of turns over the training grid; rotated pairs
                  grow by 1 + 0.1 ln s, so their scores are sharpened by its square. Of YaRN's kind (Peng et al.,
                  2023), with its temperature and another ramp: 0.25 to 1 turns, where YaRN has 1 to 32

The half-patch offset (w_scaled - w) / 2 pins the picture's edge, so that a scaled grid lies on the picture it covers.
It turns queries and keys alike, so scores of patches with patches do not see it.

Not covered: tables and the rotation itself (`rope.py`).
"""

import math

import torch
from torch import Tensor

WITHOUT_THETA = ("extrapolate", "interpolate")  # strategies that rescale positions alone
STRATEGIES = (*WITHOUT_THETA, "ntk", "ntk_by_parts")
KINDS = ("axial", "mixed", "fixed")
GOLDEN = math.pi * (3 - math.sqrt(5))  # the golden angle, in radians
COORDINATES = ("index", "normalized")
PARTS = (0.25, 1.0)  # turns over the training grid below which a pair is interpolated, above which it is not


def grid_positions(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Row and column of each patch, row-major: `[height * width, 2]` float32, row first."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)


def axial_frequencies(dim: int, theta: Tensor | float, device: torch.device | str | None = None) -> Tensor:
    """The axial F: `[2, 1, dim / 2]` radians per patch, from w_i = theta^(-4i/dim), i < dim/4."""
    exponent = torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4)
    omega = torch.as_tensor(theta, dtype=torch.float32, device=device) ** -exponent
    zero = torch.zeros_like(omega)
    return torch.stack((torch.cat((omega, zero)), torch.cat((zero, omega))))[:, None]


def fixed_frequencies(dim: int, theta: Tensor | float, device: torch.device | str | None = None) -> Tensor:
    """The fixed F: `[2, 1, dim / 2]` radians per patch, pair k at k golden angles from the row's direction."""
    k = torch.arange(dim // 2, dtype=torch.float32, device=device)
    omega = torch.as_tensor(theta, dtype=torch.float32, device=device) ** -(k / (dim // 2))
    turns = [i * GOLDEN % (2 * math.pi) for i in range(dim // 2)]  # rounded to float32 only now
    direction = torch.tensor(turns, dtype=torch.float32, device=device)
    return (omega * torch.stack((direction.sin(), direction.cos())))[:, None]


def mixed_frequencies(dim: int, theta: float, layers: int, heads: int) -> Tensor:
    """Initial mixed F: `[layers, 2, heads, dim / 2]`, axial magnitudes in a random direction per head and layer."""
    magnitude = theta ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    direction = torch.rand(layers, heads, 1) * 2 * math.pi
    both = torch.cat((direction.expand(-1, -1, dim // 4), (direction + math.pi / 2).expand(-1, -1, dim // 4)), -1)
    return magnitude.repeat(2) * torch.stack((both.sin(), both.cos()), dim=1)


def normalized(base: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """F and offset that turn a pair by 2 pi w c, where c runs from -1 to 1 over the picture's sides (DINOv3)."""
    size = _per_axis(grid_size, base)
    return 4 * math.pi * base / size, (2 * math.pi * base * (1 / size - 1)).sum(0)


def rescaled(
    base: Tensor, strategy: str, grid_size: tuple[int, int], trained: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """F under a strategy, and the offset `[heads or 1, pairs]` in radians that pins the picture's edge.

    Args:
        base: F on the training grid; for "ntk" the axial one.
        strategy: one of STRATEGIES.
        grid_size, trained: (height, width) in patches now and in training.
    """
    scale = _per_axis(grid_size, base) / _per_axis(trained, base)
    if strategy == "extrapolate":
        scaled = base
    elif strategy == "interpolate":
        scaled = base / scale
    elif strategy == "ntk":
        pairs = base.shape[-1] // 2
        exponent = torch.arange(pairs, device=base.device) / max(pairs - 1, 1)
        scaled = base * scale ** -exponent.repeat(2)
    elif strategy == "ntk_by_parts":
        turns = _per_axis(trained, base) * base / (2 * math.pi)
        keep = ((turns - PARTS[0]) / (PARTS[1] - PARTS[0])).clamp(0, 1)
        scaled = base * (keep + (1 - keep) / scale)
    else:
        raise NotImplementedError(f"strategy={strategy!r} has no frequencies here")
    return scaled, ((scaled - base) / 2).sum(0)


def magnitude(strategy: str, grid_size: tuple[int, int], trained: tuple[int, int]) -> Tensor | float:
    """Length given to each rotated pair: 1, or YaRN's 1 + 0.1 ln s on a larger grid under ntk_by_parts.

    s is the square root of the ratio of areas. Tensor arithmetic, so that one compiled graph serves all grids.
    """
    if strategy != "ntk_by_parts":
        return 1.0
    areas = torch.tensor(grid_size, dtype=torch.float32).prod() / (trained[0] * trained[1])
    return 1 + 0.05 * areas.clamp(min=1).log()


def _per_axis(size: tuple[int, int], like: Tensor) -> Tensor:
    return torch.tensor(size, dtype=torch.float32, device=like.device)[:, None, None]


def sincos_positions(positions: Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """Fixed code of (row, column) positions: `[..., 2]` -> `[..., dim]`, fractions allowed (Vaswani et al., 2017)."""
    omega = theta ** -(torch.arange(dim // 4, device=positions.device) / (dim // 4))
    angles = positions[..., None] * omega
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)
