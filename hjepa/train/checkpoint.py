"""Checkpoints on disk: written whole or not at all, read only when whole.

    run_dir/checkpoints/step_00000250/
        model.safetensors   context encoder, target encoder, predictor
        optimizer.pt        AdamW's state, read back with torch.load(weights_only=True): no code is run
        state.json          format marker, step, config, SHA-256 of the other files and of itself

Several processes write shards/ in place of the first two, each its part (`hjepa.train.shards`), while training goes
on. Either kind is read by any number of processes, cut (FSDP) or not.

A checkpoint is written to a hidden folder beside its place, flushed to disk, then renamed: it is there whole or not
at all, and a full disk leaves the earlier ones as they were. The two newest are kept. Random state is not stored:
every step seeds itself from (seed, step), see `hjepa.train.schedule`.

The hashes find damage and honest mistakes; they are no signature against an attacker. They are computed once for each
file as it was last written, so a resume reads each file once for them, and of several processes only the first one
(`after_first`); `verify` reads all of them again.

Not covered: exports (`hjepa.hub`).
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import Config, config_of
from ..data.images import ImageData
from ..data.index import digest
from ..files import json_text, write_whole
from ..inputs import UserError
from . import shards
from .sharding import is_sharded, load_whole, load_whole_optimizer, numbered

FORMAT, VERSION = "hjepa-checkpoint", 1
WEIGHTS, OPTIMIZER, STATE, SHARDS = "model.safetensors", "optimizer.pt", "state.json", "shards"
KINDS = {"step": int, "sha256": dict, "config": dict, "extra": dict}  # of the state's parts
T = TypeVar("T")
_HASHED: dict[tuple[str, int, int, int], str] = {}  # path, inode, size and time of a file as last written -> digest


class CheckpointError(UserError):
    """A checkpoint or export that cannot be used: the message names the file and the reason."""


# ---- writing


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | Mapping[str, Any],
    config: Config,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write run_dir/checkpoints/step_{step} and return it; step counts finished optimiser steps.

    model, optimizer: the objects or their state dicts (several processes: `begin_checkpoint`). extra: JSON values kept
    under "extra" in the state (mean and std of the data, for example). OSError on a full disk or a read-only folder,
    with the earlier checkpoints untouched. Of those, config.train.keep_checkpoints stay, this one included.
    """
    parent = Path(run_dir) / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".tmp-{step}-{os.getpid()}"
    try:
        temporary.mkdir(exist_ok=True)
        write_weights(temporary / WEIGHTS, model.state_dict() if isinstance(model, nn.Module) else model)
        moments = optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else dict(optimizer)
        write_file(temporary / OPTIMIZER, lambda file: torch.save(moments, file))
        return _finish(temporary, step, {n: _sha256(temporary / n) for n in (WEIGHTS, OPTIMIZER)}, config, extra)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin_checkpoint(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    extra: Mapping[str, Any] | None,
    group: dist.ProcessGroup,
) -> Callable[[], Path]:
    """Begin to write a checkpoint in parts; all processes call it, on one shared folder.

    Of a cut model each writes its slices, of one that all hold alike its share of the tensors.

    Training may go on at once. The result waits until the checkpoint is in its place and returns it; call it on all
    processes before the next begins. OSError there as in `save_checkpoint`. group: a gloo group of all processes that
    nothing else uses.
    """
    parent = Path(run_dir) / "checkpoints"
    number: list[Any] = [os.getpid()]
    dist.broadcast_object_list(number, group=group)  # the main process's: one folder for all
    temporary = parent / f".tmp-{step}-{number[0]}"
    tensors, groups = shards.slices(model, optimizer)
    if not is_sharded(model):
        tensors = shards.share(tensors)

    def commit(digests: dict[str, str]) -> None:
        """In a thread of the main process; the others have nothing left to do."""
        _sync_folder(temporary / SHARDS)
        found = {path.name: digests.get(path.name) or _sha256(path) for path in (temporary / SHARDS).iterdir()}
        _finish(temporary, step, {f"{SHARDS}/{n}": d for n, d in found.items()}, config, extra, param_groups=groups)

    wait = shards.begin_writing(temporary / SHARDS, tensors, commit, group)

    def finished() -> Path:
        try:
            wait()
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return parent / f"step_{step:08d}"

    return finished


