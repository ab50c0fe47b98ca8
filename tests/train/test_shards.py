"""Claims of hjepa.train.shards: parts are read by any number of processes, and are there whole or not at all.

Files are written once training has gone on, or a second late.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_processes import FSDP, column, succeed
from torch.distributed.checkpoint import metadata as parts

from hjepa.build import build_model
from hjepa.cli import main
from hjepa.config import load_config
from hjepa.hub import CheckpointError, export_encoder, latest_checkpoint, load_checkpoint, load_pretrained, load_run
from hjepa.train import checkpoint as storage
from hjepa.train import shards
from hjepa.train.loop import _start_from, train
from hjepa.train.optimizer import build_optimizer

pytestmark = pytest.mark.slow
OPTIONS = ("train.steps=6", "train.checkpoint_every=2", "model.rope.use_rope=true", "model.rope.learnable=true")
FILES = ("shards/__0_0.distcp", "shards/__1_0.distcp", "shards/.metadata")
COMMON = """
import json, os, sys, time
from pathlib import Path
import torch.distributed as dist
from accelerate import Accelerator
from hjepa.build import build_model
from hjepa.config import load_config
from hjepa.train import loop, shards
from hjepa.train.checkpoint import begin_checkpoint, load_checkpoint
from hjepa.train.optimizer import build_optimizer
from hjepa.train.sharding import prepare
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
config = load_config(folder / "one/config.yaml")
def said(name, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        (folder / f"{name}{rank}.txt").write_text(f"{type(error).__name__}: {error}")
"""
WRITES = """
write, update, full, done, seen = shards._Writer.write_data, loop._Run.update, False, 0, []
def counted(self, step):
    global done
    result, done = update(self, step), step + 1
    return result
def late(self, plan, planner):
    number, until = int(str(self.path).split(".tmp-")[1].split("-")[0]), time.monotonic() + 60
    if loop._Run.update is counted and number < 6:
        while done <= number and time.monotonic() < until:
            time.sleep(0.01)
        seen.append([self.path.parts[self.path.parts.index("checkpoints") - 1], number, done])
    else:
        time.sleep(1)
    if full and rank == 1 and ".tmp-6-" in str(self.path):
        raise OSError(28, "No space left on device")
    return write(self, plan, planner)
shards._Writer.write_data, loop._Run.update = late, counted
loop.train(config, folder / "cut", progress=False)
bad = loop.torch.tensor(float("nan"))
loop._Run.update = lambda self, step: self.watch("loss", bad, step) if step == 4 else update(self, step)
said("diverged", loop.train, config, folder / "diverged", progress=False)
loop._Run.update, full = update, True
said("full", loop.train, config, folder / "diverged", progress=False, resume=True)
full, os.environ["ACCELERATE_USE_FSDP"] = False, "false"
begin, copied = shards.dcp.async_save, []
def weighed(tensors, **options):
    copied.append(sum(tensor.nbytes for tensor in tensors.values()))
    return begin(tensors, **options)
shards.dcp.async_save, loop._Run.update, done = weighed, counted, 0
loop.train(config, folder / "shared", progress=False)
(folder / f"copied{rank}.json").write_text(str(copied))
(folder / f"seen{rank}.json").write_text(json.dumps(seen))
"""
READS = """
for name, cut in (("ddp", "false"), ("four", "true"), ("shared-ddp", "false"), ("shared-four", "true")):
    os.environ["ACCELERATE_USE_FSDP"] = cut
    loop.train(config, folder / name, progress=False, resume=True)
def cut(config):
    model = build_model(config)
    make = lambda: build_optimizer(model, kind="adamw", lr=1e-3, muon_lr=1e-3, weight_decay=0.05)
    model, optimizer = prepare(Accelerator(cpu=True), model, make)
    return model, optimizer.optimizer
start = folder / "cut/checkpoints/step_00000004"
model, optimizer = cut(config)
load_checkpoint(start, model, optimizer)
assert model.predictor.blocks[0].mlp.fc1.weight.placements[0].is_shard()
begin_checkpoint(folder / "copy", 4, model, optimizer, config, {}, dist.new_group(backend="gloo"))()
config.model.depth = 3
said("other", load_checkpoint, start, *cut(config))
"""


def launch(processes: int, script: str, folder: Path) -> None:
    (folder / "script.py").write_text(COMMON + script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [*command, str(folder / "script.py"), str(folder)]
    succeed(subprocess.run(words, env=FSDP, capture_output=True, text=True, timeout=600))


def resumable(folder: Path, source: str, name: str) -> Path:
    """A copy of a run as it was after step 4."""
    shutil.copytree(folder / source, folder / name)
    shutil.rmtree(folder / name / "checkpoints/step_00000006")
    return folder / name


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> Path:
    """one: a run of one process. cut and shared: of two, in slices and whole on each; read by four."""
    folder = tmp_path_factory.mktemp("shards")
    train(load_config(None, [*TINY, f"data.path={pictures}", *OPTIONS]), folder / "one", progress=False)
    launch(2, WRITES, folder)
    for name in ("four", "ddp", "back"):
        resumable(folder, "cut", name)
        resumable(folder, "shared", f"shared-{name}")
    launch(4, READS, folder)
    shutil.copy(folder / "one/config.yaml", folder / "copy")
    return folder


def loaded(path: Path):
    """Model and optimiser of a checkpoint, in one process."""
    model = build_model(load_config(path.parents[1] / "config.yaml"))
    optimizer = build_optimizer(model, kind="adamw", lr=1.0, muon_lr=1.0, weight_decay=0.5)
    load_checkpoint(path, model, optimizer)
    return model, optimizer


def step(run: Path, number: int = 4) -> Path:
    return run / f"checkpoints/step_{number:08d}"


def copied(runs: Path, tmp_path: Path) -> Path:
    """A copy of the run in slices, to be damaged; its newest checkpoint."""
    shutil.copytree(runs / "cut", tmp_path / "run")
    return step(tmp_path / "run", 6)


def signed(path: Path) -> None:
    """Make the digests fit what is there."""
    state = json.loads((path / "state.json").read_text())
    state["sha256"] = {name: storage._sha256(path / name) for name in state["sha256"]}
    (path / "state.json").write_text(json.dumps(state | {"self": storage._digest_of(state)}))


def test_slices_of_two_processes_give_one_and_four_the_state_at_their_step(runs):
    """Weights and moments, by name and number as in an uncut run's files; over four, bit for bit those over two."""
    (model, optimizer), (copy, copied_optimizer) = loaded(step(runs / "cut")), loaded(step(runs / "copy"))
    whole, whole_optimizer = loaded(step(runs / "one"))
    later = loaded(step(runs / "one", 6))[0].state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], copy.state_dict()[name])
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=0)
    assert max((tensor - later[name]).abs().max() for name, tensor in whole.state_dict().items()) > 1e-3
    found, again, expected = (o.state_dict() for o in (optimizer, copied_optimizer, whole_optimizer))
    assert found["param_groups"] == again["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == again["state"].keys() == expected["state"].keys()
    for number, values in expected["state"].items():
        assert values["step"] == found["state"][number]["step"] == 4
        for what, tensor in values.items():
            assert torch.equal(found["state"][number][what], again["state"][number][what])
            torch.testing.assert_close(found["state"][number][what], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("of_two", "prefix"), [("cut", ""), ("shared", "shared-")])
def test_one_process_four_of_ddp_and_four_of_fsdp_go_on_from_parts_of_two(runs, of_two, prefix):
    names = of_two, *(f"{prefix}{name}" for name in ("back", "ddp", "four"))
    train(load_config(runs / "one/config.yaml"), runs / names[1], resume=True, progress=False)
    for name in names:
        torch.testing.assert_close(column(runs / name, "loss"), column(runs / "one", "loss"), atol=1e-5, rtol=0)
    assert [(step(runs / name, 6) / "shards").is_dir() for name in names] == [True, False, True, True]


def test_what_two_processes_hold_alike_is_there_once_as_it_was_at_its_step(runs):
    """A DDP run's weights and moments equal those of one process, though written late; a process copies its share."""
    (model, optimizer), (whole, whole_optimizer) = loaded(step(runs / "shared")), loaded(step(runs / "one"))
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), atol=1e-5, rtol=0)
    found, expected = optimizer.state_dict(), whole_optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], atol=1e-5, rtol=0)
    whole_bytes = sum(tensor.nbytes for tensor in whole.state_dict().values())
    whole_bytes += sum(tensor.nbytes for values in expected["state"].values() for tensor in values.values())
    copied = [json.loads((runs / f"copied{rank}.json").read_text()) for rank in range(2)]
    assert [sum(pair) for pair in zip(*copied, strict=True)] == [whole_bytes] * 3  # nothing twice
    assert all(0.4 < number / whole_bytes < 0.6 for number in copied[0])


