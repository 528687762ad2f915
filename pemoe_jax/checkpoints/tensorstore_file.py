"""Arrays that tensorstore keeps as zarr, a folder each or in an OCDBT store; Orbax's checkpoints.

Local or `gs://`. Opening reads the descriptions alone.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

_SUFFIXES = {"/.zarray": "zarr", "/zarr.json": "zarr3"}


def orbax_state_folder(folder: epath.Path) -> epath.Path | None:
    """The folder of the arrays, where `folder` is an Orbax checkpoint or that folder itself."""
    for found in (folder / "state", folder):
        if any((found / name).exists() for name in ("_METADATA", "manifest.ocdbt")):
            return found
    return None


def open_orbax(state: epath.Path, item: str) -> dict[str, LazyArray]:
    """Path -> array, of one item of an Orbax checkpoint.

    Args:
      state: as `orbax_state` finds it.
      item: 'target' in T5X's, 'params' in ours.

    Raises:
      InputError: the store is unreadable, or has no such item.
    """
    base = file_io.url(state)
    ocdbt = (state / "manifest.ocdbt").exists()
    kvstore: Any = {"driver": "ocdbt", "base": base, "path": ""} if ocdbt else base
    try:
        # from `target.` up to but not including `target/`, the next character
        within = ts.KvStore.KeyRange(f"{item}.", f"{item}/")
        keys = [key.decode() for key in ts.KvStore.open(kvstore).result().list(within).result()]
    except (ValueError, OSError) as error:
        raise InputError(f"{state}: unreadable: {_short(error)}") from error
    for suffix, driver in _SUFFIXES.items():
        names = [key.removesuffix(suffix) for key in keys if key.endswith(suffix)]
        if names:
            named = {name.removeprefix(f"{item}.").replace(".", "/"): name for name in names}
            return open_arrays(state, kvstore, named, driver)
    raise InputError(f"{state}: expected arrays named {item}.…, found none")


def open_arrays(
    folder: epath.Path, kvstore: Any, named: Mapping[str, str], driver: str
) -> dict[str, LazyArray]:
    """Path -> array; all are opened at once, since each is a wait where they are far away.

    Args:
      folder: names the checkpoint in errors.
      kvstore: tensorstore's, of the folder or of the store in it.
      named: path -> name of the array in it.
      driver: 'zarr' or 'zarr3'.

    Raises:
      InputError: an array is missing or unreadable.
    """
    context = ts.Context()
    waiting = {
        path: ts.open(
            {
                "driver": driver,
                "kvstore": _below(kvstore, f"{name}/"),
                # else a chunk that is missing reads as zeros
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
            context=context,
        )
        for path, name in named.items()
    }
    return {path: _stored(folder / named[path], future) for path, future in waiting.items()}


def _below(kvstore: Any, name: str) -> Any:
    return kvstore + name if isinstance(kvstore, str) else {**kvstore, "path": name}


def _stored(path: epath.Path, future: Any) -> LazyArray:
    try:
        array = future.result()
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: unreadable: {_short(error)}") from error
    return LazyArray(
        tuple(array.shape), array.dtype.numpy_dtype, functools.partial(_read, array, path)
    )


def _read(array: Any, path: epath.Path, index: Index) -> np.ndarray:
    try:
        return array[index].read(order="C").result()
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: unreadable: {_short(error)}") from error


def _short(error: BaseException) -> str:
    """Tensorstore's message without the places in its source, at most some lines of a terminal."""
    text = re.sub(r"\s*\[source locations?=.*?\]|\[[a-z_]+='.*?'\]", "", str(error), flags=re.S)
    first = " ".join(text.split())
    return first if len(first) <= 300 else f"{first[:300]}…"
