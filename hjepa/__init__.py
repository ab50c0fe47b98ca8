"""hjepa: rotary positions (RoPE) in a hierarchical joint-embedding predictive architecture on vision transformers.

Data flows one way, and so do imports; each line is a place, top to bottom:

    inputs files                          names, sizes and files that people hand in; folders, locks, whole writes
    versions                              what made a result, for its record
    nn.checks                             what callers hand to the layers, refused by name
    nn.masks                              patch grid -> context_idx, target_idx per level
    nn.fused                              the rotation in half precision, one kernel on a GPU
    nn.frequencies nn.rotation nn.rope    positions -> frequencies -> rotation table
    nn.alibi                              its competitor: scores biased by distance
    nn.attention nn.vit nn.encoders       timm attention rotated; ContextEncoder, TargetEncoder
    nn.timm_rope                          the same rotation in timm's own rotary models
    nn.predictor nn.losses nn.hjepa       queries (level, position) -> features; what prevents collapse; HJEPA
    data.openmoji data.folder             drawings; image files and the folders they lie in
    data.index                            the files of a large folder, listed once in a mapped file
    data.sources data.moved               pictures as they are; each at a place of its own on a canvas
    data.views data.images                crops of whole batches; pictures by name, at any image size
    data.loading                          batches that loader processes make ahead
    config                                YAML -> typed configuration, every key with its range beside it
    train.schedule build                  config -> model, pictures and masks of step t
    train.sharding train.shards           a model cut over processes, its slices on disk
    train.checkpoint                      weights on disk, written whole or not at all
    hub pretrained                        load_run, exports; small encoders that come with the package
    evaluate.measures evaluate.readers    rank, spread, intervals; kNN, retrieval, linear probes
    evaluate.shown                        which pictures are read, and in how many places
    evaluate.processes                    processes that encode together
    evaluate.results evaluate.transfer    rows of results; frozen features -> accuracy at any size
    evaluate.resume                       a stopped evaluation goes on
    evaluate.primary                      comparisons fixed beforehand: paired, with intervals and p-values
    evaluate.baselines evaluate.dense     thumbnails, colour histogram, HOG; places read from patch tokens
    evaluate.published                    published encoders of timm, read like ours
    evaluate.collection                   a folder of pictures -> features and nearest neighbours
    train.whitening                       a fixed patch layer of principal components
    train.optimizer train.feed            AdamW and Muon; what a step feeds the model
    train.estimate                        what a step will cost, counted without numbers
    train.log train.loop                  the training loop: hjepa.train.train
    evaluate.plots                        data in, matplotlib Axes out
    experiments.notebooks                 a notebook with parameters, in its own process
    experiments.transfer                  one recipe, several position schemes, read at many sizes
    experiments.tour experiments.sweep    the main job; a grid of runs
    cli                                   the command line

Glossary. B batch, N tokens, D width; H and W the PATCH GRID (never pixels), height first everywhere. context_idx and
target_idx are row-major indices; is_masked is boolean, True = hidden. level l has cells of 2^l x 2^l patches. theta is
the base of the rotation frequencies. A strategy says which positions a grid of another size gets. A rotation table
holds cosines and sines; a position embedding is learned and added; rows are results. A run is one training with its
folder, or one execution of a sweep's notebook with its own. A reader (kNN, a probe) is fitted on frozen features; plain
timm is timm without this package.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import lazy_loader

# Public names are imported on first use, so that `import hjepa` and `hjepa --help` stay quick; __init__.pyi names them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Modules that had another place in version 0.1, under which they can still be imported.
_MOVED = {
    **{name: f"nn.{name}" for name in (
        "checks", "frequencies", "rope", "rotation", "attention", "vit", "encoders", "predictor", "masks",
    )},
    **{name: f"experiments.{name}" for name in ("sweep", "notebooks", "tour")},
    "model": "nn.hjepa", "sources": "data.sources", "imagefiles": "data.folder", "openmoji": "data.openmoji",
    "schedule": "train.schedule", "storage": "train.checkpoint", "sharding": "train.sharding", "runlog": "train.log",
    "checkpoint": "hub", "metrics": "evaluate", "tables": "evaluate.results", "plots": "evaluate.plots",
    "runs": "files", "reading": "files", "rules": "config",
}  # fmt: skip


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives `import hjepa.OLD` the module at its new place."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        known = package == __name__ and name in _MOVED
        return importlib.machinery.ModuleSpec(fullname, self, origin=_MOVED[name]) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f".{spec.origin}", __name__)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has put the old name's there


sys.meta_path.append(_Moved())
