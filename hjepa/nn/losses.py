"""What views of one picture share, and what keeps features from collapsing to a constant: terms over a batch.

    variance           hinge on the standard deviation and squared off-diagonal covariance (VICReg, Bardes et al., 2022)
    sketched_gaussian  characteristic function of random projections held to a Gaussian's (after LeJEPA's SIGReg,
                       Balestriero & LeCun, 2025)
    contrastive        the other views of a picture against all views of all other pictures, softmax over their cosines
                       (InfoNCE of van den Oord et al., 2018, with several positives: Khosla et al., 2020, L_out)

The first two are beside a distance that alone would be least for a constant; the third is distance and spread in one.
Not covered: gathering features over processes, which the caller does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

REGULARIZERS = ("none", "variance", "sketched_gaussian")
VIEW_LOSSES = ("contrastive", "sketched_gaussian", "variance")


def variance_regularizer(features: Tensor) -> Tensor:
    """VICReg's variance and covariance terms of `[n, D]` features, at unit standard deviation; n must be at least 2."""
    if len(features) < 2:
        raise ValueError(f"the variance regularizer needs a batch of at least 2 images, got {len(features)}")
    centred = features - features.mean(0)
    covariance = centred.T @ centred / (len(features) - 1)
    std = (covariance.diagonal() + 1e-4).sqrt()
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - std).mean() + off_diagonal / features.shape[1]


def sketched_gaussian_regularizer(
    features: Tensor, directions: int = 64, points: int = 17, reach: float = 5.0
) -> Tensor:
    """Distance of `[n, D]` features from a standard Gaussian along random directions.

    For unit directions u, the empirical characteristic function of u . features is compared with exp(-t^2 / 2) on
    0 <= t <= reach, weighted by the same Gaussian and integrated by the trapezoid rule, times n (Epps-Pulley).
    """
    sketch = F.normalize(torch.randn(features.shape[1], directions, device=features.device), dim=0)
    t = torch.linspace(0, reach, points, device=features.device)
    phase = (features @ sketch)[..., None] * t
    expected = torch.exp(-t.square() / 2)
    error = (phase.cos().mean(0) - expected).square() + phase.sin().mean(0).square()
    return len(features) * torch.trapezoid(error * expected, t, dim=-1).mean() * 2


def view_loss(
    views: Tensor, targets: Tensor | None = None, *, kind: str = "contrastive", large: int = 2,
    temperature: float = 0.1, weight: float = 0.02,
) -> Tensor:  # fmt: skip
    """How far the views of each picture are apart, and how little the pictures are.

    Args:
        views: `[V, B, D]`, an embedding of each view of each picture, the large views first.
        targets: `[G, B, D]`, embeddings of the large views by the target encoder; None: the views themselves.
        kind: one of VIEW_LOSSES.
        large: number G of large views. Under "sketched_gaussian" the mean of theirs is the target.
        temperature: of "contrastive", which divides cosines by it.
        weight: of what keeps features apart, in the other two: (1 - weight) * distance + weight * regularizer.

    Raises:
        ValueError: fewer than two views, or one picture only.
    """
    if len(views) < 2 or views.shape[1] < 2:
        raise ValueError(f"views need at least 2 views of 2 pictures, got {len(views)} of {views.shape[1]}")
    if kind == "contrastive":
        return contrastive_loss(views, targets, temperature)
    centre = views[:large].mean(0) if targets is None else targets.mean(0)
    distance = (views - centre).square().mean()
    if kind == "variance":
        spread = torch.stack([variance_regularizer(view) for view in views]).mean()
    else:
        spread = torch.stack([sketched_gaussian_regularizer(view, 256, reach=3.0) for view in views]).mean()
    return (1 - weight) * distance + weight * spread


def contrastive_loss(views: Tensor, targets: Tensor | None, temperature: float) -> Tensor:
    """Mean over views of -log p(another view of the same picture), p a softmax over all other embeddings.

    views `[V, B, D]`; targets `[G, B, D]` or None as in `view_loss`. A view is never compared with itself; with
    targets, large view g not with target g.
    """
    pictures = views.shape[1]
    queries = F.normalize(views.flatten(0, 1), dim=-1)
    keys = queries if targets is None else F.normalize(targets.flatten(0, 1), dim=-1)
    scores = queries @ keys.T / temperature  # [V B, V B or G B]
    row, column = (torch.arange(count, device=views.device) for count in scores.shape)
    row = row[:, None]
    itself = row == column
    positive = (row % pictures == column % pictures) & ~itself
    scores = scores.masked_fill(itself, float("-inf"))
    per_view = scores.masked_fill(~positive, 0).sum(1) / positive.sum(1)
    return (scores.logsumexp(1) - per_view).mean()
