"""The primary comparisons of docs/protocol.md: models of two position schemes in four cells, seed by seed.

    python -m benchmarks.evidence run --seeds 100 101 --split validation --out results/primary/pilot
    python -m benchmarks.evidence seeds results/primary/pilot            # the number of seeds that follows
    python -m benchmarks.evidence run --seeds 0 1 2 3 4 5 6 --split test-b --out results/primary
    python -m benchmarks.evidence run --seeds 0 1 2 --split test-b --out results/primary/control --schemes none
    python -m benchmarks.evidence run --seeds 0 1 2 3 4 5 6 --split test-b --out results/primary/sincos --schemes sincos
    python -m benchmarks.evidence table results/primary --seeds 7    # primary.csv, secondary.csv, accuracy.csv, ..

`run --data emoji` does the same on moved OpenMoji. A seed takes about 25 minutes of one core and leaves seed-N.npz:
which pictures each model read rightly, as packed bits.
`run` says nothing of what it read, and `table` refuses to look before all seeds are there. A run that was stopped goes
on where it was; two processes may work on different seeds. Pictures come from the folder in HJEPA_DATA, or from data.
Where FOLDER/sincos is, the sixteen are asked again with the fixed code in the embedding's place: sincos/primary.csv.
Not covered: exploratory schemes and sizes, which are sweeps.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hjepa.build import load_split
from hjepa.config import Config
from hjepa.evaluate.baselines import baselines
from hjepa.evaluate.measures import bootstrap_interval
from hjepa.evaluate.plots import cells_figure
from hjepa.evaluate.primary import crossed_interval, primary
from hjepa.evaluate.results import Row, rows_to_csv
from hjepa.evaluate.transfer import resolution_transfer
from hjepa.experiments.transfer import readers, scheme_configs, train_all
from hjepa.inputs import UserError, size_pair, size_text

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "photographs.yaml"
SCHEMES = ("rope", "absolute")
A, B, CODE = "rope, interpolated", "absolute, resampled", "sincos, resampled"
NAMED = {A: "rotation", CODE: "code", B: "embedding", "none": "none"}  # in secondary.csv, each less the later ones
BESIDE = {"control": "none", "sincos": CODE}  # folder inside a folder of readings -> the scheme read there
SIZES, HOME, METRICS = (32, 64, 128), 64, ("knn", "probe")  # pixels; half, the training size and twice
SHAPE = (
    "model.embed_dim=128", "model.depth=5", "model.num_heads=4", "train.eval_every=1000", "train.checkpoint_every=60",
    "evaluate.gallery=400", "evaluate.queries=200",  # of the measures that training logs
)  # fmt: skip
GALLERY = 4000  # training pictures that the readers are fitted on
VIEWS = ("objective=views", "train.steps=120", "train.warmup=12")
LABELS = ("objective=labels", "train.steps=240", "train.warmup=24", "views.large=1", "views.small=0", "views.keep=1.0")
CELLS = {  # objective and training grids -> overrides
    "views, one grid": (*VIEWS, "views.large=6", "views.small=0", "views.large_scale=[0.1,1.0]"),
    "views, several grids": VIEWS,
    "labels, one grid": LABELS,
    "labels, several grids": (*LABELS, "data.train_scales=[0.75,1.0,1.25]"),
}
TRAINED = {"views, several grids": (32,), "labels, several grids": (48, 80)}  # sides in pixels beside HOME
DATA = {  # what differs from the recipe's pictures, and how often each test picture is placed on its canvas
    "photographs": ((), 1),
    "emoji": (("data.name=openmoji", "data.moved=true", "views.color_jitter=0.2", "views.grey=0.0"), 3),
}
LEAST, MOST, HALF_WIDTH = 5, 12, 2.0  # seeds, seeds, points to either side


def configs_of(cell: str, seed: int, schemes: Sequence[str] = SCHEMES, data: str = "photographs") -> dict[str, Config]:
    """The configs of a cell, equal but for positions."""
    root = f"data.root={os.environ.get('HJEPA_DATA', 'data')}"
    return scheme_configs(RECIPE, schemes, [*SHAPE, *DATA[data][0], *CELLS[cell], f"train.seed={seed}", root])


def run(
    seed: int, split: str, out: Path, runs: Path, schemes: Sequence[str] = SCHEMES, data: str = "photographs"
) -> None:
    """Train and read every cell of one seed, then write out/seed-N.npz and drop the run folders."""
    kept, folder, placements = {}, runs / f"{data}-seed-{seed}-{'-'.join(schemes)}", DATA[data][1]
    for place, cell in enumerate(CELLS):
        configs = configs_of(cell, seed, schemes, data)
        done = folder / cell.replace(", ", "-").replace(" ", "-")
        train_all(configs, done, progress=False)
        config = configs[schemes[0]]
        everybody = readers(configs, done)
        known, asked = load_split(config, "train"), load_split(config, split, placements)
        if place > 0:  # the random start is the same in every cell
            del everybody["random init"]
        elif seed == 0:  # baselines know nothing of cells and seeds
            everybody |= baselines(known, config.data.image_size)
        hits: dict[Any, Any] = {}
        resolution_transfer(
            everybody, known, asked, train_size=config.data.image_size, sizes=SIZES, gallery=GALLERY,
            knn_k=config.evaluate.knn_k, pool=config.evaluate.pool, refit=False, hits=hits,
        )  # fmt: skip
        kept |= {
            key_of(cell, encoder, size, metric): each.numpy()
            for (encoder, size, metric), each in hits.items() if metric in METRICS
        }  # fmt: skip
        print(f"seed {seed}: {cell} trained and read", flush=True)
    save(kept, out / f"seed-{seed}.npz", placements)
    shutil.rmtree(folder)


def key_of(cell: str, encoder: str, size: tuple[int, int], metric: str) -> str:
    return "; ".join((cell, encoder, size_text(size), metric))


def save(hits: dict[str, np.ndarray], path: Path, placements: int = 1) -> None:
    """Which pictures were read rightly, eight to a byte; `pictures` holds their number, all placements counted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {key: np.packbits(each) for key, each in hits.items()}
    count = len(next(iter(hits.values())))
    whole = path.with_name(f".{path.name}")  # numpy adds .npz to any other ending
    np.savez_compressed(whole, pictures=np.array(count), placements=np.array(placements), **packed)  # type: ignore[arg-type]
    os.replace(whole, path)


