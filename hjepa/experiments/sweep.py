"""A sweep: one notebook run once per combination of parameters, a few at a time, gathered into one table.

    notebook: notebooks/07_resolution_transfer.ipynb
    parameters: {data: openmoji}          # the same in every run
    grid: {theta: [10.0, 100.0]}          # every combination of these
    seeds: [0, 1, 2]                      # short for one more grid entry, `seed`
    max_parallel: 2                       # runs at a time
    executor: local                       # or slurm, with a section `slurm:` of submitit's options
    minutes_per_run: 12                   # as timed before; announced until a run of this sweep has been timed
    primary:                              # comparisons fixed beforehand -> primary.csv (`hjepa.evaluate.primary`)
      - {comparison: twice the size, a: "rope, interpolated", b: "absolute, resampled", metric: knn, size: 128,
         setting: theta=10.0}

A relative path among the parameters (path, data_root, data.path=...) is one of the current folder, in which the
notebook does not run. The parameter `recipe` names a file of the current folder, or else of the package. Each run has
a folder out/LABEL-HASH, HASH of the parameters, the notebook's code, the recipe's text and the package's version, so a
changed notebook or recipe makes its runs again; the notebook gets it as `run_dir` and writes metrics.json there,
{"rows": [...]}, and may write hits.npz (`hjepa.evaluate.primary.save_hits`). A finished run has state "finished" in
run.json and is never run again. One that was stopped is run again in the same folder, so a notebook that trains should
resume there. A run that fails leaves error.txt and holds up nobody.

A sweep that chooses reads validation pictures: `split: validation`, a parameter of its notebook, which is what
notebooks/one_run.ipynb takes where none is named. `split: test` is for sweeps from which nothing is chosen.

Runs outlive a sweep that is killed. Each holds its folder's lock, so the next sweep waits for it instead of doubling
it; results pass through files only, nothing is unpickled. A job that Slurm preempts is requeued and goes on as one that
was stopped, and so is one that reaches timeout_min under Slurm, three times at most (submitit's default).
Source of the job handling: submitit. Not covered: stopping bad runs early, adaptive search.
"""

import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from tqdm import tqdm

from ..evaluate.results import rows_to_csv, setting_names, sweep_csv, sweep_rows
from ..files import hold, is_held, json_text, read_json, read_yaml, user_path, write_whole
from ..inputs import UserError, check_choice, nearest, size_pair
from ..pretrained import list_pretrained
from ..versions import differences, versions
from .notebooks import NotebookError, check_parameters, execute, find_parameters, notebook_digest
from .tour import find_file

EXECUTORS = ("local", "slurm")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MOST_RUNS = 10_000
POLL = 0.2  # seconds between looks at the running jobs
# parameters, and keys of overrides
PATHS = ("path", "root", "data_path", "data_root", "data.path", "data.root", "train.init_from")
LATE_FILES = 15  # seconds that files of a Slurm job may take to appear here
GATHERED = ("primary.csv", "summary.md", "figure.png", "table.csv")  # from rows of all runs
GRACE = 300  # seconds between SIGTERM and the end of a job that is preempted, at most
TERMINATED = threading.Event()  # this job got SIGTERM


class ComparisonError(UserError):
    """A comparison that the rows of finished runs cannot answer; all other results are written."""


@dataclass
class Sweep:
    """What a sweep file says."""

    notebook: str  # path from the current folder
    parameters: dict[str, Any] = field(default_factory=dict)  # the same for every run
    grid: dict[str, list[Any]] = field(default_factory=dict)  # values to combine
    seeds: list[int] = field(default_factory=list)  # values of the parameter `seed`
    executor: str = "local"  # local processes, or slurm
    max_parallel: int = 2  # runs at a time
    threads_per_run: int = 1  # CPU threads of each
    timeout_min: int = 1440  # a longer run fails; under Slurm it is requeued first
    slurm: dict[str, Any] = field(default_factory=dict)  # submitit's options, such as partition
    out: str = ""  # results folder; runs/sweeps/NAME of the file if absent
    minutes_per_run: float = 0.0  # as timed before; 0: not known
    primary: list[dict[str, Any]] = field(default_factory=list)  # comparisons fixed beforehand


