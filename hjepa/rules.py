"""What makes sense in a config: ranges, choices, and values that must fit each other.

A rule knows a value by its dotted key, such as train.lr. `hjepa.config` says what the keys mean.
Not covered: types, which the config's structure holds; rules that need a model, which the layers state themselves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .data import DATASETS
from .model import DISTANCES, REGULARIZERS
from .reading import nearest
from .rope import COORDINATES, KINDS, STRATEGIES
from .tables import size_pair

Values = Mapping[str, Any]  # dotted key -> value, lists for lists

LARGEST = 10**18
AT_LEAST: dict[str, float] = {
    **dict.fromkeys(["data.image_size", "data.limit", "masks.num_targets"], 1),
    **dict.fromkeys([f"model.{key}" for key in ("patch_size", "embed_dim", "depth", "num_heads")], 1),
    **dict.fromkeys([f"model.predictor.{key}" for key in ("embed_dim", "depth", "num_heads")], 1),
    **dict.fromkeys([f"train.{key}" for key in ("steps", "batch_size", "accumulate", "threads")], 1),
    "train.keep_checkpoints": 1,
    **dict.fromkeys([f"train.{key}_every" for key in ("log", "eval", "checkpoint")], 1),
    **dict.fromkeys([f"evaluate.{key}" for key in ("gallery", "queries", "knn_k")], 1),
    **dict.fromkeys(["model.rope.jitter", "model.rope.rescale"], 1),
    **dict.fromkeys(["model.rope.shift", "loss.regularizer_weight"], 0),
    **dict.fromkeys([f"train.{key}" for key in ("min_lr", "weight_decay", "seed")], 0),
    **dict.fromkeys(["train.warmup", "train.num_workers"], 0),
}
ABOVE_ZERO = (
    "data.train_scales", "train.lr", "train.clip_grad", "model.rope.theta", "model.rope.theta_per_layer",
    "model.rope.fraction",
)  # fmt: skip
BETWEEN_0_AND_1 = ("model.rope.fraction", "train.ema_start", "train.ema_end", "data.color_jitter")
INTERVALS = {  # pairs (smallest, largest), and the largest that is allowed
    "data.crop_scale": 1.0,
    "masks.target_scale": 1.0,
    "masks.context_scale": 1.0,
    "masks.target_aspect": math.inf,
}
DIVISIBLE = {
    "model.embed_dim": "model.num_heads",
    "model.predictor.embed_dim": "model.predictor.num_heads",
    "train.batch_size": "train.accumulate",
}
CHOICES: dict[str, Sequence[str]] = {
    "data.name": tuple(DATASETS),
    "data.on_corrupt": ("error", "skip"),
    "model.rope.kind": KINDS,
    "model.rope.strategy": STRATEGIES,
    "model.rope.coordinates": COORDINATES,
    "loss.kind": DISTANCES,
    "loss.regularizer": REGULARIZERS,
    "train.mixed_precision": ("no", "bf16", "fp16"),
    "evaluate.pool": ("mean", "pyramid"),
}


def check_values(values: Values) -> None:
    """Refuse the first value that breaks a rule.

    Raises:
        ValueError: one line that names the key, its value and what is allowed.
    """
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                _check_number(key, number)
            elif isinstance(value, list) and key != "evaluate.sizes":  # the container lets mappings into lists
                raise ValueError(f"{key}={value!r} must be a list of numbers")
    for key, top in INTERVALS.items():
        pair = values[key]
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
            raise ValueError(f"{key}={pair} must be two numbers, 0 < smallest <= largest <= {top}")
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            near = nearest(values[key], allowed) or "none"
            raise ValueError(f"{key}={values[key]!r} must be one of {', '.join(allowed)}; nearest: {near}")
    _check_image_size(values)
    _check_divisions(values)
    if values["train.ema_end"] < values["train.ema_start"]:
        start = f"train.ema_start={values['train.ema_start']}"
        raise ValueError(f"train.ema_end={values['train.ema_end']} must not be below {start}")
    weights = values["model.level_weights"]
    if not 1 <= len(weights) <= 4 or min(weights) < 0 or not sum(weights):
        raise ValueError(f"model.level_weights={weights} must be 1 to 4 numbers >= 0, not all 0")
    for size in values["evaluate.sizes"]:
        size_pair(size)


def _check_number(key: str, number: float) -> None:
    if not -LARGEST <= number <= LARGEST:  # false for NaN too
        raise ValueError(f"{key}={str(number)[:30]} must be a finite number, at most {LARGEST}")
    if number < AT_LEAST.get(key, number):
        raise ValueError(f"{key}={number} must be at least {AT_LEAST[key]}")
    if key in ABOVE_ZERO and number <= 0:
        raise ValueError(f"{key}={number} must be above 0")
    if key in BETWEEN_0_AND_1 and not 0 <= number <= 1:
        raise ValueError(f"{key}={number} must be between 0 and 1")


def patch_side(encoder_type: str, patch_size: int | None) -> int:
    """Side of a patch in pixels: the one set, or else the one that timm's name says."""
    named = re.search(r"patch(\d+)", encoder_type)
    return patch_size or (int(named[1]) if named else 0) or 1


def _check_image_size(values: Values) -> None:
    patch, size = patch_side(values["model.encoder_type"], values["model.patch_size"]), values["data.image_size"]
    near = max(1, (2 * size + patch) // (2 * patch)) * patch
    if size != near:
        raise ValueError(f"data.image_size={size} is not a multiple of the patch, {patch} pixels; nearest: {near}")
    if not values["data.train_scales"]:
        raise ValueError("data.train_scales=[] must name one scale or more; [1.0] trains at image_size alone")


def _check_divisions(values: Values) -> None:
    for key, parts in DIVISIBLE.items():
        if values[key] and values[parts] and values[key] % values[parts]:
            raise ValueError(f"{key}={values[key]} is not divisible by {parts}={values[parts]}")
