"""A run's encoder, taken back from its checkpoints, exported for timm, published and loaded by name.

An export is a folder in timm's own layout:

    model.safetensors   timm's keys: of the plain transformer with RoPE off, of timm's rotary one (Eva) where that
                        rotates alike; else plain ones with a marker that plain timm refuses by name
    config.json         timm's architecture and arguments, mean and std of the data, and under "hjepa" what timm has
                        no word for: RoPE above all
    rope.safetensors    learned frequencies, only where there are any

timm loads it with `checkpoint_path=`, `local-dir:` or `hf-hub:` and gives the same tokens; where it has no model that
rotates alike (`hjepa.nn.timm_rope`) it refuses the architecture's name, ``hjepa_rotary_...``. `load_pretrained` gives
the encoder as it was trained, from older exports too. A plain encoder without a position embedding is exported with
one of zeros, which adds nothing, because timm's models expect one.

Writing and checking checkpoints is in `hjepa.train.checkpoint`; import it from here.
Not covered: export of the predictor.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .build import build_encoders, encoder_arguments
from .config import Config, DataConfig, flat_config, load_config
from .data.images import ImageData, seeded
from .files import user_path
from .inputs import UserError
from .nn.encoders import ContextEncoder, TargetEncoder, create_encoder
from .nn.timm_rope import ARCHITECTURE, from_timm, rotary_model
from .nn.vit import timm_arguments
from .train.checkpoint import (
    WEIGHTS,
    CheckpointError,
    first_line,
    latest_checkpoint,
    load_checkpoint,
    pictures_of,
    read_model,
    read_state,
    read_weights,
    save_checkpoint,
    trained_config,
    weights_at,
    write_json,
    write_weights,
)

__all__ = [
    "CheckpointError", "build_encoders", "export_encoder", "latest_checkpoint", "load_checkpoint", "load_pretrained",
    "load_run", "read_state", "save_checkpoint",
]  # fmt: skip

CONFIG, ROPE = "config.json", "rope.safetensors"
UNKNOWN = "hjepa_rotary_"  # in front of an architecture that timm would build without rotation: timm refuses the name
MARKER = "rotary_positions.load_with_hjepa"  # a key that no plain timm model has
WHICH = ("target", "context")
Encoder = ContextEncoder | TargetEncoder


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export; one that holds checkpoints too is a run."""
    return (folder / CONFIG).is_file() and not (folder / "checkpoints").is_dir()


def load_run(run_dir: str | Path, which: str = "target") -> tuple[Encoder, Config]:
    """The encoder of a run's newest whole checkpoint, built as it was trained, in eval mode, and the run's config.

    The encoder knows the mean and standard deviation of its training's pixels: `pixel_mean`, `pixel_std`.

    which: "target" or "context".

    Raises:
        FileNotFoundError: run_dir is not a run, or has no checkpoint.
        ValueError: another `which`, a damaged checkpoint, or a config.yaml that is not what was trained, named.
    """
    if which not in WHICH:
        raise UserError(f"which={which!r} is not one of {', '.join(WHICH)}")
    encoder, config, _ = _load_run(user_path(run_dir), which)
    return encoder, config


def _load_run(run_dir: Path, which: str) -> tuple[Encoder, Config, dict[str, Any]]:
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} is not a run: it has no config.yaml")
    config = load_config(run_dir / "config.yaml")
    path = latest_checkpoint(run_dir)
    if path is None:
        raise FileNotFoundError(f"{run_dir} has no checkpoint")
    trained = trained_config(path) or config
    _check_unedited(run_dir / "config.yaml", flat_config(config), flat_config(trained))
    encoder = _pick(build_encoders(trained), which)
    _load(encoder, read_model(path, f"{which}_encoder."), weights_at(path))
    state = read_state(path)
    _note_pixels(encoder, state["extra"])
    return encoder.eval(), config, state


def _check_unedited(file: Path, found: dict[str, Any], trained: dict[str, Any]) -> None:
    """Refuse a config of other encoders or pictures than those trained; pictures may have moved."""
    for key in found:
        bound = key.startswith(("model.", "data.", "objective")) and key not in ("data.root", "data.path")
        if bound and found[key] != trained[key]:
            what = f"{file} has {key}={found[key]}, but the run was trained with {key}={trained[key]}"
            raise UserError(f"{what}; set it back")


