"""From a config to the objects of a run: encoders, model, optimiser groups, data, masks.

Layers take plain keyword arguments; here is the one place that knows which config value goes to which of them.
Not covered: reading and checking configs (`hjepa.config`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from .config import Config, patch_side
from .data.images import ImageData, load_data
from .nn.encoders import ContextEncoder, TargetEncoder, create_encoder
from .nn.hjepa import HJEPA
from .nn.masks import Masks, sample_masks
from .nn.predictor import Predictor
from .train.schedule import generator_at, mix


def plain(section: Any) -> dict[str, Any]:
    """A config or a section of it as plain dicts and lists."""
    return OmegaConf.to_container(section)  # type: ignore[return-value]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU random numbers start from `seed` inside, and go on as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def encoder_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `create_encoder` that a config asks for, without the EMA schedule."""
    model, rope = config.model, plain(config.model.rope)
    use_rope, theta = rope.pop("use_rope"), rope.pop("theta")
    vit = {name: getattr(model, name) for name in ("patch_size", "embed_dim", "depth", "num_heads", "class_token")}
    vit = {name: value for name, value in vit.items() if value is not None}
    if vit.get("class_token") is False:  # timm then wants mean pooling, whose norm would replace the tokens' norm
        vit |= {"global_pool": "avg", "fc_norm": False}
    return {
        "encoder_type": model.encoder_type,
        "img_size": config.data.image_size,
        "use_rope": use_rope,
        "rope_theta": theta,
        "use_absolute": model.use_absolute,
        "rope": rope,
        "vit": vit,
    }


def build_encoders(config: Config, *, pretrained: bool = False) -> tuple[ContextEncoder, TargetEncoder]:
    """Context and target encoder of a config as its run has them at step 0; the EMA schedule is over train.steps.

    pretrained: start from timm's published weights (config.model.pretrained is for `build_model`).
    """
    train = config.train
    with seeded(mix(train.seed, "encoder")):
        return create_encoder(
            **encoder_arguments(config),
            pretrained=pretrained,
            ema_start=train.ema_start,
            ema_end=train.ema_end,
            ema_steps=train.steps,
        )


def build_model(config: Config) -> HJEPA:
    """The model of a config as its run has it at step 0: the weights follow from train.seed alone.

    Raises ValueError on options that do not fit, from the layers themselves.
    """
    context, target = build_encoders(config, pretrained=config.model.pretrained)
    arguments = encoder_arguments(config)
    with seeded(mix(config.train.seed, "predictor")):
        predictor = Predictor(
            context.embed_dim,
            **plain(config.model.predictor),
            levels=len(config.model.level_weights),
            grid_size=context.grid_size,
            num_prefix_tokens=context.num_prefix_tokens,
            **{name: arguments[name] for name in ("use_rope", "rope_theta", "use_absolute", "rope")},
        )
    if config.train.grad_checkpointing:
        context.vit.set_grad_checkpointing(True)
    return HJEPA(
        context,
        target,
        predictor,
        level_weights=tuple(config.model.level_weights),
        distance=config.loss.kind,
        regularizer=config.loss.regularizer,
        regularizer_weight=config.loss.regularizer_weight,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: the weights of linear and convolution layers decay; biases, norms, tokens, position tables and
    frequencies do not. Parameters without gradient (the target encoder) are in neither."""
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]


def train_sizes(config: Config) -> list[int]:
    """The image sides that training draws from, in pixels: image_size times each scale, to the nearest patch."""
    patch = patch_side(config.model.encoder_type, config.model.patch_size)
    return [max(1, round(config.data.image_size * scale / patch)) * patch for scale in config.data.train_scales]


def load_split(config: Config, split: str) -> ImageData:
    options = config.data
    return load_data(
        options.name,
        split,
        root=options.root,
        path=options.path,
        image_size=max(train_sizes(config)),
        limit=options.limit if split == "train" else None,
        on_corrupt=options.on_corrupt,
    )


def draw_masks(config: Config, grid_size: tuple[int, int], step: int) -> Masks:
    """The masks of the whole global batch of a step."""
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain(config.masks).items()}
    return sample_masks(
        config.train.batch_size,
        grid_size,
        levels=len(config.model.level_weights),
        generator=generator_at(config.train.seed, step, "masks"),
        **options,
    )
