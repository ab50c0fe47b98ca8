"""An encoder's rotation in the words of timm's own rotary transformer (`timm.models.eva.Eva`), where it has them.

    axial, extrapolated     rope_type="cat", rows first                      no prefix tokens: also interpolated
    mixed                   rope_type="mixed", the frequencies as weights
    normalized              rope_type="dinov3", pairs (i, i + D/2) in place of (2i, 2i+1): channels of q and k move

timm's model has layer scales, which are ones where the encoder has none: so a plain ViT refuses the file as well. timm
interpolates without the half-patch offset, which tokens without a place (CLS, registers) would see. What timm has
no words for (NTK, thetas per layer, a fraction of the channels) stays without a counterpart.

Source: timm 1.0.31, `models/eva.py`, `layers/pos_embed_sincos.py`.
Not covered: reading timm's published rotary weights into an encoder.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

UNUSED = ("fc_norm", "head", "attn_pool")  # of a classifier
ARCHITECTURE = "vit_small_patch16_rope_224"  # an Eva whose every option is given below


def rotary_arguments(encoder: Any) -> dict[str, Any] | None:
    """timm's options that rotate as `encoder` does, for ARCHITECTURE; None where timm has none."""
    rope, vit = encoder.rope, encoder.vit
    by_layer = rope.per_layer and rope.kind == "axial"
    if encoder.alibi is not None or rope.kind == "fixed" or rope.fraction != 1 or by_layer:
        return None
    if rope.coordinates == "normalized":
        kind: dict[str, Any] = {"rope_type": "dinov3", "rope_rotate_half": True}
    elif rope.kind == "mixed":
        kind = {"rope_type": "mixed"}
    else:
        kind = {"rope_type": "cat"}
    if rope.strategy == "interpolate" and rope.kind == "axial" and not vit.num_prefix_tokens:
        kind["ref_feat_shape"] = list(encoder.grid_size)
    elif rope.strategy != "extrapolate":
        return None
    block = vit.blocks[0]
    return kind | {
        "patch_size": encoder.patch_size, "embed_dim": vit.embed_dim, "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads, "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None, "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": 1e-5,
        "class_token": vit.cls_token is not None, "num_reg_tokens": vit.num_reg_tokens,
        "no_embed_class": vit.no_embed_class, "use_abs_pos_emb": vit.pos_embed is not None,
        "use_pre_transformer_norm": not isinstance(vit.norm_pre, nn.Identity),
        "global_pool": "token" if vit.cls_token is not None else "avg", "use_fc_norm": False,
        "rope_grid_indexing": "ij", "rope_temperature": rope.theta,
    }  # fmt: skip


def to_timm(encoder: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `encoder.vit` as timm's rotary transformer has them."""
    out = {_renamed(name): tensor for name, tensor in _permuted(encoder, weights, back=False).items()}
    if encoder.rope.mixed is not None:  # [layers, rows and columns, heads, pairs], timm's has the axes first
        out["rope.freqs"] = encoder.rope.mixed.detach().transpose(0, 1).contiguous()
    for layer in range(len(encoder.vit.blocks)):
        for gamma in ("gamma_1", "gamma_2"):
            out.setdefault(f"blocks.{layer}.{gamma}", torch.ones(encoder.embed_dim))
    return {name: tensor for name, tensor in out.items() if not name.startswith(UNUSED)}


def from_timm(encoder: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_timm`, for `encoder.vit`."""
    own = encoder.vit.state_dict()
    back = {name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for name, t in weights.items()}
    scales = {name for name in back if ".ls" in name and name not in own}  # ones, which timm's model has to have
    kept = {name: tensor for name, tensor in back.items() if name != "rope.freqs" and name not in scales}
    return {n: t for n, t in own.items() if n.startswith(UNUSED)} | _permuted(encoder, kept, back=True)


def rotary_model(encoder: Any, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Arguments and weights of the timm model that gives what `encoder` gives, seen at two sizes; None if none does."""
    arguments = rotary_arguments(encoder)
    if arguments is None:
        return None
    converted = to_timm(encoder, weights)
    size = tuple(side * encoder.patch_size for side in encoder.grid_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model: Any = timm.create_model(
                ARCHITECTURE, num_classes=0, img_size=size, dynamic_img_size=True, **arguments
            ).eval()
            model.load_state_dict(converted)
        except (TypeError, AssertionError, RuntimeError):
            return None
        training, device = encoder.training, next(encoder.parameters()).device
        encoder.eval()
        for height, width in (size, (size[0] + encoder.patch_size, 2 * size[1])):
            images = torch.randn(1, encoder.vit.patch_embed.proj.in_channels, height, width)
            theirs, ours = model.forward_features(images), encoder(images.to(device)).cpu()
            if not torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4):
                arguments = None
        encoder.train(training)
    return None if arguments is None else (arguments, converted)


def _renamed(name: str) -> str:
    return name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")


def _permuted(encoder: Any, weights: Mapping[str, Tensor], back: bool) -> dict[str, Tensor]:
    """Channels of q and k from pairs (2i, 2i+1) to (i, i + D/2), or back, where timm wants halves."""
    if encoder.rope.coordinates != "normalized":
        return dict(weights)
    dim = encoder.rope.dim
    order = torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))
    order = order.argsort() if back else order
    out = dict(weights)
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            parts = tensor.unflatten(0, (3, -1, dim))
            out[name] = torch.cat((parts[:2, :, order], parts[2:])).flatten(0, 2).contiguous()
        elif ".attn.q_norm." in name or ".attn.k_norm." in name:
            out[name] = tensor[order]
    return out
