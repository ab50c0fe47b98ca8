"""The training loop: one step is predict, compare, step, average; everything else is bookkeeping.

    for step in steps:                                    seeds, lr and masks from (seed, step): hjepa.schedule
        for each micro-batch: loss = model(images, masks); backward
        clip the gradient; AdamW step                     matrices decay, the rest does not
        target <- momentum * target + (1 - momentum) * context      once, after the step

Accelerate supplies the device, mixed precision and the processes of torchrun. batch_size is the GLOBAL batch: with N
processes and A accumulated micro-batches each handles batch_size / (N A) rows of the same batch, under the same masks,
so the loss curve does not depend on N or A (a regularizer is a statistic of the micro-batch, so it does on A).
Dropout masks, if a ViT is given any, repeat across processes and micro-batches.

Source: Assran et al. 2023 (I-JEPA, arXiv:2301.08243, section 4 and appendix A) for optimiser and schedules.
Not covered: FSDP (docs/scaling.md), schedules of weight decay.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .checkpoint import build_encoders, encoder_arguments, latest_checkpoint, load_checkpoint, save_checkpoint
from .config import Config, load_config, save_config
from .data import ImageData, TrainView, load_data
from .evaluate import effective_rank, encode, feature_std, knn_accuracy
from .masks import Masks, sample_masks
from .model import HJEPA
from .predictor import Predictor
from .runlog import RunLog, finite
from .schedule import StepSampler, generator_at, lr_at, mix, share

# a resumed run may differ from its first part in these: they change no number, or only its rounding
FREE_ON_RESUME = (
    "data.root", "train.accumulate", "train.num_workers", "train.threads", "train.log_every", "train.eval_every",
    "train.checkpoint_every", "train.tensorboard", "train.grad_checkpointing", "evaluate",
)  # fmt: skip


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the last good checkpoint."""


