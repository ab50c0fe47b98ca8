"""The index of a large folder: the same pictures as without it, made once, mapped, not trusted when it is stale."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.build import draw_masks, load_split
from hjepa.config import load_config
from hjepa.data import folder as folder_module
from hjepa.data import index, sources
from hjepa.data.images import SPLITS, load_data
from hjepa.train.feed import Feed
from hjepa.train.schedule import batch_at


def pictures(folder, classes=("cat", "dog", "owl"), count=23):
    """Class folders of tiny pictures, some of them nested, with names that are odd and out of order."""
    for number, name in enumerate(classes):
        (folder / name / "b" / "c").mkdir(parents=True)
        (folder / name / "b.x").mkdir()
        places = ["", "b/", "b/c/", "b.x/"]
        for i in range(count + number):
            stem = "caf\udce9" if i == 5 else str(97 * i % 100)
            Image.new("RGB", (4 + i % 3, 4), (i, number, 0)).save(folder / name / f"{places[i % 4]}{stem}.png")
    age(folder)
    return folder


def age(folder, seconds=10):
    """As if nothing in the folder had changed for some time."""
    for place, _, _ in os.walk(folder, followlinks=True):
        then = os.stat(place).st_mtime_ns - seconds * 1_000_000_000
        os.utime(place, ns=(then, then))


@pytest.fixture
def large(monkeypatch):
    """Every folder counts as large."""
    monkeypatch.setattr(index, "FEWEST", 1)


def count_calls(monkeypatch, name="find_images"):
    calls, real = [], getattr(index, name)
    monkeypatch.setattr(index, name, lambda *args: (calls.append(args), real(*args))[1])
    return calls


def contents(data):
    return list(data.ids), data.labels.tolist(), data.classes, [data.source(i).tolist() for i in range(len(data))]


WISHES = [{}, {"limit": 7, "seed": 3}, {"classes": ["owl", "cat"]}, {"classes": ["dog", "owl"], "limit": 9}]


@pytest.mark.parametrize("layout", ["undivided", "train and val", "train alone", "linked"])
def test_an_index_changes_no_picture_label_or_split(tmp_path, monkeypatch, layout):
    root = tmp_path / "pictures"
    if layout == "train and val":
        pictures(root / "Train")
        pictures(root / "val", classes=("dog", "owl"), count=6)
    else:
        pictures(root / "train" if layout == "train alone" else root)
    if layout == "linked":
        (root / "cat").rename(tmp_path / "elsewhere")
        (root / "cat").symlink_to(tmp_path / "elsewhere")
        (root / "dog" / "ring.png").symlink_to(root / "dog" / "ring.png")
        (root / "dog" / "copies").symlink_to(root / "owl")
    age(tmp_path)
    calls = count_calls(monkeypatch)
    for wish in WISHES:
        for split in SPLITS:
            options = {"path": root, "root": tmp_path / "cache", **wish}
            monkeypatch.setattr(index, "FEWEST", 10**9)
            plain = contents(load_data("imagefolder", split, **options))
            monkeypatch.setattr(index, "FEWEST", 1)
            assert contents(load_data("imagefolder", split, **options)) == plain
    assert len(calls) == 2  # train with validation, and test


@pytest.mark.parametrize("wish", WISHES)
def test_the_digest_of_the_pictures_is_the_same_with_an_index(tmp_path, monkeypatch, wish):
    folder = pictures(tmp_path / "p")
    listed = load_data("imagefolder", path=folder, root=tmp_path / "r", **wish).ids
    monkeypatch.setattr(index, "FEWEST", 1)
    mapped = load_data("imagefolder", path=folder, root=tmp_path / "r", **wish).ids
    assert isinstance(mapped, index.Names) and not isinstance(listed, index.Names)
    assert index.digest(mapped) == index.digest(listed)
    others = [[*listed[1:], listed[0]], [*listed[:-1], listed[-1] + "x"], list(listed[1:]), ["".join(listed)]]
    assert len({index.digest(names) for names in [listed, *others]}) == 5


def by_hash(names, share, least):
    """The split as the rule has it: in each class the names with the smallest SHA-256 of their paths."""
    chosen = set()
    for kind in {name.split("/")[0] for name in names}:
        own = [name for name in names if name.split("/")[0] == kind]
        own.sort(key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        chosen.update(own[: max(round(share * len(own)), min(least, len(own) - 1))])
    return chosen


def test_the_split_is_by_the_hash_of_the_path_in_each_class_with_an_index_too(tmp_path, large):
    root = pictures(tmp_path / "pictures")
    names = {os.path.relpath(Path(place, file), root) for place, _, files in os.walk(root) for file in files}
    found = [set(load_data("imagefolder", part, path=root, root=tmp_path).ids) for part in SPLITS]
    tested = by_hash(names, 0.25, 0)
    held = by_hash(names - tested, 0.1, 1)
    assert found == [names - tested - held, held, tested]


def test_names_are_sorted_as_paths_and_links_to_folders_are_not_followed(tmp_path):
    root = pictures(tmp_path / "pictures")
    (root / "cat" / "copies").symlink_to(root / "dog")
    (root / "cat" / ".hidden.png").touch()
    peer = sorted(item for item in root.rglob("*.png") if item.name != ".hidden.png" and "copies" not in item.parts)
    assert folder_module.picture_files(root) == peer


def test_the_folder_is_listed_once_and_then_the_file_is_mapped(tmp_path, large, monkeypatch):
    root = pictures(tmp_path / "pictures")
    calls = count_calls(monkeypatch)
    for split in ("train", "validation", "train"):
        part = load_data("imagefolder", split, path=root, root=tmp_path / "cache")
        assert len(calls) == 1
        base = part.ids.text  # nothing of it is copied
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap) and np.shares_memory(base, part.labels.numpy())
        assert np.shares_memory(base, part.ids.starts) and np.shares_memory(base, part.ids.ends)


@pytest.mark.parametrize("place", ["", "cat", "cat/b", "cat/b/c"])
def test_a_change_in_any_folder_is_seen(tmp_path, large, place):
    root = pictures(tmp_path / "pictures")
    options = {"path": root, "root": tmp_path / "cache"}

    def ids():
        return {id_ for part in SPLITS for id_ in load_data("imagefolder", part, **options).ids}

    before = ids()
    new = root / place / "new.png" if place else root / "ant" / "new.png"
    new.parent.mkdir(exist_ok=True)
    added = [new.with_name(f"new {i}.png") for i in range(4)]
    for file in added:
        Image.new("RGB", (4, 4)).save(file)
    assert ids() - before == {file.relative_to(root).as_posix() for file in added}


def test_an_index_made_right_after_a_change_is_not_trusted(tmp_path, large, monkeypatch):
    """A second change within the clock's tick of the file system would leave no trace in the folder's time."""
    root = pictures(tmp_path / "pictures")
    os.utime(root / "cat")
    calls = count_calls(monkeypatch)
    for expected in (1, 2):
        load_data("imagefolder", path=root, root=tmp_path / "cache")
        assert len(calls) == expected
    age(root)
    for _ in range(2):
        load_data("imagefolder", path=root, root=tmp_path / "cache")
    assert len(calls) == 3


DAMAGE = [
    lambda b: b"", lambda b: b[:5], lambda b: b[:-1], lambda b: b[:-3] + b"x" + b[-2:],
    lambda b: b[:20] + b"?" + b[21:], lambda b: bytes(8), lambda b: bytes(16), lambda b: b"junk" * 99,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_again_without_a_word(tmp_path, large, damage):
    root = pictures(tmp_path / "pictures")
    options = {"path": root, "root": tmp_path / "cache"}
    before = contents(load_data("imagefolder", **options))
    (file,) = (item for item in (tmp_path / "cache" / ".index").iterdir() if item.suffix != ".lock")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert contents(load_data("imagefolder", **options)) == before
    assert len(file.read_bytes()) == len(whole)


def test_without_a_cache_folder_the_index_is_in_memory(tmp_path, large):
    root = pictures(tmp_path / "pictures")
    (tmp_path / "file").touch()
    found, kept = (load_data("imagefolder", path=root, root=tmp_path / place) for place in ("file", "cache"))
    assert contents(found) == contents(kept)


def test_of_several_processes_one_makes_the_index_and_the_others_wait(tmp_path, large, monkeypatch):
    """Each thread stands for a process."""
    root = pictures(tmp_path / "pictures")
    calls = count_calls(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_data("imagefolder", path=root, root=tmp_path / "cache"), range(4)))
    assert len(calls) == 1 and all(data.ids == found[0].ids for data in found)


def test_a_small_folder_leaves_no_index_behind(tmp_path):
    load_data("imagefolder", path=pictures(tmp_path / "pictures"), root=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_pictures_left_out_are_named_at_every_opening(tmp_path, large):
    root = pictures(tmp_path / "pictures")
    Image.new("RGB", (4, 4)).save(root / "loose.png")
    age(root)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 images beside the class folders .* left out, loose\.png first"):
            load_data("imagefolder", path=root, root=tmp_path / "cache")


def test_of_more_pictures_than_memory_holds_none_is_decoded_at_the_start_and_unreadable_kinds_are_named(
    tmp_path, large, monkeypatch
):
    root = pictures(tmp_path / "pictures")
    monkeypatch.setattr(sources, "MEMORY", 0)
    decoded = []
    monkeypatch.setattr(sources, "read_image", lambda path: decoded.append(path))
    data = load_data("imagefolder", path=root, root=tmp_path / "cache")
    assert len(data) and not decoded
    for name in ("phone.heic", "second.heic", "third.heic", "fourth.heic"):
        (root / "cat" / name).touch()
    with pytest.raises(ValueError, match=r"\.heic cannot be read \(Pillow does not open"):
        for part in SPLITS:
            load_data("imagefolder", part, path=root, root=tmp_path / "cache")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads, from Python 3.12
@pytest.mark.parametrize("objective", ["masks", "views"])
def test_workers_decode_and_hand_over_bytes_and_masks_and_name_what_they_cannot_read(
    tmp_path, large, monkeypatch, objective
):
    root = pictures(tmp_path / "pictures")
    monkeypatch.setattr(sources, "MEMORY", 0)
    folders = ("data.name=imagefolder", f"data.path={root}", f"data.root={tmp_path / 'cache'}", "data.image_size=32")
    sizes = ("train.batch_size=8", "train.num_workers=1", "model.level_weights=[1.0, 0.5]", "views.keep=0.5")
    config = load_config(None, (*folders, *sizes, f"objective={objective}"))
    data, rows = load_split(config, "train"), slice(4, 8)
    feed = Feed(config, data, range(2, 5), [rows], 8, torch.device("cpu"))
    pixels, labels, masks = next(feed._batches())
    assert pixels.dtype == torch.uint8 and pixels.shape[:2] == (4, 3)
    places = batch_at(2, size=len(data), batch_size=8, seed=config.train.seed)[rows]
    assert labels.tolist() == [int(data.labels[i]) for i, _ in places]
    whole, views = draw_masks(config, (4, 4), 2), 1 if objective == "masks" else config.views.large
    for drawn, own in zip((whole.context_idx, *whole.target_idx), (masks.context_idx, *masks.target_idx), strict=True):
        assert torch.equal(own, torch.cat([view[rows] for view in drawn.chunk(views)]))
    for place, _, files in os.walk(root):
        for file in files:
            Path(place, file).write_bytes(b"")
    with pytest.raises(ValueError, match=r"^image file .* cannot be read .* set on_corrupt to skip$") as caught:
        list(feed)
    assert "\n" not in str(caught.value)
