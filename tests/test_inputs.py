"""Strict YAML: what is refused, what is a number, and that any text gives values or a ValueError."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hjepa.files import FLOAT, LONGEST_FILE, dump_yaml, parse_yaml, read_yaml
from hjepa.inputs import nearest


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 0.001), ("1.0e-3", 0.001), ("-.5", -0.5), ("2E4", 2e4), ("7", 7), ("0.5", 0.5), ("1.", 1.0)),
        *(("010", 10), ("-08", -8), ("0", 0)),
    ],
)
def test_numbers_are_numbers(text, value):
    read = parse_yaml(text, "here")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "2024-01-01", "1e", "e3", "48x96", "<<", "0x10", "0o7",
                                  "0b1", "1_000", "1:30"])  # fmt: skip
def test_words_stay_words(text):
    assert parse_yaml(text, "here") == text


def test_true_and_false_are_the_only_booleans():
    assert parse_yaml("[true, False, TRUE]", "here") == [True, False, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "doubled key 'a' in line 3"),
        ("a: &x [1]\nb: *x", "anchors and aliases are not read in line 1"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [1, 2", "in line 1"),
        ("? [a, b]\n: 1", "a key must be a word"),
        ("a: !!int x", "here: "),
        ("[" * 1200, "nested too deep"),
        ("a: \x00", "here: "),
    ],
)
def test_refuses_with_one_line_that_says_where(text, reason):
    with pytest.raises(ValueError, match="here") as caught:
        parse_yaml(text, "here")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_few_anchors_cannot_unfold_to_gigabytes():
    bomb = "a: &a [x, x]\n" + "\n".join(f"b{i}: &b{i} [*a, *a]" for i in range(30))
    with pytest.raises(ValueError, match="anchors"):
        parse_yaml(bomb, "bomb")


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!?|>'\"%@`#, \n\t01.e~$<"), max_size=40) | st.text(max_size=40))
def test_any_text_gives_values_or_a_value_error(text):
    try:
        parse_yaml(text, "fuzz")
    except ValueError as error:
        assert str(error).startswith("fuzz: ") and "\n" not in str(error)


# PyYAML writes words such as 0E0 bare, which are numbers by the 1.2 rules that are read here
WORDS = st.text().filter(lambda word: not FLOAT.match(word))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS


@given(st.recursive(LEAVES, lambda some: st.lists(some, max_size=3) | st.dictionaries(WORDS, some, max_size=3)))
def test_reads_back_what_yaml_writes(value):
    text = yaml.safe_dump(value)
    try:
        read = parse_yaml(text, "fuzz")
    except ValueError as error:  # the writer uses anchors for the same object named twice
        assert "anchors" in str(error)
        return
    assert read == value


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_reads_back_what_it_writes_itself_whatever_the_words(value):
    assert parse_yaml(dump_yaml(value), "fuzz") == value


@pytest.mark.parametrize("word", ["08", "010", "0E0", "1_0", "1:30", "no", "True", "2024-01-01", "~", "", "<<", "="])
def test_words_that_look_like_something_else_are_written_in_quotes(word):
    assert parse_yaml(dump_yaml({"path": word}), "here") == {"path": word}


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "rope.yaml").write_text("a: 1")
    with pytest.raises(FileNotFoundError, match=r"rop\.yaml does not exist; nearest: .*rope\.yaml"):
        read_yaml(tmp_path / "rop.yaml")


def test_refuses_a_folder_a_long_file_and_bytes(tmp_path):
    with pytest.raises(ValueError, match="a folder"):
        read_yaml(tmp_path)
    (tmp_path / "long.yaml").write_text("#" * (LONGEST_FILE + 1))
    with pytest.raises(ValueError, match="over 1000000 bytes"):
        read_yaml(tmp_path / "long.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="UTF-8"):
        read_yaml(tmp_path / "bytes.yaml")


def test_nearest_looks_at_the_last_part_too():
    known = ["train.lr", "model.rope.theta", "data.image_size"]
    assert nearest("thta", known) == "model.rope.theta"
    assert nearest("model.rop.theta", known) == "model.rope.theta"
    assert nearest("train.image_sise", known) == "data.image_size"
    assert nearest("zzzz", known) == ""
    assert nearest("model.predictr.depth", ["model.depth", "model.predictor.depth"]) == "model.predictor.depth"