@dataclass(frozen=True)
class Run:
    """One combination of parameters and its folder."""

    folder: Path
    parameters: dict[str, Any]
    varied: dict[str, Any]  # those that tell it from other runs
    recipe_file: str = ""  # full path of the recipe; "" without one
    recipe: str = ""  # digest of its text

    @property
    def finished(self) -> bool:
        state, metrics = read_json(self.folder / "run.json"), read_json(self.folder / "metrics.json")
        done = isinstance(state, dict) and state.get("state") == "finished"
        return done and isinstance(metrics, dict) and isinstance(metrics.get("rows"), list)

    @property
    def error(self) -> str:
        """First line of error.txt, "" where there is none."""
        path = self.folder / "error.txt"
        return (path.read_text(encoding="utf-8").splitlines() or ["unknown"])[0] if path.exists() else ""


def load_sweep(path: str | Path) -> tuple[Sweep, list[Run]]:
    """Read a sweep file and list its runs, all names and types checked against the notebook.

    Raises:
        FileNotFoundError: no such file or notebook.
        ValueError: unknown key or parameter (with the nearest), wrong type, empty list, too many or doubled runs.
    """
    sweep = _read(Path(path))
    grid = {**sweep.grid, **({"seed": sweep.seeds} if sweep.seeds else {})}
    known = find_parameters(sweep.notebook)
    fixed = dict(sweep.parameters)
    if "run_dir" not in known:
        raise UserError(f"{sweep.notebook} has no parameter run_dir, so a run cannot be told where to write")
    if "threads" in known and "threads" not in {**fixed, **grid}:
        fixed["threads"] = sweep.threads_per_run
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for varied in combinations:
        check_parameters({**fixed, **varied}, known, str(path))
    made_by = [notebook_digest(sweep.notebook), versions()["hjepa"]]
    usual = known["recipe"].default if "recipe" in known else None
    runs = [_run(sweep, fixed, varied, made_by, usual) for varied in combinations]
    if len({run.folder for run in runs}) < len(runs):
        raise UserError(f"{path}: the grid names the same run twice; look for a doubled value")
    _check_settings(sweep, runs, str(path))
    return sweep, runs


def _read(path: Path) -> Sweep:
    tree = read_yaml(path)
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: a sweep file holds keys such as notebook, parameters and grid")
    known: dict[str, Any] = {f.name: f.type for f in fields(Sweep)}
    for key, value in tree.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; nearest: {nearest(str(key), known) or 'none'}")
        kind = get_origin(known[key]) or known[key]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise UserError(f"{path}: {key}={value!r} must be {kind.__name__}, not {type(value).__name__}")
    if not tree.get("notebook"):
        raise UserError(f"{path}: no key `notebook`, the path of what to run")
    sweep = Sweep(**tree)
    sweep.notebook = str(user_path(sweep.notebook))
    sweep.out = str(user_path(sweep.out)) if sweep.out else str(Path("runs", "sweeps", path.stem))
    _check(sweep, path)
    return sweep


def _check(sweep: Sweep, path: Path) -> None:
    if sweep.executor not in EXECUTORS:
        near = nearest(sweep.executor, EXECUTORS) or "local"
        raise UserError(f"{path}: executor={sweep.executor!r} must be local or slurm; nearest: {near}")
    for key in ("max_parallel", "threads_per_run", "timeout_min"):
        if getattr(sweep, key) < 1:
            raise UserError(f"{path}: {key}={getattr(sweep, key)} must be at least 1")
    count = 1
    for key, values in {**sweep.grid, "seeds": sweep.seeds or [0]}.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid.{key}={values!r} must be a list of one or more values")
        count *= len(values)
    if count > MOST_RUNS:
        raise UserError(f"{path}: the grid has {count} runs, more than {MOST_RUNS}")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in sweep.seeds):
        raise UserError(f"{path}: seeds={sweep.seeds!r} must be whole numbers")
    for key, value in {**sweep.parameters, **sweep.grid}.items():
        if any(isinstance(number, float) and not math.isfinite(number) for number in _leaves(value)):
            raise UserError(f"{path}: {key}={value!r} holds a number that is not finite, which JSON does not know")
    if not 0 <= sweep.minutes_per_run < math.inf:
        raise UserError(f"{path}: minutes_per_run={sweep.minutes_per_run} must be a number of minutes, 0 if not known")
    _check_primary(sweep, path)
    names = [*sweep.parameters, *sweep.grid, *(["seed"] if sweep.seeds else [])]
    for name in ({n for n in names if names.count(n) > 1} | {"run_dir"}) & set(names):
        why = "is set by the sweep itself" if name == "run_dir" else "is given twice (parameters, grid, seeds)"
        raise UserError(f"{path}: parameter {name} {why}")


