"""Published encoders of timm, read like our own: pictures of any data set -> features of the model's own pooling.

timm's models say themselves how they are meant to be read, and that is kept: mean and standard deviation of the
pixels, the pooling in front of the classifier (CLS token, mean of the patches, attention pooling), and the sizes they
take. Transformers that can resample or rotate their positions (`dynamic_img_size`) are read at every multiple of
their patch, others at their own size alone:

    pixels of a data set, its mean and std -> the model's -> forward_features -> forward_head(pre_logits=True) [B, D]

Weights come from the Hugging Face hub, from a file, or are random (the baseline). A file may hold a classifier of any
number of classes, which is left out; every other weight must have its place.

Source: timm (Wightman, 2019), `create_model`, `pretrained_cfg` and `forward_head`.
Not covered: fine-tuning, dense features, the text half of image-text models.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn

from ..files import user_path
from ..inputs import UserError, nearest, patch_grid, size_pair, size_text
from ..nn.vit import other_patch

RGB = tuple[float, float, float]
AVERAGED_FIRST = ("state_dict_ema", "model_ema", "state_dict", "model")  # the order in which timm takes them
NO_WEIGHTS = (  # what reading a file and filling a model raise where it holds none that fit
    RuntimeError, SafetensorError, UnpicklingError, OSError, EOFError, KeyError, AttributeError, TypeError,
)  # fmt: skip


class PublishedEncoder(nn.Module):
    """A timm model as `resolution_transfer` reads encoders: images `[B, 3, h, w]` -> features `[B, D]`.

    Args:
        model: a timm model without classifier.
        mean, std: of the pixels that `forward` gets, three numbers each, white = 1.

    `input_size` (height, width) is the size it was made for; `any_size` says whether it takes others; `patch_size` is
    None where it has no patches.
    """

    def __init__(self, model: nn.Module, mean: RGB, std: RGB) -> None:
        super().__init__()
        made_for: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        self.name, self.model = str(made_for.get("architecture")), model
        self.pixel_mean, self.pixel_std = mean, std  # of what it is given
        self.patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        self.input_size = size_pair(made_for["input_size"][1:])
        self.any_size = bool(getattr(model, "dynamic_img_size", False)) or not made_for.get("fixed_input_size", False)
        theirs, ours = ([torch.tensor(v).view(3, 1, 1) for v in pair] for pair in (
            (made_for["mean"], made_for["std"]), (mean, std)
        ))  # fmt: skip
        self.register_buffer("scale", ours[1] / theirs[1], persistent=False)
        self.register_buffer("offset", (ours[0] - theirs[0]) / theirs[1], persistent=False)

    def check_size(self, size: Any) -> None:
        """Raise ValueError on an image size in pixels that the model does not take."""
        pixels = size_pair(size)
        if not self.any_size and pixels != self.input_size:
            own = size_text(self.input_size)
            raise UserError(f"{self.name} takes images of {own} px alone, not {size_text(pixels)}; nearest: {own}")
        if self.patch_size is not None:
            try:
                patch_grid(pixels, self.patch_size)
            except ValueError as error:
                raise UserError(f"{self.name}: {error}") from None

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B, D]`, or tokens `[B, prefix + N, D]` of a model that was made without pooling.

        Raises:
            ValueError: a size that the model does not take, or a feature map instead of features.
        """
        self.check_size(tuple(images.shape[-2:]))
        tokens = self.model.forward_features(images * self.scale + self.offset)  # type: ignore[operator]
        features = self.model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        if features.dim() > 3:
            raise UserError(f"{self.name} gives a map {list(features.shape)}, not features: made without pooling")
        return features


