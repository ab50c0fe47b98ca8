"""Half B of Imagenette's test pictures: what it holds, and that one command alone asks for it."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import hjepa
from hjepa.data import sources
from hjepa.data.images import load_data


def test_imagenettes_own_test_pictures_are_halved_and_only_it_has_a_second_half(tmp_path, monkeypatch):
    names = {"n01440764": [f"a{i}.JPEG" for i in range(30)], "n02102040": [f"b{i}.JPEG" for i in range(21)]}
    for wnid, files in names.items():
        for part in ("train", "val"):
            (tmp_path / "imagenette2-160" / part / wnid).mkdir(parents=True)
            for file in files:
                Image.new("RGB", (8, 8)).save(tmp_path / "imagenette2-160" / part / wnid / file)
    monkeypatch.setattr(sources, "IMAGENETTE_COUNTS", {"train": 51, "test": 51})
    first, second = (load_data("imagenette", split, root=tmp_path) for split in ("test", "test-b"))
    assert sorted([*first.ids, *second.ids]) == sorted(f"val/{wnid}/{f}" for wnid in names for f in names[wnid])
    assert torch.bincount(first.labels).tolist() == [15, 11] and torch.bincount(second.labels).tolist() == [15, 10]
    ranked = sorted(names["n01440764"], key=lambda name: hashlib.sha256(name.encode()).hexdigest())  # by name alone
    assert {id_.split("/")[2] for id_, y in zip(second.ids, second.labels, strict=True) if y == 0} == set(ranked[:15])
    with pytest.raises(ValueError, match=r"'test-b' of openmoji is not known; .* nearest: test"):
        load_data("openmoji", "test-b")


def test_nothing_asks_for_the_second_half_of_the_test_pictures():
    """It is read once, by the final evidence command."""
    allowed = {"benchmarks/evidence.py", "hjepa/data/images.py", "hjepa/data/sources.py"}
    root = Path(hjepa.__file__).parents[1]
    places = [p for folder in ("hjepa", "benchmarks", "notebooks", "configs") for p in (root / folder).rglob("*")]
    texts = {path: path.read_text(encoding="utf-8") for path in places if path.suffix in (".py", ".ipynb", ".yaml")}
    named = re.compile(r"test[-_]b\b|\bFINAL\b")
    asking = {path.relative_to(root).as_posix() for path, text in texts.items() if named.search(text)}
    assert {"benchmarks/evidence.py", "hjepa/data/sources.py"} <= asking <= allowed
