"""What a dry run says equals what is counted by hand, brute force and on disk."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from hjepa.build import build_model, draw_masks
from hjepa.cli import main
from hjepa.config import load_config
from hjepa.train.estimate import estimate, format_estimate

D, GRID, PATCH, DEPTH, BATCH = 32, 4, 8, 2, 8
SMALL = [
    "data.image_size=32", "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.predictor.embed_dim=32",
    "model.predictor.depth=1", "model.predictor.num_heads=2", "model.level_weights=[1.0, 0.5]", "train.batch_size=8",
    "objective=masks", "train.optimizer=adamw", "model.act_layer=null",
]  # fmt: skip


def config(*overrides):
    return load_config(None, [*SMALL, *overrides])


def block(width):
    """Weights and biases of a transformer block: qkv, proj, two layers of four times the width, two norms."""
    return (3 * width**2 + 3 * width) + (width**2 + width) + (8 * width**2 + 5 * width) + 4 * width


ENCODER = 3 * PATCH**2 * D + D + GRID**2 * D + DEPTH * block(D) + 2 * D
PREDICTOR = (D * D + D) + 2 * D + block(D) + 2 * D + (D * D + D)  # embed, two level tokens, block, norm, head


def test_parameters_wire_and_checkpoint_equal_the_hand_count():
    found = estimate(config(), processes=4, speed=1e9)
    assert found["parameters"] == 2 * ENCODER + PREDICTOR
    assert found["trained parameters"] == ENCODER + PREDICTOR
    assert found["checkpoint, bytes"] == 4 * (2 * ENCODER + PREDICTOR) + 8 * (ENCODER + PREDICTOR)
    assert found["sent per step, bytes"] == 2 * 3 / 4 * 4 * (ENCODER + PREDICTOR)
    assert estimate(config())["sent per step, bytes"] == 0


def products(seen, asked):
    """FLOPs of forward and backward of the tiny config, by hand: 2 per multiply-add; backward twice the forward,
    but pixels need no gradient."""

    def blocks(tokens, width, depth):
        return depth * BATCH * 2 * tokens * 12 * width**2, depth * BATCH * 4 * tokens**2 * width

    embed = BATCH * 2 * GRID**2 * 3 * PATCH**2 * D  # of all patches: hidden ones are dropped behind it
    target = embed + sum(blocks(GRID**2, D, DEPTH))
    layers, attention = (sum(pair) for pair in zip(blocks(seen, D, DEPTH), blocks(seen + asked, D, 1), strict=True))
    ends = BATCH * 2 * (seen + asked) * D * D  # the predictor's embedding of what is seen, its head on what is asked
    return target + 2 * embed + 3 * (layers + attention + ends)


def test_tokens_and_flops_equal_the_hand_count():
    masks = draw_masks(config(), (GRID, GRID), 0)
    seen, asked = masks.context_idx.shape[1], sum(index.shape[1] for index in masks.target_idx)
    found = estimate(config())
    assert found["tokens per step, context encoder"] == BATCH * seen
    assert found["tokens per step, target encoder"] == BATCH * GRID**2
    assert found["tokens per step, predictor"] == BATCH * (seen + asked)
    assert found["FLOP per step"] == products(seen, asked)
    at = estimate(config(), processes=2, speed=3e9)
    assert at["FLOP per step"] == products(seen, asked) / 2
    assert at["pictures per second"] == pytest.approx(2 * 3e9 * BATCH / products(seen, asked))
    assert at["seconds per step"] == pytest.approx(products(seen, asked) / 2 / 3e9)


def saved_in_a_real_pass(options):
    """Bytes of the storages that the backward pass keeps, of tensors with numbers in them."""
    torch.manual_seed(0)
    model = build_model(options).train()
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(BATCH, 3, 32, 32), draw_masks(options, (GRID, GRID), 0))
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


@pytest.mark.parametrize("rope", ["false", "true"])
def test_memory_kept_for_the_backward_pass_equals_that_of_a_real_pass(rope):
    options = config(f"model.rope.use_rope={rope}")
    found = estimate(options)
    assert found["of it kept for backward"] == pytest.approx(saved_in_a_real_pass(options), rel=0.05)
    fixed = 4 * (2 * ENCODER + PREDICTOR) + (4 + 8) * (ENCODER + PREDICTOR)
    assert found["memory, bytes"] - found["of it kept for backward"] == pytest.approx(fixed, rel=0.01)


def test_accumulation_and_checkpointing_keep_less_for_the_same_work():
    whole, parts = estimate(config()), estimate(config("train.accumulate=4"))
    assert parts["FLOP per step"] == whole["FLOP per step"]
    assert parts["of it kept for backward"] < whole["of it kept for backward"] / 3
    again = estimate(config("train.grad_checkpointing=true"))
    assert again["of it kept for backward"] < whole["of it kept for backward"]
    assert again["FLOP per step"] > whole["FLOP per step"]


def test_labels_of_a_limited_data_set_are_counted_too():
    few = estimate(config("objective=labels", "data.name=openmoji", "data.limit=8"))
    assert few["parameters"] == estimate(config("objective=labels", "data.name=openmoji"))["parameters"]


def test_muon_keeps_one_number_for_each_weight_of_a_block():
    matrices = DEPTH * 12 * D**2 + 12 * D**2
    adamw, muon = (estimate(config(f"train.optimizer={kind}"))["checkpoint, bytes"] for kind in ("adamw", "muon"))
    assert adamw - muon == 4 * matrices


@pytest.mark.parametrize("objective", ["views", "both"])
def test_views_are_counted_on_their_own_grids(objective):
    options = config(f"objective={objective}", "views.large=2", "views.small=3", "views.small_size=0.5")
    masks = draw_masks(options, (GRID, GRID), 0)
    found = estimate(options)
    small = 3 * BATCH * (GRID // 2) ** 2
    assert found["tokens per step, context encoder"] == 2 * BATCH * masks.context_idx.shape[1] + small
    assert found["pictures per second"] == pytest.approx(BATCH / found["seconds per step"])


def test_a_model_larger_than_memory_is_counted_and_no_random_number_is_drawn():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    huge = ["model.encoder_type=vit_huge_patch14_224", "model.patch_size=null", "model.embed_dim=null",
            "model.depth=null", "model.num_heads=null", "data.image_size=224", "train.batch_size=2048"]  # fmt: skip
    found = estimate(load_config(None, [*SMALL, *huge]), processes=16)
    assert found["parameters"] == pytest.approx(2 * 630.8e6, rel=0.01)
    assert found["memory, bytes"] > 5e10
    assert torch.equal(state, torch.get_rng_state())


def test_the_command_prints_the_numbers_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--processes", "2", "--speed", "1e9", *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.strip() == format_estimate(estimate(config(), processes=2, speed=1e9))
    assert f"{(2 * ENCODER + PREDICTOR) / 1e3:.4g} k" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--processes", "3"], "nearest: 9"),
        (["--processes", "0"], "processes=0 must be at least 1"),
        (["--speed", "0"], "speed=0.0 must be a positive number"),
        (["--speed", "nan"], "speed=nan must be a positive number"),
    ],
)
def test_what_cannot_be_counted_is_one_line(words, reason, capsys):
    assert main(["train", "--dry-run", *words, *SMALL]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


PLAN = Path(__file__).parents[2] / "docs" / "scaling.md"
UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


def printed(words, capsys):
    """The numbers that a dry run prints, by name."""
    assert main(words) == 0
    lines = re.findall(r"^(.+?) {2,}([\d.]+) ?(\w?)$", capsys.readouterr().out, flags=re.MULTILINE)
    return {name: float(number) * UNITS.get(unit, 1) for name, number, unit in lines}


def shown(cell):
    """The numbers of a cell of a table, each with half a unit of its last digit that is not 0."""
    for text, unit in re.findall(r"(\d[\d,.]*\d|\d)(?: ([TGM]))?", cell):
        digits = text.replace(",", "")
        zeros = len(digits) - len(digits.rstrip("0")) - len(digits.partition(".")[2])
        yield float(digits) * UNITS.get(unit, 1), 0.5 * 10.0**zeros * UNITS.get(unit, 1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["masks", "views"])
def test_the_tables_of_the_plan_are_what_its_command_prints(objective, capsys):
    _, _, page = PLAN.read_text().partition("## ViT-L/16 on ImageNet")
    words = shlex.split(re.search(r"```\nhjepa (.*?)```", page, flags=re.DOTALL)[1].replace("\\\n", " "))
    if objective == "views":
        other = re.search(r"and with `(objective=views .*?)`", page)[1].split()
        words = [word for word in words if word != "objective=masks"] + other
    wider = ["64" if old == "8" else old.replace("=1024", "=8192") if "batch_size" in old else old for old in words]
    few, many = printed(words, capsys), printed(wider, capsys)
    names = {
        "parameters, of": [few["parameters"], few["trained parameters"]],
        "FLOP": [few["FLOP per step"]],
        "seconds at": [few["seconds per step"]],
        "memory": [few["memory, bytes"], few["of it kept for backward"]],
        "sent": [few["sent per step, bytes"], many["sent per step, bytes"]],
        "checkpoint": [few["checkpoint, bytes"]],
        "pictures per second": [few["pictures per second"], many["pictures per second"]],
    }
    for pictures, name in ((1.28e6, "ImageNet-1k"), (14.2e6, "ImageNet-22k")):
        names[name] = [100 * pictures / run["pictures per second"] / 3600 for run in (few, many)]
    for name, numbers in names.items():
        if "Net" in name:
            (row,) = re.findall(rf"^\| {name}.*, {objective} \|(.*)\|$", page, flags=re.MULTILINE)
        else:
            (row,) = re.findall(rf"^\| {name}.*?\|(.*)\|$", page, flags=re.MULTILINE)
            row = row.split("|")[objective == "views"]
        found = list(shown(row))
        assert len(found) == len(numbers), name
        for number, (value, half) in zip(numbers, found, strict=True):
            assert abs(number - value) <= 1.001 * half, f"{name}: {row.strip()} against {number:g}"
