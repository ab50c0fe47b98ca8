"""A folder of one's own pictures: features, a map and neighbours, by the page of the guide and by brute force."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import hjepa
from hjepa.data.images import DATASETS, IMAGENET
from hjepa.evaluate.collection import _Files, folder_features, neighbours
from hjepa.evaluate.published import published_encoder
from hjepa.evaluate.readers import knn_accuracy, linear_probe
from hjepa.evaluate.transfer import with_strategy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_pictures.md"


class Colour:
    """A stand-in encoder: the mean colour."""

    patch_size, grid_size = 8, (2, 2)

    def __call__(self, images):
        return images.mean((2, 3))


def fill(folder: Path) -> None:
    """Reddish and bluish pictures of several shapes in class folders, and a loose grey one."""
    rng = np.random.default_rng(0)
    for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / label / "deeper").mkdir(parents=True)
        for index in range(6):
            shape = (40 + 8 * index, 64, 3)
            pixels = np.clip(np.array(colour) + rng.integers(-30, 30, size=shape), 0, 255).astype(np.uint8)
            where = folder / label if index % 2 else folder / label / "deeper"
            Image.fromarray(pixels).save(where / f"{index}.png")
    Image.new("RGB", (50, 50), (128, 128, 128)).save(folder / "loose.png")


def in_a_worker(files, chunk, read=_Files.__getitem__):
    assert torch.utils.data.get_worker_info() is not None
    return read(files, chunk)


def test_the_page_runs_in_order_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "my_pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    scope: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), scope)
    plt.close("all")
    assert "13 pictures" in capsys.readouterr().out
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("map.png", "neighbours.png"))
    kept = np.load(tmp_path / "features.npz")
    assert kept["features"].shape == scope["features"].shape and list(kept["labels"]) == scope["labels"]
    assert scope["same"] > 0.8  # red beside red


def test_labels_are_the_first_folders_and_features_those_of_the_pictures(tmp_path):
    fill(tmp_path)
    features, files, labels = folder_features(Colour(), tmp_path, mean=(0, 0, 0), std=(1, 1, 1), batch_size=4)
    assert labels.count("red") == labels.count("blue") == 6 and labels[files.index(tmp_path / "loose.png")] == ""
    assert files == sorted(files) and len(features) == len(files) == 13
    torch.testing.assert_close(features[files.index(tmp_path / "loose.png")], torch.full((3,), 128 / 255))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads, from Python 3.12
def test_workers_read_the_same_pictures_in_the_same_order(tmp_path, monkeypatch):
    fill(tmp_path)
    (tmp_path / "blue" / "broken.png").write_bytes(b"no picture")
    read = lambda workers, skip=True: folder_features(  # noqa: E731
        Colour(), tmp_path, skip=skip, batch_size=3, workers=workers
    )
    alone = read(0)
    with pytest.raises(ValueError) as said:
        read(0, skip=False)
    with monkeypatch.context() as patch:
        patch.setattr("hjepa.evaluate.collection._Files.__getitem__", in_a_worker)
        found = read(2)
    assert torch.equal(found[0], alone[0]) and found[1:] == alone[1:]
    with pytest.raises(ValueError) as said_by_a_worker:
        read(2, skip=False)
    assert str(said_by_a_worker.value) == str(said.value) and "broken.png cannot be read" in str(said.value)


def test_pixels_are_normalised_as_in_the_encoder_s_training(tmp_path):
    fill(tmp_path)
    drawings = hjepa.load_pretrained("openmoji-rope")
    mean, std = DATASETS["openmoji"].mean, DATASETS["openmoji"].std
    assert (drawings.pixel_mean, drawings.pixel_std) == (mean, std)
    published = published_encoder("test_vit", mean, std, pretrained=False)
    for encoder, pixels in ((drawings, (mean, std)), (published, (mean, std)), (Colour(), IMAGENET)):
        given = {"mean": pixels[0], "std": pixels[1]}
        assert torch.equal(folder_features(encoder, tmp_path)[0], folder_features(encoder, tmp_path, **given)[0])


def test_an_encoder_read_with_another_strategy_has_the_size_of_its_training(tmp_path):
    fill(tmp_path)
    rope = hjepa.load_pretrained("openmoji-rope")
    found = folder_features(with_strategy(rope, "ntk"), tmp_path)[0]
    torch.testing.assert_close(found, folder_features(rope, tmp_path, 64)[0])  # of one grid all strategies are alike


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_readers_of_features_that_are_not_finite_name_the_row(odd):
    x, y = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    bad = x.clone()
    bad[3, 1] = odd
    for name, read in (("features", lambda: neighbours(bad)), ("features", lambda: linear_probe(bad, y)),
                       ("gallery", lambda: knn_accuracy(bad, y, x, y, 3)),
                       ("queries", lambda: knn_accuracy(x, y, bad, y, 3))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} has 1 of 9 rows that are not finite, row 3 first"):
            read()


def test_neighbours_equal_those_of_a_loop():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double() + 3  # far off centre
    centred = x - x.mean(0)
    found = neighbours(x, k=3)
    for i in range(9):
        score = {j: float(centred[i] @ centred[j] / centred[i].norm() / centred[j].norm()) for j in range(9) if j != i}
        assert found[i].tolist() == sorted(score, key=score.get, reverse=True)[:3]
    assert neighbours(x[:2], k=5).tolist() == [[1], [0]]


def test_files_that_cannot_be_read_are_named_or_skipped(tmp_path):
    fill(tmp_path)
    (tmp_path / "red" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png cannot be read"):
        folder_features(Colour(), tmp_path)
    assert len(folder_features(Colour(), tmp_path, skip=True)[1]) == 13
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no pictures to read: 0 files"):
        folder_features(Colour(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"nearest: .*red"):
        folder_features(Colour(), tmp_path / "redd")
