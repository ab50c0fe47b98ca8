"""train.mixed_precision=auto, on faked processors: what each is fast in, asked for and not timed."""

import pytest
import torch

from hjepa.inputs import UserError
from hjepa.train import loop


@pytest.mark.parametrize(("has", "chosen"), [("_is_avx512_bf16_supported", "bf16"), ("_is_amx_tile_supported", "bf16"),
                                            ("", "no")])  # fmt: skip
def test_auto_precision_is_what_the_processor_has_instructions_for(monkeypatch, has, chosen):
    for name in loop.BFLOAT16:
        assert callable(getattr(torch.cpu, name))
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert loop.choose_precision("auto") == chosen
    with pytest.raises(UserError, match="mixed_precision=fp16 is for a GPU; nearest on a CPU: bf16"):
        loop.choose_precision("fp16")  # torch would train in float32 without a word
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert loop.choose_precision("fp16") == "fp16"


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "no")])
def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(monkeypatch, has, chosen):
    """The processor beside it has the instructions, which is of no use there."""
    for name in loop.BFLOAT16:
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert loop.choose_precision("auto") == chosen


@pytest.mark.parametrize("asked", ["no", "bf16"])
def test_a_precision_that_is_asked_for_is_what_is_used(monkeypatch, asked):
    for name in loop.BFLOAT16:
        monkeypatch.setattr(torch.cpu, name, lambda: asked == "no")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert loop.choose_precision(asked) == asked
