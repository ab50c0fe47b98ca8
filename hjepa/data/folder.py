"""Image files on disk: finding them in class folders, and decoding any kind of them to uint8 RGB.

Every mode that Pillow opens becomes three 8-bit channels: grey is repeated, a palette is looked up,
transparent parts show white, 16 bits are scaled to 8 (65535 is white), the rotation noted by a camera (EXIF)
is applied, and an animation gives its first frame. Float pixels have no fixed range and are refused, and so are
integers beyond 16 bits.

A file that cannot be read is an error that names it, or with on_corrupt "skip" is left out (`hjepa.data.images`).
Not covered: colour profiles (pixels are taken as sRGB), video, labels from anything but the folder's name.
"""

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import user_path
from ..inputs import UserError, nearest

TEST_FRACTION = 0.25  # of data sets that come without a split of their own
VALIDATION_FRACTION = 0.1  # of the training pictures of each class
SPLIT_WORDS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
    "validation": ("val", "valid", "validation", "validate", "validating", "dev"),
}
AFFIXES = ("images", "image", "imgs", "img", "pictures", "photos", "dataset", "data", "set", "split", "seg")
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow knows these files and shows no pixels of them
UNLABELLED = "unlabelled"  # the class of pictures that lie in no class folder
UNOPENED = {
    *(".heic", ".heif", ".avif", ".jxl", ".raw"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
}  # pictures of phones and cameras, which some installations of Pillow cannot read


def read_image(path: str | Path) -> Tensor:
    """Decode a whole file: uint8 [3, h, w]. ValueError naming the file if it is corrupt, huge or of floats.

    Pillow's limit on the number of pixels (Image.MAX_IMAGE_PIXELS) holds: a small file can claim to be huge.
    """
    check_opens(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = np.array(_rgb(_upright(image)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        what = f"image file {path} has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit of Pillow"
        raise UserError(f"{what}; store it smaller") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"image file {path} cannot be read ({reason})"
        raise UserError(f"{what}; replace it, or set on_corrupt to skip") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_opens(path: Path) -> None:
    """ValueError on a picture of a kind that this installation of Pillow cannot open, by the file's ending."""
    ending = path.suffix.lower()
    if ending in unopened():
        what = f"image file {path} cannot be read (Pillow does not open {ending} files here)"
        raise UserError(f"{what}; store it as PNG or JPEG, or set on_corrupt to skip")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged camera notes; damaged pixels will be found when they are decoded
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("float pixels have no fixed range; save 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, or 32 bits used for 16
        grey = np.asarray(image).astype(np.int64)
        low, high = int(grey.min()), int(grey.max())
        if low < 0 or high > 65535:
            raise UserError(f"pixels from {low} to {high} go beyond 16 bits, 0 to 65535; save 8 or 16 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def unopened() -> set[str]:
    """Endings of pictures that this installation of Pillow cannot open."""
    return UNOPENED - _opened()


def find_images(
    path: str | Path, split: str, stamps: dict[str, int] | None = None
) -> tuple[list[str], list[int], list[str]]:
    """Image files, their labels and the class names, in sorted order, of one split of a folder.

    Files are named by their paths below `path`, with "/". stamps: gets the folders that the result depends on, each
    with the time of its last change in ns.

    path/CLASS/**/FILE, or path/train/CLASS/... beside path/test/CLASS/... (without test: validation), the splits by
    any usual name and case. In the first form `is_test` splits the pictures by their paths below the folder.
    Pictures without class folders are of one class, UNLABELLED; those beside folders are left out with a warning.
    FileNotFoundError if path is missing, ValueError if there is nothing to learn from or folders of splits lie where
    classes should; both say what was expected.
    """
    folder = existing_folder(user_path(path))
    stamps = {} if stamps is None else stamps
    stamps.update((str(item), item.stat().st_mtime_ns) for item in (folder, *_folders(folder)))
    splits = _split_folders(folder)
    train, test = splits.get("train"), splits.get("test") or splits.get("validation")
    if train is not None:
        _warn_of_loose(folder, "folders of splits")
    if train is not None and test is not None:
        files, labels, classes = _labelled(train, stamps)
        if split == "test":
            files, labels, found = _labelled(test, stamps)
            if unknown := sorted(set(found) - set(classes)):
                where = test / unknown[0] if unknown != [UNLABELLED] else test
                raise UserError(f"class folder {where} has no counterpart in {train}")
            labels = [classes.index(found[label]) for label in labels]
        return _below(test if split == "test" else train, folder, files), labels, classes
    files, labels, classes = _labelled(train or folder, stamps)
    chosen = is_test(files, labels)
    kept = [i for i, in_test in enumerate(chosen) if in_test == (split == "test")]
    if not kept or (classes == [UNLABELLED] and len(kept) == len(files)):
        raise UserError(_too_few(train or folder, len(files), classes, split))
    return _below(train or folder, folder, [files[i] for i in kept]), [labels[i] for i in kept], classes


def _below(inner: Path, folder: Path, files: list[str]) -> list[str]:
    """Paths below `inner` as paths below `folder`."""
    return files if inner == folder else [f"{inner.relative_to(folder).as_posix()}/{file}" for file in files]


def _too_few(folder: Path, count: int, classes: list[str], split: str) -> str:
    if classes == [UNLABELLED]:
        return f"folder {folder} holds {count} images but no class folders, too few for a {split} split"
    return f"folder {folder} has too few images for a {split} split: {count} in all"


def split_of(name: str) -> str:
    """Which split a folder of this name holds, train, test or validation; "" for any other name.

    "Training", "TEST_SET", "val_images", "seg_train" and "train2017" are names of splits, "trains" and "test tube" not.
    """
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in AFFIXES]
    if len(words) == 1:
        words = [re.sub(f"({'|'.join(AFFIXES)})$", "", words[0])]
    return next((split for split, names in SPLIT_WORDS.items() if len(words) == 1 and words[0] in names), "")


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of splits in `folder`, by split, or {} where its folders are classes.

    Raises:
        ValueError: some are splits and yet cannot be used as splits; names them.
    """
    inside = _folders(folder)
    named = [item for item in inside if split_of(item.name)]
    splits = {split_of(item.name): item for item in named}
    if "train" in splits and (len(splits) > 1 or len(inside) == 1):
        if len(splits) == len(named):
            return {split: _unwrapped(item, split) for split, item in splits.items()}
    elif len(named) < len(inside) and not any(_folders(item) for item in named):
        return {}  # a class that is called train, say
    if named:
        what = f"folder {folder} has folders named after splits, {', '.join(item.name for item in named)}"
        raise UserError(f"{what}, not one for training beside one for testing; name them train and test, or give "
                         "the folder of class folders")  # fmt: skip
    return {}


def _unwrapped(folder: Path, split: str) -> Path:
    """The folder, or the one of the same split that is all it holds: seg_train/seg_train/CLASS."""
    inside = _folders(folder)
    return inside[0] if len(inside) == 1 and split_of(inside[0].name) == split else folder


def is_test(
    keys: Sequence[str], labels: Sequence[int], fraction: float = TEST_FRACTION, least: int = 0
) -> list[bool]:
    """A fixed split: in each class the fraction of keys with the smallest hash. Equal keys share it.

    A picture's side depends on its own class only, so it stays when other classes are added or removed. At least
    `least` keys of a class are taken, but never its last one for that.
    """

    def rank(key: str) -> bytes:
        return hashlib.sha256(key.encode(errors="surrogateescape")).digest()  # names need not be UTF-8

    members: dict[int, set[str]] = {}
    for key, label in zip(keys, labels, strict=True):
        members.setdefault(label, set()).add(key)
    test = {
        label: set(sorted(found, key=rank)[: max(round(fraction * len(found)), min(least, len(found) - 1))])
        for label, found in members.items()
    }
    return [key in test[label] for key, label in zip(keys, labels, strict=True)]


def is_validation(keys: Sequence[str], labels: Sequence[int]) -> list[bool]:
    """Which training pictures are for validation; a class keeps at least one to train on."""
    return is_test(keys, labels, VALIDATION_FRACTION, least=1)


def existing_folder(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file; give the folder that holds the class folders")
    beside = [item.name for item in _folders(folder.parent)] if folder.parent.is_dir() else []
    near = nearest(folder.name, beside)
    hint = f"nearest: {folder.parent / near}" if near else "give an existing folder of class folders"
    raise FileNotFoundError(f"folder {folder} does not exist; {hint}")


def _labelled(folder: Path, stamps: dict[str, int]) -> tuple[list[str], list[int], list[str]]:
    classes = _folders(folder)
    if not classes:
        loose = _names(folder, stamps)
        if not loose:
            raise UserError(f"folder {folder} is empty; expected images in class folders, {folder / 'CLASS'}/*.png")
        return loose, [0] * len(loose), [UNLABELLED]
    files: list[str] = []
    labels: list[int] = []
    for label, class_folder in enumerate(classes):
        splits = [item.name for item in _folders(class_folder) if split_of(item.name)]
        if len(splits) > 1:
            what = f"class folder {class_folder} holds folders of splits, {', '.join(splits)}"
            raise UserError(f"{what}; expected {folder / 'train' / class_folder.name} beside test/{class_folder.name}")
        found = _names(class_folder, stamps)
        if not found:
            raise UserError(f"class folder {class_folder} holds no images; fill it or remove it")
        files += [f"{class_folder.name}/{name}" for name in found]
        labels += [label] * len(found)
    if len(classes) == 1 and len(inside := _folders(classes[0])) > 1 and all("/" in file for file in found):
        one = f"{classes[0].name}, with {len(inside)} folders and no image beside them"
        what = f"folder {folder} holds one class folder, {one}; if those are the classes, give {classes[0]}"
        raise UserError(f"{what} or move them up, else move the images out of them")
    _warn_of_loose(folder, "class folders")
    return files, labels, [item.name for item in classes]


def _warn_of_loose(folder: Path, beside: str) -> None:
    if loose := _names(folder, {}, deep=False):
        what = f"{len(loose)} images beside the {beside} of {folder} are left out, {loose[0]} first"
        warnings.warn(f"{what}; move them into one of the folders to use them", stacklevel=2)


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        seen = (entry for entry in entries if not entry.name.startswith((".", "__")))
        return sorted(folder / entry.name for entry in seen if _no_link(entry).is_dir())


def _no_link(entry: "os.DirEntry[str]") -> "os.DirEntry[str] | Path":
    """What answers is_dir and is_file without asking the file system, except for a link, which may be broken."""
    return Path(entry) if entry.is_symlink() else entry


def _opened() -> set[str]:
    """Endings of the files that Pillow gives pixels of."""
    known = Image.registered_extensions()
    return {ending for ending, kind in known.items() if kind in Image.OPEN and kind not in NO_PICTURES}


def known_endings() -> set[str]:
    """Endings of picture files, those too that Pillow does not open: none is left out silently."""
    return _opened() | UNOPENED


def picture_files(folder: Path) -> list[Path]:
    """Picture files below a folder, sorted."""
    return [folder / name for name in _names(folder, {})]


def _names(folder: Path, stamps: dict[str, int], deep: bool = True) -> list[str]:
    """Picture files below a folder by their paths there, sorted as `Path`s are; links to folders are not followed.

    deep: look into its folders too. stamps: as `find_images`; a folder's time is taken before its files.
    """
    known, found, waiting = known_endings(), [], [""]
    for below in waiting:  # grows meanwhile
        with contextlib.suppress(PermissionError):
            stamps.setdefault(str(folder / below), os.stat(folder / below).st_mtime_ns)
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    name = entry.name
                    if os.path.splitext(name)[1].lower() in known and name[0] != "." and _no_link(entry).is_file():
                        found.append(below + name)
                    elif deep and entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{below}{name}/")
    return sorted(found, key=lambda name: name.split("/"))
