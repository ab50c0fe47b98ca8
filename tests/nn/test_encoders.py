"""Encoders: plain timm with RoPE off, plain checkpoints either way, right at every image size.

Dropped tokens are in `test_context.py`, the moving average in `test_target.py`.
"""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from builders import MODES, TINY, build_encoder, noisy, pictures
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from hjepa.nn import encoders
from hjepa.nn import vit as vit_module
from hjepa.nn.encoders import ContextEncoder, create_encoder
from hjepa.nn.vit import build_vit

FAMILIES = {
    "vit_tiny_patch16_224": 1,
    "vit_small_patch16_224": 1,
    "deit3_small_patch16_224": 1,
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_base_patch16_siglip_224": 0,
    "vit_base_patch16_siglip_gap_224": 0,
    "vit_base_patch16_clip_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
}


# plain timm


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_without_rope_features_are_timm_s_bit_for_bit(name: str) -> None:
    patch = 14 if "patch14" in name else 16
    slim = {} if "tiny" in name else {"embed_dim": 192, "num_heads": 3}
    plain = noisy(timm.create_model(name, img_size=4 * patch, num_classes=0, dynamic_img_size=True, depth=2, **slim))
    ours = ContextEncoder(name, 4 * patch, vit={"depth": 2, **slim}).eval()
    ours.vit.load_state_dict(plain.state_dict(), strict=True)
    assert ours.num_prefix_tokens == FAMILIES[name]
    for size in ((4, 4), (3, 6)):
        images = pictures(size[0] * patch, size[1] * patch)
        assert torch.equal(ours(images), plain.eval().forward_features(images))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_takes_rope_and_plain_weights_and_only_patches_feel_positions(name: str) -> None:
    patch = 14 if "patch14" in name else 16
    vit = {"depth": 2} if "tiny" in name else {"depth": 2, "embed_dim": 192, "num_heads": 3}
    torch.manual_seed(0)
    plain = noisy(ContextEncoder(name, 4 * patch, vit=vit).eval())
    rotary = ContextEncoder(name, 4 * patch, use_rope=True, rope_theta=20.0, vit=vit).eval()
    assert list(rotary.state_dict()) == list(plain.state_dict())
    rotary.load_state_dict(plain.state_dict(), strict=True)
    images = pictures(3 * patch, 5 * patch)
    standing = rotary(images, positions=torch.zeros(15, 2))
    torch.testing.assert_close(standing, plain(images), atol=2e-5, rtol=1e-4)
    assert (rotary(images) - standing).abs().max() > 1e-3
    assert rotary(images).shape == (2, FAMILIES[name] + 15, rotary.embed_dim)


@torch.no_grad()
def test_clip_s_norm_before_the_blocks_is_kept() -> None:
    name, vit = "vit_base_patch16_clip_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}
    encoder = ContextEncoder(name, 32, use_rope=True, vit=vit).eval()
    before = encoder(pictures(32))
    encoder.vit.norm_pre.weight.mul_(torch.linspace(0.1, 3, 48))
    assert (encoder(pictures(32)) - before).abs().max() > 1e-2


