"""Section on the step of configs/photographs.yaml: the package, a plain PyTorch loop, and lightly if it is installed.

    hjepa        the training loop's own step: pictures from the loader, views, model, loss, clipping, Muon, average
    its views    of that step the crops, resized, mirrored and recoloured on the whole batch, and nothing else
    plain loop   the same written here with torch and timm: a batch of crops by one `grid_sample` a view; with timm's
                 fused attention, which torch is slow in on a CPU in bfloat16, and with it written out
    lightly      its multi-crop transform, masked timm ViT, projection head and loss, one picture after the other

All take uint8 pictures `[N, 3, 128, 128]` in memory; two views of 64 px with a third of the patches kept and six of
32 px; the same ViT, projector, optimiser, clipping, moving average and precision. What differs: the package rotates
queries and keys where the others add a position embedding; its crops are antialiased, as lightly's are, the plain
loop's are bilinear; lightly's loss is over pairs of views, with the negatives of the pair.

lightly (pip install lightly) is no requirement: without it there is no such row, and the title says so.
Not covered: loader processes, GPUs, whether the three learn equally well.
"""

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.rotating import Entry, Setup
from benchmarks.timing import compare
from hjepa.build import draw_views
from hjepa.config import Config, load_config
from hjepa.data.images import IMAGENET
from hjepa.train.loop import _callers_state, _Run
from hjepa.train.schedule import size_at

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "photographs.yaml"
QUICK = ("model.embed_dim=24", "model.depth=1", "model.num_heads=2", "views.small=1", "train.batch_size=4")
MOMENTUM = 0.95  # of the moving averages
VIEWS_SHARE = 0.10  # of a step, that making its views may take


def config_of(setup: Setup, pictures: Path) -> Config:
    """The recipe on a folder of pictures, batch 32, with steps for all rounds."""
    more = QUICK if setup.quick else ("train.batch_size=32",)
    return load_config(RECIPE, (
        "data.name=imagefolder", f"data.path={pictures}", "train.steps=100000", "train.eval_every=100000", *more
    ))  # fmt: skip


def pictures_in(folder: Path, count: int, side: int = 128) -> Tensor:
    """Noise, uint8 `[count, 3, side, side]`, also as files for the package's reader, which keeps them in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        place = folder / ("train" if number else "test") / "noise"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number:03d}.png", compress_level=0)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@contextlib.contextmanager
def package(config: Config) -> Iterator[_Run]:
    """A run of the package, ready for its first step; its folder is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, _callers_state():
        run = _Run(config, Path(folder), False, False)
        run.model.train()
        try:
            yield run
        finally:
            run.log.close()
            run.accelerator.free_memory()


def views_alone(run: _Run) -> Callable[[], dict[str, Any]]:
    """Makes the views of one step after the other, as the loop does, from the pictures of the first."""
    feeder, steps, seed = run.feeder(), itertools.count(), run.config.train.seed
    pictures, labels, _ = next(feeder._batches())

    def make() -> dict[str, Any]:
        step = next(steps)
        side = size_at(step, sizes=feeder.sides, seed=seed)
        return feeder._views(pictures, labels, draw_views(run.config, step), side, run.rows[0])

    return make


def plain_vit(config: Config) -> Any:
    """timm's ViT of the recipe's shape, with a position embedding."""
    model, side = config.model, config.data.image_size
    return timm.create_model(
        model.encoder_type, img_size=side, patch_size=model.patch_size, embed_dim=model.embed_dim, depth=model.depth,
        num_heads=model.num_heads, act_layer=model.act_layer, class_token=False, global_pool="", num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip


class Optimizers:
    """torch's Muon on the matrices of the blocks, AdamW on the rest; clips first, clears the gradients last."""

    def __init__(self, modules: nn.ModuleList, config: Config) -> None:
        options, self.parameters = config.train, [p for p in modules.parameters() if p.requires_grad]
        named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if ".blocks." in name and p.dim() == 2]
        rest = [p for name, p in named if not (".blocks." in name and p.dim() == 2)]
        decay: dict[str, Any] = {"weight_decay": options.weight_decay}
        self.both = (
            torch.optim.Muon(matrices, lr=options.muon_lr, adjust_lr_fn="match_rms_adamw", **decay),
            torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.95), fused=True, **decay),
        )
        self.clip = options.clip_grad

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for optimizer in self.both:
            optimizer.step()
            optimizer.zero_grad()


