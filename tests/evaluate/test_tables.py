"""Rows of results: seed averages, CSV and plain-text tables."""

import pytest

from hjepa.evaluate.results import format_table, rows_from_csv, rows_to_csv, size_pair, size_text, summarise


def _row(value, seed=0, encoder="rope", size=(64, 64), metric="probe", **tags):
    return {
        **tags, "seed": seed, "encoder": encoder, "size": size, "metric": metric,
        "value": value, "low": value - 0.1, "high": value + 0.1, "n": 800,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "pair"),
    [(64, (64, 64)), ("64", (64, 64)), ((32, 48), (32, 48)), ([32, 48], (32, 48)), ("32x48", (32, 48))],
)
def test_sizes_are_height_then_width_however_written(given, pair):
    assert size_pair(given) == pair
    assert size_pair(size_text(pair)) == pair


@pytest.mark.parametrize(
    "wrong", [[None, 3], [float("inf")], 0, -8, "big", (1, 2, 3), [], "8x", 48.5, True, [64, 64.9], b"64"]
)
def test_other_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="not understood"):
        size_pair(wrong)


def test_seed_average_has_students_t_interval():
    """Seeds .50 .52 .57: mean .53, sample deviation .0360555; printed tables give t(2, .975) = 4.302653."""
    (row,) = summarise([_row(0.50, 0), _row(0.52, 1), _row(0.57, 2)])
    half = 4.302653 * 0.0360555 / 3**0.5
    assert row["value"] == pytest.approx(0.53)
    assert [row["low"], row["high"]] == pytest.approx([0.53 - half, 0.53 + half], abs=1e-6)
    assert (row["n"], row["interval"]) == (3, "t") and "seed" not in row


def test_range_interval_is_smallest_and_largest_seed():
    (row,) = summarise([_row(0.50, 0), _row(0.52, 1), _row(0.57, 2)], interval="range")
    assert (row["low"], row["high"], row["interval"]) == (0.50, 0.57, "range")


def test_single_seed_keeps_its_interval_over_pictures():
    (row,) = summarise([_row(0.5)])
    assert (row["value"], row["low"], row["high"], row["n"], row["interval"]) == (
        0.5,
        0.4,
        0.6,
        1,
        "pictures",
    )


def test_settings_are_never_mixed():
    rows = [
        _row(value, seed, encoder, size, metric, data=data)
        for value, encoder, size, metric, data in [
            (0.1, "rope", (64, 64), "probe", "a"),
            (0.2, "none", (64, 64), "probe", "a"),
            (0.3, "rope", (32, 64), "probe", "a"),
            (0.4, "rope", (64, 64), "knn", "a"),
            (0.5, "rope", (64, 64), "probe", "b"),
        ]
        for seed in (0, 1)
    ]
    assert [row["value"] for row in summarise(rows)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert list(summarise(rows)[0])[:4] == ["data", "encoder", "size", "metric"]


def test_repeated_seed_is_refused():
    with pytest.raises(ValueError, match="repeats"):
        summarise([_row(0.1, 0), _row(0.2, 0)])


def test_rows_without_seed_are_refused():
    with pytest.raises(ValueError, match="no 'run'"):
        summarise([_row(0.1)], over="run")


def test_csv_gives_the_same_rows_back_and_is_written_the_same_twice(tmp_path):
    rows = [_row(0.123456, 0, data="openmoji"), _row(0.25, 1, size=(32, 48), data="openmoji")]
    rows[1].pop("n")
    rows_to_csv(rows, tmp_path / "new" / "rows.csv")
    back = rows_from_csv(tmp_path / "new" / "rows.csv")
    assert [set(row) for row in back] == [set(row) for row in rows]
    for row, original in zip(back, rows, strict=True):
        for key, value in original.items():
            assert row[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    rows_to_csv(back, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "new" / "rows.csv").read_bytes()
    head, first = (tmp_path / "again.csv").read_text().splitlines()[:2]
    assert head == "data,seed,encoder,size,metric,value,low,high,n"
    assert first == "openmoji,0,rope,64,probe,0.123456,0.023456,0.223456,800"


def test_table_has_encoders_as_rows_and_sizes_by_area_as_columns():
    rows = [
        _row(0.5, size=(64, 64)),
        _row(0.25, size=(32, 48)),
        _row(0.125, encoder="absolute", size=[32, 32]),
    ]
    rows += [_row(0.9, metric="knn"), _row(0.375, size=(96, 8))]
    assert format_table(rows, "probe").splitlines() == [
        "probe      96x8     32  32x48     64",
        "rope      0.375      -  0.250  0.500",
        "absolute      -  0.125      -      -",
    ]
    assert "0.500 [0.400, 0.600]" in format_table(rows, "probe", interval=True)


def test_table_of_unknown_metric_names_the_known_ones():
    with pytest.raises(ValueError, match="'prob'; the rows have: probe, knn"):
        format_table([_row(0.1), _row(0.1, metric="knn")], "prob")


def test_table_refuses_two_numbers_for_one_cell():
    with pytest.raises(ValueError, match="two rows for 'rope' at size 64"):
        format_table([_row(0.1, 0), _row(0.2, 1)], "probe")
