"""Moved pictures: each at a place and a scale of its own on a plain canvas, the same in every run.

Drawings and garments come centred and of one size, so that features which know nothing but pixels do well on them.
Here the side of a picture is 50 to 100 % of the canvas's shorter side, and its place anything that keeps all of it on
the canvas; both are uniform and follow from a hash of (id, repeat) alone. On a canvas of another size the picture has
the same relative place and scale, to the nearest pixel, and is made at its own size in pixels: drawn, or resized from
its full detail with antialiasing.

Not covered: rotation, clutter, and pictures cut by the border.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST = 0.5  # side of a picture over that of its canvas, at least
MEMORY = 1 << 28  # bytes of canvases kept for training


class Placement(NamedTuple):
    """scale: side over the canvas's shorter side. top, left: 0 at the first border, 1 at the other."""

    scale: float
    top: float
    left: float


def placement(id_: str, repeat: int = 0) -> Placement:
    """The place of a picture: uniform numbers from the hash of its id and repeat."""
    digest = hashlib.sha256(f"{id_}#{repeat}".encode()).digest()
    parts = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") / 2**64 for i in range(3)]
    return Placement(SMALLEST + (1 - SMALLEST) * parts[0], parts[1], parts[2])


def box(place: Placement, height: int, width: int) -> tuple[int, int, int]:
    """Side, top and left in pixels of a picture on a canvas of height x width pixels."""
    side = max(1, round(place.scale * min(height, width)))
    return side, round(place.top * (height - side)), round(place.left * (width - side))


class MovedPictures:
    """Pictures on canvases: index r * N + i is picture i of N in its place of repeat r.

    Args:
        pictures: N pictures with `resized(indices, height, width)`, as `hjepa.data.images.Pixels`.
        ids: of the N pictures.
        repeats: placements of each picture.
        background: colour of the canvas, 0 to 255 for red, green and blue.
        detail: side in pixels of the canvases that `source` gives.
    """

    def __init__(
        self, pictures: Any, ids: Sequence[str], repeats: int, background: Sequence[int], detail: int
    ) -> None:
        self.pictures, self.count, self.detail = pictures, len(ids), detail
        self.from_files: bool = getattr(pictures, "from_files", False)
        self.places = [placement(id_, repeat) for repeat in range(repeats) for id_ in ids]
        self.background = torch.tensor(background, dtype=torch.uint8).view(3, 1, 1)
        self.kept: dict[int, Tensor] = {}

    def stamps(self) -> Any:
        """Size and time of change of the pictures' files, where they are files."""
        return self.pictures.stamps() if hasattr(self.pictures, "stamps") else None

    def source(self, index: int) -> Tensor:
        """uint8 [3, detail, detail]; kept in memory up to MEMORY bytes."""
        if index in self.kept:
            return self.kept[index]
        image = self.resized([index], self.detail, self.detail)[0]
        if (len(self.kept) + 1) * image.numel() <= MEMORY:
            self.kept[index] = image
        return image

    def resized(self, indices: list[int], height: int, width: int) -> Tensor:
        """uint8 [n, 3, height, width]; pictures of one side in pixels are made together."""
        canvas = self.background.expand(len(indices), 3, height, width).clone()
        rows: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for row, index in enumerate(indices):
            side, top, left = box(self.places[index], height, width)
            rows[side].append((row, index % self.count, top, left))
        for side, members in rows.items():
            images = self.pictures.resized([picture for _, picture, _, _ in members], side, side)
            for image, (row, _, top, left) in zip(images, members, strict=True):
                canvas[row, :, top : top + side, left : left + side] = image
        return canvas
