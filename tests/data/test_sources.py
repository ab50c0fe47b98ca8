"""Readers of the downloadable data sets, on small stand-ins for their files, and their failures."""

import gzip
import io
import pickle
import socket
import struct
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import mnist

from hjepa.data import sources
from hjepa.data.images import SPLITS, load_data
from hjepa.data.sources import read_idx

RNG = np.random.default_rng(0)


def write_idx(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_fashion(folder, ending: str, count: int = 3) -> np.ndarray:
    images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for stem in ("train", "t10k"):
        write_idx(folder / f"{stem}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{ending}", np.array([9, 0, 3]))
    return images


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_fashion_mnist_in_the_data_folder_comes_before_the_system_package(tmp_path, monkeypatch, ending):
    images = write_fashion(tmp_path / "FashionMNIST" / "raw", ending)
    write_fashion(tmp_path / "system", ".gz")
    monkeypatch.setattr(sources, "DEBIAN", tmp_path / "system")
    data = load_data("fashion_mnist", root=tmp_path)
    assert data.labels.tolist() == [9, 0, 3] and data.classes[9] == "ankle boot"
    assert torch.equal(data.source(1), torch.from_numpy(images[1]).expand(3, 28, 28))
    assert not torch.equal(load_data("fashion_mnist", root=tmp_path / "none").source(1), data.source(1))


@pytest.mark.skipif(not sources.DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_idx_reader_equals_torchvisions(tmp_path):
    for kind, peer in (("images-idx3", mnist.read_image_file), ("labels-idx1", mnist.read_label_file)):
        packed = sources.DEBIAN / f"t10k-{kind}-ubyte.gz"
        (tmp_path / kind).write_bytes(gzip.decompress(packed.read_bytes()))
        truth = peer(str(tmp_path / kind))
        assert torch.equal(torch.from_numpy(read_idx(packed)).to(truth.dtype), truth)
        assert torch.equal(torch.from_numpy(read_idx(tmp_path / kind)).to(truth.dtype), truth)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b junk", gzip.compress(b"\0\0\x08\x01\0\0\0\x05ab"), gzip.compress(b"html")],
    ids=["empty", "junk", "short", "other"],  # the default holds gzip's time stamp, and workers must agree on names
)
def test_damaged_fashion_mnist_is_named_in_one_line(tmp_path, data):
    folder = tmp_path / "FashionMNIST" / "raw"
    write_fashion(folder, ".gz")
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz is damaged") as caught:
        load_data("fashion_mnist", root=tmp_path)
    assert "\n" not in str(caught.value)
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(2))
    with pytest.raises(ValueError, match=r"3 images but .* 2 labels"):
        load_data("fashion_mnist", root=tmp_path)


def test_cifar10_keeps_channels_and_rows(tmp_path, monkeypatch):
    """Its files hold 3 x 32 x 32 bytes per picture, channel first, top row first (Krizhevsky 2009)."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pictures = RNG.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    batch = pickle.dumps({"data": pictures.reshape(2, -1), "labels": [6, 2]})
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(batch)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, validation, test = (load_data("cifar10", part, root=tmp_path) for part in SPLITS)
    assert len(train) + len(validation) == len({*train.ids, *validation.ids}) == 10
    assert (len(test), test.labels.tolist(), test.classes[2]) == (2, [6, 2], "c")
    assert torch.equal(test.source(1), torch.from_numpy(pictures[1]))


def test_stl10_keeps_channels_and_rows(tmp_path, monkeypatch):
    """Its files hold each channel column by column (Coates et al. 2011)."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pictures = RNG.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pictures.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([10, 1]))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    data = load_data("stl10", "test", root=tmp_path)
    assert data.labels.tolist() == [9, 0] and data.classes[9] == "j"
    assert torch.equal(data.source(1), torch.from_numpy(pictures[1]))


