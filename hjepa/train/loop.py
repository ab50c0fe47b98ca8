"""The training loop: one step is predict, compare, step, average; everything else is bookkeeping.

    for step in steps:                                    lr, pictures, masks and noise from (seed, step)
        for each micro-batch: loss = model(images, masks); backward
        clip the gradient; AdamW step                     matrices decay, the rest does not
        target <- momentum * target + (1 - momentum) * context      once, after the step

Accelerate supplies the device, mixed precision and the processes of torchrun. batch_size is the GLOBAL batch: with N
processes and A accumulated micro-batches each handles batch_size / (N A) rows of the same batch, under the same masks,
so the loss curve does not depend on N or A (a regularizer and the loss of views are statistics of the micro-batch, so
they do on A).
Dropout, if a ViT is given any, repeats across processes and micro-batches.

Source: Assran et al. 2023 (I-JEPA, arXiv:2301.08243, section 4 and appendix A) for optimiser and schedules.
Not covered: schedules of weight decay. For models too large for one GPU see docs/scaling.md.
"""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .. import hub
from ..build import batch_masks, build_encoders, build_model, load_split, train_sizes
from ..config import Config, config_of, save_config
from ..data.images import ImageData, left_out
from ..data.loading import at_size
from ..evaluate.measures import effective_rank, feature_std
from ..evaluate.readers import knn_accuracy
from ..evaluate.transfer import encode
from ..files import hold, read_json, user_path
from ..inputs import UserError, patch_grid
from ..nn.encoders import TargetEncoder, check_positions
from ..nn.hjepa import HJEPA
from ..pretrained import folder_of, list_pretrained
from .checkpoint import (
    STATE,
    after_first,
    begin_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    pictures_of,
    read_state,
    save_checkpoint,
    write_json,
)
from .feed import Feed
from .log import RunLog, check_pictures, check_run_dir, log_columns, note_versions, summary
from .optimizer import build_optimizer
from .schedule import generator_at, lr_at, mix, share
from .sharding import fsdp_plugin, is_sharded, prepare, whole_weights
from .whitening import fix_patches, whiten_patches

__all__ = ["TrainingDiverged", "build_model", "train"]

GRAPHS = 64  # of a block, one for each shape of its tokens: large and small views, seen and whole, of each image size


class TrainingDiverged(RuntimeError):
    """Loss or gradient became NaN or infinite; the message names the step and the last good checkpoint."""


def train(config: Config, run_dir: str | Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a model; returns what it also writes to run_dir/metrics.json (on the main process).

    run_dir gets config.yaml, log.jsonl, log.csv, checkpoints/ and metrics.json. With resume=True it continues from
    the newest whole checkpoint, bit for bit on a CPU (from the start if there is none yet).

    The record of a run that has no step left to train stays as it is.
    The folder is held against other processes while this runs; the caller's random state and number of threads stay.

    Raises:
        ValueError: run_dir holds another run or is in use, a config that differs from the one resumed, a batch that
            does not divide among the processes, checkpoints that are all damaged.
        TrainingDiverged: NaN or infinite loss or gradient.
    """
    run_dir = user_path(run_dir)
    main = int(os.environ.get("RANK", "0")) == 0
    with _callers_state(), _compiling(config.train.compile), hold(run_dir) if main else nullcontext():
        return _Run(config, run_dir, resume, progress).train()


@contextmanager
def _callers_state() -> Iterator[None]:
    """Threads and precision of torch and random state are the caller's again afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _compiling(wanted: bool) -> AbstractContextManager:
    """Where blocks are compiled, one graph for each shape, torch may keep GRAPHS of them in place of eight."""
    if not wanted:
        return nullcontext()
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=GRAPHS)


