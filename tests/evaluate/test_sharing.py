"""Several processes give the rows of one: `hjepa.evaluate.processes`, on a CPU with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hjepa.evaluate import processes

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(processes.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
READ = """
import json, os, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from torch import nn
from hjepa.evaluate.processes import place, together
from hjepa.evaluate.resume import Kept
from hjepa.evaluate.transfer import raw_pixels, resolution_transfer

class Pictures:
    def __init__(self, seed, count):
        self.labels = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.noise, self.asked = noise + 0.3 * self.labels.view(-1, 1, 1, 1), []
    def __len__(self):
        return len(self.labels)
    def at_size(self, size, indices):
        if size == self.broken:
            raise OSError("stopped")
        self.asked.append([size[0], len(indices)])
        return nn.functional.interpolate(self.noise[indices], size)

def read(first, kept=None, broken=None, batch_size=16):
    train, test, hits = Pictures(0, 72), Pictures(1, 40), {}
    train.broken = test.broken = broken and (broken, broken)
    rows = resolution_transfer({"pixels": raw_pixels(4), "thumbnail": raw_pixels(2)}, train, test, train_size=8,
                               sizes=[16, 24], hits=hits, batch_size=batch_size, kept=kept if first else None)
    return rows, [[*map(str, key), hit.tolist()] for key, hit in hits.items()], train.asked, test.asked

torch.set_num_threads(1)
with together() if "WORLD_SIZE" in os.environ else nullcontext():
    rank, count = place()
    found = {"batches": read(True), "a batch": read(True, batch_size=256)}
    try:
        read(rank == 0, Kept(f"{sys.argv[1]}/{count}.csv", "key"), broken=24)
    except OSError:
        found["resumed"] = read(rank == 0, Kept(f"{sys.argv[1]}/{count}.csv", "key"))
    Path(sys.argv[1], f"{rank} of {count}.json").write_text(json.dumps(found))
"""


def start(how: list[str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*how, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one_also_when_resumed(tmp_path):
    (tmp_path / "read.py").write_text(READ)
    for how in (ONE, TWO):
        succeed(start(how, tmp_path / "read.py", tmp_path))
    one, first, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("0 of 1", "0 of 2", "1 of 2"))
    for name, (rows, hits, train, test) in one.items():
        assert first[name][:2] == [rows, hits], name
        assert other[name][:2] == [[], []], "rows and hits are the first process's alone"
        for whole, parts in ((train, first[name][2] + other[name][2]), (test, first[name][3] + other[name][3])):
            assert sorted(parts) == sorted(whole), "every batch is read once, and is the batch of one process"
    assert first["batches"][3] and other["batches"][3] and not first["a batch"][3]
    assert {size for size, _ in other["resumed"][3]} == {8, 24}, "the training size, and what was left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures to fit readers on and 12 to read, of two classes that differ in brightness: a batch each."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 6)):
        for label, light in (("dark", 0), ("light", 20)):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(light, light + 200, size=(16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{index}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--timm", "test_vit", "--no-pretrained", "--fit-size", "32", "--sizes", "48"],
        ["--run-dir", "openmoji-rope", "--dense", "--sizes", "32"],
    ],
    ids=["timm", "dense"],
)
def test_evaluate_under_torchrun_prints_once_and_writes_the_same_table(words, folder, tmp_path):
    command = ["-m", "hjepa", "evaluate", *words, "--data", "imagefolder", "--path", folder, "--out"]
    said = [succeed(start(how, *command, tmp_path / f"{len(how)}.csv")) for how in (ONE, TWO)]
    tables = [tmp_path / f"{len(how)}.csv" for how in (ONE, TWO)]
    assert tables[0].read_text() == tables[1].read_text()
    assert said[0].replace(str(tables[0]), str(tables[1])) == said[1]
    assert sorted(tmp_path.iterdir()) == sorted(tables), "nothing is left of what was kept"


FAIL = """
import os, sys
from hjepa import cli
from hjepa.evaluate import transfer
if os.environ["RANK"] in sys.argv[1]:
    def fail(*arguments, **options):
        raise OSError("the disk is gone")
    transfer._encode_all = fail
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "01"])
def test_an_error_of_one_process_or_all_ends_them_and_is_said_once(ranks, folder, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    words = ["--timm", "test_vit", "--no-pretrained", "--fit-size", 32, "--data", "imagefolder", "--path", folder]
    done = start(TWO, tmp_path / "fail.py", ranks, "evaluate", *words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("hjepa: error:") == 1 and "hjepa: error: the disk is gone\n" in done.stderr
    assert "exitcode  : 2" in done.stderr.split("Root Cause")[1]
