"""The timm VisionTransformer under an encoder: building it, and telling its blocks where their tokens are.

timm's Block calls its attention itself and knows nothing of rotation tables. `RotaryBlock` is the same block with one
more argument to pass on, and `GridViT` the same transformer, which knows the patch grid of the pictures it is given:
timm's own `forward_features`, `forward_intermediates`, `get_intermediate_layers` and feature extraction are right at
every image size. Both are timm's modules in other clothes (`adopt`): parameters, their names and hooks stay, and
blocks are still called as modules, so hooks, sharding and checkpointing see every one.

Not covered: timm models other than VisionTransformer with its pre-norm Block, and timm's own rotary models (EVA,
`vit_*_rope_*`), which need no wrapper.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models import load_state_dict
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..inputs import nearest, size_text, whole_patches
from .alibi import ALiBi2D, with_bias
from .attention import PlainAttention, RoPEAttentionWrapper, adopt, heads, weights
from .checks import check_positions
from .rope import VisionRoPE2D

ROTARY = "not a timm VisionTransformer; models that are rotary by themselves (eva02, vit_*_rope_*) need no wrapper"
PATCHES = "patch_embed.proj.weight"
TOKENS = {"class_token", "reg_tokens"}  # options that published weights need not share
FIXED = ("img_size", "num_classes", "dynamic_img_size", "pretrained")  # arguments of timm that belong to the encoder


def build_vit(
    encoder_type: str, img_size: int | tuple[int, int], pretrained: bool = False, /, **overrides: Any
) -> "GridViT":
    """A timm VisionTransformer without classifier that takes any image size. `overrides` are timm's own arguments.

    Without a class token timm would pool by the mean and move the final norm behind the pooling; here the tokens keep
    their norm, unless `overrides` says otherwise.

    Raises:
        ValueError: an unknown name, a model that is not a VisionTransformer of plain Blocks, an option timm lacks, or
            with pretrained one that makes another function of the published weights.
    """
    _check_name(encoder_type, overrides)
    other_tokens = not TOKENS.isdisjoint(overrides)
    vit = _create(encoder_type, img_size, timm_arguments(overrides), pretrained=pretrained and not other_tokens)
    if type(vit) not in KINDS:
        raise ValueError(f"encoder_type={encoder_type!r} is a {type(vit).__name__}, {ROTARY}")
    if pretrained and other_tokens:
        _load_pretrained(vit, encoder_type, img_size, overrides)
    odd = [type(block).__name__ for block in vit.blocks if type(block) is not Block]
    if odd or len(vit.blocks) == 0:
        found = f"blocks of type {odd[0]}" if odd else "no blocks"
        raise ValueError(f"encoder_type={encoder_type!r} has {found}, only timm's plain Blocks fit")
    if pretrained:
        _check_function(vit, encoder_type, overrides.get("pretrained_cfg_overlay"))
    for block in vit.blocks:
        widen_half(block)
    vit.patch_embed.img_size = None  # the encoder checks sizes; timm's check would bake them into a compiled graph
    return adopt(KINDS[type(vit)], vit)


def timm_arguments(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` with what they mean to timm: without a class token the tokens keep their norm, nothing is pooled."""
    without = {"global_pool": "avg", "fc_norm": False} if overrides.get("class_token") is False else {}
    return {**without, **overrides}


def _create(
    encoder_type: str, img_size: int | tuple[int, int], overrides: dict[str, Any], pretrained: bool = False
) -> Any:
    fixed: dict[str, Any] = {"img_size": img_size, "num_classes": 0, "dynamic_img_size": True}
    try:
        return timm.create_model(encoder_type, pretrained=pretrained, **fixed, **overrides)
    except RuntimeError as error:
        raise (_misfit(encoder_type, overrides, error) if pretrained else error) from None
    except (TypeError, AssertionError) as error:
        if timm.is_model(encoder_type) and timm.models.model_entrypoint(encoder_type).__module__.endswith(".eva"):
            raise ValueError(f"encoder_type={encoder_type!r} is a Eva, {ROTARY}") from None
        bad = [name for name in overrides if f"'{name}'" in str(error)]
        what = f"has no option {bad[0]!r}" if bad else "cannot be built as a timm VisionTransformer"
        raise ValueError(f"encoder_type={encoder_type!r} with vit={overrides} {what}: {error}") from None