class Plain:
    """The plain loop; a call is a step."""

    def __init__(self, config: Config, pictures: Tensor, half: bool, fused: bool = True) -> None:
        torch.manual_seed(0)
        self.config, self.pictures, self.half, width = config, pictures, half, config.model.embed_dim
        self.vit = plain_vit(config).train()
        for block in self.vit.blocks:
            block.attn.fused_attn = fused
        self.vit.patch_drop = PatchDropout(1 - config.views.keep, num_prefix_tokens=0)
        hidden, out = config.model.projector.hidden, config.model.projector.out
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False)
        )
        self.optimizers = Optimizers(nn.ModuleList([self.vit, self.projector]), config)
        self.average = AveragedModel(self.vit, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM))
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)

    def view(self, x: Tensor, side: int, scale: list[float]) -> Tensor:
        """One random crop of each picture `[B, 3, S, S]` (numbers 0 to 1), mirrored and recoloured at random."""
        options, draw = self.config.views, torch.rand(9, len(x))
        area, ratio = scale[0] + (scale[1] - scale[0]) * draw[0], (0.75 ** (2 * draw[1] - 1)).sqrt()
        height, width = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
        theta = torch.zeros(len(x), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = width * (draw[2] < 0.5).float().mul(2).sub(1), height
        theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * draw[3] - 1), (1 - height) * (2 * draw[4] - 1)
        grid = F.affine_grid(theta, [len(x), 3, side, side], align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        bright, contrast, color = (1 + options.color_jitter * (2 * draw[5:8, :, None, None, None] - 1)).unbind(0)
        color = color.masked_fill(draw[8, :, None, None, None] < options.grey, 0)
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        x = (x * bright).clamp(0, 1)
        x = torch.lerp((x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True), x, contrast).clamp(0, 1)
        return (torch.lerp((x * luma).sum(1, keepdim=True), x, color).clamp(0, 1) - self.mean) / self.std

    def features(self, views: list[Tensor], keep: float) -> Tensor:
        self.vit.patch_drop.prob = 1 - keep
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            tokens = self.vit.forward_features(torch.cat(views))
        return tokens.float().mean(1)

    def __call__(self) -> None:
        views, side, size = self.config.views, self.config.data.image_size, self.config.train.batch_size
        x = self.pictures[torch.randint(len(self.pictures), (size,))].float() / 255
        large = [self.view(x, side, views.large_scale) for _ in range(views.large)]
        small = [self.view(x, int(side * views.small_size), views.small_scale) for _ in range(views.small)]
        z = self.projector(torch.cat((self.features(large, views.keep), self.features(small, 1.0))))
        contrastive(z, size, self.config.loss.temperature).backward()
        self.optimizers.step()
        self.average.update_parameters(self.vit)


def contrastive(z: Tensor, pictures: int, temperature: float) -> Tensor:
    """Embeddings `[V B, D]`, view by view: each against all others, those of the same picture are right."""
    z = F.normalize(z, dim=-1)
    scores = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    same = torch.eye(pictures, dtype=torch.bool).repeat(len(z) // pictures, len(z) // pictures)
    same = same & ~torch.eye(len(z), dtype=torch.bool)
    return (scores.logsumexp(1) - scores.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def lightly_step(config: Config, pictures: Tensor, half: bool) -> Callable[[], None]:
    """A step by lightly's parts. Raises ImportError where it is not installed."""
    from lightly.loss import NTXentLoss  # type: ignore[import-not-found]
    from lightly.models.modules import MaskedVisionTransformerTIMM  # type: ignore[import-not-found]
    from lightly.models.modules.heads import SimCLRProjectionHead  # type: ignore[import-not-found]
    from lightly.models.utils import random_token_mask, update_momentum  # type: ignore[import-not-found]
    from lightly.transforms.multi_crop_transform import MultiCropTranform  # type: ignore[import-not-found]
    from torchvision.transforms import v2

    torch.manual_seed(0)
    views, side, size = config.views, config.data.image_size, config.train.batch_size
    grid, jitter = (side // config.model.patch_size) ** 2, views.color_jitter
    transform = MultiCropTranform(
        (side, int(side * views.small_size)), (views.large, views.small),
        *zip(views.large_scale, views.small_scale, strict=True),
        v2.Compose([
            v2.RandomHorizontalFlip(), v2.ColorJitter(jitter, jitter, jitter), v2.RandomGrayscale(views.grey),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET),
        ]),
    )  # fmt: skip
    encoder = MaskedVisionTransformerTIMM(plain_vit(config)).train()
    encoder.mask_token.requires_grad_(False)  # nothing is guessed
    head = SimCLRProjectionHead(config.model.embed_dim, config.model.projector.hidden, config.model.projector.out)
    average, loss = copy.deepcopy(encoder).requires_grad_(False), NTXentLoss(config.loss.temperature)
    optimizers = Optimizers(nn.ModuleList([encoder, head]), config)

    def step() -> None:
        chosen = pictures[torch.randint(len(pictures), (size,))]
        crops = [torch.stack(view) for view in zip(*map(transform, chosen), strict=True)]
        large, small = torch.cat(crops[: views.large]), torch.cat(crops[views.large :])
        kept, _ = random_token_mask((len(large), grid), 1 - views.keep, mask_class_token=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            tokens = encoder.encode(large, idx_keep=kept), encoder.encode(small)
        z = head(torch.cat([each.float().mean(1) for each in tokens])).split(size)
        pairs = list(itertools.combinations(z, 2))
        (sum(loss(*pair) for pair in pairs) / len(pairs)).backward()
        optimizers.step()
        update_momentum(encoder, average, MOMENTUM)

    return step


def views(setup: Setup) -> Iterator[Entry]:
    """The steps side by side."""
    with tempfile.TemporaryDirectory() as folder:
        size = config_of(setup, Path(folder)).train.batch_size
        pictures = pictures_in(Path(folder), 2 * size)
        config = config_of(setup, Path(folder))
        with package(config) as run:
            half, feed, steps = run.precision == "bf16", run.feed(), itertools.count()
            calls: dict[str, Callable[[], Any]] = {
                "hjepa": lambda: run.step(next(steps), feed, logging=False),
                "its views": views_alone(run),
                "plain loop": Plain(config, pictures, half),
                "plain loop, attention written out": Plain(config, pictures, half, fused=False),
            }
            title = f"step of configs/photographs.yaml, batch {size}, {'bfloat16' if half else 'float32'}"
            try:
                calls["lightly"] = lightly_step(config, pictures, half)
            except ImportError:
                title += " (no row of lightly: it is not installed)"
            for count in setup.threads:
                entry = compare(
                    "views", title, calls, thread_count=count, rounds=setup.rounds(9), shortest=0,
                    at_most={"its views": VIEWS_SHARE}, at_least=dict.fromkeys(list(calls)[2:], 1.0),
                )  # fmt: skip
                yield entry | {"pictures": size}
