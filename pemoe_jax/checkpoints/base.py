"""Base models: one safetensors file with T5X's parameter names joined by '/'."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax

from pemoe_jax.checkpoints import runs
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError

CONFIG_KEY = "t5_config"  # in the file's metadata: the dimensions, as JSON


def save(
    path: str | os.PathLike[str], params: Any, config: Mapping[str, Any], dtype: Any = None
) -> None:
    """Writes a base to one file, beside and renamed.

    Args:
      path: of the file.
      params: nested dict of arrays.
      config: the dimensions, `T5Config.as_dict()`.
      dtype: what the arrays are rounded to; None: as they are.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        name: np.asarray(leaf if dtype is None else leaf.astype(dtype))
        for name, leaf in params_lib.flatten(params).items()
    }
    metadata = {CONFIG_KEY: json.dumps(dict(config)), "format": "pemoe_jax"}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.flax.save_file(arrays, str(beside), metadata=metadata)
    beside.rename(path)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(str(path), framework="flax")
    except FileNotFoundError as error:
        raise InputError(f"base model {path}: no such file") from error
    except Exception as error:  # the library's own type says too little about the file
        raise InputError(f"base model {path}: not a safetensors file ({error})") from error


def is_base(path: str | os.PathLike[str]) -> bool:
    """Whether the path names a base file (and not a run)."""
    return str(path).endswith(".safetensors")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The dimensions that a base states of itself (`T5Config`'s fields), or None."""
    if not is_base(path):
        return runs.read_record(str(path)).config
    with _open(Path(path)) as file:
        text = (file.metadata() or {}).get(CONFIG_KEY)
    return None if text is None else json.loads(text)


def load(path: str | os.PathLike[str], target: Any) -> dict[str, Any]:
    """Reads a base, strictly: every parameter of `target`, of its shape, and no other.

    Args:
      path: a file written by `save`, or the folder of a run that trained the whole model.
      target: tree of shapes (`jax.eval_shape` of the base's init).

    Returns:
      Nested dict of float32 arrays.

    Raises:
      InputError: no such file, not of the format, or not of the model's names and shapes.
    """
    if is_base(path):
        with _open(Path(path)) as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        source = params_lib.unflatten(flat)
    elif Path(path).is_dir():
        source, record, _ = runs.load_trainable(str(path))
        if record.adapters:
            raise InputError(
                f"base model {path}: expected a run of the whole model,"
                f" found one of method {record.method!r}, which holds adapters only"
            )
    else:
        raise InputError(
            f"base model {str(path)!r}: expected a .safetensors file, a run's folder or None,"
            " found neither"
        )
    tree = params_lib.place(source, target, f"base model {path}")
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
