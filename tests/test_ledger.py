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


def probe_row(encoder: str, size: int, value: float, seed: int) -> dict[str, object]:
    tags = {"data": "openmoji", "encoder": encoder, "size": size, "seed": seed, "metric": "probe"}
    return tags | {"value": value, "low": value, "high": value, "n": 100}


def transfer(tmp_path: Path, gains: dict[int, list[float]], where: str = "results/sweeps/baseline/table.csv") -> dict:
    """The ledger's row when RoPE is ahead by gains[size][seed] at each size."""
    rows = []
    for size, by_seed in ({64: [0.0, 0.0, 0.0]} | gains).items():
        for seed, gain in enumerate(by_seed):
            rows += [probe_row("absolute, resampled", size, 0.4, seed)]
            rows += [probe_row("rope, interpolated", size, 0.4 + gain, seed)]
            rows += [probe_row("rope, extrapolated", size, 0.0, seed)]
    rows_to_csv(rows, tmp_path / where)
    return ledger.better_transfer(LEDGER["better_transfer"] | {"values": {}, "verdict": ""}, tmp_path)


def test_transfer_is_settled_by_seeds_and_not_by_a_lucky_one(tmp_path: Path) -> None:
    clear = transfer(tmp_path / "a", {32: [0.15, 0.16, 0.15], 128: [0.15, 0.16, 0.15]})
    assert clear["verdict"] == "holds" and clear["values"]["openmoji_128"] == pytest.approx(15.3, abs=0.1)
    assert clear["values"]["openmoji_128_percent"] == pytest.approx(38, abs=1)
    half = transfer(tmp_path / "b", {32: [0.02, 0.01, 0.02], 128: [0.15, 0.16, 0.15]})
    assert half["verdict"] == "holds when tested on openmoji at 128 px"
    assert transfer(tmp_path / "c", {128: [0.3, 0.02, 0.13]})["verdict"] == "not settled yet"  # 15 points, spread wide
    assert transfer(tmp_path / "e", {128: [0.03, 0.02, 0.03]})["verdict"] == "does not hold"
    one = transfer(tmp_path / "d", {128: [0.3]}, "results/tour-openmoji/table.csv")
    assert one["verdict"] == "not settled yet" and "+30.0 points" in ledger.number(one)
    assert ledger.better_transfer(LEDGER["better_transfer"], tmp_path / "none")["verdict"] == "not settled yet"


def test_overhead_holds_where_the_upper_quartile_does() -> None:
    cheap, dear = {"median": 1.01, "low": 1.0, "high": 1.03}, {"median": 1.06, "low": 1.04, "high": 1.09}
    row = LEDGER["forward_overhead"]
    assert ledger.overhead(row, {"ViT-S": cheap})["verdict"] == "holds"
    both = ledger.overhead(row, {"ViT-S": cheap, "ViT-Ti": dear})
    assert both["verdict"] == "holds when the model is ViT-S"
    assert ledger.number(both) == "ViT-S: +1.0 % [+0.0, +3.0]; ViT-Ti: +6.0 % [+4.0, +9.0]"
    assert ledger.overhead(row, {"ViT-Ti": dear})["verdict"] == "does not hold"


def test_overhead_is_read_from_what_the_benchmark_writes(tmp_path: Path) -> None:
    calls = {"RoPE off": lambda: sum(range(2000)), "RoPE on": lambda: sum(range(2000))}
    titles = ["ViT-S, float32, forward", "ViT-S, float32, forward + backward", "ViT-S, bfloat16, forward"]
    entries = [timing.compare("encoders", title, calls, rounds=3, shortest=1e-4) for title in titles]
    wanted = entries[0]["rows"]["RoPE on"]["ratio"] = {"median": 1.01, "low": 1.005, "high": 1.02}
    results = {"environment": {"quick": False}, "entries": entries}
    assert ledger.bench_ratios(results, "forward") == {"ViT-S": wanted}
    assert ledger.bench_ratios(results, "training") == {"ViT-S": entries[1]["rows"]["RoPE on"]["ratio"]}
    (tmp_path / "benchmarks").mkdir()
    for quick, verdict in ((False, "holds"), (True, "not settled yet")):
        results["environment"] = {"quick": quick}
        (tmp_path / "benchmarks" / "results.json").write_text(json.dumps(results))
        assert ledger.forward_overhead(LEDGER["forward_overhead"], tmp_path)["verdict"] == verdict
