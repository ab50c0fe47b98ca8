"""Feed damaged and random input to everything that reads input: each case gives an answer or a named error.

    python tests/fuzz.py                 11,000 cases (some minutes), seed 0
    python tests/fuzz.py images --seed 7 --count 100

An error is named if it is a ValueError, an OSError or a TypeError of ours (the message names the value), in one line.
Anything else fails: a KeyError or AttributeError, a message of several lines, a case of more than 20 seconds, a
process that dies, an input file that was changed.

The tests in this folder hold the text of each message; this is breadth. Not covered: Slurm, the hub.
"""

import argparse
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from hjepa.build import build_model
from hjepa.config import KEYS, default_config, load_config
from hjepa.data.folder import read_image
from hjepa.data.images import load_data
from hjepa.experiments.notebooks import find_parameters
from hjepa.experiments.sweep import load_sweep
from hjepa.hub import load_checkpoint, save_checkpoint
from hjepa.nn.encoders import create_encoder
from hjepa.train.checkpoint import STATE, _digest_of
from hjepa.train.optimizer import parameter_groups

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20
Case = Callable[[random.Random], None]
WORDS = ("", "nan", "inf", "-1", "0", "1e999", "${x}", "!!python/object:os.system", "[", "{a: 1}", "null", "true", "é")


def value(rng: random.Random, depth: int = 2) -> Any:
    """A random value of YAML: numbers at the edges, odd words, lists and mappings of such."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice([0, 1, -1, 2, 7, 64, 10**6, 10**30, True, False, None]),
        lambda: rng.choice([0.0, -0.5, 1e-30, 1e300, float("inf"), float("nan"), 0.5]),
        lambda: rng.choice(WORDS),
        lambda: "".join(chr(rng.randint(32, 0x2FFF)) for _ in range(rng.randint(0, 12))),
    ]
    if depth:
        kinds.append(lambda: [value(rng, depth - 1) for _ in range(rng.randint(0, 4))])
        kinds.append(lambda: {rng.choice([*WORDS, *KEYS]): value(rng, depth - 1) for _ in range(rng.randint(0, 3))})
    return rng.choice(kinds)()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut off, doubled, or replaced altogether."""
    found = bytearray(data)
    how = rng.randrange(5)
    if how == 0:
        del found[rng.randrange(len(found)) :]
    elif how == 1:
        found = bytearray(rng.randbytes(rng.randint(0, 400)))
    elif how == 2:
        place = rng.randrange(len(found))
        found[place:place] = found[: rng.randint(1, 200)]
    else:
        for _ in range(rng.choice([1, 3, 30])):
            found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def altered(rng: random.Random, tree: Any) -> Any:
    """The same nested dicts and lists with one part replaced, added or taken out."""
    if isinstance(tree, dict) and tree and rng.random() < 0.8:
        key = rng.choice(list(tree))
        if rng.random() < 0.15:
            return {k: v for k, v in tree.items() if k != key}
        if rng.random() < 0.15:
            return tree | {rng.choice([*WORDS, *KEYS]): value(rng)}
        return tree | {key: altered(rng, tree[key])}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        place = rng.randrange(len(tree))
        return [*tree[:place], altered(rng, tree[place]), *tree[place + 1 :]]
    return value(rng)


# ---- what reads input; each yields a function of one case


def yaml_files(path: Path, tree: Any, load: Callable[[Path], Any]) -> Case:
    """A YAML file of the tree with a part altered, now and then with damaged bytes."""

    def case(rng: random.Random) -> None:
        text = yaml.safe_dump(altered(rng, tree), allow_unicode=True).encode()
        path.write_bytes(damaged(rng, text) if rng.random() < 0.3 else text)
        load(path)

    return case


def configs(folder: Path) -> Iterator[Case]:
    yield yaml_files(folder / "config.yaml", OmegaConf.to_container(default_config()), load_config)  # type: ignore[call-overload]


def overrides(folder: Path) -> Iterator[Case]:
    def case(rng: random.Random) -> None:
        key = rng.choice(KEYS) if rng.random() < 0.8 else str(value(rng, 0))
        load_config(None, [f"{key}{rng.choice(['=', '=', '=', '', ' = ', '=='])}{value(rng)}" for _ in range(2)])

    yield case


def sweeps(folder: Path) -> Iterator[Case]:
    notebook = str(ROOT / "notebooks" / "07_resolution_transfer.ipynb")
    tree = {"notebook": notebook, "parameters": {"data": "openmoji", "quick": True}, "grid": {"steps": [1, 2]},
            "seeds": [0, 1], "max_parallel": 2, "executor": "local", "slurm": {}, "out": "out"}  # fmt: skip
    yield yaml_files(folder / "sweep.yaml", tree, load_sweep)


def notebooks(folder: Path) -> Iterator[Case]:
    data = (ROOT / "notebooks" / "solutions" / "07_resolution_transfer.ipynb").read_bytes()
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "x: int = 1\ny = [2]"}
    tree, path = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, folder / "a.ipynb"

    def case(rng: random.Random) -> None:
        text = json.dumps(altered(rng, altered(rng, tree))).encode()
        path.write_bytes(damaged(rng, data if rng.random() < 0.3 else text) if rng.random() < 0.6 else text)
        find_parameters(path)

    yield case


