"""Image files: every kind decodes to the right pixels, damage is named, folders are understood."""

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.data import sources
from hjepa.data.folder import is_test, read_image
from hjepa.data.images import SPLITS, TrainView, load_data

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # height, width, channel
GREY = COLOURS[..., 0]


def expected(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.broadcast_to(array.reshape(6, 9, -1), (6, 9, 3)).copy()).permute(2, 0, 1)


def over_white(array: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return (array.reshape(6, 9, -1) * share + 255 * (1 - share)).astype(np.float64)


def grid(folder, classes=("cat", "dog"), count=8, size=(12, 16)):
    """Class folders of random pictures, each different."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "webp", "ppm", "PNG"])
def test_rgb_and_grey_files_decode_exactly(tmp_path, ending):
    lossless = {"lossless": True} if ending == "webp" else {}
    for array in (COLOURS, GREY):
        Image.fromarray(array).save(tmp_path / f"x.{ending}", **lossless)
        assert torch.equal(read_image(tmp_path / f"x.{ending}"), expected(array))


def test_palette_one_bit_and_animation_decode_to_their_colours(tmp_path):
    few = COLOURS // 128 * 255  # eight colours
    Image.fromarray(few).quantize(8).save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as image:
        assert image.mode == "P"
    assert torch.equal(read_image(tmp_path / "palette.png"), expected(few))
    frames = [Image.fromarray(few), Image.fromarray(255 - few)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert torch.equal(read_image(tmp_path / "moving.gif"), expected(few))
    Image.fromarray(GREY > 127).save(tmp_path / "bits.png")
    assert torch.equal(read_image(tmp_path / "bits.png"), expected((GREY > 127) * np.uint8(255)))


def test_transparent_parts_show_white(tmp_path):
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    alpha[0] = 0
    for array in (COLOURS, GREY):
        image = Image.fromarray(array)
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / "x.png")
        found = read_image(tmp_path / "x.png")
        truth = np.broadcast_to(over_white(array, alpha), (6, 9, 3))
        assert (found[:, 0] == 255).all()
        assert np.abs(found.permute(1, 2, 0).numpy() - truth).max() <= 1
    palette = Image.new("P", (9, 6), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "x.png", transparency=0)
    found = read_image(tmp_path / "x.png")
    assert found[:, 0, 0].tolist() == [255, 255, 255] and found[:, 3, 3].tolist() == [40, 50, 60]


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_scale_to_eight_with_white_at_65535(tmp_path, ending):
    deep = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    Image.fromarray(deep).save(tmp_path / f"x.{ending}")
    assert torch.equal(
        read_image(tmp_path / f"x.{ending}"), expected(np.round(deep / 65535 * 255).astype(np.uint8))
    )


@pytest.mark.parametrize("outside", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(tmp_path, outside):
    deep = np.full((4, 4), 300, np.int32)
    Image.fromarray(deep).save(tmp_path / "within.tiff")
    assert read_image(tmp_path / "within.tiff").unique().tolist() == [1]  # 300 / 257
    deep[1, 2] = outside
    Image.fromarray(deep).save(tmp_path / "beyond.tiff")
    with pytest.raises(ValueError, match=rf"beyond.tiff.*pixels from .*{abs(outside)}.* beyond 16 bits"):
        read_image(tmp_path / "beyond.tiff")


def test_cmyk_jpeg_decodes_near_its_colours(tmp_path):
    Image.new("RGB", (32, 32), (200, 40, 90)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert (read_image(tmp_path / "x.jpg")[:, 16, 16] - torch.tensor([200, 40, 90])).abs().max() <= 4


# What a viewer must do to the stored pixels for each orientation (EXIF 2.3, tag 274).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_camera_rotation_is_applied(tmp_path, orientation):
    image = Image.fromarray(COLOURS)
    notes = image.getexif()
    notes[274] = orientation
    image.save(tmp_path / "x.png", exif=notes)
    truth = torch.from_numpy(UPRIGHT[orientation](COLOURS).copy()).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "x.png"), truth)


def damaged(path):
    """The files that cannot be read, by name, each in a way of its own."""
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(path / "whole.jpg")
    data = (path / "whole.jpg").read_bytes()
    (path / "whole.jpg").unlink()
    (path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (path / "empty.png").write_bytes(b"")
    (path / "text.png").write_text("no picture")
    Image.fromarray(np.ones((4, 4), np.float32)).save(path / "float.tiff")
    return ["cut.jpg", "empty.png", "float.tiff", "text.png"]


def test_damaged_file_is_named_in_one_line(tmp_path):
    for name in damaged(tmp_path):
        with pytest.raises(ValueError, match=name) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [12, 20])  # 144 pixels: Pillow warns; 400, over twice the limit: it raises
def test_image_of_too_many_pixels_is_refused_by_name(tmp_path, monkeypatch, side):
    Image.new("RGB", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120)
    with pytest.raises(ValueError, match=r"bomb\.png has more than 120 pixels"):
        read_image(tmp_path / "bomb.png")


def test_corrupt_files_stop_loading_or_are_skipped_and_counted(tmp_path):
    grid(tmp_path / "train")
    grid(tmp_path / "test", count=2)
    bad = damaged(tmp_path / "train" / "cat")
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        load_data("imagefolder", path=tmp_path)
    parts = [load_data("imagefolder", split, path=tmp_path, on_corrupt="skip") for split in ("train", "validation")]
    assert sorted(parts[0].skipped + parts[1].skipped) == sorted(f"train/cat/{name}" for name in bad)
    assert sum(map(len, parts)) == sum(len(data.ids) for data in parts) == 16
    for data in parts:
        for row, id_ in enumerate(data.ids):  # what is left still belongs together
            assert data.classes[data.labels[row]] == id_.split("/")[1]
            assert torch.equal(data.source(row), read_image(tmp_path / id_))


def test_folder_without_split_is_divided_once_and_for_all(tmp_path):
    grid(tmp_path, classes=("cat", "dog", "owl"))
    train, validation, test = (load_data("imagefolder", part, path=tmp_path) for part in SPLITS)
    assert len(train) + len(validation) + len(test) == len({*train.ids, *validation.ids, *test.ids}) == 24
    assert torch.bincount(test.labels).tolist() == [2, 2, 2]
    assert load_data("imagefolder", "test", path=tmp_path, seed=5).ids == test.ids
    grid(tmp_path, classes=("ant",), count=3)
    again = load_data("imagefolder", "test", path=tmp_path)
    assert [id_ for id_ in again.ids if not id_.startswith("ant")] == test.ids


def test_split_keeps_equal_keys_together_and_takes_a_quarter():
    keys = [f"k{i // 2}" for i in range(400)]
    tested = is_test(keys, [i // 200 for i in range(400)])
    assert tested[::2] == tested[1::2] and sum(tested[:200]) == sum(tested[200:]) == 50


def test_train_beside_val_is_taken_as_the_split(tmp_path):
    grid(tmp_path / "train")
    grid(tmp_path / "val", classes=("dog",), count=1)
    train, validation, test = (load_data("imagefolder", part, path=tmp_path) for part in SPLITS)
    assert len(train) + len(validation) == 16 and test.ids == ["val/dog/0.png"]
    assert train.classes == test.classes == ["cat", "dog"] and test.labels.tolist() == [1]
    grid(tmp_path / "val", classes=("cow",), count=1)
    with pytest.raises(ValueError, match="cow has no counterpart"):
        load_data("imagefolder", "test", path=tmp_path)


def test_nested_files_are_found_and_hidden_ones_are_not(tmp_path):
    grid(tmp_path)
    deep = tmp_path / "cat" / "2024" / "may"
    deep.mkdir(parents=True)
    Image.fromarray(COLOURS).save(deep / "holiday.JPG")
    (tmp_path / "cat" / "._0.png").write_bytes(b"")
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    ids = [id_ for part in SPLITS for id_ in load_data("imagefolder", part, path=tmp_path).ids]
    assert len(ids) == 17 and "cat/2024/may/holiday.JPG" in ids


def test_a_folder_that_holds_the_folder_of_classes_is_not_one_class(tmp_path):
    grid(tmp_path / "pets" / "images")
    with pytest.raises(ValueError, match=r"pets holds one class folder, images, with 2 folders.* give .*pets/images"):
        load_data("imagefolder", path=tmp_path / "pets")
    assert load_data("imagefolder", path=tmp_path / "pets" / "images").classes == ["cat", "dog"]


def test_folders_without_pictures_are_named_with_what_was_expected(tmp_path):
    def error(kind, **wish):
        with pytest.raises(kind) as caught:
            load_data("imagefolder", **wish)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "needs path=" in error(ValueError)
    (tmp_path / "pictures").mkdir()
    message = error(FileNotFoundError, path=tmp_path / "picture")
    assert f"{tmp_path / 'picture'} does not exist" in message and f"nearest: {tmp_path / 'pictures'}" in message
    assert "is empty" in error(ValueError, path=tmp_path / "pictures")
    Image.fromarray(COLOURS).save(tmp_path / "pictures" / "loose.png")
    assert "1 images but no class folders" in error(ValueError, path=tmp_path / "pictures")
    (tmp_path / "pictures" / "cat").mkdir()
    assert f"{tmp_path / 'pictures' / 'cat'} holds no images" in error(ValueError, path=tmp_path / "pictures")
    assert "is a file" in error(ValueError, path=tmp_path / "pictures" / "loose.png")


def test_measuring_reads_the_file_and_training_a_copy_of_twice_the_size(tmp_path):
    grid(tmp_path, size=(200, 300))
    data = load_data("imagefolder", path=tmp_path, image_size=16)
    whole = read_image(tmp_path / data.ids[0])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
    seen = data.at_size((200, 300), [0])[0] * std + mean
    torch.testing.assert_close(255 * seen, whole.float(), rtol=0, atol=1e-3)
    assert data.source(0).shape == (3, 32, 48)


def test_samples_do_not_depend_on_the_memory_that_is_free(tmp_path, monkeypatch):
    grid(tmp_path, size=(50, 40))
    kept = TrainView(load_data("imagefolder", path=tmp_path, image_size=16), 16)
    monkeypatch.setattr(sources, "MEMORY", 6 * 3 * 32 * 40)  # room for six pictures
    read = TrainView(load_data("imagefolder", path=tmp_path, image_size=16), 16)
    assert len(kept.data.pictures.kept) == len(kept) == 10 and len(read.data.pictures.kept) == 6
    for index in range(10):
        assert torch.equal(kept[index, 7], read[index, 7])


def test_very_long_picture_shows_its_middle(tmp_path):
    long = np.zeros((8, 2000, 3), np.uint8)
    long[:, 996:1004] = 255
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "test" / name).mkdir(parents=True)
        for part in ("train", "test"):
            Image.fromarray(long).save(tmp_path / part / name / "x.png")
    data = load_data("imagefolder", path=tmp_path, image_size=16)
    white = (1 - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(data.at_size(16, [0])[0].mean((1, 2)), white)


SPLIT_NAMES = [
    ("train", "test"), ("Training", "Testing"), ("TRAIN", "Val"), ("train_set", "test_set"), ("trainset", "testset"),
    ("Training Data", "Validation Data"), ("seg_train", "seg_test"), ("train2017", "val2017"), ("train_images", "eval"),
    ("train-data", "dev"),
]  # fmt: skip


@pytest.mark.parametrize(("train", "test"), SPLIT_NAMES)
def test_folders_of_splits_are_no_classes_whatever_their_usual_name(tmp_path, train, test):
    grid(tmp_path / train)
    grid(tmp_path / test, count=2)
    parts = [load_data("imagefolder", part, path=tmp_path) for part in ("train", "test")]
    assert [part.classes for part in parts] == [["cat", "dog"]] * 2
    assert {id_.split("/")[0] for id_ in parts[0].ids} == {train} and len(parts[1]) == 4
    assert {id_.split("/")[0] for id_ in parts[1].ids} == {test}


def test_test_pictures_come_before_validation_pictures_and_wrappers_are_opened(tmp_path):
    grid(tmp_path / "train" / "train")
    grid(tmp_path / "val", count=3)
    grid(tmp_path / "test" / "test", count=2)
    test = load_data("imagefolder", "test", path=tmp_path)
    assert test.classes == ["cat", "dog"] and {id_.split("/")[0] for id_ in test.ids} == {"test"}


@pytest.mark.parametrize("name", ["trains", "test tube", "valley", "devices", "images", "2017", "training shoes"])
def test_other_names_stay_classes(tmp_path, name):
    grid(tmp_path, classes=(name, "dog"))
    assert load_data("imagefolder", path=tmp_path).classes == sorted((name, "dog"))


def test_a_class_may_be_called_train(tmp_path):
    grid(tmp_path, classes=("car", "plane", "train"))
    assert load_data("imagefolder", path=tmp_path).classes == ["car", "plane", "train"]


@pytest.mark.parametrize(
    "folders",
    [
        ("Test", "Validation"), ("test",), ("Train", "extra"), ("cat", "dog", "Testing"), ("train", "Training"),
        ("train", "val", "valid"),
    ],
)  # fmt: skip
def test_folders_of_splits_that_cannot_be_used_are_named(tmp_path, folders):
    for name in folders:
        grid(tmp_path / name)
    with pytest.raises(ValueError, match="folders named after splits") as caught:
        load_data("imagefolder", path=tmp_path)
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in folders if name not in ("extra", "cat", "dog"))


def test_splits_inside_classes_are_named_and_not_mixed(tmp_path):
    for name in ("cat", "dog"):
        grid(tmp_path / name, classes=("train", "test"))
    with pytest.raises(ValueError, match=r"cat holds folders of splits, test, train"):
        load_data("imagefolder", path=tmp_path)


def test_pictures_without_class_folders_are_of_one_class(tmp_path):
    flat = tmp_path / "flat"
    (grid(tmp_path, classes=("cat",), count=12) / "cat").rename(flat)
    parts = [load_data("imagefolder", part, path=flat) for part in SPLITS]
    train, _, test = parts
    assert train.classes == test.classes == ["unlabelled"] and len({id_ for part in parts for id_ in part.ids}) == 12
    assert len(test) == 3 and not test.labels.any()


@pytest.mark.parametrize("beside", ["", "train"])
def test_pictures_that_lie_loose_beside_class_folders_are_counted_and_named(tmp_path, beside):
    for name in {beside, "test" if beside else ""}:
        grid(tmp_path / name)
    Image.fromarray(COLOURS).save(tmp_path / beside / "loose.png")
    Image.fromarray(COLOURS).save(tmp_path / beside / "second.png")
    with pytest.warns(UserWarning, match=r"2 images beside the class folders .* left out, loose\.png first") as caught:
        load_data("imagefolder", path=tmp_path)
    assert len(caught) == 1


def test_pictures_that_lie_loose_beside_folders_of_splits_are_counted_and_named(tmp_path):
    for name in ("train", "test"):
        grid(tmp_path / name)
    Image.fromarray(COLOURS).save(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match=r"1 images beside the folders of splits of .* left out, loose\.png first"):
        load_data("imagefolder", path=tmp_path)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    grid(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("imagefolder", path="~/photos").ids == load_data("imagefolder", path=tmp_path / "photos").ids
    with pytest.raises(ValueError, match="no such user"):
        load_data("imagefolder", path="~nobody-of-that-name/photos")


def test_file_name_that_is_not_utf8_is_read(tmp_path):
    grid(tmp_path)
    odd = tmp_path / "cat" / "caf\udce9.png"  # byte E9, as Latin-1 writes it
    Image.fromarray(COLOURS).save(odd)
    parts = [load_data("imagefolder", part, path=tmp_path) for part in SPLITS]
    assert sum("cat/caf\udce9.png" in part.ids for part in parts) == 1
    odd.write_bytes(b"")
    with pytest.raises(ValueError, match="caf"):
        for part in SPLITS:
            load_data("imagefolder", part, path=tmp_path)


@pytest.mark.parametrize("ending", [".h5", ".hdf", ".pdf", ".grib", ".mpg", ".txt"])
def test_documents_and_arrays_are_no_pictures(tmp_path, ending):
    grid(tmp_path)
    (tmp_path / "cat" / f"notes{ending}").write_bytes(b"%PDF")
    ids = [id_ for part in SPLITS for id_ in load_data("imagefolder", part, path=tmp_path).ids]
    assert len(ids) == 16


@pytest.mark.parametrize("memory", [sources.MEMORY, 0])
def test_pictures_of_a_kind_that_pillow_does_not_open_are_named_or_skipped(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(sources, "MEMORY", memory)
    grid(tmp_path / "train")
    grid(tmp_path / "test", count=2)
    (tmp_path / "train" / "cat" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"phone\.HEIC cannot be read \(Pillow does not open \.heic"):
        load_data("imagefolder", path=tmp_path)
    assert load_data("imagefolder", path=tmp_path, on_corrupt="skip").skipped == ["train/cat/phone.HEIC"]
