"""What the rotation, a training step, compiling and cutting the parameters cost on a CUDA machine.

    python -m benchmarks.gpu                              one GPU; writes benchmarks/gpu.json
    torchrun --nproc_per_node 8 -m benchmarks.gpu         the same, 'fsdp' with the parameters cut over eight GPUs
    python -m benchmarks.gpu --only rotation --out FILE   some sections, another file
    python -m benchmarks.gpu --smoke                      tiny shapes, on a CPU where there is no GPU: a check only

Nothing has been measured with it yet: no GPU was at hand. That it runs is tested on a CPU, with --smoke.

    rotation   attention layer and encoder, RoPE on against off, float32 and bfloat16 (there also without the kernel of
               hjepa/nn/fused.py), forward and backward
    step       a whole training step in bfloat16, RoPE on against off, with pictures per second and peak memory
    compile    the encoder under torch.compile against eager, the seconds that compiling takes, at two image sizes
    fsdp       a step with every block cut over the processes against the uncut model, and the peak memory of each

Calls end in a synchronisation and are timed side by side (`timing.py`): only ratios of one run are to be compared.

Not covered: DDP and its overlap, loading of pictures, CUDA graphs, other accelerators.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from timm.layers import Attention
from torch import Tensor, nn

from benchmarks.timing import compare, value
from hjepa.build import build_model, draw_masks
from hjepa.config import Config, load_config
from hjepa.files import write_whole
from hjepa.nn import fused
from hjepa.nn.attention import RoPEAttentionWrapper
from hjepa.nn.encoders import create_encoder
from hjepa.nn.rope import VisionRoPE2D
from hjepa.train.optimizer import build_optimizer
from hjepa.train.sharding import prepare

OUT = Path(__file__).parent / "gpu.json"
FULL = {"model": "vit_base_patch16_224", "depth": None, "sizes": (224, 384), "batch": 64, "rounds": 9}
SMOKE = {"model": "vit_tiny_patch16_224", "depth": 1, "sizes": (96, 64), "batch": 2, "rounds": 2}
Entry = dict[str, Any]


class Bench:
    """Where and at which shapes to measure; `smoke` shrinks everything."""

    def __init__(self, device: str, smoke: bool) -> None:
        self.device, self.smoke, shapes = torch.device(device), smoke, SMOKE if smoke else FULL
        self.model, self.depth = str(shapes["model"]), shapes["depth"]
        self.sizes, self.batch, self.rounds = shapes["sizes"], shapes["batch"], shapes["rounds"]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compare(self, section: str, title: str, calls: dict[str, Callable[[], Any]]) -> Entry:
        """The calls against the first of them, each waited for, by the wall clock."""

        def waited(call: Callable[[], Any]) -> Callable[[], None]:
            return lambda: (call(), self.wait())[1]

        variants = {name: waited(call) for name, call in calls.items()}
        short, threads = (0.0, 1) if self.smoke else (0.1, 2)  # with two threads, the clock is the wall's
        return compare(section, title, variants, rounds=self.rounds, thread_count=threads, shortest=short)

    def peak(self, call: Callable[[], Any]) -> float:
        """MiB that are allocated at the peak of a call; 0 where there is no GPU to ask."""
        if self.device.type != "cuda":
            call()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**20

    def autocast(self, dtype: torch.dtype) -> Any:
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def forward_backward(self, module: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
        def run() -> None:
            with self.autocast(dtype):
                out = module(x)
            out.float().square().mean().backward()

        return run

    def encoder(self, use_rope: bool) -> nn.Module:
        torch.manual_seed(0)
        pixels = self.sizes[0]
        options: dict[str, Any] = {"vit": {"depth": self.depth}} if self.depth else {}
        options |= {"use_rope": use_rope, "rope_theta": 100.0, "use_absolute": not use_rope}
        return create_encoder(self.model, pixels, **options)[0].to(self.device).train()

    def config(self, use_rope: bool) -> Config:
        return load_config(None, [
            "objective=masks", f"data.image_size={self.sizes[0]}", f"model.encoder_type={self.model}",
            *(f"model.{name}=null" for name in ("patch_size", "embed_dim", "num_heads", "act_layer")),
            f"model.depth={self.depth or 'null'}", f"train.batch_size={self.batch}", "model.level_weights=[1.0]",
            f"model.rope.use_rope={use_rope}", f"model.use_absolute={not use_rope}", "model.rope.theta=100",
        ])  # fmt: skip


class Step:
    """A model, its optimiser and a batch of noise on the device; a call is one training step."""

    def __init__(self, bench: Bench, use_rope: bool, *, cut: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        config, self.bench, self.dtype = bench.config(use_rope), bench, dtype
        model: Any = build_model(config).to(bench.device).train()
        grid, self.unwrapped = model.context_encoder.grid_size, model
        if cut:
            with _environment(ACCELERATE_USE_FSDP="true"):
                accelerator = Accelerator(cpu=bench.device.type == "cpu")
                model, self.optimizer = prepare(accelerator, model, lambda: build_optimizer(model))
        else:
            self.optimizer = build_optimizer(model)
        self.model = model
        self.images = torch.randn(bench.batch, 3, bench.sizes[0], bench.sizes[0], device=bench.device)
        masks = draw_masks(config, grid, 0)
        assert masks is not None
        self.masks, self.count = masks.to(bench.device), 0

    def __call__(self) -> None:
        with self.bench.autocast(self.dtype):
            loss = self.model(self.images, self.masks).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.unwrapped.update_target(self.count)
        self.count += 1


def rotation(bench: Bench) -> Iterator[Entry]:
    """RoPE on against off: one attention layer of the model's width, and the whole encoder."""
    plain = bench.encoder(False)
    side, block = plain.vit.patch_embed.grid_size[0], plain.vit.blocks[0].attn
    width, heads = plain.embed_dim, block.num_heads
    rope = VisionRoPE2D(width // heads, num_patches_per_side=side, theta=100.0)
    layers = {
        "off": Attention(width, heads, qkv_bias=True),
        "on": RoPEAttentionWrapper(Attention(width, heads, qkv_bias=True), rope, num_prefix_tokens=1),
    }
    encoders = {"off": plain, "on": bench.encoder(True)}
    tokens = torch.randn(bench.batch, 1 + side**2, width, device=bench.device)
    images = torch.randn(bench.batch, 3, bench.sizes[0], bench.sizes[0], device=bench.device)
    for dtype in (torch.float32, torch.bfloat16):
        for what, modules, x in (("attention layer", layers, tokens), ("encoder", encoders, images)):
            calls = {k: bench.forward_backward(m.to(bench.device), x, dtype) for k, m in modules.items()}
            if dtype == torch.bfloat16:
                calls["on, not fused"] = _unfused(calls["on"])
            yield bench.compare("rotation", f"{what}, {str(dtype)[6:]}, forward + backward", calls)


def _unfused(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with mock.patch.object(fused, "usable", return_value=False):
            call()

    return run


def step(bench: Bench) -> Iterator[Entry]:
    """A training step, RoPE on against off."""
    steps = {"off": Step(bench, False), "on": Step(bench, True)}
    entry = bench.compare("step", f"{bench.model}, {bench.sizes[0]} px, batch {bench.batch}", dict(steps))
    yield entry
    for name, call in steps.items():
        yield value("step", f"pictures, RoPE {name}", bench.batch / entry["rows"][name]["seconds"]["median"], "1/s")
        yield value("step", f"peak memory, RoPE {name}", bench.peak(call), "MiB")


def compiled(bench: Bench) -> Iterator[Entry]:
    """torch.compile against eager; `dynamic` serves both image sizes with one graph."""
    encoder = bench.encoder(True).eval()
    fast = torch.compile(encoder, dynamic=True)
    with torch.no_grad():
        for pixels in bench.sizes:
            images = torch.randn(bench.batch, 3, pixels, pixels, device=bench.device)
            began = time.perf_counter()
            with bench.autocast(torch.bfloat16):
                fast(images)
            bench.wait()
            yield value("compile", f"first call at {pixels} px", time.perf_counter() - began, "s")

            def run(module: Any, images: Tensor = images) -> Callable[[], None]:
                def call() -> None:
                    with torch.no_grad(), bench.autocast(torch.bfloat16):
                        module(images)

                return call

            calls = {"eager": run(encoder), "compiled": run(fast)}
            yield bench.compare("compile", f"encoder with RoPE, {pixels} px, bfloat16, forward", calls)


def fsdp(bench: Bench) -> Iterator[Entry]:
    """A step of the cut model against the whole one; with one process this is what cutting costs by itself."""
    with _processes(bench):
        steps = {name: Step(bench, True, cut=name == "cut", dtype=torch.float32) for name in ("whole", "cut")}
        world = torch.distributed.get_world_size()
        yield bench.compare("fsdp", f"{bench.model}, RoPE on, float32, {world} processes", dict(steps))
        for name, call in steps.items():
            yield value("fsdp", f"peak memory, {name}", bench.peak(call), "MiB")


SECTIONS = {"rotation": rotation, "step": step, "compile": compiled, "fsdp": fsdp}


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _processes(bench: Bench) -> Iterator[None]:
    """The process group of torchrun, or one of this process alone."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with _environment(**({} if "RANK" in os.environ else alone)):
        torch.distributed.init_process_group("nccl" if bench.device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def environment(bench: Bench) -> dict[str, Any]:
    """Conditions that the numbers depend on."""
    found: dict[str, Any] = {"smoke": bench.smoke, "torch": torch.__version__, "device": str(bench.device)}
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {"gpu": properties.name, "memory_mib": properties.total_memory // 2**20, "cuda": torch.version.cuda}
    return found | {"date": time.strftime("%Y-%m-%d"), "processes": int(os.environ.get("WORLD_SIZE", "1"))}


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Time the package on a GPU.")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS), help="some sections")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: a check, not a measurement")
    parser.add_argument("--out", type=Path, help="write the JSON here (default: benchmarks/gpu.json; smoke: nowhere)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        print("benchmarks.gpu: error: no CUDA device here; --smoke checks the script on a CPU", file=sys.stderr)
        return 2
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    bench = Bench(device, options.smoke)
    entries = [entry for name in options.only for entry in SECTIONS[name](bench)]
    out = options.out or (None if options.smoke else OUT)
    if out and os.environ.get("RANK", "0") == "0":
        write_whole(out, json.dumps({"environment": environment(bench), "entries": entries}, indent=1) + "\n")
        print(f"files: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
