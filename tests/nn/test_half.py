"""Half precision on a CPU, and what the cheap rotation promises: nothing saved but the table, odd layouts, refusals."""

from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

from hjepa.nn.attention import PlainAttention, RoPEAttentionWrapper
from hjepa.nn.encoders import ContextEncoder
from hjepa.nn.rope import VisionRoPE2D
from hjepa.nn.rotation import rotate, rotate_qkv_, rotated_heads

HALVES = (torch.bfloat16, torch.float16)
GRID, HEADS, DIM = (3, 4), 2, 8


def layers(**options: Any) -> dict[str, nn.Module]:
    """An attention without and with rotation, of the same weights."""
    torch.manual_seed(0)
    plain = Attention(HEADS * DIM, num_heads=HEADS, qkv_bias=True, norm_layer=nn.LayerNorm, **options).eval()
    plain.__class__ = PlainAttention
    wrapped = Attention(HEADS * DIM, num_heads=HEADS, qkv_bias=True, norm_layer=nn.LayerNorm, **options).eval()
    wrapped.load_state_dict(plain.state_dict())
    return {"plain": plain, "rope": RoPEAttentionWrapper(wrapped, VisionRoPE2D(DIM, 8, GRID, theta=20.0))}


def tokens() -> Tensor:
    return torch.randn(2, 13, HEADS * DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes in which the fused attention was called."""
    dtypes: list[torch.dtype] = []
    fused = nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype)
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    return dtypes


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["plain", "rope"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_half_precision_on_a_cpu_attends_in_float32(
    name: str, options: dict[str, Any], dtype: torch.dtype, seen: list[torch.dtype]
) -> None:
    layer = layers(**options)[name].eval()
    exact = layer(tokens())
    with torch.autocast("cpu", dtype):
        mixed = layer(tokens())
    narrow = layer.to(dtype)(tokens().to(dtype))
    assert seen == [torch.float32] * 3
    assert mixed.dtype == narrow.dtype == dtype
    for out in (mixed, narrow):
        torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", ["plain", "rope"])
def test_training_in_bfloat16_takes_plain_products_close_to_the_exact_ones(name: str, seen: list[torch.dtype]) -> None:
    """Up to SHORT tokens, where torch's attention and its backward pass are slower; values and gradients agree."""
    layer, x = layers()[name].train(), tokens().requires_grad_()
    exact = layer(x)
    (expected,) = torch.autograd.grad(exact.square().sum(), x)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    (found,) = torch.autograd.grad(mixed.float().square().sum(), x)
    assert seen == []
    torch.testing.assert_close(mixed.float(), exact, atol=2e-2, rtol=0)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_norm": True}])
def test_plain_attention_in_float32_is_timm_bit_for_bit(options: dict[str, Any]) -> None:
    layer, x = layers(**options)["plain"], tokens()
    allowed = torch.rand(2, 1, 13, 13) < 0.7
    allowed |= torch.eye(13, dtype=torch.bool)
    for arguments in ((), (allowed,), (None, True)):
        assert torch.equal(layer(x, *arguments), Attention.forward(layer, x, *arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plain", "rope"])
def test_gradients_under_autocast_stay_close_to_float32(name: str) -> None:
    layer, weight = layers()[name], tokens().flip(1)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(tokens())
        found.append(torch.autograd.grad((out.float() * weight).sum(), list(layer.parameters())))
    for exact, mixed in zip(*found, strict=True):
        assert (exact - mixed).norm() < 2e-2 * exact.norm() + 1e-3


@pytest.mark.parametrize("name", ["plain", "rope"])
def test_masks_given_in_half_precision_or_as_booleans_agree(name: str) -> None:
    layer = layers()[name].bfloat16()
    allowed = torch.rand(2, 1, 13, 13) < 0.7
    allowed |= torch.eye(13, dtype=torch.bool)
    added = torch.zeros(2, 1, 13, 13, dtype=torch.bfloat16).masked_fill(~allowed, float("-inf"))
    x = tokens().bfloat16()
    assert torch.equal(layer(x, allowed), layer(x, added))
    assert not torch.equal(layer(x, allowed), layer(x))


@pytest.mark.parametrize("use_absolute", [False, True])
def test_layers_are_summed_in_float32_under_autocast_with_and_without_a_position_table(use_absolute: bool) -> None:
    vit = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False)
    options: dict[str, Any] = dict(use_rope=True, use_absolute=use_absolute, vit=vit)
    encoder = ContextEncoder("vit_tiny_patch16_224", 32, **options)
    dtypes: list[torch.dtype] = []
    for block in encoder.vit.blocks:
        block.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(torch.randn(1, 3, 32, 32))
    assert dtypes == [torch.float32] * 2


def test_rotation_saves_nothing_for_backward_but_the_table() -> None:
    table = VisionRoPE2D(DIM, 8, GRID).table(GRID)
    qkv = torch.randn(2, 13, 3 * HEADS * DIM, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        heads = rotated_heads(qkv, table, 1)
    assert saved == [table.data_ptr()]
    assert all(part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for part in heads)


def test_rotate_takes_layouts_that_are_no_complex_numbers_in_memory() -> None:
    table = VisionRoPE2D(DIM, 8, GRID).table(GRID).transpose(1, 2)
    x = torch.randn(2, HEADS, 12, DIM)
    channels_first = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    shifted = torch.cat((torch.zeros(1), x.flatten()))[1:].view_as(x)
    repeated = x[:1, :1, :1, :1].expand(2, HEADS, 12, DIM)
    odd_rows = torch.nn.functional.pad(x, (0, 1))[..., :DIM]
    for other, same in ((channels_first, x), (shifted, x), (repeated, repeated.contiguous()), (odd_rows, x)):
        assert torch.equal(rotate(other, table), rotate(same, table))


def test_gradients_in_any_layout_are_turned_back() -> None:
    """Sums hand back expanded gradients, transposed products others: none of them is a row of pairs in memory."""
    table = VisionRoPE2D(DIM, 8, GRID, theta=20.0).table(GRID)
    results = []
    for turn in (rotated_heads, lambda qkv, table: _out_of_place(qkv, table)):
        qkv = torch.randn(2, 12, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(2)).requires_grad_()
        q, k, v = turn(qkv * 1, table)
        loss = q.sum() + (k.transpose(-1, -2) @ q.detach().sin()).square().sum() + v.sum(-1).square().sum()
        results.append(torch.autograd.grad(loss, qkv)[0])
    torch.testing.assert_close(*results)


def _out_of_place(qkv: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
    return rotate(q, table.transpose(1, 2)), rotate(k, table.transpose(1, 2)), v


def test_rotating_in_place_behind_autograd_is_refused() -> None:
    table = VisionRoPE2D(DIM, 8, GRID).table(GRID)
    qkv = torch.randn(1, 12, 3 * HEADS * DIM, requires_grad=True)
    with pytest.raises(ValueError, match="rotated_heads"):
        rotate_qkv_(qkv, table)
    with torch.no_grad():
        assert rotate_qkv_(qkv, table) is qkv
