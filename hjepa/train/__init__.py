"""Training: schedules, checkpoints, the log of a run, and the loop over them."""

import lazy_loader

HOMES = {
    "loop": ["TrainingDiverged", "train"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=HOMES)
