"""How a large folder of pictures opens, and whether its pictures come as fast as a training step takes them.

    python -m benchmarks.feeding --folder pictures --out benchmarks/feeding.json
                                                             makes 1.28 M links and 50,000 files there, removes them
    python -m benchmarks.feeding --links 2000 --files 200    small: a check only

    open       seconds to list the links in 1,000 class folders, then to open the index in two more processes (with its
               pages dropped from memory first, and once more), and what the last one holds: MiB of its own, MiB shared
    pictures   files of 96 pixels (noise over a gradient), none kept in memory, configs/masks.yaml on one thread: what a
               picture costs in the step and in the feed, and how fast training is with 0, 1 and 2 workers

Not covered: disks and network stores (the files are in the page cache), GPUs, several processes.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hjepa.build import build_model, load_split
from hjepa.config import load_config
from hjepa.data import sources
from hjepa.files import write_whole
from hjepa.train.feed import Feed
from hjepa.train.optimizer import build_optimizer
from hjepa.versions import versions

CLASSES = 1000
OPEN = """
import sys, time
from hjepa.data.images import load_data
import torch
def held():
    lines = (line.split() for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    sizes = {name[:-1]: int(size) / 1024 for name, size, _ in lines}
    return sizes["Private_Dirty"], sizes["Rss"]
before, start = held(), time.perf_counter()
data = load_data("imagefolder", path=sys.argv[1], root=sys.argv[2])
seconds, after = time.perf_counter() - start, held()
own = after[0] - before[0]
print(len(data), round(seconds, 2), round(own, 1), round(after[1] - before[1] - own, 1))
"""


def make(folder: Path, count: int, linked: bool) -> None:
    """`count` files in CLASSES class folders, fewer where there are fewer than ten files for each, of 500 different
    pictures; linked: those of a class are one file."""
    classes = max(1, min(CLASSES, count // 10))
    for label in range(classes):
        own = folder / f"n{label:08d}"
        own.mkdir(parents=True)
        for number in range(count // classes + (label < count % classes)):
            file = own / f"{own.name}_{number}.JPEG"
            if linked and number:
                os.link(own / f"{own.name}_0.JPEG", file)
            else:
                file.write_bytes(jpeg((label + 7 * number) % 500))
        then = time.time() - 60
        os.utime(own, (then, then))  # as if it had been made a minute ago
    os.utime(folder, (then, then))


@lru_cache(maxsize=500)
def jpeg(seed: int, side: int = 96) -> bytes:
    """A picture of noise over a gradient."""
    rng, found = np.random.default_rng(seed), io.BytesIO()
    slope = np.add.outer(np.arange(side), np.arange(side))[..., None] * rng.uniform(0, 0.8, 3)
    Image.fromarray((slope + rng.integers(0, 80, (side, side, 3))).astype(np.uint8)).save(found, "JPEG", quality=90)
    return found.getvalue()


def opened(folder: Path, cache: Path) -> dict[str, Any]:
    """Pictures, seconds, own and shared MiB of a fresh process that opens the folder."""
    said = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), str(cache)], capture_output=True, text=True, check=True
    )
    return dict(zip(("pictures", "seconds", "own_mib", "shared_mib"), map(float, said.stdout.split()), strict=True))


def drop(cache: Path) -> None:
    """Drop the index from the page cache."""
    for file in cache.rglob("*"):
        if file.is_file():
            with file.open("rb") as open_file:
                os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(folder: Path, cache: Path, steps: int) -> dict[str, float]:
    """Of a picture: milliseconds of processor time in the step and in the feed. Of training, by number of workers:
    pictures per second, and the share of the time that steps waited for pictures."""
    sources.MEMORY = 0
    torch.set_num_threads(1)
    words = (f"data.path={folder}", f"data.root={cache}", "data.name=imagefolder", "data.limit=null",
             "train.mixed_precision=no")  # fmt: skip
    config = load_config(Path(__file__).resolve().parent.parent / "configs" / "masks.yaml", words)
    size, data = config.train.batch_size, load_split(config, "train")
    model = build_model(config).train()
    optimizer = build_optimizer(model, lr=1e-4)

    def step(arguments: dict[str, Any]) -> None:
        model(**arguments).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def feed(workers: int) -> Iterator[Any]:
        config.train.num_workers, cpu = workers, torch.device("cpu")
        return iter(Feed(config, data, range(steps + 1), [slice(0, size)], config.model.patch_size, cpu))

    batches = feed(0)
    step(next(batches))
    start = time.process_time()
    rest = list(batches)
    fed = time.process_time()
    for arguments in rest:
        step(arguments)
    each = 1000 / steps / size
    found = {"step, ms": each * (time.process_time() - fed), "feed, ms": each * (fed - start)}
    for workers in (0, 1, 2):
        batches, waited = feed(workers), 0.0
        step(next(batches))
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            arguments = next(batches)
            waited += time.perf_counter() - asked
            step(arguments)
        seconds = time.perf_counter() - start
        found[f"{workers} workers, pictures/s"] = steps * size / seconds
        found[f"{workers} workers, waited"] = waited / seconds
    return {name: round(number, 3) for name, number in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feeding")
    parser.add_argument("--folder", type=Path, help="where to make the pictures; they are removed afterwards")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--links", type=int, default=1_280_000)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root, found = Path(temporary), dict[str, Any]()
        make(root / "links", options.links, linked=True)
        for name in ("made", "opened cold", "opened again"):
            found[name] = opened(root / "links", root / "cache")
            if name == "made":
                drop(root / "cache")
            print(name, json.dumps(found[name]), flush=True)
        make(root / "files", options.files, linked=False)
        found["rates"] = rates(root / "files", root / "cache", options.steps)
    found |= {"load": os.getloadavg()[0], "versions": versions()}
    print(json.dumps(found["rates"], indent=1), "load", found["load"])
    if options.out:
        write_whole(options.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
