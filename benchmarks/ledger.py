"""The claims ledger `results/claims.json`: one row per claim, each number checked or read, none typed twice.

A row has the claim, what was measured, `values` (the numbers), `number` (a sentence with the values' names in braces),
a verdict, a note that explains it, and the command that measures it again. There are two kinds:

    structural   values stand in the file, and tests measure them afresh: `check`. A name that ends in "_below" is a
                 bound, any other the value itself.
    sourced      values and verdict are made here from committed results (timings, transfer tables): `refresh`.

    python -m benchmarks.ledger      rebuild the sourced rows, and the page docs/claims.md from all rows; tests hold
                                     both files to what this would write

Not covered: making those results (`make bench`, `make tour`, `hjepa sweep`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hjepa.evaluate.results import Row, paired, rows_from_csv, size_text, summarise

Claim = dict[str, Any]
VERDICTS = ("holds", "holds when", "does not hold", "not settled yet")
LEDGER, PAGE = "results/claims.json", "docs/claims.md"
STALE = "results/claims.json or docs/claims.md is older than what it quotes: run python -m benchmarks.ledger"
TRAIN_SIZES = {"openmoji": 64, "fashion_mnist": 16}
TABLES = ("results/sweeps/baseline/table.csv", "results/tour-*/table.csv")
ROPE, TABLE = "rope, interpolated", "absolute, resampled"  # the readings compared, fixed before looking


def read(root: Path) -> dict[str, Claim]:
    """The rows by id, in the file's order."""
    return {row["id"]: row for row in json.loads((root / LEDGER).read_text(encoding="utf-8"))}


def number(row: Claim) -> str:
    """The row's numbers as a sentence."""
    return row["number"].format(**row["values"])


def check(row: Claim, measured: Mapping[str, float]) -> None:
    """Hold measured numbers to a row's values: below a bound, or within a hundredth of the value.

    Raises:
        AssertionError: a name missing on either side, or a number that does not agree.
    """
    values = row["values"]
    assert values.keys() == measured.keys(), f"{row['id']}: the row has {list(values)}, measured: {list(measured)}"
    for name, value in values.items():
        found = measured[name]
        agrees = found < value if name.endswith("_below") else math.isclose(found, value, rel_tol=0.01)
        assert agrees, f"{row['id']}: {name} was measured as {found}, the row says {value}"


# rows made from committed results


def _unsettled(row: Claim, why: str) -> Claim:
    return row | {"values": {}, "number": why, "verdict": "not settled yet"}


def overhead(row: Claim, cases: Mapping[str, Mapping[str, float]]) -> Claim:
    """A row about overhead from {case: {median, low, high}} ratios; it holds where every case's upper quartile does."""
    values = {}
    for case, ratio in cases.items():
        for part in ("median", "low", "high"):
            values[f"{case}_{part}"] = round(100 * (ratio[part] - 1), 1)
    text = "; ".join(f"{c}: {{{c}_median:+.1f}} % [{{{c}_low:+.1f}}, {{{c}_high:+.1f}}]" for c in cases)
    over = [case for case in cases if values[f"{case}_high"] > 5]
    within = [case for case in cases if case not in over]
    verdict = "holds" if not over else f"holds when the model is {', '.join(within)}" if within else "does not hold"
    return row | {"values": values, "number": text, "verdict": verdict}


def forward_overhead(row: Claim, root: Path) -> Claim:
    """RoPE on against off, forward pass, from benchmarks/results.json."""
    return _overhead_from_bench(row, root, "forward")


def training_overhead(row: Claim, root: Path) -> Claim:
    """RoPE on against off, forward and backward pass, from benchmarks/results.json."""
    return _overhead_from_bench(row, root, "training")


def _overhead_from_bench(row: Claim, root: Path, what: str) -> Claim:
    path = root / "benchmarks" / "results.json"
    if not path.exists():
        return _unsettled(row, "no committed measurement")
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["environment"]["quick"]:
        return _unsettled(row, "the committed benchmark is a quick run, whose numbers mean nothing")
    cases = bench_ratios(results, what)
    return overhead(row, cases) if cases else _unsettled(row, "not in the committed benchmark")


def bench_ratios(results: Mapping[str, Any], what: str) -> dict[str, dict[str, float]]:
    """Ratios of RoPE on to off, float32 on one thread, by model: {"ViT-S": {median, low, high}, ..}."""
    ends = ", float32, " + {"forward": "forward", "training": "forward + backward"}[what]
    found = {}
    for entry in results["entries"]:
        if entry["section"] == "encoders" and entry["title"].endswith(ends) and entry["threads"] == 1:
            found[entry["title"].removesuffix(ends)] = entry["rows"]["RoPE on"]["ratio"]
    return found


def gains(rows: Sequence[Row], train_size: int) -> list[Row]:
    """RoPE's probe accuracy minus the table's, in points, per seed and size other than the training size."""
    kept = [row for row in rows if row["metric"] == "probe" and row["encoder"] in (ROPE, TABLE)]
    return [
        {"encoder": "gain", "metric": "probe", "size": row["size"], "seed": row.get("seed", 0),
         "value": 100 * (row["value"] - base["value"]), "relative": 100 * (row["value"] / base["value"] - 1),
         "low": math.nan, "high": math.nan}
        for row, base in paired(kept, TABLE) if row["size"] != (train_size, train_size)
    ]  # fmt: skip


