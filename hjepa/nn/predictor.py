"""The predictor: from the context's tokens to the features of hidden cells, asked for by (level, position).

A query is one learned token per level; where it asks about is a position on the patch grid, the centre of its cell.
A patch (r, c) has centre (r, c); a 2 x 2 cell has a fractional one such as (2.5, 4.5), by which RoPE rotates as by any
other. That is how one predictor serves all levels of the hierarchy, and any grid.

    tokens   [ context prefix | context patches | level-0 queries | level-1 queries | .. ]
    places           -          their own (r,c)    patch (r, c)      cell centre (r, c)

With an absolute encoder the query gets a fixed 2-D sine-cosine code of the same position instead (I-JEPA's predictor,
evaluated at fractions), in units of training patches. With neither, all queries of a level are one and the same.

Source: Assran et al., "I-JEPA", 2023, section 3, for the narrow transformer predictor.
Not covered: separate predictors per level.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .alibi import ALiBi2D
from .frequencies import sincos_positions
from .rope import VisionRoPE2D
from .vit import add_rope, run_block, widen_half


class Predictor(nn.Module):
    """A narrow transformer over context tokens and queries.

    Args:
        encoder_dim: width D of context tokens and of predictions.
        embed_dim, depth, num_heads: the predictor's own shape.
        levels: number of levels it can be asked about.
        grid_size: training patch grid (height, width).
        num_prefix_tokens: prefix tokens at the front of the context.
        use_rope, rope_theta, rope: as in `create_encoder`; the head dim is the predictor's own.
        use_absolute: add the sine-cosine code of the position to context tokens and queries.
        use_alibi: bias the scores by distance, as in `create_encoder`.
    """

    def __init__(
        self,
        encoder_dim: int,
        embed_dim: int = 96,
        depth: int = 2,
        num_heads: int = 4,
        *,
        levels: int = 3,
        grid_size: tuple[int, int] = (14, 14),
        num_prefix_tokens: int = 0,
        use_rope: bool = False,
        rope_theta: float = 10000.0,
        use_absolute: bool = True,
        use_alibi: bool = False,
        rope: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"predictor embed_dim={embed_dim} must be a multiple of 4 and of num_heads={num_heads}")
        self.grid_size, self.num_prefix_tokens, self.use_absolute = grid_size, num_prefix_tokens, use_absolute
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.level_token = nn.Parameter(torch.empty(levels, embed_dim))
        self.blocks = nn.ModuleList(widen_half(Block(embed_dim, num_heads, qkv_bias=True)) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, encoder_dim)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.level_token, std=0.02)
        strategy = (rope or {}).get("strategy", "extrapolate")
        self.alibi = ALiBi2D(num_heads, grid_size, strategy) if use_alibi else None
        self.rope = None
        if use_rope:
            options = dict(rope or {}) | {"num_heads": num_heads, "num_layers": depth}
            if options.get("theta_per_layer"):
                options["theta_per_layer"] = _spread(options["theta_per_layer"], depth)
            self.rope = VisionRoPE2D(embed_dim // num_heads, 1, grid_size, rope_theta, **options)
            for layer, block in enumerate(self.blocks):
                self.blocks[layer] = add_rope(block, self.rope, layer, num_prefix_tokens)

    def forward(
        self,
        context: Tensor,
        context_positions: Tensor,
        query_positions: Sequence[Tensor],
        grid_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, ...]:
        """Predict features for each level's queries.

        Args:
            context: `[B, prefix + n, D]` from the context encoder.
            context_positions: `[B, n, 2]`, (row, column) in patches.
            query_positions: one `[B, m_l, 2]` per level.
            grid_size: patch grid of these images; the training grid by default.

        Returns:
            One `[B, m_l, D]` per level.

        Raises:
            ValueError: more levels than it was built for, or positions that do not fit the context.
        """
        grid = grid_size or self.grid_size
        self._check(context, context_positions, query_positions)
        positions = torch.cat((context_positions, *query_positions), dim=1).float()
        queries = [token.expand(*p.shape[:2], -1) for token, p in zip(self.level_token, query_positions, strict=False)]
        x = torch.cat((self.embed(context), *queries), dim=1)
        if self.use_absolute:
            x = x + self._absolute(positions, grid, x.dtype)
        tables: list[Tensor | None] = [None] * len(self.blocks)
        if self.rope is not None:
            tables = list(self.rope.tables(grid, positions=positions))
        bias = None
        if self.alibi is not None:
            bias = self.alibi(grid, positions=positions, prefix=self.num_prefix_tokens).to(x.dtype)
        for block, table in zip(self.blocks, tables, strict=True):
            x = run_block(block, x, table, bias)
        x = self.head(self.norm(x[:, context.shape[1] :]))
        return x.split([p.shape[1] for p in query_positions], dim=1)

    def check_heads(self, num_heads: int) -> None:
        """ValueError unless it has so many: weights made for another number fit, and predict something else."""
        own = self.blocks[0].attn.num_heads  # type: ignore[union-attr]
        if own != num_heads:
            raise ValueError(
                f"its predictor has num_heads={num_heads} and this one num_heads={own}: the same weights would give "
                "other predictions; build both alike"
            )

    def _check(self, context: Tensor, context_positions: Tensor, query_positions: Sequence[Tensor]) -> None:
        if not 1 <= len(query_positions) <= len(self.level_token):
            raise ValueError(f"{len(query_positions)} levels of queries, the predictor has 1..{len(self.level_token)}")
        patches = context.shape[1] - self.num_prefix_tokens
        if context_positions.shape != (len(context), patches, 2):
            raise ValueError(
                f"context_positions must be [{len(context)}, {patches}, 2] for context {list(context.shape)} with "
                f"{self.num_prefix_tokens} prefix tokens, got {list(context_positions.shape)}"
            )

    def _absolute(self, positions: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The position code `[B, prefix + n + m, D]`, zero for the prefix, in units of training patches."""
        ratio = positions.new_tensor([t / g for t, g in zip(self.grid_size, grid, strict=True)])
        code = sincos_positions((positions + 0.5) * ratio - 0.5, self.level_token.shape[-1]).to(dtype)
        return nn.functional.pad(code, (0, 0, self.num_prefix_tokens, 0))


def _spread(values: Sequence[float], count: int) -> list[float]:
    """`count` of the values, evenly chosen from first to last: the encoder's per-layer thetas for fewer layers."""
    return [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
