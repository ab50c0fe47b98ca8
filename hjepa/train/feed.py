"""What a step feeds the model: pictures, cut into views on the device, with masks and labels.

Loader processes hand over whole batches as they are stored, uint8, and their masks; what is left for the device is to
normalise, and to cut views. Crops and masks are those of the global batch at (seed, step), whatever the number of
processes. Each process keeps its own rows; of masks it draws only the blocks that hold them, and the first
(`nn.masks.BatchMasks`). The objective masks alone has one crop per picture, which the loader makes
(`data.images.TrainView`).

Not covered: data sets whose pictures have no common shape: `SourcePictures` makes them square.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..build import batch_masks, draw_views, small_side, train_sizes
from ..config import Config
from ..data.images import ImageData, TrainView, normalised
from ..data.loading import loaded
from ..data.sources import fit
from ..data.views import Crops, cut, places, to_device
from ..nn.masks import BatchMasks, Masks
from .schedule import StepSampler, size_at


class SourcePictures(Dataset):
    """Pictures for cropping with their labels: (uint8 `[3, side, side]`, label), indexed by (picture, ..)."""

    def __init__(self, data: ImageData, side: int) -> None:
        self.data, self.side = data, side

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Sequence[int]) -> tuple[Tensor, Tensor]:
        picture = self.data.source(key[0])
        if picture.shape[1:] != (self.side, self.side):
            picture = fit(picture, self.side, self.side, fill=None)
        return picture, self.data.labels[key[0]]


class Batches(Dataset):
    """Micro-batches of this process: pictures uint8 `[B, 3, S, S]`, labels `[B]`, masks (None where all is seen).

    Indexed by (step, rows of the global batch, a key of `StepSampler` for each row).
    """

    def __init__(self, config: Config, data: ImageData, patch_size: int) -> None:
        self.config, self.patch_size = config, patch_size
        self.drawn: tuple[Any, BatchMasks | None] = (None, None)  # step and grid of the last masks, and the masks
        self.sources = SourcePictures(data, 2 * max(train_sizes(config)))
        self.view = TrainView(
            data,
            config.data.image_size,
            crop_scale=tuple(config.data.crop_scale),
            flip=config.data.flip,
            color_jitter=config.data.color_jitter,
        )

    def __getitem__(self, key: tuple[int, slice, list]) -> tuple[Tensor, Tensor, Masks | None]:
        step, rows, keys = key
        if self.config.objective == "masks":
            found = [(self.view.pixels(key), self.view.data.labels[key[0]]) for key in keys]
        else:
            found = [self.sources[key] for key in keys]
        grid = (keys[0][2] // self.patch_size,) * 2
        if self.drawn[0] != (step, grid):  # once for all micro-batches of a step
            self.drawn = (step, grid), batch_masks(self.config, grid, step)
        masks, views = self.drawn[1], 1 if self.config.objective == "masks" else self.config.views.large
        return *default_collate(found), None if masks is None else masks.rows(rows, views)


class Feed:
    """Iterates over the keyword arguments of `HJEPA.forward`, one per micro-batch of each step.

    Args:
        config: of the run.
        data: training pictures.
        steps: to go through.
        rows: of the global batch, one slice per micro-batch (`schedule.share`).
        patch_size: side of a patch, pixels.
        device: where views are made.
        dtype: precision in which they are cut.
    """

    def __init__(
        self, config: Config, data: ImageData, steps: range, rows: Sequence[slice], patch_size: int,
        device: torch.device, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.config, self.data, self.steps, self.rows = config, data, steps, rows
        self.patch_size, self.device, self.dtype = patch_size, device, dtype
        self.sides = train_sizes(config)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        options = self.config.train
        batches = self._batches()
        for step in self.steps:
            side = size_at(step, sizes=self.sides, seed=options.seed)
            crops = None if self.config.objective == "masks" else draw_views(self.config, step)
            for rows in self.rows:
                *batch, masks = next(batches)
                pictures, labels = (t.to(self.device, non_blocking=True) for t in batch)
                if crops is None:
                    arguments = {"images": normalised(pictures, self.data.mean, self.data.std)}
                else:
                    arguments = self._views(pictures, labels, crops, side, rows)
                if masks is not None:
                    arguments["masks"] = masks.to(self.device)
                yield arguments

    def _keys(self) -> Iterator[tuple[int, slice, list[Any]]]:
        options = self.config.train
        sampler = StepSampler(
            self.steps, self.rows, size=len(self.data), batch_size=options.batch_size, seed=options.seed,
            sides=self.sides, apart=self.config.objective in ("views", "both"),
        )  # fmt: skip
        slots = itertools.product(self.steps, self.rows)
        return ((*slot, keys) for slot, keys in zip(slots, sampler, strict=True))

    def _batches(self) -> Iterator[Any]:
        made = Batches(self.config, self.data, self.patch_size)
        return loaded(made, self._keys(), self.config.train.num_workers, pin=self.device.type == "cuda")

    def _views(
        self, pictures: Tensor, labels: Tensor, crops: tuple[list[Crops], list[Crops]], side: int, rows: slice
    ) -> dict[str, Any]:
        """Views of a batch of pictures `[B, 3, S, S]` with labels `[B]`, as arguments of the model."""
        arguments: dict[str, Any] = {"pictures": len(pictures)}
        kinds = (("images", "places", side), ("small", "small_places", small_side(self.config, side)))
        for (name, where, pixels), drawn in zip(kinds, crops, strict=True):
            views = to_device([view.rows(rows) for view in drawn], self.device)
            if views:
                cuts = [cut(pictures, v, pixels, self.data.mean, self.data.std, self.dtype) for v in views]
                arguments[name] = torch.cat(cuts)
            if views and self.config.views.coordinates == "picture":
                grid = (pixels // self.patch_size,) * 2
                arguments[where] = torch.cat([places(v, grid) for v in views])
        if self.config.objective == "labels":
            arguments["labels"] = labels
        return arguments
