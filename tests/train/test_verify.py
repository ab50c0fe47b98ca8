"""Claims of hjepa.train.checkpoint about digests: each file is read once for them, and `verify` reads all again."""

import os
from pathlib import Path

import pytest
import torch

from hjepa.build import build_model
from hjepa.cli import main
from hjepa.config import load_config
from hjepa.train import checkpoint as storage

SMALL = ["data.image_size=16", "model.patch_size=8", "model.embed_dim=16", "model.depth=1", "model.num_heads=2"]
SMALL += ["model.predictor.embed_dim=16", "model.predictor.depth=1", "model.predictor.num_heads=2"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 5 and 10."""
    config = load_config(None, SMALL)
    model = build_model(config)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for step in (5, 10):
        storage.save_checkpoint(tmp_path / "run", step, model, optimizer, config)
    return tmp_path / "run"


def test_a_file_is_hashed_once_until_it_is_written_again(run, monkeypatch):
    storage._HASHED.clear()
    digest, read = storage.hashlib.file_digest, []
    monkeypatch.setattr(storage.hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    found = storage.latest_checkpoint(run)
    for _ in range(2):
        storage.load_checkpoint(found, build_model(load_config(None, SMALL)))
    assert sorted(Path(name).name for name in read) == ["model.safetensors", "optimizer.pt"]
    file = found / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(storage.CheckpointError, match="does not match its SHA-256"):
        storage.read_state(found)


def test_verify_reads_every_checkpoint_again_and_names_the_damaged(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.split() == ["step_00000005", "whole", "step_00000010", "whole"]
    file = run / "checkpoints/step_00000005/optimizer.pt"
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # damage that no time stamp shows
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "optimizer.pt does not match its SHA-256" in said and "step_00000010 whole" in said
    assert main(["verify", str(run / "none")]) == 2
