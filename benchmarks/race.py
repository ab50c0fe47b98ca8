"""How soon a probe of validation photographs reads .50 (`make race`).

    HJEPA_DATA=FOLDER python -m benchmarks.race                        configs/photographs.yaml on all cores
    HJEPA_DATA=FOLDER python -m benchmarks.race --steps 90 train.lr=3e-3   another schedule, changes to the recipe

The learning rate's schedule (and the target encoder's) is that of a training of --steps steps, with a tenth of them
as warm-up, so another --steps is another race, not a longer one. Every --every steps a linear probe, fitted on
GALLERY training pictures, reads all validation pictures at the training size; the first reading at --goal, or the last
step, ends it. One of many readings is compared with the goal, so that chance, 1.6 points at 946 pictures, helps a
little.

The clock runs during training steps alone, views among them: not while pictures are loaded and decoded, not while the
probe reads. A row is appended to race.csv. Let nothing else run meanwhile: the load before is written down.
Not covered: more than one process.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import FOLDER, processor
from benchmarks.views import RECIPE, package
from hjepa.config import Config, load_config
from hjepa.data.images import ImageData
from hjepa.evaluate.readers import linear_probe, probe_hits
from hjepa.evaluate.results import csv_text
from hjepa.evaluate.transfer import encode, subset
from hjepa.files import write_whole
from hjepa.inputs import UserError
from hjepa.train.loop import TrainingDiverged, _due

TABLE = FOLDER / "race.csv"
GOAL, STEPS, EVERY, GALLERY = 0.5, 120, 10, 2000
COLUMNS = (
    "date", "processor", "instructions", "cores", "threads", "precision", "recipe", "overrides", "goal",
    "schedule_steps", "steps", "pictures", "minutes", "probe", "load_before",
)  # fmt: skip
PRECISION = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
WITHOUT_ROOT = ("openmoji", "imagefolder")  # data sets that are not in data.root


def configured(recipe: Path, steps: int, overrides: Sequence[str] = ()) -> Config:
    """The recipe under a schedule of `steps` steps, on all cores, with pictures from the folder in HJEPA_DATA.

    Raises:
        ValueError, FileNotFoundError: what `load_config` refuses, train.steps among the overrides, no such folder.
    """
    if any(word.split("=")[0].strip() == "train.steps" for word in overrides):
        raise UserError("train.steps is set by --steps, with the warm-up")
    config = load_config(recipe, [
        f"data.root={os.environ.get('HJEPA_DATA', 'data')}", f"train.steps={steps}", f"train.warmup={steps // 10}",
        f"train.threads={os.cpu_count()}", *overrides,
    ])  # fmt: skip
    if config.data.name not in WITHOUT_ROOT and not Path(config.data.root).expanduser().is_dir():
        what = f"folder {config.data.root} is not there"
        raise FileNotFoundError(f"{what}; set HJEPA_DATA to the folder that holds the pictures of {config.data.name}")
    return config


class Probe:
    """Accuracy of a linear probe on all validation pictures; a call reads an encoder."""

    def __init__(self, config: Config, train: ImageData, validation: ImageData) -> None:
        size, chosen = config.data.image_size, subset(len(train), GALLERY, seed=0)
        self.known, self.known_labels = train.at_size(size, chosen), train.labels[chosen]
        self.asked, self.asked_labels = validation.at_size(size), validation.labels
        self.pool = config.evaluate.pool

    def __call__(self, encoder: Any) -> float:
        x, y = (encode(encoder, images, pool=self.pool) for images in (self.known, self.asked))
        return probe_hits(linear_probe(x, self.known_labels), y, self.asked_labels).float().mean().item()


def race(
    config: Config,
    goal: float = GOAL,
    every: int = EVERY,
    *,
    make_reader: Callable[..., Callable[[Any], float]] = Probe,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train until a reading reaches `goal` or the steps are over; the part of the row that is measured.

    The steps are those of `hjepa.train.train`, in the same order. make_reader: from config, training and validation
    pictures to what reads the target encoder. clock: seconds; it is asked before and after each step.
    """
    with package(config) as run:
        read, feed = make_reader(config, run.train_data, run.validation_data), run.feed()
        seconds = accuracy = 0.0
        for step in range(config.train.steps):
            began = clock()
            run.step(step, feed, logging=False)
            seconds += clock() - began
            if _due(step + 1, every, config.train.steps):
                accuracy = read(run.unwrapped.target_encoder)
                pictures = (step + 1) * config.train.batch_size
                say(f"step {step + 1}: {pictures:,} pictures, {seconds / 60:.2f} min, probe {accuracy:.3f}")
                if accuracy >= goal:
                    break
        device, precision = run.accelerator.device.type, PRECISION[run.precision]
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "instructions": "" if device == "cuda" else instructions(),
        "cores": os.cpu_count(), "threads": config.train.threads, "precision": precision, "goal": goal,
        "schedule_steps": config.train.steps, "steps": step + 1, "pictures": pictures,
        "minutes": round(seconds / 60, 2), "probe": round(accuracy, 4),
    }  # fmt: skip


def instructions() -> str:
    """Widest vectors that torch uses, and the instructions for bfloat16 that the processor has."""
    narrow = {"AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}  # of torch.cpu
    found = [name for name, test in narrow.items() if getattr(torch.cpu, test, bool)()]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *found])


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of the table; none where it is absent. ValueError: a table with other columns."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} has other columns than {', '.join(COLUMNS)}")
        return list(table)


def append(row: dict[str, Any], path: Path = TABLE) -> None:
    """Append a row to the table, which is made where it is absent."""
    write_whole(path, csv_text([*rows_of(path), row], COLUMNS))


def main(words: list[str] | None = None) -> int:
    """The command. Returns the exit code: 1 where the goal was not reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="a config (default: configs/photographs.yaml)")
    parser.add_argument("--goal", type=float, default=GOAL, help="accuracy of the probe that ends it (default: .5)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the schedule, at most (default: {STEPS})")
    parser.add_argument("--every", type=int, default=EVERY, help=f"steps between readings (default: {EVERY})")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the row goes (default: benchmarks/race.csv)")
    given = parser.parse_intermixed_args(words)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else ""
    began = time.perf_counter()
    try:
        if given.every < 1:
            raise UserError(f"--every={given.every} must be at least 1")
        rows_of(given.table)  # refused now, not after the training
        found = race(configured(given.recipe, given.steps, given.overrides), given.goal, given.every)
        inside = given.recipe.resolve().is_relative_to(FOLDER.parent)
        append(found | {
            "date": time.strftime("%Y-%m-%d"),
            "recipe": given.recipe.resolve().relative_to(FOLDER.parent) if inside else given.recipe.name,
            "overrides": " ".join(w for w in given.overrides if not w.startswith(("data.root=", "data.path="))),
            "load_before": load,
        }, given.table)  # fmt: skip
    except (OSError, UserError, TrainingDiverged) as error:
        print(f"race: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    reached = found["probe"] >= given.goal
    beside = (time.perf_counter() - began) / 60 - found["minutes"]
    print(
        f"probe {found['probe']:.3f}, goal {given.goal:g} {'' if reached else 'NOT '}reached: {found['pictures']:,} "
        f"pictures, {found['minutes']} minutes of training ({found['threads']} threads, {found['precision']}, load "
        f"{load} before); loading and reading took {beside:.2f} minutes beside"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
