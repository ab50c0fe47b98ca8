"""Pictures by name, at any size. Knows nothing of the layers or of config."""

import lazy_loader

HOMES = {
    "images": ["DATASETS", "DatasetSpec", "ImageData", "Pictures", "TrainView", "load_data", "normalised"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=HOMES)
