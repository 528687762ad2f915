"""Writes opened models in the formats of `pemoe convert`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pemoe_jax.checkpoints import (
    adapter_file,
    huggingface,
    lazy_array,
    models,
    peft,
    upcycling,
)
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.checkpoints.models import OpenedModel
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import merging
from pemoe_jax.core import params as params_lib
from pemoe_jax.core import sparse as sparse_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.merging import KernelUpdate
from pemoe_jax.runtime import file_io
from pemoe_jax.runtime.file_io import AnyPath


def replace_base(source: OpenedModel, base_path: str) -> OpenedModel:
    """Records another copy of the base as the base of adapters.

    Args:
      source: the adapters.
      base_path: the copy, which is read as a whole.

    Returns:
      The adapters with a new record.

    Raises:
      InputError: the copy is not the base that the adapters were trained on.
    """
    assert source.record is not None
    base = base_lib.open_base(base_path)
    # The fingerprint is recorded too, because a PEFT adapter has none yet.
    identity = {**source.record.base, "path": base.path, **base.identity(source.model.config.dtype)}
    source.check_base(identity)
    record = dataclasses.replace(source.record, base=identity)
    return dataclasses.replace(source, record=record)


def write_adapter(source: OpenedModel, output: AnyPath) -> None:
    """Writes adapters in this package's format."""
    arrays, record = _load_adapter(source)
    # A PEFT adapter has no fingerprint of its base. From now on the adapter is checked against one.
    if record.base["fingerprint"] is None:
        assert source.base_path is not None
        identity = base_lib.open_base(source.base_path).identity(source.model.config.dtype)
        record = dataclasses.replace(record, base={**record.base, **identity})
    adapter_file.save_adapter(output, arrays, record, source.step)


def write_peft(source: OpenedModel, output: AnyPath, base_name: str | None) -> None:
    """Writes (IA)³ or LoRA in PEFT's format.

    Args:
      source: the adapters.
      output: the folder.
      base_name: name of the base in the file, for example on the Hugging Face Hub; None: its path.

    Raises:
      InputError: PEFT cannot express the adapters, or the run trained other parameters too.
    """
    arrays, record = _load_adapter(source)
    # TRAINABLE may select parameters of the base too, such as its norms.
    others = [path for path in arrays if not params_lib.is_adapter(path)]
    if others:
        raise InputError(
            f"{source.path}: PEFT's format can only hold adapters, but the run also trained"
            f" {others[0]}"
        )
    mlp_sites = [site for site in record.adapters if site in ("wi_0", "wi_1", "gate", "wo")]
    if source.model.sparse is not None and mlp_sites:
        # PEFT selects modules by name, and an expert's modules have the names of a dense MLP's.
        raise InputError(
            f"{source.path}: PEFT would adapt the experts as well: expected adapters at attention"
            f" alone in a sparse model, got {mlp_sites[0]}"
        )
    is_gated = len(source.model.config.mlp_activations) > 1
    peft.save_adapter(output, record.adapters, arrays, base_name or source.base_path, is_gated)


def _load_adapter(source: OpenedModel) -> tuple[dict[str, np.ndarray], Record]:
    """Reads the trained arrays of adapters; raises InputError for a whole model."""
    if source.record is None or not source.needs_base:
        raise InputError(
            f"{source.path}: expected adapters on a frozen base, got a whole model"
            " (for a whole model: convert huggingface, convert base)"
        )
    return jax.device_get(params_lib.flatten(source.load_trained())), source.record


def write_huggingface(source: OpenedModel, output: AnyPath, dtype: str | None) -> None:
    """Writes a whole model as a Hugging Face folder, in `dtype` or else in the stored dtypes."""
    arrays = _merged_arrays(source, dtype)
    with models.array_progress("writing", len(arrays)) as report:
        huggingface.save_checkpoint(
            output,
            arrays,
            activations=source.model.config.mlp_activations,
            sparse=source.model.sparse,
            vocabulary=_find_vocabulary(source),
            report=report,
        )