def test_training_goes_on_while_several_processes_write_whether_the_model_is_cut_or_not(runs):
    for rank in range(2):
        seen = json.loads((runs / f"seen{rank}.json").read_text())
        assert [(run, number) for run, number, _ in seen] == [(r, n) for r in ("cut", "shared") for n in (2, 4)]
        assert all(done > number for _, number, done in seen)


@pytest.mark.parametrize("run", ["cut", "shared"])
def test_the_newest_are_kept_and_no_process_writes_the_whole(runs, run):
    assert sorted(path.name for path in (runs / run / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    path = step(runs / run, 6)
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == sorted([*FILES, "state.json"])
    whole = sum((path / name).stat().st_size for name in FILES[:2])
    assert all(0.4 < (path / name).stat().st_size / whole < 0.6 for name in FILES[:2])


def test_a_run_that_diverges_while_it_saves_names_the_checkpoint_then_written(runs):
    for rank in range(2):
        said = (runs / f"diverged{rank}.txt").read_text()
        assert said.startswith("TrainingDiverged: the loss is nan at step 5") and said.endswith("step_00000004")


def test_a_full_disk_of_one_process_stops_all_by_name_and_leaves_the_earlier_checkpoints(runs):
    for rank in range(2):
        said = (runs / f"full{rank}.txt").read_text()
        reason = "process 1: [Errno 28] No space left on device; last good checkpoint: "
        assert said.startswith(f"OSError: stopped at step 6: shards could not be written: {reason}")
        assert said.endswith("step_00000004")
    assert sorted(path.name for path in (runs / "diverged/checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert latest_checkpoint(runs / "diverged") == step(runs / "diverged")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "empty"])
def test_a_damaged_slice_is_named_and_the_earlier_checkpoint_taken(runs, tmp_path, capsys, name, damage):
    path = copied(runs, tmp_path)
    data = (path / name).read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    (path / name).write_bytes({"truncated": data[:middle], "one bit": flipped}.get(damage, b""))
    if damage == "missing":
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"step_00000006/{name}"):
        loaded(path)
    with pytest.warns(UserWarning, match=f"going back to step_00000004: .*{name}"):
        load_run(tmp_path / "run")
    assert main(["verify", str(tmp_path / "run")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step_00000004 whole" and name in lines[1]


def test_a_checkpoint_that_lost_all_slices_is_no_plain_one(runs, tmp_path):
    path = copied(runs, tmp_path)
    shutil.rmtree(path / "shards")
    with pytest.raises(CheckpointError, match=r"shards/.* is missing"):
        loaded(path)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_a_pickle_with_code_is_not_run_even_with_matching_hashes(runs, tmp_path, monkeypatch):
    path = copied(runs, tmp_path)
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    (path / "shards/.metadata").write_bytes(pickle.dumps(Payload()))
    signed(path)
    with pytest.raises(CheckpointError, match=r"shards cannot be read: it asks for posix.mkdir"):
        loaded(path)
    assert not (tmp_path / "executed").exists()


def test_getattr_in_a_pickle_reaches_nothing_but_the_enum_that_old_pythons_write_with_it(tmp_path):
    enum = parts._MEM_FORMAT_ENCODING
    for of, name, allowed in ((enum, "TORCH_CONTIGUOUS_FORMAT", True), (enum, "__init__", False),
                              (parts.Metadata, "__init__", False)):  # fmt: skip
        words = f"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n{of.__name__}\nV{name}\ntR."
        (tmp_path / ".metadata").write_bytes(words.encode())
        if allowed:
            assert shards._Reader(tmp_path).read_metadata() is getattr(enum, name)
        else:
            with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
                shards._Reader(tmp_path).read_metadata()


def test_another_architecture_is_refused_with_the_key_that_differs(runs):
    expected = r"shards is of another architecture: context_encoder.vit.blocks.2.attn.proj.bias is in the model and not"
    for rank in range(4):
        assert f"CheckpointError: {step(runs / 'cut')}/{expected}" in (runs / f"other{rank}.txt").read_text()
    deeper = load_config(runs / "one/config.yaml")
    deeper.model.depth = 3
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(step(runs / "cut"), build_model(deeper))


def test_a_run_in_slices_is_loaded_exported_evaluated_and_started_from(runs, tmp_path, capsys):
    model = loaded(step(runs / "cut", 6))[0]
    for which in ("target", "context"):
        encoder, _ = load_run(runs / "cut", which)
        expected = getattr(model, f"{which}_encoder").state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())
    export_encoder(runs / "cut", tmp_path / "out")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pretrained(tmp_path / "out")[0](images), model.target_encoder.eval()(images))
    assert main(["verify", str(runs / "cut")]) == 0
    assert main(["evaluate", "--run", str(runs / "cut"), "--sizes", "32", "--out", str(tmp_path / "results")]) == 0
    for start in (runs / "cut", step(runs / "cut", 6)):
        other = build_model(load_config(runs / "one/config.yaml"))
        _start_from(str(start), other)
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
