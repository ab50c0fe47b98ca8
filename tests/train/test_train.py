"""Claims of hjepa.train, hjepa.build and hjepa.train.log."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from hjepa.build import build_encoders, build_model, draw_masks, load_split
from hjepa.config import save_config
from hjepa.data import sources
from hjepa.data.images import TrainView
from hjepa.evaluate.transfer import effective_rank, encode, knn_accuracy
from hjepa.files import hold, is_held
from hjepa.hub import CheckpointError, export_encoder, latest_checkpoint, load_run, read_state
from hjepa.inputs import UserError
from hjepa.nn.encoders import TargetEncoder
from hjepa.nn.hjepa import HJEPA
from hjepa.pretrained import WEIGHTS, load_pretrained
from hjepa.train import checkpoint as storage
from hjepa.train import log as log_module
from hjepa.train import loop as train_module
from hjepa.train.log import read_log
from hjepa.train.loop import TrainingDiverged, train
from hjepa.train.optimizer import parameter_groups
from hjepa.train.schedule import lr_at, size_at

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(train_module.__file__).parents[2])}
ROPE = ("model.rope.use_rope=true", "model.rope.theta=100", "model.rope.jitter=1.5", "model.rope.rescale=2.0")


def weights(run: Path) -> bytes:
    return (latest_checkpoint(run) / "model.safetensors").read_bytes()


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_log(run) if "loss" in row])


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in read_log(run)]


def frozen_batch(config):
    """Model, images and masks of step 0."""
    data = load_split(config, "train")
    view = TrainView(data, config.data.image_size, flip=False)
    images = torch.stack([view[index, index] for index in range(config.train.batch_size)])
    model = build_model(config)
    return model, images, draw_masks(config, model.context_encoder.grid_size, 0)


# ---- what made a run


def test_a_run_records_what_made_it_and_resuming_under_other_versions_warns(tiny, tmp_path):
    run = tmp_path / "run"
    metrics = train(tiny("train.steps=6"), run, progress=False)
    record = json.loads((run / "versions.json").read_text())
    assert [entry["step"] for entry in record] == [0] and torch.__version__.startswith(record[0]["torch"])
    assert metrics["versions"] == {k: v for k, v in record[0].items() if k != "step"}
    assert {"hjepa", "commit", "timm", "processor", "precision"} <= set(metrics["versions"])
    record[0]["timm"] = "1.0.1"
    (run / "versions.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"goes on with other versions.*timm 1\.0\.1, now"):
        train(tiny("train.steps=8"), run, resume=True, progress=False)
    assert len(json.loads((run / "versions.json").read_text())) == 2


def test_training_leaves_the_callers_threads_and_random_state_and_holds_the_folder(tiny, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(5)
    before, held = torch.get_rng_state(), []
    monkeypatch.setattr(train_module, "save_config", lambda config, path: held.append(is_held(path.parent)))
    train(tiny("train.steps=2"), tmp_path / "run", progress=False)
    assert torch.get_num_threads() == 3 and torch.equal(torch.get_rng_state(), before)
    assert held == [True] and not is_held(tmp_path / "run")
    torch.set_num_threads(threads)
    with hold(tmp_path / "run"), pytest.raises(ValueError, match="in use by another run"):
        train(tiny("train.steps=2"), tmp_path / "run", resume=True, progress=False)


# ---- going on


def test_a_run_goes_on_for_more_steps_and_says_on_which_schedule(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    train(tiny("train.steps=4"), run, progress=False)
    train(tiny("train.steps=8"), run, resume=True)
    assert "from here on it follows the schedule of a run of 8 steps" in capsys.readouterr().err
    rows = {row["step"]: row for row in read_log(run) if "loss" in row}
    assert list(rows) == list(range(1, 9))
    assert rows[6]["lr"] == lr_at(5, steps=8, lr=1e-3, min_lr=1e-5, warmup=4)
    with pytest.raises(ValueError, match=r"started with train\.steps=8, not 4"):
        train(tiny("train.steps=4"), run, resume=True, progress=False)


def test_a_run_starts_from_the_weights_of_another_with_a_schedule_of_its_own(tiny, tmp_path):
    train(tiny("train.steps=3"), tmp_path / "first", progress=False)
    start = latest_checkpoint(tmp_path / "first")
    given = load_file(start / "model.safetensors")
    for index, where in enumerate((tmp_path / "first", start)):
        run = tmp_path / f"second{index}"
        train(tiny("train.steps=1", "train.lr=1e-12", "train.min_lr=0", "train.ema_start=1.0", "train.weight_decay=0",
                   f"train.init_from={where}"), run, progress=False)  # fmt: skip
        found = load_file(latest_checkpoint(run) / "model.safetensors")
        assert latest_checkpoint(run).name == "step_00000001"
        assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given)
    with pytest.raises(FileNotFoundError, match=r"train\.init_from=.*nowhere: neither a run.*openmoji-rope"):
        train(tiny(f"train.init_from={tmp_path / 'nowhere'}"), tmp_path / "third", progress=False)
    with pytest.raises(ValueError, match="of another architecture"):
        train(tiny("model.depth=1", f"train.init_from={start}"), tmp_path / "fourth", progress=False)
    for wrong, reason in (([*ROPE, "model.use_absolute=false"], "use_rope=False"),
                          (["model.position_embedding=sincos"], "position_embedding='learned'"),
                          (["model.num_heads=4"], "num_heads=2"), (["model.act_layer=relu"], "act_layer='GELU'"),
                          (["model.predictor.num_heads=4"], "its predictor has num_heads=2")):  # fmt: skip
        with pytest.raises(UserError, match=f"train.init_from=.*{reason} and this"):
            train(tiny(*wrong, f"train.init_from={start}"), tmp_path / "fifth", progress=False)


def test_a_run_that_holds_an_export_starts_others_from_its_checkpoint(tiny, tmp_path):
    train(tiny("train.steps=2"), tmp_path / "run", progress=False)
    shutil.copytree(export_encoder(tmp_path / "run", tmp_path / "export"), tmp_path / "run", dirs_exist_ok=True)
    quiet = ("train.steps=1", "train.lr=1e-12", "train.min_lr=0", "train.ema_start=1.0", "train.weight_decay=0")
    train(tiny(*quiet, f"train.init_from={tmp_path / 'run'}"), tmp_path / "next", progress=False)
    given, found = (load_file(latest_checkpoint(tmp_path / n) / "model.safetensors") for n in ("run", "next"))
    assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given)  # the predictor's too


def test_a_run_starts_from_an_encoder_that_comes_with_the_package(tiny, tmp_path):
    like = ["model.embed_dim=128", "model.depth=4", "model.num_heads=4", "model.act_layer=relu", "data.image_size=64",
            "model.patch_size=8", "model.use_absolute=false", "model.rope.use_rope=true", "model.rope.theta=10",
            "model.rope.strategy=interpolate", "train.steps=1", "train.lr=1e-12", "train.min_lr=0",
            "train.ema_start=1.0", "train.weight_decay=0"]  # fmt: skip
    given = load_pretrained("openmoji-rope").state_dict()
    for index, where in enumerate(("openmoji-rope", WEIGHTS / "openmoji-rope")):
        train(tiny(*like, f"train.init_from={where}"), tmp_path / f"run{index}", progress=False)
        for which in ("context", "target"):
            found = load_run(tmp_path / f"run{index}", which)[0].state_dict()
            assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given)
    for wrong, reason in (("model.depth=3", "Unexpected key"), ("model.rope.theta=100", "thetas="),
                          ("model.num_heads=8", "num_heads=4"), ("model.act_layer=null", "act_layer=")):  # fmt: skip
        with pytest.raises(ValueError, match=f"openmoji-rope is of another architecture.*{reason}"):
            train(tiny(*like, wrong, "train.init_from=openmoji-rope"), tmp_path / "wrong", progress=False)


def test_a_run_goes_on_with_pictures_that_were_moved(tiny, tmp_path, pictures):
    train(tiny("train.steps=6", "train.checkpoint_every=3"), tmp_path / "run", progress=False)
    shutil.copytree(pictures, tmp_path / "moved")
    train(tiny("train.steps=8", f"data.path={tmp_path / 'moved'}"), tmp_path / "run", resume=True, progress=False)
    assert read_log(tmp_path / "run")[-1]["step"] == 8 and latest_checkpoint(tmp_path / "run").name == "step_00000008"


def own_pictures(pictures, folder):
    """A copy of the pictures without folders of splits."""
    return shutil.copytree(pictures / "train", folder)


@pytest.mark.parametrize("change", ["a class renamed", "a picture more", "a picture renamed"])
def test_a_run_does_not_go_on_with_other_pictures(tiny, tmp_path, pictures, change):
    mine = own_pictures(pictures, tmp_path / "mine")
    config = tiny("train.steps=6", "train.checkpoint_every=3", f"data.path={mine}")
    train(config, tmp_path / "run", progress=False)
    number = len(load_split(config, "train"))
    if change == "a class renamed":
        (mine / "down").rename(mine / "up")
        found = r"not the \d+ of 2 classes found now, with class up in place of down"
    elif change == "a picture more":
        for index in range(20, 24):
            shutil.copy(mine / "down/0.png", mine / f"down/{index}.png")
        found = rf"not the {number + 2} of 2 classes found now, other files"
    else:
        for file in list((mine / "down").iterdir()):
            file.rename(file.with_name(f"other{file.name}"))
        found = rf"not the {number} of 2 classes found now, other files"
    with pytest.raises(ValueError, match=rf"cannot resume .*trained on {number} pictures of 2 classes, {found}; give"):
        train(tiny("train.steps=8", f"data.path={mine}"), tmp_path / "run", resume=True, progress=False)


def test_a_run_of_an_older_version_that_kept_nothing_of_its_pictures_goes_on(tiny, tmp_path, pictures):
    mine = own_pictures(pictures, tmp_path / "mine")
    train(tiny("train.steps=2", f"data.path={mine}"), tmp_path / "run", progress=False)
    file = latest_checkpoint(tmp_path / "run") / "state.json"
    state = json.loads(file.read_text())
    del state["extra"]["pictures"]
    file.write_text(json.dumps(state | {"self": storage._digest_of(state)}))
    (mine / "down").rename(mine / "up")
    train(tiny("train.steps=3", f"data.path={mine}"), tmp_path / "run", resume=True, progress=False)
    newest = latest_checkpoint(tmp_path / "run")
    assert newest.name == "step_00000003"
    assert read_state(newest)["extra"]["pictures"]["classes"][-1] == "up"  # from here on they are kept


# ---- late stops


def test_a_batch_of_one_picture_trains_and_logs_no_nan(tiny, tmp_path):
    train(tiny("train.batch_size=1", "train.steps=2", "train.eval_every=2"), tmp_path / "run", progress=False)
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text and "nan" not in (tmp_path / "run" / "log.csv").read_text()
    assert read_log(tmp_path / "run")[-1]["feature_std"] is None


def test_training_sizes_that_the_encoders_own_patch_does_not_divide_stop_at_the_start(tiny, tmp_path):
    config = tiny("model.encoder_type=flexivit_small", "model.patch_size=null", "data.image_size=64",
                  "data.train_scales=[1.0,1.3]", "model.level_weights=[1.0]")  # fmt: skip
    with pytest.raises(ValueError, match="image size 83x83 is not a multiple of the patch 16"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.yaml").exists()


# ---- one step


def test_overfits_one_batch(tiny):
    model, images, masks = frozen_batch(tiny("train.batch_size=4", "model.level_weights=[1.0]", *ROPE[:2]))
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), 0.0), lr=1e-2)
    first = model(images, masks).loss.item()
    for _ in range(120):
        loss = model(images, masks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 10


def test_target_gets_no_gradient_and_everything_else_does(tiny):
    model, images, masks = frozen_batch(tiny("model.class_token=true", *ROPE[:2], "model.rope.learnable=true"))
    model.train()(images, masks).loss.backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    trained = [*model.context_encoder.named_parameters(), *model.predictor.named_parameters()]
    assert [name for name, p in trained if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_ema_runs_once_per_optimiser_step_and_after_it(tiny, tmp_path, monkeypatch):
    """The final target is the closed form over the context weights as each optimiser step left them."""
    config = tiny("train.steps=4", "train.accumulate=2", "train.ema_start=0.5", "train.ema_end=0.9")
    name, after_step, calls = "vit.blocks.0.mlp.fc1.weight", [], []
    built = {}

    def remember(*arguments):
        built["model"] = build_model(*arguments)
        return built["model"]

    def update(self, context_encoder, current_step):
        calls.append(current_step)
        return original(self, context_encoder, current_step)

    original = TargetEncoder.update_from_context_encoder
    monkeypatch.setattr(train_module, "build_model", remember)
    monkeypatch.setattr(TargetEncoder, "update_from_context_encoder", update)
    hook = register_optimizer_step_post_hook(
        lambda *_: after_step.append(built["model"].context_encoder.get_parameter(name).detach().clone())
    )
    train(config, tmp_path / "run", progress=False)
    hook.remove()
    expected = build_model(config).target_encoder.get_parameter(name).double()
    for step, context in enumerate(after_step):
        momentum = 0.5 + 0.4 * step / 4
        expected = momentum * expected + (1 - momentum) * context.double()
    assert calls == [0, 1, 2, 3]
    torch.testing.assert_close(built["model"].target_encoder.get_parameter(name).double(), expected, atol=1e-7, rtol=0)


def test_only_matrices_decay(tiny):
    """With no gradient, AdamW multiplies what decays by 1 - lr * weight_decay and leaves the rest as it is."""
    model = build_model(tiny("model.class_token=true", *ROPE[:2], "model.rope.learnable=true"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    decayed = set()
    for name, p in model.named_parameters():
        if torch.equal(p, before[name]):
            continue
        torch.testing.assert_close(p, before[name] * 0.95)
        decayed.add(name)
    ends = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "embed.weight", "head.weight")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert decayed == {name for name in trained if name.endswith(ends)}
    tables = ("cls_token", "pos_embed", "level_token", "log_theta")
    assert all(any(name.endswith(table) for name in trained) for table in tables)


# ---- the loop


def test_step_zero_of_the_log_is_the_untrained_target(tiny, tmp_path):
    config = tiny("train.steps=2")
    metrics = train(config, tmp_path / "run", progress=False)
    target, known, asked = build_encoders(config)[1], load_split(config, "train"), load_split(config, "validation")
    x, y = encode(target, known.at_size(32)), encode(target, asked.at_size(32))
    row = read_log(tmp_path / "run")[0]
    hits = knn_accuracy(x, known.labels, y, asked.labels, 3)
    assert row == {"step": 0, "effective_rank": pytest.approx(effective_rank(y)), "knn": hits.float().mean().item()}
    assert metrics["knn_random"] == row["knn"] and metrics == json.loads((tmp_path / "run/metrics.json").read_text())


def test_log_and_csv_hold_the_same_numbers(tiny, tmp_path):
    train(tiny("train.log_every=4"), tmp_path / "run", progress=False)
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 4, 6, 8, 12]
    assert [row["step"] for row in rows if "knn" in row] == [0, 6, 12]
    header, *lines = (tmp_path / "run/log.csv").read_text().splitlines()
    for row, line in zip(rows, lines, strict=True):
        values = dict(zip(header.split(","), line.split(","), strict=True))
        assert {name: float(text) for name, text in values.items() if text} == row


def test_the_logged_loss_is_the_weighted_sum_of_its_levels(tiny, tmp_path):
    train(tiny("loss.regularizer=variance", "loss.regularizer_weight=0.3"), tmp_path / "run", progress=False)
    for row in read_log(tmp_path / "run")[1:]:
        assert row["regularizer"] > 0
        total = row["loss_level_0"] + 0.5 * row["loss_level_1"] + 0.3 * row["regularizer"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_accumulating_two_halves_equals_one_batch(tiny, tmp_path):
    for parts in (1, 2):
        train(tiny(f"train.accumulate={parts}", *ROPE), tmp_path / str(parts), progress=False)
    torch.testing.assert_close(losses(tmp_path / "1"), losses(tmp_path / "2"), atol=1e-5, rtol=0)
    one, two = (load_run(tmp_path / part)[0].state_dict() for part in ("1", "2"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)


def test_loader_processes_change_nothing_and_decode_what_is_measured(tiny, tmp_path, monkeypatch):
    read, here = sources.read_image, []
    monkeypatch.setattr(sources, "MEMORY", 0)  # nothing is kept
    monkeypatch.setattr(sources, "read_image", lambda path: (here.append(path), read(path))[1])
    for workers in (0, 2):
        here.clear()
        train(tiny(f"train.num_workers={workers}", "train.steps=6"), tmp_path / str(workers), progress=False)
        assert bool(here) is (workers == 0)
    assert weights(tmp_path / "0") == weights(tmp_path / "2")
    one, other = ([(row.get("knn"), row.get("effective_rank")) for row in read_log(tmp_path / run)] for run in "02")
    assert one == other and None not in one[0]


def test_every_step_trains_at_the_side_drawn_for_it(tiny, tmp_path, monkeypatch):
    seen, forward = [], HJEPA.forward
    monkeypatch.setattr(HJEPA, "forward", lambda self, images, masks: (
        seen.append(images.shape[-1]), forward(self, images, masks))[1])  # fmt: skip
    train(tiny("data.train_scales=[1.0, 1.45, 2.0]", *ROPE), tmp_path, progress=False)
    assert seen == [size_at(step, sizes=[32, 48, 64], seed=0) for step in range(12)]
    assert len(set(seen)) == 3


def test_a_training_side_too_small_for_the_masks_is_an_error_before_the_first_step(tiny, tmp_path):
    with pytest.raises(ValueError, match="1x1"):
        train(tiny("data.train_scales=[1.0, 0.1]"), tmp_path, progress=False)
    assert not (tmp_path / "log.csv").exists()


def test_another_seed_is_another_run(tiny, tmp_path):
    for seed in (0, 1):
        train(tiny(f"train.seed={seed}", "train.steps=2"), tmp_path / str(seed), progress=False)
    assert not torch.equal(losses(tmp_path / "0"), losses(tmp_path / "1"))


# ---- stopping and going on

CHILD = """
import sys, time
from hjepa.config import load_config
from hjepa.train.log import RunLog
from hjepa.train.loop import train
write = RunLog.write
def slow(self, row):
    write(self, row)
    time.sleep(600 if row["step"] == 8 else 0)
