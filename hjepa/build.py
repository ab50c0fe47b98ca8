"""From a config to the objects of a run: encoders, model, optimiser groups, data, masks.

Layers take plain keyword arguments; here is the one place that knows which config value goes to which of them.
Not covered: reading and checking configs (`hjepa.config`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from .config import Config, as_dicts, patch_side
from .data.images import RGB, ImageData, load_data, seeded, side_for
from .data.views import Crops, draw_crops
from .inputs import users_own
from .nn.encoders import ContextEncoder, TargetEncoder, create_encoder
from .nn.hjepa import HJEPA, build_projector
from .nn.masks import BatchMasks, Masks, MaskShapes, sample_kept
from .nn.predictor import Predictor
from .train.schedule import generator_at, mix

VIT_KEYS = ("patch_size", "embed_dim", "depth", "num_heads", "class_token", "act_layer")


def encoder_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `create_encoder` that a config asks for, without the EMA schedule."""
    model, rope = config.model, as_dicts(config.model.rope)
    use_rope, theta = rope.pop("use_rope"), rope.pop("theta")
    vit = {name: getattr(model, name) for name in VIT_KEYS}
    vit = {name: value for name, value in vit.items() if value is not None}
    return {
        "encoder_type": model.encoder_type,
        "img_size": config.data.image_size,
        "use_rope": use_rope,
        "rope_theta": theta,
        "use_absolute": model.use_absolute,
        "position_embedding": model.position_embedding,
        "position_embedding_std": model.position_embedding_std,
        "use_alibi": model.use_alibi,
        "rope": rope,
        "vit": vit,
    }


@users_own()
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


@users_own()
def build_model(config: Config, classes: int | None = None) -> HJEPA:
    """The model of a config as its run has it at step 0: the weights follow from train.seed alone.

    classes: number of classes of the data, for the objective labels. Raises ValueError on options that do not fit,
    from the layers themselves.
    """
    context, target = build_encoders(config, pretrained=config.model.pretrained)
    loss, masked = config.loss, config.objective in ("masks", "both")
    with seeded(mix(config.train.seed, "predictor")):
        predictor = _build_predictor(config, context) if masked else None
    with seeded(mix(config.train.seed, "projector")):
        viewed = config.objective in ("views", "both")
        projector = build_projector(context.embed_dim, **as_dicts(config.model.projector)) if viewed else None
        model = HJEPA(
            context,
            target,
            predictor,
            objective=config.objective,
            level_weights=tuple(config.model.level_weights),
            distance=loss.kind,
            regularizer=loss.regularizer,
            regularizer_weight=loss.regularizer_weight,
            projector=projector,
            views=loss.view_loss,
            **{k: getattr(loss, k) for k in ("masks_weight", "temperature", "spread_weight")},
            teacher=loss.teacher,
            classes=classes,
        )
    if config.train.grad_checkpointing:
        context.vit.set_grad_checkpointing(True)
    return model


def _build_predictor(config: Config, context: ContextEncoder) -> Predictor:
    arguments = encoder_arguments(config)
    return Predictor(
        context.embed_dim,
        **as_dicts(config.model.predictor),
        levels=len(config.model.level_weights),
        grid_size=context.grid_size,
        num_prefix_tokens=context.num_prefix_tokens,
        **{name: arguments[name] for name in ("use_rope", "rope_theta", "use_absolute", "use_alibi", "rope")},
    )


def train_sizes(config: Config) -> list[int]:
    """The image sides that training draws from, in pixels: image_size times each scale, to the nearest patch."""
    patch = patch_side(config.model.encoder_type, config.model.patch_size)
    return [max(1, round(config.data.image_size * scale / patch)) * patch for scale in config.data.train_scales]


def load_split(config: Config, split: str, repeats: int = 1, read_at: Sequence[Any] = ()) -> ImageData:
    """The pictures of a split, as `load_data` gives them; moved ones each in `repeats` places.

    read_at: sizes in pixels, beside those of training, that pictures will be read at; they have as much detail.
    """
    options = config.data
    data = load_data(
        options.name,
        split,
        root=options.root,
        path=options.path,
        image_size=max([*train_sizes(config), *([side_for(read_at)] if read_at else [])]),
        limit=options.limit if split == "train" else None,
        on_corrupt=options.on_corrupt,
        moved=options.moved,
        repeats=repeats,
        classes=options.classes,
    )
    return replace(
        data,
        mean=cast(RGB, tuple(options.mean)) if options.mean else data.mean,
        std=cast(RGB, tuple(options.std)) if options.std else data.std,
    )


def small_side(config: Config, side: int) -> int:
    """Side of a small view in pixels beside large ones of `side`: views.small_size of it, to the nearest patch."""
    patch = patch_side(config.model.encoder_type, config.model.patch_size)
    return max(1, round(config.views.small_size * side / patch)) * patch


@users_own()
def batch_masks(config: Config, grid_size: tuple[int, int], step: int) -> BatchMasks | None:
    """The masks of the whole global batch of a step, of all large views of it, drawn where they are asked for; None
    where every patch is seen."""
    if config.objective == "labels" or (config.objective == "views" and config.views.keep == 1):
        return None
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in as_dicts(config.masks).items()}
    shapes = MaskShapes(len(config.model.level_weights), **options)

    @users_own()
    def draw(block: int, samples: int) -> Masks:
        generator = generator_at(config.train.seed, step, f"masks {block}" if block else "masks")
        if config.objective == "views":
            return sample_kept(samples, grid_size, config.views.keep, generator)
        return shapes.more(samples, grid_size, generator) if block else shapes.first(samples, grid_size, generator)

    return BatchMasks(config.train.batch_size * (1 if config.objective == "masks" else config.views.large), draw)


def draw_masks(config: Config, grid_size: tuple[int, int], step: int) -> Masks | None:
    """`batch_masks`, drawn for all samples."""
    masks = batch_masks(config, grid_size, step)
    return None if masks is None else masks.rows(slice(None))


@users_own()
def draw_views(config: Config, step: int) -> tuple[list[Crops], list[Crops]]:
    """Large and small views of every picture of the global batch of a step."""
    options, generator = config.views, generator_at(config.train.seed, step, "views")
    counts = options.large, 0 if config.objective == "labels" else options.small
    large, small = (
        [
            draw_crops(
                config.train.batch_size,
                scale,
                flip=config.data.flip,
                color_jitter=options.color_jitter,
                grey=options.grey,
                filter_width=options.filter_width,
                generator=generator,
            )
            for _ in range(count)
        ]
        for count, scale in zip(counts, (options.large_scale, options.small_scale), strict=True)
    )
    return large, small
