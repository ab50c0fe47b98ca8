"""Which pictures a large folder holds, as arrays in one file that every process maps: one copy for all of them.

    CRC-32 of the rest, length of the header: int64 | header: JSON | edges: int64 [n + 1] | labels: int64 [n] | text

Path i below the folder is bytes edges[i] to edges[i + 1] of the text. Training pictures come first, validation
pictures after them, both in sorted order. The first process makes the file, in the cache folder that it is given, and
the others wait and open it. A file that is damaged, or older than a change in one of the folders it lists, is made
again. Without a cache folder that can be written, each process holds the arrays in its own memory.

Not covered: pictures behind a link that has changed since; workers that are spawned, not forked, get copies.
"""

import hashlib
import json
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import alone, user_path, write_whole
from .folder import find_images, is_validation, known_endings

FEWEST = 10_000  # files that are worth an index
FOLDERS = 10_000  # to look for them in
VERSION = 1  # of the file and of the rules for splits
FRESH = 2_000_000_000  # ns; a folder that changed so shortly before it was read may have changed again unnoticed


class Names(Sequence[str]):
    """Paths in an array of bytes: name i is text[starts[i] : ends[i]]."""

    def __init__(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.starts, self.ends = text, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return os.fsdecode(self.text[self.starts[index] : self.ends[index]].tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, rows: Sequence[int]) -> "Names":
        """Some of the names, in the order of `rows`, over the same bytes."""
        return Names(self.text, take(self.starts, rows), take(self.ends, rows))


def take(values: Any, rows: Sequence[int]) -> Any:
    """The values at `rows`: of a list a list, of `Names` `Names`, of an array an array (of a range of rows a view)."""
    if isinstance(values, Names):
        return values.take(rows)
    if isinstance(values, np.ndarray):
        return values[rows.start : rows.stop] if isinstance(rows, range) and rows.step == 1 else values[np.array(rows)]
    return [values[i] for i in rows]


def digest(names: Sequence[str]) -> str:
    """SHA-256 of names in their order, the same of `Names` and of a list."""
    if isinstance(names, Names):
        lengths = names.ends - names.starts
        whole = np.array_equal(names.starts[1:], names.ends[:-1]) and len(names)  # they lie one after another
        pairs = [(names.starts[0], names.ends[-1])] if whole else zip(names.starts, names.ends, strict=True)
        parts = [names.text[start:end].tobytes() for start, end in pairs]
    else:
        parts = [os.fsencode(name) for name in names]
        lengths = np.array([len(part) for part in parts])
    found = hashlib.sha256(lengths.astype("<i8").tobytes())
    found.update(b"".join(parts))
    return found.hexdigest()


class Index(NamedTuple):
    """The pictures of one split, training or test. cut: so many are for training, those after them for validation."""

    names: Names
    labels: np.ndarray  # int64 [n]
    cut: int
    classes: list[str]
    endings: list[str]  # of the files, in lower case


def open_index(path: str | Path, split: str, cache: Path) -> Index | None:
    """The index of a split ("train" with validation, or "test") of a folder; None if it has fewer than FEWEST files.

    Raises and warns as `find_images`.
    """
    folder = Path(os.path.realpath(user_path(path)))
    key = json.dumps([VERSION, str(folder), split, sorted(known_endings())])
    file = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    found = _read(file)
    if found is None:
        if not _is_large(folder):
            return None
        with alone(cache, file.name):
            found = _read(file) or _make(folder, split, file)
    index, remarks = found
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return index


def _is_large(folder: Path) -> bool:
    """Whether it has FEWEST files; looks into FOLDERS folders at most, since links may form a ring."""
    count = 0
    for _, _, files in islice(os.walk(folder, followlinks=True), FOLDERS):
        count += len(files)
        if count >= FEWEST:
            return True
    return False


def _make(folder: Path, split: str, file: Path) -> tuple[Index, list[str]]:
    made, stamps = time.time_ns(), dict[str, int]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names, labels, classes = find_images(folder, split, stamps)
    held = np.array(is_validation(names, labels) if split == "train" else [False] * len(names))
    order = np.argsort(held, kind="stable")
    text = [os.fsencode(names[i]) for i in order]
    header = json.dumps({
        "made": made, "stamps": stamps, "count": len(names), "cut": len(names) - int(held.sum()), "classes": classes,
        "endings": sorted({os.path.splitext(name)[1].lower() for name in names}),
        "warnings": [str(warning.message) for warning in caught],
    }).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    edges = np.cumsum([0, *map(len, text)], dtype=np.int64)
    numbers = np.array(labels, dtype=np.int64)[order]
    rest = b"".join((np.int64(len(header)).tobytes(), header, edges.tobytes(), numbers.tobytes(), *text))
    whole = bytearray(np.int64(zlib.crc32(rest)).tobytes() + rest)
    with suppress(OSError):
        write_whole(file, lambda opened: opened.write(whole))
    return _read(file) or _parse(np.frombuffer(whole, np.uint8))


def _read(file: Path) -> tuple[Index, list[str]] | None:
    """The index in a file; None where it is absent, damaged or stale."""
    try:
        return _parse(np.asarray(np.memmap(file, np.uint8, "c")), check=True)  # its pages are shared until written to
    except (OSError, ValueError, IndexError):
        return None


def _parse(raw: np.ndarray, check: bool = False) -> tuple[Index, list[str]]:
    """The index in uint8 `[bytes]`. ValueError, with `check`, if it is damaged or stale."""
    if check and int(raw[:8].view(np.int64)[0]) != zlib.crc32(raw[8:].data):
        raise ValueError("damaged")
    start = 16 + int(raw[8:16].view(np.int64)[0])
    header = json.loads(raw[16:start].tobytes())
    stamps, count = header["stamps"], header["count"]
    if check and max(stamps.values()) > header["made"] - FRESH:
        raise ValueError("made too shortly after a change")
    if check and any(os.stat(folder).st_mtime_ns != stamp for folder, stamp in stamps.items()):
        raise ValueError("stale")
    edges = raw[start : start + 8 * (count + 1)].view(np.int64)
    start += edges.nbytes
    labels = raw[start : start + 8 * count].view(np.int64)
    names = Names(raw[start + labels.nbytes :], edges[:-1], edges[1:])
    return Index(names, labels, header["cut"], header["classes"], header["endings"]), header["warnings"]
