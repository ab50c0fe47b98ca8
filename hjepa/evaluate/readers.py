"""Readers of frozen features: nearest neighbours, retrieval, linear probes. Tensors in, a hit or miss per picture out.

The idea: a reader that learns little shows what the features hold. All run on the device where features and labels
lie, and hold no more than ENTRIES similarities at once, or those of one query.
Sources: weighted kNN, Wu et al. 2018 (arXiv:1805.01978, section 3.4); ridge with leave-one-out in closed form, Rifkin &
Lippert 2007 (MIT-CSAIL-TR-2007-025), as scikit-learn has it; the one-standard-error rule for a penalty, Breiman et al.
1984 (Classification and Regression Trees, section 3.4.3); statistics of unlabelled pictures of the other kind in place
of those fitted on, Li et al. 2016 (arXiv:1603.04779), who do so in batch norm.
Not covered: how features are made (`hjepa.evaluate.transfer`), rank, similarity and intervals
(`hjepa.evaluate.measures`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor

from .measures import one_thread, symmetric_eigen

ENTRIES = 2**26  # similarities held at once: 256 MiB in float32
ROWS, SCORES = 2**12, 2**22  # of a probe: pictures, and scores of classes, worked on at once
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
    ValueError if k is not between 1 and G, or a feature is not finite.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k={k} neighbours: a gallery of {len(gallery)} allows 1 to {len(gallery)}")
    check_finite("gallery", gallery)
    check_finite("queries", queries)
    mean = gallery.mean(dim=0)
    known, asked = F.normalize(gallery - mean, dim=1), F.normalize(queries - mean, dim=1)
    vote = _by_chunks(asked, known, lambda similarity, _: _vote(similarity, gallery_labels, k, temperature))
    return vote == query_labels


def check_finite(name: str, features: Tensor) -> None:
    """Raise ValueError where a row of features [N, D] holds NaN or infinity."""
    odd = (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist()
    if odd:
        raise ValueError(
            f"{name} has {len(odd)} of {len(features)} rows that are not finite, row {odd[0]} first; leave them out"
        )


def leave_one_out_knn(features: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Hits [N] (bool) of `knn_accuracy` where each picture is asked about with all others as gallery (k at most
    N - 1): for choices made on training pictures."""
    x = F.normalize(features - features.mean(dim=0), dim=1)
    k = min(k, len(x) - 1)

    def vote(similarity: Tensor, first: int) -> Tensor:
        similarity[:, first:].fill_diagonal_(-math.inf)
        return _vote(similarity, labels, k, temperature)

    return _by_chunks(x, x, vote) == labels


