"""T5X's checkpoints in its two formats; of each the parameters alone, its `target`.

legacy   checkpoint_<step>/checkpoint         msgpack: an index of arrays, small ones inline
         checkpoint_<step>/target.….kernel/   zarr, one folder an array
Orbax    checkpoint_<step>/state/             zarr `target.….kernel/`, in an OCDBT store or not

The optimiser's state is neither opened nor read.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
from etils import epath
from flax import serialization

from pemoe_jax.checkpoints import lazy_array, tensorstore_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

_INDEX = "checkpoint"
_PLACEHOLDER = "PLACEHOLDER://"


def is_legacy(folder: epath.Path) -> bool:
    """Whether a folder is a checkpoint of the legacy format."""
    return tensorstore_file.orbax_state_folder(folder) is None and (folder / _INDEX).is_file()


def open_orbax(folder: epath.Path) -> dict[str, LazyArray]:
    """Path -> array, of the `target` in an Orbax checkpoint.

    Raises:
      InputError: it is unreadable or has no `target`.
    """
    state = tensorstore_file.orbax_state_folder(folder)
    if state is None:
        raise InputError(f"{folder}: expected an Orbax checkpoint, found none")
    return tensorstore_file.open_orbax(state, "target")


def open_legacy(folder: epath.Path) -> dict[str, LazyArray]:
    """Path -> array, of the `target` in a checkpoint of the legacy format.

    Raises:
      InputError: the index is unreadable or names what is not in the folder.
    """
    index = folder / _INDEX
    try:
        contents = serialization.msgpack_restore(index.read_bytes())
        target = contents.get("optimizer", contents)["target"]
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise InputError(
            f"{index}: expected an index of T5X with a `target`, found something else"
            f" ({type(error).__name__}: {error})"
        ) from error
    named: dict[str, str] = {}
    arrays: dict[str, LazyArray] = {}
    for path, leaf in _leaves(target):
        if isinstance(leaf, np.ndarray):
            arrays[path] = lazy_array.from_numpy(leaf)
        else:
            named[path] = file_io.child_path(folder, _zarr_name(leaf, index, path), _INDEX).name
    return arrays | tensorstore_file.open_arrays(folder, file_io.url(folder), named, "zarr")


def _leaves(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(path, leaf); a dict with a `driver` is tensorstore's description of one array."""
    if isinstance(tree, Mapping) and "driver" not in tree:
        for name, below in tree.items():
            yield from _leaves(below, (*above, str(name)))
    else:
        yield "/".join(above), tree


def _zarr_name(leaf: Any, index: epath.Path, path: str) -> Any:
    """Where an array lies in the checkpoint's folder; of what the index says only this is used."""
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return leaf.removeprefix(_PLACEHOLDER)
    try:
        kvstore = leaf["kvstore"]
        name = kvstore["path"] if "path" in kvstore else leaf["path"]
        return name.rstrip("/")
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{index}: {path}: expected an array, found {leaf!r:.80}") from error


def checkpoint_steps(folder: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, by their names."""
    names = (os.fspath(child.name) for child in folder.iterdir())
    return sorted(
        int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint_(\d+)", name))
    )
