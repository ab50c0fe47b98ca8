"""The predictor: it answers by (level, position), and by nothing else; fractional places are places like any other."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hjepa.nn.predictor import Predictor, sincos_positions

GRID, PREFIX = (6, 6), 1
MODES = {
    "absolute": {"use_absolute": True},
    "rope": {"use_absolute": False, "use_rope": True},
    "hybrid": {"use_absolute": True, "use_rope": True},
    "mixed": {"use_absolute": False, "use_rope": True, "rope": {"kind": "mixed"}},
}
PATCHES = torch.tensor([[[0.0, 0.0], [2.0, 5.0], [4.0, 1.0]]]).repeat(2, 1, 1)
QUERIES = [
    torch.tensor([[[1.0, 1.0], [5.0, 3.0], [3.0, 4.0]]]).repeat(2, 1, 1),
    torch.tensor([[[0.5, 2.5], [4.5, 4.5]]]).repeat(2, 1, 1),
]


def build(mode: str = "rope", **options: Any) -> Predictor:
    torch.manual_seed(0)
    arguments = {"levels": 2, "grid_size": GRID, "num_prefix_tokens": PREFIX, "rope_theta": 20.0, "use_absolute": False}
    predictor = Predictor(12, 16, 2, 2, **(arguments | MODES.get(mode, {}) | options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return predictor


def context() -> Tensor:
    return torch.randn(2, PREFIX + 3, 12, generator=torch.Generator().manual_seed(2))


def spread(answers: Tensor) -> float:
    """How far the answers to one sample's queries lie apart."""
    return float((answers - answers[:, :1]).abs().max())


@torch.no_grad()
def test_without_positions_all_targets_of_a_level_get_one_answer() -> None:
    answers = build("none")(context(), PATCHES, QUERIES)
    assert [spread(answer) for answer in answers] == pytest.approx([0, 0], abs=1e-6)
    assert (answers[0][:, 0] - answers[1][:, 0]).abs().max() > 1e-2, "levels are told apart by their token"


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_with_positions_targets_are_told_apart(mode: str) -> None:
    assert all(spread(answer) > 1e-2 for answer in build(mode)(context(), PATCHES, QUERIES))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_answers_follow_their_query_s_place_and_not_its_turn(mode: str) -> None:
    order = [2, 0, 1]
    answers = build(mode)(context(), PATCHES, QUERIES)
    turned = build(mode)(context(), PATCHES, [QUERIES[0][:, order], QUERIES[1]])
    torch.testing.assert_close(turned[0], answers[0][:, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(turned[1], answers[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_context_is_a_set_of_placed_tokens(mode: str) -> None:
    order = [1, 2, 0]
    shuffled = torch.cat((context()[:, :PREFIX], context()[:, PREFIX:][:, order]), dim=1)
    answers = build(mode)(context(), PATCHES, QUERIES)
    for one, other in zip(answers, build(mode)(shuffled, PATCHES[:, order], QUERIES), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    moved = build(mode)(context(), PATCHES[:, order], QUERIES)
    assert (moved[0] - answers[0]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["rope", "mixed"])
@torch.no_grad()
def test_with_rope_alone_only_offsets_count(mode: str) -> None:
    """The prefix stands outside the grid, so it is left out here."""
    predictor = build(mode, num_prefix_tokens=0)
    by = torch.tensor([2.5, -1.0])
    here = predictor(context(), torch.cat((PATCHES, PATCHES[:, :1] + 1), 1), QUERIES)
    there = predictor(context(), torch.cat((PATCHES, PATCHES[:, :1] + 1), 1) + by, [q + by for q in QUERIES])
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    places = [PATCHES.clone(), *(q.clone() for q in QUERIES)]
    places[0][1] += 1
    both = build()(context(), places[0], places[1:])
    for sample in range(2):
        one = slice(sample, sample + 1)
        alone = build()(context()[one], places[0][one], [q[one] for q in places[1:]])
        for level in range(2):
            torch.testing.assert_close(both[level][one], alone[level], atol=1e-5, rtol=1e-4)


def test_position_code_is_the_sine_and_cosine_of_the_formula_at_fractions() -> None:
    code = sincos_positions(torch.tensor([[2.5, 4.0]]), 16)[0]
    for i in range(4):
        omega = 10000.0 ** (-i / 4)
        expected = [math.sin(2.5 * omega), math.cos(2.5 * omega), math.sin(4 * omega), math.cos(4 * omega)]
        assert code[[i, 4 + i, 8 + i, 12 + i]].tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_absolute_places_are_measured_in_the_training_picture() -> None:
    """The same place of the picture on a grid twice as fine has the same code: (2p + 0.5) there is p here."""
    predictor = build("absolute")
    coarse = predictor(context(), PATCHES, QUERIES, GRID)
    fine = predictor(context(), 2 * PATCHES + 0.5, [2 * q + 0.5 for q in QUERIES], (12, 12))
    for one, other in zip(coarse, fine, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_rope_strategy_reaches_the_predictor() -> None:
    predictor = build("rope", rope={"strategy": "interpolate"})
    coarse = predictor(context(), PATCHES, QUERIES, GRID)
    fine = predictor(context(), 2 * PATCHES + 0.5, [2 * q + 0.5 for q in QUERIES], (12, 12))
    for one, other in zip(coarse, fine, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_thetas_of_a_deep_encoder_are_spread_over_a_shallow_predictor() -> None:
    predictor = build("rope", rope={"theta_per_layer": [100.0, 50.0, 20.0, 10.0, 5.0]})
    assert predictor.rope is not None and predictor.rope.thetas == (100.0, 5.0)


def test_every_parameter_takes_gradient() -> None:
    for mode in MODES:
        predictor = build(mode)
        sum(answer.square().sum() for answer in predictor(context(), PATCHES, QUERIES)).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in predictor.parameters())


def test_what_does_not_fit_is_refused_by_value() -> None:
    predictor = build()
    with pytest.raises(ValueError, match=r"3 levels of queries, the predictor has 1\.\.2"):
        predictor(context(), PATCHES, [*QUERIES, QUERIES[0]])
    with pytest.raises(ValueError, match=r"context_positions must be \[2, 3, 2\].*got \[2, 2, 2\]"):
        predictor(context(), PATCHES[:, :2], QUERIES)
    with pytest.raises(ValueError, match=r"embed_dim=18 must be a multiple of 4"):
        Predictor(12, 18, 1, 2)
    with pytest.raises(ValueError, match=r"num_heads=0"):
        Predictor(12, 12, 1, 0)
    with pytest.raises(ValueError, match=r"dim=6 is not divisible by 4"):
        Predictor(12, 12, 1, 2, use_rope=True)
