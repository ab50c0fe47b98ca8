"""Claims of hjepa.train.checkpoint and hjepa.hub: whole or not at all, refused by name, the same encoder elsewhere."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from hjepa.build import build_encoders, build_model
from hjepa.cli import main
from hjepa.config import save_config
from hjepa.hub import (
    CheckpointError,
    export_encoder,
    latest_checkpoint,
    load_checkpoint,
    load_pretrained,
    load_run,
    read_state,
    save_checkpoint,
)
from hjepa.train import checkpoint as storage
from hjepa.train.optimizer import parameter_groups

ROPE = ("model.rope.use_rope=true", "model.rope.theta=100")
FILES = ("model.safetensors", "optimizer.pt", "state.json")


def trained(config, seed=0):
    """Model and optimiser after one step with random gradients, so that every state tensor differs from its start."""
    model = build_model(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
    optimizer.step()
    for block in model.context_encoder.vit.blocks:  # sharp attention, so that a rotation shows
        block.attn.qkv.weight.data *= 20
    model.target_encoder.set_schedule(0.5, 0.5, 1)
    model.target_encoder.update_from_context_encoder(model.context_encoder, 0)
    return model, optimizer


def make_run(config, folder: Path, steps=(5, 10)):
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    for step in steps:
        model, optimizer = trained(config, step)
        save_checkpoint(folder, step, model, optimizer, config, {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    return model, optimizer


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- saving and loading


def test_weights_and_optimiser_come_back_bit_for_bit(tiny, tmp_path):
    model, optimizer = make_run(tiny(*ROPE, "model.rope.learnable=true"), tmp_path)
    other, other_optimizer = trained(tiny(*ROPE, "model.rope.learnable=true"), seed=99)
    state = load_checkpoint(latest_checkpoint(tmp_path), other, other_optimizer)
    assert same(model.state_dict(), other.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            assert same(optimizer.state[p], other_optimizer.state[q])
    assert (state["step"], state["extra"]["mean"]) == (10, [0.1, 0.2, 0.3])


def test_the_two_newest_are_kept(tiny, tmp_path):
    make_run(tiny(), tmp_path, steps=(1, 20, 3, 100))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000020", "step_00000100"]


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_earlier_checkpoints_whole(tiny, tmp_path, monkeypatch, name):
    """The disk fills up in the middle of each of the three files."""
    model, optimizer = make_run(tiny(), tmp_path)
    before = snapshot(tmp_path)
    opened, saved = storage.write_file, storage.save_file

    def full_file(path, writer):
        opened(path, writer)
        if path.name == name:
            os.truncate(path, 10)
            raise OSError(28, "No space left on device")

    def full_weights(tensors, path, metadata):
        saved(tensors, path, metadata)
        full_file(path, lambda file: None) if name == FILES[0] else None

    monkeypatch.setattr(storage, "write_file", full_file)
    monkeypatch.setattr(storage, "save_file", full_weights)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 15, model, optimizer, tiny())
    assert snapshot(tmp_path) == before
    assert read_state(latest_checkpoint(tmp_path))["step"] == 10


@pytest.mark.parametrize("share", [0.5, 1.2])
def test_a_file_that_the_system_will_not_write_is_an_os_error_with_its_name(tiny, tmp_path, share):
    """Not simulated: the system's limit on file size stops the weights, then the optimiser (which is larger)."""
    model, optimizer = make_run(tiny(), tmp_path)
    before, saved = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    weights, moments = (latest_checkpoint(tmp_path) / name for name in FILES[:2])
    limit = int(share * weights.stat().st_size)
    assert share < 1 or limit < moments.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, saved[1]))
    try:
        with pytest.raises(OSError, match=FILES[int(share)] + " could not be written: .*too large"):
            save_checkpoint(tmp_path, 15, model, optimizer, tiny())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, saved)
    assert snapshot(tmp_path) == before


def test_a_crash_while_writing_is_invisible_and_cleaned_up_later(tiny, tmp_path, monkeypatch):
    """A killed process runs no clean-up: the half-written folder stays, under a name that is no checkpoint."""
    model, optimizer = make_run(tiny(), tmp_path)
    replace = os.replace
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *a, **k: None)
    monkeypatch.setattr(storage.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 15, model, optimizer, tiny())
    monkeypatch.undo()
    assert os.replace is replace and len(list((tmp_path / "checkpoints").glob(".tmp-*"))) == 1
    assert read_state(latest_checkpoint(tmp_path))["step"] == 10
    save_checkpoint(tmp_path, 20, model, optimizer, tiny())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]


