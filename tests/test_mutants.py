"""The mutants of `mutants.py` still fit the source. `make mutants` applies them and runs the tests on each."""

import ast

from mutants import MUTANTS, ROOT, Mutant, applies, judge, main


def test_every_mutant_still_fits_the_source_and_stays_python() -> None:
    for mutant in MUTANTS:
        assert applies(mutant), f"{mutant.name}: the text is not in hjepa/{mutant.module}.py once"
        source = (ROOT / "hjepa" / f"{mutant.module}.py").read_text()
        changed = source.replace(mutant.old, mutant.new)
        assert changed != source
        ast.parse(changed)
        assert len(list(ROOT.glob(f"tests/**/test_{mutant.tests}.py"))) == 1


def test_names_are_unique_and_every_part_has_mutants() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    rotation = [m for m in MUTANTS if m.module[3:] in ("rope", "rotation", "frequencies", "attention")]
    assert len(rotation) >= 9
    parts = {mutant.module.split("/")[-1] for mutant in MUTANTS}
    assert {"encoders", "masks", "hjepa", "predictor", "transfer", "readers"} <= parts


def test_a_mutant_whose_text_is_gone_does_not_count_as_caught() -> None:
    caught, line = judge(Mutant("gone", "nn/rope", "no such text", "", "rope"))
    assert not caught and line.startswith("GONE")


def test_words_without_a_mutant_are_an_error() -> None:
    assert main(["no such word"]) == 2