def _finish(
    temporary: Path, step: int, digests: dict[str, str], config: Config, extra: Mapping[str, Any] | None, **more: Any
) -> Path:
    """Write the state, give the folder its name, and remove older ones."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "sha256": digests,
        "config": OmegaConf.to_container(config),  # type: ignore[call-overload]
        "extra": dict(extra or {}),
        **more,
    }
    state["self"] = _digest_of(state)
    write_json(temporary / STATE, state)
    parent = temporary.parent
    final = _put_in_place(temporary, parent / f"step_{step:08d}")
    earlier = [path for path in saved_steps(parent) if _number(path) <= step]
    for old in [*earlier[: -config.train.keep_checkpoints], *parent.glob(".tmp-*")]:  # the latter from crashes
        shutil.rmtree(old, ignore_errors=True)
    return final


def _put_in_place(temporary: Path, final: Path) -> Path:
    """Rename, atomically. A folder already there steps aside; if it is damaged it is kept as damaged_step_..."""
    _sync_folder(temporary)
    aside = None
    if final.exists():
        aside = final.with_name(f".tmp-{final.name}" if _is_whole(final) else f"damaged_{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    os.replace(temporary, final)
    _sync_folder(final.parent)
    return final


def _is_whole(folder: Path) -> bool:
    try:
        return bool(read_state(folder))
    except CheckpointError:
        return False


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A failure to write is an OSError that names the file; torch and safetensors have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{path.name} could not be written: {first_line(error)}") from error


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, flushed to disk."""
    with _named(path):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def write_json(path: Path, tree: Any) -> None:
    """A JSON file, written whole."""
    write_file(path, json_text(tree, indent=1))


