"""One recipe, several position schemes, read at image sizes never trained on: what notebook 07 and the tour do.

    configs = scheme_configs(recipe, ["rope", "absolute"], ["data.name=openmoji"])
    train_all(configs, folder, parallel=2)
    rows = read_all(configs, folder, sizes=[32, 128])

All schemes share recipe, seed, pictures, crops and colours of every step; they differ in how a patch is told where it
is. Trainings run side by side, one process and one thread each, and go on where an earlier call was stopped.
Not covered: grids of recipes, which `hjepa.experiments.sweep` runs.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..build import build_encoders, load_split
from ..config import Config, as_dicts, check_alike, config_of, flat_config, load_config
from ..evaluate.baselines import BESIDE, baselines
from ..evaluate.dense import check_patches, dense_transfer, with_pixels
from ..evaluate.results import Row
from ..evaluate.transfer import resolution_transfer, with_strategy
from ..hub import load_run
from ..inputs import UserError, check_choice
from ..pretrained import list_pretrained, load_pretrained, trained_config
from ..train.log import FREE_ON_RESUME
from ..train.loop import train

SCHEMES = {  # rotation, learned position embedding, further settings
    "rope": (True, False, ()),
    "absolute": (False, True, ()),
    "hybrid": (True, True, ()),
    "sincos": (False, True, ("model.position_embedding=sincos",)),
    "none": (False, False, ()),
    "mixed": (True, False, ("model.rope.kind=mixed", "model.rope.theta=10")),
    "hybrid_mixed": (True, True, ("model.rope.kind=mixed", "model.rope.theta=10")),
}
PLACES = ("model.use_absolute", "model.position_embedding", "model.use_alibi", "model.rope.")
CONTROL = "none, shipped"
READ_AS = {"interpolate": "interpolated", "extrapolate": "extrapolated"}


def scheme_configs(
    recipe: str | Path | None, schemes: Sequence[str], overrides: Sequence[str] = ()
) -> dict[str, Config]:
    """The configs of a recipe file with each position scheme of SCHEMES; overrides come last.

    Raises:
        ValueError: an unknown scheme, with the nearest; a setting that `load_config` refuses.
    """
    configs = {}
    for name in schemes:
        check_choice("scheme", name, tuple(SCHEMES))
        rope, embedding, more = SCHEMES[name]
        switches = [f"model.rope.use_rope={str(rope).lower()}", f"model.use_absolute={str(embedding).lower()}"]
        configs[name] = load_config(recipe, [*switches, *more, *overrides])
    return configs


def train_all(
    configs: Mapping[str, Config], folder: str | Path, *, parallel: int = 1, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Train each config in folder/NAME, `parallel` at a time; returns their metrics by name, in order.

    A finished training is not repeated. With parallel above 1 each has a process of its own.
    """
    jobs = [(config, Path(folder) / name) for name, config in configs.items()]
    if parallel == 1 or len(jobs) == 1:
        return {run.name: train(config, run, resume=True, progress=progress) for config, run in jobs}
    with ProcessPoolExecutor(min(parallel, len(jobs)), get_context("spawn")) as pool:
        started = [pool.submit(_train, as_dicts(config), run) for config, run in jobs]
        return {run.name: job.result() for (_, run), job in zip(jobs, started, strict=True)}


def _train(tree: dict[str, Any], run: Path) -> dict[str, Any]:
    """`train` in a process of its own, from a config as plain values."""
    return train(config_of(tree, str(run)), run, resume=True, progress=False)


def readers(configs: Mapping[str, Config], folder: str | Path, strategies: Sequence[str] = ("interpolate",)) -> dict:
    """Name -> encoder: every trained one, relative positions once per strategy, and the first one's random start."""
    found: dict[str, Any] = {}
    for name in configs:
        encoder = load_run(Path(folder) / name)[0]
        if not encoder.strategies:
            found[f"{name}, resampled" if encoder.use_absolute else name] = encoder
            continue
        for strategy in [s for s in strategies if s in encoder.strategies] or encoder.strategies[:1]:
            found[f"{name}, {READ_AS.get(strategy, strategy)}"] = with_strategy(encoder, strategy)
    first = next(iter(configs.values()))
    return found | {"random init": build_encoders(first)[1].eval()}


def _control(configs: Mapping[str, Config]) -> dict[str, Any]:
    """The encoder of the package that had the recipe of `configs`, seed and all, without positions; {} if none had."""
    wanted = _recipe(next(iter(configs.values())))
    for name in list_pretrained():
        trained = trained_config(name)
        model = trained.model
        placed = model.rope.use_rope or model.use_absolute or model.use_alibi
        if not placed and _recipe(trained) == wanted:
            return {CONTROL: load_pretrained(name)}
    return {}


def _recipe(config: Config) -> dict[str, Any]:
    """What a training's result depends on, but for positions."""
    return {key: value for key, value in flat_config(config).items() if not key.startswith((*FREE_ON_RESUME, *PLACES))}


def read_all(
    configs: Mapping[str, Config],
    folder: str | Path,
    sizes: Sequence[Any],
    *,
    strategies: Sequence[str] = ("interpolate", "extrapolate"),
    split: str = "test",
    progress: bool = False,
    hits: dict[Any, Any] | None = None,
    dense: bool = False,
) -> list[Row]:
    """Rows of `resolution_transfer` for every trained encoder beside its random start and the simple baselines.

    Where an encoder without positions comes with the package that was trained as these were, it stands beside them.
    dense: also those of `dense_transfer`, for which all patches must have one side. sizes: pixels, beside the training
    size. hits receives which test pictures were right (`resolution_transfer`), for intervals over seeds and pictures
    together. Of moved pictures each test picture is read in evaluate.placements fixed places.

    Raises:
        ValueError: variants that differ in pictures or in settings of the reading, which are those of the first
            config, or one named like a baseline.
    """
    first, config = next(iter(configs.items()))
    for name, other in configs.items():
        check_alike(f"variant {name!r}", other, repr(first), config, sizes=False)
        if name in (*BESIDE, "chance", CONTROL):
            raise UserError(f"variant {name!r}: a baseline in the table has that name; give it another")
    size, options = config.data.image_size, as_dicts(config.evaluate)
    options.pop("sizes")
    places, workers = options.pop("placements"), config.train.num_workers
    known, asked = load_split(config, "train", read_at=sizes), load_split(config, split, repeats=places, read_at=sizes)
    simple = baselines(known, size, workers=workers)
    everybody = {**readers(configs, folder, strategies), **_control(configs), **simple}
    if dense:
        check_patches(with_pixels(everybody))
    rows = resolution_transfer(
        everybody, known, asked, train_size=size, sizes=sizes, refit=False, progress=progress, hits=hits,
        workers=workers, **options,
    )  # fmt: skip
    if not dense:
        return rows
    return rows + dense_transfer(with_pixels(everybody), known, asked, train_size=size, sizes=sizes, workers=workers)