def rows_of(folder: Path, seeds: list[int]) -> Iterator[tuple[Row, np.ndarray]]:
    """Rows with cell, encoder, size, metric, seed and value, each with the hits behind it: by picture, the share of its
    placements."""
    missing = [seed for seed in seeds if not (folder / f"seed-{seed}.npz").exists()]
    if missing:
        raise UserError(f"{folder} lacks seeds {missing}; all of {seeds} must be there before any is looked at")
    for seed in seeds:
        with np.load(folder / f"seed-{seed}.npz", allow_pickle=False) as kept:
            count, placements = int(kept["pictures"]), int(kept["placements"]) if "placements" in kept else 1
            same = torch.arange(count // placements).repeat(placements)
            for key in kept.files:
                if key in ("pictures", "placements"):
                    continue
                cell, encoder, size, metric = key.split("; ")
                hit = np.unpackbits(kept[key], count=count).astype(bool)
                value, low, high = bootstrap_interval(torch.from_numpy(hit), groups=same)
                row = {"cell": cell, "seed": seed, "encoder": encoder, "size": size_pair(size), "metric": metric,
                       "value": value, "low": low, "high": high, "n": count}  # fmt: skip
                yield row, hit.reshape(placements, -1).mean(axis=0)


def comparisons(opponent: str = B) -> list[dict[str, Any]]:
    """The sixteen of the protocol: rotation against the embedding, or against another opponent."""
    return [
        {"comparison": cell, "a": A, "b": opponent, "metric": metric, "size": size, "cell": cell}
        for cell in CELLS for size in (32, 128) for metric in METRICS
    ]  # fmt: skip


def number_of_seeds(differences: np.ndarray) -> tuple[float, int]:
    """Paired differences [comparisons, seeds] in points -> their pooled standard deviation, and the fewest seeds whose
    95 % interval is at most HALF_WIDTH to either side, LEAST to MOST."""
    from scipy.stats import t

    spread = float(np.sqrt(differences.var(axis=1, ddof=1).mean()))
    enough = (n for n in range(LEAST, MOST) if t.ppf(0.975, n - 1) * spread / n**0.5 <= HALF_WIDTH)
    return spread, next(enough, MOST)


Pair = tuple[Row, np.ndarray]  # a row, and the share of each picture's placements that was read rightly


def pairs_of(folder: Path, seeds: list[int]) -> dict[str, list[Pair]]:
    """Encoder -> what was read of it: both schemes, random init and baselines with all seeds, and those of BESIDE.

    The fixed code is not looked at before it has all seeds; the control without positions has as many as were run.
    """
    found: dict[str, list[Pair]] = {}
    for pair in rows_of(folder, seeds):
        found.setdefault(pair[0]["encoder"], []).append(pair)
    for place, encoder in BESIDE.items():
        there = seeds_in(folder / place)
        if there:
            read = rows_of(folder / place, seeds if encoder == CODE else there)
            found[encoder] = [pair for pair in read if pair[0]["encoder"] == encoder]
    return found


def found_in(pairs: dict[str, list[Pair]], opponent: str = B) -> list[Row]:
    """The primary comparisons over seeds and pictures together."""
    both = [*pairs[A], *pairs[opponent]]
    hits = {(r["cell"], r["seed"], r["encoder"], r["size"], r["metric"]): hit for r, hit in both}
    behind = lambda r: hits[r["cell"], r["seed"], r["encoder"], r["size"], r["metric"]]  # noqa: E731
    return primary([row for row, _ in both], comparisons(opponent), behind)


def secondary(pairs: dict[str, list[Pair]]) -> list[Row]:
    """Differences that were not among the sixteen, with 95 % intervals over seeds and pictures and no correction:
    between rotation, embedding, code and none at every size, and by how much rotation's over embedding and code is
    larger at another size than at the training size."""
    schemes = [encoder for encoder in NAMED if encoder in pairs]
    seeds = {encoder: {row["seed"] for row, _ in pairs[encoder]} for encoder in schemes}
    hits = {(r["cell"], r["encoder"], r["size"], r["metric"], r["seed"]): np.asarray(hit, float)
            for encoder in schemes for r, hit in pairs[encoder]}  # fmt: skip

    def over(cell: str, metric: str, size: int, a: str, b: str) -> np.ndarray:
        at, common = size_pair(size), sorted(seeds[a] & seeds[b])
        return np.array([100 * (hits[cell, a, at, metric, s] - hits[cell, b, at, metric, s]) for s in common])

    found = []
    for cell, metric, size in ((c, m, s) for c in CELLS for m in METRICS for s in SIZES):
        for a, b in ((a, b) for i, a in enumerate(schemes) for b in schemes[i + 1 :]):
            name, each = f"{NAMED[a]} - {NAMED[b]}", over(cell, metric, size, a, b)
            if len(each) < 2:  # a control of one seed has no interval
                continue
            values = {name: each}
            if size != HOME and a == A and b != "none":
                values[f"{name}, less that at {HOME} px"] = each - over(cell, metric, HOME, a, b)
            for what, points in values.items():
                mean, low, high, _ = crossed_interval(points)
                found.append({"comparison": cell, "difference": what, "reader": metric, "size": size_pair(size),
                              "mean": mean, "low": low, "high": high, "seeds": len(points)})  # fmt: skip
    return found


def seeds_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("seed-*.npz"))


