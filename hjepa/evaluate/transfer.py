"""What a frozen encoder knows, and what is left of it at image sizes it was not trained on.

The idea: encode pictures without training anything, then ask simple readers about the features. A reader
fitted at the training size and used at another size measures resolution transfer; a reader refitted at that
size measures what the features still hold. Baselines (raw pixels, an untrained encoder) go the same way.

Readers are in `readers.py`, measures in `measures.py`, rows of results in `results.py`.
Not covered: fine-tuning; what single patches know (`dense.py`).
"""

import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.loading import batches
from ..inputs import UserError, nearest, patch_grid, size_pair, size_text
from .measures import (
    Interval,
    bootstrap_interval,
    effective_rank,
    feature_std,
    jackknife_interval,
    linear_cka,
    one_thread,
    symmetric_eigen,
)
from .processes import agreed, gathered, is_first, share
from .readers import Probe, knn_accuracy, linear_probe, probe_hits, retrieval_hits
from .shown import shown_of, subset

# images [B, 3, h, w] -> tokens [B, prefix + N, D] or features [B, D]
EncoderLike = Callable[[Tensor], Tensor]
Size = int | tuple[int, int]  # pixels; a pair is (height, width)
POOLS = ("mean", "pyramid")
DRAWS = 5  # of a few training pictures


class Pictures(Protocol):
    """The part of `hjepa.data.ImageData` that evaluation needs."""

    labels: Tensor  # [N] int64

    def __len__(self) -> int: ...

    def at_size(self, size: Size, indices: Any = None) -> Tensor: ...  # [N, 3, h, w] float32, normalised