def _check_primary(sweep: Sweep, path: Path) -> None:
    if not sweep.primary:
        return
    from ..evaluate.plots import METRICS  # these bring torch, which a mistake in the file need not wait for
    from ..evaluate.primary import NAMES

    for asked in sweep.primary:
        missing = [name for name in NAMES if not (isinstance(asked, dict) and name in asked)]
        if missing:
            raise UserError(f"{path}: primary comparison {asked!r} lacks {', '.join(missing)}")
        size_pair(asked["size"])
        for word, known in [(asked["metric"], tuple(METRICS)), *((key, (*NAMES, "setting")) for key in asked)]:
            if word not in known and (near := nearest(word, known)):  # other metrics and tags are a notebook's own
                raise UserError(f"{path}: primary comparison {asked['comparison']!r}: {word!r}; nearest: {near}")
    if len(sweep.seeds) < 2:
        raise UserError(f"{path}: primary comparisons need two seeds or more, not seeds={sweep.seeds!r}")


def _check_settings(sweep: Sweep, runs: list[Run], where: str) -> None:
    """The `setting` of each primary comparison is one of the sweep's, and given where there are several."""
    if not sweep.primary:
        return
    from ..evaluate.primary import NAMES

    settings = tuple(dict.fromkeys(setting_names([run.parameters for run in runs])))
    for asked in sweep.primary:
        if "setting" in asked or (len(settings) > 1 and len(asked) == len(NAMES)):
            check_choice(f"{where}: comparison {asked['comparison']!r}: setting", asked.get("setting"), settings)


def _leaves(value: Any) -> Iterator[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inside is None:
        yield value
    else:
        for item in inside:
            yield from _leaves(item)


def _run(sweep: Sweep, fixed: dict[str, Any], varied: dict[str, Any], made_by: list[Any], usual: Any = None) -> Run:
    """usual: the recipe of runs that name none."""
    parameters = {name: _absolute(name, value) for name, value in {**fixed, **varied}.items()}
    label = re.sub(r"[^\w.=,+-]+", "-", ",".join(f"{k}={v}" for k, v in varied.items()))[:80] or "run"

    def folder(*more: str) -> Path:
        identity = json.dumps([Path(sweep.notebook).name, *made_by, *more, parameters], sort_keys=True)
        return Path(sweep.out).resolve() / f"{label}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"

    name = parameters.get("recipe", usual)
    found = _recipes(name, Path(sweep.notebook)) if isinstance(name, str) and name else []
    if not found:
        return Run(folder(), parameters, varied)
    texts = [_digest(path.read_bytes()) for path in found]
    own, older = folder(texts[0]), folder()  # the recipe's text did not count in older names
    if not own.exists() and len(set(texts)) == 1 and _began_after(older, found):
        own = older
    return Run(own, parameters, varied, str(found[0]), texts[0])


def _recipes(name: str, notebook: Path) -> list[Path]:
    """The files that a recipe's name can mean, first the one that counts: of the current folder, the package, or beside
    the notebook."""
    places = [user_path(name).absolute()]
    with suppress(FileNotFoundError):
        places.append(find_file(name))
    return [path for path in [*places, notebook.parent / name] if path.is_file()]


def _began_after(folder: Path, recipes: list[Path]) -> bool:
    """Whether all files of a run are newer than its recipe, so that the recipe was not edited since."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return bool(times) and min(times) > max(path.stat().st_mtime for path in recipes)


def _absolute(name: str, value: Any) -> Any:
    """A parameter that is a path, or the override of one, as seen from any folder; all else as it is."""
    if isinstance(value, list):
        return [_absolute("", item) for item in value]
    if isinstance(value, dict):
        return {key: _absolute("", item) for key, item in value.items()}
    if not isinstance(value, str) or not value:
        return value
    key, equals, path = value.partition("=")
    names = list_pretrained() if key.strip() == "train.init_from" else []  # encoders of the package, no paths
    if equals and key.strip() in PATHS and path.strip() not in ("", "~", "null", *names):
        return f"{key.strip()}={user_path(path.strip()).absolute()}"
    return str(user_path(value).absolute()) if name in PATHS else value


@dataclass(frozen=True)
class Job:
    """What submitit runs. On its signal for preemption (SIGUSR2) it calls `checkpoint` and submits the result again.

    SIGTERM, which may come first and to every process of the job, is noted: a kernel that dies of it is no failed run.
    """

    notebook: str
    run: Run
    threads: int

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: TERMINATED.set())
        run_one(self.notebook, self.run, self.threads)

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_one(notebook: str, run: Run, threads: int) -> None:
    """What a job does: hold the folder, run the notebook, leave run.json or error.txt. In a process of its own."""
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    while is_held(run.folder):  # by a job of a sweep that was killed
        time.sleep(POLL)
    with hold(run.folder):
        if not run.finished:
            _attempt(notebook, run)


def _attempt(notebook: str, run: Run) -> None:
    for name in ("metrics.json", "run.json", "error.txt"):
        (run.folder / name).unlink(missing_ok=True)
    started = time.time()
    record: dict[str, Any] = {"state": "finished", "parameters": run.parameters, "notebook": notebook_digest(notebook),
                              "versions": versions(), **({"recipe": run.recipe} if run.recipe else {})}  # fmt: skip
    try:
        recipe = {"recipe": _copied_recipe(run)} if run.recipe else {}
        parameters = {**run.parameters, **recipe, "run_dir": str(run.folder)}
        execute(notebook, run.folder / Path(notebook).name, parameters, cwd=Path(notebook).parent, stream=sys.stdout)
        metrics = read_json(run.folder / "metrics.json")
        if not isinstance(metrics, dict) or not isinstance(metrics.get("rows"), list):
            raise NotebookError('the notebook left no metrics.json with a list "rows" in run_dir')
    except Exception as error:
        if TERMINATED.is_set():
            time.sleep(GRACE)  # the job ends meanwhile
        write_whole(run.folder / "error.txt", f"{_one_line(error)}\n\n{traceback.format_exc()}")
        record["state"] = "failed"
    record["seconds"] = round(time.time() - started, 1)
    write_whole(run.folder / "run.json", json_text(record, indent=1) + "\n")


def _copied_recipe(run: Run) -> str:
    """Path of the run's own copy of its recipe, which nobody edits while the notebook reads it again and again."""
    text = Path(run.recipe_file).read_bytes()
    if _digest(text) != run.recipe:
        raise NotebookError(f"recipe {run.recipe_file} was edited since the sweep began; start the sweep again")
    copy = run.folder / Path(run.recipe_file).name
    write_whole(copy, text)
    return str(copy)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, NotebookError) else f"{type(error).__name__}: {text}"