def test_a_users_copy_of_a_checkpoint_is_neither_removed_nor_taken_for_the_newest(tiny, tmp_path):
    model, optimizer = make_run(tiny(), tmp_path)
    saved = tmp_path / "checkpoints"
    for name in ("step_00000005_best", "step_00000010_best"):
        shutil.copytree(saved / name[:13], saved / name)
    assert latest_checkpoint(tmp_path).name == "step_00000010"
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, tiny())
    names = ["step_00000005_best", "step_00000010_best", "step_100000000", "step_99999999"]
    assert sorted(path.name for path in saved.iterdir()) == names
    assert latest_checkpoint(tmp_path).name == "step_100000000"


def test_as_many_checkpoints_stay_as_the_config_says(tiny, tmp_path):
    config = tiny("train.keep_checkpoints=3")
    model, optimizer = make_run(config, tmp_path)
    for step in range(11, 16):
        save_checkpoint(tmp_path, step, model, optimizer, config)
    assert sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir()) == [13, 14, 15]


# ---- refusing


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "empty"])
def test_damage_is_refused_by_name_and_nothing_changes(tiny, tmp_path, name, damage):
    make_run(tiny(), tmp_path)
    path = latest_checkpoint(tmp_path)
    data = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (path / name).write_bytes({"truncated": data[:middle], "one bit": flipped, "empty": b""}[damage])
    before = snapshot(tmp_path)
    model, optimizer = trained(tiny(), seed=7)
    weights, moments = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    with pytest.raises(CheckpointError, match=f"step_00000010.{name}"):
        load_checkpoint(path, model, optimizer)
    assert same(weights, model.state_dict()) and moments["state"].keys() == optimizer.state_dict()["state"].keys()
    with pytest.warns(UserWarning, match=f"going back to step_00000005: .*{name}"):
        assert latest_checkpoint(tmp_path).name == "step_00000005"
    assert snapshot(tmp_path) == before


def test_a_changed_step_is_refused(tiny, tmp_path):
    make_run(tiny(), tmp_path, steps=(5,))
    state = tmp_path / "checkpoints/step_00000005/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 500}))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint: .*state.json does not match its own SHA-256"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [{"step": "5"}, {"step": True}, {"sha256": None}, {"config": []}, {"extra": 3}])
def test_state_of_the_wrong_type_is_refused_even_if_it_is_signed(tiny, tmp_path, change):
    make_run(tiny(), tmp_path, steps=(5,))
    path = tmp_path / "checkpoints/step_00000005/state.json"
    state = json.loads(path.read_text()) | change
    path.write_text(json.dumps(state | {"self": storage._digest_of(state)}))
    with pytest.raises(CheckpointError, match=f"state.json has {next(iter(change))}=.* not of type"):
        read_state(path.parent)


def test_a_foreign_checkpoint_is_refused(tiny, tmp_path):
    """A folder of another tool with files of the same names."""
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    torch.save({}, folder / "optimizer.pt")
    (folder / "state.json").write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match=r"state.json lacks the marker 'hjepa-checkpoint': a foreign checkpoint"):
        load_checkpoint(folder, build_model(tiny()))


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_a_pickle_with_code_is_not_run_even_with_matching_hashes(tiny, tmp_path, monkeypatch):
    make_run(tiny(), tmp_path, steps=(5,))
    path = latest_checkpoint(tmp_path)
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    (path / "optimizer.pt").write_bytes(pickle.dumps(Payload()))
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["optimizer.pt"] = storage._sha256(path / "optimizer.pt")
    state["self"] = storage._digest_of(state)
    (path / "state.json").write_text(json.dumps(state))
    model, optimizer = trained(tiny(), seed=1)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"optimizer.pt does not fit"):
        load_checkpoint(path, model, optimizer)
    assert not (tmp_path / "executed").exists() and same(weights, model.state_dict())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.depth=3", r"context_encoder.vit.blocks.2.* is in the model and not in the file"),
        ("model.depth=1", r"context_encoder.vit.blocks.1.* is in the file and not in the model"),
        ("model.patch_size=16", r"context_encoder.vit.pos_embed is \[1, 16, 32\], not \[1, 4, 32\]"),
    ],
)
def test_another_architecture_is_refused_with_the_key_that_differs(tiny, tmp_path, override, message):
    make_run(tiny("model.level_weights=[1.0]"), tmp_path, steps=(5,))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(latest_checkpoint(tmp_path), build_model(tiny("model.level_weights=[1.0]", override)))


