"""The command line: hjepa train | evaluate | export | verify | sweep | tour.

A mistake of the user, or a file, disk or network that fails, gives one line, "hjepa: error: ...", and exit code 2;
a training that diverged or a sweep with failed runs gives a line and 1; Ctrl-C gives a line and 130. `--traceback`
shows where an error comes from instead.
Heavy imports stand inside the functions, so that help and mistakes answer at once.
Not covered: launching several processes; `torchrun -m hjepa train ...` and `torchrun -m hjepa evaluate ...` do that.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from .files import user_path, write_whole
from .inputs import UserError, check_choice, nearest, size_pair

MISTAKES = (UserError, OSError)


class _Parser(argparse.ArgumentParser):
    """Raises its complaints as ValueError, with the nearest command or choice."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            near = nearest(wrong[1], re.findall(r"[\w-]+", wrong[2])) or "none"
            message = f"{wrong[1]!r} is not one of {wrong[2]}; nearest: {near}".replace("'", "")
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in argv
    try:
        return _run([word for word in argv if word != "--traceback"])
    except KeyboardInterrupt:
        _say("hjepa: stopped")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*MISTAKES, RuntimeError) as error:
        ours = isinstance(error, MISTAKES) or type(error).__module__.startswith("hjepa")
        if show or not ours:
            raise
        _say(f"hjepa: error: {' '.join(str(error).split())}")
        return 2 if isinstance(error, MISTAKES) else 1


def _say(line: str) -> None:
    """A line on stderr, after ending progress bars that the error left open in the middle of theirs."""
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    print(line, file=sys.stderr)


