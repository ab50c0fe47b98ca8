"""Claims of hjepa.train.schedule: everything a step uses follows from (seed, step)."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hjepa.train.schedule import StepSampler, batch_at, epoch_order, generator_at, lr_at, mix, share, size_at

CURVE = {"steps": 110, "lr": 0.8, "min_lr": 0.2, "warmup": 10}


def test_lr_matches_its_closed_form():
    warm = [lr_at(step, **CURVE) for step in range(10)]
    assert warm == pytest.approx([0.08 * k for k in range(1, 11)])
    cosine = {10: 1.0, 10 + 25: (1 + math.sqrt(0.5)) / 2, 10 + 50: 0.5, 10 + 75: (1 - math.sqrt(0.5)) / 2, 110: 0.0}
    for step, share_left in cosine.items():
        assert lr_at(step, **CURVE) == pytest.approx(0.2 + 0.6 * share_left)


def test_lr_rises_then_falls_and_never_leaves_its_range():
    values = [lr_at(step, **CURVE) for step in range(CURVE["steps"])]
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)
    assert min(values) > 0 and max(values) == CURVE["lr"] and values[-1] > CURVE["min_lr"]


def test_warmup_longer_than_training_only_rises():
    values = [lr_at(step, steps=5, lr=1.0, warmup=10) for step in range(5)]
    assert values == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_each_epoch_visits_every_picture_once_in_another_order():
    stream = [index for step in range(10) for index, _ in batch_at(step, size=20, batch_size=6, seed=3)]
    epochs = [stream[first : first + 20] for first in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("size", "batch"), [(20, 6), (20, 19), (23, 12), (12, 8), (97, 32), (9, 9), (8, 3), (2, 1)])
def test_a_batch_across_two_epochs_has_no_picture_twice_and_epochs_stay_whole(size, batch):
    """Other places than the few that change hold what they held; step by step in any order it is the same."""
    steps = range(6 * size)
    read = [[i for i, _ in batch_at(step, size=size, batch_size=batch, seed=3, apart=True)] for step in steps]
    assert all(len(set(pictures)) == batch for pictures in read)
    stream, drawn = ([i for pictures in those for i in pictures] for those in (
        read, ([i for i, _ in batch_at(step, size=size, batch_size=batch, seed=3)] for step in steps)
    ))  # fmt: skip
    for first in range(0, len(stream) - size, size):
        assert sorted(stream[first : first + size]) == list(range(size))
        assert stream[first + batch : first + size] == drawn[first + batch : first + size]
    assert stream[:size] == drawn[:size] and (size % batch == 0 or stream != drawn)
    for step in reversed(steps[-4:]):  # as a resumed run asks, with nothing drawn before
        epoch_order.cache_clear()
        assert [i for i, _ in batch_at(step, size=size, batch_size=batch, seed=3, apart=True)] == read[step]


def test_orders_without_a_picture_twice_are_as_they_were():
    """Of 200 pictures and batches of 8 most epochs begin without; those that do not differ in pairs of places."""
    changed = 0
    for epoch in range(1, 60, 2):  # begins in the middle of a batch of 16
        drawn, order = (epoch_order(200, 0, epoch, apart) for apart in (0, 16))
        twice = set(epoch_order(200, 0, epoch - 1, 16)[-8:].tolist()) & set(drawn[:8].tolist())
        assert int((drawn != order).sum()) == 2 * len(twice)
        changed += len(twice) > 0
    assert 0 < changed < 15
    whole = epoch_order(200, 0, 2, 16)
    assert torch.equal(whole, epoch_order(200, 0, 2)), "begins with a batch"


def test_fewer_pictures_than_a_batch_keep_their_order():
    assert batch_at(1, size=5, batch_size=8, seed=0, apart=True) == batch_at(1, size=5, batch_size=8, seed=0)


def test_a_step_does_not_depend_on_the_steps_before_it():
    forward = [batch_at(step, size=50, batch_size=8, seed=1) for step in range(20)]
    backward = [batch_at(step, size=50, batch_size=8, seed=1) for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert batch_at(7, size=50, batch_size=8, seed=2) != forward[7]


def test_every_crop_has_a_seed_of_its_own():
    seeds = [seed for step in range(50) for _, seed in batch_at(step, size=16, batch_size=16, seed=0)]
    assert Counter(seeds).most_common(1)[0][1] == 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_processes_and_micro_batches_share_the_global_batch_exactly(processes, accumulate, rows):
    batch = processes * accumulate * rows
    slices = [
        share(batch, micro=micro, accumulate=accumulate, rank=rank, processes=processes)
        for micro in range(accumulate)
        for rank in range(processes)
    ]
    assert sorted(row for part in slices for row in range(batch)[part]) == list(range(batch))
    assert {len(range(batch)[part]) for part in slices} == {rows}


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does():
    with pytest.raises(ValueError, match=r"batch_size=10 .* 2 x 3; nearest: 12"):
        share(10, micro=0, accumulate=2, rank=0, processes=3)


def test_samplers_of_two_processes_yield_the_batches_of_one():
    same = dict(size=20, batch_size=8, seed=0, sides=[16, 24])
    whole = list(StepSampler(range(3, 6), [slice(0, 8)], **same))
    halves = [list(StepSampler(range(3, 6), [slice(start, start + 4)], **same)) for start in (0, 4)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_all_pictures_of_a_step_have_one_side_and_every_side_has_its_turn():
    """Over 3000 steps each of three sides comes 1000 times, give or take five standard deviations."""
    sampler = StepSampler(range(3000), [slice(0, 2)], size=20, batch_size=2, seed=0, sides=[16, 24, 32])
    steps = [{side for *_, side in batch} for batch in sampler]
    assert all(len(sides) == 1 for sides in steps)
    drawn = [side for sides in steps for side in sides]
    assert all(abs(drawn.count(side) - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for side in (16, 24, 32))
    assert drawn == [size_at(step, sizes=[16, 24, 32], seed=0) for step in range(3000)]


def test_seeds_are_frozen():
    """A change here would silently change every run and break resuming older ones."""
    assert mix(0, 0, "masks") == 8976657895820402872
    assert torch.randint(1000, (4,), generator=generator_at(1, 2, "masks")).tolist() == [262, 164, 670, 27]
    assert mix(1, 23) != mix(12, 3)

