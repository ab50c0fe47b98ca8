"""Readers of frozen features: nearest neighbours, retrieval, linear probes. Tensors in, a hit or miss per picture out.

The idea: a reader that learns little shows what the features hold.
Sources: weighted kNN, Wu et al. 2018 (arXiv:1805.01978, section 3.4); the one-standard-error rule for a penalty,
Breiman et al. 1984 (Classification and Regression Trees, section 3.4.3).
Not covered: how features are made (`hjepa.evaluate.transfer`), rank, similarity and intervals
(`hjepa.evaluate.measures`).
"""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor

from .measures import one_thread

PCA_ABOVE, PCA_DIMS = 1024, 256  # a probe reduces features wider than the first number to the second
PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)  # of the probe, strongest first, times the features' total variance


def knn_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 10,
    temperature: float = 0.07,
) -> Tensor:
    """Hits [Q] (bool) of a k-nearest-neighbour vote; its mean is the accuracy.

    gallery [G, D], queries [Q, D], labels int64. The k most similar gallery rows by cosine vote with weight
    exp(similarity / temperature). ValueError if k is not between 1 and G.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k={k} neighbours: a gallery of {len(gallery)} allows 1 to {len(gallery)}")
    similarity, index = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).topk(k, dim=1)  # [Q, k]
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # the same vote, without overflow
    votes = torch.zeros(len(queries), int(gallery_labels.max()) + 1)
    votes.scatter_add_(1, gallery_labels[index], weight)
    return votes.argmax(dim=1) == query_labels


def retrieval_hits(queries: Tensor, gallery: Tensor) -> Tensor:
    """Hits [N] (bool) of same-picture retrieval: row i of `gallery` is nearest (cosine) to query i.

    Both [N, D]. ValueError if the shapes differ.
    """
    if queries.shape != gallery.shape:
        raise ValueError(f"queries {list(queries.shape)} and gallery {list(gallery.shape)} differ in shape")
    nearest = (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).argmax(dim=1)
    return nearest == torch.arange(len(queries))


def linear_probe(features: Tensor, labels: Tensor, *, max_iter: int = 500) -> Pipeline:
    """Fit a linear reader with a penalty chosen on the same pictures, so that it suits the features it reads.

    features [N, D], labels int64 [N]. Rows are scaled to unit length (as nearest neighbours see them) and centred;
    then logistic regression (lbfgs). Of the penalties PENALTIES, in units of the total variance, five-fold
    cross-validation takes the strongest that is within one standard error of the best. A weaker one leans on quiet
    channels: no better on pictures like those fitted on, and the first to fail on others, such as other sizes.

    Features wider than 1024 (raw pixels) are projected on their first 256 principal components, which bounds the
    time. A fit that stops at max_iter is used as it is. ValueError if all labels are the same.
    """
    scaling = make_pipeline(Normalizer(), StandardScaler(with_std=False), *_projection(features))
    folds = min(max(2, int(labels.bincount().max())), 5)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")  # stopped early, and small classes that not every fold has
        x, y = scaling.fit_transform(features.numpy()), labels.numpy()
        strengths = [1 / (penalty * max(float(x.var(axis=0).sum()), 1e-12)) for penalty in PENALTIES]
        search = GridSearchCV(
            LogisticRegression(max_iter=max_iter), {"C": strengths}, cv=folds, refit=_within_one_error, error_score=0.0
        ).fit(x, y)  # fmt: skip
    return make_pipeline(scaling, search.best_estimator_)


def _within_one_error(results: dict[str, np.ndarray]) -> int:
    """Index of the first, strongest, penalty whose score is at most one standard error below the best."""
    folds = [scores for name, scores in results.items() if name.startswith("split")]
    mean, error = results["mean_test_score"], np.std(folds, axis=0, ddof=1) / math.sqrt(len(folds))
    best = int(mean.argmax())
    return int(np.argmax(mean >= mean[best] - error[best]))


def fixed_probe(features: Tensor, labels: Tensor, *, max_iter: int = 500) -> Pipeline:
    """Fit a linear reader with a fixed, weak penalty: channels standardised, logistic regression with C = 100 / D.

    The 1/D makes the penalty act alike on narrow and wide features; at D = 100 it is the library's default. Beside
    `linear_probe` it shows how much a result owes to the reader. Features wider than 1024 are projected as there.
    """
    reader = LogisticRegression(C=100 / features.shape[1], max_iter=max_iter)
    probe = make_pipeline(StandardScaler(), *_projection(features), reader)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(features.numpy(), labels.numpy())


def _projection(features: Tensor) -> list[PCA]:
    if features.shape[1] <= PCA_ABOVE:
        return []
    return [PCA(min(PCA_DIMS, len(features)), svd_solver="randomized", iterated_power=2, random_state=0)]


def probe_hits(probe: Pipeline, features: Tensor, labels: Tensor) -> Tensor:
    """Hits [N] (bool) of a fitted probe on features [N, D]."""
    return torch.from_numpy(probe.predict(features.numpy()) == labels.numpy())
