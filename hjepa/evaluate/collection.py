"""A folder of one's own pictures, labelled or not -> frozen features: for maps, neighbours, or readers of one's own.

    features, files, labels = folder_features(encoder, "my_pictures")

Pictures lie anywhere below the folder. Each is cut to the centre square and resized (antialiased) to the encoder's
training size, or to another. The label is the name of the first folder on the way to the file, "" where there is none.

Not covered: splits (`hjepa.data.load_data` has them), features larger than memory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.folder import existing_folder, picture_files, read_image
from ..data.images import IMAGENET, RGB, normalised
from ..data.loading import loaded
from ..data.sources import fit
from ..files import user_path
from ..inputs import UserError, size_pair
from .readers import check_finite
from .transfer import EncoderLike, encode, module_of


def folder_features(
    encoder: EncoderLike,
    folder: str | Path,
    size: Any = None,
    *,
    mean: RGB | None = None,
    std: RGB | None = None,
    skip: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[Tensor, list[Path], list[str]]:
    """Features `[N, D]` of every picture below `folder`, with the files and their labels, sorted by path.

    Args:
        encoder: as `encode` takes them; one of ours, or a `PublishedEncoder`.
        folder: any depth of folders.
        size: image size in pixels, a side or (height, width); None: the size that the encoder was trained at.
        mean, std: of the pixels in the encoder's training, white = 1; None: those that it knows (`pixel_mean` and
            `pixel_std` of one loaded from a run or an export), or else ImageNet's.
        skip: leave out files that cannot be read; they are missing in the list of files.
        batch_size: pictures encoded at a time.
        workers: loader processes that decode, each two batches ahead; no number depends on it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pictures in it, a file that cannot be read, a size that the encoder does not take.
    """
    height, width = size_pair(_own_size(module_of(encoder)) if size is None else size)
    mean = mean or getattr(module_of(encoder), "pixel_mean", None) or IMAGENET[0]
    std = std or getattr(module_of(encoder), "pixel_std", None) or IMAGENET[1]
    root = existing_folder(user_path(folder))
    parts, kept = [], []
    found = picture_files(root)
    chunks = [found[start : start + batch_size] for start in range(0, len(found), batch_size)]
    for files, pictures in loaded(_Files(height, width, skip), chunks, min(workers, len(chunks))):
        if files:
            kept += files
            parts.append(encode(encoder, normalised(pictures, mean, std), batch_size=batch_size))
    if not parts:
        raise UserError(f"folder {root} holds no pictures to read: {len(found)} files have a picture's ending")
    below = [file.relative_to(root).parts for file in kept]
    return torch.cat(parts), kept, [parts[0] if len(parts) > 1 else "" for parts in below]


def _own_size(encoder: Any) -> Any:
    if hasattr(encoder, "input_size"):
        return encoder.input_size
    return tuple(side * encoder.patch_size for side in encoder.grid_size)


class _Files(Dataset):
    """By lists of files: those that can be read, and their pictures, uint8 `[n, 3, height, width]`."""

    def __init__(self, height: int, width: int, skip: bool) -> None:
        self.height, self.width, self.skip = height, width, skip

    def __getitem__(self, files: Sequence[Path]) -> tuple[list[Path], Tensor]:
        kept, pictures = [], []
        for file in files:
            try:
                pictures.append(fit(read_image(file), self.height, self.width, fill=None))
            except ValueError:
                if not self.skip:
                    raise
            else:
                kept.append(file)
        return kept, torch.stack(pictures) if pictures else torch.empty(0)


def neighbours(features: Tensor, k: int = 5) -> np.ndarray:
    """Places `[N, k]` of each picture's nearest others, nearest first: cosine of centred features, as in kNN.

    ValueError if a feature is not finite.
    """
    check_finite("features", features)
    x = torch.nn.functional.normalize(features.double() - features.double().mean(0), dim=1)
    near = (x @ x.T).fill_diagonal_(-2)
    return near.topk(min(k, len(x) - 1), dim=1).indices.numpy()
