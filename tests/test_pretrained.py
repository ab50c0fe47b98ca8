"""Claims of hjepa.pretrained: encoders that come with the package load offline and say where they are from."""

import re
import zlib

import pytest
import torch

import hjepa
from hjepa import hub, pretrained
from hjepa.train import train

NAMES = hjepa.list_pretrained()
CARD = ("command", "config", "seed", "steps", "minutes", "processor", "results", "data", "terms")
MOST = 12_000_000  # bytes of all weights together, as they lie in a wheel


def test_four_encoders_of_one_shape_have_rotation_an_embedding_both_and_neither():
    encoders = [hjepa.load_pretrained(name) for name in NAMES if name.startswith("openmoji-")]
    switches = [(e.use_rope, e.use_absolute) for e in encoders]
    assert sorted(switches) == [(False, False), (False, True), (True, False), (True, True)]
    shapes = {(len(e.vit.blocks), e.vit.embed_dim, e.vit.blocks[0].attn.num_heads) for e in encoders}
    assert len(shapes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_loads_by_name_and_takes_other_sizes(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = hjepa.load_pretrained(name)
    assert not encoder.training and next(encoder.parameters()).dtype == torch.float32
    with torch.no_grad():
        for size in (32, 96):
            assert torch.isfinite(encoder(torch.randn(1, 3, size, size))).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_how_the_weights_were_made_and_under_which_terms(name):
    text = pretrained.card(name)
    assert [word for word in CARD if not re.search(rf"^\\| {word} \\|", text, flags=re.MULTILINE)] == []


def test_all_weights_together_stay_small():
    files = [file.read_bytes() for file in pretrained.WEIGHTS.rglob("*.safetensors")]
    assert sum(len(zlib.compress(file)) for file in files) < MOST
    assert sum(map(len, files)) < 12 * 2**20


def test_half_precision_changes_features_by_less_than_a_hundredth(tiny, tmp_path, monkeypatch):
    train(tiny("train.steps=2"), tmp_path / "run", progress=False)
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    pretrained.ship(tmp_path / "run", "small")
    assert pretrained.list_pretrained() == ["small"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole, half = hjepa.load_run(tmp_path / "run")[0](images), pretrained.load_pretrained("small")(images)
    assert (whole - half).norm() < 0.01 * whole.norm()


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=f"pretrained encoder '{NAMES[0]}s' is not one of .*; nearest: {NAMES[0]}"):
        hjepa.load_pretrained(f"{NAMES[0]}s")


def test_an_encoder_of_a_run_and_of_its_export_knows_the_pixels_of_its_training(tiny, tmp_path):
    train(tiny("train.steps=1", "data.mean=[0.1, 0.2, 0.3]", "data.std=[0.3, 0.2, 0.1]"), tmp_path, progress=False)
    export = hub.export_encoder(tmp_path, tmp_path / "out")
    for encoder in (hjepa.load_run(tmp_path)[0], hub.load_pretrained(export)[0]):
        assert (encoder.pixel_mean, encoder.pixel_std) == ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
        assert not any("pixel" in name for name in encoder.state_dict())
