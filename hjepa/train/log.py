"""The folder of a run: whether it may be used, its log, and the log's summary.

log.jsonl and log.csv are always written, TensorBoard by a word. One row per logged step; a row that is also an
evaluation has more fields. When a run is resumed from step t, rows after t are cut first, so that no step stands
twice.

Not covered: remote trackers.
"""

import csv
import io
import json
import math
import statistics
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..config import Config, flat_config, load_config
from ..files import json_text, read_json, write_whole
from ..inputs import UserError
from ..versions import differences, versions
from .checkpoint import saved_steps, trained_config


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
        write_whole(self.jsonl, "".join(json_text(row) + "\n" for row in self.rows))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.csv, table.getvalue())
        self.board = _board(run_dir / "tensorboard", keep_until + 1) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to all logs, at once on disk; a number that is not finite is no number there, None."""
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self.rows.append(row)
        with self.jsonl.open("a") as file:
            file.write(json_text(row) + "\n")
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
    """Rows of run_dir/log.jsonl, an empty list without one. A last line cut short by a crash is left out.

    Raises:
        ValueError: a line that is no row, with the file and its number.
    """
    path = Path(run_dir) / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    return [_row(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.endswith("\n")]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(f"{where} is not a row of a training log: {line.strip()[:60]!r}")
    return row


def _board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard=true needs the tensorboard package: pip install tensorboard, or set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=max(first_step, 0))


def log_columns(levels: int) -> list[str]:
    """Fields of a log row; effective_rank and knn stand only in rows that are evaluations."""
    parts = [f"loss_level_{level}" for level in range(levels)]
    return [
        *("step", "loss", *parts, "loss_views", "regularizer", "cosine", "grad_norm", "lr", "momentum"),
        *("images_per_s", "feature_std", "effective_rank", "knn"),
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First, last and extreme values of a log; None for what it does not hold."""
    measured, trained = [row for row in rows if "effective_rank" in row], [row for row in rows if "loss" in row]
    first = rows[0] if rows and rows[0]["step"] == 0 else {}
    last, loss = (found[-1] if found else {} for found in (measured, trained))
    return {
        "steps": rows[-1]["step"] if rows else 0,
        "loss": loss.get("loss"),
        "knn": last.get("knn"),
        "knn_random": first.get("knn"),
        "effective_rank": last.get("effective_rank"),
        "effective_rank_random": first.get("effective_rank"),
        "effective_rank_lowest": min((row["effective_rank"] for row in measured), default=None),
        "images_per_s": statistics.median(row["images_per_s"] for row in trained) if trained else None,
    }


def note_versions(run_dir: Path, step: int, **more: Any) -> dict[str, Any]:
    """Add what trains from `step` on to run_dir/versions.json, a list, and return it (see `hjepa.versions`).

    A resumed run (step > 0) warns where that differs from what trained before; a new one starts the list anew.
    """
    now, path = versions(**more), run_dir / "versions.json"
    before = read_json(path) if step else []
    before = before if isinstance(before, list) and all(isinstance(entry, dict) for entry in before) else []
    if before and (changed := differences(before[-1], now | {"step": before[-1].get("step")})):
        warnings.warn(f"{run_dir} goes on with other versions, its numbers may differ: {changed}", stacklevel=2)
    write_whole(path, json_text([*before, {"step": step, **now}], indent=1) + "\n")
    return now


# ---- may this folder be used?

# a resumed run may differ from its first part in these: they change no weight but by rounding, at most what is logged
FREE_ON_RESUME = (
    "data.root", "data.path", "train.accumulate", "train.num_workers", "train.threads", "train.log_every",
    "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints", "train.tensorboard",
    "train.grad_checkpointing", "evaluate.",
)  # fmt: skip


def check_run_dir(config: Config, run_dir: Path, resume: bool, newest: Path | None = None) -> str:
    """Refuse to mix two runs in one folder. UserError naming the folder or the first key that differs.

    newest: the newest whole checkpoint. Its config is what was trained, whatever config.yaml says by now.
    A regularizer and the loss of views are statistics of the micro-batch: with them train.accumulate is a part of the
    objective and must not change.
    Returns what a user should know of a run that goes on for more steps, "" otherwise.
    """
    saved = bool(saved_steps(run_dir / "checkpoints"))
    if saved and not resume:
        raise UserError(f"{run_dir} already holds a run; resume it, or choose another folder")
    trained = trained_config(newest) if newest else None
    if trained is None and saved and (run_dir / "config.yaml").exists():
        trained = load_config(run_dir / "config.yaml")
    if trained is None:
        return ""
    before, now = flat_config(trained), flat_config(config)
    whole = config.loss.regularizer == "none" and config.objective in ("masks", "labels")
    bound = () if whole else ("train.accumulate",)
    steps, more = before["train.steps"], now["train.steps"]
    for key in before:
        longer = key == "train.steps" and more > steps
        if before[key] != now[key] and not longer and (key in bound or not key.startswith(FREE_ON_RESUME)):
            raise UserError(f"cannot resume {run_dir}: it was started with {key}={before[key]}, not {now[key]}")
    if more == steps:
        return ""
    return f"{run_dir} was to end at step {steps}; from here on it follows the schedule of a run of {more} steps"


def check_pictures(run_dir: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Refuse to go on with other pictures than before (`pictures_of`). None: an older checkpoint, which kept nothing.

    Raises:
        ValueError: other classes, another number or other ids.
    """
    if not before or before == now:
        return
    classes = zip_longest(before["classes"], now["classes"])
    then, here = next(((a, b) for a, b in classes if a != b), (None, None))
    what = f"not the {now['number']} of {len(now['classes'])} classes found now"
    what += f", with class {here or 'none'} in place of {then or 'none'}" if then != here else ", other files"
    what = f"it was trained on {before['number']} pictures of {len(before['classes'])} classes, {what}"
    raise UserError(f"cannot resume {run_dir}: {what}; give those pictures back, as data.path or data.root")
