"""Rows of results: average over seeds, pair by seed, write to CSV, print as a table.

A row is a plain dict with encoder, size (height, width in pixels), metric, value, low, high, n, placements where each
picture was read in several, and any tags (seed, data set, recipe).
Not covered: where rows come from (`hjepa.evaluate.transfer`), comparisons fixed beforehand (`hjepa.evaluate.primary`)
and figures (`hjepa.evaluate.plots`).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_whole
from ..inputs import UserError, size_pair, size_text

Row = dict[str, Any]
BASE = "absolute, resampled"  # the reader that gains are counted from
ACCURACIES = ("probe", "probe_centred", "probe_few", "probe_fixed", "knn", "knn_centred")  # _fixed: old results only
MEASURED = ("value", "low", "high", "n", "interval")  # every other key of a row says what was measured


def summarise(rows: Sequence[Row], over: str = "seed", *, interval: str = "t", level: float = 0.95) -> list[Row]:
    """One row per setting: the mean over `over`, with an interval over its values; n is their number.

    interval "t": Student's t at the given level (3 seeds: mean +- 4.30 standard errors, so wide); "range":
    the smallest and largest value. A single seed keeps the row's own interval, then named "pictures".
    Rows are grouped by every key that is no measurement, so data sets or recipes are never mixed. ValueError
    if a row lacks `over`, or if one setting has the same seed twice.
    """
    if interval not in ("t", "range"):
        raise ValueError(f"interval {interval!r} is not known; choose t or range")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if over not in row:
            raise ValueError(f"rows have no {over!r} to average over; their keys are {', '.join(row)}")
        groups.setdefault(tuple(sorted(_setting(row, over).items())), []).append(row)
    return [_average(members, over, interval, level) for members in groups.values()]


def _setting(row: Row, over: str) -> Row:
    kept = {key: value for key, value in row.items() if key not in (*MEASURED, over)}
    return kept | {"size": size_pair(row["size"])}


def _average(members: list[Row], over: str, interval: str, level: float) -> Row:
    setting = _setting(members[0], over)
    if len({row[over] for row in members}) < len(members):
        raise ValueError(f"{over} {[row[over] for row in members]} repeats for {setting}; is a tag missing?")
    values = np.array([row["value"] for row in members], dtype=float)
    n, mean = len(values), float(values.mean())
    if n == 1:
        low, high, interval = members[0]["low"], members[0]["high"], "pictures"
    elif interval == "range":
        low, high = float(values.min()), float(values.max())
    else:
        from scipy.stats import t  # here, because the command line reads this module before it prints help

        half = float(t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
        low, high = mean - half, mean + half
    return {**setting, "value": mean, "low": low, "high": high, "n": n, "interval": interval}


def rows_to_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows as CSV; numbers with 6 significant digits, sizes as "64" or "64x96", tags first."""
    names = dict.fromkeys(key for row in rows for key in row)
    columns = [name for name in names if name not in MEASURED] + [name for name in MEASURED if name in names]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, csv_text(rows, columns))


def csv_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as the text of a CSV file with these columns; floats with 6 significant digits, sizes as `size_text`.

    ValueError on a row with another column.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        writer.writerow(cells | ({"size": size_text(row["size"])} if "size" in row else {}))
    return text.getvalue()


def rows_from_csv(path: str | Path) -> list[Row]:
    """Read what `rows_to_csv` wrote: size as a pair, numbers as int or float, empty cells left out."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _parse(key, text) for key, text in row.items() if text != ""} for row in csv.DictReader(file)]


def _parse(key: str, text: str) -> Any:
    if key == "size":
        return size_pair(text)
    kinds = (float,) if key in ("value", "low", "high") else (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def sweep_rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of all runs of a results.json, each with its `setting`: what tells the run from others but the seed."""
    names = setting_names([entry["parameters"] for entry in results])
    rows = []
    for entry, setting in zip(results, names, strict=True):
        seed = {"seed": entry["parameters"]["seed"]} if "seed" in entry["parameters"] else {}
        own = {"setting": setting, **seed}
        rows += [{**own, **row, "run": entry["run"]} for row in entry["metrics"].get("rows", [])]
    return rows


def setting_names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run: its parameters that differ between runs, and where all are lists the items not in all."""
    first = runs[0] if runs else {}
    varied = [key for key in first if key != "seed" and any(run[key] != first[key] for run in runs)]
    names = []
    for run in runs:
        words = []
        for key in varied:
            if all(isinstance(other[key], list) for other in runs):
                words += [str(item) for item in run[key] if any(item not in other[key] for other in runs)]
            else:
                words.append(f"{key}={run[key]}")
        names.append(", ".join(words) or "recipe")
    return names


def sweep_csv(rows: Sequence[Row]) -> str:
    """The text of a sweep's table.csv. As `rows_to_csv`, whose reader reads it, but a row need not have a size."""
    return csv_text(rows, list(dict.fromkeys(key for row in rows for key in row)))


def by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of a sweep (`sweep_rows`) by their `setting`, without the key `run`."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append({key: value for key, value in row.items() if key != "run"})
    return groups


