"""Frozen features read at any image size: readers, measures, rows of results, figures."""

import lazy_loader

HOMES = {
    "transfer": [
        *("StrategyView", "encode", "patch_grid", "pool_tokens", "raw_pixels"),
        *("resolution_transfer", "with_strategy"),
    ],
    "readers": ["knn_accuracy", "linear_probe", "probe_hits", "retrieval_hits"],
    "baselines": ["baselines", "best_side", "colour_histogram", "hog"],
    "primary": ["crossed_interval", "holm", "primary", "save_hits", "saved_hits"],
    "dense": ["RawPatches", "dense_transfer"],
    "collection": ["folder_features", "neighbours"],
    "published": ["PublishedEncoder", "published_encoder", "published_encoders"],
    "measures": [
        *("bootstrap_interval", "effective_rank", "feature_std"),
        *("jackknife_interval", "linear_cka", "one_thread"),
    ],
    "results": ["format_table", "rows_from_csv", "rows_to_csv", "size_pair", "size_text", "summarise"],
}
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=HOMES)
