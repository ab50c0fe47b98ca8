"""Claims of hjepa.data.views, against torchvision, brute force and closed forms."""

import pytest
import torch
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2 import functional

from hjepa.build import draw_views
from hjepa.config import load_config
from hjepa.data.views import Crops, cut, draw_crops, places, whole


def noise(count: int = 3, height: int = 24, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def crops_of(**parts: list[float]) -> Crops:
    count = len(next(iter(parts.values())))
    crops = whole(count)
    for name, values in parts.items():
        setattr(crops, name, torch.tensor(values))
    return crops


@pytest.mark.parametrize("side", [6, 12, 24, 48])
def test_the_whole_picture_is_torchvisions_antialiased_resize(side: int) -> None:
    pictures = noise()
    expected = functional.resize(pictures.double(), [side, side], antialias=True) / 255
    torch.testing.assert_close(cut(pictures, whole(3), side).double(), expected, atol=1e-5, rtol=0)


def test_a_crop_on_whole_pixels_is_the_crop_resized() -> None:
    pictures = noise()
    crops = crops_of(top=[0.25] * 3, left=[0.5] * 3, height=[0.5] * 3, width=[0.5] * 3)
    inner = pictures[:, :, 6:18, 12:24]
    assert torch.equal(cut(pictures, crops, 12), inner / 255)
    means = avg_pool2d(inner.double(), 3).mean((2, 3)) / 255
    torch.testing.assert_close(cut(pictures, crops, 4).double().mean((2, 3)), means, atol=0.02, rtol=0)


def test_a_mirrored_crop_is_the_crop_from_right_to_left() -> None:
    pictures = noise()
    plain = draw_crops(3, (0.3, 0.9), flip=False, generator=torch.Generator().manual_seed(3))
    mirrored = Crops(**{**vars(plain), "mirrored": torch.tensor([True, False, True])})
    found, expected = cut(pictures, mirrored, 8), cut(pictures, plain, 8)
    expected[[0, 2]] = expected[[0, 2]].flip(-1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_colours_change_as_torchvision_changes_them() -> None:
    pictures = noise(1)
    crops = crops_of(brightness=[0.8], contrast=[0.9], saturation=[0.6])
    image = pictures[0].double() / 255
    expected = functional.adjust_contrast(functional.adjust_brightness(image, 0.8), 0.9)
    expected = functional.adjust_saturation(expected, 0.6)
    torch.testing.assert_close(cut(pictures, crops, 24)[0].double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("wider", [0.7, 2.5])
@pytest.mark.parametrize("side", [8, 24, 36])
def test_a_view_is_a_mean_under_triangles_as_many_times_as_wide(side: int, wider: float) -> None:
    """Against loops in float64, where it shrinks, where it grows and where it does neither."""
    pictures, step = noise(1, 24, 24), 24 / side
    filters = torch.zeros(side, 24, dtype=torch.float64)
    for i in range(side):
        for j in range(24):
            filters[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * step) / (wider * max(step, 1.0)))
        filters[i] /= filters[i].sum()
    expected = filters @ (pictures[0].double() / 255) @ filters.T
    found = cut(pictures, crops_of(wider=[wider]), side)
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=0)


def test_widths_are_drawn_between_their_bounds_and_leave_all_else_as_it_was() -> None:
    plain, other = (
        draw_crops(2000, (0.2, 0.4), filter_width=width, generator=torch.Generator().manual_seed(0))
        for width in ((1.0, 1.0), (0.6, 2.6))
    )
    assert torch.equal(plain.wider, torch.ones(2000))
    assert 0.6 <= other.wider.min() < 0.61 and 2.59 < other.wider.max() <= 2.6 and 1.55 < other.wider.mean() < 1.65
    assert torch.equal(plain.top, other.top) and torch.equal(plain.saturation, other.saturation)


def test_the_filters_of_a_step_are_as_wide_as_the_config_says() -> None:
    more = ["views.filter_width=[0.6, 3]"]
    plain, other = (draw_views(load_config(None, ["objective=views", *settings]), 3) for settings in ([], more))
    assert all((crops.wider == 1).all() for kind in plain for crops in kind)
    assert all(0.6 <= crops.wider.min() < 1 and 2 < crops.wider.max() <= 3 for kind in other for crops in kind)


def test_grey_views_have_no_colour_and_normalising_is_last() -> None:
    pictures, mean, std = noise(), (0.1, 0.2, 0.3), (0.5, 0.4, 0.2)
    view = cut(pictures, crops_of(saturation=[0.0] * 3), 8, mean, std)
    back = view * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(back[:, :1].expand_as(back), back, atol=1e-5, rtol=0)


def test_bfloat16_errs_by_at_most_three_grey_levels() -> None:
    pictures = noise(8, 64, 64)
    crops = draw_crops(8, (0.3, 1.0), color_jitter=0.4, generator=torch.Generator().manual_seed(1))
    difference = cut(pictures, crops, 32, dtype=torch.bfloat16) - cut(pictures, crops, 32)
    assert difference.abs().max() * 255 < 3


def test_drawn_areas_and_aspects_stay_within_their_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    crops = draw_crops(2000, (0.2, 0.4), aspect=1.5, color_jitter=0.3, grey=0.25, generator=generator)
    area, aspect = crops.height * crops.width, crops.height / crops.width
    assert 0.199 < area.min() < 0.21 and 0.39 < area.max() < 0.401
    assert 1 / 1.501 < aspect.min() < 0.7 and 1.4 < aspect.max() < 1.501
    assert (crops.top >= 0).all() and (crops.top + crops.height <= 1 + 1e-6).all()
    assert (crops.left >= 0).all() and (crops.left + crops.width <= 1 + 1e-6).all()
    assert 0.45 < crops.mirrored.float().mean() < 0.55
    assert 0.2 < (crops.saturation == 0).float().mean() < 0.3


def test_the_same_generator_gives_the_same_views_and_rows_are_a_part_of_them() -> None:
    first, second = (draw_crops(6, (0.1, 1.0), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    pictures = noise(6)
    assert torch.equal(cut(pictures, first, 8)[2:4], cut(pictures[2:4], first.rows(slice(2, 4)), 8))


def test_places_of_the_whole_picture_are_the_grids_own() -> None:
    rows, columns = torch.arange(3.0), torch.arange(4.0)
    expected = torch.cartesian_prod(rows, columns)
    torch.testing.assert_close(places(whole(1), (3, 4))[0], expected)


def test_a_crops_patches_lie_at_fractions_and_a_mirrored_one_has_mirrored_places() -> None:
    crops = crops_of(top=[0.5], left=[0.25], height=[0.25], width=[0.5])
    found = places(crops, (4, 4))[0].unflatten(0, (4, 4))
    # patch r of 4 covers [.5 + .25 r/4, ..]: its centre, in patches of the whole picture's 4, minus the half patch
    torch.testing.assert_close(found[:, 0, 0], (0.5 + 0.25 * (torch.arange(4) + 0.5) / 4) * 4 - 0.5)
    torch.testing.assert_close(found[0, :, 1], (0.25 + 0.5 * (torch.arange(4) + 0.5) / 4) * 4 - 0.5)
    crops.mirrored = torch.tensor([True])
    mirrored = places(crops, (4, 4))[0].unflatten(0, (4, 4))
    torch.testing.assert_close(mirrored, found.flip(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.5, 0.3)}, r"scale=\[0.5, 0.3\]"),
        ({"scale": (0.0, 0.3)}, "0 < smallest"),
        ({"scale": (0.1, 0.3), "grey": 1.5}, "grey=1.5"),
        ({"scale": (0.1, 0.3), "color_jitter": -0.1}, "color_jitter=-0.1"),
        ({"scale": (0.1, 0.3), "aspect": 0.5}, "aspect=0.5"),
        ({"scale": (0.1, 0.3), "filter_width": (0.5, 1)}, r"filter_width=\[0.5, 1\] must be .* 0.5 < smallest"),
        ({"scale": (0.1, 0.3), "filter_width": (2, 1)}, r"filter_width=\[2, 1\]"),
    ],
)
def test_views_that_cannot_be_are_refused_by_value(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_crops(2, **options)
