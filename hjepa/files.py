"""Strict YAML in; folders made fresh and held by one process at a time; files written whole or not at all.

Plain YAML lets mistakes through: the later of two equal keys wins, `no` is a boolean, `1e-3` is a string, and
a few anchors can unfold to gigabytes. Here doubled keys, anchors and tags are refused, only true and false are
booleans, whole numbers are decimal, and 1e-3 is a number (after the core schema, section 10.3 of
yaml.org/spec/1.2.2).

The lock is the kernel's (flock on FOLDER/.lock), so it ends with its process however that dies, and a run that was
killed never has to be unlocked by hand.
Not covered: what keys mean, which `hjepa.config` and `hjepa.experiments.sweep` know; Windows, which has no flock; file
systems of several machines without lock support.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from .inputs import nearest

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
        raise ValueError(f"{path}: no such user; give the folder's full path") from None


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
        raise ValueError(f"{path} is {what}, not a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a UTF-8 text file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The values of YAML text; `where` says in errors what was read."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where}: {error.problem}{line}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


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