def run_sweep(path: str | Path, *, progress: bool = True) -> list[Run]:
    """Run what is not finished yet, gather all into table.csv and results.json, return the runs that failed.

    Raises:
        ValueError: as `load_sweep`, or another process runs this sweep, or there is no Slurm here.
        ComparisonError: a comparison without rows, once all else is gathered.
    """
    sweep, runs = load_sweep(path)
    with hold(sweep.out):
        todo = [run for run in runs if not run.finished]
        _say_what_is_kept([run for run in runs if run.finished])
        _Jobs(sweep, todo).work(tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", disable=not progress))
        gather(runs, Path(sweep.out), sweep.primary)
    return [run for run in runs if not run.finished]


def _say_what_is_kept(kept: list[Run]) -> None:
    """Finished runs that other versions made are kept, and not without a word."""
    now, seen = versions(), dict[str, int]()
    for run in kept:
        changed = differences(read_json(run.folder / "run.json").get("versions") or {}, now)
        if changed:
            seen[changed] = seen.get(changed, 0) + 1
    for changed, count in seen.items():
        text = f"kept {count} finished runs made by other versions: {changed}; remove their folders to make them anew"
        tqdm.write(text, file=sys.stderr)


class _Jobs:
    """The runs waiting and running; a job of None is a run that an earlier sweep started and that still goes on."""

    def __init__(self, sweep: Sweep, todo: list[Run]):
        self.sweep, self.waiting = sweep, deque(todo)
        self.active: list[tuple[Run, Any]] = []
        self.executor = _executor(sweep) if todo else None
        self.failed = 0
        self.shown: dict[str, int] = {}

    def work(self, bar: Any) -> None:
        try:
            while self.waiting or self.active:
                while self.waiting and len(self.active) < self.sweep.max_parallel:
                    self.active.append(self.start(self.waiting.popleft()))
                time.sleep(POLL)
                self.look(bar)
        except BaseException:
            for _, job in self.active:
                if job is not None:
                    job.cancel()
            raise
        finally:
            bar.close()

    def start(self, run: Run) -> tuple[Run, Any]:
        if is_held(run.folder):
            return run, None
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "error.txt").unlink(missing_ok=True)
        assert self.executor is not None
        notebook = str(Path(self.sweep.notebook).resolve())
        return run, self.executor.submit(Job(notebook, run, self.sweep.threads_per_run))

    def look(self, bar: Any) -> None:
        """Take out the runs that ended."""
        active, self.active = self.active, []
        for run, job in active:
            if is_held(run.folder) or (job is not None and not job.done()):
                self.active.append((run, job))
            elif not run.finished and not run.error and job is None:
                self.active.append(self.start(run))
            else:
                self.settle(run, job)
                bar.update()
        state = {"running": len(self.active), "failed": self.failed}
        if state != self.shown:
            bar.set_postfix(state)
            self.shown = state

    def settle(self, run: Run, job: Any) -> None:
        late = time.time() + (LATE_FILES if self.sweep.executor == "slurm" else 0)
        while not run.finished and not run.error and time.time() < late:
            time.sleep(1)
        if run.finished:
            return
        self.failed += 1
        if not run.error:
            log = job.paths.stderr if job is not None else "none"
            write_whole(run.folder / "error.txt", f"the job ended without a result (killed?); its log: {log}\n")
        tqdm.write(f"failed: {run.folder.name}: {run.error}", file=sys.stderr)


