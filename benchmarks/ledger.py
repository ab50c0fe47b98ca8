"""The claims ledger `results/claims.json`: one row per claim, each number checked or read, none typed twice.

A row has the claim, what was measured, `values` (the numbers), `number` (a sentence with the values' names in braces),
a verdict, a note that explains it, and the command that measures it again. There are two kinds:

    structural   values stand in the file, and tests measure them afresh: `check`. A name that ends in "_below" is a
                 bound, any other the value itself.
    sourced      values and verdict are made here from committed results (timings, transfer tables): `refresh`.

    python -m benchmarks.ledger      rebuild the sourced rows, and the page docs/claims.md from all rows; tests hold
                                     both files to what this would write

Not covered: making those results (`make bench`, `python -m benchmarks.evidence`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hjepa.evaluate.results import Row, rows_from_csv, size_text

Claim = dict[str, Any]
VERDICTS = ("holds", "holds when", "does not hold", "not settled yet")
LEDGER, PAGE = "results/claims.json", "docs/claims.md"
STALE = "results/claims.json or docs/claims.md is older than what it quotes: run python -m benchmarks.ledger"
PRIMARY = "results/primary"
SIDES = {"half": 32, "twice": 128}  # pixels
EMBEDDING = "absolute, resampled"


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
    verdict = "holds" if not over else f"holds when one leaves out {', '.join(over)}" if within else "does not hold"
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
    """Ratios of RoPE on to off, by model, precision and threads where they are not float32 and one:
    {"ViT-S": {median, low, high}, "ViT-S in bfloat16 on 2 threads": .., ..}."""
    wanted, found = {"forward": "forward", "training": "forward + backward"}[what], {}
    for entry in results["entries"]:
        model, precision, passes = ([*entry["title"].split(", "), "", ""])[:3]
        if entry["section"] in ("encoders", "compiled") and passes == wanted:
            name = model + (f" in {precision}" if precision != "float32" else "")
            name += ", compiled" if entry["section"] == "compiled" else ""
            name += f" on {entry['threads']} threads" if entry["threads"] > 1 else ""
            found[name] = entry["rows"]["RoPE on"]["ratio"]
    return found


def better_transfer(row: Claim, root: Path) -> Claim:
    """The gains at half and twice the size in the sixteen comparisons of docs/protocol.md."""
    folder = root / PRIMARY
    if not (folder / "primary.csv").exists():
        return _unsettled(row, "no committed result")
    found = rows_from_csv(folder / "primary.csv")
    values = {"seeds": found[0]["seeds"], "comparisons": len(found)}
    for name, side in SIDES.items():
        means = [each["mean"] for each in found if each["size"] == (side, side)]
        values |= {f"{name}_least": round(min(means), 1), f"{name}_most": round(max(means), 1)}
    values["highest"] = math.ceil(10 * max(each["high"] for each in found)) / 10  # rounded up: a bound
    accuracy = rows_from_csv(folder / "accuracy.csv")
    values["percent"] = round(max(relative_gains(accuracy, found)), 1)
    values["percent_high"] = math.ceil(10 * max(relative_gains(accuracy, found, "high"))) / 10
    values["apart"] = sum(each["p_holm"] < 0.05 for each in found)
    text = (
        "points, means of {comparisons} comparisons over {seeds} seeds: {half_least:+.1f} to {half_most:+.1f} at half "
        "the size, {twice_least:+.1f} to {twice_most:+.1f} at twice; all intervals end below {highest:+.1f}; at most "
        "{percent:+.1f} % of the embedding's accuracy, its interval ends below {percent_high:+.1f} %; {apart} differ "
        "from 0 (p < 0.05 after Holm)"
    )
    if (against := folder / "sincos" / "primary.csv").exists():
        other = rows_from_csv(against)
        values |= {"code_least": round(min(each["mean"] for each in other), 1),
                   "code_most": round(max(each["mean"] for each in other), 1),
                   "code_apart": sum(each["p_holm"] < 0.05 for each in other)}  # fmt: skip
        text += (
            "; over a fixed sine-cosine code in the embedding's place: {code_least:+.1f} to {code_most:+.1f}, "
            "{code_apart} differ from 0"
        )
    return row | {"values": values, "number": text, "verdict": transfer_verdict(found)}


def relative_gains(rows: Sequence[Row], found: Sequence[Row], which: str = "mean") -> list[float]:
    """Of each comparison, the mean gain, or an end of its interval, over the mean accuracy of the position embedding,
    in percent."""
    shares = []
    for each in found:
        own = [row["value"] for row in rows if row["encoder"] == EMBEDDING and row["cell"] == each["comparison"]
               and row["size"] == each["size"] and row["metric"] == each["reader"]]  # fmt: skip
        shares.append(each[which] / mean(own))
    return shares


def transfer_verdict(found: Sequence[Row]) -> str:
    """The claim of 10 points holds where the interval over seeds and pictures lies above them, fails where below."""
    good = [each for each in found if each["low"] >= 10]
    if good:
        where = ", ".join(f"{each['comparison']} at {size_text(each['size'])} px by {each['reader']}" for each in good)
        return "holds" if len(good) == len(found) else f"holds when trained with {where}"
    return "does not hold" if all(each["high"] < 10 for each in found) else "not settled yet"


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
