"""Run folders: made fresh, held by one process at a time, files in them written whole or not at all.

The lock is the kernel's (flock on FOLDER/.lock), so it ends with its process however that dies, and a run that was
killed never has to be unlocked by hand.
Not covered: Windows, which has no flock; file systems of several machines without lock support.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fresh_folder(parent: str | Path, name: str) -> Path:
    """Make parent/name, or parent/name-2, -3, ... where that exists; two callers never get the same one."""
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        folder = parent / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
        else:
            return folder


def fresh_path(path: str | Path) -> Path:
    """`path`, or NAME-2.SUFFIX, -3, ... beside it where that exists. Makes nothing."""
    path, count = Path(path), 1
    fresh = path
    while fresh.exists():
        count += 1
        fresh = path.with_stem(f"{path.stem}-{count}")
    return fresh


@contextmanager
def hold(folder: str | Path) -> Iterator[Path]:
    """Hold `folder`, made where absent, against every other process until the block ends.

    Raises:
        ValueError: another process holds it; the message names that process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(100).strip() or "unknown"
            raise ValueError(f"{folder} is in use by another run, process {holder}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield folder


def is_held(folder: str | Path) -> bool:
    """Whether some process, this one too, holds the folder."""
    path = Path(folder) / ".lock"
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def write_whole(path: str | Path, text: str) -> None:
    """Write text so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; None where it is absent or cut short."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
