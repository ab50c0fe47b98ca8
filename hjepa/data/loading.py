"""Batches that loader processes make ahead, in order: those of training, and pictures decoded to be measured.

    for images in batches(data, 64, index.split(256), workers=2):    # as data.at_size(64, chunk) for each chunk

Loader processes hand pictures over as they are stored, uint8; the caller normalises them. Only pictures that lie in
files are given to them. Arrays and drawings are made where they are asked for.

Not covered: what a training batch holds (`hjepa.train.feed`).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..inputs import UserError, size_pair
from .images import Pixels, normalised

PART = 32  # pictures that a loader process hands over at once


def loaded(made: Dataset, keys: Iterable[Any], workers: int, *, pin: bool = False) -> Iterator[Any]:
    """made[key] for each key, in order. `workers` processes make them ahead; with 0 this process makes each in turn.

    pin: hand over in pinned memory. The global random state stays as it was. ValueError in one line, as made[key]
    raises it, whichever process that was.
    """
    loader = DataLoader(
        made, batch_size=None, num_workers=workers, pin_memory=pin, generator=torch.Generator(),
        sampler=keys,  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        yield from loader
    except UserError as error:  # a worker adds its traceback
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


class _Resized(Dataset):
    """Pictures by lists of their places: uint8 `[n, 3, height, width]`."""

    def __init__(self, pictures: Pixels, size: tuple[int, int]) -> None:
        self.pictures, self.size = pictures, size

    def __getitem__(self, indices: list[int]) -> Tensor:
        return self.pictures.resized(indices, *self.size)


def batches(data: Any, size: Any, chunks: Sequence[Tensor], workers: int = 0) -> Iterator[Tensor]:
    """data.at_size(size, chunk) for each chunk of places, in order: float32 `[n, 3, h, w]`, whatever `workers` is.

    data: an `ImageData`, or anything with `at_size`, which then stays in this process. workers: loader processes that
    decode files. ValueError on a file that cannot be read.
    """
    if workers < 1 or not getattr(data, "from_files", False):
        yield from (data.at_size(size, chunk) for chunk in chunks)
        return
    parts = [[part.tolist() for part in chunk.split(PART)] for chunk in chunks]
    keys = [part for chunk in parts for part in chunk]
    found = loaded(_Resized(data.pictures, size_pair(size)), keys, min(workers, len(keys)))
    for chunk in parts:
        yield normalised(torch.cat(list(islice(found, len(chunk)))), data.mean, data.std)


def at_size(data: Any, size: Any, index: Tensor, workers: int = 0) -> Tensor:
    """data.at_size(size, index), decoded as by `batches`."""
    (images,) = batches(data, size, [index], workers)
    return images
