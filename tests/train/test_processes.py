"""Claims of hjepa.train and hjepa.train.sharding about several processes, on a CPU with gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hjepa.config import save_config
from hjepa.hub import latest_checkpoint, load_run, read_state
from hjepa.train import loop as train_module
from hjepa.train.checkpoint import read_model
from hjepa.train.log import read_log
from hjepa.train.loop import train
from hjepa.train.sharding import fsdp_plugin

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(train_module.__file__).parents[2])}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ROPE = ("model.rope.use_rope=true", "model.rope.theta=100", "model.rope.jitter=1.5", "model.rope.rescale=2.0")


def column(run: Path, name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in read_log(run) if name in row])


def test_torchrun_that_accelerate_does_not_see_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_module, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(RuntimeError, match="started 2 processes, Accelerate sees 1"):
        train_module._accelerator("no", 1)


def test_fsdp_is_asked_for_by_accelerates_word_and_keeps_rotation_tables_in_float32(monkeypatch):
    assert fsdp_plugin("bf16") is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = fsdp_plugin("bf16")
    assert (plugin.fsdp_version, plugin.transformer_cls_names_to_wrap) == (2, ["Block"])
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs


FSDP = ENVIRONMENT | {"ACCELERATE_USE_FSDP": "true"}
TRAIN = """
import sys
from pathlib import Path
from hjepa.config import load_config
from hjepa.train.loop import train
folders = [Path(sys.argv[1]) / run for run in sys.argv[2:]]
for folder, resume in [(folder, folder.is_dir()) for folder in folders]:
    train(load_config(folder.parent / "one/config.yaml"), folder, resume=resume, progress=False)
"""
DISAGREE = """
import os, sys
from pathlib import Path
from hjepa.config import load_config
from hjepa.train.loop import train
folder = Path(sys.argv[1])
train(load_config(folder / "one/config.yaml"), folder / "new", resume=os.environ["RANK"] == "1", progress=False)
"""
FREQUENCIES = """
import sys
import torch
from accelerate import Accelerator
from hjepa.build import build_model
from hjepa.config import load_config
from hjepa.train.sharding import prepare
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
model, whole = (build_model(load_config(f"{sys.argv[1]}/one/config.yaml")) for _ in range(2))
model, _ = prepare(accelerator, model, lambda: torch.optim.AdamW(model.parameters()))
seen = []
model.predictor.register_forward_pre_hook(lambda module, args: seen.append(module.rope.table((16, 16)).detach()))
from hjepa.nn.masks import sample_masks
sides = model.context_encoder.grid_size
model(torch.zeros(2, 3, 32, 32), sample_masks(2, sides, levels=2, generator=torch.Generator().manual_seed(0)))
assert model.predictor.blocks[0].mlp.fc1.weight.placements[0].is_shard()
torch.save([seen[0], whole.predictor.rope.table((16, 16)).detach()], f"{sys.argv[1]}/{accelerator.process_index}.pt")
"""
DIES = """
import os, signal
from hjepa.train import checkpoint
written = checkpoint.write_file
def dies(path, writer):
    if ".tmp-6-" in str(path):  # the slices are there, the state is not
        os.kill(os.getpid(), signal.SIGKILL)
    written(path, writer)
checkpoint.write_file = dies
"""
TRACED = """
import sys
import torch
from torch._dynamo.utils import counters
def traced(self, **options):  # the graphs of a compilation without a C++ compiler
    self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **options)
torch.nn.Module.compile = traced
"""
COUNTED = """
import os
with open(f"{sys.argv[1]}/graphs-{os.environ['RANK']}", "w") as file:
    file.write(str(counters["stats"]["unique_graphs"]))
"""

COUNTED_HASHES = """
import json, os, sys
from pathlib import Path
from hjepa.config import load_config
from hjepa.train import checkpoint, loop, shards
folder, read, found, digest, build = Path(sys.argv[1]), [], {}, shards.digest, loop._Run._build
shards.digest = lambda path: (read.append(f"{path.parent.name}/{path.name}"), digest(path))[1]
def built(self):
    start = build(self)
    found[self.run_dir.name] = [start, sorted(read)]
    return start
loop._Run._build = built
config = load_config(folder / "one/config.yaml")
for name in ("resumed", "new"):
    read.clear()
    checkpoint._HASHED.clear()
    config.train.init_from = str(folder / "one") if name == "new" else None
    loop.train(config, folder / name, resume=name == "resumed", progress=False)
(folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


def torchrun(
    script: str, folder: Path, *words: str, environment: dict[str, str] = FSDP
) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return launch([str(folder / "script.py"), str(folder), *words], environment)


def launch(words: list[str], environment: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TORCHRUN, *words], env=environment, capture_output=True, text=True, timeout=300)


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_equal_one(tiny, tmp_path):
    """By the command line, and with a regularizer, which is a statistic of the global batch."""
    config = tiny("train.steps=5", *ROPE, "loss.regularizer=variance", "loss.regularizer_weight=0.1")
    train(config, tmp_path / "one", progress=False)
    words = ["hjepa", "train", "--config", str(tmp_path / "one/config.yaml"), "--run-dir", str(tmp_path / "two")]
    succeed(launch(["-m", *words]))
    assert json.loads((tmp_path / "two/metrics.json").read_text())["processes"] == 2
    for name in ("loss", "loss_level_0", "loss_level_1", "regularizer"):
        torch.testing.assert_close(column(tmp_path / "two", name), column(tmp_path / "one", name), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_views_over_two_processes_equal_those_over_one(tiny, tmp_path):
    """Embeddings, batch norm and the sketched Gaussian are of the global batch; so is the contrast with a teacher."""
    both = ("objective=both", "views.small=2", "model.projector.hidden=16", "train.steps=4", *ROPE)
    kinds = {"taught": ("loss.teacher=true", "train.optimizer=muon"), "gaussian": ("loss.view_loss=sketched_gaussian",)}
    for name, options in kinds.items():
        train(tiny(*both, *options), tmp_path / name / "one", progress=False)
    succeed(torchrun(TRAIN, tmp_path, *(f"{name}/two" for name in kinds), environment=ENVIRONMENT))
    for name in kinds:
        for field in ("loss", "loss_views", "loss_level_1"):
            found, expected = (column(tmp_path / name / run, field) for run in ("two", "one"))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_worker_ends_the_job_by_name_and_leaves_a_whole_checkpoint(tiny, tmp_path):
    """torchrun stops the other process at once, names the one that was killed, and leaves none behind."""
    save_config(tiny("train.steps=4000", "train.checkpoint_every=5"), tmp_path / "long.yaml")
    run = tmp_path / "run"
    words = ["-m", "hjepa", "train", "--config", str(tmp_path / "long.yaml"), "--run-dir", str(run)]
    job = subprocess.Popen([*TORCHRUN, *words], env=ENVIRONMENT, stderr=subprocess.PIPE)
    try:
        while not latest_checkpoint(run):
            assert job.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        workers = [pid for pid in children if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
        (killed,) = [pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(killed), signal.SIGKILL)
        said = job.communicate(timeout=60)[1].decode()
    finally:
        job.kill()
    cause = said.split("Root Cause")[1]
    assert job.returncode == 1 and len(workers) == 2
    assert "rank      : 1" in cause and f"Signal 9 (SIGKILL) received by PID {killed}" in cause
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert load_run(run)[1].train.steps == 4000 and read_state(latest_checkpoint(run))["step"] >= 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:going back to")
def test_the_first_process_hashes_a_checkpoint_and_the_others_take_its_word(tiny, tmp_path):
    """Also the word on a damaged one, which all of them go back behind."""
    train(tiny("train.steps=4", "train.checkpoint_every=2"), tmp_path / "one", progress=False)
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    (tmp_path / "resumed/checkpoints/step_00000004/model.safetensors").write_bytes(b"damaged")
    succeed(torchrun(COUNTED_HASHES, tmp_path, environment=ENVIRONMENT))
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    files = [f"step_{step:08d}/{name}" for step in (2, 4) for name in ("model.safetensors", "optimizer.pt")]
    assert first == {"resumed": [2, files[:3]], "new": [0, files[2:]]}
    assert other == {"resumed": [2, []], "new": [0, []]}


CUT = {
    "whitened": ("train.whiten_patches=0.1", "train.mixed_precision=no"),
    "mixed": ("model.rope.kind=mixed", "train.mixed_precision=no"),
    "mixed, bfloat16": ("model.rope.kind=mixed", "train.mixed_precision=bf16"),
    "theta, bfloat16": ("model.rope.learnable=true", "train.mixed_precision=bf16"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this CPU multiplies")
def test_cut_models_with_learned_frequencies_or_a_fixed_layer_train_save_and_resume_as_whole_ones(tiny, tmp_path):
    for name, options in CUT.items():
        config = tiny("train.steps=6", "train.checkpoint_every=3", "model.rope.use_rope=true", *options)
        train(config, tmp_path / name / "one", progress=False)
        shutil.copytree(tmp_path / name / "one", tmp_path / name / "resumed")
        shutil.rmtree(tmp_path / name / "resumed/checkpoints/step_00000006")
    succeed(torchrun(TRAIN, tmp_path, *(f"{name}/{run}" for name in CUT for run in ("cut", "resumed"))))
    for name, options in CUT.items():
        within = 1e-5 if "train.mixed_precision=no" in options else 2e-4
        loss = column(tmp_path / name / "one", "loss")
        for run in ("cut", "resumed"):
            torch.testing.assert_close(column(tmp_path / name / run, "loss"), loss, atol=within, rtol=0)
            assert read_state(latest_checkpoint(tmp_path / name / run))["step"] == 6


@pytest.mark.slow
def test_processes_that_disagree_on_resume_do_not_wait_for_one_another(tiny, tmp_path):
    """One asks whether the folder is there after the first has made it."""
    (tmp_path / "one").mkdir()
    save_config(tiny("train.steps=2"), tmp_path / "one/config.yaml")
    succeed(torchrun(DISAGREE, tmp_path, environment=ENVIRONMENT))
    assert read_state(latest_checkpoint(tmp_path / "new"))["step"] == 2


@pytest.mark.slow
def test_learned_frequencies_of_a_cut_model_make_float32_tables_under_bfloat16(tiny, tmp_path):
    """Frequencies in bfloat16 would put the cosines of a 16 x 16 grid off by 0.03."""
    (tmp_path / "one").mkdir()
    save_config(tiny("model.rope.use_rope=true", "model.rope.kind=mixed"), tmp_path / "one/config.yaml")
    succeed(torchrun(FREQUENCIES, tmp_path))
    for rank in range(2):
        found, expected = torch.load(tmp_path / f"{rank}.pt")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_cut_run_killed_while_saving_goes_on_from_its_last_whole_checkpoint(tiny, tmp_path):
    config = tiny("train.steps=6", "train.checkpoint_every=3", *ROPE)
    train(config, tmp_path / "one", progress=False)
    killed = torchrun(DIES + TRAIN, tmp_path, "cut")
    assert killed.returncode == 1 and "Signal 9 (SIGKILL)" in killed.stderr
    assert read_state(latest_checkpoint(tmp_path / "cut"))["step"] == 3
    assert list((tmp_path / "cut/checkpoints").glob(".tmp-6-*"))
    succeed(torchrun(TRAIN, tmp_path, "cut"))
    assert [row["step"] for row in read_log(tmp_path / "cut") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(column(tmp_path / "cut", "loss"), column(tmp_path / "one", "loss"), atol=1e-5, rtol=0)
    assert not list((tmp_path / "cut/checkpoints").glob(".tmp-*"))


@pytest.mark.slow
def test_a_model_cut_over_two_processes_equals_a_whole_one(tiny, tmp_path):
    """FSDP: same losses, measures and checkpoints; a cut run goes on from a whole one's checkpoint, and back."""
    config = tiny("train.steps=6", "train.checkpoint_every=3", *ROPE)
    train(config, tmp_path / "one", progress=False)
    for name in ("resumed", "back"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/step_00000006")
    succeed(torchrun(TRAIN, tmp_path, "cut", "resumed"))
    shutil.copytree(tmp_path / "cut/checkpoints", tmp_path / "back/checkpoints", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "back/checkpoints/step_00000006")
    train(config, tmp_path / "back", resume=True, progress=False)
    expected = read_log(tmp_path / "one")
    for name in ("cut", "resumed", "back"):
        torch.testing.assert_close(column(tmp_path / name, "loss"), column(tmp_path / "one", "loss"), atol=1e-5, rtol=0)
        for row, other in zip(expected, read_log(tmp_path / name), strict=True):
            assert other.get("effective_rank", 0) == pytest.approx(row.get("effective_rank", 0), rel=1e-3)
        weights = read_model(latest_checkpoint(tmp_path / name))
        for key, tensor in load_file(latest_checkpoint(tmp_path / "one") / "model.safetensors").items():
            torch.testing.assert_close(weights[key], tensor, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_of_a_cut_model_train_as_eager_ones_of_a_whole_one(tiny, tmp_path):
    """Two image sizes, the views' two more. Blocks are traced, and as many graphs as may be kept are enough."""
    words = ("objective=views", *ROPE, "views.small=2", "data.train_scales=[1.0, 2.0]", "train.steps=4")
    train(tiny(*words), tmp_path / "whole", progress=False)
    (tmp_path / "one").mkdir()
    save_config(tiny(*words, "train.compile=true"), tmp_path / "one/config.yaml")
    succeed(torchrun(TRACED + TRAIN + COUNTED, tmp_path, "cut"))
    torch.testing.assert_close(column(tmp_path / "cut", "loss"), column(tmp_path / "whole", "loss"), atol=1e-4, rtol=0)
    for rank in range(2):
        assert 0 < int((tmp_path / f"graphs-{rank}").read_text()) <= train_module.GRAPHS