def build_model(config: Config) -> HJEPA:
    """The model of a config, freshly initialised from torch's generator.

    Raises ValueError on options that do not fit, from the layers themselves.
    """
    context, target = build_encoders(config, pretrained=config.model.pretrained)
    arguments = encoder_arguments(config)
    predictor = Predictor(
        context.embed_dim,
        **config.model.predictor,
        levels=len(config.model.level_weights),
        grid_size=context.grid_size,
        num_prefix_tokens=context.num_prefix_tokens,
        **{name: arguments[name] for name in ("use_rope", "rope_theta", "use_absolute", "rope")},
    )
    if config.train.grad_checkpointing:
        context.vit.set_grad_checkpointing(True)
    return HJEPA(
        context,
        target,
        predictor,
        level_weights=tuple(config.model.level_weights),
        distance=config.loss.kind,
        regularizer=config.loss.regularizer,
        regularizer_weight=config.loss.regularizer_weight,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: the weights of linear and convolution layers decay; biases, norms, tokens, position tables and
    frequencies do not. Parameters without gradient (the target encoder) are in neither."""
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]


def train(config: Config, run_dir: str | Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a model; returns what it also writes to run_dir/metrics.json.

    run_dir gets config.yaml, log.jsonl, log.csv, checkpoints/ and metrics.json. With resume=True it continues from
    the newest whole checkpoint, bit for bit on a CPU (from the start if there is none yet).

    Raises:
        ValueError: run_dir holds another run, a config that differs from the one resumed, a batch that does not
            divide, a damaged checkpoint.
        TrainingDiverged: NaN or infinite loss.
    """
    return _Run(config, Path(run_dir), resume, progress).train()


class _Run:
    """The state of one call of `train`."""

    def __init__(self, config: Config, run_dir: Path, resume: bool, progress: bool):
        self.config, self.run_dir = config, run_dir
        options = config.train
        _check_run_dir(config, run_dir, resume)
        torch.set_num_threads(options.threads)
        self.accelerator = _accelerator(options.mixed_precision, options.accumulate)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        share(options.batch_size, micro=0, accumulate=options.accumulate, rank=0, processes=self.processes)
        self.train_data, self.test_data = (_load_split(config, split) for split in ("train", "test"))
        torch.manual_seed(mix(options.seed, "init"))
        self.plain = build_model(config)
        optimizer = torch.optim.AdamW(parameter_groups(self.plain, options.weight_decay), lr=options.lr)
        self.last_good = latest_checkpoint(run_dir) if resume else None
        self.start = load_checkpoint(self.last_good, self.plain, optimizer)["step"] if self.last_good else 0
        self.model, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        self.progress = progress and self.accelerator.is_main_process
        self.held_out: tuple[Tensor, ...] | None = None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            run_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, run_dir / "config.yaml")
            levels = [f"loss_level_{level}" for level in range(len(config.model.level_weights))]
            columns = ["step", "loss", *levels, "regularizer", "cosine", "lr", "momentum", "images_per_s",
                       "feature_std", "effective_rank", "knn"]  # fmt: skip
            keep = self.start if self.last_good else -1
            self.log = RunLog(run_dir, keep, columns, options.tensorboard)

    # ---- the loop

    def train(self) -> dict[str, Any]:
        options, began = self.config.train, time.perf_counter()
        if self.start == 0 and self.accelerator.is_main_process and not self.log.rows:
            self.log.write({"step": 0, **self.measure()})
        self.model.train()
        bar = tqdm(total=options.steps, initial=self.start, disable=not self.progress, unit="step")
        batches, tick, done = self.batches(), time.perf_counter(), self.start
        for step in range(self.start, options.steps):
            row = self.step(step, batches)
            logged = _due(step + 1, options.log_every, options.steps)
            measured = _due(step + 1, options.eval_every, options.steps)
            if logged or measured:
                row["images_per_s"] = (step + 1 - done) * options.batch_size / (time.perf_counter() - tick)
                self.report(row, measured, bar)
                tick, done = time.perf_counter(), step + 1
            bar.update()
            if _due(step + 1, options.checkpoint_every, options.steps):
                self.save(step + 1)
        bar.close()
        return self.finish(time.perf_counter() - began)

    def batches(self) -> Iterator[Tensor]:
        config, options = self.config, self.config.train
        view = TrainView(
            self.train_data,
            config.data.image_size,
            crop_scale=tuple(config.data.crop_scale),
            flip=config.data.flip,
            color_jitter=config.data.color_jitter,
        )
        sampler = StepSampler(
            range(self.start, options.steps),
            size=len(self.train_data),
            batch_size=options.batch_size,
            seed=options.seed,
            accumulate=options.accumulate,
            rank=self.rank,
            processes=self.processes,
        )
        return iter(DataLoader(view, batch_sampler=sampler, num_workers=options.num_workers))  # type: ignore[arg-type]

    def step(self, step: int, batches: Iterator[Tensor]) -> dict[str, Any]:
        """One optimiser step over the global batch; returns its log row."""
        config, options = self.config, self.config.train
        lr = lr_at(step, steps=options.steps, lr=options.lr, min_lr=options.min_lr, warmup=options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        masks = draw_masks(config, self.plain.context_encoder.grid_size, step)
        device, momentum, numbers = self.accelerator.device, math.nan, []
        for micro in range(options.accumulate):
            rows = share(
                options.batch_size, micro=micro, accumulate=options.accumulate, rank=self.rank, processes=self.processes
            )
            images = next(batches).to(device, non_blocking=True)
            torch.manual_seed(mix(options.seed, step, "noise"))
            with self.accelerator.accumulate(self.model):
                out = self.model(images, masks.rows(rows).to(device))
                numbers.append(torch.stack([out.loss.detach(), *out.level_losses, out.regularizer, out.cosine]).float())
                self.accelerator.backward(out.loss)
                if self.accelerator.sync_gradients:
                    means = self.check(step, torch.stack(numbers).mean(0))
                    self.accelerator.clip_grad_norm_(self.model.parameters(), options.clip_grad)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            momentum = self.plain.target_encoder.update_from_context_encoder(self.plain.context_encoder, step)
        loss, *levels, regularizer, cosine = means
        return {
            "step": step + 1,
            "loss": loss,
            **{f"loss_level_{level}": value for level, value in enumerate(levels)},
            "regularizer": regularizer,
            "cosine": cosine,
            "lr": lr,
            "momentum": finite(momentum),
            "feature_std": feature_std(out.targets[0].mean(1).float().cpu()),
        }

    def check(self, step: int, numbers: Tensor) -> list[float]:
        """Mean over processes; stops before the optimiser sees a bad gradient."""
        means = self.accelerator.reduce(numbers, reduction="mean").tolist()
        if not all(math.isfinite(value) for value in means):
            raise TrainingDiverged(
                f"the loss is {means[0]} at step {step}; last good checkpoint: {self.last_good or 'none'}"
            )
        return means

    # ---- bookkeeping

    def report(self, row: dict[str, Any], measured: bool, bar: Any) -> None:
        if self.accelerator.is_main_process:
            if measured:
                row |= self.measure()
            self.log.write(row)
            rank = next((r["effective_rank"] for r in reversed(self.log.rows) if "effective_rank" in r), 0.0)
            bar.set_postfix(loss=f"{row['loss']:.3f}", images_per_s=f"{row['images_per_s']:.0f}", rank=f"{rank:.1f}")
        if measured:
            self.accelerator.wait_for_everyone()

    def measure(self) -> dict[str, float]:
        """Effective rank of the target encoder's features and kNN accuracy, on held-out pictures at training size."""
        options = self.config.evaluate
        if self.held_out is None:
            gallery = _slice(self.train_data, options.gallery)
            queries = _slice(self.test_data, options.queries)
            size = self.config.data.image_size
            self.held_out = (
                self.train_data.at_size(size, gallery), self.train_data.labels[gallery],
                self.test_data.at_size(size, queries), self.test_data.labels[queries],
            )  # fmt: skip
        gallery_images, gallery_labels, query_images, query_labels = self.held_out
        target = self.plain.target_encoder
        gallery_x, query_x = (encode(target, x, pool=options.pool) for x in (gallery_images, query_images))
        hits = knn_accuracy(gallery_x, gallery_labels, query_x, query_labels, min(options.knn_k, len(gallery_x)))
        return {"effective_rank": effective_rank(query_x), "knn": hits.float().mean().item()}

    def save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            extra = {"mean": list(self.train_data.mean), "std": list(self.train_data.std)}
            optimizer = self.optimizer.optimizer
            self.last_good = save_checkpoint(self.run_dir, step, self.plain, optimizer, self.config, extra)
        self.accelerator.wait_for_everyone()

    def finish(self, seconds: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            metrics = {**summary(self.log.rows), "seconds": round(seconds, 1), "processes": self.processes,
                       "parameters": sum(p.numel() for p in self.plain.context_encoder.parameters()),
                       "width": self.plain.context_encoder.embed_dim}  # fmt: skip
            (self.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
            self.log.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return metrics


def draw_masks(config: Config, grid_size: tuple[int, int], step: int) -> Masks:
    """The masks of the whole global batch of a step."""
    options = {name: tuple(v) if OmegaConf.is_list(v) else v for name, v in config.masks.items()}
    return sample_masks(
        config.train.batch_size,
        grid_size,
        levels=len(config.model.level_weights),
        generator=generator_at(config.train.seed, step, "masks"),
        **options,
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First, last and extreme values of a log."""
    measured = [row for row in rows if "knn" in row]
    trained = [row for row in rows if "loss" in row]
    return {
        "steps": rows[-1]["step"],
        "loss": trained[-1]["loss"],
        "knn": measured[-1]["knn"],
        "knn_random": measured[0]["knn"],
        "effective_rank": measured[-1]["effective_rank"],
        "effective_rank_random": measured[0]["effective_rank"],
        "effective_rank_lowest": min(row["effective_rank"] for row in measured),
        "images_per_s": max(row["images_per_s"] for row in trained),
    }


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _slice(data: ImageData, count: int) -> Tensor:
    """A fixed random choice of at most `count` pictures, in order."""
    return torch.randperm(len(data), generator=generator_at(0, 0, "held out"))[:count].sort().values


def _load_split(config: Config, split: str) -> ImageData:
    options = config.data
    return load_data(
        options.name,
        split,
        root=options.root,
        path=options.path,
        image_size=options.image_size,
        limit=options.limit if split == "train" else None,
        on_corrupt=options.on_corrupt,
    )


def _accelerator(mixed_precision: str, accumulate: int) -> Accelerator:
    AcceleratorState._reset_state()  # a second run in the same process may ask for another precision
    return Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        step_scheduler_with_optimizer=False,
    )


def _check_run_dir(config: Config, run_dir: Path, resume: bool) -> None:
    """Refuse to mix two runs in one folder."""
    if not (run_dir / "config.yaml").exists():
        return
    if not resume:
        if any((run_dir / "checkpoints").glob("step_*")):
            raise ValueError(f"{run_dir} already holds a run; resume it, or choose another folder")
        return
    before, now = (_flat(c) for c in (load_config(run_dir / "config.yaml"), config))
    for key in before:
        if before[key] != now[key] and not key.startswith(FREE_ON_RESUME):
            raise ValueError(f"cannot resume {run_dir}: it was started with {key}={before[key]}, not {now[key]}")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    tree = OmegaConf.to_container(tree) if OmegaConf.is_config(tree) else tree
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
