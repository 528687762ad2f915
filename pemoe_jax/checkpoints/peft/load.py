"""Loading of adapters that PEFT saved."""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pemoe_jax.checkpoints import safetensors_file, torch_pickle
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.peft import config as config_lib
from pemoe_jax.checkpoints.peft import names
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io
from pemoe_jax.runtime.file_io import JsonObject

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with an adapter_config.json."""
    return (file_io.resolve(path) / CONFIG).exists()


def base_model_name(folder: str | os.PathLike[str]) -> str:
    """Returns the base model that an adapter names: a path, or a name on the Hugging Face Hub.

    Raises:
      InputError: the adapter names none.
    """
    config = file_io.resolve(folder) / CONFIG
    name = file_io.read_json(config).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{config}: base_model_name_or_path: expected the base's path, got {name!r}: pass the"
            " base (INITIAL_CHECKPOINT_PATH, or --base of pemoe convert)"
        )
    return name


def method_name(description: names.Description) -> str:
    """Returns the method, 'ia3' or 'lora', of a description from `load_adapter`."""
    kinds = {settings["kind"] for settings in description.values()}
    return "ia3" if kinds == {"VectorExperts"} else "lora"


def load_adapter(
    folder: str | os.PathLike[str], dimensions: Mapping[str, int]
) -> tuple[dict[str, JsonObject], dict[str, np.ndarray]]:
    """Loads a folder that PEFT's `save_pretrained` wrote.

    Args:
      folder: local or `gs://`.
      dimensions: dimensions of the base, under the field names of `T5Config`.

    Returns:
      (adapters as `core.adapters.describe` returns them, path -> float32 array). With
      `use_rslora` our alpha is PEFT's times √rank, so that the factor alpha / rank is the same.

    Raises:
      InputError: our adapters cannot express a setting; a tensor is missing in a layer, extra, of
        another shape, unreadable or not finite.
    """
    resolved = file_io.resolve(folder)
    config = file_io.read_json(resolved / CONFIG)
    config_lib.check_config(resolved / CONFIG, config)
    tensors = _open_tensors(resolved)
    num_layers = {stack: dimensions[f"num_{stack}_layers"] for stack in names.STACKS}
    # Nothing is read yet: shapes alone determine the adapters.
    description = config_lib.describe(resolved / CONFIG, config, tensors, num_layers)
    arrays = names.adapter_arrays(description, num_layers)
    sizes = {
        "embed": dimensions["emb_dim"],
        "heads": dimensions["num_heads"],
        "kv": dimensions["head_dim"],
        "joined_kv": dimensions["num_heads"] * dimensions["head_dim"],
        "mlp": dimensions["mlp_dim"],
    }
    target = {a.peft_name: jax.ShapeDtypeStruct(a.peft_shape(sizes), jnp.float32) for a in arrays}
    params_lib.check_matches(tensors, target, f"adapter {resolved}")
    values = {name: _read(resolved, name, tensor) for name, tensor in tensors.items()}
    params_lib.check_finite(values, f"adapter {resolved}")
    return description, {a.path: a.from_peft(values[a.peft_name], sizes) for a in arrays}


def _open_tensors(folder: epath.Path) -> dict[str, LazyArray]:
    # If both files exist PEFT loads the safetensors file.
    if (folder / WEIGHTS).exists():
        tensors, _ = safetensors_file.open_file(folder / WEIGHTS)
    elif (folder / PICKLED_WEIGHTS).exists():
        tensors = torch_pickle.open_file(folder / PICKLED_WEIGHTS)
    else:
        raise InputError(f"{folder}: expected {WEIGHTS} or {PICKLED_WEIGHTS}, got neither")
    # With and without the adapter's name, both forms could name one tensor.
    stripped = {names.strip_adapter_name(name): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        duplicate = next(name for name in tensors if name not in stripped)
        raise InputError(f"adapter {folder}: expected every tensor once, got {duplicate} twice")
    return stripped


def _read(folder: epath.Path, name: str, tensor: LazyArray) -> np.ndarray:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"adapter {folder}: {name}: expected floats, got {tensor.dtype}")
    with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused later
        return tensor.read().astype(np.float32)
