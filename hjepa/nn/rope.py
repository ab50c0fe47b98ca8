"""Rotary position embedding on a 2-D patch grid: positions -> frequencies -> rotation.

Channels of a head come in pairs (2i, 2i+1). A token at position p = (row, column) has pair i turned by the angle

    angle_i(p) = row * F[0, i] + column * F[1, i] + offset_i

and because a rotation by a, transposed, times a rotation by b is the rotation by b - a, the score of a query and a
key sees only the difference of their positions. Everything else is a choice of F, the two rows of frequencies, which
`frequencies.py` makes: axial or mixed, and rescaled by a strategy on another grid than the one of training.

Sources: Su et al., "RoFormer", 2021, section 3.2; the axial form is Fang et al., "EVA-02", 2023, and Heo et al.

Not covered: 1-D sequences and video. How a table is applied, and why that is cheap, is in `rotation.py`.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import check_choice, size_pair
from .frequencies import (
    COORDINATES,
    KINDS,
    STRATEGIES,
    WITHOUT_THETA,
    axial_frequencies,
    fixed_frequencies,
    grid_positions,
    magnitude,
    mixed_frequencies,
    normalized,
    rescaled,
)
from .rotation import rotate, traced, without_autocast

CACHED_GRIDS = 8


class VisionRoPE2D(nn.Module):
    """Rotary position embedding of queries and keys on a patch grid of any size.

    Args:
        dim: channels of one attention head, divisible by 4.
        patch_size: pixels of a patch's side; only `repr` and checks by the encoder read it.
        num_patches_per_side: side of the training grid, an int or (height, width).
        theta: base of the frequencies. A large theta gives slow pairs: 10000 is the report's, V-JEPA 2's and EVA-02's,
            100 that of axial rope-vit and DINOv3 and fits small grids, 10 that of mixed rope-vit.
        kind: "axial", "mixed" (learned frequencies per layer and head, theta sets their start) or "fixed" (a direction
            per channel pair, by the golden angle).
        num_heads, num_layers: needed by "mixed" and by `theta_per_layer`; axial tables are laid out for `num_heads`.
        learnable: make theta (one, or one per layer) a parameter, stored as its logarithm.
        theta_per_layer: one theta per layer in place of `theta`.
        strategy: what happens on another grid than the training one, see `frequencies.py`. May be set later.
        coordinates: "index" (patches) or "normalized" (the picture spans -1 .. 1, angle = 2 pi w c, as DINOv3).
        fraction: share of the channels that turns, the rest is passed on.
        shift, jitter, rescale: coordinate augmentation in training mode, of the forms that DINOv3's code has (its
            released configs use rescale 2 or none of them): a shift of up to `shift` half pictures per axis, a
            log-uniform scale in [1/jitter, jitter] per axis and in [1/rescale, rescale] for both.

    Raises:
        ValueError: a value out of range, or two options that cannot go together.
    """

    def __init__(
        self,
        dim: int,
        patch_size: int = 16,
        num_patches_per_side: int | tuple[int, int] = 14,
        theta: float = 10000.0,
        *,
        kind: str = "axial",
        num_heads: int = 1,
        num_layers: int = 1,
        learnable: bool = False,
        theta_per_layer: Sequence[float] | None = None,
        strategy: str = "extrapolate",
        coordinates: str = "index",
        fraction: float = 1.0,
        shift: float = 0.0,
        jitter: float = 1.0,
        rescale: float = 1.0,
    ) -> None:
        super().__init__()
        self.grid_size = size_pair(num_patches_per_side, "num_patches_per_side", text=False)
        self.dim, self.patch_size, self.num_heads, self.num_layers = dim, patch_size, num_heads, num_layers
        self.kind, self.coordinates, self.fraction, self.learnable = kind, coordinates, fraction, learnable
        self.shift, self.jitter, self.rescale = shift, jitter, rescale
        thetas = [theta] if theta_per_layer is None else list(theta_per_layer)
        self.rotary_dim = _check_options(self, thetas, theta_per_layer is not None)
        self.thetas = tuple(float(t) for t in thetas)
        self.strategy = strategy
        self.log_theta = nn.Parameter(torch.tensor(self.thetas).log()) if learnable else None
        mixed = mixed_frequencies(self.rotary_dim, self.thetas[0], num_layers, num_heads) if kind == "mixed" else None
        self.mixed = None if mixed is None else nn.Parameter(mixed)
        self._cache: OrderedDict[tuple, Tensor] = OrderedDict()

    @property
    def strategy(self) -> str:
        """What happens on another grid than the training one; settable at any time, no retraining needed."""
        return self._strategy

    @strategy.setter
    def strategy(self, value: str) -> None:
        check_choice("strategy", value, STRATEGIES)
        if value in self.strategies:
            self._strategy = value
        elif self.coordinates == "normalized":
            raise ValueError(
                f"strategy={value!r} rescales indices, coordinates='normalized' has none: leave 'extrapolate'"
            )
        elif self.kind == "fixed":
            raise ValueError(f"strategy={value!r} is of kind='axial': with kind='fixed' 'extrapolate' or 'interpolate'")
        else:
            raise ValueError(
                f"strategy={value!r} needs theta, kind='mixed' has learned frequencies: 'extrapolate' or 'interpolate'"
            )

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those of STRATEGIES that `strategy` may be set to."""
        if self.coordinates == "normalized":
            return ("extrapolate",)
        return STRATEGIES if self.kind == "axial" else WITHOUT_THETA

    @property
    def theta(self) -> float:
        """The (first layer's) base now, learned or given."""
        return self.thetas[0] if self.log_theta is None else float(self.log_theta.detach()[0].exp())

    @property
    def per_layer(self) -> bool:
        """Whether layers have tables of their own."""
        return self.kind == "mixed" or len(self.thetas) > 1

    # positions

    @property
    def augments(self) -> bool:
        """Whether coordinate augmentation is on."""
        return (self.shift, self.jitter, self.rescale) != (0, 1, 1)

    def positions(self, grid_size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """The grid's own positions `[N, 2]`, (row, column) in patches."""
        return grid_positions(*grid_size, device=device)

    def augment(self, positions: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Shift and scale `positions` `[..., 2]` about the grid's centre, drawn once a call from torch's generator."""
        if not self.augments:
            return positions
        size = torch.tensor(grid_size, dtype=torch.float32, device=positions.device)
        unit = torch.rand(5, device=positions.device) * 2 - 1
        scale = torch.exp(unit[:2] * math.log(self.jitter) + unit[2] * math.log(self.rescale))
        centre = (size - 1) / 2
        return centre + (positions - centre) * scale + unit[3:] * self.shift * size / 2

    # frequencies

    def frequencies(self, layer: int = 0, device: torch.device | str | None = None) -> Tensor:
        """F of a layer on the training grid: `[2, heads or 1, rotary_dim / 2]` radians per patch, float32."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer={layer} is not one of the {self.num_layers} layers, 0..{self.num_layers - 1}")
        if self.mixed is not None:
            return self.mixed[layer].float()
        which = layer if len(self.thetas) > 1 else 0
        make = fixed_frequencies if self.kind == "fixed" else axial_frequencies
        if self.log_theta is not None:
            return make(self.rotary_dim, self.log_theta[which].float().exp(), self.log_theta.device)
        return make(self.rotary_dim, self.thetas[which], device)

    def scaled_frequencies(
        self, grid_size: tuple[int, int], layer: int = 0, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """F under the strategy on `grid_size`, and the offset `[heads or 1, rotary_dim / 2]` in radians."""
        base = self.frequencies(layer, device)
        if self.coordinates == "normalized":
            return normalized(base, grid_size)
        return rescaled(base, self.strategy, grid_size, self.grid_size)

    def magnitude(self, grid_size: tuple[int, int]) -> Tensor | float:
        """Length given to each rotated pair: 1, or YaRN's 1 + 0.1 ln s on a larger grid under ntk_by_parts."""
        return magnitude(self.strategy, grid_size, self.grid_size)

    # rotation

    def angles(self, positions: Tensor, grid_size: tuple[int, int], layer: int = 0) -> Tensor:
        """Angles `[..., N, heads or 1, rotary_dim / 2]` in float32 for `positions` `[..., N, 2]`, fractions allowed."""
        frequencies, offset = self.scaled_frequencies(grid_size, layer, positions.device)
        row, column = positions.float()[..., None, None, :].unbind(-1)
        return row * frequencies[0] + column * frequencies[1] + offset

    def make_table(self, positions: Tensor, grid_size: tuple[int, int], layer: int = 0) -> Tensor:
        """Cosine and sine `[..., N, heads or 1, dim / 2, 2]` in float32; channels that do not turn hold (1, 0)."""
        with without_autocast(positions.device):
            angles = self.angles(positions, grid_size, layer)
            table = torch.stack((angles.cos(), angles.sin()), dim=-1) * self.magnitude(grid_size)
        still = self.dim // 2 - table.shape[-2]
        if still:
            identity = torch.tensor([1.0, 0.0], device=table.device).expand(*table.shape[:-2], still, 2)
            table = torch.cat((table, identity), dim=-2)
        return table

    def table(
        self,
        grid_size: tuple[int, int],
        layer: int = 0,
        *,
        positions: Tensor | None = None,
        index: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The table an attention layer multiplies by: `[1 or B, N, heads or 1, dim / 2, 2]`, float32.

        Args:
            grid_size: height and width of the patch grid, in patches.
            layer: index of the layer, where layers differ.
            positions: `[N, 2]` or `[B, N, 2]` (row, column) in patches in place of the grid's own, fractions allowed.
            index: `[B, n]`, the patches kept of each sample: their rows of the table are gathered.
        """
        if positions is not None:
            table = self.make_table(positions if positions.dim() == 3 else positions[None], grid_size, layer)
        else:
            table = self._grid_table(grid_size, layer if self.per_layer else 0, device)
        if index is None:
            return table
        if table.shape[0] == 1:
            return table[0][index]
        return torch.stack([rows[i] for rows, i in zip(table, index, strict=True)])

    def tables(self, grid_size: tuple[int, int], **where: Any) -> list[Tensor]:
        """One table per layer; the same tensor `num_layers` times unless layers differ."""
        if not self.per_layer:
            return [self.table(grid_size, **where)] * self.num_layers
        return [self.table(grid_size, layer, **where) for layer in range(self.num_layers)]

    def _grid_table(self, grid_size: tuple[int, int], layer: int, device: torch.device | str | None) -> Tensor:
        frozen = self.log_theta is None and self.mixed is None
        if not frozen or traced():
            return self.make_table(grid_positions(*grid_size, device=device)[None], grid_size, layer)
        options = (self.grid_size, self.thetas, self.coordinates, self.dim, self.rotary_dim)
        key = (*grid_size, layer, *options, self.strategy, str(device))
        if key not in self._cache:
            with torch.inference_mode(False):  # a table made while only looking must still serve a backward pass
                table = self.make_table(grid_positions(*grid_size, device=device)[None], grid_size, layer)
            self._cache[key] = table
            while len(self._cache) > CACHED_GRIDS * self.num_layers:
                self._cache.popitem(last=False)
        return self._cache[key]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        num_patches_h: int | None = None,
        num_patches_w: int | None = None,
        *,
        positions: Tensor | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys `[B, heads, N, dim]` (patch tokens only), returning new tensors of the same dtype.

        Without sizes the training grid is meant; N must be num_patches_h * num_patches_w, or match `positions`.

        Raises:
            ValueError: N, the head dim or the number of heads does not fit.
        """
        grid_size = (num_patches_h or self.grid_size[0], num_patches_w or self.grid_size[1])
        expected = grid_size[0] * grid_size[1] if positions is None else positions.shape[-2]
        for name, x in (("q", q), ("k", k)):
            if x.shape[-1] != self.dim:
                raise ValueError(f"{name} has head dim {x.shape[-1]}, this VisionRoPE2D was built for dim={self.dim}")
            if self.mixed is not None and x.shape[-3] != self.num_heads:
                raise ValueError(f"{name} has {x.shape[-3]} heads, kind='mixed' was built for {self.num_heads}")
            if x.shape[-2] != expected:
                raise ValueError(
                    f"{name} has {x.shape[-2]} tokens, expected {expected} for the patch grid {grid_size}; "
                    "prefix tokens are not rotated, and num_patches_h, num_patches_w name another grid"
                )
        table = self.table(grid_size, layer, positions=positions, device=q.device).transpose(1, 2)
        return rotate(q, table), rotate(k, table)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> "VisionRoPE2D":
        """Move with the model, but keep theta and frequencies in float32 whatever dtype the model is cast to."""
        return super()._apply(lambda t: t.to(fn(t).device) if fn(t).element_size() < 4 else fn(t), *args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": OrderedDict()}

    def extra_repr(self) -> str:
        thetas = [f"{t:g}" for t in self.thetas]
        return (
            f"dim={self.dim}, grid={self.grid_size}, theta={', '.join(thetas)}, kind={self.kind}, "
            f"strategy={self.strategy}, coordinates={self.coordinates}"
        )


def _check_options(rope: VisionRoPE2D, thetas: list[float], per_layer: bool) -> int:
    """Check the options of a VisionRoPE2D and return the number of channels that turn."""
    if rope.dim <= 0 or rope.dim % 4:
        raise ValueError(f"dim={rope.dim} is not divisible by 4: rows and columns each need pairs of channels")
    for theta in thetas:
        if not (isinstance(theta, Real) and math.isfinite(theta) and theta > 0):
            raise ValueError(f"theta={theta} must be a positive, finite number, for example 100 or 10000")
    check_choice("kind", rope.kind, KINDS)
    check_choice("coordinates", rope.coordinates, COORDINATES)
    if per_layer and len(thetas) != rope.num_layers:
        raise ValueError(f"theta_per_layer has {len(thetas)} values for {rope.num_layers} layers")
    if rope.kind == "mixed" and (rope.learnable or per_layer):
        raise ValueError("kind='mixed' learns every frequency: learnable and theta_per_layer go with kind='axial'")
    turning = rope.dim * rope.fraction
    if not 0 < rope.fraction <= 1 or abs(turning / 4 - round(turning / 4)) > 1e-6 or round(turning) == 0:
        raise ValueError(f"fraction={rope.fraction} of dim={rope.dim} must be a multiple of 4 channels, above 0")
    if not (0 <= rope.shift < math.inf and 1 <= rope.jitter < math.inf and 1 <= rope.rescale < math.inf):
        raise ValueError(
            f"shift={rope.shift} must be at least 0, jitter={rope.jitter} and rescale={rope.rescale} at least 1, "
            "all finite"
        )
    return round(turning)
