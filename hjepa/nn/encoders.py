"""ContextEncoder and TargetEncoder: a timm VisionTransformer with rotary positions, right at every image size.

Both are the same construction (`_Encoder`); the target adds the exponential moving average of the context's weights.
Four modes of telling a token where it is, from two switches:

    use_absolute  use_rope
    True          False      absolute: timm's position embedding, resampled (bicubic) on other grids
    False         True       rope: rotation only
    True          True       hybrid: both, which is what the report's `use_rope=True` means
    False         False      none: a bag of patches

A third, use_alibi, biases the scores by distance: a competitor of the rotation (`alibi.py`).

Tokens hidden from the context encoder are dropped, not zeroed: they cost nothing and nobody attends to them. The kept
ones take their true positions along. With RoPE off and no tokens dropped the output is plain timm's
`forward_features`, bit for bit in float32 (in half precision see `attention.py`).

Sources: Assran et al., "I-JEPA", 2023 (context, target, EMA); timm for the transformer itself.
Not covered: building the transformer and which of timm's fit (`vit.py`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..inputs import check_choice, patch_grid
from .alibi import ALiBi2D, with_bias
from .checks import as_masked, check_index, check_masked, square_patch
from .frequencies import STRATEGIES, grid_positions, sincos_positions
from .rope import VisionRoPE2D
from .vit import GridViT, add_rope, block_weights, build_vit, freeze_head, run_block, same_shapes

POSITION_EMBEDDINGS = ("learned", "sincos")


class _Encoder(nn.Module):
    """What context and target encoder share. See `create_encoder` for the arguments.

    pixel_mean, pixel_std: of the pixels in its training, white = 1, where it was loaded from a run or an export.
    """

    pixel_mean: tuple[float, float, float] | None = None
    pixel_std: tuple[float, float, float] | None = None

    def __init__(
        self,
        encoder_type: str = "vit_base_patch16_224",
        img_size: int | tuple[int, int] = 224,
        pretrained: bool = False,
        use_rope: bool = False,
        rope_theta: float = 10000.0,
        *,
        use_absolute: bool = True,
        position_embedding: str = "learned",
        position_embedding_std: float | None = None,
        use_alibi: bool = False,
        rope: Mapping[str, Any] | None = None,
        vit: Mapping[str, Any] | None = None,
        use_gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.encoder_type, self.use_rope, self.use_absolute = encoder_type, use_rope, use_absolute
        options = dict(vit or {})
        if options.get("patch_size") is not None:  # before timm builds on it
            patch_grid(img_size, square_patch(options["patch_size"]))
        self.vit: GridViT = build_vit(encoder_type, img_size, pretrained, **options)
        self.patch_size = square_patch(self.vit.patch_embed.feat_ratio(as_scalar=False))
        patch_grid(img_size, self.patch_size)
        freeze_head(self.vit)
        self.position_embedding = position_embedding if use_absolute else None
        if not use_absolute:
            if position_embedding != "learned" or position_embedding_std is not None:
                given = f"position_embedding={position_embedding!r}, position_embedding_std={position_embedding_std}"
                raise ValueError(f"{given} without use_absolute=True is of no embedding")
            self.vit.pos_embed = None
        elif position_embedding != "learned" or position_embedding_std is not None:
            if pretrained:
                raise ValueError(
                    "pretrained=True brings a position embedding: leave position_embedding='learned' and "
                    "position_embedding_std=None"
                )
            self._start_embedding(position_embedding, position_embedding_std)
        self.rope = self._add_rope(rope_theta, dict(rope or {})) if use_rope else None
        self.alibi = self._add_alibi((rope or {}).get("strategy", "extrapolate")) if use_alibi else None
        self.vit.set_grad_checkpointing(use_gradient_checkpointing)

    def _start_embedding(self, kind: str, std: float | None) -> None:
        """The position embedding at the start: fixed sines and cosines of the training grid, or random of that std."""
        check_choice("position_embedding", kind, POSITION_EMBEDDINGS)
        embedding: Any = self.vit.pos_embed
        if kind == "learned" and std is not None:
            limit = max(2.0, 5 * std)  # timm's bounds, but for spreads that they would cut
            nn.init.trunc_normal_(embedding, std=std, a=-limit, b=limit)
            return
        if std is not None:
            raise ValueError(f"position_embedding=sincos is fixed: leave position_embedding_std at None, not {std}")
        if self.embed_dim % 4:
            raise ValueError(f"position_embedding=sincos takes a width that is a multiple of 4, not {self.embed_dim}")
        code = sincos_positions(grid_positions(*self.grid_size), self.embed_dim)
        with torch.no_grad():
            embedding.zero_()[0, -len(code) :] = code  # nothing for tokens without a place
        embedding.requires_grad_(False)

    def _add_alibi(self, strategy: str) -> ALiBi2D:
        first: Any = self.vit.blocks[0].attn
        alibi = ALiBi2D(first.num_heads, self.grid_size, strategy)
        self.vit.__dict__["alibi"] = alibi
        return alibi

    def _add_rope(self, theta: float, options: dict[str, Any]) -> VisionRoPE2D:
        first: Any = self.vit.blocks[0].attn
        rope = VisionRoPE2D(
            getattr(first, "head_dim", 0),
            self.patch_size,
            self.grid_size,
            theta,
            num_heads=first.num_heads,
            num_layers=len(self.vit.blocks),
            **options,
        )
        for layer, block in enumerate(self.vit.blocks):
            self.vit.blocks[layer] = add_rope(block, rope, layer, self.num_prefix_tokens)
        self.vit.__dict__["rope"] = rope
        return rope

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """A checkpoint with a position embedding loads into an encoder without one, which has no use for it."""
        if not self.use_absolute:
            state_dict.pop(f"{prefix}vit.pos_embed", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def embed_dim(self) -> int:
        """Width D of a token."""
        return self.vit.embed_dim

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) of the training grid, in patches."""
        return tuple(self.vit.patch_embed.grid_size)

    @property
    def num_patches(self) -> int:
        """Patches of the training grid."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def strategies(self) -> tuple[str, ...]:
        """How it can be read on other grids (`STRATEGIES`); none without relative positions."""
        fitting = [set(where.strategies) for where in (self.rope, self.alibi) if where is not None]
        return tuple(s for s in STRATEGIES if fitting and s in set.intersection(*fitting))

    def get_patch_size(self) -> int:
        """`patch_size`."""
        return self.patch_size

    def get_num_patches(self, img_size: int | tuple[int, int] | None = None) -> int:
        """Patches of a picture of that size in pixels, by default of the training size."""
        height, width = self.grid_size if img_size is None else patch_grid(img_size, self.patch_size)
        return height * width

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS, registers, distillation."""
        return self.vit.num_prefix_tokens

    def image_grid(self, images: Tensor) -> tuple[int, int]:
        """Patch grid of `images` `[B, C, h, w]`. Raises ValueError where the size is not a multiple of the patch."""
        return self.vit.image_grid(images)

    def forward(
        self,
        images: Tensor,
        context_idx: Tensor | None = None,
        is_masked: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Encode images of any size that is a multiple of the patch.

        Args:
            images: `[B, C, h, w]`.
            context_idx: `[B, n]`, the patches to keep of each sample (row-major indices); the others are dropped.
            is_masked: `[B, N]` booleans, True = hidden. The same by a mask: the output keeps all N places, and hidden
                ones hold zeros.
            positions: `[N, 2]` or `[B, N, 2]`, (row, column) in patches, in place of the grid's; RoPE and ALiBi only.
            mask: another name of `is_masked`, which may also hold numbers, 1 = hidden and 0 = seen.

        Returns:
            `[B, prefix + N, D]`, or `[B, prefix + n, D]` with context_idx, after the final norm.

        Raises:
            ValueError: sizes, indices or masks that do not fit, an empty context.
        """
        grid = self.image_grid(images)
        if mask is not None:
            if is_masked is not None:
                raise ValueError("mask is another name of is_masked: give one of them")
            is_masked = as_masked(mask)
        if is_masked is not None:
            if context_idx is not None:
                raise ValueError("give context_idx or is_masked, not both")
            return self._forward_masked(images, is_masked, positions)
        if context_idx is not None:
            check_index(context_idx, images.shape[0], grid)
        return self._encode(images, grid, context_idx, positions, None)

    def _encode(
        self,
        images: Tensor,
        grid: tuple[int, int],
        index: Tensor | None,
        positions: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor:
        x = self.vit.embed(images)
        if index is not None:
            prefix, patches = x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], dim=1)
            x = torch.cat((prefix, patches.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))), dim=1)
        x = self.vit.norm_pre(x)
        tables = self.vit.tables(x.shape[0], grid, x.device, index=index, positions=positions)
        bias = self.vit.bias(grid, x, index=index, positions=positions)
        return self.vit.norm(self._run_blocks(x, tables, with_bias(bias, attn_mask)))

    def _run_blocks(self, x: Tensor, tables: list[Tensor | None], attn_mask: Tensor | None) -> Tensor:
        saving = self.vit.grad_checkpointing and self.training and torch.is_grad_enabled()
        for block, table in zip(self.vit.blocks, tables, strict=False):  # timm may have pruned blocks
            if saving:
                x = checkpoint(run_block, block, x, table, attn_mask, use_reentrant=False)
            else:
                x = run_block(block, x, table, attn_mask)
        return x

    def _forward_masked(self, images: Tensor, is_masked: Tensor, positions: Tensor | None) -> Tensor:
        """Visible tokens first, as many as the fullest sample has; the surplus of the others is masked as keys."""
        grid, batch = self.image_grid(images), images.shape[0]
        patches, prefix = grid[0] * grid[1], self.num_prefix_tokens
        check_masked(is_masked, batch, patches)
        most = int((~is_masked).sum(1).max())
        index = is_masked.int().argsort(dim=1, stable=True)[:, :most]
        surplus = is_masked.gather(1, index)
        attn_mask = None
        if surplus.any():
            keys = torch.cat((surplus.new_zeros(batch, prefix), surplus), dim=1)
            attn_mask = ~keys[:, None, None, :]
        encoded = self._encode(images, grid, index, positions, attn_mask)
        kept = encoded[:, prefix:].masked_fill(surplus[..., None], 0)
        out = encoded.new_zeros(batch, patches, encoded.shape[-1])
        out = out.scatter(1, index[..., None].expand_as(kept), kept)
        return torch.cat((encoded[:, :prefix], out), dim=1)

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """Attention weights of every layer, `[B, heads, prefix + N, prefix + N]` each, RoPE or not, for pictures."""
        grid = self.image_grid(images)
        x = self.vit.norm_pre(self.vit.embed(images))
        maps, bias = [], self.vit.bias(grid, x)
        for block, table in zip(self.vit.blocks, self.vit.tables(len(x), grid, x.device), strict=False):
            maps.append(block_weights(block, x, table, bias))
            x = run_block(block, x, table, bias)
        return maps


class ContextEncoder(_Encoder):
    """The encoder that is trained. It sees the context patches only."""


class TargetEncoder(_Encoder):
    """The encoder that makes the targets: an exponential moving average, never trained, always in eval mode.

    The momentum rises linearly from `ema_start` to `ema_end` over `ema_steps` (I-JEPA: 0.996 -> 1.0). `ema_momentum`,
    `ema_momentum_end` and `ema_warmup_steps` are other names of the three.
    """

    def __init__(
        self, *args: Any, ema_start: float = 0.996, ema_end: float = 1.0, ema_steps: int = 1000,
        ema_momentum: float | None = None, ema_momentum_end: float | None = None, ema_warmup_steps: int | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        ema_start = ema_start if ema_momentum is None else ema_momentum
        ema_end = ema_end if ema_momentum_end is None else ema_momentum_end
        ema_steps = ema_steps if ema_warmup_steps is None else ema_warmup_steps
        self.set_schedule(ema_start, ema_end, ema_steps)
        self.requires_grad_(False)
        self.eval()

    def set_schedule(self, ema_start: float, ema_end: float, ema_steps: int) -> None:
        """Set the momentum schedule. Raises ValueError unless 0 <= start <= end <= 1 and there is a step."""
        if not (0 <= ema_start <= ema_end <= 1 and ema_steps >= 1):
            raise ValueError(
                f"EMA momentum needs 0 <= start <= end <= 1 and steps >= 1, got {ema_start}, {ema_end}, {ema_steps}"
            )
        self.ema_start, self.ema_end, self.ema_steps = ema_start, ema_end, ema_steps

    def train(self, mode: bool = True) -> "TargetEncoder":
        """Stay in eval mode whatever the parent is set to."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ContextEncoder's, without gradient."""
        return super().forward(*args, **kwargs)

    def momentum_at(self, step: int) -> float:
        """Momentum of the update after optimiser step `step` (0, 1, ..)."""
        return self.ema_start + (self.ema_end - self.ema_start) * min(max(step / self.ema_steps, 0.0), 1.0)

    def copy_from_context_encoder(self, context_encoder: nn.Module) -> None:
        """Take the context encoder's weights as they are.

        Raises:
            RuntimeError: it is built differently.
            ValueError: it takes the same weights and gives other features, by its rotation, its absolute table, its
                heads, activation or norms.
        """
        check_positions(self, context_encoder)
        self.load_state_dict(context_encoder.state_dict())

    @torch.no_grad()
    def update_from_context_encoder(self, context_encoder: nn.Module, current_step: int) -> float:
        """target = m * target + (1 - m) * context for parameters and float buffers, copies of the rest; returns m.

        The context encoder may be in any precision. Raises ValueError for one built differently, or that rotates
        otherwise, or a target encoder in half precision.
        """
        check_positions(self, context_encoder)
        mine, theirs = dict(_named_tensors(self)), dict(_named_tensors(context_encoder))
        if mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())
            raise ValueError(f"context encoder is built differently: {odd[0]} is in one of the two only")
        floats = [name for name, t in mine.items() if t.is_floating_point()]
        momentum = self.momentum_at(current_step)
        narrow = next((mine[n].dtype for n in floats if mine[n].element_size() < 4), None)
        if narrow is not None and 0 < momentum < 1:
            raise ValueError(
                f"a target encoder in {narrow} cannot hold an average with momentum {momentum:g}, small steps are "
                "rounded away: keep it in float32, target_encoder.float(), whatever the context encoder's precision"
            )
        torch._foreach_lerp_([mine[n] for n in floats], [theirs[n].to(mine[n].dtype) for n in floats], 1 - momentum)
        for name in mine.keys() - set(floats):
            mine[name].copy_(theirs[name])
        return momentum


