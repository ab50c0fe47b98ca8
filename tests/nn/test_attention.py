"""RoPEAttentionWrapper: timm's attention with a rotation and nothing else changed; all paths are held to float64.

Gradients, hooks, copies and files are in `test_attention_module.py`.
"""

from typing import Any

import pytest
import torch
from builders import DIM, GRID, HEADS, PATHS, build_attention, tokens
from formulas import attention, axial_angles, patch_positions
from timm.layers import Attention, AttentionRope
from torch import Tensor, nn

from hjepa.nn.attention import RoPEAttentionWrapper
from hjepa.nn.rope import VisionRoPE2D

PREFIXES = [0, 1, 2, 5]


def zero_positions(wrapper: RoPEAttentionWrapper, count: int = 12) -> Tensor:
    return wrapper.rope.table(GRID, positions=torch.zeros(count, 2))


def reference(wrapper: RoPEAttentionWrapper, x: Tensor, positions: Tensor | None = None, theta: float = 20.0) -> Tensor:
    weights = {name: value.double() for name, value in wrapper.state_dict().items()}
    places = patch_positions(*GRID) if positions is None else positions
    return attention(x.double(), weights, HEADS, axial_angles(places, DIM, theta), wrapper.num_prefix_tokens)


# values


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_output_equals_the_float64_formula(prefix: int, path: str) -> None:
    wrapper, x = build_attention(prefix, path), tokens(prefix)
    torch.testing.assert_close(wrapper(x).double(), reference(wrapper, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_prefix_tokens_are_not_rotated(prefix: int) -> None:
    """Moving all patches alike changes their scores with the prefix, and nothing among them: prefix stays put."""
    wrapper, x = build_attention(prefix), tokens(prefix)
    moved = wrapper.rope.table(GRID, positions=patch_positions(*GRID).float() + 2)
    here, there = wrapper.attention_weights(x), wrapper.attention_weights(x, table=moved)
    if prefix == 0:
        torch.testing.assert_close(here, there, atol=1e-5, rtol=0)
    else:
        ratio = (here / there).log()  # equal up to each row's normaliser
        among_prefix, among_patches = ratio[..., :prefix, :prefix], ratio[..., prefix:, prefix:]
        assert (among_prefix - among_prefix[..., :1]).abs().max() < 1e-4
        assert (among_patches - among_patches[..., :1]).abs().max() < 1e-4
        assert (ratio[..., prefix:, :1] - among_patches[..., :1]).abs().max() > 1e-2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"qkv_bias": False}])
@torch.no_grad()
def test_wrapped_attention_equals_timm_at_zero_positions(path: str, options: dict[str, Any]) -> None:
    wrapper, x = build_attention(1, path, **options), tokens()
    torch.testing.assert_close(wrapper(x, table=zero_positions(wrapper)), wrapper.attn(x), atol=1e-6, rtol=0)
    assert (wrapper(x) - wrapper.attn(x)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}])
