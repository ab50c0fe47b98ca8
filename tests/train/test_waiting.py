"""Claims about steps on a device: no value is read that is not logged, and compiled blocks give the same numbers."""

from dataclasses import fields
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory as loader_pins

from hjepa import build
from hjepa.data.views import draw_crops, to_device
from hjepa.nn import checks
from hjepa.nn.masks import sample_masks
from hjepa.train import feed, loop
from hjepa.train.checkpoint import latest_checkpoint
from hjepa.train.log import read_log

ROPE = ("model.rope.use_rope=true", "model.rope.theta=10", "train.mixed_precision=no")
VIEWS = ("views.small=2", "model.projector.hidden=16", "model.projector.out=8")


class Reading(TorchDispatchMode):
    """Counts the values that are read from tensors; on a GPU each read waits for all work before it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["masks", "views", "both", "labels"])
def test_a_step_that_is_not_logged_reads_no_value_of_the_device(tiny, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(checks, "on_cpu", lambda tensor: False)
    config = tiny(f"objective={objective}", *ROPE, *VIEWS, "train.optimizer=muon")
    with loop._callers_state():
        run = loop._Run(config, tmp_path, resume=False, progress=False)
        run.lazy = True
        feed = run.feed()
        batches = [next(feed) for _ in range(3)]  # drawn on the CPU, whatever the device
        run.step(0, iter(batches[:1]), logging=False)
        with Reading() as reading:
            assert run.step(1, iter(batches[1:2]), logging=False) == {}
        assert reading.count == 0
        with Reading() as reading:
            assert run.step(2, iter(batches[2:]), logging=True)["loss"] > 0
        assert reading.count > 0


class Copying(TorchDispatchMode):
    """Counts copies from the CPU to another device that are waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            there = kwargs.get("device") not in (None, torch.device("cpu"))
            self.count += there and not kwargs.get("non_blocking")
        return function(*args, **kwargs)


@pytest.mark.parametrize("objective", ["masks", "views", "both", "labels"])
def test_a_step_is_fed_without_a_copy_that_is_waited_for(tiny, monkeypatch, objective):
    config = tiny(f"objective={objective}", *VIEWS, *ROPE)
    data = build.load_split(config, "train")
    rows, patch = [slice(0, config.train.batch_size)], config.model.patch_size
    batches = iter(feed.Feed(config, data, range(2), rows, patch, torch.device("meta")))  # shapes alone: no GPU
    next(batches)
    built, clean = [], torch.Tensor.new_tensor

    def new_tensor(self, *values, **options):  # it copies below the mode's sight
        built.append(values)
        return clean(self, *values, **options)

    monkeypatch.setattr(torch.Tensor, "new_tensor", new_tensor)
    with Copying() as copying:
        assert all(x.device.type == "meta" for x in next(batches).values() if isinstance(x, torch.Tensor))
    assert copying.count == 0 and built == []


def test_a_loader_that_pins_its_memory_pins_masks_too(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: pinned.append(self) or self)
    masks = sample_masks(4, (8, 8), levels=2)
    loader_pins((torch.zeros(3), masks))
    assert len(pinned) == 4 and pinned[1] is masks.context_idx


def test_crops_are_the_same_on_a_device():
    drawn = [draw_crops(5, (0.2, 1.0), color_jitter=0.5, grey=0.5) for _ in range(3)]
    shaped = to_device(drawn, "meta")
    assert [(c.top.shape, c.mirrored.dtype) for c in shaped] == [((5,), torch.bool)] * 3
    clean = torch.Tensor.to  # a copy that stays on the CPU shows its numbers
    with mock.patch.object(
        torch.Tensor, "to", lambda self, *a, **o: self if a == (torch.device("meta"),) else clean(self, *a, **o)
    ):
        sent = to_device(drawn, "meta")
    for old, new in zip(drawn, sent, strict=True):
        assert all(torch.equal(getattr(old, part.name), getattr(new, part.name)) for part in fields(old))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_value_that_is_not_finite_is_found_at_the_next_log_with_its_step(tiny, tmp_path, monkeypatch, poison):
    clean, calls = loop.HJEPA.forward, []

    def forward(self, images, masks):
        out = clean(self, images, masks)
        calls.append(None)
        if len(calls) == 7:
            zero = 0 * self.predictor.level_token.sum()
            out.loss = out.loss * float("inf") if poison == "loss" else out.loss + zero.sqrt()
        return out

    class Lazy(loop._Run):
        @property
        def lazy(self):
            return True

        @lazy.setter
        def lazy(self, value):
            pass

    monkeypatch.setattr(loop, "_Run", Lazy)
    monkeypatch.setattr(loop.HJEPA, "forward", forward)
    with pytest.raises(loop.TrainingDiverged, match=rf"{poison}.* at step 7; .*step_00000005"):
        loop.train(tiny("train.log_every=10", "train.eval_every=10"), tmp_path, progress=False)
    assert latest_checkpoint(tmp_path).name == "step_00000005" and len(calls) == 10  # found when step 10 is logged


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it while it traces
def test_compiled_blocks_train_alike_and_once_for_each_shape(tiny, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    graphs, clean = [], loop._Run.step

    def step(self, *arguments):
        row = clean(self, *arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return row

    def traced(self, **options):  # the graphs of a compilation without a C++ compiler
        assert options == {"dynamic": False}
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    monkeypatch.setattr(loop._Run, "step", step)
    words = ["objective=views", *ROPE, *VIEWS, "data.train_scales=[1.0, 2.0]", "train.steps=6", "train.log_every=1"]
    torch._dynamo.reset()
    counters.clear()
    for name in ("false", "true"):
        loop.train(tiny(*words, f"train.compile={name}"), tmp_path / name, progress=False)
    plain, compiled = ([row["loss"] for row in read_log(tmp_path / name)[1:]] for name in ("false", "true"))
    assert graphs[:6] == [0] * 6 and 0 < graphs[-1] <= loop.GRAPHS
    assert graphs[-1] == graphs[-3]  # both image sizes were seen by then
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_tf32_is_torchs_again_after_the_run(tiny, tmp_path, monkeypatch):
    seen, clean = [], loop._Run.step

    def step(self, *arguments):
        seen.append(torch.get_float32_matmul_precision())
        return clean(self, *arguments)

    monkeypatch.setattr(loop._Run, "step", step)
    for name in ("false", "true"):
        loop.train(tiny("train.steps=1", f"train.tf32={name}"), tmp_path / name, progress=False)
    assert seen == ["highest", "high"] and torch.get_float32_matmul_precision() == "highest"