def pilot(folder: Path) -> tuple[float, int]:
    seeds = seeds_in(folder)
    rows = {(r["cell"], r["seed"], r["encoder"], r["size"], r["metric"]): r["value"] for r, _ in rows_of(folder, seeds)}
    differences = [
        [100 * (rows[c["cell"], s, A, size_pair(c["size"]), c["metric"]]
                - rows[c["cell"], s, B, size_pair(c["size"]), c["metric"]]) for s in seeds]
        for c in comparisons()
    ]  # fmt: skip
    return number_of_seeds(np.array(differences))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and read seeds")
    running.add_argument("--seeds", type=int, nargs="+", required=True)
    running.add_argument("--split", choices=("validation", "test", "test-b"), required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    running.add_argument("--data", choices=tuple(DATA), default="photographs")
    running.add_argument("--schemes", nargs="+", default=SCHEMES, help="names of hjepa.experiments.transfer.SCHEMES")
    number = commands.add_parser("seeds", help="spread of a pilot and the number of seeds that follows")
    number.add_argument("folder", type=Path)
    table = commands.add_parser("table", help="write primary.csv and accuracy.csv")
    table.add_argument("folder", type=Path)
    table.add_argument("--seeds", type=int, required=True, help="how many were fixed: 0 to this number less one")
    given = parser.parse_args(words)
    if given.command == "run":
        for seed in given.seeds:
            if not (given.out / f"seed-{seed}.npz").exists():
                run(seed, given.split, given.out, given.runs, given.schemes, given.data)
    elif given.command == "seeds":
        print("standard deviation {:.2f} points, pooled; {} seeds".format(*pilot(given.folder)))
    else:
        pairs = pairs_of(given.folder, list(range(given.seeds)))
        rows = [row for each in pairs.values() for row, _ in each]
        rows_to_csv(rows, given.folder / "accuracy.csv")
        rows_to_csv(secondary(pairs), given.folder / "secondary.csv")
        for opponent, place in ((B, given.folder), (CODE, given.folder / "sincos")):
            if opponent in pairs:
                found = found_in(pairs, opponent)
                rows_to_csv(found, place / "primary.csv")
                (place / "summary.md").write_text(summary(found, NAMED[opponent]), encoding="utf-8")
        drawn = cells_figure(rows, HOME, trained=TRAINED)
        drawn.savefig(given.folder / "figure.png", dpi=110, metadata={"Software": None})
    return 0


def summary(found: list[Row], opponent: str) -> str:
    """The sixteen differences as a Markdown table, with 95 % intervals and Holm-adjusted p-values."""
    at = {(row["comparison"], size_text(row["size"]), row["reader"]): row for row in found}
    lines = [f"| rotation minus {opponent}, points | kNN, half | probe, half | kNN, twice | probe, twice |",
             "|---|---|---|---|---|"]  # fmt: skip
    for cell in CELLS:
        cells = [at[cell, size, reader] for size in ("32", "128") for reader in METRICS]
        texts = ["{mean:+.1f} [{low:+.1f}, {high:+.1f}], p {p_holm:.2g}".format(**row) for row in cells]
        lines.append(" | ".join(["| " + cell, *texts]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