def check_positions(target: _Encoder, context: nn.Module) -> None:
    """ValueError if the same weights give other features in the two, by their positions or by `same_shapes`."""
    if not isinstance(context, _Encoder):  # inside another module: not known
        return
    theirs, mine = _settings(context), _settings(target)
    for name in theirs:
        if name in mine and theirs[name] != mine[name]:
            raise ValueError(
                f"context encoder has {name}={theirs[name]!r} and this encoder {name}={mine[name]!r}: the same weights "
                "would give other features; build both alike"
            )


def _settings(encoder: _Encoder) -> dict[str, Any]:
    """What decides on the features and is in no state dict: positions above all."""
    rope, alibi = encoder.rope, encoder.alibi
    found: dict[str, Any] = {"use_rope": rope is not None, "use_alibi": alibi is not None}
    found |= {"use_absolute": encoder.use_absolute, "position_embedding": encoder.position_embedding}
    if alibi is not None:
        found["strategy of ALiBi"] = alibi.strategy
    if rope is not None:
        found |= {name: getattr(rope, name) for name in ("kind", "coordinates", "fraction", "strategy")}
        if rope.log_theta is None and rope.mixed is None:
            found["thetas"] = rope.thetas
    for where in (rope, alibi):
        if where is not None and where.strategy != "extrapolate":
            found["grid_size"] = where.grid_size
    return found | same_shapes(encoder.vit)


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, t.detach()) for n, t in [*module.named_parameters(), *module.named_buffers()]]


