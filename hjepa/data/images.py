"""Data sets by name, as images at any requested size.

    load_data("openmoji", "train") -> ImageData -> .at_size((H, W))   normalised float32, for measuring
                                                -> TrainView          random crops and flips, for training

Every picture is resized once, with antialiasing, from the largest detail that the data set has; OpenMoji
pictures are drawn at the size asked for. Drawings and garments on a plain background are shown whole, with
the background filling the rest of a wide image; photographs fill the image and lose their edges.

Which pictures are for testing never depends on a seed, so no run can train on the test pictures of another. Choices
(recipe, penalty, baseline) are made on "validation", which is cut from the training pictures of every data set and is
never in "train"; "test" is for what is reported. Imagenette's test pictures are cut into halves, "test" and "test-b".
All randomness of training (crop, flip, colour) comes from the seed given with each index: a sample is the
same in whatever process or order it is drawn. Folders of many files are listed in one mapped file (`data.index`).

Not covered: labels other than one class per picture, and video.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..inputs import UserError, nearest, size_pair
from . import openmoji, sources
from .folder import is_validation
from .index import take
from .moved import MovedPictures
from .sources import Listing, Request
from .views import constants

SPLITS = ("train", "validation", "test")
FINAL = {"imagenette": "test-b"}  # a split that only the last reading of finished models asks for
Size = int | Sequence[int]
RGB = tuple[float, float, float]


class Pixels(Protocol):
    """The pixels of one split: arrays, files or drawings."""

    from_files: bool  # decoded when they are asked for

    def source(self, index: int) -> Tensor: ...  # uint8 [3, h, w]

    def resized(self, indices: list[int], height: int, width: int) -> Tensor: ...  # uint8 [n, 3, ...]


@dataclass
class ImageData:
    """One split of one data set. `ids` name the pictures for good; `mean` and `std` count white as 1."""

    name: str
    split: str
    labels: Tensor  # int64 [N]
    classes: list[str]
    ids: Sequence[str]
    mean: RGB
    std: RGB
    pictures: Pixels = field(repr=False)
    skipped: list[str] = field(default_factory=list, repr=False)  # image files that could not be read

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def from_files(self) -> bool:
        """Whether pictures are decoded from files, which loader processes can do."""
        return self.pictures.from_files

    def source(self, index: int) -> Tensor:
        """Picture `index` with its detail, for cropping: uint8 [3, h, w]."""
        return self.pictures.source(int(index))

    def at_size(self, size: Size, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """The chosen pictures (default all) in order: float32 [n, 3, height, width], (x / 255 - mean) / std.

        size: pixels, one number for a square or (height, width). ValueError on anything else, IndexError on
        an index outside the split.
        """
        height, width = size_pair(size, text=False)
        chosen = torch.arange(len(self)) if indices is None else torch.as_tensor(indices)
        if chosen.dtype == torch.bool:
            raise UserError("indices are a boolean mask; give positions, for example mask.nonzero()[:, 0]")
        images = self.pictures.resized(chosen.to(torch.int64).tolist(), height, width)
        return normalised(images, self.mean, self.std)


def left_out(*splits: ImageData) -> str:
    """A line on the image files that on_corrupt "skip" left out of the splits, "" if none."""
    names = [name for data in splits for name in data.skipped]
    return f"{len(names)} image files cannot be read and were left out, {names[0]} first" if names else ""


def mean_and_std(data: ImageData, size: Size = 64) -> tuple[RGB, RGB]:
    """Mean and standard deviation of each channel over the pixels of all pictures, white = 1, for data.mean, data.std.

    size: pixels that each picture is resized to, so that large files do not count for more.
    """
    height, width = size_pair(size, text=False)
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for part in torch.arange(len(data)).split(256):
        pixels = data.pictures.resized(part.tolist(), height, width).double() / 255
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
    mean = total / (len(data) * height * width)
    std = (squares / (len(data) * height * width) - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())  # type: ignore[return-value]


def normalised(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """uint8 [..., 3, h, w] -> new float32 of the same shape and device, (x / 255 - mean) / std per channel."""
    mean_, std_ = (constants(tuple(value), images.device, 255).view(3, 1, 1) for value in (mean, std))
    return images.to(torch.float32, copy=True).sub_(mean_).div_(std_)


class TrainView(Dataset):
    """Training images: a random crop resized to image_size, then a random flip and change of colour.

    Index it with (index, sample_seed) to get float32 [3, image_size, image_size], or with (index, sample_seed,
    side) to get the same crop at another side; equal seeds give equal images and the global random state is left
    as it was. crop_scale: smallest and largest share of the
    picture's area that a crop keeps (aspect 3/4 to 4/3, Szegedy et al. 2015); color_jitter: 0 is none, 1
    changes brightness, contrast and saturation as strongly as SimCLR (Chen et al. 2020); hue is left alone,
    it would take longer than all the rest. ValueError on values outside these ranges.
    """

    def __init__(
        self,
        data: ImageData,
        image_size: int,
        *,
        crop_scale: Sequence[float] = (0.3, 1.0),
        flip: bool = True,
        color_jitter: float = 0.0,
    ) -> None:
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(
                f"crop_scale {crop_scale!r} must be two numbers with 0 < smallest <= largest <= 1"
            )
        if not 0 <= color_jitter <= 1:
            raise UserError(f"color_jitter {color_jitter!r} must be between 0 (none) and 1")
        size_pair(image_size, text=False)
        self.data, self.image_size = data, image_size
        self.crop_scale, self.flip, self.color_jitter = tuple(crop_scale), flip, color_jitter
        self.augments: dict[int, Callable[[Tensor], Tensor]] = {}  # by side, made when first asked for

    def __len__(self) -> int:
        return len(self.data)

    def augment(self, side: int) -> Callable[[Tensor], Tensor]:
        """The random changes that end at [3, side, side]."""
        from torchvision.transforms import v2

        if side not in self.augments:
            steps: list[Any] = [v2.RandomResizedCrop(side, scale=self.crop_scale, antialias=True)]
            steps += [v2.RandomHorizontalFlip()] if self.flip else []
            if self.color_jitter > 0:
                most = 0.8 * self.color_jitter
                steps += [v2.ColorJitter(most, most, most)]
            self.augments[side] = v2.Compose(steps)
        return self.augments[side]

    def __getitem__(self, key: Sequence[int]) -> Tensor:
        return normalised(self.pixels(key), self.data.mean, self.data.std)

    def pixels(self, key: Sequence[int]) -> Tensor:
        """The image before it is normalised: uint8 [3, side, side]."""
        index, sample_seed, *side = key
        # Torch uses the lower 32 bits of a seed only; the product lets all 64 reach the upper half, which we take.
        with seeded(sample_seed * 0x9E3779B97F4A7C15 % 2**64 >> 32):
            return self.augment(*side or (self.image_size,))(self.data.source(index))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU random numbers start from the lower 32 bits of `seed` inside, and go on as before outside."""
    generator = torch.default_generator  # torch.manual_seed would also reset every GPU
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before it is read. mean and std: of the training pixels, white = 1.

    background: grey of the canvas of moved pictures, 0 to 255; None: the mean colour.
    """

    read: Callable[[Request], Listing]
    mean: RGB
    std: RGB
    about: str
    background: int | None = None


IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

DATASETS: dict[str, DatasetSpec] = {
    "openmoji": DatasetSpec(
        sources.read_openmoji,
        (0.8384, 0.8183, 0.7777),
        (0.3057, 0.3185, 0.3628),
        "1,898 emoji in 9 categories, drawn at any size; needs no download",
        background=openmoji.BACKGROUND,
    ),
    "fashion_mnist": DatasetSpec(
        sources.read_fashion_mnist,
        (0.2860, 0.2860, 0.2860),
        (0.3530, 0.3530, 0.3530),
        "70,000 garments in 10 classes, grey, 28 px; 30 MB",
        background=0,
    ),
    "cifar10": DatasetSpec(
        sources.read_cifar10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "60,000 photographs in 10 classes, 32 px; 170 MB",
    ),
    "stl10": DatasetSpec(
        sources.read_stl10,
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
        "5,000 + 8,000 labelled photographs in 10 classes, 96 px; 2.6 GB",
    ),
    "imagenette": DatasetSpec(
        sources.read_imagenette, *IMAGENET, "13,394 photographs in 10 classes, 160 px and more; 94 MB or more"
    ),
    "imagefolder": DatasetSpec(
        sources.read_imagefolder,
        *IMAGENET,
        "your own images: path/CLASS/*, or path/train/CLASS/* beside path/test/CLASS/*",
    ),
}


def load_data(
    name: str,
    split: str = "train",
    *,
    root: str | Path = "data",
    path: str | Path | None = None,
    image_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
    on_corrupt: str = "error",
    moved: bool = False,
    repeats: int = 1,
    classes: Sequence[str] | None = None,
) -> ImageData:
    """One split of a registered data set: "train", "validation" (a fixed tenth of each class of the training
    pictures) or "test"; of imagenette also "test-b".

    root: folder for downloads and for the indices of large folders; path: the folder of "imagefolder". image_size: the
    largest size in pixels that training will ask for; source() has twice that detail where the data set has it. limit:
    at most so many pictures, classes taken in turn; seed picks which, and a larger limit includes a smaller one.
    on_corrupt: "error" raises on an image file that cannot be read (when it is first used, where the files are too many
    to keep in memory), "skip" decodes every file first and lists such files in `.skipped`. moved: each picture at a
    place and scale of its own on a canvas (`hjepa.data.moved`), repeats times; the ids of further placements end in
    "#1", "#2", ... classes: names of those to keep, which are numbered in this order (None: all). ValueError or
    FileNotFoundError, one line, on wrong arguments, missing or damaged data.
    """
    _check(name, split, image_size, limit, on_corrupt)
    _check_moved(moved, repeats)
    spec = DATASETS[name]
    stored = "train" if split == "validation" else split
    request = Request(stored, Path(root).expanduser(), path, image_size, on_corrupt == "skip")
    listing = spec.read(request)
    number = _numbers(name, listing.classes, classes)
    members = _members(listing, split)
    if classes is not None:
        members = [i for i in members if listing.labels[i] in number]
    if not members:
        raise UserError(f"data set {name!r} has no {split} pictures; give some class at least two training pictures")
    chosen = members
    if limit is not None and limit < len(members):
        chosen = [members[i] for i in _limited(take(listing.labels, members), limit, seed)]
    pictures, bad = listing.open(chosen)
    left_out = set(bad)
    good = [index for position, index in enumerate(chosen) if position not in left_out] if bad else chosen
    if not good:
        raise UserError(f"data set {name!r}, {split} split: none of {len(bad)} images can be read")
    ids, labels = take(listing.ids, good), take(listing.labels, good)
    if classes is not None:
        labels = [number[label] for label in labels]
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if moved:
        background = [round(255 * value) for value in spec.mean] if spec.background is None else [spec.background] * 3
        pictures = MovedPictures(pictures, ids, repeats, background, 2 * image_size)
    return ImageData(
        name=name,
        split=split,
        labels=labels if repeats == 1 else labels.repeat(repeats),
        classes=[listing.classes[old] for old in number],
        ids=ids if repeats == 1 else [*ids, *(f"{id_}#{repeat}" for repeat in range(1, repeats) for id_ in ids)],
        mean=spec.mean,
        std=spec.std,
        pictures=pictures,
        skipped=[listing.ids[chosen[position]] for position in bad],
    )


def side_for(sizes: Sequence[Any]) -> int:
    """The image_size, pixels, that `load_data` needs for pictures read at `sizes`: it takes files of twice that."""
    return (max(max(size_pair(size)) for size in sizes) + 1) // 2


def _check(name: str, split: str, image_size: int, limit: int | None, on_corrupt: str) -> None:
    if name not in DATASETS:
        near = nearest(name, DATASETS) or "none"
        raise UserError(f"data set {name!r} is not known; choose one of {', '.join(DATASETS)}; nearest: {near}")
    splits = (*SPLITS, FINAL[name]) if name in FINAL else SPLITS
    if split not in splits:
        near = nearest(str(split), splits) or "none"
        raise UserError(f"split {split!r} of {name} is not known; choose one of {', '.join(splits)}; nearest: {near}")
    if on_corrupt not in ("error", "skip"):
        raise UserError(f"on_corrupt {on_corrupt!r} is not known; choose error or skip")
    size_pair(image_size, text=False)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise UserError(f"limit {limit!r} must be a positive number of pictures, or null for all")


def _check_moved(moved: bool, repeats: int) -> None:
    if not isinstance(repeats, int) or repeats < 1:
        raise UserError(f"repeats {repeats!r} must be a positive number of placements of each picture")
    if repeats > 1 and not moved:
        raise UserError(f"repeats {repeats} without moved would give the same pictures again; add moved=True")


def _numbers(name: str, known: list[str], wanted: Sequence[str] | None) -> dict[int, int]:
    """The new number of each class that is kept, by its old one, in the new order."""
    if wanted is None:
        return {number: number for number in range(len(known))}
    for word in wanted:
        if word not in known:
            near = nearest(str(word), known) or "none"
            raise UserError(f"class {word!r} of {name} is not known; its classes: {', '.join(known)}; nearest: {near}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise UserError(f"classes {list(wanted)} of {name} must be one or more names, each once, or null for all")
    return {known.index(word): number for number, word in enumerate(wanted)}


def _members(listing: Listing, split: str) -> Sequence[int]:
    """Places in a listing that belong to the split: training pictures without or only the validation pictures."""
    if split not in ("train", "validation"):
        return range(len(listing.ids))
    if listing.cut is not None:
        return range(listing.cut) if split == "train" else range(listing.cut, len(listing.ids))
    cut = is_validation(listing.groups or listing.ids, listing.labels)
    return [i for i, in_validation in enumerate(cut) if in_validation == (split == "validation")]


def _limited(labels: Sequence[int], limit: int, seed: int) -> list[int]:
    """Indices of `limit` pictures, in order: a seeded draw from each class in turn."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    kinds = np.asarray(labels)[shuffled]
    grouped = np.argsort(kinds, kind="stable")  # class by class, each as shuffled
    turn = np.empty_like(grouped)
    turn[grouped] = np.arange(len(kinds)) - np.searchsorted(kinds[grouped], kinds[grouped])  # place in its class
    return np.sort(shuffled[np.argsort(turn, kind="stable")[:limit]]).tolist()
