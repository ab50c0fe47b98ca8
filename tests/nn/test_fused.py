"""The kernel that rotates in half precision, run by Triton's interpreter on a CPU and compiled for GPUs not at hand."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

triton = pytest.importorskip("triton")

from hjepa.nn import fused, rotation  # noqa: E402

INTERPRETED = """
import torch
from formulas import rotate_rows
from hjepa.nn import attention, rotation
from hjepa.nn.attention import Attention, RoPEAttentionWrapper
from hjepa.nn.rope import VisionRoPE2D

torch.manual_seed(0)


def close(got, right, dtype):  # the interpreter narrows to bfloat16 by cutting digits off: one unit in the last place
    assert got.dtype == dtype
    error = (got.double() - right).abs() - torch.finfo(dtype).eps * right.abs().clamp(min=2**-6)
    assert error.max() <= 0, (dtype, error.max())


def turned(qkv, angles, prefix):  # the formula on q and k [B, T, 3, heads, D]; angles [1 or B, N, heads or 1, D / 2]
    out = qkv.double().clone()
    for b in range(qkv.shape[0]):
        for part in (0, 1):
            for h in range(qkv.shape[3]):
                of = angles[b % angles.shape[0], :, h % angles.shape[2]]
                out[b, prefix:, part, h] = rotate_rows(qkv[b, prefix:, part, h], of)
    return out


B, N, H, D = 2, 5, 3, 8
for dtype in (torch.bfloat16, torch.float16):
    for prefix, batch, heads in ((0, 1, 1), (1, 1, H), (2, B, 1), (1, B, H)):
        angles = torch.randn(batch, N, heads, D // 2, dtype=torch.float64) * 3
        table = torch.stack((angles.cos(), angles.sin()), dim=-1).float()
        qkv = torch.randn(B, prefix + N, 3, H, D).to(dtype)
        assert rotation.serves(qkv)
        right = turned(qkv, angles, prefix)
        got = rotation.rotate_qkv_(qkv.flatten(2).clone(), table, prefix)
        close(got, right.flatten(2), dtype)

        wide = qkv.flatten(2).clone().requires_grad_()
        q, k, v = rotation.rotated_heads(wide.clone(), table, prefix)
        grads = [torch.randn(part.shape).to(dtype) for part in (q, k, v)]
        torch.autograd.backward((q, k, v), grads)
        back = turned(torch.stack([g.transpose(1, 2) for g in grads], dim=2), -angles, prefix)
        close(wide.grad, back.flatten(2), dtype)

wide = torch.randn(2, 5000, 3 * 2 * 64).to(torch.bfloat16)  # more programs and pairs than one block holds
angles = torch.randn(1, 5000, 1, 32, dtype=torch.float64)
got = rotation.rotate_qkv_(wide[:, ::250].contiguous(), torch.stack((angles.cos(), angles.sin()), -1).float()[:, ::250])
close(got, turned(wide[:, ::250].unflatten(-1, (3, 2, 64)), angles[:, ::250], 0).flatten(2), torch.bfloat16)

attention.HALF = ()  # as on a GPU: no widening
layer = RoPEAttentionWrapper(Attention(H * D, num_heads=H, qkv_bias=True), VisionRoPE2D(D, 8, (2, 3), theta=20.0))
x = torch.randn(B, 7, H * D)
calls, kernel = [], rotation._fused().turn_
rotation._fused().turn_ = lambda *a, **k: (calls.append(k.get("back", False)), kernel(*a, **k))[1]
exact = layer(x)
exact.square().sum().backward()
right = layer.qkv.weight.grad.clone()
assert not calls
layer.zero_grad()
with torch.autocast("cpu", torch.bfloat16):
    narrow = layer(x)
narrow.float().square().sum().backward()
assert calls == [False, True]
assert (narrow - exact).norm() < 0.02 * exact.norm()
assert (layer.qkv.weight.grad - right).norm() < 0.02 * right.norm()
print("fused")
"""


def test_the_kernel_equals_the_float64_formula_forward_and_back_and_inside_a_layer() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "fused\n", done.stdout + done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(capability: int, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"x": f"*{dtype}", "table": "*fp32", "sign": "fp32", "BLOCK": "constexpr"}
    signature = {name: kinds.get(name, "i32") for name in fused._turn.arg_names}
    source = ASTSource(fn=fused._turn, signature=signature, constexprs={"BLOCK": fused.BLOCK})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_a_kernel_that_fails_or_is_wrong_is_left_alone_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"RuntimeError: no driver": None, "it is off by": lambda qkv, table, prefix: qkv}
    for said, kernel in wrong.items():
        fused._proven.cache_clear()

        def fails(*arguments: object) -> None:
            raise RuntimeError("no driver\nand more")

        monkeypatch.setattr(fused, "turn_", kernel or fails)
        with pytest.warns(UserWarning, match=f"the fused rotation is not used on cpu in torch.bfloat16.*{said}"):
            assert not fused.usable(torch.zeros(1, dtype=torch.bfloat16))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not fused.usable(torch.zeros(1, dtype=torch.bfloat16))
    fused._proven.cache_clear()


def test_without_triton_or_a_gpu_half_precision_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.zeros(1, dtype=torch.float16)
    assert not rotation.serves(half)
    monkeypatch.setattr(fused, "triton", None)
    assert not fused.usable(half)
