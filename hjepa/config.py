"""Typed configuration: dataclasses say what exists, a YAML file says what differs, `key=value` the rest.

A file holds only what it changes; every absent key keeps its default, so a config without `model.rope` has
RoPE off. Reading is strict: an unknown key, a wrong type or a value outside its range is a ValueError of one line
that names the key and the nearest right thing. Values are data and are never evaluated: `${...}` is refused,
and so are YAML tags, anchors and doubled keys.

The object handed around is an OmegaConf DictConfig of the structure `Config`: attributes work, typos raise,
and `dict(config.model.rope)` gives plain keyword arguments. Source of the container: omegaconf, "Structured
configs". Not covered: what the values do, which the modules that read them say.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .data import DATASETS
from .model import DISTANCES, REGULARIZERS
from .reading import nearest, parse_yaml, read_yaml
from .rope import COORDINATES, KINDS, STRATEGIES
from .tables import size_pair


@dataclass
class DataConfig:
    """Which pictures, and how a training view is cut from one."""

    name: str = "openmoji"  # a name of hjepa.data.DATASETS
    root: str = "data"  # folder that holds or receives downloaded data sets
    path: str | None = None  # the folder of class folders, for name: imagefolder
    image_size: int = 64  # training image side, pixels
    crop_scale: list[float] = field(default_factory=lambda: [0.3, 1.0])  # area share of a crop
    flip: bool = True  # mirror left-right half of the time
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation changes
    limit: int | None = None  # at most this many training pictures
    on_corrupt: str = "error"  # error, or skip: what an unreadable image file does


@dataclass
class RopeConfig:
    """Rotary positions; see hjepa.rope."""

    use_rope: bool = False  # rotate queries and keys in every attention layer
    theta: float = 10000.0  # base of the frequencies; 100 suits grids of 8 to 30 patches
    kind: str = "axial"  # axial: fixed row and column halves; mixed: learned 2-D frequencies
    learnable: bool = False  # train the frequencies
    theta_per_layer: list[float] | None = None  # one theta per layer instead of one for all
    strategy: str = "extrapolate"  # what to do with positions on a grid not trained on
    coordinates: str = "index"  # index: counted in patches; normalized: in picture widths
    fraction: float = 1.0  # share of each head's channels that rotates
    shift: float = 0.0  # training only: random shift, at most this share of half the grid
    jitter: float = 1.0  # training only: random stretch of each axis, between 1/jitter and jitter
    rescale: float = 1.0  # training only: random stretch of both axes alike, between 1/rescale and rescale


@dataclass
class PredictorConfig:
    """The narrow transformer that guesses target features."""

    embed_dim: int = 96  # width
    depth: int = 2  # layers
    num_heads: int = 4  # attention heads


@dataclass
class ModelConfig:
    """The two encoders and the predictor; null means the encoder type's own value."""

    encoder_type: str = "vit_tiny_patch16_224"  # a timm VisionTransformer
    patch_size: int | None = 8  # patch side, pixels
    embed_dim: int | None = 96  # width
    depth: int | None = 4  # layers
    num_heads: int | None = 4  # attention heads
    class_token: bool | None = False  # keep a CLS token
    pretrained: bool = False  # start from timm's published weights
    use_absolute: bool = True  # keep the learned position table
    rope: RopeConfig = field(default_factory=RopeConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    level_weights: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25])  # one loss weight per level


@dataclass
class MasksConfig:
    """Which patches are seen and which are guessed; shares are of the patch grid."""

    num_targets: int = 4  # target blocks per image
    target_scale: list[float] = field(default_factory=lambda: [0.15, 0.2])  # area of a target
    target_aspect: list[float] = field(default_factory=lambda: [0.75, 1.5])  # its height over width
    context_scale: list[float] = field(default_factory=lambda: [0.85, 1.0])  # area of the context block


@dataclass
class LossConfig:
    """How a guess is compared with its target, and what keeps features from collapsing."""

    kind: str = "smooth_l1"  # distance between prediction and target, or mse
    regularizer: str = "none"  # none, variance or sketched_gaussian
    regularizer_weight: float = 0.0  # its weight in the loss


