"""Comparisons that were fixed before the runs: differences paired by seed, their intervals, Holm-adjusted p-values.

    comparisons = [{"comparison": "views, half", "a": "rope, interpolated", "b": "absolute, resampled",
                    "metric": "knn", "size": 32, "setting": "objective=views"}, ...]
    rows_to_csv(primary(rows, comparisons), "results/primary.csv")

Where the hits of single pictures are known, the interval covers seeds and pictures together: the variance of a mean
over two crossed factors, each seed asked about the same pictures, with Student's t and Satterthwaite's degrees of
freedom. (A bootstrap of so few seeds would be too narrow.) Without hits it covers seeds alone.
Sources: crossed random effects, Searle, Casella & McCulloch 1992 (Variance Components, section 4.3); Satterthwaite
1946; Holm 1979.
Not covered: which comparisons are worth fixing; that is a protocol's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..inputs import UserError, check_choice, size_pair, size_text
from .results import Row, paired

Hits = Callable[[Row], np.ndarray | None]  # the hits [pictures] behind a row, if they were kept
NAMES = ("comparison", "a", "b", "metric", "size")  # of a comparison; its other keys say which rows it is about


def primary(rows: Sequence[Row], comparisons: Sequence[Mapping[str, Any]], hits: Hits | None = None) -> list[Row]:
    """One row per comparison: comparison, reader, size, mean, low, high (points, encoder a minus b; 95 %), seeds,
    interval ("seeds" or "seeds and pictures"), p (two-sided), p_holm (adjusted over all comparisons).

    rows: of `resolution_transfer`, with seeds. ValueError if a comparison finds no such encoder, or fewer than two
    seeds.
    """
    found = [_compare(rows, comparison, hits) for comparison in comparisons]
    adjusted = holm([row["p"] for row in found])
    return [row | {"p_holm": value} for row, value in zip(found, adjusted, strict=True)]


def _compare(rows: Sequence[Row], asked: Mapping[str, Any], hits: Hits | None) -> Row:
    size, tags = size_pair(asked["size"]), {key: value for key, value in asked.items() if key not in NAMES}
    known = tuple(dict.fromkeys(row["encoder"] for row in rows if "encoder" in row))
    for key in ("a", "b"):
        check_choice(f"comparison {asked['comparison']!r}: {key}", asked[key], known)
    kept = [
        row for row in rows
        if row.get("encoder") in (asked["a"], asked["b"]) and row["metric"] == asked["metric"]
        and size_pair(row["size"]) == size and all(row.get(key) == value for key, value in tags.items())
    ]  # fmt: skip
    pairs = paired(kept, asked["b"])
    if len(pairs) < 2:
        what = f"{asked['comparison']!r} ({asked['a']} against {asked['b']}, {asked['metric']} at {size_text(size)} px)"
        raise UserError(f"comparison {what} has {len(pairs)} paired seeds; it needs two or more")
    single = [(hits(row), hits(other)) if hits else (None, None) for row, other in pairs]
    whole = all(a is not None and b is not None for a, b in single)
    values = [100 * (np.asarray(a, float) - np.asarray(b, float)) for a, b in single] if whole else [
        [100 * (row["value"] - other["value"])] for row, other in pairs
    ]  # fmt: skip
    mean, low, high, p = crossed_interval(np.array(values))
    covers = "seeds and pictures" if whole else "seeds"
    return {"comparison": asked["comparison"], "reader": asked["metric"], "size": size, "mean": mean, "low": low,
            "high": high, "seeds": len(pairs), "interval": covers, "p": p}  # fmt: skip


def save_hits(hits: Mapping[tuple[str, tuple[int, int], str], Tensor], path: str | Path) -> None:
    """Write the hits that `resolution_transfer(.., hits=hits)` handed out as a compressed .npz file."""
    named = {_key(*place): each.numpy() for place, each in hits.items()}
    np.savez_compressed(path, **named)  # type: ignore[arg-type]


def saved_hits(row: Row, path: str | Path) -> np.ndarray | None:
    """The hits [n] behind a row, from a file of `save_hits`; None if the file or the row is not there. Of several
    placements, the share of each picture's that was right.

    For a sweep: `primary(rows, comparisons, lambda row: saved_hits(row, f"{folder}/{row['run']}/hits.npz"))`.
    """
    if not Path(path).exists():
        return None
    with np.load(path, allow_pickle=False) as kept:
        key = _key(row["encoder"], size_pair(row["size"]), row["metric"])
        if key not in kept.files:
            return None
        placements = row.get("placements", 1)
        return kept[key] if placements == 1 else kept[key].reshape(placements, -1).mean(axis=0)


def _key(encoder: str, size: tuple[int, int], metric: str) -> str:
    return f"{metric} at {size_text(size)}: {encoder}"


def crossed_interval(differences: np.ndarray, level: float = 0.95) -> tuple[float, float, float, float]:
    """Mean of differences [seeds, pictures], its interval over both, and the two-sided p of no difference.

    Variance s^2 / S + q^2 / Q + e^2 / (S Q) of seeds, pictures and what is left, each estimated from the mean
    squares of the two-way layout. A single column is a value per seed: then this is the paired t interval.
    """
    from scipy.stats import t

    seeds, pictures = differences.shape
    mean, by_seed, by_picture = differences.mean(), differences.mean(axis=1), differences.mean(axis=0)
    seeds_part = by_seed.var(ddof=1) / seeds
    variance, freedom = seeds_part, float(seeds - 1)
    if pictures > 1:
        rest = differences - by_seed[:, None] - by_picture + mean
        cells = (seeds - 1) * (pictures - 1)
        pictures_part, rest_part = by_picture.var(ddof=1) / pictures, (rest**2).sum() / cells / (seeds * pictures)
        variance = max(seeds_part + pictures_part - rest_part, seeds_part, pictures_part)
        spread = seeds_part**2 / (seeds - 1) + pictures_part**2 / (pictures - 1) + rest_part**2 / cells
        freedom = variance**2 / spread if spread > 0 else freedom
    if variance == 0:
        return float(mean), float(mean), float(mean), float(mean == 0)
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    p = 2 * float(t.sf(abs(mean) / math.sqrt(variance), freedom))
    return float(mean), float(mean - half), float(mean + half), p


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): the k-th smallest of n times n - k + 1, never below a smaller one's, at most 1."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted.tolist()
