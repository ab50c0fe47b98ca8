"""Claims of the objectives views, both and labels, of `hjepa.train.feed` and `hjepa.train.optimizer`."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hjepa.build import build_model, draw_masks, load_split
from hjepa.config import load_config
from hjepa.data.views import whole
from hjepa.hub import load_run
from hjepa.inputs import UserError
from hjepa.nn.hjepa import HJEPA
from hjepa.train import loop, train
from hjepa.train.checkpoint import latest_checkpoint
from hjepa.train.feed import Feed
from hjepa.train.log import read_log
from hjepa.train.optimizer import MuonAdamW, build_optimizer, parameter_groups

PICTURE, USE, ROUND = "views.coordinates=picture", "model.rope.use_rope=true", ["model.rope.strategy=interpolate"]
ROPE = ("model.rope.use_rope=true", "model.use_absolute=false", "model.rope.strategy=interpolate")
VIEWS = (
    *ROPE, "model.rope.theta=10", "views.small=2", "model.projector.hidden=16", "model.projector.out=8",
    "train.optimizer=muon",
)  # fmt: skip


def feed_of(config, steps=1, **options):
    data = load_split(config, "train")
    return data, list(Feed(config, data, range(steps), [slice(0, config.train.batch_size)], 8, torch.device("cpu")))


@pytest.mark.parametrize("objective", ["views", "both", "labels"])
def test_resume_is_bitwise_equal(tiny, tmp_path, objective):
    config = tiny(*VIEWS, f"objective={objective}")
    train(config, tmp_path / "whole", progress=False)
    stopped = tiny(*VIEWS, f"objective={objective}")
    real, calls = HJEPA.update_target, []

    def stop(self, step):
        calls.append(step)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, step)

    HJEPA.update_target = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            train(stopped, tmp_path / "cut", progress=False)
    finally:
        HJEPA.update_target = real
    train(config, tmp_path / "cut", resume=True, progress=False)
    first, second = (load_file(latest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("objective", ["views", "both"])
def test_a_batch_that_holds_a_picture_twice_is_refused_where_pictures_are_told_apart(tiny, tmp_path, objective):
    few = ("train.steps=1", "train.batch_size=8", "data.limit=7")
    with pytest.raises(UserError, match=r"train.batch_size=8 is more than the 7 training pictures: .*; nearest: 7$"):
        train(tiny(*VIEWS, *few, f"objective={objective}"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/config.yaml").exists()
    for other in ("objective=masks", "objective=labels", "data.limit=8"):
        train(tiny(*VIEWS, *few, f"objective={objective}", other), tmp_path / other, progress=False)


def test_both_learns_masked_cells_on_two_levels_and_the_top(tiny, tmp_path):
    config = tiny(*VIEWS, "objective=both", "loss.teacher=true", "train.steps=3")
    train(config, tmp_path, progress=False)
    row = read_log(tmp_path)[-1]
    assert {"loss_level_0", "loss_level_1", "loss_views"} <= row.keys()
    model = build_model(config)
    _, (arguments,) = feed_of(config)
    model(**arguments).loss.backward()
    for part in (model.context_encoder, model.predictor, model.projector):
        assert all(p.grad is not None for p in part.parameters() if p.requires_grad)
    assert all(p.grad is None for part in (model.target_encoder, model.target_projector) for p in part.parameters())


def test_both_adds_the_weighted_masked_cells_to_the_views(tiny):
    config = tiny(*VIEWS, "objective=both", "loss.masks_weight=0.3", "model.level_weights=[1.0,0.5]")
    _, (arguments,) = feed_of(config)
    out = build_model(config)(**arguments)
    level_0, level_1 = out.level_losses
    torch.testing.assert_close(out.loss, out.view_loss + 0.3 * (level_0 + 0.5 * level_1))


def test_the_spread_weight_shifts_the_view_loss_from_distance_to_spread(tiny):
    """At a quarter it is three parts of what it is at 0, and one of what it is at 1."""
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        config = tiny(*VIEWS, "objective=views", "loss.view_loss=variance", f"loss.spread_weight={weight}")
        _, (arguments,) = feed_of(config)
        losses[weight] = build_model(config)(**arguments).view_loss
    assert losses[0.0] != losses[1.0]
    torch.testing.assert_close(losses[0.25], 0.75 * losses[0.0] + 0.25 * losses[1.0])


def test_the_target_projector_follows_the_projector(tiny):
    model = build_model(tiny(*VIEWS, "objective=both", "loss.teacher=true", "train.ema_start=0.75"))
    before = model.target_projector[0].weight.clone()
    with torch.no_grad():
        model.projector[0].weight.add_(1.0)
    assert model.update_target(0) == 0.75
    torch.testing.assert_close(model.target_projector[0].weight, before + 0.25)


def test_a_crop_that_is_the_whole_picture_has_the_pictures_own_features(tiny, monkeypatch):
    """Also where positions are in the picture's coordinates; a mirrored one has mirrored places."""
    config = tiny(*VIEWS, "objective=views", "views.coordinates=picture", "views.keep=1.0", "views.large=1")
    monkeypatch.setattr("hjepa.train.feed.draw_views", lambda config, step: ([whole(8)], [whole(8), whole(8)]))
    _, (arguments,) = feed_of(config)
    encoder = build_model(config).context_encoder.eval()
    large, small = ("images", "places"), ("small", "small_places")
    for images, places in ((arguments[a][:8], arguments[b][:8]) for a, b in (large, small)):
        torch.testing.assert_close(encoder(images, positions=places), encoder(images), atol=1e-5, rtol=1e-4)


