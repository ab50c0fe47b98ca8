"""Compiled and exported encoders: one graph without breaks, every later grid for free, the same numbers in ONNX."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODES, build_encoder, noisy, pictures
from torch._dynamo.testing import CompileCounter

LATER = [(24, 24), (20, 20), (40, 12), (12, 40)]  # after a few sizes have told the compiler that sizes vary
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"use_rope": False},
    "hybrid": {},
    "ntk_by_parts": {"rope": {"strategy": "ntk_by_parts"}, "use_absolute": False},
    "mixed": {"rope": {"kind": "mixed"}, "use_absolute": False},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_one_graph_serves_every_grid_without_a_break(name: str) -> None:
    encoder, counter = noisy(build_encoder(vit={"depth": 1}, **VARIANTS[name])), CompileCounter()
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)
    for size in [(16, 16), (16, 24), (32, 8), (28, 28)]:
        torch.testing.assert_close(compiled(pictures(*size)), encoder(pictures(*size)), atol=1e-5, rtol=1e-4)
    warm = counter.frame_count
    for size in LATER:
        torch.testing.assert_close(compiled(pictures(*size)), encoder(pictures(*size)), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == warm, "a new grid compiled the encoder once more"


@torch.no_grad()
def test_compiled_encoder_drops_tokens_and_follows_a_change_of_strategy() -> None:
    encoder = noisy(build_encoder(vit={"depth": 1}))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    index = torch.tensor([[1, 6, 7], [0, 3, 15]])
    torch.testing.assert_close(compiled(pictures(), index), encoder(pictures(), index), atol=1e-5, rtol=1e-4)
    for strategy in ("extrapolate", "interpolate"):
        encoder.rope.strategy = strategy
        expected = encoder(pictures(32))
        torch.testing.assert_close(compiled(pictures(32)), expected, atol=1e-5, rtol=1e-4)


def test_compiled_gradients_are_those_of_the_eager_encoder() -> None:
    encoder = noisy(build_encoder(vit={"depth": 1}, rope={"learnable": True}))
    grads = []
    for call in (encoder, torch.compile(encoder, fullgraph=True, backend="aot_eager")):
        encoder.zero_grad()
        call(pictures()).square().mul(torch.linspace(0, 1, 16)).sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_generated_code_gives_the_same_features_on_two_grids() -> None:
    encoder = noisy(build_encoder(vit={"depth": 1}, use_absolute=False))
    compiled = torch.compile(encoder, fullgraph=True)
    for size in [(16, 16), (8, 24)]:
        torch.testing.assert_close(compiled(pictures(*size)), encoder(pictures(*size)), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exported_encoder_agrees_in_onnxruntime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = noisy(build_encoder((12, 20), rope={"strategy": "interpolate"}))
    program = torch.onnx.export(encoder, (pictures(12, 20),), dynamo=True, verbose=False)
    program.save(tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(9))
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), encoder(images), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_rope", [False, True])
@torch.no_grad()
def test_an_exported_encoder_takes_any_batch(use_rope: bool) -> None:
    encoder = noisy(build_encoder(use_rope=use_rope))
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(encoder, (pictures(),), dynamic_shapes={"images": {0: batch}}).module()
    for count in (1, 2, 5):
        images = pictures(batch=count)
        torch.testing.assert_close(program(images), encoder(images), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_rope", [False, True])
@torch.no_grad()
def test_an_encoder_in_onnx_takes_any_batch(tmp_path: Path, use_rope: bool) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder, batch = noisy(build_encoder(use_rope=use_rope)), torch.export.Dim("batch", max=64)
    shapes = {"images": {0: batch}}
    program = torch.onnx.export(encoder, (pictures(),), dynamo=True, verbose=False, dynamic_shapes=shapes)
    program.save(tmp_path / "e.onnx")
    session = runtime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = pictures(batch=count)
        (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), encoder(images), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_rope", [False, True])
def test_a_traced_encoder_gives_the_same_features_and_gradients(use_rope: bool) -> None:
    encoder = noisy(build_encoder(use_rope=use_rope))
    traced = torch.jit.trace(encoder, pictures())
    grads = []
    for call in (encoder, traced):
        encoder.zero_grad()
        call(pictures()).square().mul(torch.linspace(0, 1, 16)).sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("use_absolute", "use_rope"), MODES)
def test_shapes_can_be_had_on_the_meta_device(use_absolute: bool, use_rope: bool) -> None:
    encoder = build_encoder(use_rope=use_rope, use_absolute=use_absolute).to("meta")
    assert encoder(pictures().to("meta")).shape == (2, 17, 16)