def better_transfer(row: Claim, root: Path) -> Claim:
    """The gain at unseen sizes from the baseline sweep, or of one seed from a tour, by data set."""
    texts, settled = [], []
    values: dict[str, Any] = {}
    for path in (path for pattern in TABLES for path in sorted(root.glob(pattern))):
        rows = rows_from_csv(path)
        for data in sorted({row["data"] for row in rows if row.get("data") in TRAIN_SIZES}):
            found = gains([row for row in rows if row["data"] == data], TRAIN_SIZES[data])
            if found and f"{data}_seeds" not in values:  # sweeps first: a tour is one seed of the same comparison
                texts.append(_describe(data, found, values))
                settled.append((data, _over_seeds(found)))
    if not texts:
        return _unsettled(row, "no committed result")
    return row | {"values": values, "number": "; ".join(texts), "verdict": transfer_verdict(settled)}


def _over_seeds(found: Sequence[Row]) -> list[Row]:
    kept = [{key: value for key, value in row.items() if key != "relative"} for row in found]
    return sorted(summarise(kept), key=lambda row: row["size"])


def _describe(data: str, found: Sequence[Row], values: dict[str, Any]) -> str:
    """Put a data set's gains into `values` and return the sentence that quotes them."""
    values[f"{data}_seeds"] = max(row["n"] for row in _over_seeds(found))
    parts = []
    for row in _over_seeds(found):
        key = f"{data}_{size_text(row['size'])}"
        values[key] = round(row["value"], 1)
        values[f"{key}_percent"] = round(mean(r["relative"] for r in found if r["size"] == row["size"]), 0)
        interval = ""
        if row["n"] > 1:
            values[f"{key}_low"], values[f"{key}_high"] = round(row["low"], 1), round(row["high"], 1)
            interval = f" [{{{key}_low:+.1f}}, {{{key}_high:+.1f}}]"
        parts.append(f"{size_text(row['size'])} px {{{key}:+.1f}}{interval} points ({{{key}_percent:+.0f}} %)")
    return f"{data}, seeds {{{data}_seeds}}: " + ", ".join(parts)


def transfer_verdict(settled: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """The claim holds where the interval over seeds lies above 10 points, and fails where it lies below."""
    several = [(data, row) for data, rows in settled for row in rows if row["n"] > 1]  # one seed settles nothing
    good = [f"{data} at {size_text(row['size'])} px" for data, row in several if row["low"] >= 10]
    if good:
        return "holds" if len(good) == len(several) else f"holds when tested on {', '.join(good)}"
    return "does not hold" if several and all(row["high"] < 10 for _, row in several) else "not settled yet"


SOURCED = {
    "forward_overhead": forward_overhead,
    "training_overhead": training_overhead,
    "better_transfer": better_transfer,
}


HEAD = """# The ledger of claims

This package answers a text, the *RoPE Implementation Report* for an H-JEPA: a description of rotary positions in a
hierarchical JEPA, with claims about what they cost and bring. "The report" on these pages is that text. Every claim of
it that is implemented here has a row below. {counts}

The page is written by `python -m benchmarks.ledger` from `results/claims.json`. Structural claims are measured afresh
by `tests/test_claims.py` at every run, one test for each; a number given as "below" is a bound for a rounding error,
any other must agree to a hundredth. The last claim and those on time are read from committed results. A sentence that
holds is a property of this program: another program with the same idea may fail it.
"""


def page(rows: Mapping[str, Claim]) -> str:
    """The ledger as a page of the site: verdicts in a table, then a section for each claim."""
    kinds = {kind: sum(_kind(row) == kind for row in rows.values()) for kind in VERDICTS}
    counts = f"Of {len(rows)} claims " + "; ".join(f"{count} {SAID[kind]}" for kind, count in kinds.items() if count)
    lines = [HEAD.format(counts=counts + "."), "| claim | verdict |", "|---|---|"]
    lines += [f"| {row['claim']} | {row['verdict']} |" for row in rows.values()]
    for row in rows.values():
        found = number(row).split("; ") if row["id"] in SOURCED else [number(row)]  # a line for each model or data set
        verdict = row["verdict"][0].upper() + row["verdict"][1:]
        lines += ["", f"## {row['claim']}", "", f"**{verdict}.** {row['note']}", "", f"- Measured: {row['measured']}"]
        lines += [*(f"- Found: {part}" for part in found), f"- Again with `{row['command']}`"]
    return "\n".join(lines) + "\n"


SAID = {
    "holds": "hold", "holds when": "hold on a condition", "does not hold": "do not hold",
    "not settled yet": "not settled",
}  # fmt: skip


def _kind(row: Claim) -> str:
    return max((kind for kind in VERDICTS if row["verdict"].startswith(kind)), key=len)


def refresh(root: Path) -> None:
    """Rewrite the sourced rows of the ledger from the committed results, and the page from the ledger."""
    rows = [SOURCED[name](row, root) if name in SOURCED else row for name, row in read(root).items()]
    (root / LEDGER).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (root / PAGE).write_text(page(read(root)), encoding="utf-8")


if __name__ == "__main__":
    refresh(Path(__file__).resolve().parent.parent)
