"""The mutants of `mutants.py` still fit the source. `make mutants` applies them and runs the tests on each."""

import ast

from mutants import MUTANTS, ROOT, Mutant, applies, judge, main


def test_every_mutant_still_fits_the_source_and_stays_python() -> None:
    for mutant in MUTANTS:
        assert applies(mutant), f"{mutant.name}: its text is not in hjepa/{mutant.module}.py exactly once"
        source = (ROOT / "hjepa" / f"{mutant.module}.py").read_text()
        changed = source.replace(mutant.old, mutant.new)
        assert changed != source
        ast.parse(changed)
        assert (ROOT / "tests" / f"test_{mutant.tests}.py").is_file()


def test_names_are_unique_and_every_part_has_mutants() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    rotation = [m for m in MUTANTS if m.module in ("rope", "rotation", "frequencies", "attention")]
    assert len(rotation) >= 9
    assert {"encoders", "masks", "model", "predictor", "evaluate", "metrics"} <= {m.module for m in MUTANTS}


def test_a_mutant_whose_text_is_gone_does_not_count_as_caught() -> None:
    caught, line = judge(Mutant("gone", "rope", "no such text", "", "rope"))
    assert not caught and line.startswith("GONE")


def test_words_without_a_mutant_are_an_error() -> None:
    assert main(["no such word"]) == 2