@dataclass
class TrainConfig:
    """The loop. batch_size counts all processes and all accumulated parts together."""

    steps: int = 1500  # optimiser steps
    batch_size: int = 64  # images per optimiser step
    accumulate: int = 1  # parts that a process cuts its share of the batch into
    lr: float = 1e-3  # peak learning rate of AdamW
    min_lr: float = 1e-5  # learning rate at the end of the cosine
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.05  # on matrices only
    clip_grad: float = 1.0  # largest gradient norm
    ema_start: float = 0.99  # momentum of the target encoder at step 0
    ema_end: float = 1.0  # momentum at the last step
    mixed_precision: str = "no"  # no, bf16 or fp16
    seed: int = 0  # everything random follows from it
    num_workers: int = 0  # loader processes
    threads: int = 2  # CPU threads of torch
    log_every: int = 25  # steps between log lines
    eval_every: int = 250  # steps between measures of the features
    checkpoint_every: int = 250  # steps between checkpoints
    tensorboard: bool = False  # also write TensorBoard events
    grad_checkpointing: bool = False  # recompute layers in the backward pass: less memory, more time


@dataclass
class EvaluateConfig:
    """How frozen features are read."""

    sizes: list[Any] = field(default_factory=lambda: [32, 48, 64, 96, 128])  # pixels: a side, or "48x96"
    gallery: int = 2000  # training pictures that the readers are fitted on
    queries: int = 1000  # test pictures
    knn_k: int = 10  # neighbours that vote
    pool: str = "mean"  # mean: over patch tokens; pyramid: that and a 2x2 grid of means