def changed_pictures(folder: Path, data: ImageData, options: DataConfig) -> str:
    """A line for the reader of a run where the training pictures found now are not those it was trained on, else "".

    data: the training split that `options` name. Exports and checkpoints of older versions do not know theirs, and
    another data set or folder than the run's own is no change.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged checkpoints `load_run` has said
        path = None if is_export(folder) else latest_checkpoint(folder)
    before = read_state(path)["extra"].get("pictures") if path else None
    own = load_config(folder / "config.yaml").data if before else options
    same = [(each.name, user_path(each.path or "").resolve()) for each in (own, options)]
    now = pictures_of(data)
    if not before or same[0] != same[1] or before == now:
        return ""
    those = f"those that {folder.name} was trained on ({before['number']})"
    return f"the training pictures found now ({now['number']}) are not {those}: test pictures may be among them"


def _pick(encoders: tuple[ContextEncoder, TargetEncoder], which: str) -> Encoder:
    return encoders[0] if which == "context" else encoders[1]


def _note_pixels(encoder: Encoder, known: dict[str, Any]) -> None:
    """Mean and standard deviation of the pixels in training, where they are known."""
    if known.get("mean") and known.get("std"):
        encoder.pixel_mean, encoder.pixel_std = tuple(known["mean"]), tuple(known["std"])


def _load(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit: {' '.join(str(error).split())[:200]}") from None


# ---- exports


def export_encoder(
    run_dir: str | Path, out: str | Path, which: str = "target", *, push_to: str | None = None
) -> Path:
    """Write a run's encoder to the folder `out` and return it; push_to="user/name" also publishes it.

    Afterwards `timm.create_model("local-dir:OUT")` or `timm.create_model(NAME, checkpoint_path=OUT/model.safetensors,
    num_classes=0, **model_args of config.json)` gives the transformer, or refuses one it cannot rotate;
    `load_pretrained(OUT)` gives the encoder.

    Raises:
        FileNotFoundError, ValueError: as `load_run`; a push_to that is not user/name; an `out` that is a run.
        ConnectionError: the hub cannot be reached or refuses; the local files are written by then.
    """
    if push_to is not None:
        _check_hub_name(push_to)
    if which not in WHICH:
        raise UserError(f"which={which!r} is not one of {', '.join(WHICH)}")
    folder = Path(out)
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        raise UserError(f"{folder} is a run; an export has a folder of its own; nearest: {folder / 'export'}")
    encoder, config, state = _load_run(user_path(run_dir), which)
    folder.mkdir(parents=True, exist_ok=True)
    rotary = rotary_model(encoder, encoder.vit.state_dict()) if encoder.rope is not None else None
    write_weights(folder / WEIGHTS, timm_weights(encoder) if rotary is None else rotary[1])
    frequencies = encoder.rope.state_dict() if encoder.rope is not None else {}
    if frequencies:
        write_weights(folder / ROPE, frequencies)
    described = _export_config(encoder, config, state, which)
    if rotary is not None:
        sizes = {name: described["model_args"][name] for name in ("img_size", "dynamic_img_size")}
        described |= {"architecture": ARCHITECTURE, "model_args": sizes | rotary[0]}
        described["hjepa"]["weights"] = "timm rotary"
    write_json(folder / CONFIG, described)
    if push_to is not None:
        _push(folder, push_to)
    return folder


def timm_weights(encoder: Encoder) -> dict[str, Tensor]:
    """State dict with the keys of a plain timm model; a missing position embedding becomes zeros.

    Where the encoder rotates, a marker among them keeps a plain model from loading them without rotation.
    """
    vit = encoder.vit
    weights = vit.state_dict()
    if not encoder.use_absolute:
        tokens = encoder.num_patches + (0 if vit.no_embed_class else encoder.num_prefix_tokens)
        weights["pos_embed"] = torch.zeros(1, tokens, encoder.embed_dim)
    return weights if not encoder.strategies else weights | {MARKER: torch.ones(1)}


def _export_config(encoder: Encoder, config: Config, state: dict[str, Any], which: str) -> dict[str, Any]:
    arguments = encoder_arguments(config)
    size = config.data.image_size
    return {
        "architecture": arguments["encoder_type"] if not encoder.strategies else UNKNOWN + arguments["encoder_type"],
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": {"img_size": size, "dynamic_img_size": True, **timm_arguments(arguments["vit"])},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "num_classes": 0,
            "mean": state["extra"].get("mean"),
            "std": state["extra"].get("std"),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "first_conv": "patch_embed.proj",
        },
        "hjepa": {
            "which": which,
            "step": state["step"],
            "encoder": arguments,
            "config": state["config"],
        },
    }


def load_pretrained(name_or_folder: str | Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of an export, a local folder or "user/name" on the Hugging Face hub, in eval mode, and config.json.

    The encoder knows its training's pixels, as from `load_run`.

    Raises:
        FileNotFoundError: neither a folder nor a hub name.
        CheckpointError: files that are not a whole export of hjepa.
        ConnectionError: the hub cannot be reached, or has no such repository.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = _download(str(name_or_folder))
    try:
        config = json.loads((folder / CONFIG).read_text())
        arguments, which = config["hjepa"]["encoder"], config["hjepa"]["which"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder / CONFIG} is missing: not an export of hjepa") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / CONFIG} has no 'hjepa' section: not an export of hjepa") from None
    try:
        with seeded(0):
            encoder = _pick(create_encoder(**arguments), which)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no encoder of hjepa: {first_line(error)}") from None
    weights = _exported(folder / WEIGHTS)
    weights.pop(MARKER, None)
    if config["hjepa"].get("weights") == "timm rotary":
        weights = from_timm(encoder, weights)
    _load(encoder.vit, _drop_zero_embedding(encoder, weights), folder / WEIGHTS)
    if encoder.rope is not None and encoder.rope.state_dict():
        _load(encoder.rope, _exported(folder / ROPE), folder / ROPE)
    _note_pixels(encoder, config.get("pretrained_cfg") or {})
    return encoder.eval(), config


def _exported(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a whole export of hjepa")
    return read_weights(path)


def _drop_zero_embedding(encoder: Encoder, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights if encoder.use_absolute else {k: t for k, t in weights.items() if k != "pos_embed"}


def _check_hub_name(name: str) -> None:
    if name.count("/") != 1 or not all(name.split("/")) or " " in name:
        raise UserError(f"hub name {name!r} must be of the form user/name")


def _push(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add hjepa encoder")
    except Exception as error:
        raise ConnectionError(f"could not publish {name!r}: {first_line(error)}; the files are in {folder}") from None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/")) or name.endswith("/"):
        raise FileNotFoundError(f"{name} is neither a folder nor a hub name of the form user/name")
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, ROPE]))
    except Exception as error:
        raise ConnectionError(f"could not load {name!r} from the hub: {first_line(error)}") from None
