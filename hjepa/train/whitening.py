"""A patch layer that whitens: principal components of training patches in place of a random start, and then fixed.

Patches of photographs are dominated by their brightness: most of their variance lies in a few directions, and a random
layer passes these on alone. The components of the patches, each divided by its spread, hand all of them to the blocks
from the first step on. What is added to the variances keeps the faintest components from being as loud as the rest.
Sources: Coates et al. 2011 (AISTATS, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning"), who
whiten patches; as a fixed first layer of a network that has minutes to learn, Jordan 2024 (arXiv:2404.00498).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..evaluate.measures import symmetric_eigen
from ..evaluate.shown import subset
from ..inputs import UserError

PICTURES, SPREAD = 2000, 0.6  # whose patches are looked at; root mean square of the layer's outputs on them


def whiten_patches(encoder: Any, data: Any, image_size: int, added: float) -> None:
    """Set the patch layer of an encoder from training pictures; `fix_patches` then takes it out of training.

    Filter d is the d-th principal component of the patches, divided by the root of its variance + `added`; all are then
    scaled so that their outputs on those patches, whose means are taken off, have the root mean square SPREAD. data: an
    `ImageData`, read at image_size pixels, normalised. ValueError where the encoder is wider than a patch has numbers.
    """
    layer: nn.Conv2d = encoder.vit.patch_embed.proj
    width, numbers = layer.out_channels, layer.weight[0].numel()
    if width > numbers:
        side = " x ".join(map(str, layer.kernel_size))
        what = f"patches of {side} px have {numbers} components, and model.embed_dim={width} asks for more"
        raise UserError(f"train.whiten_patches: {what}; nearest: model.embed_dim={numbers}")
    images = data.at_size(image_size, subset(len(data), PICTURES, 0))
    patches = F.unfold(images, layer.kernel_size, stride=layer.stride).transpose(1, 2).flatten(0, 1)
    weight, bias = components(patches, width, added)
    with torch.no_grad():
        layer.weight.copy_(weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(bias)


def components(patches: Tensor, width: int, added: float) -> tuple[Tensor, Tensor]:
    """Weights [width, P] and bias [width], float64, of the layer for patches [N, P]."""
    x = patches.double()
    mean = x.mean(0)
    variances, axes = symmetric_eigen(torch.cov((x - mean).T))  # weakest first
    variances, axes = variances[-width:].flip(0).clamp(min=0), axes[:, -width:].flip(1).T
    weight = axes / (variances + added).sqrt()[:, None]
    weight = SPREAD * weight / (variances / (variances + added)).mean().sqrt()
    return weight, -weight @ mean


def fix_patches(encoder: Any) -> None:
    """Take the patch layer of an encoder out of training."""
    encoder.vit.patch_embed.proj.requires_grad_(False)
