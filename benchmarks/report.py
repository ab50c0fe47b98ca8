"""From results.json to what people read: results.md, results.png and the sentences that the README quotes.

Nothing here measures; a test holds the committed files to what this module makes of the committed numbers.

Not covered: the ledger of claims (`ledger.py`), which reads results.json by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.timing import met
from hjepa.evaluate.plots import COLORS, CYCLE, INK

Results = Mapping[str, Any]
TITLES = {
    "encoders": "RoPE on against off, whole encoders (off is timm; in bfloat16 both attend in float32)",
    "larger": "A larger image than the encoder was built for",
    "compiled": "The same through torch.compile",
    "memory": "Memory and parameters",
    "rotation": "The rotation alone: qkv buffer to q, k, v (and back), against timm",
    "peers": "Attention layers (gradients of the input) and whole models, against no rotation",
    "growth": "Growth with grid and batch: the rotation's share of a layer",
    "tables": "Tables, against one layer at batch 1",
    "step": "A training step",
    "dropping": "Dropping hidden tokens",
    "masks": "Mask sampling, against the step",
    "data": "Data loading, against the step",
    "views": "A step on views of photographs, against a plain loop and lightly",
}


def section(results: Results, name: str) -> list[dict[str, Any]]:
    """The entries of one section."""
    return [entry for entry in results["entries"] if entry["section"] == name]


def comparison(results: Results, title: str, threads: int = 1) -> dict[str, Any]:
    """The comparison of that title. Raises KeyError where there is none."""
    for entry in results["entries"]:
        if entry["title"] == title and entry.get("threads", threads) == threads:
            return entry
    raise KeyError(f"results.json has no {title!r} on {threads} thread(s)")


def markdown(results: Results) -> str:
    """The text of results.md."""
    parts = ["# What the rotation costs", "", "Written by `make bench` from `results.json`; not edited by hand.", ""]
    parts += [conditions(results), "", "![ratios of the rotation's time](results.png)", ""]
    for name, title in TITLES.items():
        entries = section(results, name)
        timed = [entry for entry in entries if "rows" in entry]
        single = [entry for entry in entries if "value" in entry]
        parts += [f"## {title}", ""]
        if timed:
            parts += ["| comparison | threads | variant | time | ratio [quartiles] | aim | reached |"]
            parts += ["|---|---|---|---|---|---|---|", *_timed_rows(timed), ""]
        if single:
            parts += ["| quantity | value | aim | reached |", "|---|---|---|---|", *map(_value_row, single), ""]
    return "\n".join(parts)


def conditions(results: Results) -> str:
    """One paragraph on where, when and how it was measured."""
    env = results["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    quick = "QUICK RUN: the numbers mean nothing. " if env["quick"] else ""
    return (
        f"{quick}{env['processor']}, {env['cores']} cores ({env['instructions']}), {env['gflops_float32']:.0f} GFLOP/s "
        f"in float32 and {env['gflops_bfloat16']:.0f} in bfloat16 on one thread; {env['system']}, Python "
        f"{env['python']}, {packages}. {env['date']}, load {env['load_before']} before and {env['load_after']} after. "
        f"Clock: {env['clock']}. All variants of a comparison run in turn in one process; a ratio is taken within each "
        "round, and the median and the quartiles over the rounds are given. Whole encoders are timed in several fresh "
        "processes one after the other (those at 384 px and those beside other packages in one); the quartiles are "
        "over the rounds of all, and the median of each stands behind."
    )


def _timed_rows(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        what = f"{entry['title']} | {entry['threads']}"
        for name, row in entry["rows"].items():
            ratio = row["ratio"]
            text = "1" if name == entry["base"] else f"{_number(ratio['median'])} {_interval(ratio)}"
            if "processes" in row and name != entry["base"]:
                text += f"; by process {', '.join(map(_number, sorted(row['processes'])))}"
            seconds = row["seconds"]["median"]
            time = duration(seconds)
            if "pictures" in entry:
                time += f", {entry['pictures'] / seconds:.0f} pictures/s"
            yield f"| {what} | {name} | {time} | {text} | {_aim(row, ratio['median'])} |"
            what = " | "


def _value_row(entry: Mapping[str, Any]) -> str:
    unit = "" if entry["unit"] in ("ratio", "share") else f" {entry['unit']}"
    return f"| {entry['title']} | {_number(entry['value'])}{unit} | {_aim(entry, entry['value'])} |"


def _aim(row: Mapping[str, Any], number: float) -> str:
    reached = met(row, number)
    if reached is None:
        return " | "
    sign, bound = ("at most", row["at_most"]) if row["at_most"] is not None else ("at least", row["at_least"])
    return f"{sign} {bound:g} | {'yes' if reached else 'no'}"


def _interval(ratio: Mapping[str, float]) -> str:
    return f"[{_number(ratio['low'])}, {_number(ratio['high'])}]"


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 or x == 0 else f"{x:.1f}" if x >= 10 else f"{x:.3f}" if x >= 0.1 else f"{x:.2g}"


def duration(seconds: float) -> str:
    """A time with a readable unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"


