"""Reading what people write: strict YAML, and the known name nearest to a mistyped one.

Plain YAML lets mistakes through: the later of two equal keys wins, `no` is a boolean, `1e-3` is a string, and
a few anchors can unfold to gigabytes. Here doubled keys, anchors and tags are refused, only true and false are
booleans, and 1e-3 is a number (for those two see the core schema, section 10.3 of yaml.org/spec/1.2.2).
Not covered: what keys mean, which `hjepa.config` and `hjepa.sweep` know.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

LONGEST_FILE = 1_000_000  # bytes; a config is a thousand times shorter
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
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


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


# bool and float by the 1.2 rules; dates and the merge key "<<" are plain words
_LOADER_TAGS = ("bool", "float", "timestamp", "merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[-1] not in _LOADER_TAGS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(path: str | Path) -> Any:
    """The values of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, too long, not UTF-8, or not strict YAML; names the file and the line.
    """
    path = Path(path)
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


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name most like `name`, by the whole or by its last dotted part; "" when none is near."""
    name, names = str(name), list(known)
    whole = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = {key.rsplit(".", 1)[-1]: key for key in reversed(names)}
    part = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.6)
    return last[part[0]] if part else ""
