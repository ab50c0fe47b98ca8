"""Views: random crops of whole batches of pictures, resized, mirrored and recoloured by a few matrix products.

A view of a picture is a crop of it at another size, with other colours: what two of them share is what the picture
shows. All views of a batch are made at once, on the device where the batch lies:

    uint8 [B, 3, S, S] --columns--> [B, 3, S, side] --rows--> [B, 3, side, side] --colour--> normalised

A crop with resizing is separable, so it is a product with one matrix per axis and picture. A row of that matrix holds
the triangle filter of one output pixel, as wide as the crop shrinks: antialiased where it shrinks, bilinear where it
grows (as torchvision's resize with antialias=True). A mirrored crop has its columns in reverse order. Brightness,
contrast, saturation and grey together are one 3 x 3 matrix and an offset per picture. Wider filters blur
a view and narrower ones sharpen it, at no cost.

Every number drawn follows from (seed, step), for the global batch; a process makes its own rows only.

Where a crop lies in its picture is kept, so that its patches have places there: `places`.

Sources: crops and colours of SimCLR (Chen et al., 2020, appendix A), several sizes of crops from SwAV (Caron et al.,
2020, section 3.2).
Not covered: hue, cropping along time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: the share of red, green and blue in grey


@dataclass
class Crops:
    """One view of each picture: where it is cut and how it is coloured. Shares are of the picture's sides."""

    top: Tensor  # [B], share of the height
    left: Tensor  # [B], share of the width
    height: Tensor  # [B]
    width: Tensor  # [B]
    mirrored: Tensor  # [B], booleans
    brightness: Tensor  # [B], factor
    contrast: Tensor  # [B], factor about the mean grey
    saturation: Tensor  # [B], factor, 0 is grey
    wider: Tensor  # [B], how many times as wide the filters of its pixels are

    def rows(self, rows: slice) -> "Crops":
        """The crops of some pictures."""
        return Crops(*(getattr(self, part.name)[rows] for part in fields(self)))

    def to(self, device: torch.device | str) -> "Crops":
        """The crops on a device."""
        return to_device([self], device)[0]


def to_device(views: Sequence[Crops], device: torch.device | str) -> list[Crops]:
    """Crops of as many pictures each on a device: one copy for all, from pinned memory where the device is a GPU."""
    device = torch.device(device)
    if not views or views[0].top.device == device:
        return list(views)
    numbers = [getattr(view, part.name).to(view.top.dtype) for view in views for part in fields(view)]
    packed = torch.stack(numbers).unflatten(0, (len(views), -1))  # [V, 8, B]
    packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
    parts = [zip(fields(Crops), view, strict=True) for view in packed]
    return [Crops(*(x.bool() if part.name == "mirrored" else x for part, x in view)) for view in parts]


@lru_cache(maxsize=64)
def constants(values: tuple[float, ...], device: torch.device, factor: int = 1) -> Tensor:
    """float32 numbers times a factor on a device, copied to it once and not to be changed."""
    with torch.inference_mode(False):
        return (factor * torch.tensor(values, dtype=torch.float32, device="cpu")).to(device)


def whole(batch_size: int) -> Crops:
    """Crops that are the whole picture, unchanged."""
    zero, one = torch.zeros(batch_size), torch.ones(batch_size)
    return Crops(zero, zero, one, one, torch.zeros(batch_size, dtype=torch.bool), one, one, one, one)


def draw_crops(
    batch_size: int,
    scale: Sequence[float],
    *,
    aspect: float = 4 / 3,
    flip: bool = True,
    color_jitter: float = 0.0,
    grey: float = 0.0,
    filter_width: Sequence[float] = (1.0, 1.0),
    generator: torch.Generator | None = None,
) -> Crops:
    """Draw one view of each picture.

    Args:
        batch_size: pictures B.
        scale: smallest and largest share of the picture's area.
        aspect: largest ratio of a crop's sides; drawn log-uniformly between its inverse and itself.
        flip: mirror half of them.
        color_jitter: strength s: brightness, contrast and saturation are drawn from [1 - s, 1 + s].
        grey: share of the views without colour.
        filter_width: smallest and largest factor by which the filter of a view's pixels is wider, above 0.5: below 1
            sharper than the resizing of pictures, above 1 blurred.
        generator: source of randomness.

    Raises:
        ValueError: a scale out of order, a strength or share outside 0..1, a filter that may miss all pixels.
    """
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale={list(scale)} must be two numbers with 0 < smallest <= largest <= 1")
    for name, value in (("color_jitter", color_jitter), ("grey", grey)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} must be between 0 and 1")
    if not 1 <= aspect < math.inf:
        raise ValueError(f"aspect={aspect!r} must be at least 1")
    if len(filter_width) != 2 or not 0.5 < filter_width[0] <= filter_width[1] < math.inf:
        raise ValueError(f"filter_width={list(filter_width)} must be two numbers with 0.5 < smallest <= largest")
    area, ratio, top, left, mirrored, bright, contrast, saturation, chance = torch.rand(
        9, batch_size, generator=generator
    ).unbind(0)
    area = scale[0] + (scale[1] - scale[0]) * area
    ratio = torch.exp((2 * ratio - 1) * math.log(aspect))  # height over width
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    factors = [1 + color_jitter * (2 * part - 1) for part in (bright, contrast, saturation)]
    factors[2] = factors[2].masked_fill(chance < grey, 0.0)
    least, most = filter_width
    wider = torch.full((batch_size,), float(least))
    if most > least:  # nothing is drawn where there is no choice, so that older runs go on as they were
        wider += (most - least) * torch.rand(batch_size, generator=generator)
    factors.append(wider)
    return Crops(top * (1 - height), left * (1 - width), height, width, (mirrored < 0.5) & flip, *factors)


