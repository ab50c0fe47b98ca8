"""Typed configuration: dataclasses say what exists, a YAML file says what differs, `key=value` the rest.

A file holds only what it changes; every absent key keeps its default, so a config without `model.rope` has
RoPE off. Reading is strict: an unknown key, a wrong type or a value outside its range is a ValueError of one line
that names the key and the nearest right thing. Values are data and are never evaluated: `${...}` is refused,
and so are YAML tags, anchors and doubled keys.

The object handed around is an OmegaConf DictConfig of the structure `Config`: attributes work, typos raise,
and `dict(config.model.rope)` gives plain keyword arguments. Source of the container: omegaconf, "Structured
configs". Not covered: what the values do, which the modules that read them say.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .reading import nearest, parse_yaml, read_yaml
from .rules import check_values


@dataclass
class DataConfig:
    """Which pictures, and how a training view is cut from one."""

    name: str = "openmoji"  # a name of hjepa.data.DATASETS
    root: str = "data"  # folder that holds or receives downloaded data sets
    path: str | None = None  # the folder of class folders, for name: imagefolder
    image_size: int = 64  # training image side, pixels; the one that features are measured at
    train_scales: list[float] = field(default_factory=lambda: [1.0])  # times image_size: sides drawn from in training
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
    keep_checkpoints: int = 2  # how many of the newest stay on disk
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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of nested dicts."""
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def _values(config: Config) -> dict[str, Any]:
    return dict(_flat(cast(dict, OmegaConf.to_container(cast(Any, config)))))


KEYS = tuple(_values(default_config()))


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
    if key not in KEYS:
        inside = next((k for k in KEYS if k.startswith(f"{key}.")), "")
        hint = f"nearest: {nearest(key, KEYS) or 'none'}"
        if inside:
            hint = f"it is a section; name a key in it, such as {inside}"
        raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    if "${" in str(value):
        raise ValueError(f"{where}: {key}={value!r} holds '${{'; config values are never evaluated")
    try:
        OmegaConf.update(cast(Any, config), key, value)
    except (OmegaConfBaseException, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: {key}={value!r} has the wrong type: {reason}") from None


def check_config(config: Config) -> None:
    """Refuse values that have the right type and make no sense; see `hjepa.rules`.

    Raises:
        ValueError: one line that names the key, its value and what is allowed.
    """
    check_values(_values(config))
