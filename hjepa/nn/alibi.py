"""ALiBi on a patch grid: scores fall off with the distance of two patches, at a speed of each head's own.

    score of head h = q . k / sqrt(D) - slope_h |p_q - p_k|,   slope_h = 2^(-8 h / H), h = 1 .. H

|.| is the Euclidean distance of (row, column) in patches. It is the other well-known way of being relative: no channel
turns, a bias is added before the softmax. Prefix tokens have no place and no bias.

Sources: Press et al., "Train Short, Test Long", 2022 (the slopes, on text); Fuller et al., "CROMA", 2023 (2-D ALiBi).
Not covered: learned slopes, and biases that know directions.
"""

import torch
from torch import Tensor, nn

from ..inputs import check_choice, size_pair
from .frequencies import WITHOUT_THETA, grid_positions


class ALiBi2D(nn.Module):
    """The bias of an encoder whose heads look near or far. It has no weights.

    Args:
        num_heads: H.
        grid_size: training grid, (height, width) in patches.
        strategy: on another grid, "extrapolate" keeps distances in patches, "interpolate" measures them in patches of
            the training grid. May be set later.

    Raises:
        ValueError: another strategy.
    """

    def __init__(self, num_heads: int, grid_size: int | tuple[int, int], strategy: str = "extrapolate") -> None:
        super().__init__()
        self.num_heads, self.grid_size = num_heads, size_pair(grid_size, "grid_size", text=False)
        self.strategy = strategy

    strategies = WITHOUT_THETA

    @property
    def strategy(self) -> str:
        """What happens on another grid than the training one; settable at any time, no retraining needed."""
        return self._strategy

    @strategy.setter
    def strategy(self, value: str) -> None:
        check_choice("strategy of ALiBi", value, self.strategies)
        self._strategy = value

    def forward(
        self,
        grid_size: tuple[int, int],
        *,
        positions: Tensor | None = None,
        index: Tensor | None = None,
        prefix: int = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The bias `[1 or B, H, prefix + N, prefix + N]` in float32, to be added to the scores.

        Args:
            grid_size: (height, width) in patches, of the picture at hand.
            positions: `[N, 2]` or `[B, N, 2]` (row, column) in patches in place of the grid's own, fractions allowed.
            index: `[B, n]`, the patches kept of each sample.
            prefix: tokens in front that have no place.
        """
        at = grid_positions(*grid_size, device=device) if positions is None else positions.float()
        at = at if at.dim() == 3 else at[None]
        if self.strategy == "interpolate":
            at = at * at.new_tensor([t / g for t, g in zip(self.grid_size, grid_size, strict=True)])
        if index is not None:
            at = at.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, 2))
        distance = (at[:, :, None] - at[:, None]).norm(dim=-1)
        slopes = 2.0 ** (-8 * torch.arange(1, self.num_heads + 1, device=at.device) / self.num_heads)
        bias = -slopes[:, None, None] * distance[:, None]
        return nn.functional.pad(bias, (prefix, 0, prefix, 0))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid={self.grid_size}, strategy={self.strategy}"


def with_bias(bias: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """One mask of the two, as timm's attention takes it: what a boolean one hides (False) is -inf, others add up."""
    if bias is None or attn_mask is None:
        return attn_mask if bias is None else bias
    if attn_mask.dtype == torch.bool:
        return bias.masked_fill(~attn_mask, float("-inf"))
    return bias + attn_mask
