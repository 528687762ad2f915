"""Opens arrays in zarr format with tensorstore: those of Orbax and of T5X's legacy format.

Each array is a folder, local or `gs://`, or a prefix of keys in an OCDBT store, tensorstore's
database that packs many arrays into a few files. Opening an array reads only its metadata.
"""

import contextlib
import re
import textwrap
from collections.abc import Iterator, Mapping

import numpy as np
import tensorstore as ts
from etils import epath

from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

# A tensorstore key-value store: a URL, or a JSON spec.
KvStore = str | dict[str, str]

_DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}  # by the name of the metadata file


def orbax_state_folder(folder: epath.Path) -> epath.Path | None:
    """Returns the folder with the arrays of an Orbax checkpoint: `folder/state` or `folder`."""
    for candidate in (folder / "state", folder):
        if any((candidate / name).exists() for name in ("_METADATA", "manifest.ocdbt")):
            return candidate
    return None


def open_orbax(state: epath.Path, item: str) -> dict[str, LazyArray]:
    """Opens one item of an Orbax checkpoint as path -> array.

    Args:
      state: result of `orbax_state_folder`.
      item: part of the train state, the first part of the arrays' names: 'target' in T5X
        checkpoints, 'params' in checkpoints of this package.

    Raises:
      InputError: the store is unreadable, or has no arrays of this item.
    """
    base = file_io.url(state)
    has_ocdbt = (state / "manifest.ocdbt").exists()
    kvstore: KvStore = {"driver": "ocdbt", "base": base, "path": ""} if has_ocdbt else base
    with _one_line_errors(state):
        # This range has all keys that start with "target.", because '/' is the character after '.'.
        # The keys of the optimizer state are not listed.
        key_range = ts.KvStore.KeyRange(f"{item}.", f"{item}/")
        keys = [key.decode() for key in ts.KvStore.open(kvstore).result().list(key_range).result()]
    # Metadata files mark the arrays; the other keys are chunks.
    for suffix, driver in _DRIVERS.items():
        names = [key.removesuffix(suffix) for key in keys if key.endswith(suffix)]
        if names:
            by_path = {name.removeprefix(f"{item}.").replace(".", "/"): name for name in names}
            return open_arrays(state, kvstore, by_path, driver)
    raise InputError(f"{state}: expected arrays named {item}.…, got none")


def open_arrays(
    folder: epath.Path, kvstore: KvStore, names: Mapping[str, str], driver: str
) -> dict[str, LazyArray]:
    """Opens arrays as path -> array.

    All are opened concurrently, because opening one in remote storage takes a round trip.

    Args:
      folder: the checkpoint, for errors.
      kvstore: store that holds the arrays: the folder, or the OCDBT store in it.
      names: path -> name of the array in the store.
      driver: 'zarr' or 'zarr3'.

    Raises:
      InputError: an array is missing or unreadable.
    """
    context = ts.Context()
    # By default tensorstore reads a missing chunk as zeros, which would hide damage.
    spec = {"driver": driver, "fill_missing_data_reads": False}
    futures = {}
    for path, name in names.items():
        child = f"{kvstore}{name}/" if isinstance(kvstore, str) else {**kvstore, "path": f"{name}/"}
        futures[path] = ts.open(spec | {"kvstore": child}, open=True, read=True, context=context)
    return {path: _lazy_array(folder / names[path], future) for path, future in futures.items()}


def _lazy_array(path: epath.Path, future: "ts.Future[ts.TensorStore]") -> LazyArray:
    with _one_line_errors(path):
        array = future.result()

    def read_slice(index: Index) -> np.ndarray:
        with _one_line_errors(path):
            return array[index].read(order="C").result()

    return LazyArray(tuple(array.shape), array.dtype.numpy_dtype, read_slice)


@contextlib.contextmanager
def _one_line_errors(path: epath.Path) -> Iterator[None]:
    """Converts errors of tensorstore to an InputError of one line that names the path."""
    try:
        yield
    except (ValueError, OSError) as error:
        # Messages end with annotations such as [source locations='tensorstore/driver/driver.cc:…'].
        annotations = r"\s*\[source locations?=.*?\]|\[[a-z_]+='.*?'\]"
        text = re.sub(annotations, "", str(error), flags=re.S)
        short = textwrap.shorten(text, 300, placeholder="…")
        raise InputError(f"{path}: unreadable: {short}") from error
