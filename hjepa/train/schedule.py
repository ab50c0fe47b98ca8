"""What step t of a training run uses, as pure functions of (seed, t): learning rate, pictures, masks, noise.

The idea: nothing depends on what happened before step t, so a run that is stopped and resumed, and a run that is
split over processes or micro-batches, see the same numbers as one that is neither. There is no random state to
save; the step is the state.

    pictures   epoch e visits all pictures in the order of a generator seeded by (seed, e); where views are told apart
               a batch across two epochs has no picture twice
    size       one draw from the list of training sizes
    crops      place p of the global batch of step t is augmented from mix(seed, t, p)
    masks      one draw for the whole global batch of step t, then sliced
    the rest   dropout and RoPE augmentation: torch's own generator is seeded by (seed, t)

Source: linear warm-up and cosine decay as in Loshchilov & Hutter 2017 (SGDR, arXiv:1608.03983), without restarts.
Not covered: weighted sampling, data sets of unknown length.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..inputs import UserError


def mix(*words: int | str) -> int:
    """A 63-bit seed from integers and words, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_at(seed: int, step: int, use: str) -> torch.Generator:
    """A fresh CPU generator for one use (for example "masks") of one step."""
    return torch.Generator().manual_seed(mix(seed, step, use))


def lr_at(step: int, *, steps: int, lr: float, min_lr: float = 0.0, warmup: int = 0) -> float:
    """Learning rate of optimiser step `step` (0 .. steps - 1).

    Linear from lr / warmup to lr over the first `warmup` steps, then half a cosine from lr down towards min_lr,
    which step `steps` would reach.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int, apart: int = 0) -> Tensor:
    """The order `[size]` in which epoch `epoch` visits the pictures.

    apart: the batch size, if the batch that this epoch shares with the one before shall have no picture twice. Pictures
    that it has already then change places with the next ones that it has not, all within the first `apart` places;
    where there are none the order is the same. Of fewer pictures than a batch no order is changed.
    """
    if not 0 < apart <= size or not epoch * size % apart:
        return _drawn(size, seed, epoch)
    first = epoch - 1  # its end is as it was drawn, unless its beginning reaches so far
    while size < 2 * apart and first * size % apart:
        first -= 1  # to an epoch that begins with a batch
    order = _drawn(size, seed, first)
    for each in range(first + 1, epoch + 1):
        order = _unlike(_drawn(size, seed, each), order[-(each * size % apart) :], apart)
    return order


def _drawn(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_at(seed, epoch, "epoch"))


def _unlike(order: Tensor, last: Tensor, batch_size: int) -> Tensor:
    """`order` whose beginning, with the pictures `last`, is a batch of different pictures."""
    begun, taken = batch_size - len(last), torch.isin(order, last)
    twice = taken[:begun].nonzero()[:, 0]
    free = begun + (~taken[begun:]).nonzero()[: len(twice), 0]
    order[twice], order[free] = order[free], order[twice]
    return order


def batch_at(step: int, *, size: int, batch_size: int, seed: int, apart: bool = False) -> list[tuple[int, int]]:
    """(picture, crop seed) of each place of the global batch of step `step`; size is the number of pictures.

    A batch may lie across two epochs, so no picture is ever left out. apart: such a batch has no picture twice, which
    would be its own negative (`epoch_order`).
    """
    first = step * batch_size
    places = []
    for place in range(batch_size):
        epoch, offset = divmod(first + place, size)
        order = epoch_order(size, seed, epoch, batch_size if apart else 0)
        places.append((int(order[offset]), mix(seed, step, place)))
    return places


def size_at(step: int, *, sizes: Sequence[int], seed: int) -> int:
    """Image side of step `step` in pixels, drawn from `sizes` with equal chances."""
    if len(sizes) == 1:
        return sizes[0]
    return sizes[int(torch.randint(len(sizes), (), generator=generator_at(seed, step, "size")))]


def share(batch_size: int, *, micro: int, accumulate: int, rank: int, processes: int) -> slice:
    """Rows of the global batch that process `rank` handles in micro-batch `micro`.

    Raises:
        ValueError: the global batch does not divide evenly.
    """
    parts = accumulate * processes
    if batch_size % parts:
        near = max(parts, round(batch_size / parts) * parts)
        raise UserError(
            f"batch_size={batch_size} is the global batch and must be a multiple of accumulate x processes = "
            f"{accumulate} x {processes}; nearest: {near}"
        )
    rows = batch_size // parts
    first = (micro * processes + rank) * rows
    return slice(first, first + rows)


class StepSampler:
    """Batch sampler of one process: for each step, for each of its slices of the global batch, the list of its
    (picture, crop seed, image side). `size` is the number of pictures, `rows` are the slices, one per micro-batch,
    from `share`; the side is drawn from `sides`, see `size_at`; apart: see `batch_at`."""

    def __init__(
        self, steps: range, rows: Sequence[slice], *, size: int, batch_size: int, seed: int, sides: Sequence[int],
        apart: bool = False,
    ):  # fmt: skip
        self.steps, self.rows, self.size, self.batch_size, self.seed = steps, rows, size, batch_size, seed
        self.sides, self.apart = sides, apart

    def __len__(self) -> int:
        return len(self.steps) * len(self.rows)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self.steps:
            side = size_at(step, sizes=self.sides, seed=self.seed)
            places = batch_at(step, size=self.size, batch_size=self.batch_size, seed=self.seed, apart=self.apart)
            yield from ([(*place, side) for place in places[rows]] for rows in self.rows)