# ---- taking the encoder out


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("which", ["target", "context"])
def test_load_run_gives_the_encoder_of_the_newest_checkpoint(tiny, tmp_path, which):
    model, _ = make_run(tiny(*ROPE), tmp_path)
    encoder, config = load_run(tmp_path, which)
    assert same(encoder.state_dict(), getattr(model, f"{which}_encoder").state_dict())
    assert type(encoder).__name__ == f"{which.title()}Encoder" and not encoder.training and config == tiny(*ROPE)
    with pytest.raises(ValueError, match="which='teacher' is not one of target, context"):
        load_run(tmp_path, "teacher")


@pytest.mark.parametrize("edit", ["model.num_heads=1", "objective=views", "data.image_size=64"])
def test_an_encoder_is_built_as_trained_and_a_config_file_that_says_otherwise_is_refused(tiny, tmp_path, edit):
    make_run(tiny(*ROPE), tmp_path)
    save_config(tiny(*ROPE, edit), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=rf"config.yaml has {edit}, but the run was trained with"):
        load_run(tmp_path)
    save_config(tiny(*ROPE, "data.path=moved", "train.steps=99"), tmp_path / "config.yaml")
    assert load_run(tmp_path)[1].data.path == "moved"


def test_a_checkpoint_without_a_config_is_read_by_the_config_file(tiny, tmp_path):
    model, _ = make_run(tiny(*ROPE), tmp_path)
    file = latest_checkpoint(tmp_path) / "state.json"
    state = json.loads(file.read_text()) | {"config": {}}
    file.write_text(json.dumps(state | {"self": storage._digest_of(state)}))
    assert same(load_run(tmp_path)[0].state_dict(), model.target_encoder.state_dict())