@dataclass
class Config:
    """Everything a run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


AT_LEAST: dict[str, float] = {
    **dict.fromkeys(["data.image_size", "data.limit", "masks.num_targets"], 1),
    **dict.fromkeys([f"model.{key}" for key in ("patch_size", "embed_dim", "depth", "num_heads")], 1),
    **dict.fromkeys([f"model.predictor.{key}" for key in ("embed_dim", "depth", "num_heads")], 1),
    **dict.fromkeys([f"train.{key}" for key in ("steps", "batch_size", "accumulate", "threads")], 1),
    **dict.fromkeys([f"train.{key}_every" for key in ("log", "eval", "checkpoint")], 1),
    **dict.fromkeys([f"evaluate.{key}" for key in ("gallery", "queries", "knn_k")], 1),
    **dict.fromkeys(["model.rope.jitter", "model.rope.rescale"], 1),
    **dict.fromkeys(["model.rope.shift", "loss.regularizer_weight"], 0),
    **dict.fromkeys([f"train.{key}" for key in ("min_lr", "weight_decay", "seed")], 0),
    **dict.fromkeys(["train.warmup", "train.num_workers"], 0),
}
ABOVE_ZERO = (
    "train.lr", "train.clip_grad", "model.rope.theta", "model.rope.theta_per_layer", "model.rope.fraction"
)  # fmt: skip
BETWEEN_0_AND_1 = ("model.rope.fraction", "train.ema_start", "train.ema_end", "data.color_jitter")
INTERVALS = {  # pairs (smallest, largest), and the largest that is allowed
    "data.crop_scale": 1.0,
    "masks.target_scale": 1.0,
    "masks.context_scale": 1.0,
    "masks.target_aspect": math.inf,
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


def default_config() -> Config:
    """The defaults, as a typed DictConfig."""
    return cast(Config, OmegaConf.structured(Config))


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Defaults, then the YAML file, then overrides such as "model.rope.theta=100" in their order.

    Raises:
        FileNotFoundError: the file is absent.
        ValueError: not YAML, unknown key, wrong type, `${`, or a value that `check_config` refuses; one line.
    """
    config = default_config()
    if path is not None:
        _merge(config, read_yaml(path), str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"override {text!r} is not of the form key=value, such as train.steps=200")
        _set(config, key.strip(), parse_yaml(value, f"override {text!r}"), f"override {text!r}")
    check_config(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write every value, defaults too, so that the file alone says what was run."""
    Path(path).write_text(OmegaConf.to_yaml(config, resolve=False), encoding="utf-8")


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield from _keys(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else (prefix + key,)


def _merge(config: Config, tree: Any, where: str, prefix: str = "") -> None:
    """Set every leaf of nested mappings; an empty section changes nothing."""
    if tree is None:
        return
    if not isinstance(tree, Mapping):
        what = prefix.rstrip(".") or "the file"
        raise ValueError(f"{where}: {what} must hold keys with values, not {tree!r}")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        section = OmegaConf.select(cast(Any, config), name) if _is_name(name) else None
        if isinstance(section, DictConfig):
            _merge(config, value, where, f"{name}.")
        else:
            _set(config, name, value, where)


def _is_name(key: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)*", key) is not None


def _set(config: Config, key: str, value: Any, where: str) -> None:
    known = list(_keys(config))
    if key not in known:
        inside = next((k for k in known if k.startswith(f"{key}.")), "")
        hint = f"nearest: {nearest(key, known) or 'none'}"
        if inside:
            hint = f"it is a section; name a key in it, such as {inside}"
        raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    if "${" in str(value):
        raise ValueError(f"{where}: {key}={value!r} holds '${{'; config values are never evaluated")
    try:
        OmegaConf.update(cast(Any, config), key, value)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: {key}={value!r} has the wrong type: {reason}") from None


def check_config(config: Config) -> None:
    """Refuse values that have the right type and make no sense.

    Raises:
        ValueError: one line that names the key, its value and what is allowed.
    """
    for key in _keys(config):
        _check_number(key, OmegaConf.select(cast(Any, config), key))
    for key, top in INTERVALS.items():
        low_high = list(OmegaConf.select(cast(Any, config), key))
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= top:
            raise ValueError(f"{key}={low_high} must be two numbers, 0 < smallest <= largest <= {top}")
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(cast(Any, config), key)
        if value not in allowed:
            near = nearest(value, allowed) or "none"
            raise ValueError(f"{key}={value!r} must be one of {', '.join(allowed)}; nearest: {near}")
    _check_together(config)


def _check_number(key: str, value: Any) -> None:
    numbers = list(value) if isinstance(value, ListConfig) else [value]
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{key}={number} must be a finite number")
        if number is None or isinstance(number, str | ListConfig):
            continue
        if number < AT_LEAST.get(key, number):
            raise ValueError(f"{key}={number} must be at least {AT_LEAST[key]}")
        if key in ABOVE_ZERO and number <= 0:
            raise ValueError(f"{key}={number} must be above 0")
        if key in BETWEEN_0_AND_1 and not 0 <= number <= 1:
            raise ValueError(f"{key}={number} must be between 0 and 1")


def _check_together(config: Config) -> None:
    """Rules over several values."""
    data, model, train = config.data, config.model, config.train
    named = re.search(r"patch(\d+)", model.encoder_type)
    patch = model.patch_size or (int(named[1]) if named else 1)
    near = max(1, round(data.image_size / patch)) * patch
    if data.image_size != near:
        what = f"data.image_size={data.image_size} is not a multiple of the patch, {patch} pixels"
        raise ValueError(f"{what}; nearest: {near}")
    for name, part in (("model", model), ("model.predictor", model.predictor)):
        if part.embed_dim and part.num_heads and part.embed_dim % part.num_heads:
            heads = f"{name}.num_heads={part.num_heads}"
            raise ValueError(f"{name}.embed_dim={part.embed_dim} is not divisible by {heads}")
    if train.ema_end < train.ema_start:
        raise ValueError(f"train.ema_end={train.ema_end} must not be below train.ema_start={train.ema_start}")
    if train.batch_size % train.accumulate:
        parts = f"train.accumulate={train.accumulate}"
        raise ValueError(f"train.batch_size={train.batch_size} is not divisible by {parts}")
    weights = list(model.level_weights)
    if not 1 <= len(weights) <= 4 or min(weights) < 0 or not sum(weights):
        raise ValueError(f"model.level_weights={weights} must be 1 to 4 numbers >= 0, not all 0")
    for size in config.evaluate.sizes:
        size_pair(size)