def _by_chunks(queries: Tensor, gallery: Tensor, read: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What `read` makes of similarities [q, G] and the number of their first query, joined over all queries: [Q].

    As many queries at once as keep to ENTRIES similarities, at least one.
    """
    step = max(1, ENTRIES // max(1, len(gallery)))
    return torch.cat([read(part @ gallery.T, i * step) for i, part in enumerate(queries.split(step))])


def _vote(similarity: Tensor, gallery_labels: Tensor, k: int, temperature: float) -> Tensor:
    """The class [Q] with most weight among the k most similar, similarity [Q, G]."""
    nearest, index = similarity.topk(k, dim=1)  # [Q, k]
    weight = ((nearest - nearest[:, :1]) / temperature).exp()  # the same vote, without overflow
    votes = similarity.new_zeros(len(similarity), int(gallery_labels.max()) + 1)
    votes.scatter_add_(1, gallery_labels[index], weight)
    return votes.argmax(dim=1)


def retrieval_hits(queries: Tensor, gallery: Tensor, turn: Tensor | None = None) -> Tensor:
    """Hits [N] (bool) of same-picture retrieval: row i of `gallery` is nearest (cosine) to query i.

    Both [N, D]. turn [N]: rows of equal number, such as the first placements of all pictures, are asked by themselves.
    ValueError if the shapes differ.
    """
    if queries.shape != gallery.shape:
        raise ValueError(f"queries {list(queries.shape)} and gallery {list(gallery.shape)} differ in shape")
    if turn is not None and len(turn.unique()) > 1:
        hits = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
        for rows in (turn == each for each in turn.unique()):
            hits[rows] = retrieval_hits(queries[rows], gallery[rows])
        return hits
    asked, known = F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    nearest = _by_chunks(asked, known, lambda similarity, _: similarity.argmax(dim=1))
    return nearest == torch.arange(len(queries), device=queries.device)


@dataclass(frozen=True)
class Probe:
    """A fitted linear reader: the class of the largest score, where scores are unit-length features @ weights +
    intercept.

    weights [D, C] and intercept [C], float64; centre [D], the mean that it was fitted around; classes [C], the labels;
    penalty, in squared units of the features. Where features are wide, `reduce` scales and projects them, and D is
    PCA_DIMS.
    """

    weights: Tensor
    intercept: Tensor
    centre: Tensor
    classes: Tensor
    penalty: float
    reduce: Pipeline | None = None

    def predict(self, features: Any) -> Any:
        """Labels [N] of features [N, D]: a tensor on the probe's device, or an array of a numpy array."""
        if not isinstance(features, Tensor):
            return self.predict(torch.from_numpy(features)).cpu().numpy()
        found = [(x @ self.weights + self.intercept).argmax(dim=1) for x in self._rows(features)]
        return self.classes[torch.cat(found)]

    def centred_on(self, features: Tensor) -> "Probe":
        """The same reader around the mean of other features [N, D], whose labels it does not ask for: a shift that all
        of them share, such as that of another image size, no longer moves the scores."""
        centre = torch.stack([x.sum(dim=0) for x in self._rows(features)]).sum(dim=0) / len(features)
        return replace(self, intercept=self.intercept + (self.centre - centre) @ self.weights, centre=centre)

    def _rows(self, features: Tensor) -> Iterator[Tensor]:
        """What the weights are for, float64, ROWS pictures at a time."""
        for part in features.to(self.weights.device).split(ROWS):
            yield (_on_cpu(self.reduce.transform, part) if self.reduce else F.normalize(part, dim=1)).double()


def linear_probe(features: Tensor, labels: Tensor) -> Probe:
    """Fit a linear reader with a penalty chosen on the same pictures, so that it suits the features it reads.

    features [N, D], labels int64 [N]. Rows are scaled to unit length (as nearest neighbours see them) and centred; then
    ridge regression on classes coded as -1 and 1. Of PENALTIES, in units of N times the total variance, leave-one-out
    accuracy, which one factorisation gives for all of them, takes the strongest within one standard error of the best.
    A weaker one leans on quiet channels: no better on pictures like those fitted on, and the first to fail on others,
    such as other sizes. For the same reason channels are not divided by their deviation: on training photographs
    (thumbnails, random init) that changed leave-one-out accuracy by less than half a point.

    Features wider than 2048 (raw pixels) are projected on their first 256 principal components, on the CPU, which
    bounds the time. ValueError if all labels are the same, or a feature is not finite.
    """
    check_finite("features", features)
    classes, target = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least 2 classes; all {len(labels)} labels are {int(labels[0])}")
    with one_thread():
        reduce = _projection(features)
        x = (_on_cpu(reduce.fit_transform, features) if reduce else F.normalize(features, dim=1)).double()
        centre, code = x.mean(dim=0), 2 * target.bincount().double() / len(x) - 1  # code [C]: means of -1 and 1
        x -= centre
        z, spectrum, axes = _principal(x)
        penalties = spectrum.sum().clamp(min=1e-12 * len(x)) * x.new_tensor(PENALTIES)
        shrunk = 1 / (spectrum + penalties[:, None])  # [P, R]
        sums = 2 * z.new_zeros(len(classes), z.shape[1]).index_add_(0, target, z)  # [C, R]: z.T @ codes, transposed
        chosen = _within_one_error(_left_out_hits(z, target, shrunk, sums, code) / len(x), len(x))
        weights = axes @ (sums * shrunk[chosen]).T
    return Probe(weights, code - centre @ weights, centre, classes, float(penalties[chosen]), reduce)


def _principal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows x [N, D] on their principal axes: z = x @ axes [N, R], squared lengths of its columns [R], axes
    [D, R], where R is the smaller of N and D."""
    if len(x) > x.shape[1]:
        spectrum, axes = symmetric_eigen(x.T @ x)
        return x @ axes, spectrum.clamp(min=0), axes
    spectrum, basis = symmetric_eigen(x @ x.T)
    length = spectrum.clamp(min=1e-200).sqrt()  # not 0, so that an axis without length divides by something
    return basis * length, length.square(), x.T @ (basis / length)


def _left_out_hits(z: Tensor, target: Tensor, shrunk: Tensor, sums: Tensor, code: Tensor) -> Tensor:
    """How many rows are classed rightly by a reader fitted on all others, for each penalty: [P], float64.

    z [N, R], target [N], shrunk [P, R], sums [C, R], code [C], as in `linear_probe`. Leaving a row of leverage h out
    moves its scores from s to (s - h y) / (1 - h), where y are its codes: against the others, that of its own class
    falls by 2 h.
    """
    hits = torch.zeros(len(shrunk), dtype=torch.float64, device=z.device)
    readers = (sums * shrunk[:, None]).flatten(0, 1).T  # [R, P * C]
    rows = max(1, SCORES // readers.shape[1])
    for part, own in zip(z.split(rows), target[:, None].split(rows), strict=True):
        fall = -2 * (part.square() @ shrunk.T + 1 / len(z))  # [n, P]; 1 / N is the intercept's leverage
        scores = (part @ readers).unflatten(1, (len(shrunk), -1)).add_(code)  # [n, P, C]
        scores.scatter_add_(2, own.expand_as(fall)[..., None], fall[..., None])
        hits += (scores.argmax(dim=2) == own).sum(dim=0)
    return hits


def _within_one_error(share: Tensor, count: int) -> int:
    """Index of the first, strongest, penalty whose share of hits is at most one standard error below the best.

    share [P], of `count` rows.
    """
    best = float(share.max())
    return int((share >= best - math.sqrt(best * (1 - best) / count)).int().argmax())


def _projection(features: Tensor) -> Pipeline | None:
    if features.shape[1] <= PCA_ABOVE:
        return None
    pca = PCA(min(PCA_DIMS, len(features)), svd_solver="randomized", iterated_power=2, random_state=0)
    return make_pipeline(Normalizer(), StandardScaler(with_std=False), pca)


def _on_cpu(step: Callable[[Any], Any], features: Tensor) -> Tensor:
    return torch.from_numpy(step(features.cpu().numpy())).to(features.device)


def probe_hits(probe: Probe, features: Tensor, labels: Tensor) -> Tensor:
    """Hits [N] (bool) of a fitted probe on features [N, D]."""
    return probe.predict(features) == labels
