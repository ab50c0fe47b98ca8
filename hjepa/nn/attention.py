"""RoPEAttentionWrapper: timm's self-attention with queries and keys rotated, its parameters and their names untouched.

`attend` computes what timm's `Attention.forward` computes (fused or not, q/k norms, output norm, gate, dropout, masks)
with one step more: after the qkv projection the patch rows of q and k are turned by a rotation table (cosines, sines).
Prefix tokens (CLS, registers, distillation) have no place on the grid and are not turned.

The rotation overwrites the projection's output (`rotation.py` says why that is cheap). Where that output is not ours
alone (hooks or another module than nn.Linear on the projection), or a norm stands in between, or the table itself is
learned, or a compiler looks on, it is out of place, with the same values.

Half precision on a CPU: the projections are then twice as fast, but torch's attention is not faster than in float32,
and its backward pass is up to ten times slower on short sequences. So `attend` widens q, k and v to float32 in
between, which also makes the rotation exact; in training on up to SHORT tokens it then takes plain products in
bfloat16, which are faster still; `PlainAttention` is timm's attention with that one change, for layers
without RoPE.

timm's modules are not copied and not subclassed from scratch: `adopt` gives a module another class's methods over one
and the same `__dict__`. Whatever is read, set, hooked or replaced through either is seen by both.

Not covered: cross-attention, causal masks, timm's own AttentionRope (already rotary).
"""

from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from .rope import VisionRoPE2D
from .rotation import HALF, rotate_behind_prefix, rotated_heads, serves, split_heads, traced

SHORT = 128  # tokens up to which plain products in bfloat16 are the faster form in training on a CPU
M = TypeVar("M", bound=nn.Module)


def adopt(kind: type[M], module: nn.Module) -> M:
    """A `kind` with the state of `module`, an instance of one of its base classes: both have one `__dict__`."""
    view = kind.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def attend(
    attn: Attention,
    x: Tensor,
    attn_mask: Tensor | None = None,
    *,
    table: Tensor | None = None,
    prefix: int = 0,
    training: bool = False,
) -> Tensor:
    """What `attn` makes of `x` `[B, prefix + N, C]`, q and k turned by `table` `[1 or B, N, heads or 1, D / 2, 2]`."""
    q, k, v, dtype = heads(attn, x, table, prefix)
    with torch.autocast("cpu", enabled=False) if dtype in HALF and q.dtype not in HALF else nullcontext():
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(q.dtype)
        if training and _is_short(q, dtype, attn_mask):
            q, k, v = (part.to(dtype) for part in (q, k, v))
            out = attn.attn_drop(weights(q, k, attn.scale)) @ v
        elif attn.fused_attn:
            dropout = attn.attn_drop.p if training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            out = attn.attn_drop(weights(q, k, attn.scale, attn_mask)) @ v
    out = attn.norm(out.transpose(1, 2).flatten(2).to(dtype))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _is_short(q: Tensor, dtype: torch.dtype, attn_mask: Tensor | None) -> bool:
    """Whether plain products in bfloat16 beat torch's fused attention: training on a CPU with few tokens."""
    widened = dtype == torch.bfloat16 and q.dtype == torch.float32 and q.device.type == "cpu"
    return widened and q.requires_grad and attn_mask is None and q.shape[2] <= SHORT