def _find_vocabulary(source: OpenedModel) -> epath.Path | None:
    """Returns the SentencePiece file in the folder of a model's base; None if it has none."""
    base = source.path if source.record is None else source.base_path or source.record.base["path"]
    file = None if base is None else file_io.resolve(base) / huggingface.VOCABULARY
    return file if file is not None and file.is_file() else None


def write_base(source: OpenedModel, output: AnyPath, dtype: str | None) -> None:
    """Writes a whole model as a single file, in `dtype` or else in the stored dtypes."""
    merged = _merged_arrays(source, dtype)
    arrays = {}
    with models.array_progress("reading", len(merged)) as report:
        for path, array in merged.items():
            arrays[path] = array.read()
            report(len(arrays))
    config = source.model.config.as_dict()
    sparse = sparse_lib.describe(source.model.sparse)
    base_lib.save_base(output, params_lib.unflatten(arrays), config, overwrite=False, sparse=sparse)


def _merged_arrays(source: OpenedModel, dtype: str | None) -> dict[str, LazyArray]:
    """Returns path -> array of a whole model; (IA)³ and LoRA are merged when an array is read.

    Raises:
      InputError: an adapter has a router, or belongs to another base; or its base is missing.
    """
    arrays: dict[str, LazyArray] = {}
    if source.record is None:
        arrays = base_lib.open_base(source.path).arrays
    elif source.needs_base:
        merging.check_mergeable(source.record.adapters)  # before the base is read
        if source.base_path is None:
            raise InputError(
                f"{source.path} was trained on random weights (seed {source.record.base['seed']}):"
                " pass a checkpoint of these weights with --base"
            )
        base = base_lib.open_base(source.base_path)
        base.check_activations(source.model.config.mlp_activations)
        source.check_base(base.identity(source.model.config.dtype))
        arrays = base.arrays
        if upcycled := source.record.base.get("upcycled"):
            arrays = upcycling.Upcycling(source.model, **upcycled).lazy_arrays(arrays)
    updates: dict[str, KernelUpdate] = {}
    if source.record is not None:
        trained = params_lib.flatten(source.load_trained())
        adapter = {path: array for path, array in trained.items() if params_lib.is_adapter(path)}
        is_gated = len(source.model.config.mlp_activations) > 1
        updates = merging.kernel_updates(source.record.adapters, adapter, is_gated)
        # Base parameters that the run trained replace the stored ones.
        others = trained.keys() - adapter.keys()
        arrays = arrays | {p: lazy_array.from_numpy(np.asarray(trained[p])) for p in others}
    missing = sorted(updates.keys() - arrays.keys())
    if missing:
        raise InputError(f"{source.path}: expected {missing[0]} in its base, got none")
    return {path: _merged(path, a, updates.get(path), dtype) for path, a in arrays.items()}


def _merged(
    path: str, array: LazyArray, update: KernelUpdate | None, dtype: str | None
) -> LazyArray:
    """Returns an array that, when it is read, is merged, cast and checked for finite values.

    Args:
      path: path of the array, for errors.
      array: the stored array.
      update: the function that merges the adapters into the array; None: it has no adapters.
      dtype: dtype of the result; None: the stored dtype.
    """
    if array.parts:  # an array of experts, which have no adapters to merge
        return lazy_array.stack([_merged(path, part, None, dtype) for part in array.parts])
    output_dtype = array.dtype if dtype is None else jnp.dtype(dtype)

    # The whole array is merged for any slice, because writers read whole arrays anyway.
    def read_slice(index: Index) -> np.ndarray:
        values = array.read()
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which raises below
            if update is not None:
                values = update(values.astype(np.float32))
            values = values.astype(output_dtype, copy=False)  # rounded once, after merging
        if not params_lib.is_array_finite(values):
            raise InputError(f"{path}: NaN or infinity as {output_dtype}: not written")
        return values[index]

    return LazyArray(array.shape, output_dtype, read_slice)
