"""A patch layer of principal components, held to a singular value decomposition, and what training leaves of it."""

import shutil

import pytest
import torch
from conftest import TINY, draw_pictures
from safetensors.torch import load_file
from torch.nn import functional as F

from hjepa.build import load_split
from hjepa.config import load_config
from hjepa.train import train
from hjepa.train.checkpoint import latest_checkpoint
from hjepa.train.whitening import components

LAYER = "vit.patch_embed.proj.weight"


def test_outputs_are_the_components_each_shrunk_by_what_is_added():
    torch.manual_seed(0)
    patches = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    weight, bias = components(patches, width=5, added=0.7)
    outputs = patches @ weight.T + bias
    centred = patches - patches.mean(0)
    left, length, _ = torch.linalg.svd(centred, full_matrices=False)
    variances = (length**2 / 499)[:5]
    wanted = left[:, :5] * length[:5] / (variances + 0.7).sqrt()
    wanted = 0.6 * wanted / (wanted**2).sum(0).div(499).mean().sqrt()
    signs = (outputs * wanted).sum(0).sign()
    torch.testing.assert_close(outputs * signs, wanted, rtol=1e-8, atol=1e-8)


def small(tmp_path, *overrides):
    if not (tmp_path / "pictures").exists():
        draw_pictures(tmp_path / "pictures")
    return load_config(None, [*TINY, f"data.path={tmp_path / 'pictures'}", *overrides])


def test_training_leaves_the_layer_as_it_is_and_goes_on_from_a_checkpoint(tmp_path):
    config = small(tmp_path, "train.whiten_patches=0.1", "train.steps=4", "train.checkpoint_every=2")
    train(config, tmp_path / "run", progress=False)
    held = load_file(latest_checkpoint(tmp_path / "run") / "model.safetensors")
    data, side = load_split(config, "train"), config.model.patch_size
    images = data.at_size(config.data.image_size, range(len(data)))
    patches = F.unfold(images, side, stride=side).transpose(1, 2).flatten(0, 1)
    weight, _ = components(patches, config.model.embed_dim, 0.1)
    for encoder in ("context_encoder", "target_encoder"):
        torch.testing.assert_close(held[f"{encoder}.{LAYER}"].flatten(1), weight.float(), rtol=1e-4, atol=1e-5)
    train(config, tmp_path / "again", progress=False)
    shutil.rmtree(latest_checkpoint(tmp_path / "again"))
    assert latest_checkpoint(tmp_path / "again").name == "step_00000002"
    train(config, tmp_path / "again", resume=True, progress=False)
    again = load_file(latest_checkpoint(tmp_path / "again") / "model.safetensors")
    assert all(torch.equal(held[name], again[name]) for name in held)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.embed_dim=200"], "patches of 8 x 8 px have 192 components"),
        (["train.init_from=openmoji-rope"], "train.init_from=openmoji-rope has a patch layer of its own"),
        (["model.pretrained=true"], "model.pretrained=true has a patch layer of its own"),
        (["train.whiten_patches=0"], "train.whiten_patches=0.0 must be above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, overrides, said):
    with pytest.raises(ValueError, match=said):
        train(small(tmp_path, "train.whiten_patches=0.1", *overrides), tmp_path / "run", progress=False)
