"""2-D ALiBi: the bias against its formula in float64, and encoder and predictor with it against plain timm."""

import math
from typing import Any

import pytest
import torch
from builders import build_encoder, noisy, pictures
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hjepa.evaluate.transfer import with_strategy
from hjepa.nn.alibi import ALiBi2D
from hjepa.nn.predictor import Predictor

OPTIONS: dict[str, Any] = {"use_rope": False, "use_absolute": False, "use_alibi": True}


def formula(heads: int, at: list[tuple[float, float]], prefix: int, unit: tuple[float, float] = (1, 1)) -> Tensor:
    """The definition, number by number: `[heads, T, T]`, float64."""
    out = torch.zeros(heads, prefix + len(at), prefix + len(at), dtype=torch.float64)
    for head in range(heads):
        for i, (y, x) in enumerate(at):
            for j, (v, u) in enumerate(at):
                distance = math.hypot((y - v) * unit[0], (x - u) * unit[1])
                out[head, prefix + i, prefix + j] = -distance * 2 ** (-8 * (head + 1) / heads)
    return out


def grid(height: int, width: int) -> list[tuple[float, float]]:
    return [(row, column) for row in range(height) for column in range(width)]


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_the_bias_is_slope_times_distance_and_prefix_tokens_have_none(heads, height, width, prefix):
    bias = ALiBi2D(heads, (3, 3))((height, width), prefix=prefix)
    torch.testing.assert_close(bias[0].double(), formula(heads, grid(height, width), prefix), atol=1e-6, rtol=1e-6)


def test_interpolated_distances_are_in_patches_of_the_training_grid():
    bias = ALiBi2D(4, (4, 6), "interpolate")((8, 3))
    torch.testing.assert_close(bias[0].double(), formula(4, grid(8, 3), 0, (4 / 8, 6 / 3)), atol=1e-6, rtol=1e-6)


def test_kept_patches_and_given_positions_have_their_own_distances():
    index = torch.tensor([[5, 0, 7], [2, 3, 8]])
    for row, bias in zip(index.tolist(), ALiBi2D(2, 3)((3, 3), index=index, prefix=1), strict=True):
        torch.testing.assert_close(bias.double(), formula(2, [grid(3, 3)[i] for i in row], 1), atol=1e-6, rtol=1e-6)
    at = [(0.5, -1.25), (2.0, 3.75)]
    bias = ALiBi2D(2, 3)((1, 2), positions=torch.tensor(at))
    torch.testing.assert_close(bias[0].double(), formula(2, at, 0), atol=1e-6, rtol=1e-6)


