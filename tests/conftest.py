"""Fixtures of the tests that train: a small folder of pictures and a config that learns from it in a second."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from hjepa.config import Config, load_config

TINY = (
    "data.name=imagefolder", "data.image_size=32", "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
    "model.predictor.embed_dim=32", "model.predictor.depth=1", "model.predictor.num_heads=2",
    "model.level_weights=[1.0, 0.5]", "train.steps=12", "train.batch_size=8", "train.warmup=4", "train.threads=1",
    "train.mixed_precision=no", "train.log_every=1", "train.eval_every=6", "train.checkpoint_every=5",
    "evaluate.knn_k=3",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every run
    settings.load_profile("repeatable")
    config.addinivalue_line("markers", "slow: starts processes and takes more than ten seconds")


def draw_pictures(folder: Path) -> Path:
    """train/ and test/ with two classes of 32 x 32 pictures: horizontal and vertical stripes, with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 6)):
        for label in ("across", "down"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                stripes = 96 * (np.arange(32) // rng.integers(2, 6) % 2)[:, None] + np.zeros((32, 32))
                grey = stripes if label == "across" else stripes.T
                pixels = grey[..., None] + rng.integers(0, 160, size=(32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `draw_pictures` draws, once for all tests."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def tiny(pictures: Path) -> Callable[..., Config]:
    """tiny("train.steps=3", ...) is the small config with these overrides."""
    return lambda *overrides: load_config(None, [*TINY, f"data.path={pictures}", *overrides])
