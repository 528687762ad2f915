"""Runs the package's models in T5X: the objects that `gin/runs_t5x/` passes to T5X's programs.

    python -m t5x.train --gin_search_paths=gin --gin_file=models/t5_1_1_tiny.gin \\
        --gin_file=methods/mov.gin --gin_file=runs_t5x/finetune.gin --gin.MODEL_DIR=\\"/tmp/mov\\" …

No other part of the package imports T5X, which is on no package registry: `make t5x` installs it,
and `python -m pemoe_jax.t5x_bridge --check` reports what is missing.
"""

import importlib

# Name -> its module, imported at first access, so that this package imports without T5X.
_MODULES = {
    "EncoderDecoderModel": "model",
    "FrozenBase": "optimizer",
    **dict.fromkeys(["axis_rules", "replicate_uneven_axes"], "partitioner"),
    "TrainStateInitializer": "state",
    **dict.fromkeys(["Checkpoints", "checkpoint_path"], "checkpoints"),
    **dict.fromkeys(["get_dataset", "mixture_or_task", "vocabulary"], "data"),
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
