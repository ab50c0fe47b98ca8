"""Run the sections and write results.json; see `__main__.py` for the command."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import rotating, stepping, views
from benchmarks.rotating import Entry, Setup, matmul_speed

FOLDER = Path(__file__).resolve().parent
PACKAGES = ("torch", "timm", "transformers", "rotary-embedding-torch", "accelerate", "numpy")
SECTIONS: dict[str, Callable[[Setup], Iterator[Entry]]] = {
    "encoders": rotating.encoders,
    "larger": rotating.larger,
    "compiled": rotating.compiled,
    "memory": rotating.memory,
    "rotation": rotating.rotation,
    "peers": rotating.against_peers,
    "growth": rotating.growth,
    "tables": rotating.tables,
    "step": stepping.step,
    "dropping": stepping.dropping,
    "masks": stepping.masks,
    "data": stepping.data,
    "views": views.views,
}


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(quick: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "quick": quick,
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "gflops_float32": round(matmul_speed(Setup(quick).matrix, torch.float32, 1), 1),
        "gflops_bfloat16": round(matmul_speed(Setup(quick).matrix, torch.bfloat16, 1), 1),
        "clock": "process CPU time with 1 thread, wall clock with more",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def run(only: Sequence[str] = (), quick: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the sections named (default all) and return what results.json holds.

    Raises:
        ValueError: a section that does not exist.
    """
    for name in only:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; choose from {', '.join(SECTIONS)}")
    start = time.perf_counter()
    results: dict[str, Any] = {"environment": environment(quick), "entries": []}
    for name, section in SECTIONS.items():
        if only and name not in only:
            continue
        for entry in section(Setup(quick)):
            results["entries"].append(entry)
            say(f"{time.perf_counter() - start:6.1f} s  {line(entry)}")
    if hasattr(os, "getloadavg"):
        results["environment"]["load_after"] = round(os.getloadavg()[0], 2)
    results["environment"]["seconds"] = round(time.perf_counter() - start, 1)
    return results


def line(entry: Entry) -> str:
    """One line about an entry, for the terminal."""
    if "value" in entry:
        return f"{entry['title']}: {entry['value']:.4g} {entry['unit']}"
    ratios = ", ".join(f"{name} {row['ratio']['median']:.3f}" for name, row in list(entry["rows"].items())[1:])
    speeds = "".join(
        f"; {name} {entry['pictures'] / row['seconds']['median']:.0f} pictures/s"
        for name, row in (entry["rows"].items() if "pictures" in entry else ())
    )
    return f"{entry['title']}, {entry['threads']} thread(s): {ratios}{speeds}"


def rounded(tree: Any) -> Any:
    """Floats to six significant digits: the file stays readable, nothing measured is that exact."""
    if isinstance(tree, float):
        return float(f"{tree:.6g}")
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return [rounded(item) for item in tree] if isinstance(tree, list) else tree


def write(results: dict[str, Any], path: Path) -> None:
    """Write results.json, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    part.replace(path)
