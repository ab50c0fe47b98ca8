"""train.mixed_precision=auto, on faked processors: what each is fast in, asked for and not timed."""

import pytest
import torch

from hjepa.inputs import UserError
from hjepa.train import loop


@pytest.fixture
def processor(monkeypatch):
    """A processor with some of AMX, AVX512-BF16 and AVX512-FP16, in a machine without a GPU."""

    def fake(*has):
        for name, instructions in (("_is_amx_tile_supported", "amx"), ("_is_avx512_bf16_supported", "bf16")):
            assert callable(getattr(torch.cpu, name))
            monkeypatch.setattr(torch.cpu, name, lambda instructions=instructions: instructions in has)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": "fp16" in has}, raising=False)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    return fake


@pytest.mark.parametrize(("has", "chosen"), [
    (["amx", "bf16", "fp16"], "bf16"), (["amx"], "bf16"),
    (["bf16"], "bf16"),  # AMD
    (["bf16", "fp16"], "no"),  # Intel without AMX, as some virtual machines show it
    (["fp16"], "no"), ([], "no"),
])  # fmt: skip
def test_auto_precision_is_what_the_processor_is_fast_in(monkeypatch, processor, has, chosen):
    processor(*has)
    assert loop.choose_precision("auto") == chosen
    with pytest.raises(UserError, match="mixed_precision=fp16 is for a GPU; nearest on a CPU: bf16"):
        loop.choose_precision("fp16")  # torch would train in float32 without a word
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert loop.choose_precision("fp16") == "fp16"


def test_a_torch_that_cannot_name_all_instructions_goes_by_those_it_can(monkeypatch, processor):
    processor("bf16")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert loop.choose_precision("auto") == "bf16"


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "no")])
def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(monkeypatch, processor, has, chosen):
    """The processor beside it has the instructions, which is of no use there."""
    processor("amx", "bf16")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert loop.choose_precision("auto") == chosen


@pytest.mark.parametrize("asked", ["no", "bf16"])
def test_a_precision_that_is_asked_for_is_what_is_used(processor, asked):
    processor(*(["amx", "bf16"] if asked == "no" else []))
    assert loop.choose_precision(asked) == asked
