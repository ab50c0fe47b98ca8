"""Configs: what a file says is what is read, and whatever is wrong gets one line that names the right thing."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import hjepa.config
from hjepa.config import Config, default_config, load_config, save_config

CONFIGS = Path(__file__).parent.parent / "configs"


def write(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


ALL = dict(leaves(OmegaConf.to_container(default_config())))


def test_absent_keys_keep_their_defaults(tmp_path):
    config = load_config(write(tmp_path, "model:\n  rope:\n    theta: 100\ntrain:\n"))
    changed = {key: value for key, value in leaves(OmegaConf.to_container(config)) if value != ALL[key]}
    assert changed == {"model.rope.theta": 100.0}


def test_a_config_without_rope_has_rope_off(tmp_path):
    assert load_config(write(tmp_path, "model: {depth: 2}")).model.rope.use_rope is False
    assert load_config(write(tmp_path, "")).model.rope.use_rope is False
    assert load_config(CONFIGS / "default.yaml").model.rope.use_rope is False
    assert load_config(CONFIGS / "rope_experiment.yaml").model.rope.use_rope is True


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path):
    path = write(tmp_path, "train: {steps: 5, lr: 1e-2}")
    config = load_config(path, ["train.steps=6", "train.steps=7", "train.mixed_precision=no", "data.path=null"])
    assert (config.train.steps, config.train.lr, config.train.mixed_precision) == (7, 0.01, "no")
    assert config.data.path is None


@pytest.mark.parametrize(
    "text", ["photos #2", "010", "1_000", "1:30", "true", "a: b", "[x]", "*x", "!important", "1e3", "~/photos", "#2"]
)
def test_text_is_taken_as_it_stands_and_saved_as_text(tmp_path, text):
    config = load_config(overrides=[f"data.path={text}"])
    assert config.data.path == text and load_config(overrides=[f"data.path='{text}'"]).data.path == text
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").data.path == text


def test_names_of_classes_are_taken_as_they_stand(tmp_path):
    """A class folder 008 is not 8, and one named `no` or 1e3 is no value of YAML."""
    config = load_config(overrides=["data.classes=[008, 010, 1e3, true, null, '7', French horn]"])
    assert config.data.classes == ["008", "010", "1e3", "true", "null", "7", "French horn"]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert load_config(overrides=["data.classes=[a]", "data.classes=null"]).data.classes is None
    for text in ("[008, a]", "[1e3]", "[true]"):
        with pytest.raises(ValueError, match=r"some.yaml: data.classes=.* not all are text; write each in quotes"):
            load_config(write(tmp_path, f"data: {{classes: {text}}}"))
    with pytest.raises(ValueError, match="anchors and aliases are not read"):
        load_config(overrides=["data.classes=[&a b, *a]"])


@pytest.mark.parametrize("text", ["null", "Null", "~", ""])
def test_nothing_is_written_as_in_yaml(text):
    assert load_config(overrides=["data.path=x", f"data.path={text}"]).data.path is None


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("+7", 7), ("08", 8), ("1e3", None), ("0x10", None),
                                              ("1_000", None), ("1:30", None), ("'5'", None)])  # fmt: skip
def test_whole_numbers_are_decimal(tmp_path, text, number):
    for read in (lambda: load_config(overrides=[f"train.steps={text}"]),
                 lambda: load_config(write(tmp_path, f"train: {{steps: {text}}}"))):  # fmt: skip
        if number is None:
            with pytest.raises(ValueError, match=r"train\.steps=.* has the wrong type"):
                read()
        else:
            assert read().train.steps == number


def test_comments_stand_in_files_alone(tmp_path):
    assert load_config(write(tmp_path, "train: {steps: 5}  # few")).train.steps == 5
    for override in ("train.steps=5 # few", "evaluate.sizes=[32] # one"):
        with pytest.raises(ValueError, match="holds a comment"):
            load_config(overrides=[override])


def test_a_number_where_a_file_should_hold_text_is_refused(tmp_path):
    for text in ("data: {path: 010}", "data: {path: true}", "data: {root: 1.5}"):
        with pytest.raises(ValueError, match="it is no text; write it in quotes"):
            load_config(write(tmp_path, text))


def test_saved_config_is_read_back_equal_and_holds_every_key(tmp_path):
    config = load_config(CONFIGS / "rope_experiment.yaml", ["train.lr=3e-05", "evaluate.sizes=[32, 48x96]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert set(dict(leaves(OmegaConf.to_container(OmegaConf.load(tmp_path / "saved.yaml"))))) == set(ALL)


def test_a_typo_in_code_raises():
    with pytest.raises(AttributeError):
        _ = default_config().train.step  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", sorted(ALL))
def test_every_key_can_be_set_and_only_that_key_changes(key):
    config = default_config()
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.125, str: lambda v: v + "x"}
    before = ALL[key]
    value = 1 if before is None and "theta" not in key and "path" not in key else before
    value = [0.5] * 3 if key in ("data.mean", "data.std") else value
    value = "x" if key in ("data.path", "model.act_layer", "train.init_from") else value
    value = [2.0] if key.endswith("theta_per_layer") else value
    value = ["x"] if key == "data.classes" else value
    if before is not None:
        value = [*before, before[-1]] if isinstance(before, list) else other[type(before)](before)
    hjepa.config._set(config, key, value, "test")
    changed = {k: v for k, v in leaves(OmegaConf.to_container(config)) if v != ALL[k]}
    assert changed == {key: value}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.rope.thet=3", "unknown key 'model.rope.thet'; nearest: model.rope.theta"),
        ("theta=3", "nearest: model.rope.theta"),
        ("trian.steps=3", "nearest: train.steps"),
        ("train=3", "it is a section"),
        ("train.steps.x=3", "unknown key"),
        ("=3", "unknown key ''"),
        ("train.steps", "is not of the form key=value"),
        ("train.steps=many", "train.steps='many' has the wrong type"),
        ("train.steps=1.5", "has the wrong type"),
        ("train.steps=true", "has the wrong type"),
        ("train.steps=null", "has the wrong type"),
        ("train.steps=[1]", "has the wrong type"),
        ("data.crop_scale=0.5", "has the wrong type"),
        ("data.flip=3.5", "has the wrong type"),
        ("data.mean=[0.5, 0.5]", "must be 3 numbers"),
        ("data.std=[0.5, 0.5, 0]", "data.std=0.0 must be above 0"),
        ("data.path=${oc.env:HOME}", "never evaluated"),
        ("evaluate.sizes=[32, '${x}']", "never evaluated"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.lr=0", "train.lr=0.0 must be above 0"),
        ("train.lr=.nan", "train.lr=nan must be a finite number"),
        ("train.lr=.inf", "must be a finite number"),
        ("train.steps=1" + "0" * 400, "must be a finite number, at most"),
        ("data.image_size=1" + "0" * 400, "must be a finite number, at most"),
        ("model.rope.theta=-1", "must be above 0"),
        ("model.rope.theta_per_layer=[1, -1]", "must be above 0"),
        ("model.rope.fraction=1.5", "must be between 0 and 1"),
        ("model.rope.jitter=0.5", "must be at least 1"),
        ("model.rope.kind=axail", "must be one of axial, mixed, fixed; nearest: axial"),
        ("model.rope.strategy=extrapolat", "nearest: extrapolate"),
        ("data.name=fashion-mnist", "nearest: fashion_mnist"),
        ("loss.kind=l1", "must be one of smooth_l1, mse"),
        ("data.image_size=60", "60 is not a multiple of the patch, 8 pixels; nearest: 64"),
        ("data.image_size=3", "nearest: 8"),
        ("data.image_size=48x96", "one side of a square in pixels, such as 48; evaluate.sizes=[48x96] reads"),
        ("data.image_size='64'", "one side of a square in pixels, such as 64"),
        ("data.image_size=[48, 96]", "one side of a square in pixels, such as 48; evaluate.sizes=[48x96] reads"),
        ("model.in_chans=1", "pictures have three channels, grey ones are repeated"),
        ("data.in_chans=1", "pictures have three channels, grey ones are repeated"),
        ("data.train_scales=[1.0, 0]", "data.train_scales=0.0 must be above 0"),
        ("data.classes=[{a: b}]", "data.classes=[{'a': 'b'}] must be a list of names"),
        ("data.classes=a", "data.classes='a' has the wrong type"),
        ("data.crop_scale=[0.5, {a: 1}]", "data.crop_scale=[0.5, {'a': 1}] must be a list of numbers"),
        ("data.train_scales=[]", "data.train_scales=[] must name one scale or more"),
        ("model.num_heads=5", "model.embed_dim=96 is not divisible by model.num_heads=5"),
        ("model.predictor.num_heads=5", "model.predictor.embed_dim=96 is not divisible"),
        ("data.crop_scale=[0.5]", "must be two numbers"),
        ("data.crop_scale=[0.9, 0.5]", "smallest <= largest"),
        ("masks.target_scale=[0, 0.5]", "0 < smallest"),
        ("masks.context_scale=[0.5, 1.5]", "largest <= 1"),
        ("train.ema_start=1.0 ", None),
        ("train.ema_end=0.5", "train.ema_end=0.5 must not be below train.ema_start=0.99"),
        ("train.accumulate=3", "train.batch_size=64 is not divisible by train.accumulate=3"),
        ("model.level_weights=[]", "must be 1 to 4 numbers"),
        ("model.level_weights=[0, 0]", "not all 0"),
        ("evaluate.sizes=[a]", "image size 'a' is not understood"),
        ("evaluate.placements=0", "evaluate.placements=0 must be between 1 and 1000"),
        ("evaluate.placements=2", "evaluate.placements=2: pictures have one place each unless data.moved=true"),
    ],
)
def test_wrong_overrides_get_one_line_with_the_right_thing(override, reason):
    if reason is None:
        assert load_config(overrides=[override])
        return
    with pytest.raises(ValueError) as caught:
        load_config(overrides=[override])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_one_large_view_without_another_to_be_compared_with_is_refused():
    one = ["objective=views", "views.large=1", "loss.teacher=true"]
    for objective in ("views", "both"):
        with pytest.raises(ValueError, match=r"^views.large=1 has no other large view for .*; nearest: views.large=2$"):
            load_config(None, [*one, f"objective={objective}"])
    for other in ("views.large=2", "loss.teacher=false", "loss.view_loss=variance", "objective=masks"):
        load_config(None, [*one, other])


def test_a_variance_of_one_image_is_refused():
    one = ["loss.regularizer=variance", "loss.regularizer_weight=0.3", "train.batch_size=4", "train.accumulate=4"]
    what = r"^train.batch_size=4 in train.accumulate=4 parts: .*variance needs 2 or more each; .*train.batch_size=8$"
    for words in (one, [*one, "objective=labels", "views.large=1"]):
        with pytest.raises(ValueError, match=what):
            load_config(None, words)
    for other in ("train.accumulate=2", "objective=labels"):
        load_config(None, [*one, other])
    load_config(None, [*one[:1], "loss.regularizer=sketched_gaussian", *one[1:]])


def test_a_retired_key_of_an_older_run_is_read_unless_it_asks_for_something_else(tmp_path):
    assert load_config(write(tmp_path, "loss: {views_weight: 1.0}")) == load_config()
    with pytest.raises(ValueError, match=r"loss.views_weight=0.5 is no longer a key; what is done is .*=1.0"):
        load_config(write(tmp_path, "loss: {views_weight: 0.5}"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- 1", "the file must hold keys with values"),
        ("5", "the file must hold keys with values"),
        ("model: 3", "some.yaml: model must hold keys with values, not 3"),
        ("model: {rope: [1]}", "model.rope must hold keys"),
        ("model: {ropee: {theta: 3}}", "unknown key 'model.ropee'; nearest: model.rope"),
        ("train: {stepz: 3}", "some.yaml: unknown key 'train.stepz'; nearest: train.steps"),
        ("1: 2", "unknown key '1'"),
        ("'a b': 2", "unknown key 'a b'"),
        ("'train..steps': 2", "unknown key"),
        ("train.steps: 2", None),
        ("train: {steps: '${oc.env:HOME}'}", "never evaluated"),
        ("train: {steps: 1, steps: 2}", "doubled key 'steps'"),
    ],
)
def test_wrong_files_are_named_with_the_key(tmp_path, text, reason):
    path = write(tmp_path, text)
    if reason is None:
        assert load_config(path).train.steps == 2
        return
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_image_size_follows_the_encoder_types_own_patch():
    with pytest.raises(ValueError, match="multiple of the patch, 16 pixels"):
        load_config(overrides=["model.patch_size=null", "data.image_size=72"])
    load_config(overrides=["model.patch_size=null", "model.encoder_type=patch0"])  # the name is timm's to refuse


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["${x}", "32", "no", [1], [0.5, 1.0], {"a": 1}, {}, [], 10**400, 10**30, "axial", ["48x96"], [[1, 2]]]
)  # fmt: skip
NAMES = st.sampled_from([*ALL, *(k.split(".")[0] for k in ALL), "model.rope"]) | st.text(max_size=8)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=2), max_size=3))
def test_any_tree_gives_a_config_or_a_value_error_of_one_line(tree):
    config = default_config()
    try:
        hjepa.config._merge(config, tree, "fuzz")
        hjepa.config.check_config(config)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert OmegaConf.to_yaml(config, resolve=False)


def test_every_field_says_what_it_is():
    lines = Path(hjepa.config.__file__).read_text().splitlines()

    def check(section):
        for field in fields(section):
            if is_dataclass(field.type):
                check(field.type)
            else:
                own = [line for line in lines if line.startswith(f"    {field.name}: ")]
                assert own and all("  # " in line for line in own), field.name

    check(Config)
