"""What the context encoder is shown: dropped and masked tokens, positions, hooks, gradients; calls that do not fit."""

import copy
import pickle
from typing import Any

import pytest
import torch
from builders import MODES, TINY, build_encoder, noisy, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hjepa.nn import checks
from hjepa.nn.encoders import create_encoder

# dropped tokens


@pytest.mark.parametrize(("use_absolute", "use_rope"), MODES)
@pytest.mark.parametrize("vit", [{}, {"class_token": False}, {"reg_tokens": 4}, {"no_embed_class": True}])
@torch.no_grad()
def test_keeping_all_in_another_order_is_keeping_all(use_absolute: bool, use_rope: bool, vit: dict[str, Any]) -> None:
    encoder = noisy(build_encoder(use_rope=use_rope, use_absolute=use_absolute, vit=vit))
    order = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(s)) for s in range(2)])
    whole = encoder(pictures(16, 24))
    prefix = encoder.num_prefix_tokens
    kept = encoder(pictures(16, 24), order)
    torch.testing.assert_close(kept[:, :prefix], whole[:, :prefix], atol=1e-5, rtol=1e-4)
    expected = whole[:, prefix:].gather(1, order[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(kept[:, prefix:], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("use_absolute", "use_rope"), MODES)
@torch.no_grad()
def test_nobody_attends_to_dropped_patches_and_the_kept_stay_in_place(use_absolute: bool, use_rope: bool) -> None:
    """Reference: all tokens kept, the hidden ones masked as keys, layer by layer."""
    encoder = noisy(build_encoder(use_rope=use_rope, use_absolute=use_absolute))
    index = torch.tensor([[1, 6, 7, 12], [0, 3, 9, 15]])
    out = encoder(pictures(), index)
    seen = torch.zeros(2, 17, dtype=torch.bool)
    seen[:, 0] = True
    seen.scatter_(1, index + 1, True)
    whole = encoder._encode(pictures(), (4, 4), None, None, seen[:, None, None])
    rows = torch.cat((torch.zeros(2, 1, dtype=torch.int64), index + 1), dim=1)
    expected = whole.gather(1, rows[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    changed = pictures()
    changed[:, :, :4, :4] += 5 * (~seen[:, 1])[:, None, None, None]  # patch 0, where it is hidden
    assert torch.equal(encoder(changed, index), out)


@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("counts", [(5, 5), (3, 9), (16, 1)])
@torch.no_grad()
def test_is_masked_equals_dropped_tokens_and_keeps_the_output_s_shape(use_rope: bool, counts: tuple[int, int]) -> None:
    encoder = noisy(build_encoder(use_rope=use_rope))
    rank = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    is_masked = rank >= torch.tensor(counts)[:, None]
    out = encoder(pictures(), is_masked=is_masked)
    assert out.shape == (2, 17, 16) and (out[:, 1:][is_masked] == 0).all()
    for sample in range(2):
        kept = (~is_masked[sample]).nonzero().T
        alone = encoder(pictures()[sample : sample + 1], kept)[0]
        torch.testing.assert_close(out[sample, :1], alone[:1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out[sample, 1:][kept[0]], alone[1:], atol=1e-5, rtol=1e-4)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 1, 2, 5]))
@torch.no_grad()
def test_any_subset_on_any_grid_with_any_prefix_equals_masked_keys(
    data: st.DataObject, height: int, width: int, prefix: int
) -> None:
    vit = {"class_token": prefix > 0, "reg_tokens": max(prefix - 1, 0)}
    encoder = noisy(build_encoder((8, 12), vit=vit))
    assert encoder.num_prefix_tokens == prefix
    kept = data.draw(st.lists(st.integers(0, height * width - 1), min_size=1, unique=True))
    images = pictures(4 * height, 4 * width, 1)
    is_masked = torch.ones(1, height * width, dtype=torch.bool)
    is_masked[0, kept] = False
    dropped = encoder(images, torch.tensor([kept]))
    masked = encoder(images, is_masked=is_masked)
    torch.testing.assert_close(dropped[:, prefix:], masked[:, prefix:][:, kept], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dropped[:, :prefix], masked[:, :prefix], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_per_sample_positions_reach_each_sample() -> None:
    encoder = noisy(build_encoder())
    positions = torch.rand(2, 16, 2, generator=torch.Generator().manual_seed(0)) * 4
    index = torch.tensor([[1, 6, 7, 12], [0, 3, 9, 15]])
    out = encoder(pictures(), index, positions=positions)
    for sample in range(2):
        one = slice(sample, sample + 1)
        alone = encoder(pictures()[one], index[one], positions=positions[sample])
        torch.testing.assert_close(out[one], alone, atol=1e-5, rtol=1e-4)


def test_coordinates_are_augmented_in_training_only() -> None:
    encoder = build_encoder(rope={"shift": 0.5, "jitter": 1.5})
    assert torch.equal(encoder(pictures()), encoder(pictures()))
    encoder.train()
    assert not torch.equal(encoder(pictures()), encoder(pictures()))


# the rest of a module's life


@pytest.mark.parametrize("rope", [{}, {"kind": "mixed"}, {"learnable": True}])
def test_gradient_checkpointing_changes_nothing(rope: dict[str, Any]) -> None:
    grads = []
    for saving in (False, True):
        encoder = noisy(build_encoder(rope=rope, vit={"drop_path_rate": 0.3})).train()
        encoder.vit.set_grad_checkpointing(saving)
        torch.manual_seed(0)
        out = encoder(pictures(), torch.tensor([[1, 6, 7], [0, 3, 15]]))
        out.square().sum().backward()
        grads.append([out, *(p.grad for p in encoder.parameters() if p.requires_grad)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_every_trained_parameter_takes_gradient() -> None:
    encoder = noisy(build_encoder(rope={"kind": "mixed"}))
    encoder(pictures()).square().mul(torch.linspace(0, 1, 16)).sum().backward()
    grads = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_copies_and_pickles_are_independent_encoders() -> None:
    encoder = noisy(build_encoder(rope={"learnable": True}))
    expected = encoder(pictures()).detach()
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(pictures()), expected)
        assert all(block.attn.rope is other.rope for block in other.vit.blocks)
        with torch.no_grad():
            other.rope.log_theta.add_(1.0)
        assert not torch.equal(other(pictures()), expected)
        assert torch.equal(encoder(pictures()), expected)


@pytest.mark.parametrize("use_rope", [False, True])
def test_hooks_on_blocks_and_attention_fire(use_rope: bool) -> None:
    encoder, seen = build_encoder(use_rope=use_rope), []
    for block in encoder.vit.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        block.attn.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    encoder(pictures())
    assert seen == [(2, 17, 16)] * 4


@pytest.mark.parametrize("use_rope", [False, True])
@torch.no_grad()
def test_attention_maps_are_what_each_layer_used(use_rope: bool) -> None:
    encoder = noisy(build_encoder(use_rope=use_rope, vit={"qk_norm": True}))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in encoder.vit.blocks:
        block.attn.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
        block.attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    encoder(pictures(12, 20))
    made, used = list(inputs), list(outputs)
    maps = encoder.attention_maps(pictures(12, 20))
    assert len(maps) == 2 and maps[0].shape == (2, 2, 16, 16)
    for weights, block, x, out in zip(maps, encoder.vit.blocks, made, used, strict=True):
        attn = block.attn.attn if use_rope else block.attn
        v = attn.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)[2]
        torch.testing.assert_close(attn.proj((weights @ v).transpose(1, 2).flatten(2)), out, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 16))


@pytest.mark.parametrize("kind", ["axial", "mixed"])
@torch.no_grad()
def test_a_bfloat16_encoder_stays_close_to_float32(kind: str) -> None:
    encoder = noisy(build_encoder(rope={"kind": kind}))
    exact = encoder(pictures(64))
    low = copy.deepcopy(encoder).bfloat16()(pictures(64).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = encoder(pictures(64))
    for out in (low, mixed):
        assert (out.float() - exact).abs().mean() < 0.02


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"context_idx": torch.tensor([[0, 16]] * 2)}, r"context_idx has 0..16, the grid \(4, 4\) has 0..15"),
        ({"context_idx": torch.tensor([[-1, 3]] * 2)}, r"context_idx has -1..3"),
        ({"context_idx": torch.tensor([[1, 2, 3], [7, 9, 7]])}, "context_idx repeats patch 7 within a sample"),
        ({"context_idx": torch.zeros(2, 0, dtype=torch.int64)}, "context_idx is empty"),
        ({"context_idx": torch.zeros(3, 1, dtype=torch.int64)}, r"int64 \[2, n\], got torch.int64 \[3, 1\]"),
        ({"context_idx": torch.zeros(2, 1)}, r"int64 \[2, n\], got torch.float32"),
        ({"is_masked": torch.ones(2, 16, dtype=torch.bool)}, "hides all 16 patches of sample 0: leave at least one"),
        ({"is_masked": torch.zeros(2, 16)}, r"is_masked must be boolean \[2, 16\], got torch.float32"),
        ({"is_masked": torch.zeros(2, 17, dtype=torch.bool)}, r"is_masked must be boolean \[2, 16\]"),
        (
            {"is_masked": torch.zeros(2, 16, dtype=torch.bool), "context_idx": torch.zeros(2, 1, dtype=torch.int64)},
            "give context_idx or is_masked, not both",
        ),
        ({"positions": torch.zeros(15, 2)}, r"positions must be \[16, 2\] or \[2, 16, 2\].*got \(15, 2\)"),
        ({"positions": torch.zeros(3, 16, 2)}, r"got \(3, 16, 2\)"),
        ({"images": torch.zeros(2, 3, 16, 18)}, "image size 16x18 is not a multiple of the patch 4; nearest: 20"),
        ({"images": torch.zeros(1, 1, 16, 16)}, "images have 1 channels, this encoder was built for 3"),
        ({"context_idx": [[0, 1]]}, r"context_idx must be a tensor, not \[\[0, 1\]\]"),
        ({"is_masked": "no"}, "is_masked must be a tensor, not 'no'"),
        ({"images": torch.zeros(3, 16, 16)}, r"images must be \[B, channels, height, width\], got shape \(3, 16, 16\)"),
    ],
)
def test_calls_that_do_not_fit_are_refused_by_value(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder()(**({"images": pictures()} | call))


def test_positions_need_rope() -> None:
    with pytest.raises(ValueError, match="positions need RoPE"):
        build_encoder(use_rope=False)(pictures(), positions=torch.zeros(16, 2))


@torch.no_grad()
def test_a_mask_of_numbers_hides_what_is_one() -> None:
    encoder = noisy(build_encoder())
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 3:9], hidden[1, 10:] = True, True
    expected = encoder(pictures(), is_masked=hidden)
    assert torch.equal(encoder(pictures(), mask=hidden), expected)
    assert torch.equal(encoder(pictures(), mask=hidden.float()), expected)
    assert torch.equal(encoder(pictures(), mask=hidden.long()), expected)
    with pytest.raises(ValueError, match=r"mask holds 0.5: 1 \(hidden\) and 0 \(seen\) are allowed"):
        encoder(pictures(), mask=hidden.float() * 0.5)
    with pytest.raises(ValueError, match="mask is another name of is_masked: give one of them"):
        encoder(pictures(), is_masked=hidden, mask=hidden)


def test_the_report_s_questions_about_patches_and_checkpointing() -> None:
    encoder = build_encoder((8, 32), use_gradient_checkpointing=True)
    assert (encoder.get_patch_size(), encoder.get_num_patches(), encoder.get_num_patches((12, 20))) == (4, 16, 15)
    assert encoder.vit.grad_checkpointing and not build_encoder().vit.grad_checkpointing
    context, target = create_encoder("vit_tiny_patch16_224", 16, vit=TINY, use_gradient_checkpointing=True)
    assert context.vit.grad_checkpointing and not target.vit.grad_checkpointing


@pytest.mark.parametrize("wrong", [[[0, 9]], [[-1, 2]], [[3, 3]]])
def test_a_wrong_index_on_a_device_is_refused_by_the_device(
    monkeypatch: pytest.MonkeyPatch, wrong: list[list[int]]
) -> None:
    monkeypatch.setattr(checks, "on_cpu", lambda tensor: False)
    checks.check_index(torch.tensor([[8, 0]]), 1, (3, 3))
    with pytest.raises(RuntimeError, match=r"not within 0\.\.8, or repeats a patch"):
        checks.check_index(torch.tensor(wrong), 1, (3, 3))
