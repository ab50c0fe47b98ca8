"""A short test of the oldest versions that pyproject.toml declares, for an environment that has them.

    pip install --constraint tests/floors.txt ...; python tests/floors.py

Encoders with and without RoPE at three sizes, two training steps, evaluation; the tests proper run on the newest
versions.
"""

import sys
import tempfile
from pathlib import Path

import torch

from hjepa import create_encoder
from hjepa.cli import main
from hjepa.versions import versions

TINY = ("train.steps=2", "train.batch_size=8", "train.threads=1", "train.mixed_precision=no", "data.limit=32",
        "model.depth=1", "model.embed_dim=32", "model.num_heads=2", "model.predictor.embed_dim=32",
        "model.predictor.depth=1", "model.predictor.num_heads=2", "evaluate.gallery=40",
        "evaluate.queries=20")  # fmt: skip
VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


def encoders() -> None:
    """Another size than the trained one, and a table that is resampled for it."""
    for use_rope in (True, False):
        encoder = create_encoder("vit_tiny_patch16_224", img_size=(32, 128), vit=VIT, use_rope=use_rope)[0].eval()
        for size in ((32, 128), (64, 64), (40, 72)):
            tokens = encoder(torch.randn(2, 3, *size))
            assert tokens.shape == (2, 1 + size[0] * size[1] // 64, 48) and tokens.isfinite().all(), (use_rope, size)


def commands(folder: Path) -> None:
    for use_rope in ("true", "false"):
        run = folder / use_rope
        assert main(["train", "--run", str(run), f"model.rope.use_rope={use_rope}", *TINY]) == 0
        assert main(["evaluate", "--run", str(run), "--sizes", "32,64"]) == 0


if __name__ == "__main__":
    print(versions())
    encoders()
    with tempfile.TemporaryDirectory() as made:
        commands(Path(made))
    print("the oldest versions run")
    sys.exit(0)
