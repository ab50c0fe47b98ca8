"""Checkpoints in parts: what several processes write together, and how anyone reads it.

    shards/__0_0.distcp     the part of process 0, and so on
    shards/.metadata        the names, shapes and places of all tensors

torch.distributed.checkpoint (DCP) writes and reads them. A tensor is called "model/" and its name in the uncut model,
or "optimizer/", the name of its weight, "/" and what it is (exp_avg). So any number of processes reads them, cut or
not; each reads the pieces it needs, without a word to the others. A part is the slices of every tensor that a process
holds of a cut model (FSDP), or some of the tensors where each process holds all (DDP).

Writing is asynchronous: the tensors are copied to the CPU, then a thread of each process writes its file while
training goes on. The threads talk in a gloo group of their own. .metadata is a pickle: only the classes that DCP
puts there are built, so no code is run.

Source: torch.distributed.checkpoint.
Not covered: hashing shared out among the processes when a checkpoint is read; the first one reads all files for that.
"""

import hashlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

MODEL, OPTIMIZER = "model/", "optimizer/"
KNOWN = {("torch", "Size"), ("torch.serialization", "_get_layout"), (dcp.filesystem.__name__, "_StorageInfo")}
KNOWN |= {(parts.__name__, name) for name in (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
    "_MEM_FORMAT_ENCODING",
)}  # fmt: skip


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing


class _Writer(dcp.FileSystemWriter):
    """Every process hashes what it wrote; when all files are on disk, the first one commits."""

    def __init__(self, folder: Path, commit: Callable[[dict[str, str]], Any]):
        super().__init__(folder)
        self.commit = commit

    def storage_meta(self) -> None:
        """None, or .metadata would hold the name of the temporary folder."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result((results, {name: digest(Path(self.path, name)) for name in names}))
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, [written for written, _ in results])
        self.commit({name: found for _, digests in results for name, found in digests.items()})


def begin_writing(
    folder: Path, tensors: Mapping[str, Tensor], commit: Callable[[dict[str, str]], Any], group: dist.ProcessGroup
) -> Callable[[], None]:
    """Begin to write; every process calls it with its part. The result waits for the end, of all processes.

    commit: called in a thread of the first process with the SHA-256 of each file, after all are on disk. An OSError
    names the process where something failed, commit included.
    """
    writing: Any = dcp.async_save(dict(tensors), storage_writer=_Writer(folder, commit), process_group=group)

    def wait() -> None:
        try:
            writing.result()
        except (CheckpointException, RuntimeError, OSError) as error:
            raise OSError(f"{folder.name} could not be written: {_reason(error)}") from error

    return wait


def slices(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """This process's slice of every tensor of a cut model, and the optimiser's groups, by weights' names.

    Of an uncut model: all tensors.
    """
    tensors = {MODEL + name: tensor for name, tensor in get_model_state_dict(model).items()}
    if optimizer is None:
        return tensors, []  # type: ignore[return-value]
    moments: Any = get_optimizer_state_dict(model, optimizer)
    for name, values in moments["state"].items():
        tensors |= {f"{OPTIMIZER}{name}/{what}": tensor for what, tensor in values.items()}
    return tensors, moments["param_groups"]  # type: ignore[return-value]


def share(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's share of the tensors that all hold alike: largest first, each to the next process in turn."""
    names = sorted(tensors, key=lambda name: (-tensors[name].nbytes, name))
    return {name: tensors[name] for name in names[dist.get_rank() :: dist.get_world_size()]}


# ---- reading


def _member(of: Any, name: str) -> Any:
    """A member of the one enum in .metadata, which Python up to 3.11.3 pickles as getattr(enum, name)."""
    enum: Any = parts._MEM_FORMAT_ENCODING
    if of is not enum or name not in enum.__members__:
        raise pickle.UnpicklingError(f"it asks for {name} of {of!r}, which no checkpoint needs")
    return enum[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> parts.Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            return _Unpickler(file).load()


def shapes(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix, without it, and without their numbers (on torch's meta device)."""
    found = {}
    for key, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, parts.TensorStorageMetadata):
            raise ValueError(f"{key} is no tensor")
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return found


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix, without it, uncut, on the CPU."""
    found = {prefix + name: torch.empty_like(tensor, device="cpu") for name, tensor in shapes(folder, prefix).items()}
    _read(folder, found)
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def read_slices(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, groups: list[dict[str, Any]]
) -> None:
    """Load a cut model, and its optimiser if given; each process reads its part alone."""
    tensors, _ = slices(model, optimizer)
    _read(folder, tensors)
    weights: Any = {key.removeprefix(MODEL): tensor for key, tensor in tensors.items() if key.startswith(MODEL)}
    set_model_state_dict(model, weights)
    if optimizer is not None:
        moments = {key.removeprefix(OPTIMIZER): tensor for key, tensor in tensors.items() if key.startswith(OPTIMIZER)}
        set_optimizer_state_dict(model, optimizer, {"state": by_weight(moments), "param_groups": groups})  # type: ignore[dict-item]


def by_weight(moments: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The optimiser's tensors of each weight."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = tensor
    return state


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of every reader that is alone
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
    except CheckpointException as error:  # which is no Exception
        raise ValueError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if not failures:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return "; ".join(f"process {rank}: {_reason(found)}" for rank, (found, _) in sorted(failures.items()))
