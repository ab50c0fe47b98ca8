"""The target encoder: starts as the context encoder, follows it by a moving average, takes no gradient."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from builders import TINY, build_pair, noisy, pictures
from safetensors.torch import save_file
from timm.layers import LayerNorm
from torch import nn

from hjepa.nn.encoders import ContextEncoder, TargetEncoder, create_encoder

# the target


def test_target_starts_bit_equal_to_the_context_encoder() -> None:
    for options in ({}, {"use_rope": False}, {"rope": {"kind": "mixed"}}, {"use_absolute": False}):
        context, target = build_pair(**options)
        assert context.state_dict().keys() == target.state_dict().keys()
        for name, value in context.state_dict().items():
            assert torch.equal(value, target.state_dict()[name])
            assert value.data_ptr() != target.state_dict()[name].data_ptr()
        assert torch.equal(context.eval()(pictures()), target(pictures()))


def with_buffers(context: ContextEncoder, target: TargetEncoder) -> None:
    for encoder, value in ((context, 8.0), (target, 2.0)):
        encoder.register_buffer("mean", torch.full((3,), value))
        encoder.register_buffer("count", torch.tensor(int(value)))


def test_ema_matches_closed_form_over_several_steps_buffers_included() -> None:
    context, target = build_pair(ema_start=0.6, ema_end=0.9, ema_steps=4, rope={"kind": "mixed"})
    with_buffers(context, target)
    noisy(context)
    expected = {name: value.double() for name, value in target.state_dict().items()}
    for step, momentum in enumerate((0.6, 0.675, 0.75, 0.825, 0.9, 0.9)):
        assert target.update_from_context_encoder(context, step) == pytest.approx(momentum)
        for name, value in context.state_dict().items():
            if value.is_floating_point():
                expected[name] = momentum * expected[name] + (1 - momentum) * value.double()
            else:
                expected[name] = value.double()
        noisy(context)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=0)
    assert int(target.count) == 8  # type: ignore[arg-type]


def test_momentum_rises_linearly_from_start_to_end() -> None:
    _, target = build_pair(ema_steps=100)
    assert [target.momentum_at(s) for s in (0, 25, 50, 100, 1000)] == pytest.approx([0.996, 0.997, 0.998, 1.0, 1.0])


def test_momentum_zero_copies_and_one_keeps() -> None:
    context, target = build_pair(ema_start=0.0, ema_end=1.0, ema_steps=1)
    start = copy.deepcopy(target.state_dict())
    noisy(context)
    target.update_from_context_encoder(context, 1)
    assert all(torch.equal(v, start[n]) for n, v in target.state_dict().items())
    target.update_from_context_encoder(context, 0)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, context.state_dict()[name], atol=1e-6, rtol=0)


def test_target_gets_no_gradient_and_stays_in_eval_mode() -> None:
    context, target = build_pair(vit={**TINY, "proj_drop_rate": 0.5, "drop_path_rate": 0.5})
    assert not any(p.requires_grad for p in target.parameters())
    parent = nn.ModuleList([context, target]).train()
    assert context.training and not any(m.training for m in parent[1].modules())
    assert torch.equal(target(pictures()), target(pictures()))
    target.requires_grad_(True)
    assert not target(pictures().requires_grad_()).requires_grad


def test_an_encoder_of_another_build_cannot_feed_the_target() -> None:
    _, target = build_pair()
    other, _ = build_pair(rope={"learnable": True})
    with pytest.raises(ValueError, match=r"rope\.log_theta is in one of the two only"):
        target.update_from_context_encoder(other, 0)


@pytest.mark.parametrize("schedule", [(1.1, 1.0, 5), (0.9, 0.8, 5), (0.9, 1.0, 0), (float("nan"), 1.0, 5)])
def test_a_momentum_schedule_out_of_range_is_refused(schedule: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match=r"EMA momentum needs 0 <= start <= end <= 1"):
        build_pair(**dict(zip(("ema_start", "ema_end", "ema_steps"), schedule, strict=True)))


@pytest.mark.parametrize("use_rope", [False, True])
@torch.no_grad()
def test_pretrained_weights_are_kept_in_both_encoders(tmp_path: Path, use_rope: bool) -> None:
    trained = noisy(timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2, img_size=32))
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 10, "custom_load": False}
    vit = {"depth": 2, "pretrained_cfg_overlay": overlay}
    context, target = create_encoder("vit_tiny_patch16_224", 32, pretrained=True, use_rope=use_rope, vit=vit)
    for encoder in (context, target):
        for name, value in trained.state_dict().items():
            if not name.startswith("head."):
                assert torch.equal(encoder.vit.state_dict()[name], value)
    if not use_rope:
        assert torch.equal(context.eval()(pictures(32)), trained.eval().forward_features(pictures(32)))


def test_a_target_in_half_precision_is_refused_and_one_in_float32_follows_any_context() -> None:
    """In bfloat16 a step of 0.4 % of the difference is rounded away: the target would never move."""
    context, target = build_pair()
    context = context.bfloat16()
    with torch.no_grad():
        for parameter in context.parameters():
            parameter.mul_(1.1)
    target.set_schedule(0.996, 0.996, 1)
    for step in range(2000):
        target.update_from_context_encoder(context, step)
    name = "vit.patch_embed.proj.weight"
    assert target.state_dict()[name].dtype == torch.float32
    torch.testing.assert_close(target.state_dict()[name], context.state_dict()[name].float(), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"a target encoder in torch.bfloat16 cannot hold .* keep it in float32"):
        target.bfloat16().update_from_context_encoder(context, 0)


def test_the_report_s_names_of_the_schedule_and_of_the_copy() -> None:
    context, _ = build_pair()
    schedule = {"ema_momentum": 0.9, "ema_momentum_end": 0.95, "ema_warmup_steps": 10}
    target = TargetEncoder("vit_tiny_patch16_224", 16, use_rope=True, rope_theta=20.0, vit=TINY, **schedule)
    assert [target.momentum_at(step) for step in (0, 5, 10, 20)] == pytest.approx([0.9, 0.925, 0.95, 0.95])
    assert not torch.equal(target(pictures()), context.eval()(pictures()))
    target.copy_from_context_encoder(context)
    assert torch.equal(target(pictures()), context(pictures()))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rope_theta": 10.0}, r"thetas=\(10.0,\) .* thetas=\(20.0,\)"),
        ({"rope": {"theta_per_layer": [20.0, 5.0]}}, r"thetas=\(20.0, 5.0\) .* thetas=\(20.0,\)"),
        ({"rope": {"kind": "fixed"}}, "kind='fixed' .* kind='axial'"),
        ({"rope": {"coordinates": "normalized"}}, "coordinates='normalized' .* coordinates='index'"),
        ({"rope": {"fraction": 0.5}}, "fraction=0.5 .* fraction=1.0"),
        ({"rope": {"strategy": "ntk"}}, "strategy='ntk' .* strategy='extrapolate'"),
        ({"use_rope": False}, "use_rope=False .* use_rope=True"),
        ({"vit": TINY | {"num_heads": 4}}, "num_heads=4 .* num_heads=2"),
        ({"vit": TINY | {"act_layer": "relu"}}, "act_layer='ReLU' .* act_layer='GELU'"),
        ({"vit": TINY | {"norm_layer": partial(LayerNorm, eps=1e-3)}}, "norm eps=0.001 .* norm eps=1e-06"),
    ],
)
def test_weights_are_not_copied_into_an_encoder_that_makes_other_features_of_them(
    options: dict[str, Any], named: str
) -> None:
    other, (_, target) = build_pair(**options)[0], build_pair()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        target.copy_from_context_encoder(other)
    with pytest.raises(ValueError, match=named):
        target.update_from_context_encoder(other, 0)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("switch", ["use_rope", "use_alibi"])
def test_the_grid_of_training_counts_where_the_strategy_looks_at_it(switch: str) -> None:
    def pair(size: int, strategy: str) -> tuple[ContextEncoder, TargetEncoder]:
        how: dict[str, Any] = {switch: True, "rope": {"strategy": strategy}}
        return create_encoder(img_size=size, use_absolute=False, vit=TINY, **how)

    pair(16, "extrapolate")[1].copy_from_context_encoder(pair(32, "extrapolate")[0])
    with pytest.raises(ValueError, match=r"grid_size=\(8, 8\) .* grid_size=\(4, 4\)"):
        pair(16, "interpolate")[1].copy_from_context_encoder(pair(32, "interpolate")[0])


def test_learned_frequencies_are_copied_whatever_theta_they_started_from() -> None:
    for learned in ({"learnable": True}, {"kind": "mixed"}):
        context, _ = build_pair(rope=learned, rope_theta=50.0)
        _, target = build_pair(rope=learned)
        target.copy_from_context_encoder(context)
        assert torch.equal(target(pictures()), context.eval()(pictures()))