def checkpoints(folder: Path) -> Iterator[Case]:
    """Damaged files, and state that was altered and then signed again."""
    words = ["model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.predictor.embed_dim=16",
             "model.predictor.depth=1", "model.predictor.num_heads=2"]  # fmt: skip
    config = load_config(None, words)
    model = build_model(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    whole = save_checkpoint(folder / "whole", 3, model, optimizer, config)
    copy = folder / "copy"
    shutil.copytree(whole, copy)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    state = json.loads(files[STATE])

    def case(rng: random.Random) -> None:
        name = rng.choice(list(files))
        if rng.random() < 0.3:
            name, forged = STATE, altered(rng, altered(rng, state))
            if isinstance(forged, dict):
                forged["self"] = _digest_of(forged)
            data = json.dumps(forged).encode()
        else:
            data = damaged(rng, files[name])
        (copy / name).write_bytes(data)
        try:
            load_checkpoint(copy, model, optimizer)
        finally:
            unchanged = (copy / name).read_bytes() == data
            (copy / name).write_bytes(files[name])
            assert unchanged, f"{name} was changed by reading it"

    yield case


def images(folder: Path) -> Iterator[Case]:
    """Damaged image files: read one by one, and as a folder of pictures that skips what cannot be read."""
    noise, good = np.random.default_rng(0), []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        for mode in ("RGB", "L", "P"):
            stream = io.BytesIO()
            picture = Image.fromarray(noise.integers(0, 256, (24, 20, 3), np.uint8)).convert(mode)
            picture.convert("RGB" if kind in ("WEBP", "JPEG") and mode == "P" else mode).save(stream, kind)
            good.append((kind.lower(), stream.getvalue()))
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            (folder / split / label / "good.png").write_bytes(good[0][1])

    def case(rng: random.Random) -> None:
        kind, data = rng.choice(good)
        path = folder / "train" / "a" / f"bad.{kind}"
        path.write_bytes(damaged(rng, data))
        try:
            if rng.random() < 0.2:
                where: dict[str, Any] = dict(path=folder, image_size=16, on_corrupt="skip")
                pictures = load_data("imagefolder", **where)
                assert 2 <= len(pictures) + len(pictures.skipped) <= 3  # one may be for validation
                assert pictures.at_size(16).isfinite().all()
            else:
                read_image(path)
        finally:
            path.unlink()

    yield case


def indices(folder: Path) -> Iterator[Case]:
    """Indices, masks and positions of any dtype, shape and value into a small encoder."""
    vit = dict(patch_size=8, embed_dim=16, depth=1, num_heads=2)
    encoder, _ = create_encoder("vit_tiny_patch16_224", 32, use_rope=True, vit=vit)
    dtypes = (torch.int64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32)

    def tensor(rng: random.Random) -> Any:
        if rng.random() < 0.05:
            return value(rng, 1)
        shape = rng.choice([(2, 4), (2, 16), (1, 4), (3, 4), (4,), (2, 0), (2, 4, 2), (16, 2), (2, 16, 2), ()])
        numbers = torch.randint(-2, 18, shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        if rng.random() < 0.5:
            numbers = numbers.clamp(0, 15).sort(-1).values if shape else numbers
        return numbers.to(rng.choice(dtypes))

    def case(rng: random.Random) -> None:
        side = rng.choice([(32, 32), (32, 32), (16, 64), (30, 32), (8, 8)])
        shape = rng.choice([(2, 3, *side), (2, 3, *side), (2, 3, *side), (3, *side), (2, 1, *side)])
        name = rng.choice(["context_idx", "is_masked", "positions"])
        with torch.no_grad():
            out = encoder(torch.randn(shape), **{name: tensor(rng)})
        assert out.ndim == 3

    yield case


PARTS = {
    configs: 2500, overrides: 2500, sweeps: 1500, notebooks: 1000, checkpoints: 1000, images: 1500, indices: 1000
}  # fmt: skip


def too_slow(*_: Any) -> None:
    raise AssertionError(f"took more than {SECONDS} seconds")


def run(part: Callable[[Path], Iterator[Case]], count: int, seed: int) -> list[str]:
    """The failures of `count` cases; a case is repeated from (part, seed, its number) alone."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        (case,) = part(Path(folder))
        for number in range(count):
            signal.alarm(SECONDS)
            try:
                case(random.Random(f"{part.__name__} {seed} {number}"))
            except (ValueError, OSError) as error:
                if not str(error) or "\n" in str(error):
                    failures.append(f"case {number}: {type(error).__name__} of several lines or none: {error!r}")
            except Exception as error:
                failures.append(f"case {number}: {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
    return failures


def main() -> int:
    names = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description="Damaged and random input gives an answer or a named error.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(names)}")
    parser.add_argument("--count", type=int, help="cases of each part (default: 1000 to 2500)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"no part {sorted(unknown)[0]!r}; choose from {', '.join(names)}")
    signal.signal(signal.SIGALRM, too_slow)
    torch.set_num_threads(1)
    total = wrong = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in options.parts or names:
            count = options.count or PARTS[names[name]]
            failures = run(names[name], count, options.seed)
            total, wrong = total + count, wrong + len(failures)
            print(f"{name}: {count} cases, {len(failures)} wrong", flush=True)
            print("".join(f"  {failure}\n" for failure in failures[:10]), end="", flush=True)
    print(f"{total} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
