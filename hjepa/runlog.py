"""The log of a run: log.jsonl and log.csv, always, and TensorBoard by a word.

One row per logged step; a row that is also an evaluation has more fields. When a run is resumed from step t, rows
after t are cut first, so that no step stands twice.

Not covered: remote trackers.
"""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class RunLog:
    """Append rows (dicts with a "step") to run_dir/log.jsonl and run_dir/log.csv.

    Args:
        run_dir: folder of the run, which must exist.
        keep_until: rows up to and including this step are kept, later ones and a half-written one are cut; -1 for a
            new log.
        columns: the columns of the CSV, in this order.
        tensorboard: also write run_dir/tensorboard.

    Raises:
        ValueError: TensorBoard is asked for and is not installed.
    """

    def __init__(self, run_dir: Path, keep_until: int, columns: list[str], tensorboard: bool = False):
        self.jsonl, self.csv, self.columns = run_dir / "log.jsonl", run_dir / "log.csv", columns
        self.rows = [row for row in read_log(run_dir) if row["step"] <= keep_until]
        _replace(self.jsonl, lambda file: file.writelines(json.dumps(row) + "\n" for row in self.rows))
        _replace(self.csv, self._write_table)
        self.board = _board(run_dir / "tensorboard", keep_until + 1) if tensorboard else None

    def _write_table(self, file: TextIO) -> None:
        writer = csv.DictWriter(file, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to all logs, at once on disk."""
        self.rows.append(row)
        with self.jsonl.open("a") as file:
            file.write(json.dumps(row) + "\n")
        with self.csv.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        if self.board:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.board:
            self.board.close()


def read_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of run_dir/log.jsonl, an empty list without one. A last line cut short by a crash is left out."""
    path = Path(run_dir) / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _replace(path: Path, write: Callable[[TextIO], object]) -> None:
    """Rewrite a file; a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", newline="") as file:
        write(file)
    os.replace(temporary, path)


def _board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "train.tensorboard=true needs the tensorboard package: pip install tensorboard, or set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=max(first_step, 0))
