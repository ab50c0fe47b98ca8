"""Measures of frozen features without labels, and intervals: effective rank, spread, CKA, bootstrap, jackknife.

Rank, spread and similarity show collapse and drift without any label.
Sources: effective rank, Roy & Vetterli 2007 (EUSIPCO); linear CKA, Kornblith et al. 2019 (arXiv:1905.00414, section
3); grouped jackknife, Efron & Tibshirani 1993 (chapter 11).
Not covered: unbiased CKA.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

Interval = tuple[float, float, float]  # value, low, high


@contextmanager
def one_thread() -> Iterator[None]:
    """Small linear algebra on one thread: more only wait for each other, for minutes if the machine is busy."""
    before = torch.get_num_threads()
    with threadpool_limits(limits=1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [N], ascending, and eigenvectors, as columns, of a symmetric matrix [N, N].

    As torch.linalg.eigh, whose divide and conquer can fail on a matrix of low rank (with MKL on one thread, one in ten
    of rank 6 in 216 dimensions: the colour counts of grey pictures); there by LAPACK's QR iteration, on the CPU.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        found = scipy.linalg.eigh(matrix.cpu().numpy(), driver="ev")
        values, vectors = (torch.from_numpy(part).to(matrix.device) for part in found)
    return values, vectors


# ---- collapse and similarity


def effective_rank(features: Tensor) -> float:
    """Number of directions the features [N, D] really use: exp of the entropy of their singular values.

    The features are centred, the singular values divided by their sum (Roy & Vetterli 2007). k orthogonal
    directions of equal strength give k. Features that are all equal (spread below 1e-6 of their size) give 0.
    """
    x = features.double()
    centred = x - x.mean(dim=0)
    if centred.norm() <= 1e-6 * x.norm():
        return 0.0
    gram = centred.T @ centred if x.shape[1] <= x.shape[0] else centred @ centred.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum()
    return float(torch.special.entr(p).sum().exp())


def feature_std(features: Tensor) -> float:
    """Mean over channels of the standard deviation over pictures, of L2-normalised features [N, D].

    0 when all pictures look alike to the encoder, at most about 1 / sqrt(D).
    """
    return float(F.normalize(features.double(), dim=1).std(dim=0).mean())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of x [N, D] and y [N, E]: 1 if they agree up to rotation and scale.

    The estimate has a positive bias of order D / N: compare values of the same N and widths only.
    """
    if len(x) != len(y):
        raise ValueError(f"CKA compares the same pictures in the same order; got {len(x)} and {len(y)} rows")
    x, y = x.double() - x.double().mean(dim=0), y.double() - y.double().mean(dim=0)
    scale = float((x.T @ x).norm() * (y.T @ y).norm())
    return float((y.T @ x).norm() ** 2) / scale if scale > 0 else 0.0


# ---- intervals


def bootstrap_interval(
    hits: Tensor, n: int = 1000, seed: int = 0, level: float = 0.95, groups: Tensor | None = None
) -> Interval:
    """Mean of hits [Q] with a percentile bootstrap interval over the queries.

    It covers the choice of test pictures, not the training seed (see `hjepa.evaluate.summarise`). If every
    query hits, or every one misses, the interval has no width. groups [Q]: queries of equal number, such as placements
    of one picture, are drawn together.
    """
    values = hits.double().numpy()
    group = np.arange(len(values)) if groups is None else np.unique(groups.numpy(), return_inverse=True)[1]
    total, count = np.bincount(group, values), np.bincount(group)
    draws = np.random.default_rng(seed).integers(len(total), size=(n, len(total)))
    means = total[draws].sum(axis=1) / count[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def jackknife_interval(
    statistic: Callable[[Tensor], float], n: int, groups: int = 10, seed: int = 0, pictures: Tensor | None = None
) -> Interval:
    """Value and 95 % interval of a statistic of n rows that is no mean; `statistic` takes row indices.

    Each of the groups is left out in turn; Student's t with groups - 1 degrees of freedom. (Resampling with repetition
    would lower an effective rank.) pictures [n]: rows of equal number, such as placements of one picture, are left out
    together. Fewer than three pictures have no interval, a single row has no value either: nan.
    """
    own = torch.arange(n) if pictures is None else pictures.unique(return_inverse=True)[1]
    count = int(own.max()) + 1 if n else 0
    value = statistic(torch.arange(n)) if n > 1 else math.nan
    if count < 3:
        return value, math.nan, math.nan
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.chunk(min(groups, count))
    if pictures is not None:
        parts = tuple(torch.isin(own, part).nonzero()[:, 0] for part in parts)
    left_out = torch.tensor([statistic(torch.cat(parts[:g] + parts[g + 1 :])) for g in range(len(parts))])
    error = math.sqrt((len(parts) - 1) * float(left_out.var(correction=0)))
    half = float(stdtrit(len(parts) - 1, 0.975)) * error
    return value, value - half, value + half