def device_named(name: str) -> torch.device:
    """ "cpu", "cuda", "cuda:1", ..; "auto" is cuda where there is one. ValueError on a device that is not here.

    Under torchrun "cuda" is the process's own, cuda:LOCAL_RANK; more processes than GPUs share them in turn.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in ("auto", *here):
        near = nearest(name, here) or "auto"
        raise UserError(f"device {name!r} is not here; choose one of auto, {', '.join(here)}; nearest: {near}")
    name = ("cuda" if gpus else "cpu") if name == "auto" else name
    own = name == "cuda" and "LOCAL_RANK" in os.environ
    return torch.device(f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}" if own else name)


# ---- features


def pool_tokens(tokens: Tensor, grid_size: tuple[int, int], pool: str = "mean") -> Tensor:
    """Patch tokens [B, H*W, D] without prefix -> features [B, D] ("mean") or [B, 5 D] ("pyramid").

    "pyramid" joins the mean over the grid and the means over its four quarters (2x2 adaptive average
    pooling), so the width does not depend on the grid. ValueError on another name, or if the tokens do not
    fill the grid.
    """
    if pool not in POOLS:
        raise UserError(f"pool {pool!r} is not known; choose one of {', '.join(POOLS)}")
    if tokens.shape[1] != grid_size[0] * grid_size[1]:
        raise UserError(f"{tokens.shape[1]} patch tokens do not fill a {grid_size[0]}x{grid_size[1]} grid")
    if pool == "mean":
        return tokens.mean(dim=1)
    maps = tokens.transpose(1, 2).unflatten(2, grid_size)  # [B, D, H, W]
    return torch.cat([F.adaptive_avg_pool2d(maps, cells).flatten(1) for cells in (1, 2)], dim=1)


def encode(encoder: EncoderLike, images: Tensor, *, pool: str | None = "mean", batch_size: int = 256) -> Tensor:
    """Images [N, 3, h, w] -> frozen features [N, D'] float32 on the CPU, in eval mode, without gradient.

    An encoder that returns tokens [B, prefix + N, D] must carry `num_prefix_tokens` and `patch_size`; its
    prefix tokens are dropped and the patch tokens pooled (`pool_tokens`; pool None keeps them: [N, H*W, D]).
    One that returns [B, D] is taken as
    it is. The encoder's train/eval mode is restored. ValueError on images that are not floats, a side that is no
    multiple of the patch, or features that are not finite.
    """
    if not images.is_floating_point():
        raise UserError(f"images are {images.dtype}, and encoders take normalised floats; nearest: ImageData.at_size")
    module = module_of(encoder)
    was_training = isinstance(module, nn.Module) and module.training
    weight = next(iter(module.parameters()), None) if isinstance(module, nn.Module) else None
    where: Any = images if weight is None or not weight.is_floating_point() else weight  # device and dtype
    patch = getattr(encoder, "patch_size", None)
    grid = None if patch is None else patch_grid(tuple(images.shape[-2:]), patch)
    if isinstance(module, nn.Module):
        module.eval()
    try:
        with torch.no_grad():
            given = (batch.to(where.device, where.dtype) for batch in images.split(batch_size))
            parts = [_features(encoder, batch, grid, pool) for batch in given]
    finally:
        if isinstance(module, nn.Module):
            module.train(was_training)
    features = torch.cat(parts)
    if not torch.isfinite(features).all():
        raise UserError(
            f"features at {images.shape[-2]}x{images.shape[-1]} px are not all finite; did training diverge?"
        )
    return features


def module_of(encoder: EncoderLike) -> Any:
    """What holds the weights: of a view the encoder itself."""
    return encoder.encoder if isinstance(encoder, StrategyView) else encoder


def _features(encoder: EncoderLike, images: Tensor, grid: tuple[int, int] | None, pool: str | None) -> Tensor:
    out = encoder(images)
    if out.ndim == 3:
        if grid is None:
            raise UserError("an encoder that returns tokens needs patch_size; add it, or pool the tokens to [B, D]")
        patches = out[:, getattr(encoder, "num_prefix_tokens", 0) :]
        out = patches if pool is None else pool_tokens(patches, grid, pool)
    return out.float().cpu()


class StrategyView:
    """The same encoder read with another strategy: sets that of `encoder.rope` and `encoder.alibi` during each call.

    The old one is restored also when the call fails, so one set of weights can appear under several names. ValueError
    if the encoder has neither.
    """

    def __init__(self, encoder: Any, strategy: str):
        parts = (getattr(encoder, name, None) for name in ("rope", "alibi"))
        self.relative = [part for part in parts if part is not None]
        if not self.relative:
            raise UserError(f"strategy {strategy!r} needs an encoder with RoPE or ALiBi; this one has neither")
        self.encoder, self.strategy = encoder, strategy
        self.patch_size, self.num_prefix_tokens = encoder.patch_size, encoder.num_prefix_tokens

    def __call__(self, images: Tensor) -> Tensor:
        before = [part.strategy for part in self.relative]
        try:
            for part in self.relative:
                part.strategy = self.strategy
            return self.encoder(images)
        finally:
            for part, own in zip(self.relative, before, strict=True):
                part.strategy = own


def with_strategy(encoder: Any, strategy: str) -> StrategyView:
    """For example `{"rope": encoder, "interpolated": with_strategy(encoder, "interpolate")}`."""
    return StrategyView(encoder, strategy)


def raw_pixels(size: Size) -> EncoderLike:
    """Baseline without an encoder: images resized to `size` (bilinear, antialiased) and flattened."""
    target = size_pair(size)

    return lambda images: resized(images, target).flatten(1)


def resized(images: Tensor, target: tuple[int, int]) -> Tensor:
    """Images [B, 3, h, w] at `target` (height, width), bilinear, antialiased; as they are if they have that size."""
    if tuple(images.shape[-2:]) == target:
        return images
    return F.interpolate(images, target, mode="bilinear", antialias=True)


# ---- resolution transfer


def resolution_transfer(
    encoders: Mapping[str, EncoderLike],
    train: Pictures,
    test: Pictures,
    *,
    train_size: Size,
    sizes: Sequence[Size],
    gallery: int | None = None,
    queries: int | None = None,
    few: int | None = None,
    knn_k: int = 20,
    pool: str = "mean",
    refit: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    tags: Mapping[str, Any] | None = None,
    hits: dict[tuple[str, tuple[int, int], str], Tensor] | None = None,
    progress: bool = False,
    device: torch.device | None = None,
    workers: int = 0,
    kept: MutableMapping[str, list[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """Read every encoder at every size; rows with encoder, size (h, w), metric, value, low, high, n.

    Metrics, all on the `test` pictures at that size (n of them; 95 % intervals over pictures). Of moved pictures in
    several placements each all are read, for all encoders the same, and the rows have their number as `placements`:
    accuracies are means over them, and intervals take all placements of a picture together.
    probe, knn            fitted on `train` pictures at train_size
    probe_few             fitted on `few` of those, of two classes or more, DRAWS times; a picture counts by its share
    probe_refit           fitted on `train` pictures at that size (left out with refit=False)
    probe_centred, knn_centred: the same around the mean of `train` pictures at that size, without labels (likewise)
    retrieval, cka        against the same test pictures at train_size; retrieval among those of one placement
    effective_rank, feature_std
    gallery, queries: seeded subsets of train and test (None: all). knn_k is bounded by the gallery.
    train_size is read even if not in `sizes`. Pictures of one class have no probe and no kNN.
    device: where encoders are moved to, and readers run; None leaves encoders where they are and reads on the CPU.
    workers: loader processes that decode pictures of files (`hjepa.data.loading`); no number depends on it.
    kept: rows by size ("64x96") of an earlier call, to which each size is added once it is read. Sizes in it are not
    read again, nor are their hits given; train_size is, where another is left, since readers are fitted there.
    tags (for example seed and data set) are added to every row. hits receives, by (encoder, size, metric), which test
    pictures were read rightly: bool [n], of probe_few float; of several placements [placements * n], the first of all
    pictures first. ValueError, before any work, on a size that
    is no multiple of an encoder's patch, or on `few` that are fewer than two or more than the gallery.

    Where torch.distributed is initialised all processes must call this, with the same arguments. Each encodes a share
    of the batches; the first process reads them, alone uses `kept` (what the others hand in is not looked at) and
    `hits`, shows progress, and returns the rows of one process. The others return [].
    """
    home = size_pair(train_size)
    asked = list(dict.fromkeys([home, *map(size_pair, sizes)]))
    for encoder in encoders.values():
        patch = getattr(encoder, "patch_size", None)
        for size in asked if patch is not None else []:
            patch_grid(size, patch)
        if device is not None and isinstance(module_of(encoder), nn.Module):
            module_of(encoder).to(device)
    train_index, shown = subset(len(train), gallery, seed), shown_of(test, queries, seed)
    test_index = shown.index
    y_train, y_test = train.labels[train_index].to(device), test.labels[test_index].to(device)
    labelled = len(y_train.unique()) > 1  # of one class there is nothing to tell apart
    k = min(knn_k, len(train_index))
    fitted: dict[str, tuple[Any, Tensor, Tensor]] = {}  # name -> probe, train and test features
    if labelled and few is not None and not 2 <= few <= len(train_index):
        most = len(train_index)
        raise UserError(f"few={few} pictures (evaluate.few of a config): a gallery of {most} allows 2 to {most}")
    labels = train.labels[train_index]
    draws = [_few_of(labels, few, seed + draw) for draw in range(DRAWS)] if few and labelled else []
    on_few: dict[str, list[Probe]] = {}
    kept = {} if kept is None else kept
    left = [size for size in asked if size_text(size) not in kept]
    left = agreed(list(dict.fromkeys([home, *left])) if left else [])
    first = is_first()
    fits = [size for size in left if refit or size == home]
    total = len(left) * len(test_index) + len(fits) * len(train_index)
    bar = tqdm(total=total, desc="pictures", disable=not (progress and first))
    for size in left:
        rows: list[dict[str, Any]] = []
        show = partial(
            _encode_all, encoders, size=size, pool=pool, batch_size=batch_size, device=device, workers=workers, bar=bar
        )
        seen = show(test, index=test_index)
        known = show(train, index=train_index) if size in fits else {}
        for name, x in seen.items():
            here: Any = linear_probe(known[name], y_train) if name in known and labelled else None
            if size == home:
                fitted[name] = (here, known[name], x)
                on_few[name] = [linear_probe(known[name][draw], y_train[draw]) for draw in draws]
            probe, x_train, x_home = fitted[name]
            right = {"retrieval": retrieval_hits(x, x_home, shown.turn.to(x.device))}
            if labelled:
                right = {
                    "probe": probe_hits(probe, x, y_test),
                    "knn": knn_accuracy(x_train, y_train, x, y_test, k),
                    **right,
                }
                if refit:
                    moved = x + (x_train.mean(dim=0) - known[name].mean(dim=0))
                    near = right["knn"] if size == home else knn_accuracy(x_train, y_train, moved, y_test, k)
                    right |= {
                        "probe_refit": probe_hits(here, x, y_test),
                        "probe_centred": probe_hits(probe.centred_on(known[name]), x, y_test),
                        "knn_centred": near,
                    }
                if draws:
                    shares_few = [probe_hits(reader, x, y_test).double() for reader in on_few[name]]
                    right["probe_few"] = torch.stack(shares_few).mean(0)
            right = {metric: each.cpu() for metric, each in right.items()}
            if hits is not None:
                hits |= {(name, size, metric): each for metric, each in right.items()}
            shares = {m: bootstrap_interval(each, seed=seed, groups=shown.picture) for m, each in right.items()}
            found = shares | _geometry(x, x_home, seed, shown.picture if shown.placements > 1 else None)
            base = {**(tags or {}), "encoder": name, "size": size}
            rows += shown.rows(base, found)
        if first:
            kept[size_text(size)] = rows
    bar.close()
    return [row for size in asked for row in kept[size_text(size)]] if first else []


def _few_of(labels: Tensor, count: int, seed: int) -> Tensor:
    """As `subset`, of pictures with labels [N]; where all drawn are of one class, the next of another takes the place
    of the last."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn, others = order[:count], order[labels[order] != labels[order[0]]]
    if len(labels[drawn].unique()) == 1:
        drawn = torch.cat([drawn[:-1], others[:1]])
    return drawn.sort().values


def _encode_all(
    encoders: Mapping[str, EncoderLike],
    data: Pictures,
    size: tuple[int, int],
    index: Tensor,
    pool: str,
    batch_size: int,
    device: torch.device | None,
    workers: int,
    bar: tqdm,
) -> dict[str, Tensor]:
    """Each picture is drawn once per size and shown to every encoder; only one batch is held in memory.

    Of several processes each draws its share, and the first one gets the features of all; the others get {}.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    own = share(index.split(batch_size))
    for chunk, images in zip(own, batches(data, size, own, workers), strict=True):
        for name, encoder in encoders.items():
            parts[name].append(encode(encoder, images, pool=pool, batch_size=batch_size))
        bar.update(len(chunk))
    everything = {name: torch.cat(part).to(device) for name, part in gathered(parts).items()}
    bar.update(len(index) - sum(map(len, own)))
    return everything


def _geometry(x: Tensor, x_home: Tensor, seed: int, pictures: Tensor | None) -> dict[str, Interval]:
    interval = partial(jackknife_interval, n=len(x), seed=seed, pictures=pictures)
    with one_thread():
        narrow, narrow_home = _narrow(x), _narrow(x_home)
        return {
            "effective_rank": interval(lambda i: effective_rank(narrow[i])),
            "feature_std": interval(lambda i: feature_std(x[i])),  # a rotation changes it
            "cka": interval(lambda i: linear_cka(narrow[i], narrow_home[i])),
        }


def _narrow(x: Tensor) -> Tensor:
    """Features wider than their number, [N, D > N] -> [N, N] with the same inner products, rank and CKA."""
    if x.shape[1] <= len(x):
        return x
    values, vectors = symmetric_eigen(x.double() @ x.double().T)
    return vectors * values.clamp(min=0).sqrt()
