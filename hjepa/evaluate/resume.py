"""Rows of an evaluation kept beside its table while it runs, so that a stopped one goes on where it was.

    kept = Kept("table.csv", fingerprint(encoders, (train, test), sizes=None, pool="mean"))
    rows = resolution_transfer(encoders, train, test, ..., kept=kept)
    kept.remove()  # once table.csv is written

What is kept counts only under the same fingerprint. Of the pictures it holds the ids, the labels, the pixels of 64 in
each split, and of files the size and the time of the last change: a replaced file does not go unnoticed.
Not covered: features, which are encoded again at the training size, where readers are fitted.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import read_json, write_whole
from ..versions import versions
from .results import Row
from .transfer import EncoderLike, module_of, subset


class Kept(dict[str, list[Row]]):
    """Rows by image size, such as "64x96", written to .NAME.part beside the file `out` at every change.

    Starts with those that a call of the same fingerprint left there.
    """

    def __init__(self, out: str | Path, key: str) -> None:
        self.path, self.key = Path(out).with_name(f".{Path(out).name}.part"), key
        before = read_json(self.path)
        if isinstance(before, dict) and before.get("key") == key:
            for size, rows in before["rows"].items():
                super().__setitem__(size, [row | {"size": tuple(row["size"])} for row in rows])

    def __setitem__(self, size: str, rows: list[Row]) -> None:
        super().__setitem__(size, rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({"key": self.key, "rows": self}))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def fingerprint(encoders: Mapping[str, EncoderLike], splits: Sequence[Any], **options: Any) -> str:
    """Hex digits for all that rows depend on beside the image size: weights, pictures (`ImageData`), options, versions.

    options: plain values; encoders that are functions count by their name alone.
    """
    digest = hashlib.sha256(json.dumps([versions(), options], sort_keys=True, default=str).encode())
    for name, encoder in encoders.items():
        module = module_of(encoder)
        weights = module.state_dict() if isinstance(module, nn.Module) else {}
        digest.update(repr((name, getattr(encoder, "strategy", None), sorted(weights))).encode())
        for _, tensor in sorted(weights.items()):
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    for data in splits:
        digest.update(repr((data.ids, data.labels.tolist(), data.mean, data.std)).encode())
        digest.update(data.at_size(32, subset(len(data), 64, 0)).numpy().tobytes())
        stamps = getattr(getattr(data, "pictures", None), "stamps", None)
        if stamps is not None:
            digest.update(repr(stamps()).encode())
    return digest.hexdigest()
