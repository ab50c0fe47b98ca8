"""hjepa: rotary positions (RoPE) in a hierarchical joint-embedding predictive architecture on vision transformers.

Data flows one way, and so do imports; each line is a module, top to bottom:

    checks                             what callers hand to the layers, refused by name
    openmoji imagefiles sources data   pictures by name, at any image size
    masks                              patch grid -> context_idx, target_idx per level
    frequencies rotation rope          positions -> frequencies -> rotation table
    attention vit encoders             timm attention rotated; ContextEncoder, TargetEncoder
    predictor model                    queries (level, position) -> features; HJEPA and its loss
    reading tables rules config        YAML -> typed configuration
    schedule build                     config -> model, pictures and masks of step t
    sharding storage checkpoint        weights on disk, plain timm exports
    metrics evaluate                   frozen features -> kNN, probe, retrieval, rank at any size
    runlog train                       the training loop: hjepa.train.train
    runs notebooks sweep tour          notebooks over grids of parameters, fresh folders
    plots cli                          data in, matplotlib Axes out; the command line

Glossary. B batch, N tokens, D width; H and W the PATCH GRID (never pixels), height first everywhere. context_idx and
target_idx are row-major indices; is_masked is boolean, True = hidden. level l has cells of 2^l x 2^l patches. theta is
the base of the rotation frequencies. A strategy says which positions a grid of another size gets.
"""

import importlib
from typing import Any

_HOME = {
    "VisionRoPE2D": "rope",
    "RoPEAttentionWrapper": "attention",
    "ContextEncoder": "encoders",
    "TargetEncoder": "encoders",
    "create_encoder": "encoders",
    "Predictor": "predictor",
    "HJEPA": "model",
    "sample_masks": "masks",
    "load_data": "data",
    "load_config": "config",
    "load_run": "checkpoint",
    "resolution_transfer": "evaluate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import hjepa` and `hjepa --help` stay quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'hjepa' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
