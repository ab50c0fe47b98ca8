"""The timm VisionTransformer under an encoder: building it, and handing rotation tables to its blocks.

timm's Block calls its attention itself and knows nothing of tables. `RotaryBlock` is the same block with one more
argument to pass on. A built block becomes one by a change of class: its parameters, their names and the hooks on it
stay, and it is still called as a module, so hooks, sharding and checkpointing see every block.

Not covered: timm models other than VisionTransformer with its pre-norm Block, and timm's own rotary models (EVA,
`vit_*_rope_*`), which need no wrapper.
"""

from typing import Any

import timm
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..inputs import nearest
from .attention import PlainAttention, RoPEAttentionWrapper
from .rope import VisionRoPE2D

FIXED = ("img_size", "num_classes", "dynamic_img_size", "pretrained")  # arguments of timm that belong to the encoder


def build_vit(
    encoder_type: str, img_size: int | tuple[int, int], pretrained: bool = False, /, **overrides: Any
) -> VisionTransformer:
    """A timm VisionTransformer without classifier that takes any image size. `overrides` are timm's own arguments.

    Without a class token timm would pool by the mean and move the final norm behind the pooling; here the tokens keep
    their norm, unless `overrides` says otherwise.

    Raises:
        ValueError: an unknown name, a model that is not a VisionTransformer of plain Blocks, an option timm lacks.
    """
    _check_name(encoder_type, overrides)
    if overrides.get("class_token") is False:
        overrides = {"global_pool": "avg", "fc_norm": False} | overrides
    try:
        vit = timm.create_model(
            encoder_type, pretrained=pretrained, img_size=img_size, num_classes=0, dynamic_img_size=True, **overrides
        )
    except (TypeError, AssertionError) as error:
        bad = [name for name in overrides if f"'{name}'" in str(error)]
        what = f"has no option {bad[0]!r}" if bad else "cannot be built as a timm VisionTransformer"
        raise ValueError(f"encoder_type={encoder_type!r} with vit={overrides} {what}: {error}") from None
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"encoder_type={encoder_type!r} is a {type(vit).__name__}, not a timm VisionTransformer; models that "
            "are rotary by themselves (eva02, vit_*_rope_*) need no wrapper"
        )
    odd = [type(block).__name__ for block in vit.blocks if type(block) is not Block]
    if odd or len(vit.blocks) == 0:
        found = f"blocks of type {odd[0]}" if odd else "no blocks"
        raise ValueError(f"encoder_type={encoder_type!r} has {found}, only timm's plain Blocks fit")
    for block in vit.blocks:
        widen_half(block)
    vit.patch_embed.img_size = None  # the encoder checks sizes; timm's check would bake them into a compiled graph
    return vit


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


class RotaryBlock(Block):
    """timm's Block with a rotation table to hand on to its attention, a RoPEAttentionWrapper."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, table: Tensor | None = None
    ) -> Tensor:
        """As timm's, on `x` `[B, N, D]`; without a table the attention takes that of the training grid."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal, table=table)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def add_rope(block: Any, rope: VisionRoPE2D, layer: int, num_prefix_tokens: int) -> None:
    """Wrap the attention of a timm Block and let the block pass tables to it. Nothing is copied or renamed."""
    block.attn = RoPEAttentionWrapper(block.attn, rope, layer, num_prefix_tokens)
    block.__class__ = RotaryBlock


def widen_half(block: Any) -> Any:
    """Let a timm Block's attention run in float32 where its half precision is slow (see `attention.py`)."""
    if type(block.attn) is Attention:
        block.attn.__class__ = PlainAttention
    return block


def run_block(block: nn.Module, x: Tensor, table: Tensor | None, attn_mask: Tensor | None) -> Tensor:
    """A Block, plain or rotary, on `x` `[B, N, D]`."""
    return block(x, attn_mask) if table is None else block(x, attn_mask, table=table)


def block_weights(block: Any, x: Tensor, table: Tensor | None) -> Tensor:
    """The attention weights `[B, heads, N, N]` that a block would use on `x`, without dropout."""
    attn, x = block.attn, block.norm1(x)
    if table is not None:
        return attn.attention_weights(x, table=table)
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
    return ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
