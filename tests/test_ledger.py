"""The ledger of claims: every row is whole, a wrong number is refused, verdicts follow from the numbers."""

import json
from pathlib import Path

import pytest
import test_claims
from test_claims import LEDGER

from benchmarks import ledger, timing
from hjepa.evaluate.results import rows_to_csv


def test_every_claim_has_a_test_of_its_name_and_every_row_is_whole() -> None:
    for name, row in LEDGER.items():
        assert hasattr(test_claims, f"test_{name}"), f"no test for the claim {name}"
        assert set(row) == {"id", "claim", "measured", "values", "number", "verdict", "note", "command"}
        assert any(row["verdict"].startswith(word) for word in ledger.VERDICTS)
        assert ledger.number(row) and "{" not in ledger.number(row)


def test_the_page_is_what_the_ledger_says() -> None:
    page = (test_claims.ROOT / ledger.PAGE).read_text(encoding="utf-8")
    assert page == ledger.page(LEDGER), ledger.STALE
    for row in LEDGER.values():
        assert f"| {row['claim']} | {row['verdict']} |" in page and page.count(f"## {row['claim']}\n") == 1
        assert row["note"] in page and row["command"] in page
        assert all(part in page for part in ledger.number(row).split("; "))
    changed = LEDGER | {"axial": LEDGER["axial"] | {"verdict": "holds"}}
    assert ledger.page(changed) != page


def test_a_wrong_number_does_not_pass() -> None:
    row = {"id": "x", "values": {"count": 150, "error_below": 1e-5}}
    ledger.check(row, {"count": 150, "error_below": 9e-6})
    for wrong in ({"count": 148, "error_below": 0}, {"count": 150, "error_below": 1e-5}, {"count": 150}):
        with pytest.raises(AssertionError, match="x: "):
            ledger.check(row, wrong)


def transfer(tmp_path: Path, gains: dict[int, tuple[float, float, float]]) -> dict:
    """The ledger's row for gains {size: (mean, low, high)} in points over an embedding that is right about 40 %."""
    names = {"comparison": "views", "reader": "knn", "seeds": 6, "p_holm": 0.01}
    found = [names | {"size": size, "mean": m, "low": low, "high": high} for size, (m, low, high) in gains.items()]
    rows = [{"cell": "views", "encoder": "absolute, resampled", "size": size, "metric": "knn", "seed": seed, "value": v}
            for size in gains for seed, v in enumerate((0.38, 0.42))]  # fmt: skip
    rows_to_csv(found, tmp_path / "results" / "primary" / "primary.csv")
    rows_to_csv(rows, tmp_path / "results" / "primary" / "accuracy.csv")
    return ledger.better_transfer(LEDGER["better_transfer"] | {"values": {}, "verdict": ""}, tmp_path)


def test_transfer_is_settled_by_intervals(tmp_path: Path) -> None:
    clear = transfer(tmp_path / "a", {32: (15, 12, 18), 128: (16, 11, 21)})
    assert clear["verdict"] == "holds"
    assert clear["values"] == {"seeds": 6, "comparisons": 2, "half_least": 15, "half_most": 15, "twice_least": 16,
                               "twice_most": 16, "highest": 21, "percent": 40, "percent_high": 52.5,
                               "apart": 2}  # fmt: skip
    half = transfer(tmp_path / "b", {32: (2, 1, 3), 128: (16, 11, 21)})
    assert half["verdict"] == "holds when trained with views at 128 px by knn"
    assert transfer(tmp_path / "c", {32: (2, 1, 3), 128: (9, 7, 11)})["verdict"] == "not settled yet"
    assert transfer(tmp_path / "d", {32: (-3, -4, -2), 128: (2, 1, 3)})["verdict"] == "does not hold"
    assert "-3.0 to -3.0 at half" in ledger.number(transfer(tmp_path / "d", {32: (-3, -4, -2), 128: (2, 1, 3)}))
    assert ledger.better_transfer(LEDGER["better_transfer"], tmp_path / "none")["verdict"] == "not settled yet"


def test_overhead_holds_where_the_upper_quartile_does() -> None:
    cheap, dear = {"median": 1.01, "low": 1.0, "high": 1.03}, {"median": 1.06, "low": 1.04, "high": 1.09}
    row = LEDGER["forward_overhead"]
    assert ledger.overhead(row, {"ViT-S": cheap})["verdict"] == "holds"
    both = ledger.overhead(row, {"ViT-S": cheap, "ViT-Ti": dear})
    assert both["verdict"] == "holds when one leaves out ViT-Ti"
    assert ledger.number(both) == "ViT-S: +1.0 % [+0.0, +3.0]; ViT-Ti: +6.0 % [+4.0, +9.0]"
    assert ledger.overhead(row, {"ViT-Ti": dear})["verdict"] == "does not hold"


def test_overhead_is_read_from_what_the_benchmark_writes(tmp_path: Path) -> None:
    calls = {"RoPE off": lambda: sum(range(2000)), "RoPE on": lambda: sum(range(2000))}
    titles = ["ViT-S, float32, forward", "ViT-S, float32, forward + backward", "ViT-S, bfloat16, forward"]
    entries = [timing.compare("encoders", title, calls, rounds=3, shortest=1e-4) for title in titles]
    title = "ViT-S of 3 layers, bfloat16, forward, compiled"
    entries.append(timing.compare("compiled", title, calls, rounds=3, shortest=1e-4))
    wanted = entries[0]["rows"]["RoPE on"]["ratio"] = {"median": 1.01, "low": 1.005, "high": 1.02}
    narrow = entries[2]["rows"]["RoPE on"]["ratio"] = {"median": 1.02, "low": 1.01, "high": 1.03}
    compiled = entries[3]["rows"]["RoPE on"]["ratio"] = {"median": 1.03, "low": 1.02, "high": 1.04}
    results = {"environment": {"quick": False}, "entries": entries}
    assert ledger.bench_ratios(results, "forward") == {
        "ViT-S": wanted, "ViT-S in bfloat16": narrow, "ViT-S of 3 layers in bfloat16, compiled": compiled,
    }  # fmt: skip
    assert ledger.bench_ratios(results, "training") == {"ViT-S": entries[1]["rows"]["RoPE on"]["ratio"]}
    (tmp_path / "benchmarks").mkdir()
    for quick, verdict in ((False, "holds"), (True, "not settled yet")):
        results["environment"] = {"quick": quick}
        (tmp_path / "benchmarks" / "results.json").write_text(json.dumps(results))
        assert ledger.forward_overhead(LEDGER["forward_overhead"], tmp_path)["verdict"] == verdict
