"""Where pictures come from: a reader per data set, for arrays, drawings and image files.

A reader lists labels and ids of one split; its `open` then loads only the pictures that are kept. All three
kinds of picture answer to `source` and `resized`. Downloads are torchvision's. They never wait longer than
TIMEOUT seconds for an answer, and a failure says which file to put where.

Sources: OpenMoji (openmoji.org, CC BY-SA 4.0); Fashion-MNIST (Xiao et al. 2017); CIFAR-10 (Krizhevsky 2009);
STL-10 (Coates et al. 2011), its labelled part; Imagenette (Howard 2019), ten classes of ImageNet.
"""

import contextlib
import gzip
import os
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import alone, user_path
from ..inputs import UserError
from . import openmoji
from .folder import check_opens, find_images, is_test, read_image, unopened
from .index import open_index, take

TIMEOUT = 15.0  # seconds without an answer before a download gives up
MEMORY = 1 << 30  # bytes of decoded image files kept in memory; the rest is decoded at each use
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
FASHION = [
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
]
IMAGENETTE = [
    *("tench", "English springer", "cassette player", "chain saw", "church"),
    *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
]
IMAGENETTE_COUNTS = {"train": 9469, "test": 3925}


@dataclass(frozen=True)
class Request:
    """What load_data was asked for."""

    split: str  # train (validation pictures still among them), test, or test-b
    root: Path
    path: str | Path | None
    image_size: int
    skip_corrupt: bool


