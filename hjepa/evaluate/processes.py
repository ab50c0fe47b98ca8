"""Several processes encode together, as torchrun starts them; the first one gets all features and reads them.

    with together():                       # on every process
        own = share(batches)               # a run of whole batches, so that each is the batch that one process has
        all_of_them = gathered({"encoder": [encode(encoder, batch) for batch in own]})  # in order; {} on the others

Features travel as bytes from main memory to main memory by gloo, so processes need no GPU and may share one.
Not covered: readers and measures, which the first process makes alone.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
READING = timedelta(days=7)  # how long the others wait while the first process reads; torchrun ends them if it dies
SAYING = 10.0  # seconds for a process to say its error


@contextmanager
def together() -> Iterator[None]:
    """The processes of torchrun as a gloo group; all of them leave together.

    If one fails, all end, and only the first that failed raises its error.
    """
    store, rank, count = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=READING)
    try:
        yield
        dist.barrier()
    except (Exception, KeyboardInterrupt):
        if not _first(store):
            time.sleep(SAYING)  # torchrun ends this process as soon as the other one has left
            raise SystemExit(1) from None
        raise
    finally:
        dist.destroy_process_group()


def _first(store: dist.Store) -> bool:
    """Whether no other process has failed before."""
    with suppress(dist.DistError):
        return store.add("failed", 1) == 1
    return False  # the store has gone with the process that held it


def place() -> tuple[int, int]:
    """The number of this process, 0 for the first, and how many there are; (0, 1) without a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process is the one that reads, prints and writes."""
    return place()[0] == 0


def share(batches: Sequence[T]) -> Sequence[T]:
    """The batches of this process: neighbours, none where there are more processes than batches."""
    rank, count = place()
    return batches[len(batches) * rank // count : len(batches) * (rank + 1) // count]


def gathered(features: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """By encoder, the batches of all processes in order: on the first process; {} on the others."""
    rank, count = place()
    if count == 1:
        return features
    parts: list[Any] | None = None if rank else [None] * count
    dist.gather_object(features, parts)
    return {name: [batch for part in parts for batch in part[name]] for name in features} if parts else {}


def agreed(value: T) -> T:
    """What the first process has, on all of them."""
    box = [value]
    if place()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]