RunLog.write = slow
train(load_config(sys.argv[1]), sys.argv[2], progress=False)
"""


def test_resume_after_sigkill_is_bitwise_equal(tiny, tmp_path):
    """Killed at step 8 of 12, in the middle of an epoch and after the checkpoint of step 5."""
    config = tiny(
        *ROPE, "loss.regularizer=sketched_gaussian", "loss.regularizer_weight=0.1", "data.train_scales=[1.0, 1.5]"
    )
    save_config(config, tmp_path / "config.yaml")
    train(config, tmp_path / "whole", progress=False)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "config.yaml"), str(tmp_path / "killed")]
    child = subprocess.Popen(command, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (rows := read_log(tmp_path / "killed")) or rows[-1]["step"] < 8:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert latest_checkpoint(tmp_path / "killed").name == "step_00000005"
    train(config, tmp_path / "killed", resume=True, progress=False)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    config = tiny("train.steps=5")
    first = train(config, tmp_path, progress=False)
    before = weights(tmp_path), untimed(tmp_path)
    again = train(config, tmp_path, resume=True, progress=False)
    assert (weights(tmp_path), untimed(tmp_path)) == before
    assert first == again


def test_the_record_of_a_finished_run_stays_as_it_is_when_the_run_is_called_again(tiny, tmp_path, monkeypatch):
    files = tmp_path / "metrics.json", tmp_path / "versions.json"
    train(tiny("train.steps=4"), tmp_path, progress=False)
    before = [file.read_bytes() for file in files]
    other = log_module.versions
    monkeypatch.setattr(log_module, "versions", lambda **more: other(**more) | {"torch": "9.9"})
    again = train(tiny("train.steps=4"), tmp_path, resume=True, progress=False)
    assert [file.read_bytes() for file in files] == before and again == json.loads(before[0])
    monkeypatch.undo()
    files[0].write_text(json.dumps(again | {"steps": 2}))  # of a shorter run, from before it went on
    assert train(tiny("train.steps=4"), tmp_path, resume=True, progress=False)["steps"] == 4
    assert json.loads(files[0].read_text())["steps"] == 4


def test_a_run_is_not_overwritten_and_not_continued_with_other_settings(tiny, tmp_path):
    train(tiny("train.steps=5"), tmp_path, progress=False)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny("train.steps=5"), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"started with train.lr=0.001, not 0.5"):
        train(tiny("train.steps=5", "train.lr=0.5"), tmp_path, resume=True, progress=False)
    train(tiny("train.steps=5", "train.num_workers=1", "train.accumulate=2"), tmp_path, resume=True, progress=False)
    assert weights(tmp_path) == before


@pytest.mark.parametrize(
    "options", [("loss.regularizer=variance", "loss.regularizer_weight=0.1"), ("objective=views", "views.small=1")]
)
def test_where_the_loss_compares_pictures_the_parts_of_a_batch_are_no_free_setting(tiny, tmp_path, options):
    """A regularizer and views are statistics of the micro-batch: another number of parts is another objective."""
    spread = ("train.steps=2", *options)
    train(tiny(*spread), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"started with train.accumulate=1, not 2"):
        train(tiny(*spread, "train.accumulate=2"), tmp_path, resume=True, progress=False)


def test_resume_falls_back_to_the_last_whole_checkpoint_and_keeps_the_damaged_one(tiny, tmp_path):
    config = tiny()
    train(config, tmp_path, progress=False)
    expected = weights(tmp_path)
    newest = latest_checkpoint(tmp_path)
    damaged = newest / "model.safetensors"
    damaged.write_bytes(expected[: len(expected) // 2])
    with pytest.warns(UserWarning, match=r"going back to step_00000010: .*model.safetensors does not match"):
        train(config, tmp_path, resume=True, progress=False)
    assert weights(tmp_path) == expected
    kept = tmp_path / "checkpoints" / f"damaged_{newest.name}" / "model.safetensors"
    assert kept.read_bytes() == expected[: len(expected) // 2]


def test_resume_never_starts_over_when_all_checkpoints_are_damaged(tiny, tmp_path):
    config = tiny("train.steps=5")
    train(config, tmp_path, progress=False)
    log, state = (tmp_path / "log.jsonl").read_text(), latest_checkpoint(tmp_path) / "state.json"
    state.write_text(state.read_text().replace('"step": 5', '"step": 4'))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint: .*state.json does not match"):
        train(config, tmp_path, resume=True, progress=False)
    assert (tmp_path / "log.jsonl").read_text() == log


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_stops_with_the_step_and_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, poison):
    clean, calls = HJEPA.forward, []

    def forward(self, images, masks):
        out = clean(self, images, masks)
        calls.append(None)
        if len(calls) == 10:  # a checkpoint is due at this step; it must not be written
            zero = 0 * self.predictor.level_token.sum()
            out.loss = out.loss * float("inf") if poison == "loss" else out.loss + zero.sqrt()
        return out

    monkeypatch.setattr(HJEPA, "forward", forward)
    with pytest.raises(TrainingDiverged, match=rf"{poison}.* at step 10; .*step_00000005"):
        train(tiny(), tmp_path, progress=False)
    assert latest_checkpoint(tmp_path).name == "step_00000005"
    assert all(t.isfinite().all() for t in load_run(tmp_path)[0].state_dict().values())


def test_a_full_disk_stops_training_and_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    clean, calls = storage.write_file, []

    def full(path, writer):
        calls.append(path)
        if len(calls) > 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        clean(path, writer)

    monkeypatch.setattr(storage, "write_file", full)
    with pytest.raises(OSError, match=r"stopped at step 10: .*No space left on device; last good .*step_00000005$"):
        train(tiny(), tmp_path, progress=False)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    train(tiny(), tmp_path, resume=True, progress=False)
    assert read_log(tmp_path)[-1]["step"] == 12


# ---- the log


@pytest.mark.parametrize(("narrow", "warns"), [(5.0, True), (1.5, False)])
def test_a_precision_that_this_cpu_emulates_is_said(monkeypatch, recwarn, narrow, warns):
    seconds = {torch.float32: 1.0, torch.bfloat16: narrow}
    monkeypatch.setattr(train_module, "_matmul_seconds", seconds.__getitem__)
    train_module._warn_if_slow("bf16")
    train_module._warn_if_slow("no")
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == warns
    assert all("5 times more slowly with train.mixed_precision=bf16" in text for text in said)


def test_a_training_warns_of_the_precision_it_was_asked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "_fast_in_bfloat16", lambda: False)  # a processor without instructions for it
    monkeypatch.setattr(train_module, "_matmul_seconds", {torch.float32: 1.0, torch.bfloat16: 9.0}.__getitem__)
    with pytest.warns(UserWarning, match="9 times more slowly with train.mixed_precision=bf16"):
        train(tiny("train.mixed_precision=bf16", "train.steps=1"), tmp_path / "run", progress=False)


def test_tensorboard_holds_the_logged_losses(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny("train.steps=3", "train.tensorboard=true"), tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({row["step"]: row["loss"] for row in read_log(tmp_path)[1:]})


def test_tensorboard_missing_is_said_before_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"train.tensorboard=true needs the tensorboard package"):
        train(tiny("train.tensorboard=true"), tmp_path, progress=False)


@pytest.mark.parametrize("line", ["not json", '{"loss": 1.0}', "[1]", '{"step": "one"}'])
def test_a_line_that_is_no_row_of_a_log_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2 is not a row of a training log"):
        read_log(tmp_path)


def test_a_log_line_cut_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}]