def test_kept_patches_are_a_random_half_of_every_view(tiny):
    config = tiny(*VIEWS, "objective=views", "views.keep=0.5")
    masks = draw_masks(config, (4, 4), 3)
    assert masks.context_idx.shape == (2 * 8, 8) and masks.target_idx == ()
    assert len({tuple(row.tolist()) for row in masks.context_idx}) > 10
    assert torch.equal(masks.context_idx, draw_masks(config, (4, 4), 3).context_idx)


def test_masks_of_some_pictures_are_those_of_all_their_views(tiny):
    masks = draw_masks(tiny(*VIEWS, "objective=both"), (4, 4), 0)
    part = masks.rows(slice(2, 4), views=2)
    assert torch.equal(part.context_idx, masks.context_idx[[2, 3, 10, 11]])
    assert torch.equal(part.target_idx[1], masks.target_idx[1][[2, 3, 10, 11]])


def test_muon_beside_adamw_is_torchs_two_optimisers(tiny):
    one, two = (build_model(tiny(*VIEWS, "objective=views")) for _ in range(2))
    joined = build_optimizer(one, kind="muon", lr=2e-3, muon_lr=1e-2, weight_decay=0.1)
    matrices, *rest = parameter_groups(two, 0.1, muon=True)
    assert {p.dim() for p in matrices["params"]} == {2} and len(matrices["params"]) == 4 * 2
    apart = (
        torch.optim.Muon(matrices["params"], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), fused=True),
    )
    for step in range(3):
        for model, optimizers in ((one, (joined,)), (two, apart)):
            generator = torch.Generator().manual_seed(step)
            for p in (p for p in model.parameters() if p.requires_grad):
                p.grad = torch.randn(p.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_goes_on_from_its_state_dict(tiny):
    def moved(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in (p for p in model.parameters() if p.requires_grad):
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    models = [build_model(tiny(*VIEWS, "objective=views")) for _ in range(2)]
    whole_way, second = (build_optimizer(model, kind="muon") for model in models)
    moved(models[0], whole_way, range(2))
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(whole_way.state_dict()))
    for model, optimizer in zip(models, (whole_way, second), strict=True):
        moved(model, optimizer, range(2, 4))
    assert isinstance(second, MuonAdamW)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=view"], "objective='view' must be one of masks, views, both, labels; nearest: views"),
        (["objective=views", "views.large=1", "views.small=0"], "make one view"),
        ([PICTURE], "picture needs model.rope.use_rope=True, not False"),
        ([PICTURE, USE], "picture needs model.rope.strategy=interpolate, not extrapolate"),
        ([PICTURE, USE, *ROUND, "model.use_alibi=true"], "picture needs model.use_alibi=False, not True"),
        ([PICTURE, USE, *ROUND, "model.rope.jitter=2"], r"picture needs model.rope.jitter=1.0, not 2.0"),
        ([PICTURE, USE, *ROUND, "objective=masks"], "of views, not of objective=masks; nearest: both"),
        (["objective=views", "train.batch_size=4", "train.accumulate=4"], "in train.accumulate=4 parts: views need"),
        (["evaluate.few=30", "evaluate.gallery=20"], "few=30 pictures are more than evaluate.gallery=20"),
        (["loss.regularizer=variance"], "regularizer=variance and loss.regularizer_weight=0.0 do nothing: set both"),
        (["loss.regularizer_weight=0.3"], "regularizer=none and loss.regularizer_weight=0.3 do nothing: set both"),
        (["model.act_layer=rellu"], "must be one of gelu, gelu_tanh, relu, silu; nearest: relu"),
    ],
)
def test_objectives_that_cannot_be_are_refused_by_value(tiny, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(*overrides)


def test_one_class_is_nothing_to_learn_from_labels(tiny, tmp_path):
    with pytest.raises(UserError, match=r"labels needs 2 classes or more, not .'down'.; nearest: views"):
        train(tiny("objective=labels", "data.classes=[down]"), tmp_path, progress=False)


def test_muon_is_refused_where_matrices_are_cut_over_processes(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"train.optimizer=muon .*FSDP.*; nearest: adamw"):
        train(tiny(*VIEWS, "objective=views"), tmp_path, progress=False)


def test_a_checkpoint_whose_optimiser_keeps_no_peak_goes_on_at_the_configured_rate(tiny, tmp_path, monkeypatch):
    """Those of version 0.1 have none."""
    config = tiny("train.steps=3")

    def without_peak(*args, **kwargs):
        optimizer = build_optimizer(*args, **kwargs)
        for group in optimizer.param_groups:
            del group["peak"]
        return optimizer

    train(config, tmp_path / "new", progress=False)
    monkeypatch.setattr(loop, "build_optimizer", without_peak)
    train(config, tmp_path / "old", progress=False)
    new, old = (load_file(latest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("new", "old"))
    assert all(torch.equal(new[key], old[key]) for key in new)


@pytest.mark.slow
def test_the_reports_own_configuration_trains(tmp_path):
    """ViT-B/16 at 224 px with theta 10000 and masked prediction: two steps, and the weights move."""
    sizes = ("model.embed_dim=null", "model.depth=null", "model.num_heads=null", "model.patch_size=16")
    rope = ("model.rope.use_rope=true", "model.rope.theta=10000", "data.image_size=224", "data.limit=8")
    short = ("train.steps=2", "train.warmup=0", "train.batch_size=2", "train.threads=1", "train.log_every=1")
    readings = ("evaluate.gallery=4", "evaluate.queries=2")
    config = load_config(None, ["model.encoder_type=vit_base_patch16_224", *sizes, *rope, *short, *readings])
    before = build_model(config).context_encoder.state_dict()["vit.blocks.11.attn.qkv.weight"].clone()
    assert before.shape == (3 * 768, 768) and config.objective == "masks"
    train(config, tmp_path / "report", progress=False)
    after = load_run(tmp_path / "report", "context")[0].state_dict()["vit.blocks.11.attn.qkv.weight"]
    assert after.isfinite().all() and (after - before).abs().max() > 1e-5
