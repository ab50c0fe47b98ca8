"""The rotation itself: channel pairs turned by a table of cosines and sines, at the least cost torch allows.

A pair (x0, x1) is one complex number x0 + i x1, and turning it by an angle a is one complex product with
cos a + i sin a. The projection of an attention layer leaves queries, keys and values in one buffer, a row per token:

    [ q head 0 | q head 1 | .. | k head 0 | k head 1 | .. | v head 0 | .. ]      3 * heads * D numbers
      (x0 x1)(x2 x3)..

Why `rotated_heads` is cheap. The textbook form builds the swapped pairs (-x1, x0), two products, a sum and a
concatenation with the prefix tokens: six passes over q and k, each into new memory. Here the first two thirds of the
buffer are multiplied where they lie, by one operation that reads and writes every number once; q, k and v are views
of the buffer, as in plain attention. Nothing is saved for backward but the table that all layers share. The backward
pass is the product with the conjugate table, written straight into the gradient of the buffer, which plain attention
has to put together from three parts anyway: there the rotation rides along for nothing.

Overwriting is allowed only where nobody else holds the buffer; `attention.py` decides that, and otherwise uses
`rotate`, which is out of place. Compilers fuse the real form of `rotate` and know no complex numbers, so they get that.

There is no complex bfloat16. In half precision `fused.py` does the same in one kernel on a CUDA device; elsewhere
`rotate` widens and narrows (`attention.py` keeps q and k in float32 on a CPU).

Not covered: positions and tables (`rope.py`).
"""

import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def traced() -> bool:
    """Whether torch.compile, an export or torch.jit.trace is looking on: no caches, nothing in place."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No narrowing inside; devices that cannot autocast (meta) are left alone."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def serves(x: Tensor) -> bool:
    """Whether `rotate_qkv_` takes tensors of this dtype and device: half precision only where there is a kernel."""
    if x.dtype not in HALF:
        return x.device.type in ("cpu", "cuda")
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _fused().usable(x)


def _fused() -> ModuleType:
    from . import fused  # importing Triton takes a while

    return fused


def as_complex(x: Tensor) -> Tensor:
    """Channel pairs as complex numbers, `[..., D]` -> `[..., D / 2]`: a view wherever the memory allows one."""
    if x.stride(-1) != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs of `x` `[..., D]` by `table` `[..., D / 2, 2]` (cosine, sine), out of place.

    Computed in float32 (float64 for float64) and returned in the dtype of `x`; differentiable in both arguments.
    """
    work = x.double() if x.dtype == torch.float64 else x.float()
    table = table.to(work.dtype)
    if torch.compiler.is_compiling():
        cos, sin = table.unbind(-1)
        even, odd = work.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
    return torch.view_as_real(as_complex(work) * torch.view_as_complex(table)).flatten(-2).to(x.dtype)


def rotate_behind_prefix(x: Tensor, table: Tensor, prefix: int) -> Tensor:
    """Rotate `x` `[B, heads, prefix + N, D]` by `table` `[1 or B, heads or 1, N, D / 2, 2]`, out of place."""
    if prefix == 0:
        return rotate(x, table)
    return torch.cat((x[:, :, :prefix], rotate(x[:, :, prefix:], table)), dim=2)


def rotate_qkv_(qkv: Tensor, table: Tensor, prefix: int = 0) -> Tensor:
    """Rotate q and k inside `qkv`, in place, and return it.

    Args:
        qkv: `[B, prefix + N, 3 * heads * D]`, contiguous, held by nobody else, of a dtype and device that `serves`.
        table: `[1 or B, N, heads or 1, D / 2, 2]` float32 (cosine, sine).
        prefix: number of leading tokens left alone.

    Raises:
        ValueError: autograd would have to follow; `rotated_heads` does.
    """
    if torch.is_grad_enabled() and (qkv.requires_grad or table.requires_grad):
        raise ValueError("rotate_qkv_ overwrites its input behind autograd's back: with gradients use rotated_heads")
    if qkv.dtype in HALF:
        return _fused().turn_(qkv, table, prefix)
    pairs = table.shape[-2]
    width = qkv.shape[-1] // 3
    rows = qkv[:, prefix:, : 2 * width].unflatten(-1, (2, width // (2 * pairs), pairs, 2))
    torch.view_as_complex(rows).mul_(torch.view_as_complex(table)[:, :, None])
    return qkv


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """q, k and v `[B, heads, T, D]`, views of `qkv` `[B, T, 3 * heads * D]`."""
    return qkv.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def rotated_heads(qkv: Tensor, table: Tensor, prefix: int = 0) -> tuple[Tensor, ...]:
    """q, k (rotated) and v `[B, heads, prefix + N, D]`, views of `qkv`, which it overwrites; arguments as above.

    Differentiable in `qkv`, also twice; a table that needs a gradient wants `rotate`.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _RotatedHeads.apply(qkv, table, prefix)
    return split_heads(rotate_qkv_(qkv, table, prefix), 2 * table.shape[-2])


class _RotatedHeads(torch.autograd.Function):
    """`rotated_heads` with the backward pass that writes the gradient of the whole buffer once."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, prefix: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(table)
        ctx.prefix = prefix
        return split_heads(rotate_qkv_(qkv, table, prefix), 2 * table.shape[-2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (table,), prefix = ctx.saved_tensors, ctx.prefix
        q, k, v = (grad.transpose(1, 2) for grad in grads)  # [B, T, heads, D]
        out = v.new_empty(*v.shape[:2], 3, *v.shape[2:])
        if torch.is_grad_enabled():  # for a second derivative: the same, in steps that autograd can follow
            back = (table * table.new_tensor([1.0, -1.0])).transpose(1, 2)
            turned = [rotate_behind_prefix(grad, back, prefix).transpose(1, 2) for grad in grads[:2]]
            return torch.stack((*turned, v), dim=2).flatten(2), None, None
        if out.dtype in HALF:
            torch.stack((q, k, v), dim=2, out=out)
            return _fused().turn_(out.flatten(2), table, prefix, back=True), None, None
        back = torch.view_as_complex(table).conj()
        for part, grad in enumerate((q, k)):
            torch.mul(as_complex(grad[:, prefix:]), back, out=as_complex(out[:, prefix:, part]))
            out[:, :prefix, part] = grad[:, :prefix]
        out[:, :, 2] = v
        return out.flatten(2), None, None
