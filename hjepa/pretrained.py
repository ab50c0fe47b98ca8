"""Small encoders that come with the package, by name and without a network.

    import hjepa
    hjepa.list_pretrained()
    encoder = hjepa.load_pretrained("photographs-rope")

Each has a folder in hjepa/weights: an export of `hjepa.hub` in half precision, and README.md, its card: command,
config, seed, steps, minutes, processor, results, data and the terms that follow from them. Made from a run by

    python -m hjepa.pretrained RUN NAME

Not covered: one's own exports and the hub, which `hjepa.hub.load_pretrained` reads.
"""

import json
import sys
from pathlib import Path

import torch

from . import hub
from .config import Config, config_of
from .files import user_path
from .inputs import UserError, nearest
from .nn.encoders import ContextEncoder, TargetEncoder
from .train.checkpoint import STATE, write_json

WEIGHTS = Path(__file__).parent / "weights"


def list_pretrained() -> list[str]:
    """Names that `load_pretrained` takes, sorted."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / hub.CONFIG).is_file())


def load_pretrained(name: str) -> ContextEncoder | TargetEncoder:
    """An encoder that comes with the package, in float32 and eval mode.

    Raises:
        ValueError: no such name; the message has those there are, and the nearest. A run or export here of that name.
    """
    check_one(name)
    return hub.load_pretrained(_folder(name))[0]


def trained_config(name: str) -> Config:
    """The config that an encoder of the package was trained with."""
    return config_of(json.loads((_folder(name) / hub.CONFIG).read_text(encoding="utf-8"))["hjepa"]["config"], name)


def folder_of(name: str) -> Path:
    """The folder of an encoder that comes with the package, or else the user's own of that path.

    Raises:
        ValueError: nothing of that path, and an encoder of nearly that name; as `check_one`.
    """
    check_one(name)
    if name in list_pretrained():
        return _folder(name)
    folder = user_path(name)
    if not folder.exists() and (near := nearest(name, list_pretrained())):
        raise UserError(f"no folder {folder}, and no encoder of that name comes with the package; nearest: {near}")
    return folder


def check_one(name: str) -> None:
    """ValueError where a name is an encoder's that comes with the package, and a run's or export's in this folder."""
    here = Path(name)
    ours = name in list_pretrained() and here.resolve() != (WEIGHTS / name).resolve()
    if ours and (hub.is_export(here) or any((here / part).exists() for part in ("config.yaml", "checkpoints", STATE))):
        raise UserError(
            f"both a folder here and an encoder of the package are called {name}; say ./{name} for the folder, or "
            "rename it for the encoder"
        )


def _folder(name: str) -> Path:
    names = list_pretrained()
    if name not in names:
        near = nearest(name, names) or "none"
        raise UserError(f"pretrained encoder {name!r} is not one of {', '.join(names)}; nearest: {near}")
    return WEIGHTS / name


def ship(run: str | Path, name: str) -> Path:
    """Export a run's target encoder to hjepa/weights/NAME in half precision; the card is written by hand beside it."""
    folder = hub.export_encoder(run, WEIGHTS / name)
    about = json.loads((folder / hub.CONFIG).read_text(encoding="utf-8"))
    about["hjepa"]["config"]["data"] |= {"root": "data", "path": None}  # where pictures lay here is nobody's business
    write_json(folder / hub.CONFIG, about)
    for file in folder.glob("*.safetensors"):
        tensors = hub.read_weights(file)
        hub.write_weights(file, {k: t.half() if t.dtype == torch.float32 else t for k, t in tensors.items()})
    return folder


def card(name: str) -> str:
    """The card of an encoder: what it was trained on and how, what it can do, and under which terms."""
    return (_folder(name) / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(ship(*sys.argv[1:3]))
