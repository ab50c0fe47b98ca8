"""Run folders: never the same twice, held by one process however it dies, files whole or absent."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hjepa.files import alone, fresh_folder, fresh_path, hold, is_held, read_json, write_whole

HOLDER = """
import sys, time
from hjepa.files import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_fresh_folders_made_at_once_are_all_different(tmp_path):
    made = []
    threads = [threading.Thread(target=lambda: made.append(fresh_folder(tmp_path, "run"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(tmp_path.iterdir())
    assert {folder.name for folder in made} == {"run", *(f"run-{n}" for n in range(2, 21))}


def test_fresh_path_passes_over_what_exists(tmp_path):
    for name in ("a.csv", "a-2.csv"):
        (tmp_path / name).touch()
    assert fresh_path(tmp_path / "a.csv") == tmp_path / "a-3.csv"
    assert fresh_path(tmp_path / "b.csv") == tmp_path / "b.csv"


def test_a_held_folder_is_refused_and_its_holder_named(tmp_path, other_process):
    assert is_held(tmp_path / "run")
    with pytest.raises(ValueError, match=f"run is in use by another run, process {other_process.pid}$"), hold(
        tmp_path / "run"
    ):
        pass


def test_a_killed_holder_leaves_the_folder_free(tmp_path, other_process):
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.wait()
    assert not is_held(tmp_path / "run")
    with hold(tmp_path / "run") as folder:
        assert is_held(folder)
    assert not is_held(tmp_path / "run")


STARTER = """
import sys
from hjepa.files import hold
for _ in range(150):
    with hold(sys.argv[1]):
        pass
"""


def test_looking_at_a_lock_never_makes_a_starting_run_fail(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    starting = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path / "run")], stderr=subprocess.PIPE)
    while starting.poll() is None:
        for _ in range(200):
            is_held(tmp_path / "run")
    assert starting.returncode == 0, starting.stderr.read()
    starting.stderr.close()


def test_work_is_done_alone_and_the_others_wait(tmp_path):
    inside, most = [], []

    def work():
        with alone(tmp_path / "data", "download"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    with alone(tmp_path / "absent", "download", make=False):
        assert not (tmp_path / "absent").exists()


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    assert not is_held(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", "1")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_a_reader_never_sees_a_part_of_a_file(tmp_path):
    path, texts = tmp_path / "a.json", ["1" * 200_000, "2" * 200_000]
    write_whole(path, texts[0])
    stop = time.monotonic() + 0.5

    def write():
        while time.monotonic() < stop:
            for text in texts:
                write_whole(path, text)

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while time.monotonic() < stop:
        seen.add(path.read_text())
    thread.join()
    assert seen <= set(texts)


@pytest.mark.parametrize("text", ['{"a": 1', "", "nan nan"])
def test_a_file_cut_short_reads_as_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "absent.json") is None