class _Run:
    """The state of one call of `train`."""

    def __init__(self, config: Config, run_dir: Path, resume: bool, progress: bool):
        self.config, self.run_dir = config, run_dir
        options = config.train
        torch.set_num_threads(options.threads)
        if options.tf32:
            torch.set_float32_matmul_precision("high")
        self.precision = choose_precision(options.mixed_precision)
        self.accelerator = _accelerator(self.precision, options.accumulate)
        self.last_good = after_first(lambda: latest_checkpoint(run_dir) if resume else None)  # resume or not, by all
        note = check_run_dir(config, run_dir, resume, self.last_good)
        chosen = self.precision == choose_precision("auto")  # what the processor can do needs no stopwatch
        if self.accelerator.is_main_process and self.accelerator.device.type == "cpu" and not chosen:
            _warn_if_slow(self.precision)
        self.main, self.progress = self.accelerator.is_main_process, progress and self.accelerator.is_main_process
        self.rows = [
            share(
                options.batch_size,
                micro=micro,
                accumulate=options.accumulate,
                rank=self.accelerator.process_index,
                processes=self.accelerator.num_processes,
            )
            for micro in range(options.accumulate)
        ]
        self.train_data, self.validation_data = (load_split(config, split) for split in ("train", "validation"))
        number, batch = len(self.train_data), options.batch_size
        if config.objective in ("views", "both") and number < batch and not self.last_good:
            what = f"train.batch_size={batch} is more than the {number} training pictures"
            parts = options.accumulate * self.accelerator.num_processes
            raise UserError(f"{what}: one would be told apart from itself; nearest: {number // parts * parts or parts}")
        self.pictures = pictures_of(self.train_data)
        if self.last_good:
            check_pictures(run_dir, read_state(self.last_good)["extra"].get("pictures"), self.pictures)
        if note and self.progress:
            tqdm.write(note, file=sys.stderr)
        self.held_out: tuple[Tensor, ...] | None = None
        self.lazy = self.accelerator.device.type != "cpu"  # a number is read when it is logged
        self.broken: dict[str, Tensor] = {}  # by name: step and value of the first that was not finite
        self.writing: tuple[int, Callable[[], Path]] | None = None  # the step of a checkpoint that is not there yet
        self.start = self._build()
        self.accelerator.wait_for_everyone()
        if self.main:
            run_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, run_dir / "config.yaml")
            processor = {"processor": torch.cuda.get_device_name()} if self.accelerator.device.type == "cuda" else {}
            precision = self.accelerator.mixed_precision
            self.record = self._finished()
            if not self.record:
                self.versions = note_versions(run_dir, self.start, precision=precision, **processor)
            keep = self.start if self.last_good else -1
            self.log = RunLog(run_dir, keep, log_columns(len(config.model.level_weights)), options.tensorboard)

    def _finished(self) -> dict[str, Any]:
        """The record of a run that has no step left to train; {} where there is one, or no record of the last."""
        record = read_json(self.run_dir / "metrics.json") if self.start >= self.config.train.steps else None
        return record if isinstance(record, dict) and record.get("steps") == self.start else {}

    def _build(self) -> int:
        """Model and optimiser, new or from the last good checkpoint; returns the number of finished steps."""
        options = self.config.train
        if options.optimizer == "muon" and fsdp_plugin(self.precision) is not None:
            raise UserError("train.optimizer=muon is not for matrices cut over processes (FSDP); nearest: adamw")
        if self.config.objective == "labels" and len(self.train_data.classes) < 2:
            raise UserError(f"objective=labels needs 2 classes or more, not {self.train_data.classes}; nearest: views")
        self.unwrapped = build_model(self.config, len(self.train_data.classes))
        if options.init_from and not self.last_good:
            _start_from(options.init_from, self.unwrapped)
        if options.whiten_patches is not None:
            context = self.unwrapped.context_encoder
            if not self.last_good:
                whiten_patches(context, self.train_data, self.config.data.image_size, options.whiten_patches)
                self.unwrapped.target_encoder.copy_from_context_encoder(context)
            fix_patches(context)
        if options.compile:
            for block in [module for module in self.unwrapped.modules() if isinstance(module, Block)]:
                block.compile(dynamic=False)

        def optimizer() -> torch.optim.Optimizer:
            return build_optimizer(
                self.unwrapped, kind=options.optimizer, lr=options.lr, muon_lr=options.muon_lr,
                weight_decay=options.weight_decay,
            )  # fmt: skip

        self.model, self.optimizer = prepare(self.accelerator, self.unwrapped, optimizer)
        self.unwrapped = self.accelerator.unwrap_model(self.model)
        many = self.accelerator.num_processes > 1 or is_sharded(self.unwrapped)
        self.group: Any = dist.new_group(backend="gloo") if many else None  # of checkpoints alone
        state: dict[str, Any] = {"step": 0, "extra": {}}
        if self.last_good:
            state = load_checkpoint(self.last_good, self.unwrapped, self.optimizer.optimizer)
        for side in train_sizes(self.config):
            patch_grid(side, self.unwrapped.context_encoder.patch_size)
            batch_masks(self.config, self.grid(side), 0)  # a grid too small for the masks is an error now, not later
        if self.accelerator.scaler is not None and "scaler" in state["extra"]:
            self.accelerator.scaler.load_state_dict(state["extra"]["scaler"])
        return state["step"]

    # ---- the loop

    def train(self) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            self.steps()
        except BaseException:
            with suppress(OSError):
                self.settle()
            raise
        return self.finish(time.perf_counter() - began)

    def steps(self) -> None:
        options = self.config.train
        if self.start == 0:
            measures = self.measure()
            if self.main:
                self.log.write({"step": 0, **measures})
        self.model.train()
        bar = tqdm(total=options.steps, initial=self.start, disable=not self.progress, unit="step")
        feed, tick, images = self.feed(), time.perf_counter(), 0
        for step in range(self.start, options.steps):
            measuring = _due(step + 1, options.eval_every, options.steps)
            logging = measuring or _due(step + 1, options.log_every, options.steps)
            row, images = self.step(step, feed, logging), images + options.batch_size
            if logging:
                self.report(row | {"images_per_s": images / (time.perf_counter() - tick)}, measuring, bar)
            bar.update()
            if _due(step + 1, options.checkpoint_every, options.steps):
                self.save(step + 1)
                logging = True
            if logging:  # evaluation and saving do not count as training time
                tick, images = time.perf_counter(), 0
        self.settle()
        bar.close()

    def feed(self) -> Iterator[dict[str, Any]]:
        """The arguments of the model for every micro-batch from here to the last step."""
        return iter(self.feeder())

    def feeder(self) -> Feed:
        """What makes them."""
        half = self.precision == "bf16" and self.accelerator.device.type == "cpu"
        return Feed(
            self.config,
            self.train_data,
            range(self.start, self.config.train.steps),
            self.rows,
            self.unwrapped.context_encoder.patch_size,
            self.accelerator.device,
            torch.bfloat16 if half else torch.float32,
        )

    def grid(self, side: int) -> tuple[int, int]:
        """The patch grid of a square image of that side."""
        return (side // self.unwrapped.context_encoder.patch_size,) * 2

    def step(self, step: int, feed: Iterator[dict[str, Any]], logging: bool = True) -> dict[str, Any]:
        """One optimiser step over the global batch; returns its log row if logging, else nothing.

        Numbers stay on the device until they are logged. On a CPU, where reading one is no wait, a loss or a gradient
        that is not finite stops training before the optimiser sees it; elsewhere at the next logged step, and no
        checkpoint is written before.
        """
        options = self.config.train
        lr = lr_at(step, steps=options.steps, lr=options.lr, min_lr=options.min_lr, warmup=options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("peak", options.lr) * lr / options.lr  # checkpoints of 0.1 have no peak
        numbers, pooled = [], []
        for _ in self.rows:
            arguments = next(feed)
            torch.manual_seed(mix(options.seed, step, "noise"))
            with self.accelerator.accumulate(self.model):
                out = self.model(**arguments)
                parts = [out.loss.detach(), *out.level_losses, out.view_loss, out.regularizer, out.cosine]
                numbers.append(torch.stack(parts).float())
                pooled.append(out.features.float())
                self.accelerator.backward(out.loss)
                if self.accelerator.sync_gradients:
                    means = self.accelerator.reduce(torch.stack(numbers).mean(0), reduction="mean")
                    self.watch("loss", means, step)
                    grad_norm = self.update(step)
        momentum = None
        if not self.accelerator.optimizer_step_was_skipped:
            momentum = self.unwrapped.update_target(step)
        if not logging:
            return {}
        self.check_finite()
        loss, *levels, views, regularizer, cosine = means.tolist()
        norm = float(grad_norm)
        row = {
            "step": step + 1,
            "loss": loss,
            **{f"loss_level_{level}": value for level, value in enumerate(levels)},
            **({"loss_views": views} if self.unwrapped.projector is not None else {}),
            "regularizer": regularizer,
            "cosine": cosine,
            "grad_norm": norm if math.isfinite(norm) else None,  # fp16 overflowed, and the step was skipped
            "lr": lr,
            "momentum": momentum,
        }
        features = self.accelerator.gather(torch.cat(pooled)).cpu()
        row["feature_std"] = feature_std(features) if len(features) > 1 else None  # one picture has no spread
        return row

    def update(self, step: int) -> Tensor:
        """Clip and step; returns the norm of the gradient before clipping."""
        found: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad)
        norm = found.full_tensor() if isinstance(found, DTensor) else found
        if self.accelerator.scaler is None:  # else an overflow is expected, and the step is skipped
            self.watch("gradient norm", norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def watch(self, what: str, values: Tensor, step: int) -> None:
        """Remember the first value that is not finite, as (step, value) on its device; on a CPU stop at once."""
        value = values.detach().flatten().float().sum()
        seen = torch.stack((torch.full_like(value, step), value))
        before = self.broken.get(what, torch.full_like(seen, -1))
        self.broken[what] = torch.where((before[0] < 0) & ~torch.isfinite(value), seen, before)
        if not self.lazy:
            self.check_finite()

    def check_finite(self) -> None:
        """Stop if a value that was watched is not finite; this waits for the device."""
        found = [(*its.tolist(), what) for what, its in self.broken.items()]
        for step, value, what in sorted((each for each in found if each[0] >= 0), key=lambda each: each[0]):
            with suppress(OSError):
                self.settle()
            last = self.last_good or "none"
            raise TrainingDiverged(f"the {what} is {value} at step {step + 1:.0f}; last good checkpoint: {last}")

    # ---- bookkeeping

    def report(self, row: dict[str, Any], measuring: bool, bar: Any) -> None:
        measures = self.measure() if measuring else {}
        if self.main:
            self.log.write(row | measures)
            rank = next((r["effective_rank"] for r in reversed(self.log.rows) if "effective_rank" in r), 0.0)
            bar.set_postfix(loss=f"{row['loss']:.3f}", images_per_s=f"{row['images_per_s']:.0f}", rank=f"{rank:.1f}")

    def measure(self) -> dict[str, float]:
        """Effective rank of the target encoder's features and kNN accuracy, on validation pictures at training size.

        All processes call it; the main one works and the others wait.
        """
        target = self.whole_target()
        measures = self.measure_encoder(target) if self.main else {}
        self.accelerator.wait_for_everyone()
        return measures

    def whole_target(self) -> TargetEncoder:
        if not is_sharded(self.unwrapped):
            return self.unwrapped.target_encoder
        weights = whole_weights(self.unwrapped.target_encoder)
        target = build_encoders(self.config)[1]
        if self.main:
            target.load_state_dict(weights)
        return target.to(self.accelerator.device)

    def measure_encoder(self, target: TargetEncoder) -> dict[str, float]:
        options = self.config.evaluate
        if self.held_out is None:
            size = self.config.data.image_size
            gallery, queries = _slice(self.train_data, options.gallery), _slice(self.validation_data, options.queries)
            workers = self.config.train.num_workers
            self.held_out = (
                at_size(self.train_data, size, gallery, workers), self.train_data.labels[gallery],
                at_size(self.validation_data, size, queries, workers), self.validation_data.labels[queries],
            )  # fmt: skip
        known, known_labels, asked, asked_labels = self.held_out
        x, y = (encode(target, images, pool=options.pool) for images in (known, asked))
        if len(self.train_data.classes) < 2:
            return {"effective_rank": effective_rank(y)}
        hits = knn_accuracy(x, known_labels, y, asked_labels, min(options.knn_k, len(x)))
        return {"effective_rank": effective_rank(y), "knn": hits.float().mean().item()}

    def save(self, step: int) -> None:
        self.check_finite()
        self.settle()
        optimizer = self.optimizer.optimizer
        extra: dict[str, Any] = {"mean": list(self.train_data.mean), "std": list(self.train_data.std)}
        extra["pictures"] = self.pictures
        if self.accelerator.scaler is not None:
            extra["scaler"] = self.accelerator.scaler.state_dict()
        arguments = (self.run_dir, step, self.unwrapped, optimizer, self.config, extra)
        with self.stopping(step):
            if self.group is not None:
                self.writing = (step, begin_checkpoint(*arguments, self.group))
            else:
                self.last_good = save_checkpoint(*arguments)

    def settle(self) -> None:
        """Wait for the checkpoint that is still being written, if any; only then is it the last good one."""
        if self.writing is not None:
            (step, finished), self.writing = self.writing, None
            with self.stopping(step):
                self.last_good = finished()

    @contextmanager
    def stopping(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"stopped at step {step}: {error}; last good checkpoint: {self.last_good}") from error

    def finish(self, seconds: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        if self.main:
            encoder = self.unwrapped.context_encoder
            metrics = self.record or {
                **summary(self.log.rows),
                "width": encoder.embed_dim,
                "parameters": sum(p.numel() for p in encoder.parameters()),
                "processes": self.accelerator.num_processes,
                "seconds": round(seconds, 1),  # of this call: a resumed run counts from its resumption
                "versions": self.versions,
            }
            if not self.record:
                write_json(self.run_dir / "metrics.json", metrics)
            self.log.close()
            if note := left_out(self.train_data, self.validation_data):
                tqdm.write(note, file=sys.stderr)
        self.accelerator.wait_for_everyone()
        if self.group is not None:
            dist.destroy_process_group(self.group)
        self.accelerator.free_memory()
        return metrics


def _start_from(name: str, model: HJEPA) -> None:
    """Set the weights that train.init_from names: a checkpoint's or a run's, or those of an encoder alone, one that
    comes with the package or an export, in both encoders."""
    folder = folder_of(name)
    if not hub.is_export(folder):
        found = after_first(lambda: _whole_one(folder))
        if found is None:
            what = f"neither a run with checkpoints nor a checkpoint, nor one of {', '.join(list_pretrained())}"
            raise FileNotFoundError(f"train.init_from={name}: {what}")
        saved = config_of(read_state(found)["config"], str(found))
        saved.model.pretrained = False
        try:
            check_positions(model.target_encoder, build_encoders(saved)[1])
            if model.predictor is not None:
                model.predictor.check_heads(saved.model.predictor.num_heads)
        except ValueError as error:
            raise UserError(f"train.init_from={name}: {error}") from None
        load_checkpoint(found, model)
        return
    encoder = hub.load_pretrained(folder)[0]
    try:
        model.target_encoder.copy_from_context_encoder(encoder)
        model.context_encoder.load_state_dict(encoder.state_dict())
    except (RuntimeError, ValueError) as error:
        reason = str(error).replace("\n\t", " ")
        raise UserError(f"train.init_from={name} is of another architecture than the config: {reason}") from None


def _whole_one(folder: Path) -> Path | None:
    """The folder where it is a checkpoint, or else the newest one of the run that it is; hashed."""
    found = folder if (folder / STATE).is_file() else latest_checkpoint(folder)
    if found is not None:
        read_state(found)
    return found


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _slice(data: ImageData, count: int) -> Tensor:
    """A fixed random choice of at most `count` pictures, in order; the same for every seed."""
    return torch.randperm(len(data), generator=generator_at(0, 0, "held out"))[:count].sort().values


def _accelerator(mixed_precision: str, accumulate: int) -> Accelerator:
    AcceleratorState._reset_state()  # a second run in the same process may ask for another precision
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, or torchrun on a CPU gives N separate runs
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        step_scheduler_with_optimizer=False,
        fsdp_plugin=fsdp_plugin(mixed_precision),
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise RuntimeError(f"torchrun started {asked} processes, Accelerate sees {accelerator.num_processes}")
    return accelerator


def choose_precision(asked: str) -> str:
    """The mixed precision of a run: `asked`, or for "auto" what this machine is fast in.

    A GPU that has bfloat16 gets it, and so does a CPU that is fast in it; where a CPU has no instructions for it, it is
    emulated, up to a hundred times more slowly. The instructions are asked for, not timed, so that a busy machine
    chooses as a quiet one does.
    """
    if asked == "fp16" and not torch.accelerator.is_available():
        raise UserError("train.mixed_precision=fp16 is for a GPU; nearest on a CPU: bf16")
    if asked != "auto":
        return asked
    if torch.accelerator.is_available():
        cuda = torch.cuda.is_available()
        return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if _fast_in_bfloat16() else "no"


def _fast_in_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32: it has AMX, or AVX512-BF16 of AMD.

    AVX512-BF16 is twice as fast as float32 on an AMD EPYC (Zen 4), and takes 1.7 times as long on an Intel Xeon whose
    AMX is kept from a virtual machine (Emerald Rapids). AVX512-FP16 tells them apart, which came to Intel's with AMX.
    """
    amx, narrow = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest torch
    newer = capabilities.get("avx512_fp16", False)
    return amx or (narrow and not newer)


def _warn_if_slow(mixed_precision: str) -> None:
    """Say so where the CPU has no instructions for the narrow type (AVX512-BF16, AMX) and emulates it."""
    if mixed_precision == "no":
        return
    narrow = _matmul_seconds(torch.bfloat16 if mixed_precision == "bf16" else torch.float16)
    times = narrow / _matmul_seconds(torch.float32)
    if times > 2:
        warnings.warn(
            f"this CPU multiplies matrices {times:.0f} times more slowly with train.mixed_precision={mixed_precision} "
            "than without; train.mixed_precision=no is faster here",
            stacklevel=2,
        )


def _matmul_seconds(dtype: torch.dtype, side: int = 192) -> float:
    """Seconds of the processor for one product of two square matrices, the best of five."""
    matrix = torch.ones(side, side, dtype=dtype)
    seconds = []
    for _ in range(5):
        began = time.process_time()  # not the clock's: other programs may be at work
        matrix @ matrix
        seconds.append(time.process_time() - began)
    return min(seconds)