def heads(
    attn: Attention, x: Tensor, table: Tensor | None = None, prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Normed and rotated q and k, and v, `[B, heads, prefix + N, D]`; last the dtype before widening."""
    qkv = attn.qkv(x)
    dtype, ours = qkv.dtype, _is_ours(attn.qkv, qkv)
    widen = dtype in HALF and qkv.device.type == "cpu"
    normed = not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity))
    if widen and not normed:
        qkv, ours = qkv.to(torch.float32, memory_format=torch.contiguous_format), not traced()
    if table is not None and ours and not normed and not table.requires_grad:
        return *rotated_heads(qkv, table, prefix), dtype
    q, k, v = split_heads(qkv, attn.head_dim)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if widen:
        q, k, v = q.float(), k.float(), v.float()
    if table is not None:
        q, k = (rotate_behind_prefix(part, table.transpose(1, 2), prefix) for part in (q, k))
    return q, k, v, dtype


def _is_ours(linear: nn.Module, qkv: Tensor) -> bool:
    """Whether `qkv` may be overwritten: made this instant by a plain Linear, seen by no hook or compiler."""
    if traced() or torch._C._are_functorch_transforms_active():
        return False
    plain = type(linear) is nn.Linear and "forward" not in linear.__dict__
    return plain and not _hooked(linear) and qkv.is_contiguous() and serves(qkv)


def _hooked(module: nn.Module) -> bool:
    """Whether anybody is handed the module's output, or its gradient."""
    return any((
        module._forward_hooks, module._backward_hooks, module._backward_pre_hooks,
        torch_module._global_forward_hooks, torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    ))  # fmt: skip


def weights(q: Tensor, k: Tensor, scale: float, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T), masked as in timm: `[B, heads, T, T]`, rows sum to one."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None:
        hides = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if hides else scores + attn_mask
    return scores.softmax(dim=-1)


class PlainAttention(Attention):
    """timm's attention, bit for bit, but for half precision on a CPU, where it is `attend`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's, on `x` `[B, T, C]`."""
        half = x.dtype in HALF or torch.is_autocast_enabled("cpu")
        if is_causal or x.device.type != "cpu" or not half:
            return super().forward(x, attn_mask, is_causal)
        return attend(self, x, attn_mask, training=self.training)


class RoPEAttentionWrapper(Attention):
    """Wrap a timm `Attention` so that its queries and keys are rotated by `rope`.

    The wrapper is a timm attention too and has the wrapped one's whole state: attributes (`fused_attn`, `scale`, ..),
    parameters, modules, hooks, training mode. So state dict keys, parameter names and optimiser groups are those of
    plain timm, nothing is stored twice, and `.attn` is the wrapped module itself. `rope` is shared by all layers and
    belongs to the encoder: it is not a child of the wrapper.

    Args:
        attn: a timm `Attention`.
        rope: the rotation; its `dim` must be the attention's head dim.
        layer: index of the layer, used where rope has tables per layer.
        num_prefix_tokens: leading tokens that are not rotated.

    Raises:
        ValueError: another attention than timm's, or a head dim that does not fit.
    """

    __slots__ = ("attn", "layer", "num_prefix_tokens", "rope")  # what is the wrapper's own
    attn: Attention
    rope: VisionRoPE2D
    layer: int
    num_prefix_tokens: int

    def __init__(self, attn: Any, rope: VisionRoPE2D, layer: int = 0, num_prefix_tokens: int = 1) -> None:
        if type(attn) not in (Attention, PlainAttention):
            raise ValueError(
                f"cannot rotate {type(attn).__name__}: RoPEAttentionWrapper takes timm.layers.Attention "
                "(wrapped already, or rotary by itself, it needs no wrapper)"
            )
        if attn.head_dim != rope.dim:
            raise ValueError(f"attention has head dim {attn.head_dim}, rope was built for dim={rope.dim}")
        object.__setattr__(self, "__dict__", attn.__dict__)
        self.attn, self.rope = attn, rope
        self.layer, self.num_prefix_tokens = layer, num_prefix_tokens

    def __setattr__(self, name: str, value: Any) -> None:
        """As every module's, but `attn` and `rope` do not become children."""
        if name in RoPEAttentionWrapper.__slots__:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.attn, self.rope, self.layer, self.num_prefix_tokens)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, table: Tensor | None = None
    ) -> Tensor:
        """Attention over `x` `[B, prefix + N, C]`, masked as in timm; `table` is rope's, by default the full grid's.

        Raises:
            ValueError: a causal mask, or a number of patch tokens that the table does not have.
        """
        if is_causal:
            raise ValueError("is_causal=True has no meaning on a 2-D grid")
        table = self._check_table(table, x)
        return attend(self, x, attn_mask, table=table, prefix=self.num_prefix_tokens, training=self.training)

    def attention_weights(self, x: Tensor, attn_mask: Tensor | None = None, *, table: Tensor | None = None) -> Tensor:
        """The weights `[B, heads, prefix + N, prefix + N]` that `forward` would use on `x`, without dropout."""
        q, k, _, _ = heads(self, x, self._check_table(table, x), self.num_prefix_tokens)
        return weights(q, k, self.scale, attn_mask)

    def _check_table(self, table: Tensor | None, x: Tensor) -> Tensor:
        if table is None:
            table = self.rope.table(self.rope.grid_size, self.layer, device=x.device)
        patches = x.shape[1] - self.num_prefix_tokens
        if table.shape[1] != patches:
            raise ValueError(
                f"{patches} patch tokens (after {self.num_prefix_tokens} prefix) but positions for {table.shape[1]}: "
                "give the table of the tokens' own positions, rope.table(grid_size, positions=... or index=...)"
            )
        return table

    def extra_repr(self) -> str:
        return f"layer={self.layer}, num_prefix_tokens={self.num_prefix_tokens}"
