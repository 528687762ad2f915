"""T5X drives our model: what `gin/runs_t5x/` hands to `t5x.train`, `t5x.eval` and `t5x.infer`.

    python -m t5x.train --gin_search_paths=gin --gin_file=models/t5_1_1_tiny.gin \\
        --gin_file=methods/mov.gin --gin_file=runs_t5x/finetune.gin --gin.MODEL_DIR=\\"/tmp/mov\\" …

Nothing else here imports T5X, which is on no package registry: `make t5x` installs it, and
`python -m pemoe_jax.t5x_bridge --check` says what is missing. Names below load their module when
they are asked for, so that this package imports without it.
"""

import importlib
from typing import Any

_MODULES = {
    "EncoderDecoderModel": "model",
    "FrozenBase": "optimizer",
    "PjitPartitioner": "partitioner",
    "axis_rules": "partitioner",
    "TrainStateInitializer": "state",
    "Checkpoints": "checkpoints",
    "checkpoint_path": "checkpoints",
    "get_dataset": "data",
    "mixture_or_task": "data",
    "vocabulary": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