def test_unknown_strategies_are_refused_with_the_two_that_fit():
    for value in ("ntk", "interpolated"):
        with pytest.raises(ValueError, match="extrapolate, interpolate"):
            ALiBi2D(2, 3, value)
    encoder = build_encoder(**OPTIONS)
    assert encoder.strategies == ("extrapolate", "interpolate") and build_encoder(use_rope=False).strategies == ()
    assert build_encoder().strategies == ("extrapolate", "interpolate", "ntk", "ntk_by_parts")
    assert build_encoder(rope={"kind": "mixed"}, use_alibi=True).strategies == ("extrapolate", "interpolate")
    for options in ({}, {"kind": "mixed"}, {"kind": "fixed"}, {"coordinates": "normalized"}):
        rope = build_encoder(rope=options).rope
        for value in ("extrapolate", "interpolate", "ntk", "ntk_by_parts"):
            if value in rope.strategies:
                rope.strategy = value
            else:
                with pytest.raises(ValueError, match=value):
                    rope.strategy = value


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@torch.no_grad()
def test_the_encoder_is_plain_timm_with_the_bias_as_its_mask(size):
    """Also through timm's own forward_features and intermediates, and with a mask of the caller's beside it."""
    encoder, images = noisy(build_encoder(**OPTIONS)), pictures(*size)
    plain = build_encoder(use_rope=False, use_absolute=False)
    plain.load_state_dict(encoder.state_dict())
    at = grid(size[0] // 4, size[1] // 4)
    bias = formula(plain.vit.blocks[0].attn.num_heads, at, 1).float()[None]
    expected = plain.vit.forward_features(images, attn_mask=bias)
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.vit.forward_features(images), expected, atol=1e-5, rtol=1e-4)
    whole, _ = encoder.vit.forward_intermediates(images, norm=True, output_fmt="NLC")
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)
    assert (plain(images) - expected).abs().max() > 1e-2
    seen = torch.rand(1, 1, 1, len(at) + 1, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[..., :2] = True
    hidden = bias.masked_fill(~seen, -torch.inf)
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
        found = encoder.vit.forward_features(images, attn_mask=mask)
        torch.testing.assert_close(found, plain.vit.forward_features(images, attn_mask=hidden), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_maps_are_the_bias_s_softmax_where_queries_and_keys_are_silent():
    encoder = build_encoder(**OPTIONS)
    for block in encoder.vit.blocks:
        block.attn.qkv.weight.zero_(), block.attn.qkv.bias.zero_()
    expected = formula(encoder.vit.blocks[0].attn.num_heads, grid(4, 4), 1).softmax(-1)
    for found in encoder.attention_maps(pictures()):
        torch.testing.assert_close(found[0].double(), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_kept_patches_are_as_if_the_others_were_masked_as_keys():
    encoder, index = noisy(build_encoder(**OPTIONS)), torch.tensor([[1, 6, 7, 12], [0, 3, 9, 15]])
    seen = torch.zeros(2, 17, dtype=torch.bool)
    seen[:, 0] = True
    seen.scatter_(1, index + 1, True)
    whole = encoder._encode(pictures(), (4, 4), None, None, seen[:, None, None])
    expected = whole[:, 1:].gather(1, index[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(encoder(pictures(), index)[:, 1:], expected, atol=1e-5, rtol=1e-4)
    hidden = encoder(pictures(), is_masked=~seen[:, 1:])[:, 1:].gather(1, index.sort()[0][..., None].expand(-1, -1, 16))
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_it_sees_distances_not_places():
    encoder, images = noisy(build_encoder(**OPTIONS)), pictures()
    own = torch.tensor(grid(4, 4))
    torch.testing.assert_close(encoder(images, positions=own + 7.5), encoder(images), atol=1e-5, rtol=1e-4)
    turned = torch.stack((own[:, 1], -own[:, 0]), 1)
    torch.testing.assert_close(encoder(images, positions=turned), encoder(images), atol=1e-5, rtol=1e-4)
    assert (encoder(images, positions=own * 2) - encoder(images)).abs().max() > 1e-2
    for wrong in (own[:1], own[:-1], own[None].expand(3, -1, -1)):
        with pytest.raises(ValueError, match=r"positions must be \[16, 2\]"):
            encoder(images, positions=wrong)


@torch.no_grad()
def test_one_encoder_is_read_under_both_strategies():
    encoder, images = noisy(build_encoder(**OPTIONS)), pictures(32, 32)
    kept, stretched = (with_strategy(encoder, name)(images) for name in ("extrapolate", "interpolate"))
    assert torch.equal(kept, encoder(images)) and encoder.alibi.strategy == "extrapolate"
    at = torch.tensor(grid(8, 8)) / 2
    torch.testing.assert_close(stretched, encoder(images, positions=at), atol=1e-5, rtol=1e-4)
    assert (kept - stretched).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_parameter_learns_in_either_precision(dtype):
    encoder = build_encoder(**OPTIONS).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        encoder(pictures()).float().square().sum().backward()
    for name, parameter in encoder.vit.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_an_average_of_encoders_that_bias_otherwise_is_refused():
    from hjepa.nn.encoders import TargetEncoder

    mine = build_encoder(**OPTIONS)
    vit = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for options in ({**OPTIONS, "use_alibi": False}, {**OPTIONS, "rope": {"strategy": "interpolate"}}):
        target = TargetEncoder(mine.encoder_type, 16, vit=vit, **options)
        with pytest.raises(ValueError, match=r"alibi|ALiBi"):
            target.copy_from_context_encoder(mine)


@torch.no_grad()
def test_the_predictor_answers_by_distance_to_what_it_sees():
    torch.manual_seed(0)
    predictor = Predictor(12, 16, 2, 2, levels=1, grid_size=(6, 6), use_absolute=False, use_alibi=True).eval()
    for parameter in predictor.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.3)
    context, at = torch.randn(1, 3, 12), torch.tensor([[[0.0, 0.0], [2.0, 5.0], [4.0, 1.0]]])
    asked = torch.tensor([[[1.0, 1.0], [5.0, 3.0]]])
    (answers,) = predictor(context, at, [asked])
    assert (answers[:, 0] - answers[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(predictor(context, at + 2.5, [asked + 2.5])[0], answers, atol=1e-5, rtol=1e-4)
    assert (predictor(context, at, [asked + 2.5])[0] - answers).abs().max() > 1e-3
