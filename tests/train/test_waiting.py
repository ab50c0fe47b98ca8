"""Claims about steps on a device: no value is read that is not logged, and compiled blocks give the same numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hjepa.nn import checks
from hjepa.train import loop
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