def create_encoder(
    encoder_type: str = "vit_base_patch16_224",
    img_size: int | tuple[int, int] = 224,
    pretrained: bool = False,
    use_rope: bool = False,
    rope_theta: float = 10000.0,
    *,
    use_absolute: bool = True,
    position_embedding: str = "learned",
    position_embedding_std: float | None = None,
    use_alibi: bool = False,
    rope: Mapping[str, Any] | None = None,
    vit: Mapping[str, Any] | None = None,
    ema_start: float = 0.996,
    ema_end: float = 1.0,
    ema_steps: int = 1000,
    use_gradient_checkpointing: bool = False,
) -> tuple[ContextEncoder, TargetEncoder]:
    """A context encoder and a target encoder that starts as its exact copy.

    Args:
        encoder_type: name of a timm VisionTransformer.
        img_size: training image size in pixels, an int or (height, width), a multiple of the patch.
        pretrained: load timm's weights (downloads them).
        use_rope: rotate queries and keys.
        rope_theta: base of RoPE's frequencies.
        use_absolute: keep the position embedding. With use_rope this is the hybrid of the report.
        position_embedding: "learned", or "sincos": fixed, sines and cosines of (row, column) as in MAE and I-JEPA.
        position_embedding_std: of a learned one at the start; None is timm's 0.02.
        use_alibi: bias the scores by distance (`ALiBi2D`), under rope's strategy.
        rope: more options of VisionRoPE2D (kind, strategy, learnable, ..).
        vit: more options of timm's VisionTransformer (patch_size, embed_dim, depth, num_heads, class_token, ..).
        ema_start, ema_end, ema_steps: the target's momentum schedule.
        use_gradient_checkpointing: the context encoder's blocks are computed again in the backward pass, not kept.

    Raises:
        ValueError: a model, size or option that does not fit, naming the value and what is allowed.
    """
    kwargs: dict[str, Any] = dict(
        use_absolute=use_absolute, position_embedding=position_embedding, use_alibi=use_alibi, rope=rope, vit=vit,
        position_embedding_std=position_embedding_std,
    )  # fmt: skip
    saving = use_gradient_checkpointing
    context = ContextEncoder(
        encoder_type, img_size, pretrained, use_rope, rope_theta, use_gradient_checkpointing=saving, **kwargs
    )
    schedule: dict[str, Any] = dict(ema_start=ema_start, ema_end=ema_end, ema_steps=ema_steps)
    target = TargetEncoder(encoder_type, img_size, False, use_rope, rope_theta, **schedule, **kwargs)
    target.load_state_dict(context.state_dict())
    return context, target