def test_what_is_not_a_run_is_said(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run: it has no config.yaml"):
        load_run(tmp_path)
    save_config(tiny(), tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        load_run(tmp_path)


@pytest.mark.parametrize("class_token", ["true", "false"])
def test_plain_timm_loads_an_export_and_gives_the_same_tokens(tiny, tmp_path, class_token):
    make_run(tiny(f"model.class_token={class_token}"), tmp_path / "run")
    out = export_encoder(tmp_path / "run", tmp_path / "out")
    encoder, _ = load_run(tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    by_path = timm.create_model(
        config["architecture"], checkpoint_path=out / "model.safetensors", num_classes=0, **config["model_args"]
    ).eval()
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    for model in (by_path, by_folder):
        assert torch.equal(model.forward_features(images()), encoder(images()))
        assert torch.equal(model.forward_features(images(64)), encoder(images(64)))
    assert by_folder.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("absolute", ["true", "false"])
@pytest.mark.parametrize("kind", ["kind=axial", "learnable=true", "kind=mixed"])
def test_load_pretrained_gives_the_rotating_encoder_from_timm_s_rotary_weights(tiny, tmp_path, absolute, kind):
    make_run(tiny(*ROPE, f"model.use_absolute={absolute}", f"model.rope.{kind}"), tmp_path / "run")
    out = export_encoder(tmp_path / "run", tmp_path / "out")
    ours, config = load_pretrained(out)
    expected, _ = load_run(tmp_path / "run")
    assert same(ours.state_dict(), expected.state_dict()) and not ours.training
    assert torch.equal(ours(images(64)), expected(images(64)))
    assert (out / "rope.safetensors").exists() == (kind != "kind=axial")
    assert config["hjepa"]["encoder"]["rope_theta"] == 100
    rotary = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    assert set(load_file(out / "model.safetensors")) == set(rotary.state_dict())
    for block, rotating in zip(rotary.blocks, expected.vit.blocks, strict=True):
        assert torch.equal(block.attn.qkv.weight, rotating.attn.qkv.weight)


MAPPED = {
    "axial": ("model.rope.kind=axial",),
    "hybrid": ("model.use_absolute=true",),
    "learned theta": ("model.rope.learnable=true",),
    "mixed": ("model.rope.kind=mixed",),
    "interpolated": ("model.rope.strategy=interpolate", "model.class_token=false"),
    "normalized": ("model.rope.coordinates=normalized",),
}


@pytest.mark.parametrize("name", MAPPED)
def test_timm_s_own_rotary_model_gives_what_a_rotary_export_was_trained_to_give(tiny, tmp_path, name):
    make_run(tiny(*ROPE, "model.use_absolute=false", *MAPPED[name]), tmp_path / "run")
    out = export_encoder(tmp_path / "run", tmp_path / "out")
    expected, _ = load_run(tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    by_path = timm.create_model(
        config["architecture"], checkpoint_path=out / "model.safetensors", num_classes=0, **config["model_args"]
    ).eval()
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    ours, _ = load_pretrained(out)
    for size in (32, 64):
        tokens = expected(images(size))
        assert torch.equal(ours(images(size)), tokens)
        for model in (by_path, by_folder):
            torch.testing.assert_close(model.forward_features(images(size)), tokens, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ("model.rope.strategy=interpolate", "model.class_token=true"),
        ("model.rope.strategy=ntk_by_parts",),
        ("model.use_alibi=true",),
        ("model.rope.use_rope=false", "model.use_alibi=true"),
    ],
)
def test_timm_refuses_an_export_that_it_would_not_rotate_alike(tiny, tmp_path, options):
    make_run(tiny(*ROPE, *options), tmp_path / "run")
    out = export_encoder(tmp_path / "run", tmp_path / "out")
    with pytest.raises(RuntimeError, match="hjepa_rotary_vit_tiny_patch16_224"):
        timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0)
    arguments = json.loads((out / "config.json").read_text())["model_args"]
    with pytest.raises(RuntimeError, match=r"rotary_positions.load_with_hjepa"):
        timm.create_model(
            "vit_tiny_patch16_224", checkpoint_path=out / "model.safetensors", num_classes=0, **arguments
        )
    expected, _ = load_run(tmp_path / "run")
    assert torch.equal(load_pretrained(out)[0](images(64)), expected(images(64)))


def test_a_rotary_export_of_an_older_version_still_loads(tiny, tmp_path):
    """Then the file had plain timm keys and timm's architecture, whatever the rotation."""
    make_run(tiny(*ROPE), tmp_path / "run")
    out, (expected, _) = export_encoder(tmp_path / "run", tmp_path / "out"), load_run(tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    config["architecture"] = "vit_tiny_patch16_224"
    del config["hjepa"]["weights"]
    (out / "config.json").write_text(json.dumps(config))
    save_file(expected.vit.state_dict(), out / "model.safetensors")
    assert torch.equal(load_pretrained(out)[0](images(64)), expected(images(64)))


def test_a_foreign_folder_is_no_export(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json is missing: not an export"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(CheckpointError, match="no 'hjepa' section"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "rope.safetensors"])
def test_an_export_without_one_of_its_files_is_named(tiny, tmp_path, name):
    make_run(tiny(*ROPE, "model.rope.kind=mixed"), tmp_path / "run")
    out = export_encoder(tmp_path / "run", tmp_path / "out")
    (out / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing: not a whole export"):
        load_pretrained(out)


@pytest.mark.parametrize("encoder", [{"foo": 1}, ["vit_tiny_patch16_224"], {"encoder_type": "vit_unknown"}])
def test_an_export_that_describes_no_encoder_is_refused(tmp_path, encoder):
    (tmp_path / "config.json").write_text(json.dumps({"hjepa": {"encoder": encoder, "which": "target"}}))
    with pytest.raises(CheckpointError, match=r"config.json describes no encoder of hjepa"):
        load_pretrained(tmp_path)


# ---- the hub, replaced by a folder


class Hub:
    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, name, exist_ok):
        (self.folder / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


def test_published_and_loaded_by_name(tiny, tmp_path, monkeypatch):
    make_run(tiny(*ROPE), tmp_path / "run")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(hub.folder / name))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--push-to", "someone/encoder"]) == 0
    encoder, _ = load_pretrained("someone/encoder")
    assert same(encoder.state_dict(), load_run(tmp_path / "run")[0].state_dict())


def test_without_network_one_line_says_so_and_the_export_stays(tiny, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("[Errno -3] Temporary failure in name resolution\nand forty more lines")

    make_run(tiny(), tmp_path / "run")
    monkeypatch.setattr(Hub, "create_repo", offline)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConnectionError) as error:
        export_encoder(tmp_path / "run", tmp_path / "out", push_to="someone/encoder")
    assert "someone/encoder" in str(error.value) and "\n" not in str(error.value)
    load_pretrained(tmp_path / "out")
    with pytest.raises(ConnectionError, match="could not load 'someone/encoder' from the hub"):
        load_pretrained("someone/encoder")


def test_names_that_are_neither_folder_nor_hub_name(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub name of the form user/name"):
        load_pretrained("encoder")
    with pytest.raises(ValueError, match="'encoder' must be of the form user/name"):
        export_encoder(tmp_path, tmp_path / "out", push_to="encoder")


def test_a_loaded_encoder_does_not_move_the_random_state(tiny, tmp_path):
    make_run(tiny(), tmp_path / "run")
    export_encoder(tmp_path / "run", tmp_path / "out")
    before = torch.get_rng_state()
    load_run(tmp_path / "run")
    load_pretrained(tmp_path / "out")
    build_encoders(tiny())
    assert torch.equal(torch.get_rng_state(), before)
