"""The benchmark: ratios survive a machine that changes speed, peers do the same work, files say what was measured."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peers, report, rotating, run, timing, views
from benchmarks.__main__ import main
from benchmarks.rotating import saved_bytes
from hjepa.nn.losses import contrastive_loss

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks" / "results.json"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    if not COMMITTED.exists():
        pytest.skip("benchmarks/results.json is not there yet: make bench writes it")
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick() -> tuple[dict[str, Any], float]:
    """The results of a quick run and the seconds of processor time it took."""
    start = time.process_time()
    measured = run.rounded(run.run(quick=True, say=lambda line: None))
    return measured, time.process_time() - start


def test_ratio_is_taken_within_a_round_so_a_slowing_machine_does_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = itertools.count()
    slowness = (1.0, 3.0, 9.0)  # of the machine, round by round; a round has two samples, as the calibration before it
    monkeypatch.setattr(timing, "sample", lambda call, clock, repeats: call() * slowness[next(samples) // 2 % 3])
    rows = timing.compare("x", "x", {"base": lambda: 1.0, "double": lambda: 2.0}, rounds=9)["rows"]
    assert rows["base"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows["double"]["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert rows["double"]["seconds"] == {"median": 6.0, "low": 2.0, "high": 18.0}


def test_whole_encoders_are_timed_in_fresh_processes_and_each_one_s_ratio_is_kept() -> None:
    assert len({os.getpid(), *timing.in_fresh_processes(2, os.getpid)}) == 3
    processes = [{"base": [1.0, 1.0, 2.0], "other": [1.1, 1.1, 2.2]}, {"base": [1.0] * 3, "other": [1.4, 1.2, 1.3]}]
    row = timing.entry("x", "x", processes)["rows"]["other"]
    assert row["processes"] == pytest.approx([1.1, 1.3])
    assert row["ratio"]["median"] == pytest.approx(1.15) and row["seconds"]["median"] == pytest.approx(1.25)
    assert "by process 1.100, 1.300" in "\n".join(report._timed_rows([timing.entry("x", "x", processes)]))


def test_variants_take_turns_at_going_first_and_threads_are_put_back() -> None:
    calls: list[str] = []
    before = torch.get_num_threads()
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timing.compare("x", "x", variants, rounds=3, shortest=0, thread_count=before + 1)
    assert "".join(calls[-9:]) == "abcbcacab"
    assert torch.get_num_threads() == before


def test_an_aim_is_reached_up_to_its_bound() -> None:
    assert timing.met({"at_most": 1.03, "at_least": None}, 1.03) and timing.met({"at_most": None, "at_least": 0.6}, 0.6)
    assert not timing.met({"at_most": 1.03, "at_least": None}, 1.04)
    assert timing.met({"at_most": None, "at_least": None}, 7.0) is None


def test_saved_bytes_counts_a_storage_once_and_no_parameter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight  # saves x (and the weight)
            return (y * y.view(2, 4)).sin()  # saves y twice, and the product

    assert saved_bytes(Twice(), torch.ones(2, 4)) == 3 * 2 * 4 * 4


def test_the_peers_do_the_work_that_is_timed() -> None:
    turns = peers.rotations(4, 2, 8, torch.float32)
    qkv = torch.randn(2, 16, 3 * 2 * 8)
    found = {name: turn(qkv.clone()) for name, turn in turns.items()}
    for name in ("hjepa, in place", "hjepa, out of place", "rotary-embedding-torch", "textbook"):
        for part, other in zip(found[name], found["timm"], strict=True):
            torch.testing.assert_close(part, other, atol=1e-5, rtol=0)
    halves = qkv.unflatten(-1, (6, 4, 2)).transpose(-1, -2).flatten(2)  # DINOv3 pairs (i, i + D/2)
    q, k, _ = turns["transformers DINOv3"](halves)
    for part, other in zip((q, k), found["timm"][:2], strict=True):
        torch.testing.assert_close(part.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2), other, atol=1e-5, rtol=0)
    layers = peers.attention_layers(4, 2, 8, torch.float32)
    x = torch.randn(2, 17, 16)
    states = [layers[name].state_dict() for name in ("hjepa", "textbook", "rotary-embedding-torch")]  # type: ignore[attr-defined]
    layers["textbook"].load_state_dict(states[0])  # type: ignore[attr-defined]
    layers["rotary-embedding-torch"].attn.load_state_dict(states[0])  # type: ignore[attr-defined]
    for name in ("textbook", "rotary-embedding-torch"):
        torch.testing.assert_close(layers[name](x), layers["hjepa"](x), atol=1e-5, rtol=0)


def test_the_peers_of_the_recipe_encode_as_many_tokens_by_as_many_weights(tmp_path: Path) -> None:
    """What enters the first block, and the number of weights but for the position embedding."""
    images = views.pictures_in(tmp_path, 8)
    config = views.config_of(rotating.Setup(quick=True), tmp_path)
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def listen(name: str, vit: Any) -> None:
        shapes[name] = []
        vit.blocks[0].register_forward_pre_hook(lambda module, args: shapes[name].append(tuple(args[0].shape)))

    with views.package(config) as own:
        assert views.Plain(config, images, False, fused=False).vit.blocks[0].attn.fused_attn is False
        plain = views.Plain(config, images, half=False)
        listen("hjepa", own.unwrapped.context_encoder.vit)
        listen("plain loop", plain.vit)
        before = plain.vit.patch_embed.proj.weight.clone()
        own.step(0, own.feed(), logging=False)
        plain()
    assert shapes["hjepa"] == shapes["plain loop"] == [(8, 21, 24), (4, 16, 24)]
    assert not torch.equal(before, plain.vit.patch_embed.proj.weight)
    assert not torch.equal(before, plain.average.module.patch_embed.proj.weight)
    mine, theirs = (sum(p.numel() for p in vit.parameters()) for vit in (own.unwrapped.context_encoder, plain.vit))
    assert theirs - mine == plain.vit.pos_embed.numel() == 64 * 24
    assert [p.shape for p in plain.projector.parameters()] == [p.shape for p in own.unwrapped.projector.parameters()]


def test_the_views_that_are_timed_alone_are_those_of_the_step(tmp_path: Path) -> None:
    """All of them, bit for bit, of every step that makes its own."""
    views.pictures_in(tmp_path, 8)
    with views.package(views.config_of(rotating.Setup(quick=True), tmp_path)) as run:
        make, whole = views.views_alone(run), next(run.feed())
        first, second = make(), make()
        for name in ("images", "small"):
            assert torch.equal(first[name], whole[name]) and not torch.equal(first[name], second[name])
        assert first["images"].shape[0] == 8 and first["small"].shape[0] == 4


def test_the_plain_loop_cuts_the_same_crops_and_has_the_same_loss(tmp_path: Path) -> None:
    z = torch.randn(3 * 5, 8)
    torch.testing.assert_close(views.contrastive(z, 5, 0.1), contrastive_loss(z.unflatten(0, (3, 5)), None, 0.1))
    ramp = torch.linspace(0, 1, 128).expand(200, 3, 128, 128)  # brightness is the place across
    plain = views.Plain(views.config_of(rotating.Setup(quick=True), tmp_path), ramp, half=False)
    plain.mean, plain.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    plain.config.views.color_jitter = plain.config.views.grey = 0.0
    cut = plain.view(ramp, 32, [0.25, 0.25])
    width = (cut[..., -1] - cut[..., 0])[:, 0, 0] * 32 / 31
    assert 0.4 < (width < 0).float().mean() < 0.6  # mirrored
    assert 0.43 < width.abs().min() < 0.46 and 0.55 < width.abs().max() < 0.58  # sqrt(.25 * 3 / 4), sqrt(.25 * 4 / 3)
    assert cut.min() < 0.05 and cut.max() > 0.95


def test_a_quick_run_measures_every_section_in_under_twenty_seconds(quick: tuple[dict[str, Any], float]) -> None:
    measured, seconds = quick
    assert seconds < 20
    assert {entry["section"] for entry in measured["entries"]} == set(run.SECTIONS) == set(report.TITLES)
    (rows,) = (e["rows"] for e in measured["entries"] if e["section"] == "views" and e["threads"] == 1)
    assert next(iter(rows)) == "hjepa" and rows["its views"]["at_most"] == 0.1 and rows["plain loop"]["at_least"] == 1
    check_numbers(measured)


def check_numbers(results: dict[str, Any]) -> None:
    for entry in results["entries"]:
        for row in entry.get("rows", {}).values():
            for numbers in (row["seconds"], row["ratio"]):
                assert 0 < numbers["low"] <= numbers["median"] <= numbers["high"]


def test_table_headline_and_figure_can_be_made_of_any_run(quick: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    measured = json.loads(json.dumps(quick[0]))
    report.write(measured, tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text == report.markdown(measured) and "QUICK RUN" in text and (tmp_path / "results.png").stat().st_size > 0
    assert all(f"## {title}" in text for title in report.TITLES.values())
    assert report.percent(report.comparison(measured, "ViT-S, float32, forward")) in report.headline(measured)
    left, right = report.figure(measured).axes
    assert len(left.get_yticklabels()) == len(report.section(measured, "encoders"))
    assert {label.get_text() for label in right.get_yticklabels()} == {"hjepa", *peers.PEERS}


def test_committed_results_are_a_full_run_of_this_code_with_conditions(
    results: dict[str, Any], quick: tuple[dict[str, Any], float]
) -> None:
    env = results["environment"]
    assert not env["quick"] and env["processor"] and env["cores"] and env["load_before"] is not None
    assert set(env["packages"]) == set(run.PACKAGES)
    assert [name for name in run.SECTIONS if not report.section(results, name)] == []
    check_numbers(results)
    single = [[e for e in r["entries"] if "2 threads" not in e["title"]] for r in (quick[0], results)]
    now, then = (sorted(e["section"] for e in entries if e.get("threads", 1) == 1) for entries in single)
    assert now == then, "benchmarks/results.json is older than the code: run make bench"


def test_table_and_readme_quote_the_committed_results(results: dict[str, Any]) -> None:
    assert (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8") == report.markdown(results)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert {line for line in readme if line.startswith("| ViT-")} <= set(report.headline(results).splitlines())


def test_an_unknown_section_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "rotations"]) == 2
    assert "'rotations'" in capsys.readouterr().err and main(["--only", "nothing"]) == 2


@pytest.mark.slow
def test_the_benchmark_of_feeding_runs_and_leaves_nothing(tmp_path: Path) -> None:
    pictures, out = tmp_path / "new/pictures", tmp_path / "feeding.json"
    words = ["--folder", str(pictures), "--links", "300", "--files", "200", "--steps", "1", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.feeding", *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    lines = said.stdout.splitlines()
    assert [line.split(" {")[0] for line in lines[:3]] == ["made", "opened cold", "opened again"]
    assert '"pictures": 210' in lines[2] and "2 workers, waited" in said.stdout
    assert not list(pictures.iterdir())
    committed = json.loads((Path(__file__).parents[1] / "benchmarks/feeding.json").read_text())
    assert json.loads(out.read_text()).keys() == committed.keys()