def paired(rows: Sequence[Row], base: str) -> list[tuple[Row, Row]]:
    """Each row of another encoder with the row of encoder `base` at the same metric, size, placements and seed (0 if it
    has none).

    Rows without such a partner are left out. ValueError if two rows claim one place.
    """
    places: dict[tuple, Row] = {}
    for row in rows:
        key = (row["encoder"], *_place(row))
        if key in places:
            raise UserError(f"{row['encoder']!r} stands twice for seed {key[3]}, {key[1]} at {size_text(key[2])}")
        places[key] = row
    return [
        (row, places[base, *_place(row)])
        for row in rows
        if row["encoder"] != base and (base, *_place(row)) in places
    ]


def _place(row: Row) -> tuple[str, tuple[int, int], Any, int]:
    return row["metric"], size_pair(row["size"]), row.get("seed", 0), row.get("placements", 1)


def paired_gains(rows: Sequence[Row], base: str) -> list[Row]:
    """Each row's value minus that of encoder `base` at the same metric, size and seed, in points (hundredths)."""
    return [
        {**row, "value": 100 * (row["value"] - other["value"]), "low": math.nan, "high": math.nan}
        for row, other in paired(rows, base)
    ]


def sweep_summary(rows: Sequence[Row]) -> str:
    """Markdown: for every setting of a sweep and every metric, means over seeds with 95 % t intervals.

    Where several seeds have the encoder BASE, the gains of the others over it follow, paired by seed.
    """
    parts = []
    for setting, members in by_setting(rows).items():
        means = summarise(members)
        seeds = max(row["n"] for row in means) if means[0]["interval"] == "t" else 1
        parts += [f"## {setting}", "", f"Trained at {size_text(home_size(members))} px, {seeds} seed(s).", ""]
        for metric in _shown(means, *ACCURACIES, "effective_rank"):
            parts += ["```", format_table(means, metric, interval=True), "```", ""]
        gains = summarise(paired_gains(members, BASE))
        if seeds > 1 and gains:
            parts += [f"Points over {BASE}, paired by seed.", ""]
            for metric in _shown(gains, *ACCURACIES):
                parts += ["```", format_table(gains, metric, interval=True, digits=1), "```", ""]
    return "\n".join(parts)


def _shown(rows: Sequence[Row], *metrics: str) -> list[str]:
    there = {row["metric"] for row in rows}
    return [metric for metric in metrics if metric in there]


def home_size(rows: Sequence[Row]) -> tuple[int, int]:
    """The training size (h, w) of rows of `hjepa.evaluate.resolution_transfer`: where features are compared with
    themselves, so that every CKA is 1. ValueError if that is not one size."""
    sizes: dict[tuple[int, int], float] = {}
    for row in rows:
        if row["metric"] == "cka":
            size = size_pair(row["size"])
            sizes[size] = min(sizes.get(size, 1.0), row["value"])
    home = [size for size, lowest in sizes.items() if lowest > 1 - 1e-6]
    if len(home) != 1:
        raise ValueError(f"rows name no training size: CKA is 1 at {[size_text(size) for size in home] or 'no size'}")
    return home[0]


def by_encoder(rows: Sequence[Row], metric: str) -> dict[str, dict[tuple[int, int], Row]]:
    """The rows of one metric as {encoder: {size: row}}, encoders as they come, sizes by area.

    ValueError if no row has the metric, if two rows claim one place (average them with `summarise` first), or if some
    were read in more placements of each picture than others.
    """
    numbers = sorted({row.get("placements", 1) for row in rows if row["metric"] == metric})
    if len(numbers) > 1:
        what = f"rows of {metric!r} were read in {' and '.join(map(str, numbers))} placements of each picture"
        raise UserError(f"{what}: no one table; show those of one number")
    found: dict[str, dict[tuple[int, int], Row]] = {}
    for row in rows:
        if row["metric"] == metric:
            cells, size = found.setdefault(row["encoder"], {}), size_pair(row["size"])
            if size in cells:
                raise ValueError(f"two rows for {row['encoder']!r} at size {size_text(size)}; summarise them")
            cells[size] = row
    if not found:
        known = ", ".join(dict.fromkeys(row["metric"] for row in rows)) or "none"
        raise ValueError(f"no row has metric {metric!r}; the rows have: {known}")
    return {name: {size: cells[size] for size in sorted(cells, key=_area)} for name, cells in found.items()}


def _area(size: tuple[int, int]) -> tuple[int, int, int]:
    return size[0] * size[1], *size


def format_table(rows: Sequence[Row], metric: str, *, interval: bool = False, digits: int = 3) -> str:
    """Plain text: one line per encoder, one column per size (smallest first), "-" where nothing was measured.

    ValueError as `by_encoder`.
    """
    found = by_encoder(rows, metric)
    sizes = sorted({size for cells in found.values() for size in cells}, key=_area)
    lines = [[metric, *map(size_text, sizes)]]
    for name, cells in found.items():
        lines.append([name, *(_number(cells.get(size), interval, digits) for size in sizes)])
    first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(rest, widths, strict=True))])
        for name, *rest in lines
    )


def _number(row: Row | None, interval: bool, digits: int) -> str:
    if row is None:
        return "-"
    value, low, high = (f"{row[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if interval else value
