"""benchmarks/gpu.py on a machine without a GPU: refuses to measure, and runs whole at tiny shapes."""

import json

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    out, err = capsys.readouterr()
    assert "no CUDA device" in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke run is that of a CPU")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # torch's, of a step that changes nothing in place
@pytest.mark.parametrize("section", ["rotation", "step", pytest.param("compile", marks=pytest.mark.slow), "fsdp"])
def test_a_smoke_run_writes_numbers_that_call_themselves_smoke(section, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FULL", {})  # tiny shapes alone
    assert gpu.main(["--smoke", "--only", section, "--out", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["environment"]["smoke"] and found["environment"]["device"] == "cpu"
    assert {entry["section"] for entry in found["entries"]} == {section}
    rows = [row for entry in found["entries"] for row in entry.get("rows", {}).values()]
    assert rows and all(row["seconds"]["median"] > 0 for row in rows)


def test_the_step_that_is_timed_trains_and_moves_the_target():
    step = gpu.Step(gpu.Bench("cpu", smoke=True), True)
    encoders = step.unwrapped.context_encoder, step.unwrapped.target_encoder
    before = [[p.clone() for p in encoder.parameters()] for encoder in encoders]
    step()
    for encoder, old in zip(encoders, before, strict=True):
        assert any(not torch.equal(p, q) for p, q in zip(encoder.parameters(), old, strict=True))
    assert all(p.grad is None for p in step.model.parameters())


def test_sections_are_those_of_the_docstring_and_nothing_is_committed_yet():
    assert all(f"    {name} " in (gpu.__doc__ or "") for name in gpu.SECTIONS)
    assert gpu.OUT.exists() or "Nothing has been measured with it yet" in (gpu.__doc__ or "")
