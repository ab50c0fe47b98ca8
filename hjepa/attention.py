"""RoPEAttentionWrapper: timm's self-attention with queries and keys rotated, its parameters and their names untouched.

The wrapper computes what timm's `Attention.forward` computes (fused or not, q/k norms, output norm, gate, dropout,
masks) with one step more: after the qkv projection the patch rows of q and k are turned by a table of cosines and
sines. Prefix tokens (CLS, registers, distillation) have no place on the grid and are not turned.

The layout. The projection's output is one buffer, a row per token:

    [ q head 0 | q head 1 | .. | k head 0 | k head 1 | .. | v head 0 | .. ]      3 * heads * D numbers
      (x0 x1)(x2 x3)..           a pair of channels is one complex number x0 + i x1

Turning a pair by an angle is one complex product, so float32 q and k are rotated where they lie by a single in-place
multiplication of the buffer's first two thirds: no copy, no concatenation, nothing saved for backward but the table
that all layers share. The backward pass is the product with the conjugate table. Where the buffer is not ours alone
(hooks or another module than nn.Linear on the projection), or the dtype is not float32, or a norm stands in between,
or the table itself is learned, the out-of-place `rope.rotate` gives the same values.

Not covered: cross-attention, causal masks, timm's own AttentionRope (already rotary).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from timm.layers import Attention

from .rope import VisionRoPE2D, rotate


def _as_complex(qkv: Tensor, table: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Views: the patch rows of q and k `[B, N, 2, heads, D / 2]`, and the table `[1 or B, N, 1, heads or 1, D / 2]`."""
    pairs = table.shape[-2]
    width = qkv.shape[-1] // 3
    rows = qkv[:, prefix:, : 2 * width].unflatten(-1, (2, width // (2 * pairs), pairs, 2))
    return torch.view_as_complex(rows), torch.view_as_complex(table)[:, :, None]


class _RotateInPlace(torch.autograd.Function):
    """Rotate the patch rows of q and k in a fresh qkv buffer `[B, prefix + N, 3 * heads * D]`; inverse: the conjugate."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, prefix: int) -> Tensor:
        rows, turn = _as_complex(qkv, table, prefix)
        rows.mul_(turn)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(table)
        ctx.prefix = prefix
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        conjugate = table * table.new_tensor([1.0, -1.0])
        return _RotateInPlace.apply(grad.clone(memory_format=torch.contiguous_format), conjugate, ctx.prefix), None, None


def rotate_qkv_(qkv: Tensor, table: Tensor, prefix: int = 0) -> Tensor:
    """Rotate q and k inside `qkv`, in place, and return it.

    Args:
        qkv: `[B, prefix + N, 3 * heads * D]` float32, contiguous, held by nobody else.
        table: `[1 or B, N, heads or 1, D / 2, 2]` float32 (cosine, sine), needing no gradient.
        prefix: number of leading tokens left alone.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _RotateInPlace.apply(qkv, table, prefix)
    rows, turn = _as_complex(qkv, table, prefix)
    rows.mul_(turn)
    return qkv


class RoPEAttentionWrapper(nn.Module):
    """Wrap a timm `Attention` so that its queries and keys are rotated by `rope`.

    The wrapper adopts the attention's own tables of parameters and modules, so state dict keys, parameter names and
    optimiser groups are those of plain timm, nothing is stored twice, and `.attn` is the wrapped module itself. `rope`
    is shared by all layers and belongs to the encoder: it is not a child of the wrapper.

    Args:
        attn: a timm `Attention`.
        rope: the rotation; its `dim` must be the attention's head dim.
        layer: index of the layer, used where rope has tables per layer.
        num_prefix_tokens: leading tokens that are not rotated.

    Raises:
        ValueError: another attention than timm's, or a head dim that does not fit.
    """

    attn: Attention
    rope: VisionRoPE2D

    def __init__(self, attn: nn.Module, rope: VisionRoPE2D, layer: int = 0, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        if type(attn) is not Attention:
            raise ValueError(
                f"cannot rotate {type(attn).__name__}: RoPEAttentionWrapper takes timm.layers.Attention "
                "(wrapped already, or rotary by itself, it needs no wrapper)"
            )
        if attn.head_dim != rope.dim:
            raise ValueError(f"attention has head dim {attn.head_dim}, rope was built for dim={rope.dim}")
        # One set of tables, two views: what is registered or replaced through either is seen by both.
        self._modules, self._parameters, self._buffers = attn._modules, attn._parameters, attn._buffers
        self.__dict__["attn"], self.__dict__["rope"] = attn, rope
        self.layer, self.num_prefix_tokens = layer, num_prefix_tokens
        self.train(attn.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, table: Tensor | None = None
    ) -> Tensor:
        """Attention over `x` `[B, prefix + N, C]`, masked as in timm; `table` is rope's, by default the full grid's.

        Raises:
            ValueError: a causal mask, or a number of patch tokens that the table does not have.
        """
        if is_causal:
            raise ValueError("is_causal=True has no meaning on a 2-D grid")
        batch, tokens, _ = x.shape
        q, k, v = self._rotated_qkv(x, self._check_table(table, tokens, x.device))
        attn = self.attn
        if attn.fused_attn:
            dropout = attn.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            out = attn.attn_drop(self._weights(q, k, attn_mask)) @ v
        out = attn.norm(out.transpose(1, 2).reshape(batch, tokens, -1))
        if attn.gate is not None:
            out = out * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def attention_weights(self, x: Tensor, attn_mask: Tensor | None = None, *, table: Tensor | None = None) -> Tensor:
        """The weights `[B, heads, prefix + N, prefix + N]` that `forward` would use on `x`, without dropout."""
        q, k, _ = self._rotated_qkv(x, self._check_table(table, x.shape[1], x.device))
        return self._weights(q, k, attn_mask)

    def _weights(self, q: Tensor, k: Tensor, attn_mask: Tensor | None) -> Tensor:
        scores = (q * self.attn.scale) @ k.transpose(-2, -1)
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
            )
        return scores.softmax(dim=-1)

    def _check_table(self, table: Tensor | None, tokens: int, device: torch.device) -> Tensor:
        if table is None:
            table = self.rope.table(self.rope.grid_size, self.layer, device=device)
        patches = tokens - self.num_prefix_tokens
        if table.shape[1] != patches:
            raise ValueError(
                f"{patches} patch tokens (after {self.num_prefix_tokens} prefix) but positions for {table.shape[1]}: "
                "give the table of the tokens' own positions, rope.table(grid_size, positions=... or index=...)"
            )
        return table

    def _rotated_qkv(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn, prefix = self.attn, self.num_prefix_tokens
        plain = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
        qkv = attn.qkv(x)
        in_place = plain and self._owns(qkv, table)
        if in_place:
            qkv = rotate_qkv_(qkv, table, prefix)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        if in_place:
            return q, k, v
        turn = table.transpose(1, 2)
        return _rotate_rows(attn.q_norm(q), turn, prefix), _rotate_rows(attn.k_norm(k), turn, prefix), v

    def _owns(self, qkv: Tensor, table: Tensor) -> bool:
        """Whether `qkv` may be overwritten: float32, made this instant by a plain Linear, seen by no hook."""
        if torch.compiler.is_compiling() or qkv.dtype != torch.float32 or table.requires_grad:
            return False
        linear = self.attn.qkv
        hooked = linear._forward_hooks or torch_module._global_forward_hooks
        ours = type(linear) is nn.Linear and "forward" not in linear.__dict__
        return ours and not hooked and qkv.is_contiguous()

    def extra_repr(self) -> str:
        return f"layer={self.layer}, num_prefix_tokens={self.num_prefix_tokens}"


def _rotate_rows(x: Tensor, table: Tensor, prefix: int) -> Tensor:
    """Rotate `x` `[B, heads, prefix + N, D]` behind its prefix."""
    if prefix == 0:
        return rotate(x, table)
    return torch.cat((x[:, :, :prefix], rotate(x[:, :, prefix:], table)), dim=2)
