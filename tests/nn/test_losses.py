"""Claims of hjepa.nn.losses, against float64 formulas written out."""

import math

import pytest
import torch

from hjepa.nn.losses import contrastive_loss, sketched_gaussian_regularizer, variance_regularizer, view_loss


def embeddings(views: int = 3, pictures: int = 4, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(views, pictures, width, generator=torch.Generator().manual_seed(seed))


def brute_contrastive(views: torch.Tensor, targets: torch.Tensor | None, temperature: float) -> float:
    """The definition, one pair at a time."""
    keys = views if targets is None else targets
    total, count = 0.0, 0
    for v in range(len(views)):
        for b in range(views.shape[1]):
            def score(w: int, c: int, v: int = v, b: int = b) -> float:
                x, y = views[v, b].double(), keys[w, c].double()
                return float(x @ y / (x.norm() * y.norm())) / temperature

            others = [(w, c) for w in range(len(keys)) for c in range(views.shape[1]) if (w, c) != (v, b)]
            spread = math.log(sum(math.exp(score(w, c)) for w, c in others))
            same = [score(w, c) for w, c in others if c == b]
            total, count = total + spread - sum(same) / len(same), count + 1
    return total / count


@pytest.mark.parametrize("taught", [False, True])
def test_contrastive_loss_is_its_definition(taught: bool) -> None:
    views, targets = embeddings(), embeddings(2, seed=1) if taught else None
    found = contrastive_loss(views, targets, 0.2)
    assert float(found) == pytest.approx(brute_contrastive(views, targets, 0.2), abs=1e-5)


@pytest.mark.parametrize("kind", ["contrastive", "sketched_gaussian", "variance"])
def test_constant_embeddings_cost_more_than_spread_ones_that_agree(kind: str) -> None:
    torch.manual_seed(0)
    pictures = torch.randn(1, 64, 8).expand(4, -1, -1)
    constant = torch.ones(4, 64, 8)
    assert view_loss(constant, kind=kind, weight=0.5) > view_loss(pictures, kind=kind, weight=0.5) + 0.1


def test_sketched_gaussian_is_the_integral_in_float64() -> None:
    """One direction in one dimension: the integral of |phi_n(t) - exp(-t^2/2)|^2 exp(-t^2/2) over -3..3, times n."""
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    empirical = torch.exp(1j * t[:, None] * x.double().T).mean(1)
    integrand = (empirical - torch.exp(-t.square() / 2)).abs().square() * torch.exp(-t.square() / 2)
    expected = 40 * float(torch.trapezoid(integrand, t))
    found = sketched_gaussian_regularizer(x, directions=1, points=301, reach=3.0)
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_view_losses_beside_the_contrastive_are_distance_and_regularizer() -> None:
    views = embeddings(3, 6, 4)
    distance = (views - views[:2].mean(0)).square().mean()
    spread = torch.stack([variance_regularizer(view) for view in views]).mean()
    found = view_loss(views, kind="variance", large=2, weight=0.3)
    torch.testing.assert_close(found, 0.7 * distance + 0.3 * spread)


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 1, 5)])
def test_one_view_or_one_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 views of 2 pictures"):
        view_loss(torch.randn(shape))
