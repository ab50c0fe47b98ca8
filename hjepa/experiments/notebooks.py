"""Run a notebook with parameters, in its own process and folder, by papermill.

The contract of such a notebook: one code cell tagged `parameters` assigns literals and nothing else, one of them is
`run_dir`, and everything that the notebook makes goes into that folder.
Papermill only warns of an unknown parameter and passes text for a number without a word; here both are refused
before anything starts.
Not covered: notebooks in other languages; values in the parameters cell that are computed from one another.
"""

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..inputs import UserError, nearest

NUMBER_AS_TEXT = "it is text: write it without quotes, such as 1.0e-3"


class NotebookError(RuntimeError):
    """A cell of an executed notebook failed, or its kernel died; one line."""


@dataclass(frozen=True)
class Parameter:
    """A name of the parameters cell: its default, and the annotation as written, "" without one."""

    default: Any
    annotation: str = ""


def find_parameters(path: str | Path) -> dict[str, Parameter]:
    """The names that the cell tagged `parameters` assigns.

    Read by Python's own parser: papermill.inspect_notebook goes line by line and loses a list of several lines.

    Raises:
        FileNotFoundError: no such notebook.
        ValueError: not a notebook, no tagged cell, or a cell that is not Python.
    """
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.ipynb")])
        raise FileNotFoundError(f"notebook {path} does not exist; nearest: {path.parent / near if near else 'none'}")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else ""
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a notebook (.ipynb)") from None
    if not tagged:
        raise UserError(f"{path} has no cell tagged 'parameters'")
    try:
        return _assignments(source)
    except SyntaxError as error:
        raise UserError(f"{path}: the parameters cell is not Python: {error.msg} in line {error.lineno}") from None


def notebook_digest(path: str | Path) -> str:
    """Digest of the code of a notebook: what it prints, its text and its metadata change nothing."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def _assignments(source: str) -> dict[str, Parameter]:
    found = {}
    for line in ast.parse(source).body:
        if isinstance(line, ast.Assign):
            targets, annotation = line.targets, ""
        elif isinstance(line, ast.AnnAssign):
            targets, annotation = [line.target], ast.unparse(line.annotation)
        else:
            continue
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        found.update({name: Parameter(_literal(line.value), annotation) for name in names})
    return found


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None  # computed: any type is taken


def check_parameters(values: Mapping[str, Any], known: Mapping[str, Parameter], where: str) -> None:
    """Refuse a name the notebook does not have, and a value of another type than its default or annotation.

    Raises:
        ValueError: one line with the name, the value and what is right.
    """
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where}: unknown parameter {name!r}; nearest: {nearest(name, known) or 'none'}")
        wanted = _wanted(known[name])
        if not any(_fits(value, kind) for kind in wanted):
            hint = f"; {NUMBER_AS_TEXT}" if isinstance(value, str) and _is_number(value) else ""
            names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in wanted)
            raise UserError(f"{where}: {name}={value!r} must be {names}, not {type(value).__name__}{hint}")


SIMPLE = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "None": type(None)}


def _wanted(parameter: Parameter) -> list[type]:
    words = [part.strip().split("[")[0] for part in parameter.annotation.split("|")]
    if all(word in SIMPLE for word in words):
        return [SIMPLE[word] for word in words]
    return [object] if parameter.default is None else [type(parameter.default)]


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, list) if kind is tuple else isinstance(value, kind)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def execute(
    notebook: str | Path,
    output: str | Path,
    parameters: Mapping[str, Any],
    *,
    cwd: str | Path,
    stream: Any = None,
    progress: bool = False,
) -> None:
    """Run a notebook in folder `cwd`; the executed copy, with a failing cell's traceback too, goes to `output`.

    stream: an open text file that receives what the notebook prints, as it prints it.

    Raises:
        NotebookError: a cell failed or the kernel died.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        papermill.execute_notebook(
            str(notebook), str(output), dict(parameters), progress_bar=progress, cwd=str(cwd),
            stdout_file=stream, stderr_file=stream,
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        problem = " ".join(f"{error.ename}: {error.evalue}".split())
        raise NotebookError(f"{Path(notebook).name}, cell {error.exec_count}: {problem}") from None
    except DeadKernelError:
        raise NotebookError(f"{Path(notebook).name}: the kernel died (killed, or out of memory)") from None
