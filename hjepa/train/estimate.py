"""What a config will cost, before anything is trained: `hjepa train --dry-run`.

The model is built and one micro-batch goes through it on torch's "meta" device: shapes without numbers, so that a
ViT-H fits a laptop. Matrix products are counted there, not derived from formulas, and so is what the backward pass
keeps; the masks are those of step 0. Per process, for a global batch of B pictures over P processes:

    parameters          by counting
    tokens              that the blocks of context encoder, target encoder and predictor see
    FLOPs               2 per multiply-add of every product, forward and backward; attention is two products
    memory              weights, gradients, optimiser state, gradient buckets of DDP, what the backward pass keeps;
                        float32 throughout, an upper bound where activations are narrower
    checkpoint          weights and optimiser state, float32, as they lie on disk
    wire                ring all-reduce of DDP: 2 (P - 1) / P times the gradient's bytes, sent by each process
    pictures            per second of all processes together, at a given number of FLOP/s each

Sources: torch.utils.flop_counter; Patarasuk & Yuan 2009 for the ring. Measured numbers are `make bench`'s.
Not covered: element-wise work, workspace of kernels, the views' own buffers, FSDP, other steps' image sizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..build import batch_masks, build_model, draw_views, load_split, small_side
from ..config import Config
from ..inputs import UserError
from .optimizer import build_optimizer
from .schedule import share

FLOAT = 4  # bytes
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def estimate(config: Config, *, processes: int = 1, speed: float = 1e12) -> dict[str, float]:
    """The numbers above under their names and units, of one process and one optimiser step.

    Args:
        config: of the run; `model.pretrained` changes nothing here.
        processes: that share the batch.
        speed: FLOP/s that each of them reaches.

    Raises:
        ValueError: a batch that the processes cannot share, a speed that is not positive, or what the model refuses.
    """
    if not 0 < speed < float("inf"):
        raise UserError(f"speed={speed} must be a positive number of FLOP/s, such as 1e12")
    if processes < 1:
        raise UserError(f"processes={processes} must be at least 1")
    accumulate = config.train.accumulate
    rows = share(config.train.batch_size, micro=0, accumulate=accumulate, rank=0, processes=processes)
    pictures = rows.stop - rows.start
    with _shapes_alone():
        model = _model(config)
        arguments = _arguments(config, model.context_encoder.grid_size, rows)
        tokens, flops, kept = _one_pass(model, arguments)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = FLOAT * sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    saved = FLOAT * sum(t.numel() for t in model.state_dict().values())
    moments = FLOAT * _moments(config, model)
    gradients = FLOAT * trained
    buckets = gradients if processes > 1 else 0
    step_flops = flops * accumulate
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained parameters": trained,
        **{f"tokens per step, {name}": count * accumulate for name, count in tokens.items()},
        "FLOP per step": step_flops,
        "memory, bytes": weights + gradients + moments + buckets + kept,
        "of it kept for backward": kept,
        "checkpoint, bytes": saved + moments,
        "sent per step, bytes": 2 * (processes - 1) / processes * gradients,
        "seconds per step": step_flops / speed,
        "pictures per second": processes * pictures * accumulate * speed / step_flops,
    }


@contextmanager
def _shapes_alone() -> Iterator[None]:
    """New tensors have no numbers inside; autocast, which knows no such device, does nothing there."""
    before = torch.autocast
    torch.autocast = lambda *args, **options: nullcontext()  # type: ignore[misc, assignment]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.autocast = before  # type: ignore[misc]


def _model(config: Config) -> Any:
    with torch.device("cpu"):
        classes = len(load_split(config, "train").classes) if config.objective == "labels" else None
    without = config.copy()  # type: ignore[attr-defined]
    without.model.pretrained = False
    return build_model(without, classes).train()


def _arguments(config: Config, grid: tuple[int, int], rows: slice) -> dict[str, Any]:
    """What a step feeds the model (`feed.Feed`), as shapes; masks are drawn, for their number of tokens."""
    with torch.device("cpu"):
        drawn = ([], []) if config.objective == "masks" else draw_views(config, 0)
        large, small = (len(views) for views in drawn)
        masks = batch_masks(config, grid, 0)
        own = None if masks is None else masks.rows(rows, max(large, 1))
    side, pictures = config.data.image_size, rows.stop - rows.start
    arguments: dict[str, Any] = {"images": torch.empty(max(large, 1) * pictures, 3, side, side)}
    if own is not None:
        arguments["masks"] = own.to("meta")
    if large:
        arguments["pictures"] = pictures
    if small:
        sides = (small_side(config, side),) * 2
        arguments["small"] = torch.empty(small * pictures, 3, *sides)
    if large and config.views.coordinates == "picture":
        arguments["places"] = torch.empty(large * pictures, grid[0] * grid[1], 2)
        if small:
            patches = (sides[0] * grid[0] // side) ** 2
            arguments["small_places"] = torch.empty(small * pictures, patches, 2)
    if config.objective == "labels":
        arguments["labels"] = torch.empty(pictures, dtype=torch.int64)
    return arguments


def _one_pass(model: Any, arguments: dict[str, Any]) -> tuple[dict[str, int], int, int]:
    """Tokens by part, FLOPs, and bytes that the backward pass keeps, of one forward and backward pass."""
    tokens: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(block: nn.Module, inputs: Any) -> None:
            tokens[name] = tokens.get(name, 0) + inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    parts = {"context encoder": model.context_encoder.vit, "target encoder": model.target_encoder.vit}
    parts |= {"predictor": model.predictor} if model.predictor is not None else {}
    for name, part in parts.items():
        part.blocks[0].register_forward_pre_hook(count(name))
    weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # storage -> a tensor in it, which keeps it from being reused

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**arguments).loss
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        kept.clear()
        loss.backward()
    return tokens, counter.get_total_flops(), size


def _moments(config: Config, model: nn.Module) -> int:
    """Numbers that the optimiser keeps: two for each trained parameter under AdamW, one under Muon, and a count."""
    options = config.train
    optimizer = build_optimizer(
        model, kind=options.optimizer, lr=options.lr, muon_lr=options.muon_lr, weight_decay=options.weight_decay
    )
    groups = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return 2 * sum(groups) - (groups[0] if options.optimizer == "muon" else 0)


def format_estimate(numbers: dict[str, float]) -> str:
    """A line for each number, with thousands and millions as k, M, G and T."""
    lines = []
    for name, number in numbers.items():
        scale, unit = next((pair for pair in UNITS if number >= pair[0]), (1.0, ""))
        lines.append(f"{name:34} {number / scale:8.4g} {unit}".rstrip())
    return "\n".join(lines)
