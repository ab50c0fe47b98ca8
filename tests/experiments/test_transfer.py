"""Claims of hjepa.experiments.transfer: schemes differ in positions only, side by side is one after the other."""

from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from hjepa.build import load_split
from hjepa.config import load_config
from hjepa.experiments.sweep import load_sweep
from hjepa.experiments.transfer import CONTROL, SCHEMES, _control, read_all, readers, scheme_configs, train_all
from hjepa.pretrained import load_pretrained
from hjepa.train.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("data.image_size=16", "other data settings: data.image_size=16, 'rope' with 32; read them one by one"),
        ("data.moved=true", "data.moved=True, 'rope' with False"),
        ("data.path=elsewhere", "data.path=elsewhere, 'rope' with "),
        ("data.mean=[0.1,0.2,0.3]", "data.mean=[0.1, 0.2, 0.3], 'rope' with None"),
        ("evaluate.knn_k=4", "other evaluate settings: evaluate.knn_k=4, 'rope' with 3"),
    ],
)
def test_variants_that_would_be_read_with_settings_of_the_first_are_refused(tiny, tmp_path, setting, reason):
    configs = {"rope": tiny("model.rope.use_rope=true"), "other": tiny(setting)}
    with pytest.raises(ValueError, match="variant 'other' was trained with ") as refused:
        read_all(configs, tmp_path, [16])
    assert reason in str(refused.value)


def test_pictures_are_loaded_with_the_detail_of_the_sizes_asked(tiny, tmp_path, monkeypatch):
    seen = []

    def load(config, split, **options):
        seen.append((split, options))
        return load_split(config, split, **options)

    monkeypatch.setattr("hjepa.experiments.transfer.load_split", load)
    with pytest.raises(FileNotFoundError, match="is not a run"):
        read_all({"rope": tiny()}, tmp_path, [16, 192])
    assert seen == [("train", {"read_at": [16, 192]}), ("test", {"repeats": 1, "read_at": [16, 192]})]


def test_moved_test_pictures_are_read_in_all_their_places_by_everybody(tiny, tmp_path):
    config = {"none": tiny(*SHORT, "data.moved=true", "evaluate.placements=2", "model.use_absolute=false")}
    train_all(config, tmp_path, progress=False)
    hits: dict = {}
    rows = read_all(config, tmp_path, [16], hits=hits, dense=True)
    assert {(row["n"], row["placements"]) for row in rows if row["metric"] == "knn"} == {(8, 2)}
    assert len({row["encoder"] for row in rows if row["metric"] == "knn"}) == 5
    assert {each.shape for each in hits.values()} == {(16,)}


@pytest.mark.parametrize("name", ["HOG", "raw pixels", "colour histogram", "random init", "chance", CONTROL])
def test_a_variant_named_like_a_baseline_is_refused(tiny, tmp_path, name):
    with pytest.raises(ValueError, match=f"variant '{name}': a baseline in the table has that name"):
        read_all({"rope": tiny(), name: tiny()}, tmp_path, [16])


def test_the_control_without_positions_has_the_recipe_and_the_seed_of_the_others():
    recipe = ROOT / "configs/rope_experiment.yaml"
    for schemes in (["rope", "absolute"], ["absolute"], ["mixed"]):
        (control,) = _control(scheme_configs(recipe, schemes, ["data.root=elsewhere", "train.threads=2"])).values()
        assert not control.use_absolute and not control.strategies
    weights, shipped = control.state_dict(), load_pretrained("openmoji-none").state_dict()
    assert all(torch.equal(weights[key], shipped[key]) for key in shipped)
    for other in ("train.seed=1", "train.steps=120", "data.moved=false", "objective=views", "model.depth=3"):
        assert _control(scheme_configs(recipe, ["rope"], [other])) == {}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/sweeps/*.yaml")), ids=lambda path: path.stem)
def test_the_variants_of_committed_sweeps_are_read_together(path, tmp_path, monkeypatch):
    """What differs between them, none of which is refused, is about training."""
    monkeypatch.chdir(ROOT)
    given = load_sweep(path)[1][0].parameters
    overrides = given.get("overrides", [])
    variants = given.get("variants", {})
    configs = {name: load_config(given["recipe"], [*more, *overrides]) for name, more in variants.items()}
    configs = configs or scheme_configs(given["recipe"], given["positions"], overrides)
    monkeypatch.setattr("hjepa.experiments.transfer.load_split", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_all(configs, tmp_path, [16])