def cut(
    pictures: Tensor,
    crops: Crops,
    side: int,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut the crops out of their pictures.

    Args:
        pictures: uint8 `[B, 3, S, T]`.
        crops: one of each picture, on the same device.
        side: pixels of the view's sides.
        mean, std: of the data, white = 1; the result is (x - mean) / std.
        dtype: precision of the two products; bfloat16 errs by half a grey level of 255.

    Returns:
        float32 `[B, 3, side, side]`.
    """
    height, width = pictures.shape[-2:]
    across = _filters(crops.left * width, crops.width * width, side, width, crops.wider, crops.mirrored).to(dtype)
    down = _filters(crops.top * height, crops.height * height, side, height, crops.wider).to(dtype)
    x = torch.bmm(pictures.to(dtype).flatten(1, 2), across.transpose(1, 2))  # [B, 3 S, side]
    x = torch.bmm(down, x.unflatten(1, (3, height)).transpose(1, 2).flatten(2))  # [B, side, 3 side]
    x = x.unflatten(2, (3, side)).transpose(1, 2).float() / 255
    return _recolour(x, crops, *(constants(tuple(values), x.device) for values in (mean, std)))


def _filters(
    start: Tensor, length: Tensor, side: int, pixels: int, wider: Tensor, mirrored: Tensor | None = None
) -> Tensor:
    """Weights of the source pixels in each output pixel: `[B, side, pixels]`, rows sum to one.

    start, length: `[B]`, of the crop, in source pixels. A filter reaches as many source pixels to either side as one
    output pixel covers, at least one, times wider `[B]`, and not beyond the picture.
    """
    step = (length / side)[:, None, None]
    centre = start[:, None, None] + (torch.arange(side, device=start.device)[:, None] + 0.5) * step
    if mirrored is not None:
        centre = torch.where(mirrored[:, None, None], centre.flip(1), centre)
    place = torch.arange(pixels, device=start.device) + 0.5
    weights = (1 - (place - centre).abs() / (step.clamp(min=1) * wider[:, None, None])).clamp_(min=0)
    return weights / weights.sum(-1, keepdim=True)


def _recolour(x: Tensor, crops: Crops, mean: Tensor, std: Tensor) -> Tensor:
    """Brightness, then contrast about the mean grey, then saturation; clamped to 0..1 and normalised, in place."""
    luma = constants(LUMA, x.device)
    grey = (x.mean((2, 3)) @ luma) * crops.brightness  # [B], after the change of brightness
    mix = torch.eye(3, device=x.device) * crops.saturation[:, None, None]
    mix = (mix + (1 - crops.saturation)[:, None, None] * luma) * (crops.brightness * crops.contrast)[:, None, None]
    offset = ((1 - crops.contrast) * grey)[:, None, None]
    x = torch.baddbmm(offset, mix, x.flatten(2)).unflatten(2, x.shape[2:])
    return x.clamp_(0, 1).sub_(mean[:, None, None]).div_(std[:, None, None])


def places(crops: Crops, grid: tuple[int, int]) -> Tensor:
    """Centres of a view's patches in its picture, as positions on the picture's own patch grid: `[B, H * W, 2]`.

    grid: (height, width) of the view in patches. The whole picture, cut at the same size, has patch (r, c) at (r, c).
    A crop's patches lie at fractions of these; those of a mirrored crop run from right to left.
    """
    rows, columns = (torch.arange(count, device=crops.top.device) + 0.5 for count in grid)
    row = (crops.top[:, None] + crops.height[:, None] * rows / grid[0]) * grid[0] - 0.5  # [B, H]
    across = torch.where(crops.mirrored[:, None], 1 - columns / grid[1], columns / grid[1])
    column = (crops.left[:, None] + crops.width[:, None] * across) * grid[1] - 0.5  # [B, W]
    both = torch.stack((row[:, :, None].expand(-1, -1, grid[1]), column[:, None].expand(-1, grid[0], -1)), dim=-1)
    return both.flatten(1, 2)
