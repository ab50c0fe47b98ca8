"""Small layers for the tests: a RoPE on a 6 x 6 grid, an attention layer on 3 x 4, encoders of 16-pixel pictures."""

from typing import Any

import torch
from timm.layers import Attention, LayerNorm
from torch import Tensor, nn

from hjepa.nn.attention import RoPEAttentionWrapper
from hjepa.nn.encoders import ContextEncoder, TargetEncoder, create_encoder
from hjepa.nn.rope import VisionRoPE2D

TRAINED = (6, 6)
OTHER = (9, 4)  # another grid than the trained one, longer in rows and shorter in columns

GRID, HEADS, DIM = (3, 4), 2, 8  # of the attention layer
PATHS = ["in_place", "out_of_place", "unfused"]

TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
MODES = [(True, False), (False, True), (True, True), (False, False)]  # use_absolute, use_rope


def build_rope(**options: Any) -> VisionRoPE2D:
    """Head dim 16, theta 100, trained on 6 x 6, unless `options` say otherwise."""
    torch.manual_seed(0)
    return VisionRoPE2D(**({"dim": 16, "num_patches_per_side": TRAINED, "theta": 100.0} | options))


def random_qk(grid: tuple[int, int], dim: int = 16, heads: int = 2, **where: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys `[1, heads, N, dim]`."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, heads, grid[0] * grid[1], dim, generator=generator)
    return q.to(**where), k.to(**where)


def build_attention(
    prefix: int = 1, path: str = "in_place", *, theta: float = 20.0, **options: Any
) -> RoPEAttentionWrapper:
    """Two heads of 8 channels, rotated on one of the PATHS."""
    torch.manual_seed(0)
    attn = Attention(HEADS * DIM, HEADS, norm_layer=LayerNorm, **({"qkv_bias": True} | options))
    nn.init.normal_(attn.qkv.weight, std=0.5)
    attn.fused_attn = path != "unfused"
    if path == "out_of_place":  # somebody listens to the projection
        attn.qkv.register_forward_hook(lambda module, args, output: None)
    rope = VisionRoPE2D(DIM, num_patches_per_side=GRID, theta=theta, num_heads=HEADS)
    return RoPEAttentionWrapper(attn, rope, num_prefix_tokens=prefix).eval()


def tokens(prefix: int = 1, count: int = 12, batch: int = 2) -> Tensor:
    """Input `[batch, prefix + count, 16]` of the attention layer."""
    return torch.randn(batch, prefix + count, HEADS * DIM, generator=torch.Generator().manual_seed(1))


def build_encoder(
    size: int | tuple[int, int] = 16, use_rope: bool = True, seed: int = 0, **options: Any
) -> ContextEncoder:
    """A context encoder of 4-pixel patches in eval mode."""
    torch.manual_seed(seed)
    options = {"vit": TINY, "rope_theta": 20.0} | options
    options["vit"] = TINY | options["vit"]
    return ContextEncoder("vit_tiny_patch16_224", size, False, use_rope, **options).eval()


def build_pair(**options: Any) -> tuple[ContextEncoder, TargetEncoder]:
    """Context and target encoder from `create_encoder`."""
    torch.manual_seed(0)
    options = {"vit": TINY, "use_rope": True, "rope_theta": 20.0} | options
    return create_encoder("vit_tiny_patch16_224", 16, **options)


def pictures(height: int = 16, width: int | None = None, batch: int = 2) -> Tensor:
    """Noise `[batch, 3, height, width]`."""
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def noisy(module: Any) -> Any:
    """Freshly built ViTs have zero biases and unit norms: make every parameter matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module
