"""What made a result: versions of this package, torch and timm, and the processor, for the records that runs keep.

A commit is named where the package stands in a git checkout, with "changed" where its files differ from that commit.
Not covered: the versions of all other packages, which `pip freeze` lists.
"""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def versions(**more: Any) -> dict[str, Any]:
    """Names and versions, JSON values; `more` is added, such as precision="bf16"."""
    packages = {name: _version(name) for name in ("hjepa", "torch", "timm")}
    return {**packages, "commit": _commit(), "python": platform.python_version(), "processor": _processor(), **more}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """ "torch 2.13.0, now 2.14.1; ..." for what both know and differs; "" where nothing does."""
    both = [name for name in before if name in now and before[name] != now[name]]
    return "; ".join(f"{name} {before[name]}, now {now[name]}" for name in both)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    if not (PACKAGE.parent / ".git").exists():
        return None
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--", PACKAGE.name)
    return f"{head}, changed" if head and changes else head or None


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def _processor() -> str:
    """The CPU's own name on Linux, elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
