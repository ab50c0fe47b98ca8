"""Sections on the rotation: encoders with it on and off, memory, the rotation alone, peers, growth, tables.

Each section is a function of a `Setup` that yields entries for results.json, from `timing.compare` and `timing.value`.

Not covered: training steps (`stepping.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.timing import Call, compare, entry, in_fresh_processes, measure, quartiles, sample, threads, value
from hjepa.nn.encoders import ContextEncoder
from hjepa.nn.rope import VisionRoPE2D
from hjepa.nn.rotation import rotate_qkv_

Entry = dict[str, Any]
HEADS, DIM = 6, 64  # ViT-S
PROCESSES = 4  # fresh ones, for each comparison of whole encoders
NAMES = {"ViT-Ti": "vit_tiny_patch16_224", "ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}


@dataclass(frozen=True)
class Setup:
    """Sizes of a run. A quick one is to see that everything works; its numbers mean nothing."""

    quick: bool = False

    def rounds(self, full: int) -> int:
        return 2 if self.quick else full

    @property
    def side(self) -> int:
        """Patches per side of the image."""
        return 4 if self.quick else 14

    @property
    def batch(self) -> int:
        return 2 if self.quick else 8

    @property
    def depth(self) -> int:
        return 1 if self.quick else 12

    @property
    def threads(self) -> tuple[int, ...]:
        """Thread counts measured. On a busy machine two threads wait for each other, so a quick run has one."""
        return (1,) if self.quick else (1, 2)

    @property
    def matrix(self) -> int:
        """Side of the matrices that measure the machine's speed."""
        return 128 if self.quick else 1024

    @property
    def shortest(self) -> float:
        return 0.0 if self.quick else 0.02

    def images(self, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(0)
        return torch.randn(self.batch, 3, 16 * self.side, 16 * self.side).to(dtype)

    def encoder(self, model: str, use_rope: bool, depth: int | None = None) -> ContextEncoder:
        torch.manual_seed(0)
        vit = dict(depth=depth or self.depth)
        return ContextEncoder(NAMES[model], 16 * self.side, use_rope=use_rope, vit=vit).eval()


def forward(module: Callable[[Tensor], Any], x: Tensor) -> Call:
    """A call of the module without gradient."""

    def call() -> Any:
        with torch.no_grad():
            return module(x)

    return call


def forward_backward(module: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterator[nn.Parameter]) -> Call:
    """A call of the module and the gradient of all its parameters (of the input where it wants one)."""
    wanted = [*parameters, *([x] if x.requires_grad else [])]

    def call() -> None:
        out = module(x)
        torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

    return call


def encoders(setup: Setup) -> Iterator[Entry]:
    """RoPE on against off, whole encoders. Off is timm; in bfloat16 on a CPU both attend in float32."""
    single, half = torch.float32, torch.bfloat16
    cases = [  # model, dtype, pass, threads, rounds in each process
        ("ViT-S", single, "forward", 1, 5),
        ("ViT-S", single, "forward", 2, 5),
        ("ViT-S", single, "forward + backward", 1, 3),
        ("ViT-S", single, "forward + backward", 2, 3),
        ("ViT-S", half, "forward", 1, 5),
        ("ViT-S", half, "forward", 2, 5),
        ("ViT-Ti", single, "forward", 1, 15),
        ("ViT-Ti", single, "forward + backward", 1, 6),
        ("ViT-B", single, "forward", 1, 3),
    ]
    for model, dtype, what, count, rounds in (case for case in cases if case[3] in setup.threads):
        given = setup, model, dtype, what, count, rounds
        times = [encoder_times(*given)] if setup.quick else in_fresh_processes(PROCESSES, encoder_times, *given)
        title = f"{model}, {str(dtype).removeprefix('torch.')}, {what}"
        yield entry("encoders", title, times, thread_count=count, at_most={"RoPE on": 1.015})


def encoder_times(
    setup: Setup, model: str, dtype: torch.dtype, what: str, count: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of the encoder without and with RoPE, round by round."""
    x, variants = setup.images(dtype), {}
    for name in ("RoPE off", "RoPE on"):
        encoder = setup.encoder(model, name == "RoPE on").to(dtype)
        backward = what != "forward"
        variants[name] = forward_backward(encoder, x, encoder.parameters()) if backward else forward(encoder, x)
    return measure(variants, rounds=setup.rounds(rounds), thread_count=count, shortest=setup.shortest)


def larger(setup: Setup) -> Iterator[Entry]:
    """A ViT-S built for 224 px, shown 384 px: the shape it gives and what that costs; nothing is trained."""
    encoders = {name: setup.encoder("ViT-S", name == "RoPE on") for name in ("RoPE off", "RoPE on")}
    encoders["RoPE on"].rope.strategy = "interpolate"
    home, side = 16 * setup.side, 16 * (12 * setup.side // 7)
    small, large = (torch.randn(2, 3, pixels, pixels) for pixels in (home, side))
    tokens = {tuple(forward(encoder, large)().shape) for encoder in encoders.values()}
    assert tokens == {(2, 1 + (side // 16) ** 2, 384)}
    variants = {f"{name}, {side} px": forward(encoder, large) for name, encoder in encoders.items()}
    variants[f"RoPE on, {home} px"] = forward(encoders["RoPE on"], small)
    yield value("larger", f"tokens of one image at {side} px, after {home} px", (side // 16) ** 2 + 1, "tokens")
    yield compare(
        "larger", f"ViT-S built for {home} px at {side} px, float32, forward", variants, rounds=setup.rounds(5),
        shortest=setup.shortest,
    )  # fmt: skip


def compiled(setup: Setup) -> Iterator[Entry]:
    """The same through torch.compile. A quick run leaves the code generation out."""
    times = [compiled_times(setup)] if setup.quick else in_fresh_processes(PROCESSES, compiled_times, setup)
    yield entry("compiled", "ViT-S of 3 layers, bfloat16, forward, compiled", times, at_most={"RoPE on": 1.02})


def compiled_times(setup: Setup) -> dict[str, list[float]]:
    """Seconds of a compiled encoder without RoPE and of one with it, in this process."""
    x, variants = setup.images(torch.bfloat16), {}
    for name in ("RoPE off", "RoPE on"):
        encoder = setup.encoder("ViT-S", name == "RoPE on", depth=1 if setup.quick else 3).bfloat16()
        backend = "eager" if setup.quick else "inductor"
        variants[name] = forward(torch.compile(encoder, fullgraph=True, backend=backend), x)
    return measure(variants, rounds=setup.rounds(20), shortest=setup.shortest)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
        total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    del out
    return total


def memory(setup: Setup) -> Iterator[Entry]:
    """What is kept for the backward pass, and parameters."""
    off, on = (setup.encoder("ViT-S", use_rope) for use_rope in (False, True))
    bytes_off, bytes_on = (saved_bytes(encoder, setup.images()) for encoder in (off, on))
    added = sum(p.numel() for p in on.parameters()) - sum(p.numel() for p in off.parameters())
    yield value("memory", "ViT-S, float32, saved for backward, RoPE off", bytes_off / 2**20, "MiB")
    yield value("memory", "ViT-S, float32, saved for backward, RoPE on", bytes_on / 2**20, "MiB")
    yield value("memory", "saved for backward, RoPE on against off", bytes_on / bytes_off, "ratio", at_most=1.01)
    yield value("memory", "parameters added by RoPE", added, "parameters", at_most=0)


def rotation(setup: Setup) -> Iterator[Entry]:
    """The rotation alone, from a qkv buffer to q, k, v; the base is timm's."""
    for count in setup.threads:
        for dtype, what, aim in (
            (torch.float32, "forward", 0.15),
            (torch.float32, "forward + backward", 0.25),
            (torch.bfloat16, "forward", 0.4),
        ):
            if count == 2 and what != "forward":
                continue
            torch.manual_seed(0)
            qkv = torch.randn(setup.batch, setup.side**2, 3 * HEADS * DIM).to(dtype)
            turns = peers.rotations(setup.side, HEADS, DIM, dtype)
            back = what != "forward"
            variants = {name: _through(turn, qkv) if back else forward(turn, qkv) for name, turn in turns.items()}
            yield compare(
                "rotation", f"q, k of {_shape(setup)}, {str(dtype).removeprefix('torch.')}, {what}", variants,
                thread_count=count, rounds=setup.rounds(30), shortest=setup.shortest,
                at_most={"hjepa, in place": aim},
            )  # fmt: skip


def _shape(setup: Setup) -> str:
    return f"[{setup.batch}, {HEADS}, {setup.side**2}, {DIM}]"


def _through(turn: peers.Rotation, qkv: Tensor) -> Call:
    """From the buffer to q, k, v and from their gradients back to the buffer's."""
    leaf = qkv.clone().requires_grad_()
    grads = [torch.randn_like(part) for part in turn(leaf)]

    def call() -> None:
        torch.autograd.grad(turn(leaf), leaf, grads)

    return call


def against_peers(setup: Setup) -> Iterator[Entry]:
    """Attention layers and whole ViT-S against every peer; the base has no rotation.

    Backward is to the input alone, so the weights' gradients, equal in all, do not dilute the ratio. In bfloat16 ours
    attends in float32 where a CPU is slow otherwise, the others do not: that row is not the rotation's alone.
    """
    tokens = 1 + setup.side**2
    for dtype, what in ((torch.float32, "forward"), (torch.float32, "forward + backward"), (torch.bfloat16, "forward")):
        torch.manual_seed(0)
        x = torch.randn(setup.batch, tokens, HEADS * DIM).to(dtype)
        layers = peers.attention_layers(setup.side, HEADS, DIM, dtype)
        leaf = x.clone().requires_grad_()
        back = what != "forward"
        variants = {}
        for name, layer in layers.items():
            variants[name] = forward_backward(layer, leaf, iter(())) if back else forward(layer, x)
        yield compare(
            "peers", f"attention layer on [{setup.batch}, {tokens}, {HEADS * DIM}], "
            f"{str(dtype).removeprefix('torch.')}, {what}", variants, rounds=setup.rounds(14), shortest=setup.shortest,
        )  # fmt: skip
    models = {name: setup.encoder("ViT-S", name == "hjepa") for name in ("no rotation (timm)", "hjepa")}
    others = peers.whole_models(setup.side, setup.depth)
    x = setup.images()
    yield compare(
        "peers", "ViT-S, float32, forward", {name: forward(model, x) for name, model in (models | others).items()},
        rounds=setup.rounds(5), shortest=setup.shortest,
    )  # fmt: skip


def growth(setup: Setup) -> Iterator[Entry]:
    """Time of the rotation per token and its share of a layer, over grids and batches."""
    layer = setup.encoder("ViT-S", False, depth=1).vit.blocks[0]
    grids = (2, 3, 4) if setup.quick else (14, 28, 56)
    for batch, side in [*((1, side) for side in grids), *((batch, grids[0]) for batch in (4, 16, 64))]:
        table = VisionRoPE2D(DIM, 16, side).table((side, side))
        qkv, x = torch.randn(batch, side**2, 3 * HEADS * DIM), torch.randn(batch, side**2, HEADS * DIM)

        def turn(qkv: Tensor, table: Tensor = table) -> Tensor:
            return rotate_qkv_(qkv, table)

        yield compare(
            "growth", f"batch {batch}, grid {side} x {side}: rotation against a layer of ViT-S",
            {"layer": forward(layer, x), "rotation": forward(turn, qkv)}, rounds=setup.rounds(7),
            shortest=setup.shortest,
        )  # fmt: skip


def tables(setup: Setup) -> Iterator[Entry]:
    """A table for a grid not seen before, and the second call, against one layer's forward at that grid, batch 1."""
    side = 5 if setup.quick else 28
    layer, x = setup.encoder("ViT-S", False, depth=1).vit.blocks[0], torch.randn(1, side**2, HEADS * DIM)

    def build() -> None:
        rope._cache.clear()
        rope.tables((side, side))

    rope = VisionRoPE2D(DIM, 16, 14, num_layers=12)
    yield compare(
        "tables", f"grid {side} x {side}",
        {"layer": forward(layer, x), "new table": build, "same grid again": lambda: rope.tables((side, side))},
        rounds=setup.rounds(14), shortest=setup.shortest, at_most={"new table": 1.0, "same grid again": 0.01},
    )  # fmt: skip


def matmul_speed(size: int, dtype: torch.dtype, thread_count: int, rounds: int = 9) -> float:
    """Measured speed of a product of two square matrices, in GFLOP/s (median)."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    with threads(thread_count) as clock:
        times = [sample(lambda: a @ b, clock, 3) for _ in range(rounds)]
    return 2e-9 * size**3 / quartiles(times)["median"]
