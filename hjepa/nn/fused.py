"""The rotation of `rotation.py` in half precision on a CUDA device: one kernel, every number read and written once.

torch has no complex bfloat16, so its own operations widen q and k to float32, turn them and narrow them again, in
memory of their own. The kernel widens in registers and writes where it read. It is written in Triton, which comes with
torch's packages for CUDA.

`usable` is asked before every use. It says yes only after the kernel has given, on this device and in this dtype, what
`rotate` gives, and no otherwise, with one warning: slower then, never another result.

Tested on a CPU by Triton's interpreter against the float64 formula (TRITON_INTERPRET=1), and compiled for GPUs of
capability 8.0 and 9.0. No GPU was at hand: what it gains has not been measured.

Not covered: float32, where one complex product in place does it; learned tables, which `rotate` serves.
"""

import warnings
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs, macOS and Windows has none
    triton = None

BLOCK = 256  # pairs that one program turns


def usable(x: Tensor) -> bool:
    """Whether `turn_` may be used on tensors of this device and dtype. `rotation.serves` asks where it may run at all:
    on a CUDA device, or under Triton's interpreter."""
    if triton is None or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _proven(x.device, x.dtype)


def turn_(qkv: Tensor, table: Tensor, prefix: int, *, back: bool = False) -> Tensor:
    """Turn q and k inside `qkv` `[B, prefix + N, 3 * heads * D]`, in place; `back` turns the other way.

    Args:
        qkv: bfloat16 or float16, rows contiguous; `usable` has said yes.
        table: `[1 or B, N, heads or 1, D / 2, 2]` float32 (cosine, sine), on the same device.
        prefix: number of leading tokens left alone.
    """
    pairs, width = table.shape[-2], qkv.shape[-1] // 3
    tokens = qkv.shape[1] - prefix
    batch, place, head, pair = (0 if n == 1 else s for n, s in zip(table.shape[:4], table.stride()[:4], strict=True))
    grid = (qkv.shape[0] * tokens, triton.cdiv(width, BLOCK))
    if qkv.numel() and tokens:
        with torch.cuda.device(qkv.device) if qkv.is_cuda else nullcontext():
            _turn[grid](
                qkv, table, tokens, prefix, width // (2 * pairs), pairs, qkv.stride(0), qkv.stride(1),
                batch, place, head, pair, -1.0 if back else 1.0, BLOCK=BLOCK,
            )  # fmt: skip
    return qkv


@cache
def _proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel gives what the formula gives, on a small case of this device and dtype."""
    batch, tokens, prefix, heads, pairs = 2, 5, 1, 3, 4
    try:
        with torch.no_grad():
            steps = torch.arange(batch * tokens * 3 * heads * 2 * pairs, dtype=torch.float32, device=device)
            qkv = (steps * 0.7).sin().view(batch, tokens, -1).to(dtype)
            angles = steps[: (tokens - prefix) * heads * pairs].view(1, tokens - prefix, heads, pairs)
            table = torch.stack((angles.cos(), angles.sin()), dim=-1)
            rows = qkv[:, prefix:, : 2 * heads * 2 * pairs].float().unflatten(-1, (2, heads, pairs, 2))
            turned = torch.view_as_complex(rows) * torch.view_as_complex(table)[:, :, None]
            right = qkv.float()
            right[:, prefix:, : 2 * heads * 2 * pairs] = torch.view_as_real(turned).flatten(2)
            error = (turn_(qkv.clone(), table, prefix).float() - right).abs().max().item()
    except Exception as fault:  # no compiler, an old driver or GPU: whatever it is, the other form is there
        found = f"{type(fault).__name__}: {fault}".splitlines()[0]
    else:
        if error <= 2 * torch.finfo(dtype).eps:
            return True
        found = f"it is off by {error:.2g}"
    warnings.warn(f"the fused rotation is not used on {device} in {dtype} ({found}); the slower form is", stacklevel=3)
    return False


if triton is not None:

    @triton.jit
    def _turn(
        x, table, tokens, prefix, heads, pairs, batch_step, token_step,
        table_batch, table_token, table_head, table_pair, sign, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # counted over q's heads, then k's
        inside = pair < 2 * heads * pairs
        head = (pair // pairs) % heads
        angle = table + batch * table_batch + token * table_token + head * table_head + (pair % pairs) * table_pair
        cos = tl.load(angle, mask=inside)
        sin = tl.load(angle + 1, mask=inside) * sign
        place = x + batch * batch_step + (token + prefix) * token_step + 2 * pair
        even = tl.load(place, mask=inside).to(tl.float32)
        odd = tl.load(place + 1, mask=inside).to(tl.float32)
        tl.store(place, (even * cos - odd * sin).to(x.dtype.element_ty), mask=inside)
        tl.store(place + 1, (even * sin + odd * cos).to(x.dtype.element_ty), mask=inside)
