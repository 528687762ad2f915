"""The record of a checkpoint or an adapter: describes its model and its training data.

This module imports no jax, so that `pemoe_jax.torch` can read records without it.
"""

import dataclasses
from collections.abc import Sequence
from importlib import metadata

from pemoe_jax import __version__
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.file_io import JsonObject


@dataclasses.dataclass(frozen=True)
class Record:
    """Describes a checkpoint well enough to build its model without the run's gin files.

    Attributes:
      method: name of the method (mov, lora, …).
      trainable: patterns of the trainable parameters.
      config: `T5Config.as_dict()`.
      adapters: `adapters.describe()` of the adapters.
      sparse: `sparse.describe()` of the sparse layers; None: a dense model.
      base: the base model:
        `path`: None for random weights.
        `seed`: of random weights; None for stored ones.
        `fingerprint`: a hash of a sample of the base's values; None: unknown.
        `needed`: whether the checkpoint needs the base; False if every parameter was trained.
        `format`: name of the base's format.
        `frozen_dtype`: FROZEN_DTYPE; missing in records of earlier versions.
        `checksum`: of all values; missing for random weights, and if the process read only part of
          an array.
        `upcycled`: seed and noise of `upcycling`, if a sparse model started from a dense base.
      counts: trainable and total number of parameters.
      versions: versions of the packages that wrote the checkpoint.
      seed: seed from which adapters were drawn. Frozen adapters are not saved, but drawn again.
      trained_datasets: the training datasets, under their names in result tables; None: unknown.
      trained_tasks: names of the training tasks; None: unknown.
      held_out: names of the held-out datasets; None: unknown.
      optimizer: name of the optimizer's function; None: unknown.
      sentence_encoder: encoder of the sentence embeddings that routers read: its name, its dim, and
        a fingerprint or a probe (see `sentence_table.is_same_encoder`); None: routers read no
        embeddings.
      batches: settings that determine the examples and batches of training, by name ('BATCH_SIZE');
        None: unknown.
      initial: `initial_run.describe()` of the run that this run started from; None: it started from
        a base model. With an initial run, `trained_datasets` and `trained_tasks` cover both runs.
      vocabulary: `seqio_tasks.fingerprint_vocabulary` of the training data; None: unknown.
    """

    method: str
    trainable: list[str]
    config: JsonObject
    adapters: JsonObject
    base: JsonObject
    counts: dict[str, int]
    versions: dict[str, str]
    seed: int = 0
    sparse: JsonObject | None = None
    trained_datasets: list[str] | None = None
    trained_tasks: list[str] | None = None
    held_out: list[str] | None = None
    optimizer: str | None = None
    sentence_encoder: JsonObject | None = None
    initial: JsonObject | None = None
    batches: JsonObject | None = None
    vocabulary: str | None = None


_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def package_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Returns the versions of this package and of those `packages` that are installed."""
    versions = {"pemoe_jax": __version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


# Types of the fields in JSON; the fields that are not listed are objects.
_TYPES = {
    "method": str,
    "trainable": list,
    "seed": int,
    "trained_datasets": list,
    "trained_tasks": list,
    "held_out": list,
    "optimizer": str,
    "vocabulary": str,
}
_TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def parse_record(values: JsonObject, source: str) -> Record:
    """Returns the record in a JSON object, and ignores keys that are not fields of `Record`.

    Args:
      values: the object.
      source: the file that it was read from, for errors.

    Raises:
      InputError: a field is missing or has another type.
    """
    # Records of earlier versions may lack the fields with a default, so these are optional.
    names = [
        field.name
        for field in dataclasses.fields(Record)
        if field.name in values or field.default is dataclasses.MISSING
    ]
    for name in names:
        value, expected = values.get(name), _TYPES.get(name, dict)
        is_valid_null = value is None and Record.__dataclass_fields__[name].default is None
        if not is_valid_null and not isinstance(value, expected):
            raise InputError(
                f"{source}: {name}: expected {_TYPE_NAMES[expected]}, got {value!r:.80}"
            )
    missing = {"path", "seed", "fingerprint", "needed"} - values["base"].keys()
    if missing:
        raise InputError(f"{source}: base: expected the keys {', '.join(sorted(missing))}")
    return Record(**{name: values[name] for name in names})
