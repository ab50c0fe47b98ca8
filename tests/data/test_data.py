"""Data sets by name: splits, sizes, normalisation, training views, and clear errors."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.build import load_split
from hjepa.config import load_config
from hjepa.data import openmoji, sources
from hjepa.data.images import DATASETS, SPLITS, ImageData, TrainView, load_data, mean_and_std, normalised
from hjepa.data.sources import ArrayPictures, fit

debian = pytest.mark.skipif(not sources.DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
HALF = ((0.5,) * 3, (0.5,) * 3)


def arrays(images: torch.Tensor, fill: int | None = None) -> ImageData:
    """uint8 [N, c, h, w] as a data set whose values run from -1 to 1."""
    n = len(images)
    ids = [str(i) for i in range(n)]
    return ImageData(
        "x", "train", torch.zeros(n, dtype=torch.int64), ["x"], ids, *HALF, ArrayPictures(images, fill)
    )


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- splits and constants


def test_openmoji_splits_share_no_picture_and_no_look():
    train, validation, test = (load_data("openmoji", split) for split in SPLITS)
    assert len(train) + len(validation) == 1421 and len(test) == 477
    assert len({*train.ids, *validation.ids, *test.ids}) == 1898
    group = {item.id: item.group for item in openmoji.catalogue()}
    looks = [{group[id_] for id_ in data.ids} for data in (train, validation, test)]
    assert not looks[0] & looks[1] and not looks[0] & looks[2] and not looks[1] & looks[2]
    known, chosen, asked = (torch.bincount(data.labels) for data in (train, validation, test))
    assert (asked / (known + chosen + asked) - 0.25).abs().max() < 0.02
    assert (chosen / (known + chosen) - 0.1).abs().max() < 0.02


def test_openmoji_labels_are_the_categories_of_the_ids():
    category = {item.id: item.category for item in openmoji.catalogue()}
    data = load_data("openmoji", "test")
    assert [data.classes[label] for label in data.labels] == [category[id_] for id_ in data.ids]
    places = {item.id: place for place, item in enumerate(openmoji.catalogue())}
    assert torch.equal(data.source(9), openmoji.draw(places[data.ids[9]], 128))


def test_split_never_depends_on_the_seed_and_stays_as_published():
    assert load_data("openmoji", "test", seed=3).ids == load_data("openmoji", "test").ids
    assert load_data("openmoji", "test").ids[:5] == FIRST_TEST_IDS  # numbers in the notebooks rest on this


def test_validation_is_the_tenth_of_each_class_with_the_smallest_hashes_and_leaves_training():
    """Brute force: rank the looks of each class by their hash."""
    train, validation = (load_data("openmoji", split) for split in ("train", "validation"))
    group = {item.id: item.group for item in openmoji.catalogue()}
    for label in range(9):
        known, chosen = (
            {group[data.ids[i]] for i in (data.labels == label).nonzero()[:, 0]} for data in (train, validation)
        )
        ranked = sorted(known | chosen, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
        assert chosen == set(ranked[: round(len(ranked) / 10)])


def test_classes_of_few_pictures_keep_one_to_train_on_and_a_limit_never_reaches_validation(tmp_path):
    for name, count in (("one", 1), ("two", 2), ("many", 30)):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "test" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "train" / name / f"{i}.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "0.png")
    train, validation = (load_data("imagefolder", split, path=tmp_path) for split in ("train", "validation"))
    assert train.classes == ["many", "one", "two"]
    assert torch.bincount(train.labels, minlength=3).tolist() == [27, 1, 1]
    assert torch.bincount(validation.labels, minlength=3).tolist() == [3, 0, 1]
    assert not set(train.ids) & set(validation.ids)
    assert not set(load_data("imagefolder", path=tmp_path, limit=29).ids) & set(validation.ids)
    for folder in (tmp_path / "train").iterdir():
        for file in sorted(folder.iterdir())[1:]:
            file.unlink()
    with pytest.raises(ValueError, match="no validation pictures; give some class at least two"):
        load_data("imagefolder", "validation", path=tmp_path)


FIRST_TEST_IDS = ["0033-FE0F-20E3", "0039-FE0F-20E3", "1F17E-FE0F", "1F191", "1F193"]


@pytest.mark.parametrize("name", ["openmoji", pytest.param("fashion_mnist", marks=debian)])
def test_normalisation_constants_are_those_of_the_training_pixels(name, tmp_path):
    side = 64 if name == "openmoji" else 28  # the size of the default recipe, the stored size
    counts = torch.zeros(3, 256, dtype=torch.float64)  # how often each value occurs, per channel
    for split in ("train", "validation"):
        data = load_data(name, split, root=tmp_path)
        for some in torch.arange(len(data)).split(5000):
            pixels = data.pictures.resized(some.tolist(), side, side)
            counts += torch.stack([pixels[:, channel].flatten().bincount(minlength=256) for channel in range(3)])
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255
    mean = share @ value.double()
    std = (share @ value.double() ** 2 - mean**2).sqrt()
    torch.testing.assert_close(torch.tensor(data.mean).double(), mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(data.std).double(), std, rtol=0, atol=1e-4)


def test_limit_takes_classes_in_turn_and_grows_by_inclusion():
    small, large = (load_data("openmoji", limit=limit, seed=1) for limit in (90, 200))
    assert torch.bincount(small.labels).tolist() == [10] * 9
    assert set(small.ids) < set(large.ids)
    assert load_data("openmoji", limit=90, seed=2).ids != small.ids
    assert load_data("openmoji", limit=5000).ids == load_data("openmoji").ids


def test_chosen_classes_are_numbered_in_the_order_asked_for_and_keep_their_pictures_and_splits():
    names = ["Flags", "Animals & Nature"]
    for split in ("train", "validation", "test"):
        whole, part = load_data("openmoji", split), load_data("openmoji", split, classes=names)
        assert part.classes == names
        wanted = {id_: whole.classes[y] for id_, y in zip(whole.ids, whole.labels, strict=True)}
        assert {i: names[y] for i, y in zip(part.ids, part.labels, strict=True)} == {
            id_: kind for id_, kind in wanted.items() if kind in names
        }
        first = whole.ids.index(part.ids[0])
        assert torch.equal(part.at_size(16, [0]), whole.at_size(16, [first]))
    assert torch.bincount(load_data("openmoji", classes=names, limit=40).labels).tolist() == [20, 20]


@pytest.mark.parametrize(
    ("classes", "reason"),
    [(["Flag"], "class 'Flag' of openmoji is not known; .*; nearest: Flags"), ([], "one or more names"),
     (["Flags", "Flags"], "each once")],
)  # fmt: skip
def test_wrong_classes_are_named(classes, reason):
    with pytest.raises(ValueError, match=reason):
        load_data("openmoji", classes=classes)


# ---- any size


@pytest.mark.parametrize("size", [8, 20, 64, (14, 30), (45, 20)])
def test_at_size_is_pillows_antialiased_resize_of_the_covering_part(size):
    """Peer: Pillow's own antialiased bilinear filter, on the centred crop with the frame's aspect."""
    images = noise(3, 3, 40, 36)
    height, width = (size, size) if isinstance(size, int) else size
    h, w = min(40, round(36 * height / width)), min(36, round(40 * width / height))
    top, left = round((40 - h) / 2), round((36 - w) / 2)
    found = (arrays(images).at_size(size) + 1) * 127.5
    for row, image in zip(found, images, strict=True):
        part = Image.fromarray(image[:, top : top + h, left : left + w].permute(1, 2, 0).numpy())
        truth = np.asarray(part.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
        assert (row.permute(1, 2, 0) - torch.from_numpy(truth)).abs().max() <= 1.01


def test_halving_averages_a_checkerboard_instead_of_sampling_it():
    board = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).mul(255).to(torch.uint8)
    small = arrays(board[None, None]).at_size(16)
    assert small.shape == (1, 3, 16, 16) and small[..., 2:-2, 2:-2].abs().max() < 0.02


def test_plain_background_fills_what_the_whole_picture_leaves():
    image = noise(1, 12, 12)
    wide = fit(image, 12, 30, fill=7)
    assert torch.equal(wide[..., 9:21], image)
    assert (wide[..., :9] == 7).all() and (wide[..., 21:] == 7).all()
    assert torch.equal(fit(image, 30, 12, fill=7)[:, 9:21], image)


def test_values_follow_the_normalisation_formula_in_the_order_asked():
    images = noise(5, 1, 6, 6)
    data = arrays(images)
    data.mean, data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    found = data.at_size(6, [4, 0, 4])
    grey = images[[4, 0, 4]].double() / 255
    truth = torch.cat([(grey - mean) / std for mean, std in zip(data.mean, data.std, strict=True)], dim=1)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-6)
    assert data.at_size(6, []).shape == (0, 3, 6, 6)


@pytest.mark.parametrize("size", [0, -3, 6.5, None, "64", (64,), (64, 0), (1, 2, 3)])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match="image size"):
        arrays(noise(1, 1, 6, 6)).at_size(size)


def test_indices_must_be_inside_and_no_mask():
    data = arrays(noise(2, 1, 6, 6))
    with pytest.raises(IndexError):
        data.at_size(6, [2])
    with pytest.raises(ValueError, match="mask"):
        data.at_size(6, torch.tensor([True, False]))


# ---- training views


def test_sample_depends_on_its_seed_and_on_nothing_else():
    data = arrays(noise(4, 3, 40, 40))
    view = TrainView(data, 24, color_jitter=0.5)
    first = [view[i, seed].clone() for i in range(4) for seed in (0, 2**62)]
    torch.rand(17)
    other = pickle.loads(pickle.dumps(view))  # as in another process
    again = [other[i, seed] for i in reversed(range(4)) for seed in (2**62, 0)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert len({sample.numpy().tobytes() for sample in first}) == 8


def test_the_same_crop_comes_at_any_side():
    """Coordinates as colours: the crop at 32 px, averaged over 2 x 2 pixels, is the crop at 16 px."""
    view = TrainView(coordinates(), 16, crop_scale=(0.5, 1.0))
    small, large = view[0, 7], view[0, 7, 32]
    assert small.shape == (3, 16, 16) and torch.equal(small, view[0, 7, 16])
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 2), small, atol=0.02, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads, from Python 3.12
def test_workers_give_the_same_samples_as_the_main_process():
    view = TrainView(arrays(noise(6, 3, 40, 40)), 24)
    keys = [(i % 6, 100 + i) for i in range(12)]
    loader = torch.utils.data.DataLoader(
        view, batch_size=4, sampler=keys, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), torch.stack([view[key] for key in keys]))


def test_drawing_a_sample_leaves_the_global_random_state():
    view = TrainView(arrays(noise(1, 3, 40, 40)), 24, color_jitter=1.0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    view[0, 1]
    assert torch.equal(torch.rand(3), expected)


def coordinates() -> ImageData:
    """A picture whose first channel is the column and second the row, 0 to 255."""
    place = torch.arange(256, dtype=torch.uint8)
    row, column = torch.meshgrid(place, place, indexing="ij")
    return arrays(torch.stack([column, row, torch.zeros_like(row)])[None])


@pytest.mark.parametrize(("low", "high"), [(0.3, 1.0), (0.5, 0.6)])
def test_crops_keep_the_share_of_area_that_was_asked(low, high):
    view = TrainView(coordinates(), 64, crop_scale=(low, high), flip=False)
    areas = []
    for seed in range(300):
        column, row, _ = (view[0, seed] + 1) * 127.5
        width, height = ((c.max() - c.min()) * 64 / 63 / 256 for c in (column[0], row[:, 0]))
        areas.append(float(width * height))
    assert low - 0.04 < min(areas) < low + 0.1 * (high - low) + 0.02
    assert high - 0.2 * (high - low) - 0.02 < max(areas) < high + 0.04


def test_half_of_the_samples_are_mirrored_and_none_without_flip():
    def mirrored(**wish):
        view = TrainView(coordinates(), 16, **wish)
        return sum(bool(view[0, seed][0, 0, 0] > view[0, seed][0, 0, -1]) for seed in range(400))

    assert 160 < mirrored() < 240
    assert mirrored(flip=False) == 0


def test_colour_changes_only_when_asked_and_more_with_more():
    data = arrays(torch.full((1, 3, 8, 8), 100, dtype=torch.uint8))

    def spread(strength):
        view = TrainView(data, 8, color_jitter=strength)
        return torch.stack([view[0, seed].mean() for seed in range(60)]).std()

    assert spread(0.0) < 1e-6
    assert 0 < spread(0.2) < spread(0.8)


def test_training_values_that_make_no_sense_are_refused():
    data = arrays(noise(1, 1, 6, 6))
    for scale in [(0.0, 1.0), (0.5, 0.4), (0.5, 1.5), (0.5,)]:
        with pytest.raises(ValueError, match="crop_scale"):
            TrainView(data, 8, crop_scale=scale)
    with pytest.raises(ValueError, match="color_jitter"):
        TrainView(data, 8, color_jitter=2.0)


# ---- errors of load_data


def test_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"'fashion-mnits' is not known; .* nearest: fashion_mnist"):
        load_data("fashion-mnits")


@pytest.mark.parametrize(
    "wish", [{"split": "val"}, {"on_corrupt": "ignore"}, {"limit": 0}, {"image_size": 0}], ids=str
)
def test_wrong_wish_is_named(wish):
    with pytest.raises(ValueError, match=r"is not (known|understood)|must be") as caught:
        load_data("openmoji", **wish)
    assert repr(*wish.values()) in str(caught.value) and "\n" not in str(caught.value)


def test_every_registered_set_says_what_it_is():
    assert set(DATASETS) == {"openmoji", "fashion_mnist", "cifar10", "stl10", "imagenette", "imagefolder"}
    for spec in DATASETS.values():
        assert len(spec.mean) == len(spec.std) == 3 and min(spec.std) > 0 and len(spec.about) > 20


def test_importing_is_light():
    code = "import hjepa.data, sys; sys.exit('torchvision' in sys.modules or 'fontTools' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_mean_and_std_are_those_of_all_pixels_and_training_uses_them(tmp_path):
    data = load_data("openmoji", limit=40)
    pixels = data.at_size(16) * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    mean, std = mean_and_std(data, 16)
    for channel in range(3):
        assert mean[channel] == pytest.approx(pixels[:, channel].double().mean().item(), abs=1e-6)
        assert std[channel] == pytest.approx(pixels[:, channel].double().std(correction=0).item(), abs=1e-6)
    own = load_split(load_config(overrides=["data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]"]), "train")
    assert own.mean == (0.1, 0.2, 0.3) and own.std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_normalising_leaves_the_pictures_as_they_were(kind):
    images = torch.full((2, 3, 4, 4), 51, dtype=kind)
    found = normalised(images, (0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
    assert (images == 51).all()
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.2, 0.0, -0.5]))  # 51 / 255 = 0.2
