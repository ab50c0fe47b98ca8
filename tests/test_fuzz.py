"""A few of `fuzz.py`'s cases in every run of the tests; `make fuzz` makes 11,000."""

import warnings

import fuzz
import pytest


@pytest.mark.parametrize("part", fuzz.PARTS, ids=lambda part: part.__name__)
def test_damaged_and_random_input_gives_an_answer_or_a_named_error(part):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fuzz.run(part, count=50, seed=1) == []