def _load_pretrained(
    vit: VisionTransformer, encoder_type: str, img_size: int | tuple[int, int], overrides: dict[str, Any]
) -> None:
    """timm's published weights for a `vit` with other prefix tokens: what they lack stays as it is, the rest is left.

    Raises ValueError where they do not fit.
    """
    rest = {name: value for name, value in overrides.items() if name not in TOKENS}
    source, own = _create(encoder_type, img_size, rest, pretrained=True), vit.state_dict()
    weights = source.state_dict()
    if vit.pos_embed is not None and source.pos_embed is not None:
        weights["pos_embed"] = _position_embedding(vit, source)
    for name in ("cls_token", "reg_token"):
        if name not in own:
            weights.pop(name, None)
        else:
            weights.setdefault(name, own[name])
    try:
        vit.load_state_dict(weights)
    except RuntimeError as error:
        raise _misfit(encoder_type, overrides, error) from None


def same_shapes(vit: Any) -> dict[str, Any]:
    """What makes another function of weights of the same shapes, by the names that timm's options have."""
    first = vit.blocks[0]
    found = {"num_heads": first.attn.num_heads, "act_layer": _kind(getattr(first.mlp, "act", None))}
    found |= {"norm_layer": _kind(first.norm1), "norm eps": getattr(first.norm1, "eps", None)}
    return found | {"qk_norm": _kind(first.attn.q_norm)}


def _kind(module: nn.Module | None) -> str:
    return type(module).__name__


def other_patch(weights: Mapping[str, Any], model: nn.Module) -> tuple[str, str] | None:
    """The patch size of a file's weights and that of a timm model, in pixels, where they differ; None elsewhere.

    timm resamples the patch embedding then, and says nothing. weights: as they lie in the file, in timm's layout or in
    another one that timm knows (I-JEPA, CLIP, ..), also nested: there alone a patch embedding has [D, channels, h, w].
    """
    own = model.state_dict().get(PATCHES)
    if own is None or own.dim() != 4:
        return None
    for name, weight in weights.items():
        if isinstance(weight, Mapping) and (found := other_patch(weight, model)):
            return found
        if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[2:] == own.shape[2:]:
            continue
        if name.endswith(PATCHES) or weight.shape[:2] == own.shape[:2]:
            return size_text(tuple(weight.shape[2:])), size_text(tuple(own.shape[2:]))
    return None


def _check_function(vit: VisionTransformer, encoder_type: str, own: Mapping[str, Any] | None) -> None:
    """Raise ValueError where `vit`, of pretrained weights, is not what they were trained as.

    own: where weights of one's own lie, timm's `pretrained_cfg_overlay`; they may have any heads.
    """
    if own is not None:
        patches = other_patch(load_state_dict(str(own["file"])), vit) if own.get("file") else None
        if patches:
            what = f"{own['file']} has patches of {patches[0]} pixels, not patch_size={patches[1]}"
            raise ValueError(f"{what}: timm would resample them; nearest: {patches[0]}")
        return
    with torch.device("meta"):  # no memory, and no random numbers
        source = timm.create_model(encoder_type, num_classes=0)
    if patches := other_patch(source.state_dict(), vit):
        what = f"pretrained weights of {encoder_type!r} have patches of {patches[0]} pixels, not"
        near = "null, the encoder type's own"
        raise ValueError(f"{what} patch_size={patches[1]}: timm would resample them; nearest: {near}")
    published = same_shapes(source)
    for name, value in same_shapes(vit).items():
        if value != published[name]:
            raise ValueError(
                f"{name}={value} makes another function of the pretrained weights of {encoder_type!r}, which have "
                f"{name}={published[name]}; nearest: null, the encoder type's own"
            )


