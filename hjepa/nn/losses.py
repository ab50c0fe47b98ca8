"""What keeps features from collapsing to a constant: terms over a batch of features.

    variance           hinge on the standard deviation and squared off-diagonal covariance (VICReg, Bardes et al., 2022)
    sketched_gaussian  characteristic function of random projections held to a Gaussian's (after LeJEPA's SIGReg,
                       Balestriero & LeCun, 2025)

Not covered: gathering features over processes, which the caller does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

REGULARIZERS = ("none", "variance", "sketched_gaussian")


def variance_regularizer(features: Tensor) -> Tensor:
    """VICReg's variance and covariance terms of `[n, D]` features, at unit standard deviation; n must be at least 2."""
    if len(features) < 2:
        raise ValueError(f"the variance regularizer needs a batch of at least 2 images, got {len(features)}")
    centred = features - features.mean(0)
    covariance = centred.T @ centred / (len(features) - 1)
    std = (covariance.diagonal() + 1e-4).sqrt()
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - std).mean() + off_diagonal / features.shape[1]


def sketched_gaussian_regularizer(features: Tensor, directions: int = 64, points: int = 17) -> Tensor:
    """Distance of `[n, D]` features from a standard Gaussian along random directions.

    For unit directions u, the empirical characteristic function of u . features is compared with exp(-t^2 / 2) on
    0 <= t <= 5, weighted by the same Gaussian and integrated by the trapezoid rule, times n (Epps-Pulley).
    """
    sketch = F.normalize(torch.randn(features.shape[1], directions, device=features.device), dim=0)
    t = torch.linspace(0, 5, points, device=features.device)
    phase = (features @ sketch)[..., None] * t
    expected = torch.exp(-t.square() / 2)
    error = (phase.cos().mean(0) - expected).square() + phase.sin().mean(0).square()
    return len(features) * torch.trapezoid(error * expected, t, dim=-1).mean() * 2
