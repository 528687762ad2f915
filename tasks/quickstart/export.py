"""Writes a pretraining run as the quickstart's base: one safetensors file, in half precision.

python -m pemoe_jax.tasks.quickstart.export MODEL_DIR base.safetensors
"""

from __future__ import annotations

import argparse
import pathlib

import jax.numpy as jnp

from pemoe_jax.checkpoints import base, runs
from pemoe_jax.core import network


def export(model_dir: str, path: pathlib.Path) -> None:
    """The newest checkpoint of a run that trained the whole model, in float16, to one file."""
    config = network.T5Config(**runs.read_record(model_dir).config)
    params = base.load(model_dir, network.param_shapes(network.Transformer(config)))
    base.save(path, params, config.as_dict(), jnp.float16)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write a pretraining run as one safetensors file.")
    parser.add_argument("model_dir")
    parser.add_argument("path", type=pathlib.Path)
    args = parser.parse_args()
    export(args.model_dir, args.path)


if __name__ == "__main__":
    main()