@pytest.mark.parametrize("vit", [{"qk_norm": True}, {"class_token": False}, {"reg_tokens": 2}, {"init_values": 0.1}])
@torch.no_grad()
def test_rope_at_zero_positions_is_the_plain_encoder(vit: dict[str, Any]) -> None:
    plain, rotary = noisy(build_encoder(use_rope=False, vit=vit)), build_encoder(vit=vit)
    rotary.load_state_dict(plain.state_dict())
    out = rotary(pictures(16), positions=torch.zeros(16, 2))
    torch.testing.assert_close(out, plain(pictures(16)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_a_class_token_the_tokens_are_normed() -> None:
    tokens = build_encoder(vit={"class_token": False})(pictures())
    assert tokens.shape == (2, 16, 16)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std(-1, unbiased=False), torch.ones(2, 16), atol=1e-2, rtol=0)


SIZES = [(16, 16), (8, 32), (24, 24)]


@pytest.mark.parametrize(("use_absolute", "use_rope"), MODES)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@torch.no_grad()
def test_timm_s_own_methods_give_the_encoder_s_values_at_every_size(
    name: str, use_absolute: bool, use_rope: bool
) -> None:
    options: dict[str, Any] = dict(use_rope=use_rope, use_absolute=use_absolute, rope_theta=20.0, vit=TINY)
    encoder = noisy(ContextEncoder(name, 16, **options).eval())
    first = copy.deepcopy(encoder)
    first.vit.blocks = first.vit.blocks[:1]
    for size in SIZES:
        images, grid = pictures(*size), (size[0] // 4, size[1] // 4)
        expected, prefix = encoder(images), encoder.num_prefix_tokens
        assert torch.equal(encoder.vit.forward_features(images), expected)
        last, layers = encoder.vit.forward_intermediates(images, norm=True)
        assert torch.equal(last, expected) and len(layers) == 2
        for layer, tokens in zip(layers, (first(images), expected), strict=True):
            assert torch.equal(layer.flatten(2).transpose(1, 2), tokens[:, prefix:])
        (layer,) = encoder.vit.get_intermediate_layers(images, norm=True)
        assert torch.equal(layer, expected[:, prefix:])
        getter = FeatureGetterNet(copy.deepcopy(encoder.vit), out_indices=[0], norm=True)
        (map_,) = getter(images)
        assert map_.shape[2:] == grid and torch.equal(map_.flatten(2).transpose(1, 2), first(images)[:, prefix:])


def test_checkpointing_in_timm_s_methods_recomputes_at_the_grid_of_the_forward_pass() -> None:
    """Two sizes of as many patches: what is recomputed in the backward pass must not take the other's grid."""
    encoder = noisy(build_encoder(use_absolute=False)).train()
    grads = []
    for saving in (False, True):
        encoder.vit.set_grad_checkpointing(saving)
        for method in (encoder.vit.forward_features, lambda x: encoder.vit.forward_intermediates(x)[0], encoder):
            encoder.zero_grad()
            sum(method(pictures(*size)).square().mul(torch.linspace(0, 1, 16)).sum() for size in SIZES).backward()
            grads.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            torch.testing.assert_close(two, one, atol=1e-3, rtol=1e-4)


# state dicts


def test_checkpoints_with_and_without_rope_are_one_and_the_same(tmp_path: Path) -> None:
    plain, rotary = build_encoder(use_rope=False), build_encoder(seed=1)
    keys = list(rotary.state_dict())
    assert keys == list(plain.state_dict()) == [f"vit.{name}" for name in plain.vit.state_dict()]
    assert not any("attn.attn" in key or "rope" in key for key in keys)
    assert sum(p.numel() for p in rotary.parameters()) == sum(p.numel() for p in plain.parameters())
    for source, receiver in ((plain, rotary), (rotary, plain)):
        save_file(source.state_dict(), tmp_path / "encoder.safetensors")
        receiver.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    bare = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **TINY)
    bare.load_state_dict(rotary.vit.state_dict(), strict=True)
    rotary.vit.load_state_dict(bare.state_dict(), strict=True)


@torch.no_grad()
def test_an_absolute_table_in_a_checkpoint_is_ignored_where_there_is_none() -> None:
    absolute, rotary = noisy(build_encoder(use_rope=False)), build_encoder(use_absolute=False, seed=1)
    state = absolute.state_dict()
    rotary.load_state_dict(state, strict=True)
    assert "vit.pos_embed" in state and "vit.pos_embed" not in rotary.state_dict()
    holder = nn.ModuleDict({"encoder": rotary})
    holder.load_state_dict({f"encoder.{name}": value for name, value in state.items()}, strict=True)
    assert torch.equal(rotary.vit.cls_token, absolute.vit.cls_token)


def test_learned_frequencies_are_saved_once() -> None:
    for options, name in (({"learnable": True}, "rope.log_theta"), ({"kind": "mixed"}, "rope.mixed")):
        extra = build_encoder(rope=options).state_dict().keys() - build_encoder().state_dict().keys()
        assert extra == {name}


def test_parts_that_only_a_classifier_uses_take_no_gradient() -> None:
    encoder = ContextEncoder("vit_base_patch16_siglip_224", 16, vit={**TINY, "embed_dim": 48, "num_heads": 3})
    encoder(pictures()).square().sum().backward()
    idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == [] and any("attn_pool" in name for name in encoder.state_dict())


# published weights


@pytest.fixture
def published(tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights with a class token, and the options to load them with from their file."""
    plain = noisy(timm.create_model("vit_tiny_patch16_224", img_size=16, **TINY))
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    return plain.state_dict(), {**TINY, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}


@pytest.mark.parametrize(
    "tokens", [{}, {"class_token": False}, {"reg_tokens": 4}, {"class_token": False, "reg_tokens": 2}]
)
def test_published_weights_load_with_other_prefix_tokens(
    published: tuple[dict[str, Tensor], dict[str, Any]], tokens: dict[str, Any]
) -> None:
    weights, options = published
    encoder = ContextEncoder("vit_tiny_patch16_224", 16, True, vit=options | tokens)
    found = encoder.vit.state_dict()
    for name in set(weights) - {"pos_embed", "cls_token", "head.weight", "head.bias"}:
        assert torch.equal(found[name], weights[name]), name
    assert torch.equal(found["pos_embed"][:, -16:], weights["pos_embed"][:, 1:])
    if tokens.get("class_token", True):
        assert torch.equal(found["cls_token"], weights["cls_token"])
        assert torch.equal(found["pos_embed"][:, :1], weights["pos_embed"][:, :1])
    assert encoder(pictures()).shape[1] == encoder.num_prefix_tokens + 16


def test_published_weights_that_do_not_fit_are_refused_in_one_line(
    published: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    for odd in ({"embed_dim": 32}, {"embed_dim": 32, "class_token": False}):
        with pytest.raises(ValueError, match=r"pretrained weights of 'vit_tiny\w*' do not fit vit=.*32") as caught:
            ContextEncoder("vit_tiny_patch16_224", 16, True, vit=published[1] | odd)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_heads": 4}, "num_heads=4 makes another function .*'vit_tiny_patch16_224', which have num_heads=3"),
        ({"act_layer": "relu", "class_token": False}, "act_layer=ReLU makes another .* which have act_layer=GELU"),
    ],
)
def test_published_weights_are_not_made_another_function(
    option: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))
    fits = {"num_heads": 3, "act_layer": "gelu", "class_token": False}
    assert ContextEncoder("vit_tiny_patch16_224", 32, True, vit=fits).vit.blocks[0].attn.num_heads == 3
    with pytest.raises(ValueError, match=message):
        ContextEncoder("vit_tiny_patch16_224", 32, True, vit={"embed_dim": 192} | option)


@pytest.mark.parametrize("tokens", [{}, {"class_token": False}])
def test_published_weights_of_another_patch_size_are_not_resampled(
    published: tuple[dict[str, Tensor], dict[str, Any]], tokens: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = published[1] | {"patch_size": 8} | tokens
    with pytest.raises(ValueError, match=r"safetensors has patches of 4 pixels, not patch_size=8: .*nearest: 4"):
        ContextEncoder("vit_tiny_patch16_224", 16, True, vit=own)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' have patches of 16 pixels, not patch_size=8: .*null"):
        ContextEncoder("vit_tiny_patch16_224", 32, True, vit={"patch_size": 8} | tokens)


def test_the_published_model_that_heads_are_compared_with_costs_no_memory_and_no_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create, made = timm.create_model, []
    vit = create("vit_tiny_patch16_224", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: (made.append(create(*a, **k)), made[-1])[1])
    before = torch.get_rng_state()
    vit_module._check_function(vit, "vit_tiny_patch16_224", None)
    assert torch.equal(torch.get_rng_state(), before)
    assert {tensor.device.type for model in made for tensor in model.state_dict().values()} == {"meta"}


# image sizes


@pytest.mark.parametrize(("use_absolute", "use_rope"), MODES)
@pytest.mark.parametrize("built", [16, (8, 32)])
@torch.no_grad()
def test_any_image_size_works_and_sizes_do_not_leak_into_one_another(
    use_absolute: bool, use_rope: bool, built: int | tuple[int, int]
) -> None:
    encoder = noisy(build_encoder(built, use_rope, use_absolute=use_absolute))
    sizes = [(16, 16), (8, 32), (32, 8), (4, 64), (20, 28), (4, 4)]
    first = [encoder(pictures(*size)) for size in sizes]
    for size, before in zip(sizes, first, strict=True):
        assert before.shape == (2, 1 + size[0] * size[1] // 16, 16)
        assert torch.equal(encoder(pictures(*size)), before)


@torch.no_grad()
def test_a_8x32_picture_is_no_16x16_grid() -> None:
    """Same number of patches, other neighbours: sqrt(N) would mix them up."""
    encoder = noisy(build_encoder((8, 32)))
    wide = pictures(8, 32, 1)
    patches = wide.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # the same 16 patches, laid out 4 x 4
    square = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 16, 16)
    assert (encoder(wide) - encoder(square)).abs().max() > 1e-2
    relative = noisy(build_encoder((8, 32), use_absolute=False))
    at = torch.cartesian_prod(torch.arange(2.0), torch.arange(8.0))
    torch.testing.assert_close(relative(square, positions=at), relative(wide), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (8, 24), (24, 8)])
@torch.no_grad()
def test_the_absolute_table_is_resampled_to_the_grid(size: tuple[int, int]) -> None:
    encoder = noisy(build_encoder(use_rope=False))
    grid = [size[0] // 4, size[1] // 4]
    fixed = build_encoder(size, use_rope=False)
    state = encoder.state_dict()
    state["vit.pos_embed"] = resample_abs_pos_embed(state["vit.pos_embed"], grid, [4, 4], num_prefix_tokens=1)
    fixed.load_state_dict(state)
    torch.testing.assert_close(encoder(pictures(*size)), fixed(pictures(*size)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_rope_only_features_do_not_depend_on_where_the_picture_lies() -> None:
    encoder = noisy(build_encoder(use_absolute=False, vit={"class_token": False}))
    at = encoder.rope.positions((4, 4))  # type: ignore[union-attr]
    moved = encoder(pictures(), positions=at + torch.tensor([3.0, 7.5]))
    torch.testing.assert_close(moved, encoder(pictures()), atol=1e-5, rtol=1e-4)
    assert (encoder(pictures(), positions=at * 1.5) - moved).abs().max() > 1e-2


@torch.no_grad()
def test_without_any_position_the_encoder_is_a_bag_of_patches_and_with_rope_it_is_not() -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    images = pictures()
    blocks = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
    shuffled = blocks.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 16, 16)
    for use_rope in (False, True):
        encoder = noisy(build_encoder(use_rope=use_rope, use_absolute=False))
        gap = (encoder(shuffled)[:, 1:] - encoder(images)[:, 1:][:, order]).abs().max()
        assert (gap > 1e-2) if use_rope else (gap < 1e-5)


@torch.no_grad()
def test_strategy_is_chosen_at_test_time_and_only_matters_on_other_grids() -> None:
    encoder = noisy(build_encoder())
    outputs: dict[int, list[Tensor]] = {16: [], 32: []}
    for strategy in ("extrapolate", "interpolate", "ntk", "ntk_by_parts"):
        encoder.rope.strategy = strategy  # type: ignore[union-attr]
        for size, seen in outputs.items():
            seen.append(encoder(pictures(size)))
    for one in outputs[16][1:]:
        torch.testing.assert_close(one, outputs[16][0], atol=1e-5, rtol=1e-4)
    for one in outputs[32][1:]:
        assert (one - outputs[32][0]).abs().max() > 1e-3


# bad input


@pytest.mark.parametrize(
    ("name", "vit", "message"),
    [
        ("vit_tiny_patch16", {}, "nearest: vit_tiny_patch16_"),
        ("resnet18", {}, "resnet18.* cannot be built as a timm VisionTransformer"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "is a Eva, not .*; models that are rotary by themselves"),
        ("vit_small_patch16_dinov3", {"class_token": False}, "is a Eva, not .*; models that are rotary by themselves"),
        ("vit_small_patch16_rope_224", {"depth": 1}, "is a Eva, not a timm VisionTransformer"),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "blocks of type ParallelThingsBlock"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(name: str, vit: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ContextEncoder(name, 224, vit=vit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 18}, "image size 18x18 is not a multiple of the patch 4; nearest: 20"),
        ({"size": (16, 2)}, "image size 16x2 is not a multiple of the patch 4; nearest: 4"),
        ({"size": 0}, "image size 0 is not understood"),
        ({"vit": {"patch_size": (4, 8)}}, r"patch_size=\(4, 8\) must be a positive int: patches are square"),
        ({"vit": {"patch_size": 0}}, "patch_size=0 must be a positive int"),
        ({"vit": {"deepness": 3}}, "has no option 'deepness'"),
        ({"vit": {"num_heads": 3}}, "cannot be built as a timm VisionTransformer: dim should be divisible"),
        ({"vit": {"img_size": 32}}, "vit option 'img_size' is set by the encoder itself"),
        ({"vit": {"patch_drop_rate": 0.5}}, "patch_drop_rate=0.5 would drop patches without their positions"),
        ({"vit": {"embed_dim": 12, "num_heads": 2}}, "dim=6 is not divisible by 4"),
        ({"vit": {"depth": 0}}, "no blocks"),
        ({"rope_theta": float("nan")}, "theta=nan"),
        ({"rope": {"theta_per_layer": (1.0,)}}, "1 values for 2 layers"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(**options)


@pytest.mark.parametrize("class_token", [False, True])
def test_a_sincos_embedding_is_the_formula_and_stays(class_token):
    vit = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": class_token}
    vit |= {} if class_token else {"global_pool": "avg"}
    context, target = create_encoder("vit_tiny_patch16_224", (8, 12), position_embedding="sincos", vit=vit)
    expected = torch.zeros(2, 3, 16, dtype=torch.float64)
    for row, column, i in itertools.product(range(2), range(3), range(4)):
        for axis, place in enumerate((row, column)):
            angle = place / 10000 ** (i / 4)
            expected[row, column, 8 * axis + i] = math.sin(angle)
            expected[row, column, 8 * axis + 4 + i] = math.cos(angle)
    found = context.vit.pos_embed[0]
    torch.testing.assert_close(found[-6:].double(), expected.flatten(0, 1), rtol=1e-6, atol=1e-6)
    assert not found[:-6].any() and len(found) == 6 + class_token
    assert not context.vit.pos_embed.requires_grad and torch.equal(context.vit.pos_embed, target.vit.pos_embed)
    context(torch.randn(2, 3, 16, 8)).sum().backward()
    assert context.vit.pos_embed.grad is None


def test_the_spread_of_a_learned_embedding_at_the_start_is_the_one_asked_for():
    spread = {}
    for std in (None, 0.02, 0.2, 5.0):
        context, target = create_encoder("vit_tiny_patch16_224", 64, position_embedding_std=std, vit={"patch_size": 8})
        assert context.vit.pos_embed.requires_grad and torch.equal(context.vit.pos_embed, target.vit.pos_embed)
        spread[std] = context.vit.pos_embed.std().item()
    assert spread == pytest.approx({None: 0.02, 0.02: 0.02, 0.2: 0.2, 5.0: 5.0}, rel=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_embedding": "sincs"}, "sincs' is not one of learned, sincos; nearest: sincos"),
        ({"position_embedding": "sincos", "pretrained": True}, "pretrained=True brings a position embedding"),
        ({"position_embedding": "sincos", "vit": {"embed_dim": 18, "num_heads": 3}}, "a multiple of 4, not 18"),
        ({"position_embedding": "sincos", "position_embedding_std": 0.2}, "fixed: leave position_embedding_std"),
        ({"position_embedding": "sincos", "use_absolute": False}, "without use_absolute=True is of no embedding"),
        ({"position_embedding_std": 0.2, "use_absolute": False}, "without use_absolute=True is of no embedding"),
    ],
)
def test_a_position_embedding_that_cannot_be_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(encoders, "build_vit", lambda name, size, pretrained, **more: build_vit(name, size, **more))
    with pytest.raises(ValueError, match=message):
        create_encoder("vit_tiny_patch16_224", 64, **options)
