"""Runs T5X's and this package's programs in the process, with the gin files and users' flags."""

import contextlib
import importlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np

GIN = pathlib.Path(__file__).parents[2] / "gin"
# H * K = 12 differs from D = 16.
DIMENSIONS = {
    "network.T5Config.emb_dim": 16,
    "network.T5Config.num_heads": 2,
    "network.T5Config.head_dim": 6,
    "network.T5Config.mlp_dim": 20,
    "network.T5Config.num_encoder_layers": 1,
    "network.T5Config.num_decoder_layers": 1,
    "VOCAB_SIZE": 192,
}


def bindings(settings: dict) -> list[str]:
    """Returns gin bindings of Python values and references (`@…`)."""
    return [
        f"{name} = {value if str(value).startswith('@') else repr(value)}"
        for name, value in settings.items()
    ]


@contextlib.contextmanager
def parsed(program: str, files: list[str], **settings) -> Iterator[Callable]:
    """Parses gin files and settings as `python -m t5x.<program>`; yields its function."""
    import gin
    from t5x import gin_utils

    module = importlib.import_module(f"t5x.{program}")
    function = getattr(module, {"eval": "evaluate"}.get(program, program))
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module  # run files import it, as T5X's do
    try:
        gin.clear_config()
        gin_utils.parse_gin_flags(
            [str(GIN), *module._DEFAULT_GIN_SEARCH_PATHS], files, bindings(settings)
        )
        yield gin.get_configurable(function)
    finally:
        sys.modules["__main__"] = before
        gin.clear_config()


def t5x(program: str, files: list[str], **settings):
    """Runs `python -m t5x.<program>`; returns (step, state) for `train`, else None."""
    with parsed(program, files, **settings) as function:
        return function()


def pemoe(command: str, files: list[str], **settings) -> None:
    """Runs `python -m pemoe_jax.<command>`, which must succeed."""
    main = importlib.import_module(f"pemoe_jax.{command}").main
    flags = [f"--gin_file={file}" for file in files]
    assert main([*flags, *(f"--gin_bindings={line}" for line in bindings(settings))]) == 0


def read_tensorboard(
    folder: pathlib.Path, collection: str = "train"
) -> dict[int, dict[str, float]]:
    """Returns step -> scalars by name, from TensorBoard's files in the order of writing."""
    import tensorflow as tf

    scalars: dict[int, dict[str, float]] = {}
    for file in sorted((folder / collection).glob("events.*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                array = tf.make_ndarray(value.tensor)
                if array.dtype != object:
                    scalars.setdefault(event.step, {})[value.tag] = float(array)
    return {step: by_name for step, by_name in scalars.items() if "loss" in by_name}


def read_metrics(folder: pathlib.Path) -> dict[int, dict[str, float]]:
    """Returns step -> scalars of `pemoe train`."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if "train/loss" in row}


def flat(tree) -> dict[str, np.ndarray]:
    """Returns path -> numpy array."""
    from pemoe_jax.core import params

    return {path: np.asarray(leaf) for path, leaf in params.flatten(tree).items()}
