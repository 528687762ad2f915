"""Opens base models of any known format, and writes them as a single file.

Formats: T5X checkpoints (legacy and Orbax), Hugging Face folders, runs that trained the whole
model, and this package's single file: safetensors with the dimensions in its metadata. The arrays
of all formats are named by T5X's parameter paths, joined by '/'.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils import epath

from pemoe_jax.checkpoints import (
    adapter_file,
    device_arrays,
    dimensions,
    huggingface,
    lazy_array,
    runs,
    safetensors_file,
    t5x,
    tensorstore_file,
)
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import fingerprints
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.network import T5Config
from pemoe_jax.core.params import Params, PyTree
from pemoe_jax.runtime import atomic_write, checksums, file_io
from pemoe_jax.runtime.file_io import JsonObject

# Metadata keys of our single file. The values are JSON: the fields of `T5Config`, and those of
# `Sparse` if the model has sparse layers.
CONFIG_KEY, SPARSE_KEY = "t5_config", "sparse"
EXPECTED = (
    "a T5X checkpoint_<step> (or a folder of them), a Hugging Face folder,"
    " a .safetensors file that pemoe convert wrote, or a run that trained the whole model"
)
_BASE_KIND = "base model"
_PASS_FOLDER = "pass the folder that it is in"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model whose parameters are not read yet.

    Attributes:
      path: absolute path of the base, or of its newest checkpoint if it is a folder of them.
      format: name of the format, for messages and records.
      arrays: parameter path -> array.
      stored_config: the fields of `T5Config` that the checkpoint states.
      stored_sparse: the fields of `Sparse` that the checkpoint states; None or empty if it states
        none.
    """

    path: str
    format: str
    arrays: dict[str, LazyArray]
    stored_config: JsonObject = dataclasses.field(default_factory=dict)
    stored_sparse: JsonObject | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays, path -> shape."""
        return {path: array.shape for path, array in self.arrays.items()}

    @functools.cached_property
    def sparse(self) -> JsonObject | None:
        """The known fields of `Sparse`; None for a dense model.

        Fields that are inferred from the shapes replace stored ones.
        """
        inferred = dimensions.infer_sparse(self.shapes, str(self))
        return None if inferred is None else {**(self.stored_sparse or {}), **inferred}

    def model_dimensions(self, gin_config: T5Config | None = None) -> JsonObject:
        """Returns the fields of `T5Config` that the arrays determine, and the activations.

        Shapes determine only the number of activations. Their names are those that the checkpoint
        states, else those of the gin files, else those of T5 v1.1 (two) or 1.0 (one). Names whose
        number is wrong are skipped.

        Args:
          gin_config: the `T5Config` of the gin files, or None without gin files.

        Raises:
          InputError: see `dimensions.infer`; or the checkpoint states `logits_via_embedding=False`
            but has no `decoder/logits_dense/kernel`.
        """
        inferred = dimensions.infer(self.shapes, str(self))
        activations = self._stated_activations()
        if activations is None and gin_config is not None:
            activations = gin_config.mlp_activations
        if activations is not None and len(activations) == len(inferred["mlp_activations"]):
            inferred["mlp_activations"] = activations
        if inferred["logits_via_embedding"] and not self.stored_config.get(
            "logits_via_embedding", True
        ):
            raise InputError(
                f"{self}: expected decoder/logits_dense/kernel, as logits_via_embedding is False,"
                " got none"
            )
        return inferred

    def _stated_activations(self) -> tuple[str, ...] | None:
        """Returns the activations that the checkpoint states; None if it states no usable ones.

        They are usable if they are strings, one for each input projection of an MLP.
        """
        stated = self.stored_config.get("mlp_activations")
        names = tuple(stated) if isinstance(stated, (list, tuple)) else ()
        inferred = dimensions.infer(self.shapes, str(self))["mlp_activations"]
        are_strings = all(isinstance(name, str) for name in names)
        return names if are_strings and len(names) == len(inferred) else None

    def check_activations(self, activations: tuple[str, ...]) -> None:
        """Raises InputError if the base states other activations than the given ones of a model."""
        # A different number of activations changes shapes, which `load` reports.
        stated = self._stated_activations()
        if stated is not None and len(stated) == len(activations) and stated != activations:
            raise InputError(
                f"T5Config.mlp_activations must be {stated}, as in the {self}, got {activations}"
            )

    def config(self, gin_config: T5Config | None = None) -> JsonObject:
        """Returns all known fields of `T5Config`; see `model_dimensions` for the argument."""
        # The arrays' dimensions take precedence, because users may edit a stored configuration.
        return {**self.stored_config, **self.model_dimensions(gin_config)}

    def load(
        self,
        target: Params,
        report: Callable[[int], None] = lambda _: None,
        transform: Callable[[str, jax.Array], PyTree] = params_lib.identity,
        value_checksums: dict[str, tuple[str, int]] | None = None,
    ) -> dict[str, PyTree]:
        """Loads the parameters of `target`; see `device_arrays.load_arrays`."""
        # Dimensions are compared before arrays, because "mlp_dim 32, got 16" tells a user more than
        # an error that lists 3 of 500 wrong shapes.
        shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(target).items()}
        expected = dimensions.infer(shapes, "the model") | _sparse_sizes(shapes, "the model")
        actual = dimensions.infer(self.shapes, str(self)) | _sparse_sizes(self.shapes, str(self))
        wrong = [
            f"{name} {value}, got {actual[name]}"
            for name, value in expected.items()
            if name in actual and actual[name] != value
        ]
        if wrong:
            raise InputError(f"{self} has another size: expected {'; '.join(wrong)}")
        return device_arrays.load_arrays(
            self.arrays, target, str(self), report, transform, value_checksums
        )

    def fingerprint(self) -> str:
        """Returns `params.fingerprint` of the arrays; reads them one at a time."""
        return self.identity("float32")["fingerprint"]

    def identity(self, dtype: str) -> dict[str, str]:
        """Returns the fingerprint and the checksum of the arrays; reads them one at a time.

        The fingerprint covers up to 64 values of each array as bfloat16. The checksum covers all
        values, in the dtypes in which a frozen base is loaded.

        Args:
          dtype: dtype of activations, in which most frozen arrays are loaded.
        """
        samples, crcs = {}, {}
        for path, lazy in self.arrays.items():
            array = lazy.read()
            samples[path] = array.shape, params_lib.sample_array(array)
            values = array.astype(params_lib.frozen_dtype(path, dtype), copy=False)
            crcs[path] = lazy_array.checksum(lazy, values)
        fingerprint = fingerprints.hash_samples(samples)
        return {"fingerprint": fingerprint, "checksum": checksums.join(crcs)}

    def __str__(self) -> str:
        return f"base model {self.path} ({self.format})"


def _sparse_sizes(shapes: dimensions.Shapes, source: str) -> JsonObject:
    """Returns the sizes of the experts under their gin names, for the error of `load`.

    A dense model has NUM_EXPERTS 'none (dense)'.
    """
    sparse = dimensions.infer_sparse(shapes, source)
    if sparse is None:
        return {"NUM_EXPERTS": "none (dense)"}
    return {name.upper(): value for name, value in sparse.items()}


def open_base(
    path: str | os.PathLike[str], kind: str = _BASE_KIND, expected: str = EXPECTED
) -> BaseModel:
    """Detects the format of a path and opens it, without reading any parameters.

    Args:
      path: local or `gs://`.
      kind: what the caller opens, such as 'base model'; begins the errors.
      expected: the formats that the caller accepts, for errors.

    Raises:
      InputError: the path does not exist, is not a base model, is damaged, or cannot be reached.
    """
    resolved = file_io.resolve(path)
    with file_io.remote_errors(resolved):
        if not resolved.exists():
            raise InputError(f"{kind} {path}: no such file or folder{_hub_hint(path)}")
        if resolved.is_dir():
            return _open_folder(resolved, kind, expected)
        if resolved.suffix == ".safetensors" and resolved.name != adapter_file.WEIGHTS:
            return _open_single_file(resolved, kind)
    got = "an adapter" if resolved.name == adapter_file.WEIGHTS else "a file"
    hint = f": {_PASS_FOLDER}" if resolved.suffix == ".bin" else ""
    raise InputError(f"{kind} {resolved}: expected {expected}, got {got}{hint}")


def _open_folder(folder: epath.Path, kind: str, expected: str) -> BaseModel:
    # Checked before T5X's formats, because the checkpoint of a run is also an Orbax checkpoint.
    if (folder / "record").is_dir():
        return _open_run(folder)
    path = os.fspath(folder)
    if huggingface.is_checkpoint(folder):
        arrays = huggingface.open_checkpoint(folder)
        activations = huggingface.read_activations(folder, arrays)
        return BaseModel(path, "Hugging Face", arrays, {"mlp_activations": activations})
    is_orbax = tensorstore_file.orbax_state_folder(folder) is not None
    if is_orbax or (folder / t5x.INDEX).is_file():
        name = "T5X, Orbax" if is_orbax else "T5X, legacy"
        return BaseModel(path, name, t5x.open_checkpoint(folder))
    if steps := t5x.checkpoint_steps(folder):
        newest = folder / f"checkpoint_{steps[-1]}"
        if newest.is_dir():
            return _open_folder(newest, kind, expected)
    raise InputError(f"{kind} {folder}: expected {expected}, got {_describe_folder(folder)}")


def _describe_folder(folder: epath.Path) -> str:
    names = {child.name for child in folder.iterdir()}
    if adapter_file.is_adapter(folder) or "adapter_model.safetensors" in names:
        return "an adapter"
    if "config.json" in names:
        return "a config.json without model.safetensors, its index or pytorch_model.bin"
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return "weights without a config.json"
    return f"a folder with {', '.join(sorted(names)[:3])}" if names else "an empty folder"


def _hub_hint(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    # Names on the Hub look like relative paths: google/t5-large-lm-adapt
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        return ""
    return f" (a model on the Hugging Face Hub? hf download {text} --local-dir DIR, then pass DIR)"


def _open_single_file(path: epath.Path, kind: str) -> BaseModel:
    arrays, metadata = safetensors_file.open_file(path)
    # A file without our metadata is accepted: `load` checks its names. The files that users pass
    # by mistake are refused here, with a hint.
    if CONFIG_KEY not in metadata:
        if any(name.startswith("base_model.model.") for name in arrays):
            if kind == _BASE_KIND:
                raise InputError(
                    f"{kind} {path}: a PEFT adapter is not a base model: pass the base that it"
                    " adapts"
                )
            raise InputError(f"{kind} {path}: got a PEFT adapter: {_PASS_FOLDER}")
        if "shared.weight" in arrays:
            raise InputError(f"{kind} {path}: got weights of Hugging Face: {_PASS_FOLDER}")
        if arrays and all(map(params_lib.is_adapter, arrays)):
            raise InputError(
                f"{kind} {path}: got an adapter: pass the folder of {adapter_file.WEIGHTS}"
            )
    stated: dict[str, JsonObject] = {}
    for key in (CONFIG_KEY, SPARSE_KEY):
        try:
            stated[key] = dict(file_io.parse_json(metadata.get(key, "{}")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{kind} {path}: unreadable {key} ({error})") from error
    return BaseModel(os.fspath(path), "pemoe_jax", arrays, stated[CONFIG_KEY], stated[SPARSE_KEY])


def _open_run(folder: epath.Path) -> BaseModel:
    arrays, record, _ = runs.open_trained(os.fspath(folder))
    # A run with adapters is refused even if it trained the whole model: as a base, it would lose
    # its adapters.
    if record.adapters or record.base["needed"]:
        reason = "saves only what it trained" if record.base["needed"] else "has adapters"
        raise InputError(
            f"base model {folder}: expected a run that trained the whole model, got one of method"
            f" {record.method!r}, which {reason}"
        )
    name = f"run of {record.method}"
    return BaseModel(os.fspath(folder), name, arrays, record.config, record.sparse)


def save_base(
    path: str | os.PathLike[str],
    params: Params,
    config: Mapping[str, object],
    overwrite: bool = True,
    sparse: Mapping[str, object] | None = None,
) -> None:
    """Writes a base model, whose arrays are all in memory, as a single file.

    Args:
      path: the file.
      params: nested dict of arrays.
      config: the fields of the model's `T5Config` (`as_dict()`), or at least its dimensions.
      overwrite: whether to replace an existing file.
      sparse: the model's `Sparse` settings, from `core.sparse.describe`; None for a dense model.

    Raises:
      InputError: the file exists, and `overwrite` is False.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in params_lib.flatten(params).items()}
    metadata = {CONFIG_KEY: json.dumps(dict(config)), "format": "pemoe_jax"}
    if sparse is not None:
        metadata[SPARSE_KEY] = json.dumps(dict(sparse))
    with atomic_write.temporary_path(path, overwrite) as file:
        safetensors_file.save_file(file, arrays, metadata)