def published_encoder(
    name: str, mean: RGB, std: RGB, *, checkpoint: str | Path | None = None, pretrained: bool = True
) -> PublishedEncoder:
    """A published encoder in eval mode.

    Args:
        name: a timm model, such as "vit_small_patch16_rope_224.naver_in1k".
        mean, std: of the data that it will see, as `ImageData` has them.
        checkpoint: a file of weights (safetensors, or a torch file of tensors alone) instead of the hub's.
        pretrained: with neither, random weights, the same each time.

    Raises:
        ValueError: no model of timm, a model that has no published weights, a file that does not fit.
        FileNotFoundError: no such file.
        ConnectionError: the weights cannot be fetched.
    """
    if not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(name):
        near = nearest(name.split(".")[0], timm.list_models()) or "none"
        raise UserError(f"{name!r} is not a timm model; nearest: {near}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = _create(name, pretrained and checkpoint is None)
    if checkpoint is not None:
        _load(model, user_path(checkpoint))
    return PublishedEncoder(model, mean, std).eval()


def published_encoders(
    names: Sequence[str], mean: RGB, std: RGB, *, checkpoint: str | Path | None = None, pretrained: bool = True
) -> dict[str, PublishedEncoder]:
    """Name -> encoder, each followed by "NAME, random init" where it has trained weights.

    Raises:
        ValueError: a checkpoint for several models or beside pretrained=False; as `published_encoder`.
    """
    if checkpoint is not None and (len(names) > 1 or not pretrained):
        raise UserError(f"--checkpoint {checkpoint} is for one model: give one --timm, and no --no-pretrained")
    found: dict[str, PublishedEncoder] = {}
    for name in dict.fromkeys(names):
        found[name] = published_encoder(name, mean, std, checkpoint=checkpoint, pretrained=pretrained)
        if pretrained:
            found[f"{name}, random init"] = published_encoder(name, mean, std, pretrained=False)
    return found


def _create(name: str, pretrained: bool) -> nn.Module:
    """The model without classifier; with positions for any size where it can have them."""
    choices: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {})
    for options in choices:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        except RuntimeError as error:  # a tag that does not exist, or weights that were never published
            tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
            raise UserError(f"{name!r}: {_line(error)}; published weights of this model: {tags}") from None
        except Exception as error:
            if not pretrained:
                raise
            raise ConnectionError(
                f"weights of {name!r} could not be fetched from the hub ({_line(error)}); give a local file with "
                "--checkpoint FILE, or --no-pretrained for random weights"
            ) from None
    raise AssertionError("unreachable: no option is left to be refused")


def _load(model: nn.Module, path: Path) -> None:
    """Every weight of the file into the model, in the way that timm translates published files."""
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"checkpoint {path} does not exist; nearest: {path.parent / near if near else 'none'}")
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        weights = _read(path)
        _check_patch(weights, model, path)
        weights = translate(weights, model) if translate else weights
        found = model.load_state_dict({k: t for k, t in weights.items() if not _of_classifier(k, model)}, strict=False)
    except UserError:
        raise
    except NO_WEIGHTS as error:
        raise UserError(f"checkpoint {path} does not fit {_name(model)}: {_line(error)}") from None
    wrong = [f"{key} is missing" for key in found.missing_keys]
    wrong += [f"{key} has no place" for key in found.unexpected_keys]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"checkpoint {path} does not fit {_name(model)}: {wrong[0]}{more}")


def _read(path: Path) -> dict[str, Any]:
    """The weights that timm takes from a file; a line on stderr where a training's file holds several sets of them,
    averaged ones mostly."""
    if path.suffix == ".safetensors":
        return load_state_dict(str(path))
    with torch.serialization.safe_globals([argparse.Namespace]):  # of a training's arguments
        held = torch.load(path, map_location="cpu", weights_only=True)
    there = [name for name in AVERAGED_FIRST if isinstance(held, dict) and held.get(name) is not None]
    if len(there) > 1:
        print(f"hjepa: checkpoint {path}: read is its {there[0]}, not its {there[1]}", file=sys.stderr)
    return clean_state_dict(held[there[0]] if there else held)


def _check_patch(weights: dict[str, Any], model: nn.Module, path: Path) -> None:
    """Raise ValueError on weights of another patch size, which timm would resample without a word."""
    if found := other_patch(weights, model):
        theirs, ours = found
        named = re.sub(r"patch\d+", f"patch{theirs}", _name(model))
        near = nearest(named, timm.list_models(f"*patch{theirs}_*")) or "none"
        raise UserError(
            f"checkpoint {path} has patches of {theirs} pixels and {_name(model)} of {ours}; nearest: {near}"
        )


def _of_classifier(key: str, model: nn.Module) -> bool:
    named = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return any(key.startswith(f"{name}.") for name in ([named] if isinstance(named, str) else named))


def _name(model: nn.Module) -> str:
    return str(model.pretrained_cfg.get("architecture"))  # type: ignore[union-attr, operator]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
