"""Side-by-side timing: interleaved rounds in one process, and ratios taken round by round.

A machine's speed drifts by more than the differences looked for, with its clock, its temperature and its other users.
So all variants of a comparison are run in turn, each round in another order, and a variant's time is divided by the
base's time of the SAME round; what is reported is the median of those ratios with their quartiles.

With one thread the clock is the process's own CPU time, which does not count waiting for other programs; with more it
is the wall clock. Short calls are repeated until a sample lasts `SHORTEST` seconds. The garbage collector is off.

Not covered: GPUs (no synchronisation), instruction counts.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

SHORTEST = 0.02  # seconds a sample lasts at least
Call = Callable[[], Any]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of at least two values, as median, low, high."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


@contextlib.contextmanager
def threads(count: int) -> Iterator[Callable[[], float]]:
    """Run torch on `count` threads, garbage collector off; gives the clock to read, in seconds."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(count)
    gc.disable()
    try:
        yield time.process_time if count == 1 else time.perf_counter
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def sample(call: Call, clock: Callable[[], float], repeats: int) -> float:
    """Seconds per call, over `repeats` calls in a row."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def compare(
    section: str,
    title: str,
    variants: Mapping[str, Call],
    *,
    rounds: int,
    thread_count: int = 1,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    shortest: float = SHORTEST,
) -> dict[str, Any]:
    """Time `variants` against the first of them.

    at_most, at_least: the aims, bounds of the median ratio by variant name. Returns a dict for results.json: the
    rows hold seconds and ratio as {median, low, high}.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    with threads(thread_count) as clock:
        repeats = {}
        for name in names:
            variants[name]()  # caches, lazy imports, compilers
            repeats[name] = max(1, round(shortest / max(sample(variants[name], clock, 1), 1e-9)))
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(sample(variants[name], clock, repeats[name]))
    base = times[names[0]]
    rows = {}
    for name in names:
        rows[name] = {
            "seconds": quartiles(times[name]),
            "ratio": quartiles([one / other for one, other in zip(times[name], base, strict=True)]),
            "at_most": (at_most or {}).get(name),
            "at_least": (at_least or {}).get(name),
        }
    found = {"section": section, "title": title, "threads": thread_count, "rounds": rounds, "base": names[0]}
    return found | {"rows": rows}


def value(
    section: str, title: str, number: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """A single number for results.json, with its aim where there is one."""
    return {
        "section": section, "title": title, "value": number, "unit": unit, "at_most": at_most, "at_least": at_least,
    }  # fmt: skip


def met(row: Mapping[str, Any], number: float) -> bool | None:
    """Whether a number reaches its row's aim; None where there is no aim."""
    low, high = row["at_least"], row["at_most"]
    if low is None and high is None:
        return None
    return (low is None or number >= low) and (high is None or number <= high)
