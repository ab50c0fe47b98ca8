"""Simple features that any encoder must beat: thumbnails, a colour histogram, HOG. Callables, read like an encoder.

    readers = {"rope": encoder, "random init": untrained, **baselines(train_pictures, 64)}

Each takes normalised images [B, 3, h, w] of any size and gives features [B, D]. Histogram and HOG first resize a
picture of another size to the training size (bilinear, antialiased), so that bins and cells mean the same everywhere.
Sources: histograms of oriented gradients, Dalal & Triggs 2005 (CVPR, section 6; the cells of 8 px and 9 orientations),
as scikit-image has them; the square root of a histogram, so that products compare as Bhattacharyya 1943 does.
Not covered: random init and encoders without positions, which are encoders (`hjepa.build.build_encoders`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.loading import at_size
from ..inputs import size_pair
from .readers import leave_one_out_knn
from .transfer import EncoderLike, Pictures, Size, raw_pixels, resized, subset

RGB = tuple[float, float, float]
NAMES = ("raw pixels", "colour histogram", "HOG")  # of what `baselines` gives
BESIDE = ("random init", *NAMES)  # what tables of runs show beside them
SIDES = (4, 8, 16, 32, 64)  # of thumbnails, pixels
BINS, ORIENTATIONS, CELL = 6, 9, 8  # colour bins a channel; HOG's angles, and the side of its cells in pixels


class TrainPictures(Pictures, Protocol):
    """The part of `hjepa.data.ImageData` that baselines need."""

    mean: RGB
    std: RGB


def baselines(
    train: TrainPictures, train_size: Size, *, gallery: int | None = 1000, seed: int = 0, workers: int = 0
) -> dict[str, EncoderLike]:
    """Those of NAMES: the readers that every result shows beside its encoders.

    "raw pixels" are thumbnails of the side in SIDES that does best on training pictures (`best_side`). gallery: how
    many training pictures, drawn by seed, choose it (None: all). workers: as in `resolution_transfer`.
    """
    chosen = subset(len(train), gallery, seed)
    side = best_side(at_size(train, train_size, chosen, workers), train.labels[chosen])
    given = train_size, train.mean, train.std
    return dict(zip(NAMES, (raw_pixels(side), colour_histogram(*given), hog(*given)), strict=True))


def best_side(images: Tensor, labels: Tensor, sides: Sequence[int] = SIDES) -> int:
    """The side whose thumbnails of images [N, 3, h, w] are classed best by their neighbours, each picture left out
    in turn. Only training pictures belong here: chosen on test pictures, a baseline would be too strong."""
    share = [float(leave_one_out_knn(raw_pixels(side)(images), labels).double().mean()) for side in sides]
    return sides[int(np.argmax(share))]


def colour_histogram(size: Size, mean: RGB, std: RGB, bins: int = BINS) -> EncoderLike:
    """Square roots of the shares of pixels in bins x bins x bins colours: [B, bins^3].

    mean and std: as the images were normalised with.
    """
    target = size_pair(size)

    def histogram(images: Tensor) -> Tensor:
        levels = _colours(resized(images, target), mean, std) * bins + 1e-4  # at an edge: the upper bin, always
        levels = levels.long().clamp(max=bins - 1)
        red, green, blue = levels.flatten(2).unbind(1)  # [B, h*w] each
        place = (red * bins + green) * bins + blue
        counts = torch.zeros(len(images), bins**3).scatter_add_(1, place, torch.ones(place.shape))
        return (counts / place.shape[1]).sqrt()

    return histogram


def hog(size: Size, mean: RGB, std: RGB) -> EncoderLike:
    """Histograms of oriented gradients of the grey picture, blocks of 2 x 2 cells (fewer where `size` has fewer)."""
    target = size_pair(size)
    describe = _hog_of(tuple(min(2, side // CELL) for side in target))

    def features(images: Tensor) -> Tensor:
        grey = _colours(resized(images, target), mean, std).mean(dim=1).double().numpy()
        return torch.from_numpy(np.stack([describe(image) for image in grey])).float()

    return features


def _hog_of(block: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    from skimage.feature import hog as describe  # here: it takes a second to import

    if 0 in block:
        raise ValueError(f"HOG has cells of {CELL} px; give a training size of at least {CELL} px")
    return lambda image: describe(image, ORIENTATIONS, (CELL, CELL), block)


def _colours(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Normalised images -> colours in 0..1."""
    scale, shift = (torch.tensor(value).view(3, 1, 1) for value in (std, mean))
    return (images.cpu() * scale + shift).clamp(0, 1)
