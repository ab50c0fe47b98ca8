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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .data.images import DATASETS
from .files import dump_yaml, parse_yaml, read_yaml, write_whole
from .inputs import UserError, nearest, size_pair
from .nn.encoders import POSITION_EMBEDDINGS
from .nn.frequencies import COORDINATES, KINDS, STRATEGIES
from .nn.hjepa import DISTANCES, OBJECTIVES
from .nn.losses import REGULARIZERS, VIEW_LOSSES

LARGEST = 10**18


def key(default: Any, **allowed: Any) -> Any:
    """A config key: its default, and what is allowed of it.

    at_least, above, at_most: bounds of a number or of each number in a list. length: how many numbers a list has.
    choices: names. words: a list of names that only the data know. interval: a pair (smallest, largest) above 0, and
    the largest that is allowed.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=allowed)
    return field(default=default, metadata=allowed)


@dataclass
class DataConfig:
    """Which pictures, and how a training view is cut from one."""

    name: str = key("openmoji", choices=tuple(DATASETS))  # a name of hjepa.data.DATASETS
    root: str = "data"  # folder that holds or receives downloaded data sets, and the indices of large folders
    path: str | None = None  # the folder of class folders, for name: imagefolder
    image_size: int = key(64, at_least=1)  # training image side, pixels; the one that features are measured at
    train_scales: list[float] = key([1.0], above=0)  # times image_size: sides drawn from in training
    crop_scale: list[float] = key([0.3, 1.0], interval=1.0)  # area share of a crop; objective: masks alone, as jitter
    flip: bool = True  # mirror left-right half of the time
    color_jitter: float = key(0.0, at_least=0, at_most=1)  # strength of brightness, contrast and saturation changes
    limit: int | None = key(None, at_least=1)  # at most this many training pictures
    classes: list[str] | None = key(None, words=True)  # names of the classes to keep; null: all
    mean: list[float] | None = key(None, at_least=0, at_most=1, length=3)  # of each channel; null: the data set's own
    std: list[float] | None = key(None, above=0, at_most=1, length=3)  # likewise; see hjepa.data.images.mean_and_std
    moved: bool = False  # each picture at a place and scale of its own on a plain canvas
    on_corrupt: str = key("error", choices=("error", "skip"))  # error, or skip: what an unreadable image file does


@dataclass
class RopeConfig:
    """Rotary positions; see hjepa.nn.rope."""

    use_rope: bool = False  # rotate queries and keys in every attention layer
    theta: float = key(10000.0, above=0)  # base of the frequencies; 100 suits grids of 8 to 30 patches
    kind: str = key("axial", choices=KINDS)  # axial: row and column halves; mixed: learned; fixed: golden angle
    learnable: bool = False  # train the frequencies
    theta_per_layer: list[float] | None = key(None, above=0)  # one theta per layer instead of one for all
    strategy: str = key("extrapolate", choices=STRATEGIES)  # what to do with positions on a grid not trained on
    coordinates: str = key("index", choices=COORDINATES)  # index: counted in patches; normalized: in picture widths
    fraction: float = key(1.0, above=0, at_most=1)  # share of each head's channels that rotates
    shift: float = key(0.0, at_least=0)  # training only: random shift, at most this share of half the grid
    jitter: float = key(1.0, at_least=1)  # training only: random stretch of each axis, between 1/jitter and jitter
    rescale: float = key(1.0, at_least=1)  # training only: random stretch of both axes alike


@dataclass
class PredictorConfig:
    """The narrow transformer that guesses target features."""

    embed_dim: int = key(96, at_least=1)  # width
    depth: int = key(2, at_least=1)  # layers
    num_heads: int = key(4, at_least=1)  # attention heads


@dataclass
class ProjectorConfig:
    """The small network between features and the view loss, thrown away after training."""

    hidden: int = key(512, at_least=1)  # width of its hidden layer
    out: int = key(128, at_least=1)  # width of its output


@dataclass
class ModelConfig:
    """The two encoders and the predictor; null means the encoder type's own value."""

    encoder_type: str = "vit_tiny_patch16_224"  # a timm VisionTransformer
    patch_size: int | None = key(8, at_least=1)  # patch side, pixels
    embed_dim: int | None = key(96, at_least=1)  # width
    depth: int | None = key(4, at_least=1)  # layers
    num_heads: int | None = key(4, at_least=1)  # attention heads
    class_token: bool | None = False  # keep a CLS token
    act_layer: str | None = key(None, choices=(None, "gelu", "gelu_tanh", "relu", "silu"))  # of the MLPs
    pretrained: bool = False  # start from timm's published weights
    use_absolute: bool = True  # keep the position embedding
    position_embedding: str = key("learned", choices=POSITION_EMBEDDINGS)  # sincos: fixed sines and cosines
    position_embedding_std: float | None = key(None, above=0)  # of a learned one at the start; null: 0.02, timm's
    use_alibi: bool = False  # bias attention by distance, 2-D ALiBi; on other grids by rope.strategy
    rope: RopeConfig = field(default_factory=RopeConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    level_weights: list[float] = key([1.0, 0.5, 0.25])  # one loss weight per level


@dataclass
class MasksConfig:
    """Which patches are seen and which are guessed; shares are of the patch grid."""

    num_targets: int = key(4, at_least=1)  # target blocks per image
    target_scale: list[float] = key([0.15, 0.2], interval=1.0)  # area of a target
    target_aspect: list[float] = key([0.75, 1.5], interval=math.inf)  # its height over width
    context_scale: list[float] = key([0.85, 1.0], interval=1.0)  # area of the context block


@dataclass
class ViewsConfig:
    """Crops of each picture, for the objectives views, both and labels (large ones only)."""

    large: int = key(2, at_least=1)  # views of data.image_size
    small: int = key(4, at_least=0)  # views of a smaller size
    small_size: float = key(0.5, above=0, at_most=1)  # their side, in image sizes
    large_scale: list[float] = key([0.3, 1.0], interval=1.0)  # area share of a large view
    small_scale: list[float] = key([0.05, 0.3], interval=1.0)  # area share of a small view
    color_jitter: float = key(0.4, at_least=0, at_most=1)  # brightness, contrast, saturation: factors 1 +- this
    grey: float = key(0.2, at_least=0, at_most=1)  # share of views without colour
    filter_width: list[float] = key([1.0, 1.0], above=0.5, interval=math.inf)  # factors on the widths of filters
    keep: float = key(0.5, above=0, at_most=1)  # views alone: share of a large view's patches that is encoded
    coordinates: str = key("view", choices=("view", "picture"))  # positions in the view, or in its picture (RoPE)


@dataclass
class LossConfig:
    """How a guess is compared with its target, and what keeps features from collapsing."""

    kind: str = key("smooth_l1", choices=DISTANCES)  # distance between prediction and target, or mse
    regularizer: str = key("none", choices=REGULARIZERS)  # none, variance or sketched_gaussian
    regularizer_weight: float = key(0.0, at_least=0)  # its weight in the loss
    view_loss: str = key("contrastive", choices=VIEW_LOSSES)  # how views are held together and pictures apart
    temperature: float = key(0.1, above=0)  # of contrastive
    spread_weight: float = key(0.02, at_least=0, at_most=1)  # of the regularizer in the other two
    masks_weight: float = key(1.0, at_least=0)  # of the masked cells under the objective both; that of the views is 1
    teacher: bool = False  # views are compared with the target encoder's embeddings of the large ones


@dataclass
class TrainConfig:
    """The loop. batch_size counts all processes and all accumulated parts together."""

    steps: int = key(1500, at_least=1)  # optimiser steps
    batch_size: int = key(64, at_least=1)  # images per optimiser step
    accumulate: int = key(1, at_least=1)  # parts that a process cuts its share of the batch into
    optimizer: str = key("adamw", choices=("adamw", "muon"))  # muon: for the matrices of blocks, AdamW for the rest
    lr: float = key(1e-3, above=0)  # peak learning rate of AdamW
    muon_lr: float = key(1e-2, above=0)  # peak learning rate of Muon
    min_lr: float = key(1e-5, at_least=0)  # learning rate at the end of the cosine
    warmup: int = key(100, at_least=0)  # steps of linear warm-up
    weight_decay: float = key(0.05, at_least=0)  # on matrices only
    clip_grad: float = key(1.0, above=0)  # largest gradient norm
    ema_start: float = key(0.99, at_least=0, at_most=1)  # momentum of the target encoder at step 0
    ema_end: float = key(1.0, at_least=0, at_most=1)  # momentum at the last step
    mixed_precision: str = key("auto", choices=("auto", "no", "bf16", "fp16"))  # auto: what the processor is fast in
    tf32: bool = False  # products of float32 matrices in TensorFloat-32, on GPUs that have it
    compile: bool = False  # compile the transformer blocks, once for each shape of their tokens
    whiten_patches: float | None = key(None, above=0)  # fixes the patch layer to components of patches (whitening.py)
    init_from: str | None = None  # weights to start from: a run's, a checkpoint's, or a name of list_pretrained()
    seed: int = key(0, at_least=0)  # everything random follows from it
    num_workers: int = key(0, at_least=0)  # loader processes
    threads: int = key(2, at_least=1)  # CPU threads of torch
    log_every: int = key(25, at_least=1)  # steps between log lines
    eval_every: int = key(250, at_least=1)  # steps between measures of the features
    checkpoint_every: int = key(250, at_least=1)  # steps between checkpoints
    keep_checkpoints: int = key(2, at_least=1)  # how many of the newest stay on disk
    tensorboard: bool = False  # also write TensorBoard events
    grad_checkpointing: bool = False  # recompute layers in the backward pass: less memory, more time


@dataclass
class EvaluateConfig:
    """How frozen features are read."""

    sizes: list[Any] = key([32, 48, 64, 96, 128])  # pixels: a side, or "48x96"
    gallery: int = key(2000, at_least=1)  # training pictures that the readers are fitted on
    queries: int = key(1000, at_least=1)  # test pictures
    placements: int = key(1, at_least=1, at_most=1000)  # fixed places that each test picture is read in; data.moved
    few: int | None = key(None, at_least=2)  # also a probe fitted on so few pictures, probe_few
    knn_k: int = key(20, at_least=1)  # neighbours that vote
    pool: str = key("mean", choices=("mean", "pyramid"))  # mean of patch tokens; pyramid: that and a 2x2 grid of means


@dataclass
class Config:
    """Everything a run depends on."""

    objective: str = key("masks", choices=OBJECTIVES)  # what is learned: masks, views, both, or labels
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def default_config() -> Config:
    """The defaults, as a typed DictConfig."""
    return cast(Config, OmegaConf.structured(Config))


def as_dicts(section: Any) -> dict[str, Any]:
    """A config or a section of it as nested dicts and lists."""
    return OmegaConf.to_container(section)  # type: ignore[return-value]


def config_of(tree: Mapping[str, Any], where: str) -> Config:
    """A whole config from nested mappings, such as an export holds. Raises ValueError as `load_config`."""
    config = default_config()
    _merge(config, tree, where)
    check_config(config)
    return config


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
            raise UserError(f"override {text!r} is not of the form key=value, such as train.steps=200")
        _set(config, key.strip(), _override(key.strip(), value.strip(), f"override {text!r}"), f"override {text!r}")
    check_config(config)
    return config


def _override(key: str, text: str, where: str) -> Any:
    """The value in key=value: YAML, but of keys that hold text the text itself, without the rules for comments, and
    of a list of names each as it stands."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key in TEXT and not quoted and text.lower() not in ("", "~", "null"):
        return text
    if not quoted and re.search(r"(^|\s)#", text):
        raise UserError(f"{where} holds a comment, '#...'; only files have comments")
    words = "words" in ALLOWED.get(key, ()) and text.lower() not in ("", "~", "null")
    return parse_yaml(text, where, words=words)


def save_config(config: Config, path: str | Path) -> None:
    """Write every value, defaults too, so that the file alone says what was run."""
    write_whole(path, dump_yaml(OmegaConf.to_container(cast(Any, config))))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of nested dicts."""
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def flat_config(config: Config) -> dict[str, Any]:
    """Dotted key and value of every key of a config."""
    return dict(_flat(cast(dict, OmegaConf.to_container(cast(Any, config)))))


KEYS = tuple(flat_config(default_config()))


def _fields(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Dotted key and field of every key."""
    for item in fields(section):
        if is_dataclass(item.type):
            yield from _fields(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


TEXT = {name for name, item in _fields() if item.type in (str, str | None)}
NUMBERS = {name for name, item in _fields() if item.type in (int, int | None, float)}


def _merge(config: Config, tree: Any, where: str, prefix: str = "") -> None:
    """Set every leaf of nested mappings; an empty section changes nothing."""
    if tree is None:
        return
    if not isinstance(tree, Mapping):
        what = prefix.rstrip(".") or "the file"
        raise UserError(f"{where}: {what} must hold keys with values, not {tree!r}")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        section = OmegaConf.select(cast(Any, config), name) if _is_name(name) else None
        if isinstance(section, DictConfig):
            _merge(config, value, where, f"{name}.")
        else:
            _set(config, name, value, where)


def _is_name(key: str) -> bool:
    return re.fullmatch(r"\w+(\.\w+)*", key) is not None


RETIRED = {"loss.views_weight": 1.0}  # keys that older run folders hold, and the one value that is still done


def _set(config: Config, key: str, value: Any, where: str) -> None:
    if key in RETIRED:
        if value == RETIRED[key]:
            return
        raise UserError(f"{where}: {key}={value!r} is no longer a key; what is done is {key}={RETIRED[key]}")
    if key not in KEYS:
        inside = next((k for k in KEYS if k.startswith(f"{key}.")), "")
        hint = f"nearest: {nearest(key, KEYS) or 'none'}"
        if key.endswith("in_chans"):
            hint = "pictures have three channels, grey ones are repeated"
        if inside:
            hint = f"it is a section; name a key in it, such as {inside}"
        raise UserError(f"{where}: unknown key {key!r}; {hint}")
    if "${" in str(value):
        raise UserError(f"{where}: {key}={value!r} holds '${{'; config values are never evaluated")
    if key in TEXT and not isinstance(value, str | None):
        raise UserError(f"{where}: {key}={value!r} has the wrong type: it is no text; write it in quotes")
    if "words" in ALLOWED[key] and isinstance(value, list) and any(isinstance(word, int | float) for word in value):
        raise UserError(f"{where}: {key}={value!r} has the wrong type: not all are text; write each in quotes")
    if key == "data.image_size" and isinstance(value, str | list):
        _refuse_size(value, f"{where}: {key}={value!r}")
    if key in NUMBERS and isinstance(value, str):
        raise UserError(f"{where}: {key}={value!r} has the wrong type: it is text, not a number in decimal digits")
    try:
        OmegaConf.update(cast(Any, config), key, value)
    except (OmegaConfBaseException, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {key}={value!r} has the wrong type: {reason}") from None


def _refuse_size(value: Any, what: str) -> None:
    """Training is on squares: ValueError on what is a size in another form."""
    try:
        height, width = size_pair(value)
    except UserError:
        return  # no size at all, a wrong type like any other
    hint = f"; evaluate.sizes=[{height}x{width}] reads features at such a size" if height != width else ""
    raise UserError(f"{what} must be one side of a square in pixels, such as {height}{hint}")


# ---- what makes sense

PICTURE_COORDINATES = {  # what takes places in the picture as they are
    "model.rope.use_rope": True, "model.use_alibi": False, "model.rope.strategy": "interpolate",
    "model.rope.shift": 0.0, "model.rope.jitter": 1.0, "model.rope.rescale": 1.0,
}  # fmt: skip
DIVISIBLE = {
    "model.embed_dim": "model.num_heads",
    "model.predictor.embed_dim": "model.predictor.num_heads",
    "train.batch_size": "train.accumulate",
}


ALLOWED = {name: item.metadata for name, item in _fields()}


def check_config(config: Config) -> None:
    """Refuse values that have the right type and make no sense, the first that is found.

    Raises:
        ValueError: one line that names the key, its value and what is allowed.
    """
    values = flat_config(config)
    for name, value in values.items():
        _check_value(name, value, ALLOWED[name])
    _check_together(values)


def _check_value(name: str, value: Any, allowed: Mapping[str, Any]) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float):
            _check_number(name, number, allowed)
        elif isinstance(value, list) and name != "evaluate.sizes":  # the container lets mappings into lists
            kind, name_of_kind = (str, "names") if "words" in allowed else (int, "numbers")
            if not isinstance(number, kind):
                raise UserError(f"{name}={value!r} must be a list of {name_of_kind}")
    length = allowed.get("length")
    if length and value is not None and len(value) != length:
        raise UserError(f"{name}={value} must be {length} numbers")
    top = allowed.get("interval")
    if top and (len(value) != 2 or not 0 < value[0] <= value[1] <= top):
        raise UserError(f"{name}={value} must be two numbers, 0 < smallest <= largest <= {top}")
    choices = allowed.get("choices", (value,))
    if value not in choices:
        words = [word for word in choices if word is not None]
        near = nearest(value, words) or "none"
        raise UserError(f"{name}={value!r} must be one of {', '.join(words)}; nearest: {near}")


def _check_number(name: str, number: float, allowed: Mapping[str, Any]) -> None:
    if not -LARGEST <= number <= LARGEST:  # false for NaN too
        raise UserError(f"{name}={str(number)[:30]} must be a finite number, at most {LARGEST}")
    low, above, high = (allowed.get(word) for word in ("at_least", "above", "at_most"))
    if high is not None and not (low or above or 0) <= number <= high:
        raise UserError(f"{name}={number} must be between {low or above or 0} and {high}")
    if low is not None and number < low:
        raise UserError(f"{name}={number} must be at least {low}")
    if above is not None and number <= above:
        raise UserError(f"{name}={number} must be above {above}")


def _check_together(values: Mapping[str, Any]) -> None:
    _check_image_size(values)
    for name, parts in DIVISIBLE.items():
        if values[name] and values[parts] and values[name] % values[parts]:
            raise UserError(f"{name}={values[name]} is not divisible by {parts}={values[parts]}")
    if values["views.coordinates"] == "picture":
        for name, needed in PICTURE_COORDINATES.items():
            if values[name] != needed:
                raise UserError(f"views.coordinates=picture needs {name}={needed}, not {values[name]}")
        if values["objective"] == "masks":
            raise UserError("views.coordinates=picture is of views, not of objective=masks; nearest: both")
    if values["objective"] in ("views", "both"):
        large, small = values["views.large"], values["views.small"]
        if large + small < 2:
            raise UserError(f"views.large={large} and views.small={small} make one view")
        batch, parts = values["train.batch_size"], values["train.accumulate"]
        if batch < 2 * parts:
            raise UserError(f"train.batch_size={batch} in train.accumulate={parts} parts: views need 2 or more each")
        if values["loss.teacher"] and values["loss.view_loss"] == "contrastive" and large == 1:
            what = "views.large=1 has no other large view for loss.teacher=true to compare it with"
            raise UserError(f"{what}; nearest: views.large=2")
    _check_spread(values)
    if (values["loss.regularizer"] == "none") != (values["loss.regularizer_weight"] == 0):
        pair = f"loss.regularizer={values['loss.regularizer']} and loss.regularizer_weight"
        raise UserError(f"{pair}={values['loss.regularizer_weight']} do nothing: set both, such as variance and 0.3")
    few, gallery = values["evaluate.few"], values["evaluate.gallery"]
    if few is not None and few > gallery:
        raise UserError(f"evaluate.few={few} pictures are more than evaluate.gallery={gallery}")
    check_placements(values["evaluate.placements"], values["data.moved"])
    if values["train.ema_end"] < values["train.ema_start"]:
        start = f"train.ema_start={values['train.ema_start']}"
        raise UserError(f"train.ema_end={values['train.ema_end']} must not be below {start}")
    for name in ("train.init_from", "model.pretrained"):
        if values["train.whiten_patches"] is not None and values[name]:
            own = f"{name}={str(values[name]).lower() if values[name] is True else values[name]}"
            raise UserError(f"{own} has a patch layer of its own: leave train.whiten_patches at null")
    weights = values["model.level_weights"]
    if not 1 <= len(weights) <= 4 or min(weights) < 0 or not sum(weights):
        raise UserError(f"model.level_weights={weights} must be 1 to 4 numbers >= 0, not all 0")
    for size in values["evaluate.sizes"]:
        size_pair(size)


def check_placements(number: int, moved: bool, name: str = "evaluate.placements") -> None:
    """ValueError unless test pictures can be read in so many fixed places each. name: of what said so."""
    _check_number(name, number, ALLOWED["evaluate.placements"])
    if number > 1 and not moved:
        raise UserError(f"{name}={number}: pictures have one place each unless data.moved=true; nearest: {name}=1")


# what two runs must share to be read together; the rest of `data` is about training alone
READ = ("name", "path", "image_size", "limit", "classes", "on_corrupt", "moved", "mean", "std")


def check_alike(name: str, config: Config, first: str, shared: Config, *, sizes: bool) -> None:
    """Refuse a run that would be read with settings of the first one; without `sizes` evaluate.sizes may differ."""
    own, others = flat_config(config), flat_config(shared)
    for key in (*(f"data.{word}" for word in READ), *(word for word in own if word.startswith("evaluate."))):
        if own[key] != others[key] and (sizes or key != "evaluate.sizes"):
            near = "give --sizes" if key == "evaluate.sizes" else "read them one by one"
            what = f"{key}={own[key]}, {first} with {others[key]}; {near}"
            raise UserError(f"{name} was trained with other {key.partition('.')[0]} settings: {what}")


def _check_spread(values: Mapping[str, Any]) -> None:
    """The variance regularizer needs two images to differ."""
    batch, parts = values["train.batch_size"], values["train.accumulate"]
    images = batch // parts * (1 if values["objective"] == "masks" else values["views.large"])
    if values["loss.regularizer"] == "variance" and images < 2:
        what = f"train.batch_size={batch} in train.accumulate={parts} parts: loss.regularizer=variance needs 2 or more"
        raise UserError(f"{what} each; nearest: train.batch_size={2 * parts}")


def patch_side(encoder_type: str, patch_size: int | None) -> int:
    """Side of a patch in pixels: the one set, or else the one that timm's name says."""
    named = re.search(r"patch(\d+)", encoder_type)
    return patch_size or (int(named[1]) if named else 0) or 1


def _check_image_size(values: Mapping[str, Any]) -> None:
    patch, size = patch_side(values["model.encoder_type"], values["model.patch_size"]), values["data.image_size"]
    near = max(1, (2 * size + patch) // (2 * patch)) * patch
    if size != near:
        raise UserError(f"data.image_size={size} is not a multiple of the patch, {patch} pixels; nearest: {near}")
    if not values["data.train_scales"]:
        raise UserError("data.train_scales=[] must name one scale or more; [1.0] trains at image_size alone")


# ---- what changes nothing

IDLE: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (  # beginnings of keys, and what makes them idle
    (("model.rope.",), "model.rope.use_rope", (False,)),
    (("data.crop_scale", "data.color_jitter"), "objective", ("views", "both", "labels")),
    (("views.", "loss.view_loss"), "objective", ("masks",)),
    (("views.small",), "objective", ("labels",)),
    (("views.keep",), "objective", ("both", "labels")),
    (("loss.view_loss", "loss.temperature", "loss.spread_weight", "loss.teacher", "model.projector."),
     "objective", ("masks", "labels")),
    (("loss.masks_weight",), "objective", ("masks", "views", "labels")),
    (("loss.kind", "masks.", "model.predictor."), "objective", ("views", "labels")),
    (("loss.temperature",), "loss.view_loss", ("sketched_gaussian", "variance")),
    (("loss.spread_weight",), "loss.view_loss", ("contrastive",)),
    (("train.muon_lr",), "train.optimizer", ("adamw",)),
)  # fmt: skip
SIZES = ("model.embed_dim", "model.depth", "model.num_heads")


def idle_overrides(config: Config, overrides: Iterable[str]) -> list[str]:
    """A line for each override that a training of this config never looks at, and for an encoder_type whose sizes
    are not its own."""
    values, lines = flat_config(config), []
    given = list(dict.fromkeys(text.partition("=")[0].strip() for text in overrides))
    for key in given:
        for beginnings, decides, idle in IDLE:
            biased = key == "model.rope.strategy" and values["model.use_alibi"]
            if key.startswith(beginnings) and key != decides and values[decides] in idle and not biased:
                value, other = (str(v).lower() if isinstance(v, bool) else v for v in (values[key], values[decides]))
                lines.append(f"{key}={value} changes nothing while {decides} is {other}")
                break
    kept = [f"{name}={values[name]}" for name in SIZES if name not in given and values[name] is not None]
    if kept and "model.encoder_type" in given:
        named = f"model.encoder_type={values['model.encoder_type']}"
        lines.append(f"{named} is built with {', '.join(kept)} of the config; null is the type's own")
    return lines