def _executor(sweep: Sweep) -> Any:
    import submitit

    try:
        executor = submitit.AutoExecutor(Path(sweep.out) / "jobs", cluster=sweep.executor, local_max_num_timeout=0)
        options = {f"slurm_{key}": value for key, value in sweep.slurm.items()} if sweep.executor == "slurm" else {}
        executor.update_parameters(timeout_min=sweep.timeout_min, cpus_per_task=sweep.threads_per_run, **options)
    except (RuntimeError, NameError, TypeError, AssertionError) as error:
        raise UserError(f"executor: {sweep.executor} does not work here: {' '.join(str(error).split())}") from None
    return executor


def announcement(sweep: Sweep, runs: list[Run]) -> str:
    """Cells, seeds and minutes before anything starts, from runs of this sweep that were timed, or as its file says."""
    cells = len({json.dumps({k: v for k, v in run.varied.items() if k != "seed"}, sort_keys=True) for run in runs})
    seeds = len({json.dumps(run.varied.get("seed")) for run in runs})
    done = [run for run in runs if run.finished]
    timed = [seconds for run in done if (seconds := (read_json(run.folder / "run.json") or {}).get("seconds"))]
    each = sum(timed) / len(timed) / 60 if timed else sweep.minutes_per_run
    rounds = -(-(len(runs) - len(done)) // sweep.max_parallel)
    lasts = f"about {rounds * each:.0f} minutes" if each else "minutes not known before a first run"
    todo = f"{len(runs) - len(done)} of {len(runs)} runs to do ({cells} cells, {seeds} seeds)"
    return f"{todo}, {sweep.max_parallel} at a time, {lasts}; {sweep.notebook}, results in {sweep.out}"


def gather(runs: list[Run], out: Path, comparisons: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write results.json, a line per run with its metrics, table.csv, the rows of all finished runs, and, once every
    run is finished, primary.csv, the comparisons that were fixed beforehand. What an earlier call left is removed."""
    for name in GATHERED:
        (out / name).unlink(missing_ok=True)
    results = []
    for run in runs:
        metrics = read_json(run.folder / "metrics.json") if run.finished else {}
        state = "finished" if run.finished else "failed"
        seconds = (read_json(run.folder / "run.json") or {}).get("seconds")  # of the last attempt
        results.append({"run": run.folder.name, "state": state, "seconds": seconds, "parameters": run.parameters,
                        "error": run.error, "metrics": metrics})  # fmt: skip
    write_whole(out / "results.json", "[\n" + ",\n".join(map(json_text, results)) + "\n]\n")
    rows = sweep_rows(results)
    if rows:
        write_whole(out / "table.csv", sweep_csv(rows))
    if comparisons and all(run.finished for run in runs):
        from ..evaluate.primary import primary, saved_hits

        try:
            found = primary(rows, comparisons, lambda row: saved_hits(row, out / row["run"] / "hits.npz"))
        except UserError as error:
            raise ComparisonError(f"primary.csv: {error}") from error
        rows_to_csv(found, out / "primary.csv")