def _misfit(encoder_type: str, overrides: Mapping[str, Any], error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:200]
    return ValueError(f"pretrained weights of {encoder_type!r} do not fit vit={dict(overrides)}: {said}")


def _position_embedding(vit: VisionTransformer, source: VisionTransformer) -> Tensor:
    """The source's position embedding of the patches, behind that of the prefix tokens that both have, by name."""
    names = [("cls_token", 1), ("dist_token", 1), ("reg_token", vit.num_reg_tokens)]
    assert vit.pos_embed is not None and source.pos_embed is not None
    own, given, rows, at = vit.pos_embed.detach(), source.pos_embed.detach(), [], 0
    prefix = 0 if source.no_embed_class else source.num_prefix_tokens
    for name, count in names:
        has = getattr(source, name, None) is not None and prefix > 0
        if getattr(vit, name, None) is not None and not vit.no_embed_class:
            rows.append(given[:, at : at + count] if has else torch.zeros_like(own[:, :count]))
        at += getattr(source, name).shape[1] if has else 0
    return torch.cat([*rows, given[:, prefix:]], dim=1)


def _check_name(encoder_type: str, overrides: dict[str, Any]) -> None:
    if not (encoder_type.startswith("hf-hub:") or timm.is_model(encoder_type)):
        near = nearest(encoder_type, timm.list_models(["vit_*", "deit*"])) or "none"
        raise ValueError(f"encoder_type={encoder_type!r} is not a timm model; nearest: {near}")
    for name in FIXED:
        if name in overrides:
            raise ValueError(f"vit option {name!r} is set by the encoder itself: leave it out of vit={overrides}")
    if overrides.get("patch_drop_rate"):
        raise ValueError(
            f"patch_drop_rate={overrides['patch_drop_rate']} would drop patches without their positions: 0 is allowed, "
            "context_idx or is_masked drop patches"
        )


def freeze_head(vit: VisionTransformer) -> None:
    """Take the gradient from what only a classifier would use: it is kept for plain timm checkpoints, never run."""
    for name in ("attn_pool", "fc_norm", "head", "head_dist"):
        module = getattr(vit, name, None)
        if module is not None:
            module.requires_grad_(False)


