"""Side-by-side timing: interleaved rounds in one process, and ratios taken round by round.

A machine's speed drifts by more than the differences looked for, with its clock, its temperature and its other users.
So all variants of a comparison are run in turn, each round in another order, and a variant's time is divided by the
base's time of the SAME round; what is reported is the median of those ratios with their quartiles.

A ratio can also differ from process to process, by where memory happens to lie: `in_fresh_processes` repeats a
measurement in new ones, and their medians stand beside the ratio.

With one thread the clock is the process's own CPU time, which does not count waiting for other programs; with more it
is the wall clock. Short calls are repeated until a sample lasts `SHORTEST` seconds. The garbage collector is off.

Not covered: GPUs (no synchronisation), instruction counts.
"""

import contextlib
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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


def measure(
    variants: Mapping[str, Call], *, rounds: int, thread_count: int = 1, shortest: float = SHORTEST
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, the variants in turn."""
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
    return times


def in_fresh_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `count` new processes, one after the other."""
    found = []
    for _ in range(count):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(work, *arguments).result())
    return found


def entry(
    section: str,
    title: str,
    processes: Sequence[Mapping[str, Sequence[float]]],
    *,
    thread_count: int = 1,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What `measure` gave in one process or several, for results.json.

    at_most, at_least: the aims, bounds of the median ratio by variant name. The rows hold seconds and ratio as {median,
    low, high}, over the rounds of all processes, and where there are several the median ratio of each.
    """
    base, rows = next(iter(processes[0])), {}
    for name in processes[0]:
        ratios = [[one / other for one, other in zip(p[name], p[base], strict=True)] for p in processes]
        rows[name] = {
            "seconds": quartiles([second for p in processes for second in p[name]]),
            "ratio": quartiles([ratio for own in ratios for ratio in own]),
            "at_most": (at_most or {}).get(name),
            "at_least": (at_least or {}).get(name),
        }
        if len(processes) > 1:
            rows[name]["processes"] = [statistics.median(own) for own in ratios]
    rounds = sum(len(p[base]) for p in processes)
    found = {"section": section, "title": title, "threads": thread_count, "rounds": rounds, "base": base}
    return found | {"rows": rows}


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
    """Time `variants` against the first of them, in this process; see `measure` and `entry`."""
    times = measure(variants, rounds=rounds, thread_count=thread_count, shortest=shortest)
    return entry(section, title, [times], thread_count=thread_count, at_most=at_most, at_least=at_least)


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