def write_file(path: Path, content: str | bytes | Callable[[Any], Any]) -> None:
    """As `write_whole`; an OSError names the file."""
    with _named(path):
        write_whole(path, content)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(path: Path) -> str:
    """Digest of a file; one that was not written since is not read again."""
    found = path.stat()
    key = (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _HASHED:
        _HASHED[key] = shards.digest(path)
    return _HASHED[key]


def after_first(find: Callable[[], T]) -> T:
    """find() on every process, on the first one before the others, who take over what it has hashed.

    All processes call it. An error of the first one is found by the others too, in the same digests.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return find()
    first = dist.get_rank() == 0
    told: list[Any] = [None]
    try:
        if first:
            return find()
    finally:
        told[0] = _HASHED if first else None
        dist.broadcast_object_list(told)
    _HASHED.update(told[0])
    return find()


def _digest_of(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- reading


def saved_steps(parent: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; a copy under a name of its own, step_00000250_best, is none."""
    named = [path for path in parent.glob("step_*") if re.fullmatch(r"step_[0-9]{8,}", path.name) and path.is_dir()]
    return sorted(named, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def read_state(path: str | Path) -> dict[str, Any]:
    """The state of a checkpoint after checking every file of it; nothing is loaded.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: truncated, foreign or tampered with, naming the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    _check_there(folder, [STATE])
    try:
        state = json.loads((folder / STATE).read_text())
    except ValueError:
        raise CheckpointError(f"{folder / STATE} is not JSON: truncated or foreign") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{folder / STATE} lacks the marker {FORMAT!r}: a foreign checkpoint")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{folder / STATE} has version {state.get('version')}, this hjepa reads {VERSION}")
    if state.get("self") != _digest_of(state):
        raise CheckpointError(f"{folder / STATE} does not match its own SHA-256: tampered with or damaged")
    for key, kind in KINDS.items():
        if type(state.get(key)) is not kind:
            found = f"{key}={state.get(key)!r:.40}"
            raise CheckpointError(f"{folder / STATE} has {found}, which is not of type {kind.__name__}: foreign")
    names = [name for name in state["sha256"] if name.startswith(f"{SHARDS}/")] or [WEIGHTS, OPTIMIZER]
    _check_there(folder, names)
    for name in names:
        if state["sha256"].get(name) != _sha256(folder / name):
            raise CheckpointError(f"{folder / name} does not match its SHA-256: truncated or tampered with")
    return state


def _check_there(folder: Path, names: list[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: not a whole hjepa checkpoint")


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint, or None if there is no checkpoint at all.

    Each damaged newer one is named in a warning and left where it is. CheckpointError if all are damaged.
    """
    problem = None
    for path in reversed(saved_steps(Path(run_dir) / "checkpoints")):
        try:
            read_state(path)
        except CheckpointError as error:
            problem = problem or error
            continue
        if problem:
            warnings.warn(f"going back to {path.name}: {problem}", stacklevel=2)
        return path
    if problem:
        raise CheckpointError(f"{run_dir} has no whole checkpoint: {problem}")
    return None


def trained_config(path: str | Path) -> Config | None:
    """The config that a checkpoint was trained with; None where it holds none."""
    tree = read_state(path)["config"]
    return config_of(tree, str(Path(path) / STATE)) if tree else None


def verify(run_dir: str | Path) -> dict[str, str]:
    """What is wrong with each checkpoint of a run, oldest first, or "" where all is whole. Every file is read.

    Raises:
        FileNotFoundError: no checkpoint there.
    """
    _HASHED.clear()
    found = {}
    for path in saved_steps(Path(run_dir) / "checkpoints"):
        try:
            read_state(path)
            found[path.name] = ""
        except CheckpointError as error:
            found[path.name] = str(error)
    if not found:
        raise FileNotFoundError(f"{run_dir} has no checkpoints; give the folder of a run")
    return found


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Load weights, and the optimiser if given, from one checkpoint folder; returns its state dict (JSON).

    Everything is checked before anything is changed.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: a damaged or foreign file, or one of another architecture, naming the first key that differs.
    """
    folder = Path(path)
    state = read_state(folder)
    if (folder / SHARDS).is_dir() and is_sharded(model):
        with _readable(folder / SHARDS):
            found = shards.shapes(folder / SHARDS, shards.MODEL)
        _check_same(folder / SHARDS, found, model.state_dict())
        with _readable(folder / SHARDS):
            shards.read_slices(folder / SHARDS, model, optimizer, _groups(state))
        return state
    weights = read_model(folder)
    _check_same(weights_at(folder), weights, model.state_dict())
    if optimizer is not None:
        try:
            _load_optimizer(model, optimizer, _read_optimizer(folder, state))
        except Exception as error:
            place = folder / (OPTIMIZER if (folder / OPTIMIZER).is_file() else SHARDS)
            raise CheckpointError(f"{place} does not fit this optimiser: {first_line(error)}") from None
    if is_sharded(model):
        load_whole(model, weights)
    else:
        model.load_state_dict(weights)
    return state


def weights_at(folder: Path) -> Path:
    """Where a checkpoint has its weights: a file, or a folder of parts."""
    return folder / (SHARDS if (folder / SHARDS).is_dir() else WEIGHTS)


def read_model(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """A checkpoint's weights whose names begin with prefix, without it; where they lie in parts, no others are read."""
    place = weights_at(folder)
    if place.name == SHARDS:
        with _readable(place):
            return shards.read_whole(place, shards.MODEL + prefix)
    return {k.removeprefix(prefix): tensor for k, tensor in read_weights(place).items() if k.startswith(prefix)}


def _read_optimizer(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    if (folder / SHARDS).is_dir():
        moments = shards.by_weight(shards.read_whole(folder / SHARDS, shards.OPTIMIZER))
        return numbered({"state": moments, "param_groups": _groups(state)})
    return torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)


def _groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups that JSON keeps, with betas a tuple again."""
    return [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in state["param_groups"]]


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {first_line(error)}") from None


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if is_sharded(model):
        load_whole_optimizer(model, optimizer, state)
    else:
        optimizer.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {first_line(error)}") from None


def _check_same(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for key in sorted(found.keys() ^ wanted.keys()):
        where = "is in the file and not in the model" if key in found else "is in the model and not in the file"
        raise CheckpointError(f"{path} is of another architecture: {key} {where}")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise CheckpointError(
                f"{path} is of another architecture: {key} is {list(found[key].shape)}, not {list(tensor.shape)}"
            )


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def pictures_of(data: ImageData) -> dict[str, Any]:
    """What a checkpoint keeps of the training pictures: their number, class names and a SHA-256 of their ids."""
    return {"number": len(data), "classes": list(data.classes), "ids": digest(data.ids)}
