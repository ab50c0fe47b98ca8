"""Claims of hjepa.data.loading: loader processes decode files, and nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.data import loading, sources
from hjepa.data.images import load_data
from hjepa.evaluate.baselines import baselines
from hjepa.evaluate.dense import RawPatches, dense_transfer
from hjepa.evaluate.transfer import raw_pixels, resolution_transfer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads, from Python 3.12
CHUNKS = [torch.tensor(chunk) for chunk in ([4, 0, 7, 3, 2], [], [1], [6, 5])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 noisy pictures of several shapes in two classes, 12 of them for training."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for label, light in (("dark", 0), ("light", 60)):
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(light, light + 190, size=(40 + 8 * index, 90 - 7 * index, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / label / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """Files that this process decodes; of a split none are kept in memory, and parts are of two pictures."""
    seen, read = [], sources.read_image
    monkeypatch.setattr(sources, "MEMORY", 0)
    monkeypatch.setattr(loading, "PART", 2)
    monkeypatch.setattr(sources, "read_image", lambda path: (seen.append(path), read(path))[1])
    return seen


@pytest.mark.parametrize("how", [{}, {"moved": True, "repeats": 2}], ids=["files", "moved"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_bits_in_the_same_order(folder, decoded, monkeypatch, how, workers):
    data = load_data("imagefolder", path=folder, image_size=32, **how)
    kinds, normalised = [], loading.normalised
    monkeypatch.setattr(loading, "normalised", lambda t, *rest: (kinds.append(t.dtype), normalised(t, *rest))[1])
    for size in (32, (24, 56)):
        alone = [data.at_size(size, chunk) for chunk in CHUNKS]
        assert decoded and not kinds
        decoded.clear()
        found = list(loading.batches(data, size, CHUNKS, workers))
        assert not decoded and kinds == [torch.uint8] * len(CHUNKS)
        kinds.clear()
        assert [t.shape for t in found] == [t.shape for t in alone]
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_drawings_and_pictures_in_memory_stay_in_this_process(monkeypatch):
    monkeypatch.setattr(loading, "loaded", lambda *_, **__: 1 / 0)
    for how in ({}, {"moved": True}):
        data = load_data("openmoji", image_size=16, limit=8, **how)
        assert torch.equal(loading.at_size(data, 16, CHUNKS[0], 2), data.at_size(16, CHUNKS[0]))


def test_a_file_that_cannot_be_read_is_named_as_without_workers(folder, decoded):
    data = load_data("imagefolder", path=folder, image_size=32)
    (folder / data.ids[3]).write_bytes(b"no picture")
    said, reason = [], rf"^image file .*{data.ids[3]} cannot be read .* on_corrupt to skip$"
    for workers in (0, 2):
        with pytest.raises(ValueError, match=reason) as e:
            list(loading.batches(data, 32, CHUNKS, workers))
        said.append(str(e.value))
    assert said[0] == said[1] and "\n" not in said[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_numbers_stay(folder, decoded, workers):
    data, before = load_data("imagefolder", path=folder, image_size=32), torch.get_rng_state()
    list(loading.loaded(loading._Resized(data.pictures, (16, 16)), [[0], [1]], workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_measured_is_decoded_by_workers_and_the_same(folder, decoded):
    train, test = (load_data("imagefolder", split, path=folder, image_size=32) for split in ("train", "test"))
    rows, kinds = [], (resolution_transfer, dense_transfer)
    for workers in (0, 2):
        decoded.clear()
        simple = baselines(train, 32, workers=workers)
        for read, encoders in zip(kinds, ({"raw": raw_pixels(8), **simple}, {"raw": RawPatches(8)}), strict=True):
            how = {"knn_k": 3, "batch_size": 4} if read is resolution_transfer else {}
            rows.append(read(encoders, train, test, train_size=32, sizes=[(16, 48)], workers=workers, **how))
        assert bool(decoded) is (workers == 0)
    assert rows[:2] == rows[2:]
