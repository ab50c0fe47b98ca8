"""The tour: the resolution-transfer notebook run once, with everything it made in one fresh folder.

The folder gets the executed notebook, its HTML, and what the notebook itself writes into `run_dir`: metrics.json,
table.csv, figures, the configs and logs of its trainings. An earlier tour is never touched.
Not covered: what is measured and why; that is the notebook's.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..evaluate.results import format_table, rows_from_csv
from ..files import fresh_folder, user_path, write_whole
from ..inputs import UserError, nearest
from ..train.log import read_log
from .notebooks import check_parameters, execute, find_parameters

NOTEBOOK = "notebooks/07_resolution_transfer.ipynb"
TABLE_METRICS = ("probe", "knn", "retrieval")
WATCH = 5.0  # seconds between looks at the training logs


def find_file(name: str) -> Path:
    """A file of the repository: from the checkout this package stands in, else the copy in the installed package."""
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent, package / "_assets"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{name} is neither in {package.parent} nor in the installed package")


def run_tour(
    data: str = "openmoji",
    *,
    quick: bool = False,
    path: str | None = None,
    root: str = "data",
    out: str | Path = "runs",
    notebook: Path | None = None,
) -> Path:
    """Run the tour and return its folder, out/tour-DATE-TIME.

    data: a registered data set; path: its folder, for "imagefolder"; root: where other data sets are kept;
    quick: fewer steps and pictures. Prints the notebook's own output, one line per logged training step,
    the table, and where the files are.

    Raises:
        ValueError: unknown data set (with the nearest), or a path given to a data set that takes none.
        FileNotFoundError: `path` or the notebook is absent.
        NotebookError: a cell failed; the executed notebook with the traceback is in the folder.
    """
    _check_data(data, path)
    notebook = notebook or find_file(NOTEBOOK)
    known = find_parameters(notebook)
    wanted = {"data": data, "quick": quick, "path": _absolute(path), "data_root": _absolute(root)}
    parameters = {name: value for name, value in wanted.items() if value is not None and name in known}
    check_parameters({"run_dir": "", **parameters}, known, str(notebook))
    folder = fresh_folder(user_path(out), f"tour-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    print(f"tour on {data}, results in {folder}", flush=True)
    executed = folder / notebook.name
    try:
        with _training_lines(folder):
            parameters["run_dir"] = str(folder)
            execute(notebook, executed, parameters, cwd=notebook.parent, stream=_AboveTheBar(), progress=True)
    finally:
        if executed.exists():
            write_html(executed)
    report(folder)
    return folder


def _check_data(data: str, path: str | None) -> None:
    from ..data.images import DATASETS

    if data not in DATASETS:
        near = nearest(data, DATASETS) or "none"
        raise UserError(f"data set {data!r} is not known; choose one of {', '.join(DATASETS)}; nearest: {near}")
    if (data == "imagefolder") != (path is not None):
        raise UserError("imagefolder takes --path FOLDER, a folder of class folders; no other data set does")
    if path is not None and not user_path(path).is_dir():
        raise FileNotFoundError(f"--path {path}: no such folder")


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(user_path(path).resolve())


def write_html(executed: Path) -> Path:
    """NAME.ipynb -> NAME.html beside it."""
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_filename(str(executed))
    html = executed.with_suffix(".html")
    write_whole(html, body)
    return html


def report(folder: Path) -> None:
    """Print the table, then the files a reader wants."""
    table = folder / "table.csv"
    if table.exists():
        rows = rows_from_csv(table)
        measured = {row["metric"] for row in rows}
        for metric in TABLE_METRICS:
            if metric in measured:
                print(f"\n{format_table(rows, metric)}")
    print("\nfiles:")
    for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        print(f"  {file}")


class _AboveTheBar:
    """A text file that prints above papermill's progress bar."""

    def write(self, text: str) -> None:
        tqdm.write(text, end="")

    def flush(self) -> None:
        sys.stdout.flush()


@contextmanager
def _training_lines(folder: Path) -> Iterator[None]:
    """Show the newest log row of each training under `folder`: bars drawn inside a kernel do not reach a terminal."""
    stop, shown = threading.Event(), dict[Path, Any]()

    def watch() -> None:
        while not stop.wait(WATCH):
            for log in sorted(folder.rglob("log.jsonl")):
                rows = [row for row in read_log(log.parent) if "loss" in row]
                if rows and shown.get(log) != rows[-1]["step"]:
                    shown[log] = rows[-1]["step"]
                    tqdm.write(f"{log.parent.name}: step {rows[-1]['step']}, loss {rows[-1]['loss']:.3f}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
