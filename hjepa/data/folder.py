"""Image files on disk: finding them in class folders, and decoding any kind of them to uint8 RGB.

Every mode that Pillow opens becomes three 8-bit channels: grey is repeated, a palette is looked up,
transparent parts show white, 16 bits are scaled to 8 (65535 is white), the rotation noted by a camera (EXIF)
is applied, and an animation gives its first frame. Float pixels have no fixed range and are refused.

Not covered: colour profiles (pixels are taken as sRGB), video, labels from anything but the folder's name.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..inputs import nearest

TEST_FRACTION = 0.25  # of data sets that come without a split of their own
TEST_NAMES = ("test", "val", "valid", "validation")


def read_image(path: str | Path) -> Tensor:
    """Decode a whole file: uint8 [3, h, w]. ValueError naming the file if it is corrupt, huge or of floats.

    Pillow's limit on the number of pixels (Image.MAX_IMAGE_PIXELS) holds: a small file can claim to be huge.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = np.array(_rgb(_upright(image)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        what = f"image file {path} has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit of Pillow"
        raise ValueError(f"{what}; store it smaller") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"image file {path} cannot be read ({reason})"
        raise ValueError(f"{what}; replace it, or set on_corrupt to skip") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged camera notes; damaged pixels will be found when they are decoded
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range; save 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, or 32 bits used for 16
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def find_images(path: str | Path, split: str) -> tuple[list[Path], list[int], list[str]]:
    """Image files, their labels and the class names, in sorted order, of one split of a folder.

    path/CLASS/**/FILE, or path/train/CLASS/... beside path/test/CLASS/... (or val). In the first form
    `is_test` splits the pictures by their paths below the folder. FileNotFoundError if path is missing,
    ValueError if there is nothing to learn from; both say what was expected.
    """
    folder = existing_folder(Path(path))
    inside = {item.name: item for item in _folders(folder)}
    test = next((inside[name] for name in TEST_NAMES if name in inside), None)
    if "train" in inside and test is not None:
        files, labels, classes = _labelled(inside["train"])
        if split == "test":
            files, labels, found = _labelled(test)
            if unknown := sorted(set(found) - set(classes)):
                raise ValueError(f"class folder {test / unknown[0]} has no counterpart in {inside['train']}")
            labels = [classes.index(found[label]) for label in labels]
        return files, labels, classes
    if set(inside) == {"train"}:
        folder = inside["train"]
    files, labels, classes = _labelled(folder)
    chosen = is_test([file.relative_to(folder).as_posix() for file in files], labels)
    kept = [i for i, in_test in enumerate(chosen) if in_test == (split == "test")]
    if not kept:
        raise ValueError(f"folder {folder} has too few images for a {split} split: {len(files)} in all")
    return [files[i] for i in kept], [labels[i] for i in kept], classes


def is_test(
    keys: Sequence[str], labels: Sequence[int], fraction: float = TEST_FRACTION, least: int = 0
) -> list[bool]:
    """A fixed split: in each class the fraction of keys with the smallest hash. Equal keys share it.

    A picture's side depends on its own class only, so it stays when other classes are added or removed. At least
    `least` keys of a class are taken, but never its last one for that.
    """

    def rank(key: str) -> bytes:
        return hashlib.sha256(key.encode()).digest()

    members: dict[int, set[str]] = {}
    for key, label in zip(keys, labels, strict=True):
        members.setdefault(label, set()).add(key)
    test = {
        label: set(sorted(found, key=rank)[: max(round(fraction * len(found)), min(least, len(found) - 1))])
        for label, found in members.items()
    }
    return [key in test[label] for key, label in zip(keys, labels, strict=True)]


def existing_folder(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds the class folders")
    beside = [item.name for item in _folders(folder.parent)] if folder.parent.is_dir() else []
    near = nearest(folder.name, beside)
    hint = f"nearest: {folder.parent / near}" if near else "give an existing folder of class folders"
    raise FileNotFoundError(f"folder {folder} does not exist; {hint}")


def _labelled(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    classes = _folders(folder)
    if not classes:
        loose = _images(folder)
        state = f"holds {len(loose)} images but no class folders" if loose else "is empty"
        raise ValueError(
            f"folder {folder} {state}; expected images in class folders, {folder / 'CLASS'}/*.png"
        )
    files, labels = [], []
    for label, class_folder in enumerate(classes):
        found = _images(class_folder)
        if not found:
            raise ValueError(f"class folder {class_folder} holds no images; fill it or remove it")
        files += found
        labels += [label] * len(found)
    return files, labels, [item.name for item in classes]


def _folders(folder: Path) -> list[Path]:
    found = (item for item in folder.iterdir() if not item.name.startswith((".", "__")))
    return sorted(item for item in found if item.is_dir())


def _images(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    found = (item for item in folder.rglob("*") if item.suffix.lower() in known)
    return sorted(item for item in found if item.is_file() and not item.name.startswith("."))
