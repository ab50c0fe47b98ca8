"""Dense readings without labels: what patch tokens know of their place, at sizes that an encoder was not trained on.

Two questions about frozen patch tokens, with places in picture coordinates (0 at one border, 1 at the other):
match   does a patch of a picture at another size find its own place in the same picture at the training size? The
        nearest training-size token by cosine is looked up; a hit within k patches when its centre is at most
        k + 1/2 training patches away in row and column (so that a centre on a border counts for both neighbours).
place   how well does one linear layer, fitted at the training size, read (row, column) from a token? R^2 at each size.
Beside the encoders stands "chance", a token drawn blindly; its R^2 is 0. `RawPatches` is the baseline of the pixels.
Source of the first: correspondence by nearest neighbours, as Amir et al. 2021 (arXiv:2112.05814) ask of ViT tokens.
Not covered: segmentation, and matches between different pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from torch import Tensor

from ..data.loading import at_size
from ..inputs import UserError, patch_grid, size_pair, size_text
from .measures import bootstrap_interval, one_thread
from .readers import PENALTIES
from .shown import Shown, shown_of, subset
from .transfer import EncoderLike, Pictures, Size, encode

WITHIN = (0, 1, 2)  # patches of the training grid


class RawPatches:
    """Baseline without an encoder: the pixels of each patch as its token, [B, H*W, 3 * patch^2]."""

    num_prefix_tokens = 0

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def __call__(self, images: Tensor) -> Tensor:
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)


def with_pixels(encoders: Mapping[str, EncoderLike]) -> dict[str, EncoderLike]:
    """Those of the encoders that have patches, and "raw pixels": `RawPatches` of the same side as the last one's."""
    patched = {name: encoder for name, encoder in encoders.items() if hasattr(encoder, "patch_size")}
    return patched | {"raw pixels": RawPatches(next(reversed(patched.values())).patch_size)}  # type: ignore[attr-defined]