class GridViT(VisionTransformer):
    """timm's VisionTransformer, with the rotation tables of the grid of the pictures it is given."""

    rope: VisionRoPE2D | None = None  # both belong to the encoder, and are no children
    alibi: ALiBi2D | None = None

    def image_grid(self, images: Tensor) -> tuple[int, int]:
        """Patch grid of `images` `[B, C, h, w]`. Raises ValueError where the size is not a multiple of the patch."""
        if images.dim() != 4:
            raise ValueError(f"images must be [B, channels, height, width], got shape {tuple(images.shape)}")
        channels = self.patch_embed.proj.in_channels
        if images.shape[1] != channels:
            raise ValueError(f"images have {images.shape[1]} channels, this encoder was built for {channels}")
        height, width = images.shape[-2:]
        return whole_patches((height, width), tuple(self.patch_embed.feat_ratio(as_scalar=False)))

    def embed(self, images: Tensor) -> Tensor:
        """Patches and prefix tokens, with the position embedding where there is one: `[B, prefix + N, D]`."""
        return self._pos_embed(self.patch_embed(images))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """As timm's on `x` `[B, H, W, D]`, and without a position embedding; under autocast summed up in float32."""
        x = x.float() if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) else x
        if self.pos_embed is not None:
            return super()._pos_embed(x)
        tokens = [getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        prefix = [t.expand(x.shape[0], -1, -1) for t in tokens if t is not None]
        return self.pos_drop(torch.cat([*prefix, x.flatten(1, 2)], dim=1))

    def tables(
        self, batch: int, grid: tuple[int, int], device: torch.device, *,
        index: Tensor | None = None, positions: Tensor | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """One rotation table per block, or None per block with RoPE off. ValueError on positions that do not fit."""
        if positions is not None:
            if self.rope is None and self.alibi is None:
                raise ValueError("positions need RoPE or ALiBi: build the encoder with use_rope=True")
            check_positions(positions, batch, grid)
        if self.rope is None:
            return [None] * len(self.blocks)
        if positions is None and self.training and self.rope.augments:
            positions = self.rope.augment(self.rope.positions(grid, device), grid)
        return list(self.rope.tables(grid, positions=positions, index=index, device=device))

    def bias(
        self, grid: tuple[int, int], x: Tensor, *, index: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor | None:
        """ALiBi's bias on the scores, of all blocks: `[1 or B, heads, prefix + N, prefix + N]`; None without ALiBi.

        x has the device and the precision that it is for.
        """
        if self.alibi is None:
            return None
        where: dict[str, Any] = dict(positions=positions, index=index, device=x.device)
        return self.alibi(grid, prefix=self.num_prefix_tokens, **where).to(x.dtype)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's, on images `[B, C, h, w]` of any size: `[B, prefix + N, D]`, what the encoder gives."""
        return VisionTransformer.forward_features(self._at(x), x, *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's, on images `[B, C, h, w]` of any size."""
        return VisionTransformer.forward_intermediates(self._at(x), x, *args, **kwargs)

    def _at(self, images: Tensor) -> "GridViT":
        """This transformer with every block bound to its table for these images' grid, for timm's own loops."""
        grid = self.image_grid(images)
        if self.rope is None and self.alibi is None:
            return self
        tables, bias = self.tables(images.shape[0], grid, images.device), self.bias(grid, images)
        view = type(self).__new__(type(self))
        rest = {name: module for name, module in self._modules.items() if name != "blocks"}
        bound = _Blocks(partial(_bound, block, table, bias) for block, table in zip(self.blocks, tables, strict=False))
        view.__dict__.update(self.__dict__ | {"_modules": rest, "blocks": bound})
        return view


class GridDistilledViT(GridViT, VisionTransformerDistilled):
    """The same of timm's distilled DeiT, which has two prefix tokens."""


KINDS: dict[type, type[GridViT]] = {VisionTransformer: GridViT, VisionTransformerDistilled: GridDistilledViT}


class _Blocks(list):
    """Blocks to be called in order, as nn.Sequential, but no module: they have their place in the transformer."""

    def __call__(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class RotaryBlock(Block):
    """timm's Block with a rotation table to hand on to its attention, a RoPEAttentionWrapper."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, table: Tensor | None = None
    ) -> Tensor:
        """As timm's, on `x` `[B, N, D]`; without a table the attention takes that of the training grid."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal, table=table)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def add_rope(block: Any, rope: VisionRoPE2D, layer: int, num_prefix_tokens: int) -> RotaryBlock:
    """The timm Block with its attention wrapped, which it passes tables to. Nothing is copied or renamed."""
    block.attn = RoPEAttentionWrapper(block.attn, rope, layer, num_prefix_tokens)
    return adopt(RotaryBlock, block)


def widen_half(block: Any) -> Any:
    """Let a timm Block's attention run in float32 where its half precision is slow (see `attention.py`)."""
    if type(block.attn) is Attention:
        block.attn = adopt(PlainAttention, block.attn)
    return block


def run_block(block: nn.Module, x: Tensor, table: Tensor | None, attn_mask: Tensor | None) -> Tensor:
    """A Block, plain or rotary, on `x` `[B, N, D]`."""
    return block(x, attn_mask) if table is None else block(x, attn_mask, table=table)


def _bound(
    block: nn.Module, table: Tensor | None, bias: Tensor | None,
    x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """A block that knows where its tokens are, as timm's loops call it."""
    if is_causal:
        raise ValueError("is_causal=True has no meaning on a 2-D grid")
    return run_block(block, x, table, with_bias(bias, attn_mask))


def block_weights(block: Any, x: Tensor, table: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The attention weights `[B, heads, N, N]` that a block would use on `x`, without dropout."""
    attn, x = block.attn, block.norm1(x)
    if table is not None:
        return attn.attention_weights(x, bias, table=table)
    q, k, _, _ = heads(attn, x)
    return weights(q, k, attn.scale, bias)