@torch.no_grad()
def test_fused_and_unfused_paths_agree(options: dict[str, Any]) -> None:
    x = tokens()
    fused, unfused = build_attention(1, "in_place", **options), build_attention(1, "unfused", **options)
    torch.testing.assert_close(fused(x), unfused(x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rotation_comes_after_the_norms_of_q_and_k() -> None:
    """A norm after the rotation would mix a pair's channels with their own gains."""
    wrapper, x = build_attention(qk_norm=True), tokens()
    nn.init.normal_(wrapper.attn.q_norm.weight)
    q, k, _ = wrapper.attn.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).double()
    q, k = wrapper.attn.q_norm.double()(q), wrapper.attn.k_norm.double()(k)
    wrapper.attn.q_norm.float(), wrapper.attn.k_norm.float()
    for t in (q, k):
        t[:, :, 1:] = wrapper.rope(t[:, :, 1:], t[:, :, 1:], *GRID)[0]
    weights = (q @ k.transpose(-2, -1) / DIM**0.5).softmax(-1)
    torch.testing.assert_close(wrapper.attention_weights(x).double(), weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_dropped_tokens_keep_their_true_positions(path: str) -> None:
    wrapper, index = build_attention(1, path), torch.tensor([[7, 0, 10], [3, 4, 11]])
    x = tokens(count=3)
    out = wrapper(x, table=wrapper.rope.table(GRID, index=index))
    for sample in range(2):
        places = patch_positions(*GRID)[index[sample]]
        expected = reference(wrapper, x[sample : sample + 1], places)
        torch.testing.assert_close(out[sample : sample + 1].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_mixed_frequencies_turn_each_head_by_its_own(path: str) -> None:
    wrapper, x = build_attention(1, path), tokens()
    mixed = VisionRoPE2D(DIM, num_patches_per_side=GRID, kind="mixed", num_heads=HEADS, num_layers=2, theta=3.0)
    wrapper.rope, wrapper.layer = mixed, 1
    weights = wrapper.attention_weights(x).double()
    q, k, _ = wrapper.attn.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4).double()
    row, column = patch_positions(*GRID)[:, None].unbind(-1)
    for head in range(HEADS):
        angles = row * mixed.mixed[1, 0, head].double() + column * mixed.mixed[1, 1, head].double()  # type: ignore[index]
        turn = torch.polar(torch.ones_like(angles), angles)
        one = [torch.view_as_complex(t[:, head].unflatten(-1, (-1, 2)).contiguous()) for t in (q, k)]
        for t in one:
            t[:, 1:] *= turn
        scores = (one[0] @ one[1].conj().transpose(-2, -1)).real / DIM**0.5
        torch.testing.assert_close(weights[:, head], scores.softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", ["in_place", "unfused"])
@torch.no_grad()
def test_attention_masks_are_honoured_as_in_timm(path: str) -> None:
    wrapper, x = build_attention(1, path), tokens()
    allowed = torch.rand(2, 1, 13, 13) < 0.6
    allowed |= torch.eye(13, dtype=torch.bool)
    added = torch.zeros(2, 1, 13, 13).masked_fill(~allowed, float("-inf"))
    table = zero_positions(wrapper)
    for mask in (allowed, added, added.clamp(min=-2)):
        torch.testing.assert_close(wrapper(x, mask, table=table), wrapper.attn(x, mask), atol=1e-6, rtol=0)
    for mask in (allowed, added):
        assert (wrapper.attention_weights(x, mask)[~allowed.expand(-1, HEADS, -1, -1)] == 0).all()
    torch.testing.assert_close(wrapper(x, allowed), wrapper(x, added), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_masked_key_has_no_say_and_equals_a_dropped_one() -> None:
    wrapper, x = build_attention(), tokens()
    keys = torch.ones(1, 1, 1, 13, dtype=torch.bool)
    keys[..., 5] = False
    kept = [n for n in range(13) if n != 5]
    index = torch.tensor([[n - 1 for n in kept[1:]]] * 2)
    dropped = wrapper(x[:, kept], table=wrapper.rope.table(GRID, index=index))
    torch.testing.assert_close(wrapper(x, keys)[:, kept], dropped, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
@torch.no_grad()
def test_attention_weights_are_those_the_fused_path_used(options: dict[str, Any]) -> None:
    wrapper, x = build_attention(**options), tokens()
    v = wrapper.attn.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)[2]
    out = wrapper.attn.proj((wrapper.attention_weights(x) @ v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(out, wrapper(x), atol=1e-5, rtol=0)


def test_dropout_masks_are_timm_s_and_only_in_training() -> None:
    for path in ("in_place", "unfused"):
        wrapper, x = build_attention(1, path, attn_drop=0.5, proj_drop=0.3), tokens()
        table = zero_positions(wrapper)
        assert torch.equal(wrapper(x), wrapper(x))
        wrapper.train()
        wrapper.attn.train()
        torch.manual_seed(5)
        ours = wrapper(x, table=table)
        torch.manual_seed(5)
        torch.testing.assert_close(ours, wrapper.attn(x), atol=1e-6, rtol=1e-5)
        assert not torch.equal(wrapper(x), wrapper(x))


# bad input


def test_what_cannot_be_wrapped_is_refused() -> None:
    rope = VisionRoPE2D(DIM)
    with pytest.raises(ValueError, match="cannot rotate Linear"):
        RoPEAttentionWrapper(nn.Linear(4, 4), rope)
    with pytest.raises(ValueError, match="cannot rotate AttentionRope"):
        RoPEAttentionWrapper(AttentionRope(HEADS * DIM, HEADS), rope)
    with pytest.raises(ValueError, match="cannot rotate RoPEAttentionWrapper"):
        RoPEAttentionWrapper(build_attention(), rope)
    with pytest.raises(ValueError, match="attention has head dim 16, rope was built for dim=8"):
        RoPEAttentionWrapper(Attention(32, 2), rope)


def test_a_wrong_number_of_tokens_or_a_causal_mask_is_refused() -> None:
    wrapper = build_attention()
    with pytest.raises(ValueError, match=r"9 patch tokens \(after 1 prefix\) but positions for 12"):
        wrapper(tokens(count=9))
    with pytest.raises(ValueError, match="is_causal"):
        wrapper(tokens(), is_causal=True)
