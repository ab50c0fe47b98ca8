"""Training on views and labels, on drawings of its own, so that mutants run these tests without conftest's fixtures."""

import pytest
import torch
from conftest import TINY, draw_pictures
from safetensors.torch import load_file

from hjepa.build import build_model, load_split
from hjepa.config import load_config
from hjepa.nn.hjepa import HJEPA
from hjepa.train import train
from hjepa.train.checkpoint import latest_checkpoint
from hjepa.train.feed import Feed
from hjepa.train.optimizer import build_optimizer

VIEWS = (
    "model.rope.use_rope=true", "model.use_absolute=false", "model.rope.strategy=interpolate", "model.rope.theta=10",
    "views.small=2", "model.projector.hidden=16", "model.projector.out=8", "train.optimizer=muon",
)  # fmt: skip


def small(tmp_path, *overrides):
    """A config that trains on 18 pictures in a second or two."""
    folder = tmp_path / "pictures"
    if not folder.exists():
        draw_pictures(folder)
    return load_config(None, [*TINY, *VIEWS, f"data.path={folder}", *overrides])


def feed_of(config, steps):
    rows = [slice(0, config.train.batch_size)]
    return list(Feed(config, load_split(config, "train"), steps, rows, 8, torch.device("cpu")))


def test_labels_overfit_one_batch(tmp_path):
    whole = ("views.large_scale=[1.0, 1.0]", "views.color_jitter=0", "views.grey=0")
    config = small(tmp_path, "objective=labels", *whole)
    model = build_model(config, 2).train()
    optimizer = build_optimizer(model, lr=3e-3)
    (arguments,) = feed_of(config, range(1))
    losses = []
    for _ in range(60):
        out = model(**arguments)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[0] > 0.5 and losses[-1] < 0.05


def test_the_loss_of_labels_is_the_cross_entropy_of_every_view_with_its_pictures_label(tmp_path):
    config = small(tmp_path, "objective=labels", "views.large=3")
    model = build_model(config, 2).eval()
    (arguments,) = feed_of(config, range(1))
    views = arguments["images"].unflatten(0, (3, 8))
    features = torch.stack([model.context_encoder(view).mean(1) for view in views])  # no prefix tokens
    scores = model.classifier(features).log_softmax(-1)
    losses = [-scores[view, n, label] for view in range(3) for n, label in enumerate(arguments["labels"].tolist())]
    torch.testing.assert_close(model(**arguments).loss, torch.stack(losses).mean())
    assert 0 < int(arguments["labels"].sum()) < 8


def test_the_model_is_given_views_in_the_widths_that_were_drawn(tmp_path):
    """Wide filters blur every view, large and small; nothing else about it changes."""
    ((plain,), (wide,)) = (
        feed_of(small(tmp_path, "objective=views", f"views.filter_width={width}"), range(1))
        for width in ("[1, 1]", "[4, 4]")
    )
    for name in ("images", "small"):
        edges = [views[name].diff(dim=-1).abs().mean((1, 2, 3)) for views in (plain, wide)]
        assert (edges[1] < edges[0]).all() and edges[1].mean() < 0.6 * edges[0].mean(), name
        blurred = [torch.nn.functional.avg_pool2d(views[name], 8) for views in (plain, wide)]
        assert (blurred[0] - blurred[1]).abs().mean() < 0.2 * blurred[0].std()


@pytest.mark.parametrize("objective", ["views", "labels"])
def test_a_feed_that_begins_at_a_step_gives_what_the_whole_one_gives_there(tmp_path, objective):
    """Pictures, crops, colours, masks: nothing depends on the steps before."""
    config = small(tmp_path, f"objective={objective}", "data.train_scales=[1.0, 2.0]")
    whole, rest = feed_of(config, range(5)), feed_of(config, range(3, 5))
    for one, other in zip(whole[3:], rest, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]), name
    assert not torch.equal(whole[3]["images"], whole[4]["images"])


def test_a_stopped_training_on_views_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Stopped in its fourth step, it goes on after the third, whose batch is of two epochs."""
    short = ("train.steps=5", "train.checkpoint_every=3", "train.eval_every=5", "train.warmup=2")
    config, real = small(tmp_path, "objective=views", *short), HJEPA.update_target
    train(config, tmp_path / "whole", progress=False)

    def stop(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HJEPA, "update_target", stop)
        train(config, tmp_path / "cut", progress=False)
    assert latest_checkpoint(tmp_path / "cut").name == "step_00000003"
    train(config, tmp_path / "cut", resume=True, progress=False)
    first, second = (load_file(latest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("objective", "apart"), [("views", True), ("both", True), ("masks", False), ("labels", False)])
def test_a_batch_across_two_epochs_has_no_picture_twice_where_they_are_told_apart(tmp_path, objective, apart):
    """18 pictures in batches of 8: under views a picture's twin would be its own negative."""
    config = small(tmp_path, f"objective={objective}")
    data = load_split(config, "train")
    feed = Feed(config, data, range(36), [slice(0, 8)], 8, torch.device("cpu"))
    batches = [[key[0] for key in keys] for *_, keys in feed._keys()]
    assert all(len(set(pictures)) == 8 for pictures in batches) is apart
    assert sorted(i for pictures in batches for i in pictures) == sorted(16 * list(range(18)))
