"""Which pictures are read: a seeded choice, and of moved pictures each in all of its fixed places.

    shown = shown_of(test, queries, seed)     # ImageData with repeats: ids "x", "x#1", "x#2", ..
    features = encode(encoder, test.at_size(size, shown.index))
    bootstrap_interval(hits, groups=shown.picture)

Several placements of a picture are one picture: they are chosen together, and intervals draw them together or leave
them out together.
Not covered: where the places are (`hjepa.data.moved`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .measures import Interval


@dataclass(frozen=True)
class Shown:
    """Pictures that are read, each in all of its placements; Q rows in all."""

    index: Tensor  # [Q] rows of the data, in order
    picture: Tensor  # [Q] which picture each is, 0 to count - 1
    turn: Tensor  # [Q] which placement of its picture
    count: int  # of pictures

    @property
    def placements(self) -> int:
        """Of each picture; 1 where each is read once."""
        return len(self.index) // max(1, self.count)

    def rows(self, base: Mapping[str, Any], found: Mapping[str, Interval]) -> list[dict[str, Any]]:
        """A row for each metric: `base`, metric, value, low, high, n (pictures), and `placements` if there are several,
        so that tables of other numbers are not taken for the same."""
        base = {**base, "placements": self.placements} if self.placements > 1 else base
        return [
            {**base, "metric": metric, "value": value, "low": low, "high": high, "n": self.count}
            for metric, (value, low, high) in found.items()
        ]


def subset(total: int, count: int | None, seed: int) -> Tensor:
    """A seeded choice of `count` of `total` pictures, in order (None: all)."""
    if count is None or count >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def shown_of(data: Any, count: int | None, seed: int) -> Shown:
    """`subset` of the pictures of `data`, each with all of its placements: the same pictures whatever their number.

    Placements are told by `data.ids`, "x", "x#1", ..; data without ids have one each.
    """
    if not hasattr(data, "ids"):
        index = subset(len(data), count, seed)
        return Shown(index, torch.arange(len(index)), torch.zeros_like(index), len(index))
    number: dict[str, int] = {}
    named = [re.fullmatch(r"(.*?)(?:#(\d+))?", id_, re.DOTALL) for id_ in data.ids]
    picture = torch.tensor([number.setdefault(name[1], len(number)) for name in named if name])
    turn = torch.tensor([int(name[2] or 0) for name in named if name])
    index = torch.isin(picture, subset(len(number), count, seed)).nonzero()[:, 0]
    own = picture[index].unique(return_inverse=True)[1]
    return Shown(index, own, turn[index], int(own.max()) + 1 if len(own) else 0)
