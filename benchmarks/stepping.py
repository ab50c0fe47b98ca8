"""Sections on training: a whole H-JEPA step against its own matrix products, dropped tokens, masks, data, memory.

Two settings: the shipped RoPE config (64 px, batch 64), and ViT-S/16 at 224 px with batch 8. A step is what training
does between two batches: masks, forward, backward, clipping, AdamW, moving average; pictures are ready in memory.

Not covered: more than one process, GPUs.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rotating import Entry, Setup, forward_backward, matmul_speed
from benchmarks.timing import compare, quartiles, sample, threads, value
from hjepa.build import build_model, draw_masks, load_split
from hjepa.config import Config, load_config
from hjepa.data.images import TrainView
from hjepa.nn.hjepa import HJEPA
from hjepa.nn.masks import Masks
from hjepa.train.optimizer import parameter_groups
from hjepa.train.schedule import batch_at

ROPE_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "masks.yaml"
SMALL = "train.mixed_precision=no"
LARGE = (
    "data.image_size=224", "train.batch_size=8", "model.encoder_type=vit_small_patch16_224", "model.patch_size=null",
    "model.embed_dim=null", "model.depth=null", "model.num_heads=null", "model.predictor.embed_dim=192",
    "model.predictor.depth=4", "model.predictor.num_heads=3",
)  # fmt: skip
TINY = ("train.batch_size=4", "model.depth=1", "model.predictor.depth=1")


class Trainer:
    """A model, its optimiser and a batch of noise; `step(n)` is one training step under the masks of step n."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, drop: bool = True) -> None:
        torch.manual_seed(0)
        self.config, self.dtype, self.drop = config, dtype, drop
        self.model: HJEPA = build_model(config).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.05), lr=1e-4, fused=True)
        size = config.data.image_size
        self.images = torch.randn(config.train.batch_size, 3, size, size)
        self.count = 0

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.context_encoder.grid_size

    def masks(self, step: int) -> Masks:
        """The masks of a step; without dropping, the context is all patches, hidden or not."""
        masks = draw_masks(self.config, self.grid, step)
        if self.drop:
            return masks
        every = torch.arange(self.grid[0] * self.grid[1]).expand(len(self.images), -1)
        return Masks(every, masks.target_idx)

    def step(self, step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(self.images, self.masks(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.target_encoder.update_from_context_encoder(self.model.context_encoder, step)

    def next(self) -> None:
        """The next step: in a comparison, call n of every variant has the same masks."""
        self.step(self.count)
        self.count += 1


def configs(setup: Setup) -> dict[str, Config]:
    """The two settings by name; a quick run has a single small one for both."""
    quick = TINY if setup.quick else ()
    large = ("data.image_size=64", "train.batch_size=4") if setup.quick else LARGE
    return {
        "64 px, width 96, batch 64": load_config(ROPE_CONFIG, (SMALL, *quick)),
        "224 px, ViT-S/16, batch 8": load_config(ROPE_CONFIG, (SMALL, *quick, *large)),
    }


def step(setup: Setup) -> Iterator[Entry]:
    """Whole steps: bfloat16 against float32, tokens kept against dropped, and the limit set by matrix products."""
    for (name, config), least, rounds in zip(configs(setup).items(), (None, 0.6), (13, 4), strict=True):
        trainers = {
            "hidden tokens dropped": Trainer(config),
            "all tokens kept": Trainer(config, drop=False),
            "hidden tokens dropped, bfloat16": Trainer(config, torch.bfloat16),
        }
        for count in setup.threads:
            for trainer in trainers.values():
                trainer.count = 0
            result = compare(
                "step", f"training step, {name}", {key: trainer.next for key, trainer in trainers.items()},
                thread_count=count, rounds=setup.rounds(rounds), shortest=0,
                at_least={"all tokens kept": 1.4},
            )  # fmt: skip
            yield result
            seconds = result["rows"]["hidden tokens dropped"]["seconds"]["median"]
            tag = f"{name}, {count} thread{'s' * (count > 1)}"
            yield value("step", f"images per second, {tag}", config.train.batch_size / seconds, "images/s")
            limit = products(trainers["hidden tokens dropped"], count, setup)
            share = limit / seconds
            yield value("step", f"matrix products' share of the step, {tag}", share, "share", at_least=least)
        yield value("step", f"peak memory per image, {name}", peak_mib(trainers["hidden tokens dropped"]), "MiB")


def _attention_flops(q: Any, k: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """scores and weighted sum: two products of 2 B heads T S D operations; torch's counter leaves this kernel out."""
    return 4 * math.prod(q) * k[2]


def _attention_backward_flops(grad: Any, q: Any, k: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """The scores again, and the gradients of v, weights, q and k: five products."""
    return 10 * math.prod(q) * k[2]


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def products(trainer: Trainer, thread_count: int, setup: Setup) -> float:
    """Seconds that a step's matrix products (attention's too) take at the machine's measured speed, mean over steps."""
    flops = []
    for number in range(setup.rounds(3)):
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            trainer.step(number)
        flops.append(counter.get_total_flops())
    return 1e-9 * sum(flops) / len(flops) / matmul_speed(setup.matrix, torch.float32, thread_count)


def peak_mib(trainer: Trainer) -> float:
    """Memory that a step takes at its peak above what it started with, per image, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.step(0)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / 2**20 / len(trainer.images)


def dropping(setup: Setup) -> Iterator[Entry]:
    """The context encoder alone, forward and backward, on the context's tokens and on all."""
    for name, config in configs(setup).items():
        trainer = Trainer(config)
        encoder, kept = trainer.model.context_encoder, trainer.masks(0).context_idx

        def some(images: Tensor, encoder: Any = encoder, kept: Tensor = kept) -> Tensor:
            return encoder(images, kept)

        calls: dict[str, Any] = {"hidden tokens dropped": some, "all tokens kept": encoder}
        variants = {k: forward_backward(call, trainer.images, encoder.parameters()) for k, call in calls.items()}
        yield compare(
            "dropping", f"context encoder, {name}, forward + backward", variants, rounds=setup.rounds(4),
            shortest=setup.shortest, at_least={"all tokens kept": 1.4},
        )  # fmt: skip


def masks(setup: Setup) -> Iterator[Entry]:
    """Mask sampling against the step it belongs to."""
    for name, config in configs(setup).items():
        trainer = Trainer(config)
        yield compare(
            "masks", f"mask sampling, {name}",
            {"step": partial(trainer.step, 0), "masks": partial(trainer.masks, 0)},
            rounds=setup.rounds(3), shortest=setup.shortest, at_most={"masks": 0.01},
        )  # fmt: skip


def data(setup: Setup) -> Iterator[Entry]:
    """Loading against the step: a batch of augmented emoji by one process, once their pictures are drawn."""
    config = configs(setup)["64 px, width 96, batch 64"]
    options, pictures = config.data, load_split(config, "train")
    view = TrainView(pictures, options.image_size, crop_scale=tuple(options.crop_scale), flip=options.flip)
    size, trainer = config.train.batch_size, Trainer(config)
    keys = batch_at(0, size=len(pictures), batch_size=size, seed=0)

    def load() -> Tensor:
        return torch.stack([view[key] for key in keys])

    with threads(1) as clock:
        yield value("data", "drawing an emoji, once a run", 1e3 * sample(load, clock, 1) / size, "ms per picture")
        times = [sample(load, clock, 1) for _ in range(setup.rounds(7))]
    yield value("data", "pictures augmented", size / quartiles(times)["median"], "images/s")
    yield compare(
        "data", "loading a batch, 64 px, batch 64", {"step": partial(trainer.step, 0), "loading": load},
        rounds=setup.rounds(7), shortest=setup.shortest, at_most={"loading": 0.5},
    )  # fmt: skip