def percent(entry: Mapping[str, Any], name: str = "RoPE on") -> str:
    """A ratio as a change in per cent with its quartiles: +0.6 % [+0.1, +1.2]."""
    ratio = entry["rows"][name]["ratio"]
    change = {key: 100 * (value - 1) for key, value in ratio.items()}
    return f"{change['median']:+.1f} % [{change['low']:+.1f}, {change['high']:+.1f}]"


def headline(results: Results) -> str:
    """What the README says about cost, as a Markdown table."""
    rows = [
        ("ViT-S, forward, float32", percent(comparison(results, "ViT-S, float32, forward"))),
        ("ViT-S, forward + backward, float32", percent(comparison(results, "ViT-S, float32, forward + backward"))),
        ("ViT-S, forward, bfloat16", percent(comparison(results, "ViT-S, bfloat16, forward"))),
        ("ViT-Ti, forward, float32", percent(comparison(results, "ViT-Ti, float32, forward"))),
        ("ViT-B, forward, float32", percent(comparison(results, "ViT-B, float32, forward"))),
        ("saved for backward", f"{100 * (comparison(results, _SAVED)['value'] - 1):+.1f} %"),
    ]
    table = ["| RoPE on against off, one thread | change [quartiles] |", "|---|---|"]
    return "\n".join([*table, *(f"| {name} | {text} |" for name, text in rows)])


_SAVED = "saved for backward, RoPE on against off"


def figure(results: Results) -> Figure:
    """Left: encoders with RoPE on against off. Right: every peer's attention layer against no rotation."""
    style = Path(__file__).resolve().parent.parent / "notebooks" / "matplotlibrc"
    with matplotlib.rc_context(fname=str(style) if style.exists() else None):
        drawn = Figure(figsize=(8.6, 3.6), layout="constrained")
        left, right = drawn.subplots(1, 2)
        entries = section(results, "encoders")
        on = [(f"{e['title']}, {e['threads']} thr.", e["rows"]["RoPE on"]["ratio"]) for e in entries]
        _dots(left, on, [COLORS["rope"]] * len(on))
        left.set_title("Whole encoders:\nRoPE on / off")
        peers = [entry for entry in section(results, "peers") if entry["title"].startswith("attention layer")]
        rows = {name: row["ratio"] for name, row in peers[0]["rows"].items() if name != peers[0]["base"]}
        _dots(right, list(rows.items()), [CYCLE[0] if name == "hjepa" else COLORS["random"] for name in rows])
        right.set_title("Attention layer, float32, forward:\nwith / without rotation")
        return drawn


def _dots(axes: Any, rows: Sequence[tuple[str, Mapping[str, float]]], colors: Sequence[str]) -> None:
    """A dot at each median with a bar between the quartiles, in per cent of extra time."""
    for place, ((_, ratio), color) in enumerate(zip(rows, colors, strict=True)):
        low, median, high = (100 * (ratio[key] - 1) for key in ("low", "median", "high"))
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot([median], [place], "o", color=color)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("extra time, per cent\n(median and quartiles)")


def write(results: Results, folder: Path) -> None:
    """Write results.md and results.png beside results.json."""
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    figure(results).savefig(folder / "results.png", dpi=130, metadata={"Software": None})
