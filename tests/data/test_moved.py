"""Moved pictures: whole, at the same place everywhere, and in one split."""

import hashlib

import pytest
import torch
from scipy.stats import kstest

from hjepa.data import openmoji
from hjepa.data.images import SPLITS, load_data
from hjepa.data.moved import MovedPictures, box, placement


class Coloured:
    """Stand-in pictures: picture i is plain grey i + 1, its four corners 200 and more, at any size."""

    def resized(self, indices, height, width):
        images = torch.ones(len(indices), 3, height, width, dtype=torch.uint8)
        for image, index in zip(images, indices, strict=True):
            image *= index + 1
            image[:, 0, 0], image[:, 0, -1], image[:, -1, 0], image[:, -1, -1] = 200, 210, 220, 230
        return images


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (40, 72), (90, 33), (1, 1)])
def test_a_moved_picture_is_the_brute_force_paste_and_loses_nothing_at_the_border(size):
    ids = [f"id{i}" for i in range(7)]
    found = MovedPictures(Coloured(), ids, 2, (9, 8, 7), 64).resized(list(range(14)), *size)
    for index, canvas in enumerate(found):
        digest = hashlib.sha256(f"{ids[index % 7]}#{index // 7}".encode()).digest()
        scale, top, left = (int.from_bytes(digest[8 * i : 8 * i + 8], "big") / 2**64 for i in range(3))
        side = max(1, round((0.5 + scale / 2) * min(size)))
        y, x = round(top * (size[0] - side)), round(left * (size[1] - side))
        picture = Coloured().resized([index % 7], side, side)[0]
        for channel, grey in enumerate((9, 8, 7)):
            for row in range(size[0]):
                for column in range(size[1]):
                    inside = y <= row < y + side and x <= column < x + side
                    expected = picture[channel, row - y, column - x] if inside else grey
                    assert canvas[channel, row, column] == expected
        assert 0 <= y <= size[0] - side and 0 <= x <= size[1] - side  # the loop saw every pixel of the picture


def test_place_and_scale_are_uniform_and_the_same_on_every_canvas():
    places = [placement(f"id{i}", repeat) for i in range(500) for repeat in range(2)]
    for k, (low, width) in enumerate([(0.5, 0.5), (0, 1), (0, 1)]):
        assert kstest([place[k] for place in places], "uniform", args=(low, width)).pvalue > 0.01
    for place in places[:50]:
        shares = [[pixels / size for pixels in box(place, size, size)] for size in (64, 128, 512)]
        for share in shares[:2]:
            assert share == pytest.approx(shares[2], abs=1.5 / 64)


def test_moved_openmoji_has_the_detail_of_a_drawing_at_its_own_size_on_white():
    data = load_data("openmoji", "validation", moved=True)
    places = {item.id: place for place, item in enumerate(openmoji.catalogue())}
    for size in (32, 96):
        side, top, left = box(placement(data.ids[5]), size, size)
        canvas = torch.full((3, size, size), 255, dtype=torch.uint8)
        canvas[:, top : top + side, left : left + side] = openmoji.draw(places[data.ids[5]], side)
        assert torch.equal(data.pictures.resized([5], size, size)[0], canvas)
    source = data.source(5)
    assert source.shape == (3, 128, 128) and torch.equal(source, data.pictures.resized([5], 128, 128)[0])


def test_a_fixed_id_has_the_same_pixels_in_any_limit_and_repeats_differ():
    whole = load_data("openmoji", "validation", moved=True, repeats=3)
    n = len(whole) // 3
    assert whole.ids[n:] == [f"{id_}#{repeat}" for repeat in (1, 2) for id_ in whole.ids[:n]]
    assert whole.labels.tolist() == 3 * whole.labels[:n].tolist()
    part = load_data("openmoji", "validation", moved=True, limit=40, seed=3)
    place = whole.ids.index(part.ids[7])
    assert torch.equal(part.at_size(48, [7]), whole.at_size(48, [place]))
    shown = whole.at_size(48, [place, place + n, place + 2 * n])
    assert not torch.equal(shown[0], shown[1]) and not torch.equal(shown[1], shown[2])


def test_moving_mixes_no_splits_and_changes_no_label():
    for split in SPLITS:
        plain, moved = load_data("openmoji", split), load_data("openmoji", split, moved=True)
        assert plain.ids == moved.ids and torch.equal(plain.labels, moved.labels)


def test_photographs_lie_on_the_mean_colour(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (30, 20), (0, 250, 0)).save(tmp_path / split / "cat" / f"{name}.png")
    data = load_data("imagefolder", "test", path=tmp_path, moved=True)
    image = data.pictures.resized([0], 40, 40)[0]
    side, top, left = box(placement(data.ids[0]), 40, 40)
    assert (image[:, top : top + side, left : left + side] == torch.tensor([0, 250, 0]).view(3, 1, 1)).all()
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[top : top + side, left : left + side] = True
    assert image[:, ~inside].unique(dim=1).flatten().tolist() == [round(255 * value) for value in data.mean]


def test_repeats_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="repeats 0 must be a positive number"):
        load_data("openmoji", moved=True, repeats=0)
    with pytest.raises(ValueError, match="repeats 2 without moved"):
        load_data("openmoji", repeats=2)
