"""A stopped evaluation goes on where it was, and never with rows of another one."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from hjepa.data import load_data
from hjepa.evaluate.resume import Kept, fingerprint
from hjepa.evaluate.transfer import resolution_transfer, subset

SIZES = [8, 16, (8, 24), 32]


class Means(nn.Module):
    """Mean colours through one layer; stops the evaluation when it meets an image of height `broken`."""

    def __init__(self, broken=None):
        super().__init__()
        self.broken, self.layer = broken, nn.Linear(3, 3)
        self.layer.load_state_dict({"weight": torch.eye(3) + 0.5, "bias": torch.ones(3)})

    def forward(self, images):
        if images.shape[2] == self.broken:
            raise RuntimeError("stopped")
        return self.layer(images.mean((2, 3)))


class Noise:
    """Pictures of two classes that differ in brightness; notes the sizes asked for."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, n=40, shift=0.0):
        self.labels, self.ids, self.shift = torch.arange(n) % 2, [f"{i}" for i in range(n)], shift
        self.asked: list = []

    def __len__(self):
        return len(self.ids)

    def at_size(self, size, indices=None):
        size = (size, size) if isinstance(size, int) else size
        self.asked.append(size)
        noise = torch.randn(len(self), 3, 8, 8, generator=torch.Generator().manual_seed(0)) + self.shift
        return nn.functional.interpolate((noise + self.labels.view(-1, 1, 1, 1))[indices], size)


def read(kept, broken=None, sizes=SIZES, **options):
    train, test = Noise(), Noise()
    rows = resolution_transfer({"e": Means(broken)}, train, test, train_size=16, sizes=sizes, kept=kept, **options)
    return rows, test.asked, train.asked


def test_a_stopped_evaluation_reads_only_what_is_left_and_gives_the_same_rows(tmp_path):
    whole, *_ = read(None)
    with pytest.raises(RuntimeError, match="stopped"):
        read(Kept(tmp_path / "e.csv", "a"), broken=32)
    rows, tested, trained = read(Kept(tmp_path / "e.csv", "a"))
    assert rows == whole and {row["size"] for row in rows} == {(16, 16), (8, 8), (8, 24), (32, 32)}
    assert tested == trained == [(16, 16), (32, 32)], "the training size, where readers are fitted, and what was left"
    assert read(Kept(tmp_path / "e.csv", "a")) == (whole, [], [])
    assert read(Kept(tmp_path / "e.csv", "a"), sizes=[8])[0] == [r for r in whole if r["size"] in ((16, 16), (8, 8))]


def test_rows_of_another_evaluation_or_of_a_damaged_file_are_not_taken(tmp_path):
    rows, *_ = read(Kept(tmp_path / "new" / "e.csv", "a"))
    part = tmp_path / "new" / ".e.csv.part"
    assert set(Kept(tmp_path / "new" / "e.csv", "a")) == {"8", "16", "8x24", "32"}
    assert Kept(tmp_path / "new" / "e.csv", "b") == {}
    for text in (part.read_text()[:-9], "[1]", "{}"):
        part.write_text(text)
        assert Kept(tmp_path / "new" / "e.csv", "a") == {}
    kept = Kept(tmp_path / "new" / "e.csv", "a")
    kept["16"] = rows[:3]
    kept.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_the_fingerprint_changes_with_everything_that_rows_depend_on():
    class Strategy:
        strategy = "interpolate"

        def __call__(self, images):
            return images

    other = Means()
    other.layer.weight.data[0, 0] += 1e-6
    renamed, relabelled = Noise(), Noise()
    renamed.ids[3], relabelled.labels[3] = "x", 0
    plain = {"e": Means()}
    keys = [
        fingerprint(plain, (Noise(), Noise()), pool="mean"),
        fingerprint(plain, (Noise(), Noise()), pool="pyramid"),
        fingerprint({"f": Means()}, (Noise(), Noise()), pool="mean"),
        fingerprint({"e": other}, (Noise(), Noise()), pool="mean"),
        fingerprint({"e": SimpleNamespace(strategy="extrapolate")}, (Noise(), Noise()), pool="mean"),
        fingerprint({"e": Strategy()}, (Noise(), Noise()), pool="mean"),
        fingerprint(plain, (Noise(), renamed), pool="mean"),
        fingerprint(plain, (relabelled, Noise()), pool="mean"),
        fingerprint(plain, (Noise(shift=0.1), Noise()), pool="mean"),
    ]
    assert len(set(keys)) == len(keys)
    assert fingerprint({"e": Means()}, (Noise(), Noise()), pool="mean") == keys[0]
    assert len(fingerprint({"e": Means().bfloat16()}, (Noise(),), pool="mean")) == 64


def test_a_file_that_was_replaced_under_its_name_changes_the_fingerprint(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(60):  # more than the 64 pictures whose pixels are looked at
            Image.new("RGB", (8, 8), (i, 2 * i, 90)).save(tmp_path / name / f"{i}.png")

    def found(**moved):
        return fingerprint({}, [load_data("imagefolder", "train", path=tmp_path, **moved)])

    before = found(), found(moved=True)
    assert (found(), found(moved=True)) == before
    ids = load_data("imagefolder", "train", path=tmp_path).ids
    unseen = set(range(len(ids))) - set(subset(len(ids), 64, 0).tolist())  # whose pixels are not looked at
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / ids[min(unseen)])
    after = found(), found(moved=True)
    assert after[0] != before[0] and after[1] != before[1]
