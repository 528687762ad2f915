"""Base models: whatever a path holds, opened as arrays under T5X's names joined by '/'.

Known: T5X's checkpoints (legacy and Orbax), folders of Hugging Face, runs of ours that trained the
whole model, and our own single file, safetensors with the dimensions in its metadata.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from pemoe_jax.checkpoints import (
    adapter_file,
    dimensions,
    huggingface,
    lazy_array,
    runs,
    safetensors_file,
    t5x,
    tensorstore_file,
)
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

CONFIG_KEY = "t5_config"  # in our file's metadata: the dimensions, as JSON
EXPECTED = (
    "a T5X checkpoint_<step> (or the folder of some), a Hugging Face folder,"
    " a .safetensors file of ours or a run that trained the whole model"
)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base that has been found and not read.

    Attributes:
      path: absolute, the newest checkpoint of a folder of some.
      format: of the checkpoint, in words.
      arrays: path -> array, as stored.
      stated: fields of `T5Config` that the checkpoint states itself.
    """

    path: str
    format: str
    arrays: dict[str, LazyArray]
    stated: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Fields of `T5Config`: the dimensions of the arrays, and what the checkpoint states."""
        found = dimensions.infer(self.shapes(), str(self))
        return {**self.stated, **found}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape."""
        return {path: array.shape for path, array in self.arrays.items()}

    def load(
        self,
        target: Any,
        report: Callable[[int], None] = lambda _: None,
        made: Callable[[str, Any], Any] = params_lib.identity,
    ) -> dict[str, Any]:
        """Every parameter of `target`, in its type and sharding, and no other.

        Args:
          target: tree of `jax.ShapeDtypeStruct`.
          report: called with the number of arrays that are read.
          made: (path, array) -> what it is kept as.

        Raises:
          InputError: names what is missing, extra, of another shape, unreadable or not finite.
        """
        self._check_dimensions(target)
        return lazy_array.load_arrays(self.arrays, target, str(self), report, made)

    def fingerprint(self) -> str:
        """`params.fingerprint` of the arrays, read one by one."""
        return params_lib.fingerprint_samples(
            {
                path: (array.shape, params_lib.sample_array(array.read()))
                for path, array in self.arrays.items()
            }
        )

    def _check_dimensions(self, target: Any) -> None:
        """Another size is told by its dimensions, and not by three of five hundred arrays."""
        shapes = {path: tuple(want.shape) for path, want in params_lib.flatten(target).items()}
        found, wanted = self.config(), dimensions.infer(shapes, "the model")
        wrong = [
            f"{name} {value}, found {found[name]}"
            for name, value in wanted.items()
            if found[name] != value
        ]
        if wrong:
            raise InputError(f"{self} is of another size: expected {'; '.join(wrong)}")

    def __str__(self) -> str:
        return f"base model {self.path} ({self.format})"


def open_base(path: str | os.PathLike[str]) -> BaseModel:
    """Finds out what a path holds; no parameter is read.

    Raises:
      InputError: nothing is there, or nothing that is a base, or it cannot be reached.
    """
    place = file_io.resolve(path)
    with file_io.remote_errors(place):
        if not place.exists():
            raise NotABaseModel(f"base model {path}: no such file or folder{_hub_hint(path)}")
        return _open(place)


class NotABaseModel(InputError):
    """There is nothing that is a base, nor a damaged one."""


def _open(place: epath.Path) -> BaseModel:
    if not place.is_dir():
        if place.suffix == ".safetensors":
            return _own_file(place)
        hint = f": {_FOLDER_INSTEAD}" if place.suffix == ".bin" else ""
        raise NotABaseModel(f"base model {place}: expected {EXPECTED}, found a file{hint}")
    if (place / "record").is_dir():
        return _run(place)
    if huggingface.is_checkpoint(place):
        return BaseModel(os.fspath(place), "Hugging Face", huggingface.open_checkpoint(place))
    if tensorstore_file.orbax_state_folder(place) is not None:
        return BaseModel(os.fspath(place), "T5X, Orbax", t5x.open_orbax(place))
    if t5x.is_legacy(place):
        return BaseModel(os.fspath(place), "T5X, legacy", t5x.open_legacy(place))
    if steps := t5x.checkpoint_steps(place):
        return _open(place / f"checkpoint_{steps[-1]}")
    raise NotABaseModel(f"base model {place}: expected {EXPECTED}, found {_what_else(place)}")


_FOLDER_INSTEAD = "name the folder that it is in"


def _what_else(folder: epath.Path) -> str:
    """What a folder holds that is no base, for whoever expected one."""
    names = {child.name for child in folder.iterdir()}
    if adapter_file.is_adapter(folder) or "adapter_model.safetensors" in names:
        return "an adapter"
    if "config.json" in names:
        return "a config.json without model.safetensors, its index or pytorch_model.bin"
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return "files of arrays without a config.json"
    return "an empty folder" if not names else f"none of them ({', '.join(sorted(names)[:3])})"


def _hub_hint(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        return ""
    return f" (a name on the Hugging Face Hub? hf download {text} --local-dir DIR, then name DIR)"


def _own_file(path: epath.Path) -> BaseModel:
    if path.name == adapter_file.WEIGHTS:
        raise NotABaseModel(f"base model {path}: expected {EXPECTED}, found an adapter")
    arrays, metadata = safetensors_file.open_file(path)
    if CONFIG_KEY not in metadata:
        if any(name.startswith("base_model.model.") for name in arrays):
            raise NotABaseModel(f"base model {path}: found an adapter of PEFT's: {_FOLDER_INSTEAD}")
        if "shared.weight" in arrays:
            raise NotABaseModel(f"base model {path}: a file of Hugging Face's: {_FOLDER_INSTEAD}")
        if arrays and all(map(params_lib.is_adapter, arrays)):
            raise NotABaseModel(
                f"base model {path}: found an adapter: name the folder that"
                f" {adapter_file.WEIGHTS} is in"
            )
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
        return BaseModel(os.fspath(path), "pemoe_jax", arrays, dict(config))
    except (ValueError, TypeError) as error:
        raise InputError(f"base model {path}: unreadable {CONFIG_KEY} ({error})") from error


def _run(folder: epath.Path) -> BaseModel:
    arrays, record, _ = runs.open_trainable(os.fspath(folder))
    if record.adapters:
        raise InputError(
            f"base model {folder}: expected a run of the whole model,"
            f" found one of method {record.method!r}, which holds adapters only"
        )
    return BaseModel(os.fspath(folder), f"run of {record.method}", arrays, record.config)


def save_base(
    path: str | os.PathLike[str],
    params: Any,
    config: Mapping[str, Any],
    dtype: Any = None,
    overwrite: bool = True,
) -> None:
    """Writes a base to one file of ours; all of it is in memory meanwhile.

    Args:
      path: of the file.
      params: nested dict of arrays.
      config: `T5Config.as_dict()`, or the dimensions.
      dtype: what the arrays are rounded to; None: as they are.
      overwrite: replaces what is there.

    Raises:
      InputError: something is there, without `overwrite`.
    """
    arrays = {
        name: np.asarray(leaf if dtype is None else leaf.astype(dtype))
        for name, leaf in params_lib.flatten(params).items()
    }
    metadata = {CONFIG_KEY: json.dumps(dict(config)), "format": "pemoe_jax"}
    with atomic_write.temporary_path(path, overwrite) as beside:
        safetensors_file.save_file(beside, arrays, metadata)
