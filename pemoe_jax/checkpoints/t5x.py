"""Opens T5X checkpoints in both of their formats; reads only the parameters (`target`).

legacy   checkpoint_<step>/checkpoint         msgpack: an index of the arrays, small ones inline
         checkpoint_<step>/target.….kernel/   zarr, a folder per array
Orbax    checkpoint_<step>/state/             zarr `target.….kernel/`, with or without OCDBT
"""

import re
from collections.abc import Mapping

import msgpack
import numpy as np
from etils import epath
from flax import serialization, traverse_util

from pemoe_jax.checkpoints import lazy_array, tensorstore_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

INDEX = "checkpoint"  # file in every checkpoint of the legacy format
_PLACEHOLDER = "PLACEHOLDER://"


def step_of(name: str) -> int | None:
    """Returns the step in the folder name `checkpoint_<step>`; None for another name."""
    match = re.fullmatch(r"checkpoint_(\d+)", name)
    return int(match[1]) if match else None


def checkpoint_steps(folder: epath.Path) -> list[int]:
    """Returns the steps of the folders `checkpoint_<step>` in a folder, in ascending order."""
    return sorted(step for path in folder.iterdir() if (step := step_of(path.name)) is not None)


def open_checkpoint(folder: epath.Path) -> dict[str, LazyArray]:
    """Opens the `target` of a checkpoint in either format as path -> array.

    Raises:
      InputError: the folder is not a checkpoint, or is unreadable; it has no `target`; or its index
        names an array that is not in the folder.
    """
    state = tensorstore_file.orbax_state_folder(folder)
    if state is not None:
        return tensorstore_file.open_orbax(state, "target")
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder}: expected a T5X checkpoint, got none")
    try:
        contents = serialization.msgpack_restore(index.read_bytes())
        # The legacy format keeps the whole train state under `optimizer`.
        target = dict(contents.get("optimizer", contents)["target"])
        # A dict with a `driver` is a leaf: tensorstore's spec of one array.
        leaves = traverse_util.flatten_dict(target, is_leaf=lambda _, x: "driver" in x, sep="/")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,  # from an index that is nested too deeply
        msgpack.UnpackException,
    ) as error:
        raise InputError(
            f"{index}: expected a T5X index with a `target`, got something else"
            f" ({type(error).__name__}: {error})"
        ) from error
    # T5X writes an array as a zarr folder, but puts a small array into the index itself.
    names: dict[str, str] = {}
    arrays: dict[str, LazyArray] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, np.ndarray):
            arrays[path] = lazy_array.from_numpy(leaf)
        else:
            names[path] = file_io.child_path(folder, _zarr_name(leaf, index, path), INDEX).name
    return arrays | tensorstore_file.open_arrays(folder, file_io.url(folder), names, "zarr")


def _zarr_name(leaf: object, index: epath.Path, path: str) -> str:
    """Returns the name of an array's folder, the only part of an index entry that is used.

    The driver, bucket and absolute path in an entry are valid only on the machine that wrote it.
    """
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return leaf.removeprefix(_PLACEHOLDER)
    match leaf:
        case {"kvstore": {"path": str(name)}} | {"kvstore": Mapping(), "path": str(name)}:
            return name.rstrip("/")
    # The message has no value: `repr` of a deeply nested one would raise RecursionError.
    raise InputError(f"{index}: {path:.200}: expected an array, got {type(leaf).__name__}")