@dataclass(frozen=True)
class Listing:
    """One split before its pixels are loaded. open(indices) -> (pictures, positions in indices left out).

    groups: pictures of equal group stay in one split; None: each picture for itself. cut: of training pictures, the
    first `cut` are to train on and the others for validation; None: not divided yet.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    classes: list[str]
    open: Callable[[Sequence[int]], tuple[Any, list[int]]]
    groups: list[str] | None = None
    cut: int | None = None


def fit(images: Tensor, height: int, width: int, *, fill: int | None) -> Tensor:
    """uint8 [..., c, h, w] -> [..., c, height, width], antialiased, aspect kept.

    fill None: the image covers the frame and its overhang is cropped, centred. A number: the whole image is
    shown, centred on that grey.
    """
    from torchvision.transforms.v2 import functional

    h, w = images.shape[-2:]
    if fill is None:
        images = functional.center_crop(images, [_part(h, w, height, width), _part(w, h, width, height)])
        return functional.resize(images, [height, width], antialias=True)
    inner = [_part(height, width, h, w), _part(width, height, w, h)]
    images = functional.resize(images, inner, antialias=True)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    edges = [left, top, width - inner[1] - left, height - inner[0] - top]
    return functional.pad(images, edges, fill=fill) if any(edges) else images


def _part(side: int, other: int, ratio_side: int, ratio_other: int) -> int:
    """The largest share of `side` for which side : other can be ratio_side : ratio_other."""
    return max(1, min(side, round(other * ratio_side / ratio_other)))


class ArrayPictures:
    """uint8 [N, 1 or 3, h, w] in memory, grey stored once."""

    from_files = False

    def __init__(self, array: Tensor, fill: int | None) -> None:
        self.array, self.fill = array, fill

    def source(self, index: int) -> Tensor:
        return self.array[index].expand(3, -1, -1)

    def resized(self, indices: list[int], height: int, width: int) -> Tensor:
        return fit(self.array[indices], height, width, fill=self.fill).expand(-1, 3, -1, -1)


class DrawnPictures:
    """OpenMoji pictures by their place in the catalogue; source detail is `detail` pixels."""

    from_files = False

    def __init__(self, places: list[int], detail: int) -> None:
        self.places, self.detail = places, detail

    def source(self, index: int) -> Tensor:
        return openmoji.picture(self.places[index], self.detail, self.detail)

    def resized(self, indices: list[int], height: int, width: int) -> Tensor:
        images = torch.empty(len(indices), 3, height, width, dtype=torch.uint8)
        for row, index in enumerate(indices):
            images[row] = openmoji.picture(self.places[index], height, width)
        return images


class FilePictures:
    """Image files, by their paths below a folder. source(): shorter side at most `detail` pixels.

    Decoded pictures are kept in memory up to MEMORY bytes; none is where less than half of them would fit.
    """

    from_files = True

    def __init__(self, folder: Path, names: Sequence[str], detail: int) -> None:
        self.folder, self.names, self.detail = folder, names, detail
        self.kept: dict[int, Tensor] = {}
        self.free = MEMORY if 3 * detail * detail * len(names) <= 2 * MEMORY else 0  # as if all were square

    def file(self, index: int) -> Path:
        return self.folder / self.names[index]

    def stamps(self) -> list[tuple[int, int]]:
        """Size in bytes and time of the last change in ns of each file."""
        found = (os.stat(self.file(index)) for index in range(len(self.names)))
        return [(file.st_size, file.st_mtime_ns) for file in found]

    def source(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        image = read_image(self.file(index))  # [3, h, w]
        height, width = image.shape[-2:]
        shrink = self.detail / min(height, width)
        if shrink < 1:
            image = fit(image, round(height * shrink), round(width * shrink), fill=None)
        if image.numel() > self.free:
            self.free = 0
        else:
            self.free -= image.numel()
            self.kept[index] = image
        return image

    def resized(self, indices: list[int], height: int, width: int) -> Tensor:
        images = torch.empty(len(indices), 3, height, width, dtype=torch.uint8)
        for row, index in enumerate(indices):
            image = self.kept.get(index)
            if image is None or min(image.shape[-2:]) >= self.detail:  # it may have been shrunk: its file has more
                image = read_image(self.file(index))
            images[row] = fit(image, height, width, fill=None)
        return images


def read_openmoji(request: Request) -> Listing:
    emoji = openmoji.catalogue()
    classes = sorted({item.category for item in emoji})
    labels = [classes.index(item.category) for item in emoji]
    tested = is_test([item.group for item in emoji], labels)
    places = [i for i in range(len(emoji)) if tested[i] == (request.split == "test")]

    def open_(indices: Sequence[int]) -> tuple[DrawnPictures, list[int]]:
        return DrawnPictures([places[i] for i in indices], 2 * request.image_size), []

    ids, groups = [emoji[i].id for i in places], [emoji[i].group for i in places]
    return Listing(ids, [labels[i] for i in places], classes, open_, groups)


def read_fashion_mnist(request: Request) -> Listing:
    folder = request.root / "FashionMNIST" / "raw"
    stem = "train" if request.split == "train" else "t10k"
    names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    with alone(request.root, "fashion_mnist", make=False):  # another process may be writing the files
        files = _idx_files(folder, names) or _idx_files(DEBIAN, names)
    if files is None:
        url = "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion"
        with _downloading("fashion_mnist", request.root, folder, f"the four files *-ubyte.gz of {url}"):
            from torchvision.datasets import FashionMNIST

            files = _idx_files(folder, names)
            if files is None:
                FashionMNIST(str(request.root), download=True)
                files = [folder / name for name in names]
    images, labels = (read_idx(file) for file in files)
    if len(images) != len(labels):
        raise UserError(f"{files[0]} has {len(images)} images but {files[1]} has {len(labels)} labels")
    return _array_listing(images[:, None], labels, FASHION, request.split, fill=0)


def _idx_files(folder: Path, names: list[str]) -> list[Path] | None:
    files = [next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None) for name in names]
    return [file for file in files if file is not None] if None not in files else None


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in IDX form (LeCun): 0 0 8 ndim, then each size as 4 bytes, high byte first."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4) if raw[:3] == b"\0\0\x08" else None
        if shape is None:
            raise UserError("not an IDX file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape.astype(int)).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"data file {path} is damaged ({error}); delete it and fetch it again") from None


def read_cifar10(request: Request) -> Listing:
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    with _downloading("cifar10", request.root, request.root, url):
        from torchvision.datasets import CIFAR10

        data = CIFAR10(str(request.root), train=request.split == "train", download=True)
    images = data.data.transpose(0, 3, 1, 2)
    return _array_listing(images, data.targets, data.classes, request.split, fill=None)


def read_stl10(request: Request) -> Listing:
    url = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
    with _downloading("stl10", request.root, request.root, url):
        from torchvision.datasets import STL10

        data = STL10(str(request.root), split=request.split, download=True)
    return _array_listing(data.data, data.labels, data.classes, request.split, fill=None)


def _array_listing(
    images: np.ndarray, labels: Any, classes: list[str], split: str, *, fill: int | None
) -> Listing:
    def open_(indices: Sequence[int]) -> tuple[ArrayPictures, list[int]]:
        return ArrayPictures(torch.from_numpy(np.ascontiguousarray(images[np.array(indices)])), fill), []

    ids = [f"{split}-{i:05d}" for i in range(len(images))]
    return Listing(ids, [int(label) for label in labels], list(classes), open_)


def read_imagenette(request: Request) -> Listing:
    size = "160" if request.image_size <= 80 else "320" if request.image_size <= 160 else ""
    folder = request.root / (f"imagenette2-{size}" if size else "imagenette2")
    with alone(request.root, "imagenette", make=False):  # another process may be unpacking it
        present = folder.is_dir()
    if not present:
        url = f"https://s3.amazonaws.com/fast-ai-imageclas/{folder.name}.tgz"
        with _downloading("imagenette", request.root, request.root, url):
            from torchvision.datasets import Imagenette

            if not folder.is_dir():
                Imagenette(str(request.root), size=f"{size}px" if size else "full", download=True)
    stored = "train" if request.split == "train" else "test"
    files, labels, _ = find_images(folder, stored)
    expected = IMAGENETTE_COUNTS[stored]
    if len(files) != expected:
        state = f"folder {folder} has {len(files)} {stored} images, not {expected}"
        raise UserError(f"{state}; delete it to fetch it again")
    if stored == "test":  # halves of its own test pictures: choices may look at the first, the second is read once
        second = is_test([file.rpartition("/")[2] for file in files], labels, fraction=0.5)
        kept = [i for i, in_second in enumerate(second) if in_second == (request.split == "test-b")]
        files, labels = [files[i] for i in kept], [labels[i] for i in kept]
    return _file_listing(request, folder, files, labels, IMAGENETTE)


def read_imagefolder(request: Request) -> Listing:
    if request.path is None:
        raise UserError("data set 'imagefolder' needs path=, the folder that holds the class folders")
    folder, index = user_path(request.path), open_index(request.path, request.split, request.root / ".index")
    if index is None:
        return _file_listing(request, folder, *find_images(folder, request.split))
    openable = unopened().isdisjoint(index.endings)
    return _file_listing(request, folder, index.names, index.labels, index.classes, index.cut, openable)


def _file_listing(
    request: Request, folder: Path, names: Sequence[str], labels: Any, classes: list[str], cut: int | None = None,
    openable: bool = False,
) -> Listing:  # fmt: skip
    """openable: all are known to be of kinds that Pillow opens."""

    def open_(indices: Sequence[int]) -> tuple[FilePictures, list[int]]:
        pictures = FilePictures(folder, take(names, indices), 2 * request.image_size)
        if openable and not pictures.free and not request.skip_corrupt:
            return pictures, []
        bad = [i for i in range(len(indices)) if not _readable(pictures, i, request.skip_corrupt)]
        if bad:
            good = sorted(set(range(len(indices))) - set(bad))
            kept = {new: pictures.kept[old] for new, old in enumerate(good) if old in pictures.kept}
            pictures.names, pictures.kept = take(pictures.names, good), kept
        return pictures, bad

    return Listing(names, labels, classes, open_, cut=cut)


def _readable(pictures: FilePictures, index: int, skip_corrupt: bool) -> bool:
    """Decode a file once. Without skipping, files beyond the memory kept are left for later."""
    try:
        check_opens(pictures.file(index))
        if not skip_corrupt and pictures.free <= 0:
            return True
        pictures.source(index)
    except ValueError:
        if not skip_corrupt:
            raise
        return False
    return True


@contextlib.contextmanager
def _downloading(name: str, root: Path, folder: Path, what: str) -> Iterator[None]:
    """Bound the wait of torchvision's downloads; turn a failure into one line that says what to do.

    One process downloads; the others wait for it, and look again for the files in here.
    """
    with alone(root, name), _one_line(name, folder, what):
        yield


@contextlib.contextmanager
def _one_line(name: str, folder: Path, what: str) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        state = f"data set {name!r} is not in {folder} and the download failed ({reason})"
        raise FileNotFoundError(f"{state}; fetch {what} into that folder") from None
    finally:
        socket.setdefaulttimeout(before)
