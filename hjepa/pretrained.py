"""Small encoders that come with the package, by name and without a network.

    import hjepa
    hjepa.list_pretrained()
    encoder = hjepa.load_pretrained("photographs-rope")

Each has a folder in hjepa/weights: an export of `hjepa.hub` in half precision, and README.md, its card: command,
config, seed, steps, minutes, processor, results, data and the terms that follow from them.
Not covered: one's own exports and the hub, which `hjepa.hub.load_pretrained` reads.
"""

from pathlib import Path

from . import hub
from .inputs import nearest
from .nn.encoders import ContextEncoder, TargetEncoder

WEIGHTS = Path(__file__).parent / "weights"


def list_pretrained() -> list[str]:
    """Names that `load_pretrained` takes, sorted."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / hub.CONFIG).is_file())


def load_pretrained(name: str) -> ContextEncoder | TargetEncoder:
    """An encoder that comes with the package, in float32 and eval mode.

    Raises:
        ValueError: no such name; the message has those there are, and the nearest.
    """
    names = list_pretrained()
    if name not in names:
        near = nearest(name, names) or "none"
        raise ValueError(f"pretrained encoder {name!r} is not one of {', '.join(names)}; nearest: {near}")
    return hub.load_pretrained(WEIGHTS / name)[0]


def card(name: str) -> str:
    """The card of an encoder: what it was trained on and how, what it can do, and under which terms."""
    load_pretrained(name)
    return (WEIGHTS / name / "README.md").read_text(encoding="utf-8")
