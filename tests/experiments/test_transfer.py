"""Claims of hjepa.experiments.transfer: schemes differ in positions only, side by side is one after the other."""

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from hjepa.experiments.transfer import SCHEMES, read_all, readers, scheme_configs, train_all
from hjepa.train.checkpoint import latest_checkpoint

SHORT = ("train.steps=2", "train.eval_every=2", "train.checkpoint_every=2", "evaluate.gallery=16", "evaluate.queries=8")


@pytest.fixture
def configs(pictures):
    settings = [*TINY, *SHORT, f"data.path={pictures}", "model.rope.strategy=interpolate"]
    return scheme_configs(None, ["rope", "absolute"], settings)


def test_schemes_of_a_recipe_differ_in_positions_only(pictures):
    found = scheme_configs(None, list(SCHEMES), [*TINY, f"data.path={pictures}"])
    assert {name: (c.model.rope.use_rope, c.model.use_absolute) for name, c in found.items()} == {
        "rope": (True, False), "absolute": (False, True), "hybrid": (True, True), "none": (False, False),
        "mixed": (True, False), "hybrid_mixed": (True, True), "sincos": (False, True),
    }  # fmt: skip
    for config in found.values():
        assert config.train == found["rope"].train and config.data == found["rope"].data


def test_an_unknown_scheme_gets_the_nearest():
    with pytest.raises(ValueError, match=r"scheme='ropes' is not one of rope, .*; nearest: rope"):
        scheme_configs(None, ["ropes"])


@pytest.mark.slow
def test_side_by_side_gives_the_same_weights_as_one_after_the_other(configs, tmp_path):
    alone = train_all(configs, tmp_path / "alone", progress=False)
    beside = train_all(configs, tmp_path / "beside", parallel=2)
    assert list(alone) == list(beside) == ["rope", "absolute"]
    for name in configs:
        one, two = (
            load_file(latest_checkpoint(tmp_path / where / name) / "model.safetensors") for where in ("alone", "beside")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_every_result_shows_random_init_and_all_simple_baselines(configs, tmp_path):
    train_all(configs, tmp_path, progress=False)
    assert list(readers(configs, tmp_path, ["interpolate", "extrapolate"])) == [
        "rope, interpolated", "rope, extrapolated", "absolute, resampled", "random init",
    ]  # fmt: skip
    hits: dict = {}
    rows = read_all(configs, tmp_path, [16], strategies=["interpolate"], hits=hits)
    value = {(row["encoder"], row["size"], row["metric"]): row["value"] for row in rows}
    assert hits and all(float(each.double().mean()) == pytest.approx(value[key]) for key, each in hits.items())
    names = {row["encoder"] for row in rows}
    simple = {"raw pixels", "colour histogram", "HOG"}
    assert names == {"rope, interpolated", "absolute, resampled", "random init"} | simple
    assert {row["size"] for row in rows} == {(16, 16), (32, 32)}