def centres(grid_size: tuple[int, int]) -> Tensor:
    """Centres of the patches of a grid in picture coordinates, row-major: [H*W, 2], (row, column) in 0..1."""
    rows, columns = ((torch.arange(count) + 0.5) / count for count in grid_size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def patches_apart(grid_size: tuple[int, int], home_grid: tuple[int, int]) -> Tensor:
    """Distance of each patch of a grid to each of the training grid, in training patches: [H*W, home H*W].

    The larger of the distances in rows and in columns.
    """
    offset = (centres(grid_size)[:, None] - centres(home_grid)).abs()
    return (offset * torch.tensor(home_grid)).amax(dim=-1)


def matched(tokens: Tensor, home: Tensor, apart: Tensor) -> Tensor:
    """How far from its own place each token finds its nearest: [B, N], in training patches.

    tokens [B, N, D]; home [B, M, D], the same pictures at the training size; apart [N, M] from `patches_apart`.
    """
    nearest = (F.normalize(tokens, dim=-1) @ F.normalize(home, dim=-1).transpose(1, 2)).argmax(dim=-1)
    return apart.expand(len(tokens), -1, -1).gather(2, nearest[..., None]).squeeze(2)


def place_reader(tokens: Tensor, grid_size: tuple[int, int]) -> RidgeCV:
    """Ridge from patch tokens [B, N, D] to (row, column); the penalty by leave-one-out, as readers choose it."""
    x = tokens.flatten(0, 1).double().numpy()
    y = centres(grid_size).repeat(len(tokens), 1).double().numpy()
    scale = len(x) * max(float(x.var(axis=0).sum()), 1e-12)
    with one_thread():
        return RidgeCV([scale * penalty for penalty in PENALTIES]).fit(x, y)


def place_r2(reader: RidgeCV, tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """R^2 of (row, column) read from tokens [B, N, D], for each picture: [B]; its mean is that of all pictures."""
    truth = centres(grid_size).double()
    guess = torch.from_numpy(reader.predict(tokens.flatten(0, 1).double().numpy())).unflatten(0, tokens.shape[:2])
    spread = (truth - truth.mean(dim=0)).square().sum(dim=0)  # of rows and of columns
    return (1 - (guess - truth).square().sum(dim=1) / spread).mean(dim=1)


def dense_transfer(
    encoders: Mapping[str, EncoderLike],
    train: Pictures,
    test: Pictures,
    *,
    train_size: Size,
    sizes: Sequence[Size],
    gallery: int | None = 300,
    queries: int | None = 200,
    batch_size: int = 64,
    seed: int = 0,
    tags: Mapping[str, Any] | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Rows as `resolution_transfer` gives them, with metrics match_0, match_1, match_2 and, on two rows and columns of
    patches or more, place.

    encoders return patch tokens and carry patch_size (`RawPatches` does). gallery: training pictures that the place
    reader is fitted on; queries: test pictures. Intervals are over pictures, all placements of one together. The rows
    of encoder "chance" hold for the patch of all encoders. ValueError on an encoder without patches, patches of several
    sides, or a size that is no multiple of them. workers: as in `resolution_transfer`.
    """
    check_patches(encoders)
    home = size_pair(train_size)
    asked = list(dict.fromkeys([home, *map(size_pair, sizes)]))
    grids = {name: _grids(encoder, [home, *asked]) for name, encoder in encoders.items()}
    known, shown = subset(len(train), gallery, seed), shown_of(test, queries, seed)

    def tokens_of(data: Pictures, size: tuple[int, int], index: Tensor) -> dict[str, Tensor]:
        images = at_size(data, size, index, workers)
        return {name: encode(e, images, pool=None, batch_size=batch_size) for name, e in encoders.items()}

    readers = {name: place_reader(x, grids[name][home]) for name, x in tokens_of(train, home, known).items()}
    at_home = tokens_of(test, home, shown.index)
    rows: list[dict[str, Any]] = []
    for size in asked:
        for name, tokens in (at_home if size == home else tokens_of(test, size, shown.index)).items():
            apart = matched(tokens, at_home[name], patches_apart(grids[name][size], grids[name][home]))
            found = {f"match_{k}": _share(apart, k, 1) for k in WITHIN}
            if min(grids[name][size]) > 1:  # in a single row or column there is nothing to tell apart
                found["place"] = place_r2(readers[name], tokens, grids[name][size])
            rows += _rows(shown, {**(tags or {}), "encoder": name, "size": size}, found, seed)
        first = next(iter(grids.values()))
        blind = patches_apart(first[size], first[home])
        chance = {f"match_{k}": _share(blind, k, (0, 1)).expand(len(shown.index)) for k in WITHIN}
        rows += _rows(shown, {**(tags or {}), "encoder": "chance", "size": size}, chance, seed)
    return rows


def check_patches(encoders: Mapping[str, EncoderLike]) -> None:
    """ValueError unless all have patches, of one side: the baselines beside them have one."""
    shared: tuple[str, tuple[int, int]] | None = None
    for name, encoder in encoders.items():
        patch = getattr(encoder, "patch_size", None)
        if patch is None:
            raise ValueError(f"encoder {name!r} has no patch_size, so no patches to read; leave it out")
        first, side = shared = shared or (name, size_pair(patch))
        if size_pair(patch) != side:
            what = f"encoder {name!r} has patches of {size_text(patch)} px, {first!r} of {size_text(side)} px"
            raise UserError(f"{what}: single patches are read of one side; read them one by one")


def _grids(encoder: Any, sizes: Sequence[tuple[int, int]]) -> dict[Any, tuple[int, int]]:
    return {size: patch_grid(size, encoder.patch_size) for size in sizes}


def _share(apart: Tensor, k: int, dim: int | tuple[int, ...]) -> Tensor:
    return (apart <= k + 0.5 + 1e-4).double().mean(dim=dim)


def _rows(shown: Shown, base: Mapping[str, Any], found: Mapping[str, Tensor], seed: int) -> list[dict[str, Any]]:
    return shown.rows(base, {m: bootstrap_interval(v, seed=seed, groups=shown.picture) for m, v in found.items()})
