"""The peers: the same rotation, attention layer and ViT-S by the libraries one would otherwise use.

    timm            `apply_rot_embed_cat`, `AttentionRope`, `vit_small_patch16_rope_224`
    transformers    DINOv3's `apply_rotary_pos_emb` and `DINOv3ViTAttention` (half-split pairs, separate q, k, v layers)
    lucidrains      `apply_rotary_emb` of the package rotary-embedding-torch
    textbook        written out here: what an implementation from the formulas does, and what the report describes

The textbook way recomputes cosines and sines at every call, repeats each to both channels of its pair, turns rows and
columns apart and joins them, and writes attention out instead of calling the fused one.

All rotations start from one qkv buffer `[B, T, 3 * heads * D]`, as the projection of an attention layer leaves it, and
end with q, k, v `[B, heads, T, D]`, so that the memory layouts are those met in a model.

Not covered: whether they agree (tests/test_parity.py: they do, up to conventions).
"""

import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import Attention, AttentionRope, RotaryEmbeddingCat, apply_rot_embed_cat
from torch import Tensor, nn

from hjepa.nn.attention import RoPEAttentionWrapper
from hjepa.nn.rope import VisionRoPE2D
from hjepa.nn.rotation import rotate, rotated_heads, split_heads

Rotation = Callable[[Tensor], tuple[Tensor, ...]]
PEERS = ("timm", "transformers DINOv3", "rotary-embedding-torch", "textbook")


