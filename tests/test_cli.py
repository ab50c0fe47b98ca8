"""The command line: a mistake is one line and 2, a failure one line and 1, Ctrl-C one line and 130."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import hjepa
import hjepa.evaluate.transfer
import hjepa.train.estimate
from hjepa import cli
from hjepa.cli import main
from hjepa.config import as_dicts, load_config, save_config
from hjepa.data import loading
from hjepa.data.images import load_data
from hjepa.data.moved import MovedPictures
from hjepa.evaluate.results import rows_from_csv
from hjepa.files import hold
from hjepa.hub import load_run
from hjepa.inputs import UserError
from hjepa.pretrained import WEIGHTS, folder_of
from hjepa.train.checkpoint import _digest_of

SMALL = [
    "train.steps=2", "train.batch_size=8", "train.threads=1", "data.limit=32", "model.depth=1",
    "model.embed_dim=32", "model.num_heads=2", "model.predictor.embed_dim=32", "model.predictor.depth=1",
    "model.predictor.num_heads=2", "evaluate.gallery=40", "evaluate.queries=20", "evaluate.sizes=[64]",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "rope"
    words = ["train", "model.rope.use_rope=true", "train.warmup=0", "train.lr=0.02", "--run", str(folder), *SMALL]
    assert main(words) == 0
    return folder


def error_of(words, capsys, code=2):
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("hjepa: error: ")
    return text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "trian is not one of train, evaluate, export, verify, sweep, tour; nearest: train"),
        (["train", "--confg", "x"], "unrecognized arguments: --confg"),
        (["train", "x"], "override 'x' is not of the form key=value"),
        (["train", "--resume"], "--resume needs --run"),
        (["train", "--config", "nope.yaml"], "nope.yaml does not exist"),
        (["train", "--speed", "5"], "--speed 5.0 goes with --dry-run"),
        (["train", "--processes", "4", "--speed", "5"],
         "--processes 4 goes with --dry-run; nearest: torchrun --nproc_per_node 4 -m hjepa train"),
        (["train", "train.stps=3"], "nearest: train.steps"),
        (["train", "data.name=imagefolder", "data.path=nowhere"], "nowhere"),
        (["evaluate"], "the following arguments are required: --run"),
        (["evaluate", "--run", "nowhere"], "nowhere is not a run"),
        (["evaluate", "--run", "x", "--which", "targt"], "targt is not one of target, context; nearest: target"),
        (["export", "nowhere", "out"], "nowhere is not a run"),
        (["export", "nowhere"], "the following arguments are required: OUT"),
        (["sweep", "nope.yaml"], "nope.yaml does not exist"),
        (["sweep"], "the following arguments are required: FILE"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert reason in err and err.startswith("hjepa: error: ") and err.count("\n") == 1 and out == ""


def test_train_takes_overrides_before_and_after_options(run):
    encoder, config = load_run(run)
    assert config.model.rope.use_rope and config.train.steps == 2 and encoder.embed_dim == 32


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.rope.theta=100"], ["model.rope.theta=100.0 changes nothing while model.rope.use_rope is false"]),
        (["model.rope.strategy=ntk"], ["model.rope.strategy=ntk changes nothing while model.rope.use_rope is false"]),
        (["model.rope.strategy=interpolate", "model.use_alibi=true"], []),
        (["model.rope.use_rope=true", "model.rope.theta=100"], []),
        (["views.large=6", "loss.teacher=true"], ["views.large=6 changes nothing while objective is masks",
                                                  "loss.teacher=true changes nothing while objective is masks"]),
        (["objective=views", "views.large=6", "loss.temperature=0.2"], []),
        (["objective=views", "data.color_jitter=0.8"],
         ["data.color_jitter=0.8 changes nothing while objective is views"]),
        (["objective=both", "loss.spread_weight=0.1"],
         ["loss.spread_weight=0.1 changes nothing while loss.view_loss is contrastive"]),
        (["train.muon_lr=0.5"], ["train.muon_lr=0.5 changes nothing while train.optimizer is adamw"]),
        (["model.encoder_type=vit_base_patch16_224", "model.depth=2"],
         ["model.encoder_type=vit_base_patch16_224 is built with model.embed_dim=96, model.num_heads=4 of the config; "
          "null is the type's own"]),
    ],
)  # fmt: skip
def test_train_says_which_overrides_change_nothing(overrides, said, capsys, monkeypatch):
    monkeypatch.setattr(hjepa.train.estimate, "estimate", lambda config: None)
    monkeypatch.setattr(hjepa.train.estimate, "format_estimate", lambda found: "")
    assert main(["train", "--dry-run", *overrides]) == 0
    assert capsys.readouterr().err.splitlines() == [f"hjepa: {line}" for line in said]


def test_train_refuses_a_folder_that_holds_a_run_or_is_in_use(run, tmp_path, capsys):
    assert "already holds a run" in error_of(["train", "--run", run, *SMALL], capsys)
    with hold(tmp_path / "busy"):
        assert "is in use by another run" in error_of(["train", "--run", tmp_path / "busy", *SMALL], capsys)


def test_resume_reads_the_runs_own_config(run, capsys):
    assert main(["train", "--run", str(run), "--resume"]) == 0
    assert "steps                    2" in capsys.readouterr().out
    assert "train.lr" in error_of(["train", "--run", run, "--resume", "train.lr=0.5"], capsys)


def test_a_config_file_that_was_edited_is_not_believed_over_the_checkpoint(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    save_config(load_config(file, ["model.rope.theta=100", "train.steps=3"]), file)
    line = error_of(["train", "--run", tmp_path / "run", "--resume"], capsys)
    assert line.endswith("it was started with model.rope.theta=10000.0, not 100.0")
    for words in (["evaluate", "--run", tmp_path / "run"], ["export", tmp_path / "run", tmp_path / "out"]):
        line = error_of(words, capsys)
        assert "config.yaml has model.rope.theta=100.0, but the run was trained with model.rope.theta=10000.0" in line
    save_config(load_config(run / "config.yaml", ["train.steps=3", "train.lr=0.5"]), file)
    assert "started with train.lr=0.02, not 0.5" in error_of(["train", "--run", tmp_path / "run", "--resume"], capsys)
    save_config(load_config(run / "config.yaml", ["train.steps=3", "data.root=other", "evaluate.sizes=[32]"]), file)
    assert load_run(tmp_path / "run")[1].evaluate.sizes == [32]
    assert main(["train", "--run", str(tmp_path / "run"), "--resume"]) == 0
    assert "follows the schedule of a run of 3 steps" in capsys.readouterr().err


def test_train_without_a_folder_makes_a_fresh_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", *SMALL]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_several_processes_need_a_named_folder(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "name the folder: --run-dir FOLDER" in error_of(["train"], capsys)


def test_evaluate_reads_the_same_weights_under_each_strategy(run, tmp_path, capsys):
    words = ["evaluate", "--run", str(run), "--sizes", "32,48x192", "--strategy", "extrapolate,interpolate"]
    assert main([*words, "--out", str(tmp_path / "e.csv")]) == 0
    rows = rows_from_csv(tmp_path / "e.csv")
    names = ["rope extrapolate", "rope interpolate", "random init", "raw pixels", "colour histogram", "HOG"]
    assert list(dict.fromkeys(row["encoder"] for row in rows)) == names
    assert {row["size"] for row in rows} == {(64, 64), (32, 32), (48, 192)}
    assert "probe" in capsys.readouterr().out
    value = {(r["encoder"], r["size"], r["metric"]): r["value"] for r in rows}
    for size, same in (((64, 64), True), ((48, 192), False)):
        pair = [value[name, size, "cka"] for name in names[:2]], [value[n, size, "effective_rank"] for n in names[:2]]
        assert (pair[0][0] == pair[0][1] and pair[1][0] == pair[1][1]) is same


def test_evaluate_reads_single_patches_too(run, tmp_path):
    assert main(["evaluate", "--run", str(run), "--sizes", "32", "--dense", "--out", str(tmp_path / "e.csv")]) == 0
    dense = {row["encoder"] for row in rows_from_csv(tmp_path / "e.csv") if row["metric"] == "match_1"}
    assert dense == {"rope", "random init", "raw pixels", "chance"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads, from Python 3.12
def test_evaluate_by_loader_processes_writes_the_same_table(run, pictures, tmp_path, capsys, monkeypatch):
    asked, loaded = [], loading.loaded
    monkeypatch.setattr(loading, "loaded", lambda *a, **k: (asked.append(a[2]), loaded(*a, **k))[1])
    words = ["evaluate", "--run", run, "--data", "imagefolder", "--path", pictures, "--sizes", "32", "--dense", "--out"]
    tables = []
    for count, more in enumerate(([], ["--workers", "2"])):
        assert main([str(word) for word in [*words, tmp_path / f"{count}.csv", *more]]) == 0
        tables.append((tmp_path / f"{count}.csv").read_text())
        assert bool(asked) is bool(more)
    assert tables[0] == tables[1]
    published = ["evaluate", "--timm", "test_vit", "--no-pretrained", "--fit-size", "32", *words[3:7], "--out"]
    asked.clear()
    assert main([str(word) for word in [*published, tmp_path / "timm.csv", "--workers", "1"]]) == 0
    assert set(asked) == {1}
    assert "--workers -1 must be 0 or more" in error_of([*words, tmp_path / "0.csv", "--workers", "-1"], capsys)


def test_evaluate_takes_as_many_workers_as_the_run_had(run, tmp_path, monkeypatch):
    mine, seen = copy_of(run, tmp_path / "mine", "train", num_workers=2), []
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda *_, **k: seen.append(k["workers"]) or [])
    for words in ([], ["--workers", "0"]):
        assert main(["evaluate", "--run", str(mine), *words]) == 0
    assert seen == [2, 0]


def test_runs_of_several_patch_sides_are_not_read_patch_by_patch_together(run, tmp_path, capsys, monkeypatch):
    """Refused before anything is read."""
    coarse = tmp_path / "coarse"
    settings = [*SMALL, "train.warmup=0", "model.patch_size=16", "model.level_weights=[1.0]"]
    assert main(["train", "--run", str(coarse), *settings]) == 0
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda *_, **__: 1 / 0)
    line = error_of(["evaluate", "--run", run, "--run", coarse, "--sizes", "64", "--dense"], capsys)
    assert "encoder 'coarse' has patches of 16 px, 'rope' of 8 px" in line


def test_evaluate_takes_encoders_that_come_with_the_package_and_exports(run, tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda e, *_, **k: seen.update(e | k) or [
        {"encoder": "x", "size": (64, 64), "metric": "knn", "value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    ])  # fmt: skip
    monkeypatch.setattr(cli, "_show_rows", lambda rows, _: 0)
    assert main(["evaluate", "--run", "openmoji-rope", "--run", "openmoji-absolute", "--sizes", "192"]) == 0
    assert list(seen)[:3] == ["openmoji-rope", "openmoji-absolute", "random init"]
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    for name in list(seen)[:2]:
        torch.testing.assert_close(seen[name](images), hjepa.load_pretrained(name)(images))
    assert seen["train_size"] == 64 and seen["gallery"] == 2000
    main(["export", str(run), str(tmp_path / "out")])
    assert main(["evaluate", "--run", str(tmp_path / "out")]) == 0
    torch.testing.assert_close(seen["out"](images), hjepa.load_run(run)[0](images))
    line = error_of(["evaluate", "--run", "openmoji-rope", "--which", "context"], capsys)
    assert "openmoji-rope holds the target encoder alone" in line


def test_a_folder_named_like_an_encoder_of_the_package_is_never_skipped(run, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ["data.name=imagefolder", f"data.path={pictures}"]
    copy_of(run, tmp_path / "openmoji-rope")
    main(["export", str(run), "openmoji-absolute"])
    both = "both a folder here and an encoder of the package are called openmoji-rope; say ./openmoji-rope for the fol"
    for words in (["evaluate", "--run", "openmoji-rope"], ["export", "openmoji-rope", "out"],
                  ["train", "--run", "new", "train.init_from=openmoji-rope", *own]):  # fmt: skip
        assert both in error_of(words, capsys)
    for name in ("openmoji-rope", "openmoji-absolute"):
        with pytest.raises(UserError, match=f"say ./{name} for the folder, or rename it for the encoder"):
            hjepa.load_pretrained(name)
    assert main(["export", "./openmoji-rope", "out"]) == 0
    assert folder_of("./openmoji-absolute").resolve() == tmp_path / "openmoji-absolute"
    (tmp_path / "photographs-rope").mkdir()  # neither a run nor an export
    assert folder_of("photographs-rope").parent == WEIGHTS
    monkeypatch.chdir(WEIGHTS)
    assert folder_of("openmoji-rope").resolve() == (WEIGHTS / "openmoji-rope").resolve()


def copy_of(run, folder, section="data", **settings):
    """A run of the same weights whose config has other settings, and which kept nothing of its pictures."""
    shutil.copytree(run, folder)
    config = load_config(run / "config.yaml")
    config[section].update(settings)
    save_config(config, folder / "config.yaml")
    for file in folder.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text()) | {"config": as_dicts(config)}
        state["extra"].pop("pictures", None)
        file.write_text(json.dumps(state | {"self": _digest_of(state)}))
    return folder


def encoders_in(path):
    return list(dict.fromkeys(row["encoder"] for row in rows_from_csv(path)))


def test_evaluate_reads_runs_whose_training_views_alone_differ(run, tmp_path, monkeypatch, capsys):
    one, two = copy_of(run, tmp_path / "1" / "rope"), copy_of(run, tmp_path / "2" / "rope", flip=False)
    out = ["--sizes", "64", "--out", str(tmp_path / "e.csv")]
    assert main(["evaluate", "--run", str(one), "--run", str(two), *out]) == 0
    assert encoders_in(tmp_path / "e.csv")[:2] == ["1/rope", "2/rope"]
    other = copy_of(run, tmp_path / "3" / "rope", limit=16)
    line = error_of(["evaluate", "--run", one, "--run", other, *out], capsys)
    assert "3/rope was trained with other data settings: data.limit=16" in line
    other = copy_of(run, tmp_path / "4" / "rope", classes=["Flags", "Symbols"])
    assert "data.classes=['Flags', 'Symbols']" in error_of(["evaluate", "--run", one, "--run", other, *out], capsys)
    monkeypatch.chdir(one)
    assert main(["evaluate", "--run", ".", *out]) == 0
    assert encoders_in(tmp_path / "e.csv")[0] == "rope"


def test_evaluate_reads_other_pictures_normalised_as_in_training(run, pictures, tmp_path, capsys, monkeypatch):
    seen = []
    home, inner = hjepa.evaluate.transfer, hjepa.evaluate.transfer.resolution_transfer
    monkeypatch.setattr(home, "resolution_transfer", lambda e, *s, **k: seen.extend(s) or inner(e, *s, **k))
    words = ["evaluate", "--run", run, "--sizes", "64", "--out", tmp_path / "e.csv"]
    assert main([*map(str, words), "--data", "imagefolder", "--path", str(pictures)]) == 0
    trained = load_data("openmoji")
    assert {data.name for data in seen} == {"imagefolder"} and len(seen[1]) == 12
    assert all(data.mean == trained.mean and data.std == trained.std for data in seen)
    assert "nearest: stl10" in error_of([*words, "--data", "stl1"], capsys)
    assert "--path is the folder of imagefolder" in error_of([*words, "--path", pictures], capsys)


def test_other_pictures_are_read_whole_and_the_runs_own_as_trained_on(run, pictures, tmp_path, capsys, monkeypatch):
    """data.limit and data.classes are about the pictures trained on: another folder has other classes."""
    moved = shutil.copytree(pictures, tmp_path / "moved")
    for split in ("train", "test"):
        (moved / split / "across").rename(moved / split / "aslant")
    own = {"name": "imagefolder", "path": str(pictures), "limit": 8, "classes": ["down"]}
    mine, seen = copy_of(run, tmp_path / "mine", **own), []
    home, inner = hjepa.evaluate.transfer, hjepa.evaluate.transfer.resolution_transfer
    monkeypatch.setattr(home, "resolution_transfer", lambda e, *s, **k: seen.append(s) or inner(e, *s, **k))
    said = "hjepa: other pictures than those trained on, so all of them, not data.limit=8, data.classes=['down']"
    monkeypatch.chdir(pictures)
    for words, line in (
        ([], ""),
        (["--path", pictures], ""),
        (["--data", "imagefolder", "--path", "."], ""),
        (["--path", moved], said),
        (["--data", "imagefolder", "--path", moved], said),
        (["--data", "openmoji"], said),
    ):
        capsys.readouterr()
        command = ["evaluate", "--run", mine, "--sizes", "64", "--out", tmp_path / "e.csv", *words]
        assert main([str(word) for word in command]) == 0
        said_now = [text for text in capsys.readouterr().err.splitlines() if text.startswith("hjepa:")]
        assert said_now == ([line] if line else [])
        train, test = seen.pop()
        if not line:
            assert train.classes == test.classes == ["down"] and len(train) == 8
        elif train.name == "imagefolder":
            assert train.classes == ["aslant", "down"] and (len(train), len(test)) == (18, 12)
        else:
            assert len(train.classes) > 2 and len(train) > 1000


def test_other_pictures_are_not_moved(run, pictures, tmp_path, capsys, monkeypatch):
    """A canvas of OpenMoji's mean colour around photographs would be nobody's wish."""
    mine, seen = copy_of(run, tmp_path / "mine", limit=None, moved=True), []
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda _, *splits, **__: seen.append(splits))
    for words, moved in (([], True), (["--data", "imagefolder", "--path", str(pictures)], False)):
        capsys.readouterr()
        assert main(["evaluate", "--run", str(mine), "--sizes", "64", *words]) == 0
        said = "hjepa: other pictures than those trained on, so as they are, data.moved=true was dropped"
        assert (said in capsys.readouterr().err) is not moved
        assert {isinstance(data.pictures, MovedPictures) for data in seen.pop()} == {moved}


def test_moved_pictures_are_read_in_as_many_fixed_places_as_asked(run, tmp_path, capsys):
    """All of them, and baselines too, on the same ones; each picture counts once."""
    mine, out = copy_of(run, tmp_path / "mine", moved=True), tmp_path / "e.csv"
    words = ["evaluate", "--run", mine, "--sizes", "64", "--out", out]
    assert main([str(word) for word in [*words, "--placements", 2, "--dense"]]) == 0
    rows = rows_from_csv(out)
    assert {(row["n"], row["placements"]) for row in rows if row["metric"] in ("knn", "probe", "cka")} == {(20, 2)}
    assert {"mine", "random init", "raw pixels", "HOG"} < {row["encoder"] for row in rows}
    assert {row["placements"] for row in rows if row["metric"] == "match_0"} == {2}
    save_config(load_config(mine / "config.yaml", ["evaluate.placements=2"]), mine / "config.yaml")
    words += ["--run", copy_of(run, tmp_path / "other", moved=True)]
    assert "evaluate.placements=1, " in error_of(words, capsys)
    assert "--placements=0 must be between 1 and 1000" in error_of([*words, "--placements", 0], capsys)


def test_moved_pictures_are_read_as_they_are_if_asked(run, pictures, tmp_path, monkeypatch, capsys):
    mine, seen = copy_of(run, tmp_path / "mine", moved=True), []
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda _, *splits, **__: seen.append(splits))
    words = ["evaluate", "--run", str(mine), "--sizes", "64"]
    assert main([*words, "--unmoved"]) == main(words) == 0
    assert [{isinstance(data.pictures, MovedPictures) for data in splits} for splits in seen] == [{False}, {True}]
    assert "--placements=2: pictures have one place each unless data.moved=true" in error_of(
        [*words, "--unmoved", "--placements", "2"], capsys
    )


def test_placements_of_pictures_that_are_not_moved_are_refused(run, pictures, tmp_path, capsys):
    once = "--placements=3: pictures have one place each unless data.moved=true; nearest: --placements=1"
    words = ["evaluate", "--run", run, "--sizes", "64", "--placements", "3"]
    assert once in error_of(words, capsys)
    mine = copy_of(run, tmp_path / "mine", limit=None, moved=True)
    words[2] = mine
    assert once in error_of([*words, "--data", "imagefolder", "--path", pictures], capsys)
    assert "--placements goes with --run, not with --timm" in error_of(
        ["evaluate", "--timm", "vit_tiny_patch16_224", "--placements", "3"], capsys
    )
    save_config(load_config(mine / "config.yaml", ["evaluate.placements=2"]), mine / "config.yaml")
    words = ["evaluate", "--run", mine, "--sizes", "64", "--out", tmp_path / "e.csv", "--data", "imagefolder"]
    assert main([str(word) for word in [*words, "--path", pictures]]) == 0  # a wish about the run's own pictures
    assert not any("placements" in row for row in rows_from_csv(tmp_path / "e.csv"))


def test_large_sizes_are_read_from_files_that_have_them(run, tmp_path, monkeypatch):
    """Imagenette comes in files of 160 and 320 px: a run trained at 64 px needs the larger ones above 160 px."""
    for side in (160, 320):
        for part, place in ((part, place) for part in ("train", "val") for place in ("n01440764", "n02102040")):
            folder = tmp_path / f"imagenette2-{side}" / part / place
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (side, side), (60 * index, 0, 0)).save(folder / f"{index}.JPEG")
    monkeypatch.setattr("hjepa.data.sources.IMAGENETTE_COUNTS", {"train": 8, "test": 8})
    mine, seen = copy_of(run, tmp_path / "mine", name="imagenette", root=str(tmp_path)), []
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda _, *splits, **__: seen.append(splits))
    for sizes, folder in (("160", "imagenette2-160"), ("32,96x192", "imagenette2-320"), ("320", "imagenette2-320")):
        assert main(["evaluate", "--run", str(mine), "--sizes", sizes]) == 0
        published = ["--timm", "vit_tiny_patch16_224", "--no-pretrained", "--fit-size", "32", "--data", "imagenette"]
        assert main(["evaluate", *published, "--root", str(tmp_path), "--sizes", sizes]) == 0
        assert [data.pictures.folder.name for splits in seen for data in splits] == [folder] * 4
        seen.clear()


def test_a_folder_that_changed_since_training_is_said_at_evaluation(run, pictures, tmp_path, capsys, monkeypatch):
    folder, mine = shutil.copytree(pictures / "train", tmp_path / "pictures"), tmp_path / "mine"
    words = ["train", "--run", mine, *SMALL, "data.name=imagefolder", f"data.path={folder}", "data.limit=null"]
    assert main([str(word) for word in words]) == 0
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda *_, **__: [])
    moved = shutil.copytree(folder, tmp_path / "moved")
    for count in range(20, 24):
        shutil.copy(folder / "down/0.png", folder / f"down/{count}.png")
    said = "hjepa: the training pictures found now (16) are not those that mine was trained on (14): test pictures may"
    for words, expected in (([], [f"{said} be among them"]), (["--path", moved], []), (["--data", "openmoji"], [])):
        capsys.readouterr()
        assert main([str(word) for word in ["evaluate", "--run", mine, "--sizes", "64", *words]]) == 0
        assert capsys.readouterr().err.splitlines() == expected
    shutil.rmtree(folder)
    moved.rename(folder)
    assert main(["evaluate", "--run", str(mine), "--sizes", "64"]) == 0 and capsys.readouterr().err == ""


def test_picture_files_left_out_are_said_after_training_and_evaluation(pictures, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    words = [*SMALL, "data.name=imagefolder", f"data.path={folder}", "data.limit=null", "data.on_corrupt=skip"]
    assert main(["train", "--run", str(tmp_path / "whole"), *words]) == 0
    assert "left out" not in capsys.readouterr().err
    for file in ("train/across/3.png", "train/across/4.png", "test/down/5.png"):
        (folder / file).write_bytes(b"no picture")
    assert main(["train", "--run", str(tmp_path / "run"), *words]) == 0
    said = "2 image files cannot be read and were left out, train/across/3.png first"
    assert [line for line in capsys.readouterr().err.splitlines() if "left out" in line] == [said]
    monkeypatch.setattr(hjepa.evaluate.transfer, "resolution_transfer", lambda *_, **__: [])
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--sizes", "64"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"hjepa: {said}"], "one of them is for testing, one was validation"


def test_pictures_of_one_class_train_and_are_read_without_labels(tmp_path, pictures, capsys):
    flat, run = tmp_path / "flat", tmp_path / "run"
    flat.mkdir()
    for index, file in enumerate(sorted(pictures.rglob("*.png"))):
        shutil.copy(file, flat / f"{index}.png")
    words = ["train", "--run", run, *SMALL, "data.name=imagefolder", f"data.path={flat}", "data.limit=null"]
    assert main([str(word) for word in words]) == 0
    assert main(["evaluate", "--run", str(run), "--sizes", "64,32", "--out", str(tmp_path / "e.csv")]) == 0
    metrics = {row["metric"] for row in rows_from_csv(tmp_path / "e.csv")}
    assert metrics == {"retrieval", "cka", "effective_rank", "feature_std"}


def test_evaluate_never_overwrites_its_table(run, capsys):
    for _ in range(2):
        assert main(["evaluate", "--run", str(run), "--sizes", "64"]) == 0
    assert {p.name for p in run.glob("*.csv")} == {"log.csv", "evaluation.csv", "evaluation-2.csv"}


def test_evaluate_that_was_stopped_goes_on_with_the_sizes_that_are_left(run, tmp_path, monkeypatch):
    words = ["evaluate", "--run", str(run), "--sizes", "32,48", "--out"]
    assert main([*words, str(tmp_path / "whole.csv")]) == 0
    home, read, seen = hjepa.evaluate.transfer, hjepa.evaluate.transfer._encode_all, []
    monkeypatch.setattr(home, "_encode_all", lambda *a, size, **k: seen.append(size) or read(*a, size=size, **k))
    real = home.linear_cka

    def stop(*features):
        if (48, 48) in seen:
            raise KeyboardInterrupt
        return real(*features)

    with monkeypatch.context() as during:
        during.setattr(home, "linear_cka", stop)
        assert main([*words, str(tmp_path / "e.csv")]) == 130
    assert {p.name for p in tmp_path.iterdir()} == {"whole.csv", ".e.csv.part"}
    seen.clear()
    assert main([*words, str(tmp_path / "e.csv")]) == 0
    assert list(dict.fromkeys(seen)) == [(64, 64), (48, 48)], "where readers are fitted, and what was left"
    assert (tmp_path / "e.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"whole.csv", "e.csv"}


def test_a_run_named_like_a_baseline_is_refused(run, tmp_path, capsys):
    """Its rows would be those of the baseline."""
    for name in ("HOG", "raw pixels", "colour histogram", "random init"):
        line = error_of(["evaluate", "--run", copy_of(run, tmp_path / name), "--sizes", "64"], capsys)
        assert f"--run {name}: a baseline in the table has that name; rename the folder" in line
    words = ["evaluate", "--run", copy_of(run, tmp_path / "chance"), "--sizes", "64", "--out", tmp_path / "e.csv"]
    assert "--run chance: a baseline" in error_of([*words, "--dense"], capsys)
    assert main([str(word) for word in words]) == 0
    assert encoders_in(tmp_path / "e.csv") == ["chance", "random init", "raw pixels", "colour histogram", "HOG"]


def test_a_run_named_like_the_reading_of_another_is_refused(run, tmp_path, capsys):
    """One of the two would be missing from the table, and nobody told."""
    plain = tmp_path / "a interpolate"
    assert main(["train", "--run", str(plain), "train.warmup=0", *SMALL]) == 0
    for runs in ((copy_of(run, tmp_path / "a"), plain), (plain, tmp_path / "a")):
        words = ["evaluate", *(word for folder in runs for word in ("--run", folder)), "--sizes", "64"]
        line = error_of([*words, "--strategy", "interpolate"], capsys)
        assert f"--run {runs[1].name}: another run is read as 'a interpolate' too; rename the folder" in line


def test_runs_that_would_be_read_with_settings_of_the_first_are_refused(run, tmp_path, capsys):
    words = ["evaluate", "--run", run, "--out", tmp_path / "e.csv"]
    for key, value, first in (("knn_k", 3, 20), ("gallery", 30, 40), ("pool", "pyramid", "mean"), ("few", 9, None)):
        other = copy_of(run, tmp_path / key, section="evaluate", **{key: value})
        line = error_of([*words, "--run", other, "--sizes", "64"], capsys)
        what = f"evaluate.{key}={value}, {run} with {first}; read them one by one"
        assert f"--run {key} was trained with other evaluate settings: {what}" in line
    words += ["--run", copy_of(run, tmp_path / "other", section="evaluate", sizes=[32])]
    assert f"evaluate.sizes=[32], {run} with [64]; give --sizes" in error_of(words, capsys)
    assert main([str(word) for word in [*words, "--sizes", "64"]]) == 0


def test_a_table_cannot_be_a_folder(run, tmp_path, capsys):
    line = error_of(["evaluate", "--run", run, "--sizes", "64", "--out", tmp_path], capsys)
    assert f"--out {tmp_path} is a folder; nearest: {tmp_path / 'evaluation.csv'}" in line
    assert list(tmp_path.iterdir()) == []


def test_evaluate_says_what_is_wrong(run, capsys):
    assert "nearest: 32" in error_of(["evaluate", "--run", run, "--sizes", "33"], capsys)
    assert "'a' is not understood" in error_of(["evaluate", "--run", run, "--sizes", "32,a"], capsys)
    assert "nearest: interpolate" in error_of(["evaluate", "--run", run, "--strategy", "interpolat"], capsys)
    assert "same name" in error_of(["evaluate", "--run", run, "--run", run], capsys)
    assert "nearest: openmoji-rope" in error_of(["evaluate", "--run", "openmoji-rop"], capsys)
    assert "device 'cpuu' is not here" in error_of(["evaluate", "--run", run, "--device", "cpuu"], capsys)


def test_evaluate_names_the_run_that_does_not_take_a_strategy(run, tmp_path, capsys):
    words = ["train", "--run", tmp_path / "alibi", "model.use_alibi=true", "train.warmup=0", *SMALL]
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    error = error_of(["evaluate", "--run", run, "--run", tmp_path / "alibi", "--strategy", "interpolate,ntk"], capsys)
    assert "--strategy ntk: alibi takes extrapolate, interpolate; nearest:" in error


def test_export_writes_timm_weights(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert {"model.safetensors", "config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_an_export_does_not_go_into_a_run_and_does_not_hide_it(run, tmp_path, capsys):
    mine = copy_of(run, tmp_path / "mine")
    files = sorted(mine.rglob("*"))
    line = error_of(["export", run, mine], capsys)
    assert f"{mine} is a run; an export has a folder of its own; nearest: {mine / 'export'}" in line
    assert sorted(mine.rglob("*")) == files
    assert main(["export", str(run), str(mine / "export")]) == 0
    for file in (mine / "export").iterdir():  # as an export into a run once left them
        shutil.copy(file, mine)
    shutil.rmtree(next((mine / "checkpoints").iterdir()))
    assert "has no checkpoint" in error_of(["evaluate", "--run", mine], capsys), "the run is read, not the export"


def test_a_failed_training_is_one_line_and_exit_1(run, tmp_path, capsys):
    words = ["train", "--run", tmp_path / "nan", *SMALL, "train.steps=9", "train.lr=1e17", "train.clip_grad=1e17",
             "train.warmup=0"]  # fmt: skip
    assert "the loss is" in error_of(words, capsys, code=1)


@pytest.mark.parametrize("bug", [ValueError, TypeError, KeyError, ImportError])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch, bug):
    monkeypatch.setattr(cli, "_run", lambda _: (_ for _ in ()).throw(bug("a bug")))
    with pytest.raises(bug, match="a bug"):
        cli.main([])


def test_what_layers_refuse_of_a_config_is_the_users_mistake(tmp_path, capsys):
    line = error_of(["train", "--run", tmp_path / "r", *SMALL, "model.encoder_type=vit_tiny_patch17"], capsys)
    assert "vit_tiny_patch17" in line
    assert "levels" in error_of(["train", "--run", tmp_path / "r", *SMALL, "model.level_weights=[1,1,1,1]"], capsys)


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda _: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


def test_traceback_option_shows_where_a_mistake_was_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["train", "--traceback", "--config", str(tmp_path / "nope.yaml")])


def _hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs of a shell in the background start deaf to it


def test_ctrl_c_is_one_line_and_130(tmp_path):
    words = [sys.executable, "-m", "hjepa", "train", "--run", str(tmp_path / "r"), *SMALL, "train.steps=100000"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c)
    until = time.time() + 120
    while not (tmp_path / "r" / "log.csv").exists() and time.time() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[-1] == "hjepa: stopped" and "Traceback" not in err


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'timm', 'papermill', 'matplotlib', 'numpy'}"
    code = (
        "import sys; from hjepa.cli import main\n"
        "try: main(['train', '--help'])\n"
        f"except SystemExit: print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stderr.strip() == "[]" and "--resume" in done.stdout