def _run(argv: list[str]) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):  # argparse itself takes key=value words in one place only
        arguments.overrides += [word for word in rest if "=" in word and word[0] != "-"]
        rest = [word for word in rest if word not in arguments.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hjepa",
        description="Rotary positions in a hierarchical JEPA, measured at image sizes never trained on.",
        epilog="With --traceback any command shows where an error comes from.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(function: Any, summary: str, **options: Any) -> argparse.ArgumentParser:
        name = function.__name__.lstrip("_")
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", **options)
        command.set_defaults(command=function)
        return command

    train = add(_train, "train one model", epilog="example: hjepa train --config configs/default.yaml train.steps=200")
    train.add_argument("--config", metavar="FILE", help="YAML file; the defaults are in hjepa/config.py")
    train.add_argument(  # torchrun takes --run for its own --run-path: under it say --run-dir
        "--run", "--run-dir", metavar="FOLDER", help="folder of the run (default: a fresh one in runs/)"
    )
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --run")
    train.add_argument("--dry-run", action="store_true", help="say what a step would cost, and train nothing")
    train.add_argument("--processes", metavar="N", type=int, help="with --dry-run: how many share a batch (default: 1)")
    train.add_argument("--speed", metavar="FLOP/S", type=float, help="with --dry-run: of each (default: 1e12)")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.rope.use_rope=true")

    evaluate = add(_evaluate, "read frozen features at several image sizes")
    evaluate.add_argument(  # under torchrun say --run-dir, as to train
        *("--run", "--run-dir"), metavar="FOLDER", action="append",
        help="a trained run, or a name of list_pretrained(); repeatable",
    )  # fmt: skip
    evaluate.add_argument("--timm", metavar="NAME", action="append", help="or a published model of timm; repeatable")
    evaluate.add_argument("--sizes", metavar="LIST", help="such as 32,48,96 or 48x96 (height x width), in pixels")
    evaluate.add_argument("--strategy", metavar="LIST", help="RoPE strategies to read each run with, comma-separated")
    evaluate.add_argument("--which", choices=("target", "context"), help="which encoder of a run (default: target)")
    evaluate.add_argument(
        "--placements", metavar="N", type=int,
        help="fixed places that each test picture is read in, of data.moved (default: the run's own, mostly 1)",
    )  # fmt: skip
    evaluate.add_argument("--unmoved", action="store_true", help="pictures of data.moved as they are, for readers too")
    evaluate.add_argument("--data", metavar="NAME", help="data set (default: the run's own; with --timm openmoji)")
    evaluate.add_argument("--path", metavar="FOLDER", help="folder of class folders, of imagefolder")
    evaluate.add_argument("--root", metavar="FOLDER", help="where data sets are kept (default: data)")
    evaluate.add_argument("--dense", action="store_true", help="also read single patches of runs: their own place")
    evaluate.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda or cuda:1 (default: cuda if any)")
    evaluate.add_argument(
        "--workers", metavar="N", type=int,
        help="loader processes that decode files (default: train.num_workers of the first run; with --timm 0)",
    )  # fmt: skip
    evaluate.add_argument("--out", metavar="FILE", help="CSV file (default: evaluation.csv in the first run, or here)")
    published = evaluate.add_argument_group("with --timm")
    published.add_argument("--checkpoint", metavar="FILE", help="weights of the one model, instead of the hub's")
    published.add_argument("--no-pretrained", action="store_true", help="random weights")
    published.add_argument("--fit-size", metavar="SIZE", help="where readers are fitted (default: its own size)")

    export = add(_export, "write a run's encoder as plain timm weights")
    export.add_argument("run", metavar="RUN", help="folder of the run")
    export.add_argument("out", metavar="OUT", help="folder to write")
    export.add_argument("--push-to", metavar="USER/NAME", help="also publish it on the Hugging Face hub")

    verify = add(_verify, "read a run's checkpoints and say which are whole")
    verify.add_argument("run", metavar="RUN", help="folder of the run")

    sweep = add(_sweep, "run a notebook over a grid of parameters")
    sweep.add_argument("file", metavar="FILE", help="such as configs/sweeps/NAME.yaml")

    tour = add(_tour, "train small models and show how they transfer to unseen image sizes")
    tour.add_argument("--quick", action="store_true", help="fewer steps and pictures, under two minutes")
    tour.add_argument("--data", metavar="NAME", default="openmoji", help="data set (default: openmoji)")
    tour.add_argument("--path", metavar="FOLDER", help="folder of class folders, with --data imagefolder")
    tour.add_argument("--root", metavar="FOLDER", default="data", help="where data sets are kept (default: data)")
    tour.add_argument("--out", metavar="FOLDER", default="runs", help="where the fresh folder is made (default: runs)")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from .config import idle_overrides, load_config
    from .files import fresh_folder

    if arguments.resume and not arguments.run:
        raise UserError("--resume needs --run FOLDER, the run to go on with")
    given = {name: getattr(arguments, name) for name in ("processes", "speed") if getattr(arguments, name) is not None}
    if given and not arguments.dry_run:
        name, value = next(iter(given.items()))
        near = f"; nearest: torchrun --nproc_per_node {value} -m hjepa train" if name == "processes" else ""
        raise UserError(f"--{name} {value} goes with --dry-run{near}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not arguments.run:
        raise UserError("with several processes name the folder: --run-dir FOLDER")
    before = user_path(arguments.run or "") / "config.yaml"
    file = before if arguments.resume and not arguments.config and before.is_file() else arguments.config
    config = load_config(file, arguments.overrides)
    if os.environ.get("RANK", "0") == "0":
        for line in idle_overrides(config, arguments.overrides):
            _say(f"hjepa: {line}")
    if arguments.dry_run:
        from .train.estimate import estimate, format_estimate

        print(format_estimate(estimate(config, **given)))
        return 0
    fresh = f"train-{datetime.now():%Y%m%d-%H%M%S}"
    folder = user_path(arguments.run) if arguments.run else fresh_folder("runs", fresh)

    from .train.loop import train

    metrics = train(config, folder, resume=arguments.resume)
    if not metrics:  # not the main process
        return 0
    for name, value in metrics.items():
        if name != "versions":
            print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    print(f"files: {folder}")
    return 0


RUNS_ONLY = ("strategy", "dense", "which", "placements", "unmoved")
TIMM_ONLY = ("checkpoint", "no_pretrained", "fit_size")


def _evaluate(arguments: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _evaluate_here(arguments)
    from .evaluate.processes import together

    with together():
        return _evaluate_here(arguments)


def _evaluate_here(arguments: argparse.Namespace) -> int:
    """Of several processes each reads a share; the first one has the rows, prints them and writes the table."""
    if bool(arguments.run) == bool(arguments.timm):
        need = "--run and --timm exclude each other" if arguments.run else "the following arguments are required: --run"
        raise UserError(f"{need}; give --run FOLDER, or --timm NAME with --data NAME")
    others = TIMM_ONLY if arguments.run else RUNS_ONLY
    odd = [name for name in others if getattr(arguments, name) not in (None, False)]
    if odd:
        given, other = ("--run", "--timm") if arguments.run else ("--timm", "--run")
        raise UserError(f"--{odd[0].replace('_', '-')} goes with {other}, not with {given}")
    if arguments.out and user_path(arguments.out).is_dir():
        raise UserError(f"--out {arguments.out} is a folder; nearest: {Path(arguments.out, 'evaluation.csv')}")
    if arguments.workers is not None and arguments.workers < 0:
        raise UserError(f"--workers {arguments.workers} must be 0 or more; nearest: 0")
    from .evaluate.transfer import device_named

    arguments.device = device_named(arguments.device)
    return _evaluate_runs(arguments) if arguments.run else _evaluate_published(arguments)


def _evaluate_published(arguments: argparse.Namespace) -> int:
    from .config import as_dicts, load_config
    from .data.images import DATASETS, load_data, side_for
    from .evaluate.baselines import baselines
    from .evaluate.published import published_encoders

    name, root = arguments.data or "openmoji", arguments.root or "data"
    check_choice("--data", name, tuple(DATASETS))
    _check_path(arguments.path, name)
    asked = _sizes(arguments.sizes)
    weights = {"checkpoint": arguments.checkpoint, "pretrained": not arguments.no_pretrained}
    models = published_encoders(arguments.timm, DATASETS[name].mean, DATASETS[name].std, **weights)
    home = size_pair(arguments.fit_size or next(iter(models.values())).input_size)
    for model in models.values():
        for size in (home, *asked):
            model.check_size(size)
    side = side_for([home, *asked])
    splits = [load_data(name, split, root=root, path=arguments.path, image_size=side) for split in ("train", "test")]
    options = as_dicts(load_config().evaluate) | {"sizes": asked, "train_size": home}
    arguments.workers = arguments.workers or 0
    encoders = models | baselines(splits[0], home, workers=arguments.workers)
    return _show_rows(_read(encoders, splits, options, arguments), arguments)


def _sizes(text: str | None) -> list[tuple[int, int]]:
    """What --sizes asks for, (height, width) in pixels; [] without it. ValueError on a size that is none."""
    return [size_pair(word) for word in text.split(",")] if text else []


def _read(encoders: dict[str, Any], splits: list[Any], options: dict[str, Any], arguments: Any, about: Any = ()) -> Any:
    """Rows of `resolution_transfer`; with --out, sizes that the same command read before it was stopped are kept.

    options: those of `resolution_transfer`, and `placements`, which the splits have already. about: what the encoders
    depend on beside their weights.
    """
    from .evaluate.processes import is_first
    from .evaluate.resume import Kept, fingerprint
    from .evaluate.transfer import resolution_transfer

    options["device"], kept = arguments.device, None
    if arguments.out and is_first():
        key = fingerprint(encoders, splits, **options | {"sizes": None}, about=about)
        kept = Kept(user_path(arguments.out), key)
    del options["placements"]
    return resolution_transfer(encoders, *splits, progress=True, kept=kept, workers=arguments.workers, **options)


def _show_rows(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    """Tables on stdout, all measures in a CSV file; the first row has the size that readers were fitted at."""
    from .evaluate.results import format_table, rows_to_csv, size_text
    from .evaluate.resume import Kept
    from .files import fresh_path

    if not rows:  # the first process has them
        return 0
    measured = {row["metric"] for row in rows}
    for metric in ("probe", "knn", "retrieval") if "knn" in measured else ("retrieval", "cka", "effective_rank"):
        print(f"\n{format_table(rows, metric)}")
    beside = user_path((arguments.run or ["."])[0])
    beside = beside if (beside / "config.yaml").is_file() else Path(".")
    out = user_path(arguments.out) if arguments.out else fresh_path(beside / "evaluation.csv")
    rows_to_csv(rows, out)
    Kept(out, "").remove()
    how = "trained" if arguments.run else "readers fitted"
    print(f"\n{how} at {size_text(rows[0]['size'])} pixels; all measures: {out}")
    return 0


def _evaluate_runs(arguments: argparse.Namespace) -> int:
    import torch

    from .build import build_encoders, load_split
    from .config import as_dicts, check_alike
    from .data.images import left_out
    from .evaluate.baselines import BESIDE, baselines
    from .evaluate.processes import is_first
    from .hub import changed_pictures

    asked = _sizes(arguments.sizes)
    folders = _named(arguments.run)
    loaded = {name: _encoder_of(folder, arguments.which or "target") for name, folder in folders.items()}
    config = next(iter(loaded.values()))[1]
    for _, its in loaded.values():
        if arguments.unmoved:
            its.data.moved, its.evaluate.placements = False, 1
        if arguments.placements is not None:
            its.evaluate.placements = arguments.placements
    for name, (_, other) in loaded.items():
        check_alike(f"--run {name}", other, arguments.run[0], config, sizes=not asked)
    _other_data(config, arguments)
    encoders = _views(loaded, arguments.strategy)
    for name in (*BESIDE, *(["chance"] if arguments.dense else [])):
        if name in encoders:
            raise UserError(f"--run {name}: a baseline in the table has that name; rename the folder")
    size = config.data.image_size
    read_at = asked or config.evaluate.sizes
    places = {"train": 1, "test": config.evaluate.placements}
    splits = [load_split(config, split, number, read_at=read_at) for split, number in places.items()]
    for folder in folders.values() if is_first() else ():
        if note := changed_pictures(folder, splits[0], config.data):
            _say(f"hjepa: {note}")
    if arguments.workers is None:
        arguments.workers = config.train.num_workers
    simple = baselines(splits[0], size, workers=arguments.workers)
    encoders |= {"random init": build_encoders(config)[0].eval(), **simple}
    if arguments.dense:
        from .evaluate.dense import check_patches, dense_transfer, with_pixels

        patches = with_pixels(encoders)
        check_patches(patches)
    torch.set_num_threads(config.train.threads)
    options = as_dicts(config.evaluate) | {"train_size": size}
    options["sizes"] = asked or options["sizes"]
    about = [as_dicts(its) for _, its in loaded.values()]
    rows = _read(encoders, splits, options, arguments, about)
    if arguments.dense and rows:
        how = {"train_size": size, "sizes": options["sizes"], "workers": arguments.workers}
        rows += dense_transfer(patches, *splits, **how)
    if is_first() and (note := left_out(*splits)):
        _say(f"hjepa: {note}")
    return _show_rows(rows, arguments)


def _encoder_of(folder: Path, which: str) -> tuple[Any, Any]:
    """The encoder and config of a run, or of an export."""
    from . import hub
    from .config import config_of

    if not hub.is_export(folder):
        return hub.load_run(folder, which)
    encoder, about = hub.load_pretrained(folder)
    if about["hjepa"]["which"] != which:
        raise UserError(f"--which {which}: {folder.name} holds the {about['hjepa']['which']} encoder alone")
    return encoder, config_of(about["hjepa"]["config"], str(folder / hub.CONFIG))


def _named(runs: list[str]) -> dict[str, Path]:
    """Folders of runs, and of encoders that come with the package, by as many last parts as tell them apart."""
    from .pretrained import folder_of

    folders = [folder_of(run).resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise UserError(f"--run: two folders have the same name: {', '.join(runs)}")
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return {"/".join(folder.parts[-parts:]): folder for folder in folders}


def _other_data(config: Any, arguments: argparse.Namespace) -> None:
    """Set the pictures that --data, --path and --root name; they are normalised as those trained on were.

    Others than those trained on have other classes and another number: data.classes and data.limit are left out, and
    data.moved, which is about drawings, with evaluate.placements. ValueError on --placements of pictures that are not
    moved.
    """
    from .config import check_placements
    from .data.images import DATASETS
    from .evaluate.processes import is_first

    data = config.data
    own = data.name, user_path(data.path or "").resolve()
    if arguments.data:
        check_choice("--data", arguments.data, tuple(DATASETS))
        trained = DATASETS[data.name]
        data.mean, data.std = list(data.mean or trained.mean), list(data.std or trained.std)
        data.name = arguments.data
    data.path, data.root = arguments.path or data.path, arguments.root or data.root
    _check_path(arguments.path, data.name)
    if (data.name, user_path(data.path or "").resolve()) == own:
        check_placements(config.evaluate.placements, data.moved, "--placements")
        return
    dropped = [f"data.{key}={data[key]}" for key in ("limit", "classes") if data[key] is not None]
    said = [f"all of them, not {', '.join(dropped)}"] if dropped else []
    said += ["as they are, data.moved=true was dropped"] if data.moved else []
    data.limit = data.classes = None
    data.moved = False
    config.evaluate.placements = 1 if arguments.placements is None else arguments.placements
    check_placements(config.evaluate.placements, False, "--placements")
    if said and is_first():
        _say(f"hjepa: other pictures than those trained on, so {'; '.join(said)}")


def _check_path(path: str | None, data: str) -> None:
    if path and data != "imagefolder":
        raise UserError(f"--path is the folder of imagefolder; {data} takes --root; nearest: --data imagefolder")


def _views(loaded: dict[str, Any], strategies: str | None) -> dict[str, Any]:
    """Name -> encoder; with strategies, each run with relative positions once per strategy."""
    from .evaluate.transfer import with_strategy
    from .nn.rope import STRATEGIES

    wanted = strategies.split(",") if strategies else []
    for word in wanted:
        if word not in STRATEGIES:
            near = nearest(word, STRATEGIES) or "none"
            raise UserError(f"--strategy {word!r} is not one of {', '.join(STRATEGIES)}; nearest: {near}")
    if wanted and not any(encoder.strategies for encoder, _ in loaded.values()):
        raise UserError("--strategy is about RoPE and ALiBi, and no run given has either")
    views: dict[str, Any] = {}
    for name, (encoder, _) in loaded.items():
        ways = wanted if encoder.strategies else []
        for word in ways:
            if word not in encoder.strategies:
                near = nearest(word, encoder.strategies) or "none"
                raise UserError(f"--strategy {word}: {name} takes {', '.join(encoder.strategies)}; nearest: {near}")
        readings = {f"{name} {word}": with_strategy(encoder, word) for word in ways} or {name: encoder}
        if twice := sorted(views.keys() & readings):
            raise UserError(f"--run {name}: another run is read as {twice[0]!r} too; rename the folder")
        views |= readings
    return views


def _export(arguments: argparse.Namespace) -> int:
    from .hub import export_encoder
    from .pretrained import check_one

    check_one(arguments.run)
    print(f"files: {export_encoder(arguments.run, arguments.out, push_to=arguments.push_to)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from .train.checkpoint import verify

    found = verify(user_path(arguments.run))
    for name, problem in found.items():
        print(f"{name} {problem or 'whole'}")
    return 1 if any(found.values()) else 0


def _sweep(arguments: argparse.Namespace) -> int:
    from .experiments.sweep import ComparisonError, announcement, load_sweep, run_sweep

    sweep, runs = load_sweep(arguments.file)
    print(announcement(sweep, runs), flush=True)
    try:
        failed = run_sweep(arguments.file)
    except ComparisonError:
        _show_sweep(Path(sweep.out))
        raise
    _show_sweep(Path(sweep.out))
    print(f"{len(runs) - len(failed)} of {len(runs)} runs finished; results: {Path(sweep.out, 'results.json')}")
    if failed:
        names = ", ".join(run.folder.name for run in failed)
        print(f"hjepa: error: {len(failed)} failed: {names}; each has its error.txt", file=sys.stderr)
    return 1 if failed else 0


def _show_sweep(out: Path) -> None:
    """Means over seeds as summary.md and printed, and figure.png, where the runs measured resolution transfer."""
    import json

    from .evaluate.plots import sweep_figure
    from .evaluate.results import sweep_rows, sweep_summary

    rows = sweep_rows(json.loads((out / "results.json").read_text(encoding="utf-8")))
    if not any(row.get("metric") == "cka" and "seed" in row for row in rows):
        return
    text = sweep_summary(rows)
    write_whole(out / "summary.md", text)
    sweep_figure(rows).savefig(out / "figure.png", dpi=110, metadata={"Software": None})
    print(text)


def _tour(arguments: argparse.Namespace) -> int:
    from .experiments.tour import run_tour

    run_tour(arguments.data, quick=arguments.quick, path=arguments.path, root=arguments.root, out=arguments.out)
    return 0
