"""Kill training, sweep and tour at random moments (SIGKILL), go on, and see that nothing is lost, doubled or changed.

    python tests/kills.py                       20 kills of each (about a quarter of an hour)
    python tests/kills.py training --count 5    some of them, fewer kills

training   one run of 300 steps, killed and resumed until it is through: weights and log equal those of a run left alone
sweep      the command is killed, its jobs live on; started again until it is through: every run was made exactly once
tour       killed tours leave folders behind; a tour after them gives the table of the tour before them

The moments come from --seed. The tests in this folder kill once, at chosen moments; this is the rest.

Not covered: a machine that loses power.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
HJEPA = [sys.executable, "-m", "hjepa"]
TINY = (
    "data.name=fashion_mnist", "data.image_size=16", "model.patch_size=2", "model.embed_dim=32", "model.depth=2",
    "model.num_heads=2", "model.predictor.embed_dim=32", "model.predictor.depth=1", "model.predictor.num_heads=2",
    "data.limit=400", "train.steps=300", "train.batch_size=8", "train.threads=1", "train.checkpoint_every=3",
    "train.eval_every=100", "train.log_every=1", "evaluate.gallery=100", "evaluate.queries=50",
)  # fmt: skip


def killed_until_done(
    command: Callable[[], list[str]], wait: Callable[[subprocess.Popen], None], count: int, where: Path
) -> tuple[int, int]:
    """Start the command, kill it when `wait` returns, again until `count` kills; then let it end. Exit code, kills."""
    kills = 0
    while kills < count:
        child = start(command(), where)
        wait(child)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
    return start(command(), where).wait(), kills


def start(command: list[str], where: Path) -> subprocess.Popen:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=where, env=ENVIRONMENT, stdout=quiet, stderr=quiet)


def after(seconds: float) -> Callable[[subprocess.Popen], None]:
    """Wait so long, or until the process ends."""

    def wait(child: subprocess.Popen) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)

    return wait


def check(claim: str, holds: bool) -> bool:
    print(f"  {'yes' if holds else 'NO '}  {claim}", flush=True)
    return holds


def weights(run: Path) -> bytes:
    return (max((run / "checkpoints").glob("step_*")) / "model.safetensors").read_bytes()


def last_step(run: Path) -> int:
    """The newest step of a log that may be absent, or cut off in its last line."""
    steps = [0]
    if (run / "log.jsonl").exists():
        for line in (run / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                steps.append(json.loads(line)["step"])
    return max(steps)


def untimed_log(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in rows]


def training(where: Path, count: int, rng: random.Random) -> bool:
    """A run killed `count` times equals one that was not."""
    alone, killed = where / "alone", where / "killed"
    start([*HJEPA, "train", "--run", "alone", *TINY], where).wait()

    def command() -> list[str]:
        resume = ["--resume"] if (killed / "config.yaml").exists() else []
        return [*HJEPA, "train", "--run", "killed", *resume, *TINY]

    def wait(child: subprocess.Popen) -> None:
        """Mostly some steps further on, now and then while it starts."""
        if rng.random() < 0.2:
            return after(rng.uniform(0, 4))(child)
        step = last_step(killed) + rng.randint(3, 20)
        while child.poll() is None and last_step(killed) < step:
            time.sleep(0.01)
        return after(rng.uniform(0, 0.2))(child)

    code, kills = killed_until_done(command, wait, count, where)
    return all([
        check(f"ends well after {kills} kills", code == 0 and kills == count),
        check("same weights", weights(killed) == weights(alone)),
        check("same log", untimed_log(killed) == untimed_log(alone)),
    ])  # fmt: skip


def sweep(where: Path, count: int, rng: random.Random) -> bool:
    """Each of `count` + 4 runs is started exactly once, whatever happened to the command."""
    cells = ['seed = 0\nrun_dir = ""', (
        "import json, time\nfrom pathlib import Path\n"
        "open('started.txt', 'a').write(f'{seed} ')\ntime.sleep(1)\n"
        "Path(run_dir, 'metrics.json').write_text(json.dumps({'rows': [{'metric': 'knn', 'value': seed}]}))"
    )]  # fmt: skip
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, where / "tiny.ipynb")
    seeds = list(range(count + 4))
    (where / "sweep.yaml").write_text(f"notebook: tiny.ipynb\nout: out\nseeds: {seeds}\n")
    code, kills = killed_until_done(
        lambda: [*HJEPA, "sweep", "sweep.yaml"], lambda child: after(rng.uniform(1, 6))(child), count, where
    )
    started = sorted(map(int, (where / "started.txt").read_text().split()))
    values = [entry["metrics"]["rows"][0]["value"] for entry in json.loads((where / "out/results.json").read_text())]
    return all([
        check(f"ends well after {kills} kills", code == 0 and kills == count),
        check("every run was made once", started == seeds),
        check("every run is in the table", values == seeds),
    ])  # fmt: skip


def tour(where: Path, count: int, rng: random.Random) -> bool:
    """A tour after `count` killed ones gives the table of the tour before them."""

    def complete() -> list[str]:
        return [path.read_text() for path in sorted(where.glob("runs/*/table.csv"))]

    command, notebooks = [*HJEPA, "tour", "--quick"], Path(__file__).resolve().parent.parent / "notebooks"
    (where / "notebooks").symlink_to(notebooks)
    (where / "configs").symlink_to(notebooks.parent / "configs")
    began = time.perf_counter()
    start(command, where).wait()
    whole = time.perf_counter() - began
    code, kills = killed_until_done(
        lambda: command, lambda child: after(rng.uniform(0.02, 0.8) * whole)(child), count, where
    )
    tables, last = complete(), sorted(where.glob("runs/tour-*"))[-1]
    return all([
        check(f"ends well after {kills} kills", code == 0 and kills == count),
        check("the last tour left its results", all((last / name).is_file() for name in ("table.csv", "metrics.json"))),
        check("the tours before and after left a table", len(tables) >= 2),  # more: killed after writing theirs
        check("every table is whole: the same", len(set(tables)) == 1),
    ])  # fmt: skip


PARTS = {"training": training, "sweep": sweep, "tour": tour}


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill training, sweep and tour at random moments and go on.")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which; all if none is named")
    parser.add_argument("--count", type=int, default=20, help="kills of each (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    good = True
    for name in options.parts or PARTS:
        print(f"{name}: {options.count} kills, seed {options.seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            good &= PARTS[name](Path(folder), options.count, random.Random(f"{options.seed} {name}"))
            print(f"  {time.perf_counter() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
