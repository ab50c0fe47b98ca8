"""Published timm encoders: timm's own features at any size they take, from files, and one line where there are none.

Nothing is downloaded: the models are small ones, or large ones without their depth, with random weights.
"""

import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from hjepa.cli import main
from hjepa.data.images import IMAGENET, load_data
from hjepa.evaluate.published import PublishedEncoder, published_encoder, published_encoders
from hjepa.evaluate.results import rows_from_csv
from hjepa.evaluate.transfer import encode, resolution_transfer
from hjepa.inputs import UserError

PLAIN, ROTARY, DINO = "deit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224", "vit_tiny_patch16_dinov3_qkvb"
# the families that resample or rotate, each with the pooling it was made for
POOLED = {
    PLAIN: "token", ROTARY: "token", DINO: "avg", "deit_tiny_distilled_patch16_224": "token",
    "eva02_tiny_patch14_224": "avg", "vit_pe_spatial_tiny_patch16_512": "avg", "vit_pe_core_tiny_patch16_384": "map",
    "vit_base_patch16_siglip_224": "map",
}  # fmt: skip


def noise(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def weights_of(name: str, folder: Path, **options: object) -> tuple[torch.nn.Module, Path]:
    """A model of timm with weights of its own, and the file that timm's state dict makes."""
    torch.manual_seed(7)
    model = timm.create_model(name, dynamic_img_size=True, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # tables and tokens start as zeros in some
    save_file(model.state_dict(), folder / "model.safetensors")
    return model, folder / "model.safetensors"


@pytest.mark.parametrize("name", [PLAIN, ROTARY, DINO])
def test_a_file_gives_timms_own_features_at_two_sizes(name, tmp_path):
    model, file = weights_of(name, tmp_path)  # with a classifier, which is left out
    encoder = published_encoder(name, *IMAGENET, checkpoint=file)
    for size in ((224, 224), (96, 160)):
        images = noise(*size)
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encode(encoder, images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(POOLED))
def test_pooling_is_the_one_the_model_was_made_for(name):
    encoder = published_encoder(name, *timm_normalising(name), pretrained=False)
    assert encoder.any_size
    images = noise(2 * encoder.patch_size[0], 3 * encoder.patch_size[1])
    with torch.no_grad():
        tokens = encoder.model.forward_features(images)
    prefix, pooled = encoder.num_prefix_tokens, encode(encoder, images)
    assert tokens.shape[1] == prefix + 6
    if POOLED[name] == "map":
        expected = encoder.model.attn_pool(tokens)
    elif POOLED[name] == "avg":
        expected = tokens[:, prefix:].mean(1)
    else:
        expected = tokens[:, :prefix].mean(1)  # CLS; of a distilled model the mean of its two
    with torch.no_grad():
        torch.testing.assert_close(pooled, encoder.model.fc_norm(expected), atol=1e-5, rtol=1e-5)


def timm_normalising(name):
    made_for = timm.get_pretrained_cfg(name)
    return made_for.mean, made_for.std


def test_pixels_are_normalised_as_the_model_was_trained_whatever_the_data_did():
    """x of 0 to 1 -> (x - mean) / std of the data -> the encoder, which must see (x - 0.5) / 0.5."""
    name = "vit_pe_spatial_tiny_patch16_512"
    assert timm_normalising(name) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    mean, std = (0.8, 0.3, 0.1), (0.2, 0.4, 0.9)
    encoder, seen = published_encoder(name, mean, std, pretrained=False), []
    encoder.model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = noise(32, 32)
    normalised = torch.stack([(pixels[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)
    encode(encoder, normalised)
    torch.testing.assert_close(seen[0], 2 * pixels - 1, atol=1e-6, rtol=0)


def test_sizes_that_a_model_does_not_take_are_refused_by_name():
    encoder = published_encoder(PLAIN, *IMAGENET, pretrained=False)
    with pytest.raises(ValueError, match=r"deit_tiny_patch16_224: image size 100x100 is not a multiple .* nearest: 96"):
        encoder.check_size(100)
    fixed = published_encoder("mixer_s32_224", *IMAGENET, pretrained=False)
    with pytest.raises(ValueError, match="mixer_s32_224 takes images of 224 px alone, not 96x128; nearest: 224"):
        fixed(noise(96, 128))
    fixed.check_size(224)
    assert published_encoder("resnet10t", *IMAGENET, pretrained=False)(noise(50, 70)).shape == (2, 512)


def test_random_weights_are_the_same_each_time_and_leave_the_random_state():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again = (published_encoder(PLAIN, *IMAGENET, pretrained=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("blocks.3.attn.qkv.weight"), "blocks.3.attn.qkv.weight is missing$"),
        (lambda w: w.update({"extra.weight": torch.ones(2)}), "extra.weight has no place$"),
        (lambda w: w.update({"norm.weight": torch.ones(3)}), "size mismatch for norm.weight"),
        (lambda w: (w.clear(), w.update({"a": torch.ones(1)})), "is missing and 1"),
    ],
)
def test_a_file_with_other_weights_is_refused_and_not_half_loaded(change, reason, tmp_path):
    _, file = weights_of(PLAIN, tmp_path, num_classes=10)
    weights = dict(timm.models.load_state_dict(str(file)))
    change(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=reason):
        published_encoder(PLAIN, *IMAGENET, checkpoint=file)


def test_files_that_are_no_weights_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nearest: .*model.safetensors"):
        (tmp_path / "model.safetensors").write_bytes(b"no weights")
        published_encoder(PLAIN, *IMAGENET, checkpoint=tmp_path / "modle.safetensors")
    for file in (tmp_path / "model.safetensors", tmp_path / "model.pth"):
        file.write_bytes(b"no weights")
        with pytest.raises(ValueError, match="does not fit deit_tiny_patch16_224") as error:
            published_encoder(PLAIN, *IMAGENET, checkpoint=file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["timm", "I-JEPA", "CLIP", "nested"])
def test_weights_of_another_patch_size_are_not_resampled(layout, tmp_path):
    name = "vit_tiny_patch16_224"
    model, file = weights_of(name, tmp_path, num_classes=0, patch_size=32, depth=12)
    weights = model.state_dict()
    if layout != "timm":
        file = tmp_path / "weights.pth"
        torch.save({
            "I-JEPA": {"encoder": {f"module.{key}": weight for key, weight in weights.items()}, "epoch": 3},
            "CLIP": {"visual.class_embedding": weights["cls_token"][0, 0],
                     "visual.conv1.weight": weights["patch_embed.proj.weight"]},
            "nested": {"state_dict": {"model": weights}},
        }[layout], file)  # fmt: skip
    with pytest.raises(UserError, match=rf"has patches of 32 pixels and {name} of 16; nearest: vit_\w+_patch32_224"):
        published_encoder(name, *IMAGENET, checkpoint=file)


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
def test_of_two_sets_of_weights_in_a_file_read_once_the_one_taken_is_named(averaged, tmp_path, capsys, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: (read.append(file), load(file, **how))[1])
    weights, plain = weights_of(PLAIN, tmp_path, num_classes=0)[0].state_dict(), averaged.removesuffix("_ema")
    halves = {name: weight / 2 for name, weight in weights.items()}
    for zipped in (True, False):
        torch.save({plain: weights, averaged: halves}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        encoder = published_encoder(PLAIN, *IMAGENET, checkpoint=tmp_path / "a.pth")
        assert len(read) == 1 and not read.clear()
        assert torch.equal(encoder.model.state_dict()["norm.weight"], halves["norm.weight"])
        assert capsys.readouterr().err.splitlines() == [
            f"hjepa: checkpoint {tmp_path / 'a.pth'}: read is its {averaged}, not its {plain}"
        ]
    torch.save({plain: weights}, tmp_path / "a.pth")
    published_encoder(PLAIN, *IMAGENET, checkpoint=tmp_path / "a.pth")
    assert capsys.readouterr().err == ""


def test_names_are_checked_before_anything_is_built():
    with pytest.raises(ValueError, match="nearest: vit_small_patch16_rope_224"):
        published_encoder("vit_small_patch16_rop_224", *IMAGENET)
    with pytest.raises(ValueError, match=r"Invalid pretrained tag.*published weights.*rope_224.naver_in1k"):
        published_encoder("vit_small_patch16_rope_224.navr", *IMAGENET)
    with pytest.raises(ValueError, match="is for one model"):
        published_encoders([PLAIN, DINO], *IMAGENET, checkpoint="file")


def test_without_a_network_the_error_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, capsys):
    def refused(*anything):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["evaluate", "--timm", ROTARY, "--data", "openmoji", "--sizes", "224"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith(f"hjepa: error: weights of '{ROTARY}' could not be fetched")
    assert "--checkpoint FILE" in line and "--no-pretrained" in line


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Class folders of striped pictures; not the suite's own fixture, which the mutants run without."""
    folder, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 5)):
        for label in ("across", "down"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                grey = 96 * (np.arange(32) // rng.integers(2, 6) % 2)[:, None] + rng.integers(0, 160, size=(32, 32))
                pixels = (grey if label == "across" else grey.T).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


def test_transfer_reads_a_published_encoder_beside_its_random_weights(stripes, tmp_path):
    _, file = weights_of(PLAIN, tmp_path, num_classes=0)
    splits = [load_data("imagefolder", split, path=stripes) for split in ("train", "test")]
    encoders = published_encoders([PLAIN], splits[0].mean, splits[0].std, checkpoint=file)
    assert list(encoders) == [PLAIN, f"{PLAIN}, random init"]
    assert all(isinstance(encoder, PublishedEncoder) for encoder in encoders.values())
    rows = resolution_transfer(encoders, *splits, train_size=32, sizes=[48], knn_k=3)
    wide = [row for row in rows if row["metric"] == "effective_rank" and row["size"] == (48, 48)]
    ranks = {row["encoder"]: row["value"] for row in wide}
    assert len(set(ranks.values())) == 2 and all(value > 1 for value in ranks.values())


def test_the_command_reads_models_and_baselines_at_the_sizes_asked_for(stripes, tmp_path, capsys):
    words = ["evaluate", "--timm", PLAIN, "--timm", DINO, "--no-pretrained", "--data", "imagefolder"]
    words += ["--path", str(stripes), "--fit-size", "32", "--out", str(tmp_path / "e.csv")]
    assert main([*words, "--sizes", "32,48x64"]) == 0
    assert "readers fitted at 32 pixels" in capsys.readouterr().out
    rows = rows_from_csv(tmp_path / "e.csv")
    assert {row["size"] for row in rows} == {(32, 32), (48, 64)}
    names = list(dict.fromkeys(row["encoder"] for row in rows))
    assert names == [PLAIN, DINO, "raw pixels", "colour histogram", "HOG"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--timm", PLAIN, "--run", "r"], "--run and --timm exclude each other"),
        (["--timm", PLAIN, "--strategy", "ntk"], "--strategy goes with --run, not with --timm"),
        (["--timm", PLAIN, "--which", "context"], "--which goes with --run, not with --timm"),
        (["--timm", PLAIN, "--which", "target"], "--which goes with --run, not with --timm"),
        (["--timm", PLAIN, "--no-pretrained", "--path", "."], "--path is the folder of imagefolder; openmoji takes"),
        (["--timm", PLAIN, "--data", "stl10", "--path", "."], "stl10 takes --root; nearest: --data imagefolder"),
        (["--run", "r", "--fit-size", "32"], "--fit-size goes with --timm, not with --run"),
        (["--run", "r", "--no-pretrained"], "--no-pretrained goes with --timm"),
        (["--timm", PLAIN, "--data", "openmji"], "nearest: openmoji"),
        (["--timm", PLAIN, "--no-pretrained", "--sizes", "224,100"], "image size 100x100 is not a multiple"),
        (["--timm", "mixer_s32_224", "--no-pretrained", "--sizes", "96"], "takes images of 224 px alone"),
        (["--timm", PLAIN, "--no-pretrained", "--data", "imagefolder", "--path", "nowhere"], "nowhere does not exist"),
    ],
)
def test_a_mistake_with_published_models_is_one_line(words, reason, capsys):
    assert main(["evaluate", *words]) == 2
    out, err = capsys.readouterr()
    assert reason in err and err.count("\n") == 1 and out == ""