def textbook_rotate(x: Tensor, side: int, theta: float = 10000.0) -> Tensor:
    """Rotate `x` `[B, heads, side * side, D]`, everything computed anew."""
    half = x.shape[-1] // 2
    omega = theta ** -(torch.arange(0, half, 2, device=x.device) / half)
    place = torch.arange(side * side, device=x.device)
    parts = []
    for axis, part in ((place // side, x[..., :half]), (place % side, x[..., half:])):
        angle = axis[:, None] * omega
        cos, sin = (f(angle).repeat_interleave(2, dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
        swapped = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
        parts.append(part * cos + swapped * sin)
    return torch.cat(parts, dim=-1)


class TextbookAttention(nn.Module):
    """Self-attention with one CLS token, rotation and softmax written out, around a timm Attention's layers."""

    def __init__(self, attn: Any, side: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.side = attn.qkv, attn.proj, attn.num_heads, side

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, width = x.shape
        dim = width // self.heads
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim).permute(2, 0, 3, 1, 4)
        q, k = (torch.cat((y[:, :, :1], textbook_rotate(y[:, :, 1:], self.side)), dim=2) for y in (q, k))
        weights = (q @ k.transpose(-2, -1) * dim**-0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def rotations(side: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Rotation]:
    """By name, from qkv `[B, side^2, 3 * heads * dim]` to q, k (rotated) and v. The first is the base of ratios."""
    from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb  # type: ignore[import-untyped]
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    grid, table = (side, side), VisionRoPE2D(dim, 16, side).table((side, side))
    angles = VisionRoPE2D(dim, 16, side).angles(VisionRoPE2D(dim).positions(grid), grid)[:, 0].tile(2)
    half_cos, half_sin = angles.cos().to(dtype), angles.sin().to(dtype)
    timm_table = RotaryEmbeddingCat(dim, in_pixels=False, feat_shape=list(grid)).get_embed().to(dtype)
    lucid = RotaryEmbedding(dim // 2, freqs_for="lang", cache_if_possible=False).get_axial_freqs(*grid)

    def ours(qkv: Tensor) -> tuple[Tensor, ...]:
        return rotated_heads(qkv if qkv.dtype == torch.float32 else qkv.float(), table)

    def each(turn: Callable[[Tensor], Tensor], qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = split_heads(qkv, dim)
        return turn(q), turn(k), v

    def dinov3(qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = split_heads(qkv, dim)
        return *apply_rotary_pos_emb(q, k, half_cos, half_sin), v

    across = table.transpose(1, 2)
    return {
        "timm": functools.partial(each, lambda x: apply_rot_embed_cat(x, timm_table)),
        "hjepa, in place": ours,
        "hjepa, out of place": functools.partial(each, lambda x: rotate(x, across)),
        "transformers DINOv3": dinov3,
        "rotary-embedding-torch": functools.partial(
            each, lambda x: apply_rotary_emb(lucid, x.unflatten(2, grid)).flatten(2, 3).to(dtype)
        ),
        "textbook": functools.partial(each, lambda x: textbook_rotate(x, side)),
    }


def attention_layers(side: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Attention layers on `[B, 1 + side^2, heads * dim]` by name; the first is timm's without rotation."""
    width = heads * dim
    options: dict[str, Any] = dict(num_heads=heads, qkv_bias=True)
    torch.manual_seed(0)
    wrapper = RoPEAttentionWrapper(Attention(width, **options).to(dtype), VisionRoPE2D(dim, 16, side))
    rope_timm = AttentionRope(width, num_prefix_tokens=1, **options).to(dtype)
    timm_table = RotaryEmbeddingCat(dim, in_pixels=False, feat_shape=[side, side]).get_embed().to(dtype)
    dinov3, cos, sin = _dinov3_attention(side, heads, dim, dtype)
    return {
        "no rotation (timm)": Attention(width, **options).to(dtype),
        "hjepa": wrapper,
        "timm": lambda x: rope_timm(x, rope=timm_table),
        "transformers DINOv3": lambda x: dinov3(x, position_embeddings=(cos, sin))[0],
        "rotary-embedding-torch": LucidrainsAttention(Attention(width, **options).to(dtype), side),
        "textbook": TextbookAttention(Attention(width, **options).to(dtype), side),
    }


class LucidrainsAttention(nn.Module):
    """timm's layers and fused attention around rotary-embedding-torch's rotation, with one CLS token."""

    def __init__(self, attn: Any, side: int) -> None:
        from rotary_embedding_torch import RotaryEmbedding

        super().__init__()
        self.attn, self.side = attn, side
        rotary = RotaryEmbedding(attn.head_dim // 2, freqs_for="lang", cache_if_possible=False)
        self.freqs = rotary.get_axial_freqs(side, side).detach()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.attn.qkv(x), self.attn.head_dim)
        out = nn.functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.attn.proj(out.transpose(1, 2).flatten(2))

    def turn(self, x: Tensor) -> Tensor:
        from rotary_embedding_torch import apply_rotary_emb

        patches = apply_rotary_emb(self.freqs, x[:, :, 1:].unflatten(2, (self.side, self.side))).flatten(2, 3)
        return torch.cat((x[:, :, :1], patches.to(x.dtype)), dim=2)


def _dinov3_config(side: int, heads: int, dim: int, depth: int) -> Any:
    from transformers import DINOv3ViTConfig

    config = DINOv3ViTConfig(
        hidden_size=heads * dim, intermediate_size=4 * heads * dim, num_attention_heads=heads, num_hidden_layers=depth,
        patch_size=16, image_size=16 * side, num_register_tokens=0, key_bias=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


def _dinov3_attention(side: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

    config = _dinov3_config(side, heads, dim, 1)
    rope = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()
    cos, sin = rope(torch.zeros(1, 3, 16 * side, 16 * side, dtype=dtype))
    return dinov3.DINOv3ViTAttention(config).to(dtype).eval(), cos, sin


def whole_models(side: int, depth: int) -> dict[str, Callable[[Tensor], Any]]:
    """ViT-S with rotation on images `[B, 3, 16 * side, 16 * side]`, by peer, without a classifier."""
    from transformers import DINOv3ViTModel

    options: dict[str, Any] = dict(img_size=16 * side, num_classes=0, depth=depth)
    textbook: Any = timm.create_model("vit_small_patch16_224", **options).eval()
    rope_timm: Any = timm.create_model("vit_small_patch16_rope_224", **options).eval()
    for block in textbook.blocks:
        block.attn = TextbookAttention(block.attn, side)
    dinov3 = DINOv3ViTModel(_dinov3_config(side, 6, 64, depth)).eval()
    return {
        "timm": rope_timm.forward_features,
        "transformers DINOv3": lambda images: dinov3(images).last_hidden_state,
        "textbook": textbook.forward_features,
    }
