"""Strict YAML in; folders made fresh and held by one process at a time; files written whole or not at all.

Plain YAML lets mistakes through: the later of two equal keys wins, `no` is a boolean, `1e-3` is a string, and
a few anchors can unfold to gigabytes. Here doubled keys, anchors and tags are refused, only true and false are
booleans, whole numbers are decimal, and 1e-3 is a number (after the core schema, section 10.3 of
yaml.org/spec/1.2.2).

The locks are filelock's, held by the kernel, so they end with their process however that dies, and a run that was
killed never has to be unlocked by hand.
Not covered: what keys mean, which `hjepa.config` and `hjepa.experiments.sweep` know; file systems of several machines
without lock support.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from filelock import FileLock, Timeout

from .inputs import UserError, nearest

PATIENCE = 1.0  # seconds until a lock counts as held
LONGEST_FILE = 1_000_000  # bytes; a config is a thousand times shorter
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"[-+]?\d+$")
FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):  # an alias has one too
            raise _error("anchors and aliases are not read", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a word", key)
            if key.value in seen:
                raise _error(f"doubled key {key.value!r}", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


    def construct_yaml_int(self, node: Any) -> int:
        return int(self.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


# bool, int and float by the 1.2 rules, whole numbers in decimal alone: 010 is ten, and 0x10, 1_000, 1:30, dates and
# the merge key "<<" are plain words
_LOADER_TAGS = ("bool", "int", "float", "timestamp", "merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[-1] not in _LOADER_TAGS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


class _WordLoader(_Loader):
    """Takes every scalar for a word."""


_WordLoader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every word that the rules above, or those of other readers, take for something else."""


for _tag, _rule, _first in (("bool", BOOL, "tTfF"), ("int", INT, "-+0123456789"), ("float", FLOAT, "-+.0123456789")):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _rule, list(_first))


def dump_yaml(tree: Any) -> str:
    """YAML text of plain dicts, lists, words and numbers, which `parse_yaml` reads back equal."""
    text = yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, sort_keys=False)  # with escapes


def user_path(path: str | Path) -> Path:
    """A path as people write it: a leading ~ is the home folder.

    Raises:
        ValueError: the home folder of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such user; give the folder's full path") from None


def read_yaml(path: str | Path) -> Any:
    """The values of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, too long, not UTF-8, or not strict YAML; names the file and the line.
    """
    path = user_path(path)
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise FileNotFoundError(f"{path} does not exist; nearest: {path.parent / near if near else 'none'}")
    if path.is_dir() or path.stat().st_size > LONGEST_FILE:
        what = "a folder" if path.is_dir() else f"over {LONGEST_FILE} bytes"
        raise UserError(f"{path} is {what}, not a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str, *, words: bool = False) -> Any:
    """The values of YAML text, with `words` all of them text as it stands; `where` says in errors what was read."""
    try:
        return yaml.load(text, Loader=_WordLoader if words else _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}: {error.problem}{line}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


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
        UserError: another process holds it; the message names that process.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock"), folder / ".lock.pid"
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=PATIENCE / 50)  # `is_held` has it for a moment
    except Timeout:
        pid = holder.read_text().strip() if holder.exists() else "unknown"
        raise UserError(f"{folder} is in use by another run, process {pid or 'unknown'}") from None
    try:
        holder.write_text(f"{os.getpid()}\n")
        yield folder
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def is_held(folder: str | Path) -> bool:
    """Whether some process, this one too, holds the folder."""
    path = user_path(folder) / ".lock"
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=PATIENCE / 50, poll_interval=PATIENCE / 100):
            return False
    except Timeout:
        return True


@contextmanager
def alone(folder: Path, name: str, *, make: bool = True) -> Iterator[None]:
    """One process at a time in `folder` for the work `name`; the others wait.

    Nobody waits in a folder that cannot be written or, with make=False, is absent.
    """
    lock = FileLock(folder / f".{name}.lock")
    with suppress(OSError):
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_whole(path: str | Path, content: str | bytes | Callable[[BinaryIO], Any]) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between.

    content: text (as UTF-8), bytes, or a function that writes to the open binary file it is given.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def json_text(tree: Any, indent: int | None = None) -> str:
    """JSON as its standard has it: a number that is not finite becomes null."""
    return json.dumps(_finite(tree), indent=indent, allow_nan=False)


def _finite(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; None where it is absent or cut short."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