def test_imagenette_has_names_for_its_classes_and_notices_a_part(tmp_path, monkeypatch):
    from torchvision.datasets import Imagenette

    for wnid in Imagenette._WNID_TO_CLASS:
        for part in ("train", "val"):
            folder = tmp_path / "imagenette2-160" / part / wnid
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(folder / "x.JPEG")
    with pytest.raises(ValueError, match="has 10 test images, not 3925; delete it"):
        load_data("imagenette", "test", root=tmp_path)
    monkeypatch.setattr(sources, "IMAGENETTE_COUNTS", {"train": 10, "test": 10})
    data = load_data("imagenette", "test", root=tmp_path)
    assert data.ids[0] == "val/n01440764/x.JPEG"
    names = [Imagenette._WNID_TO_CLASS[id_.split("/")[1]][0] for id_ in data.ids]
    assert [data.classes[label] for label in data.labels] == names


OFFLINE = {
    "cifar10": "cifar-10-python.tar.gz",
    "stl10": "stl10_binary.tar.gz",
    "imagenette": "imagenette2-160.tgz",
    "fashion_mnist": "ubyte.gz",
}


@pytest.mark.parametrize("name", OFFLINE)
def test_without_network_one_line_names_folder_and_file_and_no_wait_is_endless(name, tmp_path, monkeypatch):
    waits = []

    def no_network(*_, **__):
        waits.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(sources, "DEBIAN", tmp_path / "absent")
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name, root=tmp_path / "data")
    message = str(caught.value)
    assert "\n" not in message and name in message and str(tmp_path / "data") in message
    assert OFFLINE[name] in message and "no route" in message
    assert waits and all(0 < wait <= 30 for wait in waits)
    assert socket.getdefaulttimeout() is None


def test_damaged_download_is_one_line_too(tmp_path, monkeypatch):
    class Answer(io.BytesIO):
        length, url = 4, "http://x"

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer(b"junk"))
    with pytest.raises(FileNotFoundError, match=r"cifar10.*corrupted"):
        load_data("cifar10", root=tmp_path)


def test_one_process_downloads_and_the_others_wait_for_whole_files(tmp_path, monkeypatch):
    """Each thread stands for a process: with a half-written file in place nobody says that it is damaged."""
    monkeypatch.setattr(sources, "DEBIAN", tmp_path / "none")
    calls = []

    class Slow:
        def __init__(self, root, download):
            calls.append(root)
            folder = tmp_path / "data" / "FashionMNIST" / "raw"
            write_fashion(folder, "")
            whole = {path: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
            for path, data in whole.items():
                path.write_bytes(data[:10])
            time.sleep(0.3)
            for path, data in whole.items():
                path.write_bytes(data)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Slow)
    with ThreadPoolExecutor(4) as pool:
        jobs = []
        for _ in range(4):
            jobs.append(pool.submit(load_data, "fashion_mnist", root=tmp_path / "data"))
            time.sleep(0.05)
        found = [job.result() for job in jobs]
    assert len(calls) == 1 and all(data.ids == found[0].ids for data in found)


def test_files_that_are_kept_whole_are_decoded_once_for_all_sizes(tmp_path, monkeypatch):
    decoded, clean = [], sources.read_image
    monkeypatch.setattr(sources, "read_image", lambda path: decoded.append(path) or clean(path))
    for index, side in enumerate((20, 31, 32, 40)):  # detail is 32: the last is kept shrunk, and 32 may be so
        pixels = torch.randint(256, (side, side + 3, 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / f"{index}.png")
    names = [f"{index}.png" for index in range(4)]
    pictures = sources.FilePictures(tmp_path, names, 32)
    for index in range(4):
        pictures.source(index)
    assert len(decoded) == 4
    for size in ((16, 16), (24, 40)):
        fresh = sources.FilePictures(tmp_path, names, 32).resized([0, 1, 2, 3], *size)
        decoded.clear()
        assert torch.equal(pictures.resized([0, 1, 2, 3], *size), fresh)
        assert [path.name for path in decoded] == ["2.png", "3.png"]
