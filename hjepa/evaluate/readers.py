"""Readers of frozen features: nearest neighbours, retrieval, linear probes. Tensors in, a hit or miss per picture out.

The idea: a reader that learns little shows what the features hold.
Sources: weighted kNN, Wu et al. 2018 (arXiv:1805.01978, section 3.4); ridge with leave-one-out in closed form, Rifkin &
Lippert 2007 (MIT-CSAIL-TR-2007-025), as scikit-learn has it; the one-standard-error rule for a penalty, Breiman et al.
1984 (Classification and Regression Trees, section 3.4.3).
Not covered: how features are made (`hjepa.evaluate.transfer`), rank, similarity and intervals
(`hjepa.evaluate.measures`).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor

from .measures import one_thread

PCA_ABOVE, PCA_DIMS = 2048, 256  # a probe reduces features wider than the first number to the second
PENALTIES = tuple(10 ** (1 - step / 2) for step in range(17))  # of the probe, strongest first: 10 to 1e-7


def knn_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Hits [Q] (bool) of a k-nearest-neighbour vote; its mean is the accuracy.

    gallery [G, D], queries [Q, D], labels int64. The gallery's mean is taken off both: what all pictures share would
    bring every cosine near 1. The k most similar gallery rows by cosine vote with weight exp(similarity / temperature).
    ValueError if k is not between 1 and G.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k={k} neighbours: a gallery of {len(gallery)} allows 1 to {len(gallery)}")
    mean = gallery.mean(dim=0)
    known, asked = F.normalize(gallery - mean, dim=1), F.normalize(queries - mean, dim=1)
    return _vote(asked @ known.T, gallery_labels, k, temperature) == query_labels


def leave_one_out_knn(features: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Hits [N] (bool) of `knn_accuracy` where each picture is asked about with all others as gallery (k at most
    N - 1): for choices made on training pictures."""
    x = F.normalize(features - features.mean(dim=0), dim=1)
    similarity = (x @ x.T).fill_diagonal_(-math.inf)
    return _vote(similarity, labels, min(k, len(x) - 1), temperature) == labels


def _vote(similarity: Tensor, gallery_labels: Tensor, k: int, temperature: float) -> Tensor:
    """The class [Q] with most weight among the k most similar, similarity [Q, G]."""
    nearest, index = similarity.topk(k, dim=1)  # [Q, k]
    weight = ((nearest - nearest[:, :1]) / temperature).exp()  # the same vote, without overflow
    votes = similarity.new_zeros(len(similarity), int(gallery_labels.max()) + 1)
    votes.scatter_add_(1, gallery_labels[index], weight)
    return votes.argmax(dim=1)


def retrieval_hits(queries: Tensor, gallery: Tensor) -> Tensor:
    """Hits [N] (bool) of same-picture retrieval: row i of `gallery` is nearest (cosine) to query i.

    Both [N, D]. ValueError if the shapes differ.
    """
    if queries.shape != gallery.shape:
        raise ValueError(f"queries {list(queries.shape)} and gallery {list(gallery.shape)} differ in shape")
    nearest = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).argmax(dim=1)
    return nearest == torch.arange(len(queries))


def linear_probe(features: Tensor, labels: Tensor) -> Pipeline:
    """Fit a linear reader with a penalty chosen on the same pictures, so that it suits the features it reads.

    features [N, D], labels int64 [N]. Rows are scaled to unit length (as nearest neighbours see them) and centred; then
    ridge regression on classes coded as -1 and 1. Of PENALTIES, in units of N times the total variance, leave-one-out
    accuracy, which one factorisation gives for all of them, takes the strongest within one standard error of the best.
    A weaker one leans on quiet channels: no better on pictures like those fitted on, and the first to fail on others,
    such as other sizes. For the same reason channels are not divided by their deviation: on training photographs
    (thumbnails, random init) that changed leave-one-out accuracy by less than half a point.

    Features wider than 2048 (raw pixels) are projected on their first 256 principal components, which bounds the
    time. ValueError if all labels are the same.
    """
    if len(labels.unique()) < 2:
        raise ValueError(f"a probe needs at least 2 classes; all {len(labels)} labels are {int(labels[0])}")
    scaling = make_pipeline(Normalizer(), StandardScaler(with_std=False), *_projection(features))
    y = labels.numpy()
    with one_thread():
        x = scaling.fit_transform(features.numpy()).astype(np.float64)
        scale = len(x) * max(float(x.var(axis=0).sum()), 1e-12)
        penalties = [scale * penalty for penalty in PENALTIES]
        search = RidgeClassifierCV(penalties, scoring="accuracy", store_cv_results=True)
        right = _predicted(search.fit(x, y)) == y[:, None]  # [N, penalties]
        reader = RidgeClassifier(penalties[_within_one_error(right)]).fit(x, y)
    return make_pipeline(scaling, reader)


def _predicted(search: RidgeClassifierCV) -> np.ndarray:
    """The class of each row by a reader fitted on all other rows, for each penalty: [N, penalties]."""
    scores = search.cv_results_  # [N, classes or 1, penalties]
    return search.classes_[scores.argmax(axis=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).astype(int)]


def _within_one_error(right: np.ndarray) -> int:
    """Index of the first, strongest, penalty whose share of hits is at most one standard error below the best.

    right [N, penalties], bool.
    """
    share = right.mean(axis=0)
    best = share.max()
    return int(np.argmax(share >= best - math.sqrt(best * (1 - best) / len(right))))


def _projection(features: Tensor) -> list[PCA]:
    if features.shape[1] <= PCA_ABOVE:
        return []
    return [PCA(min(PCA_DIMS, len(features)), svd_solver="randomized", iterated_power=2, random_state=0)]


def probe_hits(probe: Pipeline, features: Tensor, labels: Tensor) -> Tensor:
    """Hits [N] (bool) of a fitted probe on features [N, D]."""
    return torch.from_numpy(probe.predict(features.numpy()) == labels.numpy())
