"""RoPEAttentionWrapper as a module: gradients, hooks and projections that look on, state dicts, copies, precision."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import DIM, GRID, HEADS, PATHS, build_attention, tokens
from formulas import attention, axial_angles, patch_positions
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa.nn.attention import RoPEAttentionWrapper
from hjepa.nn.rope import VisionRoPE2D
from hjepa.nn.rotation import rotated_heads

PREFIXES = [0, 1, 2, 5]


def reference(wrapper: RoPEAttentionWrapper, x: Tensor, positions: Tensor | None = None, theta: float = 20.0) -> Tensor:
    weights = {name: value.double() for name, value in wrapper.state_dict().items()}
    places = patch_positions(*GRID) if positions is None else positions
    return attention(x.double(), weights, HEADS, axial_angles(places, DIM, theta), wrapper.num_prefix_tokens)


# gradients


@pytest.mark.parametrize("prefix", PREFIXES)
def test_in_place_rotation_has_the_right_gradient_and_double_gradient(prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, prefix + 1, 3 * 2 * 4, dtype=torch.float64, generator=generator, requires_grad=True)
    angle = torch.rand(1, 1, 1, 2, dtype=torch.float64, generator=generator) * 6
    table = torch.stack((angle.cos(), angle.sin()), dim=-1)

    def turned(qkv: Tensor) -> Tensor:
        return torch.stack(rotated_heads(qkv * 1, table, prefix))

    assert torch.autograd.gradcheck(turned, (qkv,))
    assert torch.autograd.gradgradcheck(lambda t: turned(t).square() * turned(t), (qkv,))


def test_in_place_rotation_really_is_in_place_and_leaves_prefix_and_values_alone() -> None:
    table = build_attention().rope.table(GRID)
    qkv = torch.randn(2, 14, 3 * HEADS * DIM)
    before = qkv.clone()
    parts = rotated_heads(qkv, table, 2)
    assert all(part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for part in parts)
    values = slice(2 * HEADS * DIM, None)
    assert torch.equal(qkv[:, :2], before[:, :2]) and torch.equal(qkv[..., values], before[..., values])
    assert (qkv[:, 3:, : values.start] != before[:, 3:, : values.start]).any(-1).all()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_the_layer_equal_the_float64_formula_s(prefix: int, path: str) -> None:
    wrapper, x = build_attention(prefix, path), tokens(prefix).requires_grad_()
    weight = torch.randn(wrapper(x).shape, generator=torch.Generator().manual_seed(2))
    (wrapper(x) * weight).sum().backward()
    state = {name: value.detach().double().requires_grad_() for name, value in wrapper.state_dict().items()}
    x64 = x.detach().double().requires_grad_()
    out = attention(x64, state, HEADS, axial_angles(patch_positions(*GRID), DIM, 20.0), prefix)
    (out * weight).sum().backward()
    assert x.grad is not None and x64.grad is not None
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in wrapper.named_parameters():
        assert parameter.grad is not None and state[name].grad is not None
        torch.testing.assert_close(parameter.grad.double(), state[name].grad, atol=2e-4, rtol=1e-4)


def test_gradient_of_the_layer_by_finite_differences_in_float64() -> None:
    wrapper = build_attention().double()
    table = wrapper.rope.table(GRID, index=torch.tensor([[11, 2, 5]]))
    x = tokens(count=3, batch=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: wrapper(t, table=table), (x,), atol=1e-5)


def test_double_backward_through_the_layer_is_right() -> None:
    grads = []
    for path in PATHS:
        wrapper, x = build_attention(1, path), tokens().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (first,) = torch.autograd.grad(wrapper(x).square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        grads.append(second)
    scale = grads[0].abs().max()
    for other in grads[1:]:
        torch.testing.assert_close(other / scale, grads[0] / scale, atol=1e-5, rtol=0)


def test_a_learned_table_takes_gradient_through_the_layer() -> None:
    wrapper, x = build_attention(), tokens()
    rope = VisionRoPE2D(DIM, num_patches_per_side=GRID, theta=20.0, learnable=True)
    wrapper.rope = rope
    wrapper(x).square().sum().backward()
    assert rope.log_theta is not None and rope.log_theta.grad is not None

    def loss(theta: float) -> float:
        return float(reference(wrapper, x, theta=theta).detach().square().sum())

    expected = (loss(20 * 1.0001) - loss(20 / 1.0001)) / (2 * 1e-4)
    assert float(rope.log_theta.grad[0]) == pytest.approx(expected, rel=1e-2)


def test_checkpointing_recomputes_the_same_gradient() -> None:
    grads = []
    for save in (False, True):
        wrapper, x = build_attention(attn_drop=0.3).train(), tokens().requires_grad_()
        torch.manual_seed(3)
        out = checkpoint(wrapper, x, use_reentrant=False) if save else wrapper(x)
        out.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in wrapper.parameters())])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


# nobody else's tensor is touched


@pytest.fixture
def global_hook() -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output) if isinstance(module, nn.Linear) else None
    )
    yield seen
    handle.remove()


def test_hooks_on_qkv_never_see_rotated_values() -> None:
    wrapper, x = build_attention(), tokens()
    seen: list[Tensor] = []
    wrapper.attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output))
    wrapper(x)
    assert torch.equal(seen[0], nn.functional.linear(x, wrapper.attn.qkv.weight, wrapper.attn.qkv.bias))


def test_global_hooks_never_see_rotated_values(global_hook: list[Tensor]) -> None:
    wrapper, x = build_attention(), tokens()
    wrapper(x)
    assert torch.equal(global_hook[0], nn.functional.linear(x, wrapper.attn.qkv.weight, wrapper.attn.qkv.bias))


def test_backward_hooks_on_qkv_work_and_see_its_gradient() -> None:
    grads: list[Tensor] = []
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        wrapper, x = build_attention(), tokens().requires_grad_()
        getattr(wrapper.attn.qkv, register)(lambda module, *given: grads.append(given[-1][0]))
        wrapper(x).square().sum().backward()
    assert len(grads) == 2
    wrapper, x = build_attention(1, "unfused"), tokens()
    qkv: list[Tensor] = []
    wrapper.attn.qkv.register_forward_hook(lambda module, args, output: (output.retain_grad(), qkv.append(output))[1])
    wrapper(x).square().sum().backward()
    for grad in grads:
        torch.testing.assert_close(grad, qkv[0].grad, atol=1e-4, rtol=1e-4)


class Keeper(nn.Linear):
    """A projection that keeps what it returned, as adapters do."""

    kept: Tensor

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept


def test_a_projection_that_keeps_its_output_is_not_overwritten() -> None:
    wrapper, x = build_attention(), tokens()
    expected = wrapper(x)
    keeper = Keeper(HEADS * DIM, 3 * HEADS * DIM)
    keeper.load_state_dict(wrapper.attn.qkv.state_dict())
    wrapper.qkv = keeper  # through the wrapper or the wrapped attention, it is the same slot
    assert wrapper.attn.qkv is keeper
    torch.testing.assert_close(wrapper(x), expected, atol=1e-6, rtol=0)
    assert torch.equal(keeper.kept, nn.functional.linear(x, keeper.weight, keeper.bias))


def test_the_shared_table_survives_many_layers_and_backward_passes() -> None:
    wrapper, x = build_attention(), tokens().requires_grad_()
    table = wrapper.rope.table(GRID)
    before = table.clone()
    for _ in range(3):
        wrapper(wrapper(x)).sum().backward()
    assert torch.equal(table, before) and wrapper.rope.table(GRID) is table


def test_function_transforms_work() -> None:
    wrapper, x = build_attention(), tokens()
    grad = torch.func.grad(lambda t: wrapper(t).square().sum())(x)
    x.requires_grad_()
    wrapper(x).square().sum().backward()
    torch.testing.assert_close(grad, x.grad, atol=1e-4, rtol=1e-4)


# modules and files


def test_what_is_set_or_hooked_through_the_wrapper_or_the_wrapped_is_seen_by_both() -> None:
    wrapper, x = build_attention(), tokens()
    seen: list[Tensor] = []
    wrapper.fused_attn = False
    wrapper.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    wrapper(x)
    torch.testing.assert_close(seen[0], wrapper.attention_weights(x))
    calls: list[nn.Module] = []
    handle = wrapper.attn.register_forward_hook(lambda module, args, output: calls.append(module))
    wrapper(x)
    handle.remove()
    wrapper(x)
    assert calls == [wrapper] and len(seen) == 3
    before = wrapper(x)
    wrapper.attn.scale *= 2
    assert wrapper.scale == wrapper.attn.scale and not torch.equal(wrapper(x), before)
    wrapper.q_norm = nn.LayerNorm(DIM)
    assert wrapper.attn.q_norm is wrapper.q_norm
    names = ("num_heads", "head_dim", "attn_dim", "fused_attn", "scale", "training")
    assert all(getattr(wrapper, name) == getattr(wrapper.attn, name) for name in names)
    assert isinstance(wrapper, Attention) and set(vars(wrapper)) == set(vars(Attention(HEADS * DIM, HEADS)))


def test_two_wrappers_of_one_attention_rotate_each_by_their_own() -> None:
    wrapper, x = build_attention(), tokens()
    before = wrapper(x)
    other = RoPEAttentionWrapper(wrapper.attn, VisionRoPE2D(DIM, num_patches_per_side=GRID, theta=5.0), layer=0)
    assert torch.equal(wrapper(x), before) and not torch.equal(other(x), before)


def test_state_dict_has_timm_s_names_and_nothing_twice(tmp_path: Path) -> None:
    wrapper, plain = build_attention(), Attention(HEADS * DIM, HEADS, qkv_bias=True)
    names = list(plain.state_dict())
    assert list(wrapper.state_dict()) == names == [n for n, _ in wrapper.named_parameters()]
    assert sum(p.numel() for p in wrapper.parameters()) == sum(p.numel() for p in plain.parameters())
    plain.load_state_dict(wrapper.state_dict(), strict=True)
    build_attention().load_state_dict(plain.state_dict(), strict=True)
    save_file(wrapper.state_dict(), tmp_path / "attention.safetensors")
    assert load_file(tmp_path / "attention.safetensors").keys() == set(names)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_compute_alike_and_share_nothing_with_the_original(copier: Any) -> None:
    wrapper, x = build_attention(), tokens()
    expected = wrapper(x).detach()
    other = copier(wrapper)
    assert torch.equal(other(x), expected)
    assert other.attn is not wrapper.attn and other.rope is not wrapper.rope
    assert other._modules is other.attn._modules, "one set of tables in the copy, too"
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(wrapper(x), expected) and (other(x) == 0).all()
    assert torch.equal(other.attn.qkv.weight, torch.zeros_like(other.attn.qkv.weight))


def test_casting_and_training_mode_reach_the_wrapped_attention() -> None:
    wrapper = build_attention(attn_drop=0.1).double()
    assert wrapper.attn.qkv.weight.dtype == torch.float64
    assert wrapper.train().attn.attn_drop.training and not wrapper.eval().attn.attn_drop.training


@torch.no_grad()
def test_autocast_bfloat16_costs_what_timm_s_attention_pays() -> None:
    wrapper, x = build_attention(), tokens()
    exact, plain = wrapper(x), wrapper.attn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = wrapper(x), wrapper.attn(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    scale = exact.abs().max()
    error = (ours - exact).abs().max() / scale
    assert error < 2 * (theirs - plain).abs().max() / scale + 0.01 and error < 0.03


@torch.no_grad()
def test_bfloat16_weights_on_a_large_grid_stay_close_to_float32() -> None:
    """Angles of 64 rows need float32 tables: in bfloat16 they are off by 0.1 rad."""
    wrapper, x = build_attention(0, theta=100.0), tokens(0, 64 * 48, 1)
    exact = wrapper(x, table=wrapper.rope.table((64, 48)))
    low = copy.deepcopy(wrapper).bfloat16()
    out = low(x.bfloat16(), table=low.rope.table((64, 48)))
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() < 0.02 * exact.abs().mean()
