"""Models from checkpoints: the base of a run, and a path that a user names opened as a model."""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pemoe_jax.checkpoints import adapter_file, lazy_array, peft, runs, t5x_run
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import adapters, network, partitioning, quantized
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.network import T5Config, Transformer
from pemoe_jax.runtime import file_io, progress

# Of all arrays, or path -> of each; None: the default device.
Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None


def _of(shardings: Shardings, path: str) -> jax.sharding.Sharding | None:
    return shardings[path] if isinstance(shardings, Mapping) else shardings


def device_put(tree: Mapping[str, Any], shardings: Shardings) -> dict[str, Any]:
    """Parameters that all processes have alike, placed."""
    if shardings is None:
        return dict(tree)
    flat = params_lib.flatten(tree)
    return partitioning.device_put(
        dict(tree), params_lib.unflatten({path: _of(shardings, path) for path in flat})
    )


def build_model(record: runs.Record) -> Transformer:
    """The network that a checkpoint's record describes, with its adapters.

    Raises:
      InputError: it has settings that this version does not know.
    """
    try:
        config = T5Config(**record.config)
    except TypeError as error:
        raise InputError(
            f"a checkpoint's T5Config: {error}: written by another version?"
        ) from error
    return Transformer(config, adapters.from_description(record.adapters))


def load_base(
    model: Transformer,
    path: str | None,
    seed: int,
    trains: Callable[[str], bool] = lambda _: False,
    shardings: Shardings = None,
    frozen_dtype: str = quantized.ACTIVATIONS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base of a model, read from `path` or, for None, random.

    Args:
      model: gives names, shapes, and the type that frozen matrices are kept in.
      path: of a base in any format that `checkpoints.base` knows.
      seed: of random weights.
      trains: path -> whether the parameter trains, and is float32.
      shardings: where arrays lie.
      frozen_dtype: one of `quantized.FROZEN_DTYPES`: what frozen matrices of attention and MLPs
        are kept as. Arrays are quantized one by one, from float32.

    Returns:
      (parameters, identity): path, format, seed (of a random base) and fingerprint, which is that
      of the arrays as they are stored.

    Raises:
      InputError: see `checkpoints.base`.
    """

    def quantizes(name: str) -> bool:
        is_kept = frozen_dtype == quantized.ACTIVATIONS or trains(name)
        return not is_kept and params_lib.is_matrix(name)

    def dtype_of(name: str) -> Any:
        frozen = params_lib.frozen_dtype(name, model.config.dtype)
        return jnp.dtype(jnp.float32) if trains(name) or quantizes(name) else frozen

    samples: dict[str, Any] = {}

    def made(name: str, array: jax.Array) -> Any:
        samples[name] = (array.shape, params_lib.sample_array(array))
        if not quantizes(name):
            return array
        # before the next one is there: else several would be on the device in float32
        return jax.block_until_ready(quantized.quantize(array, frozen_dtype))

    def made_of_drawn(name: str, array: jax.Array) -> Any:
        array, sharding = array.astype(dtype_of(name)), _of(shardings, name)
        return made(name, array if sharding is None else partitioning.device_put(array, sharding))

    if path is None:
        base = network.init_params(model, seed, params_lib.is_base, made_of_drawn)
        identity: dict[str, Any] = {"path": None, "format": "random", "seed": seed}
    else:
        shapes = params_lib.flatten(network.param_shapes(model, params_lib.is_base))
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, dtype_of(name), sharding=_of(shardings, name))
            for name, leaf in shapes.items()
        }
        found = base_lib.open_base(path)
        bar = progress.Progress("reading the base", len(target), note="arrays")
        try:
            base = found.load(
                params_lib.unflatten(target),
                lambda done: bar.report_if_slow(done, "arrays"),
                made,
            )
        finally:
            bar.close()
        identity = {"path": found.path, "format": found.format, "seed": None}
    bits = partitioning.gather({name: sampled for name, (_, sampled) in samples.items()})
    of_each = {name: (shape, bits[name]) for name, (shape, _) in samples.items()}
    return base, {**identity, "fingerprint": params_lib.fingerprint_samples(of_each)}


@dataclasses.dataclass
class OpenedModel:
    """What is known of a model before its arrays are read.

    Attributes:
      name: the base's or the run's folder or file; different for each model of a list.
      path: as the user gave it.
      model: the network with its adapters.
      record: of a run or an adapter; None for a base.
      step: of the checkpoint.
      trained: path -> array, of a run or an adapter.
      base_path: what the adapters' base is read from.
      frozen_dtype: what the base's matrices are kept as, see `load_base`.
    """

    name: str
    path: str
    model: Transformer
    record: runs.Record | None = None
    step: int = 0
    trained: dict[str, LazyArray] = dataclasses.field(default_factory=dict)
    base_path: str | None = None
    frozen_dtype: str = quantized.ACTIVATIONS

    @property
    def needs_base(self) -> bool:
        """Whether arrays that a run did not train are read from a base."""
        return self.record is not None and self.record.base["needed"]

    def load(self, shardings: Shardings = None) -> dict[str, Any]:
        """All parameters, frozen matrices as `frozen_dtype` says.

        Args:
          shardings: where arrays lie.

        Raises:
          InputError: the base is missing, or not the one that the adapters were trained on, or
            arrays are missing, of another shape or not finite.
        """
        if self.record is None:
            return load_base(
                self.model, self.path, 0, shardings=shardings, frozen_dtype=self.frozen_dtype
            )[0]
        trained = self.load_trained(shardings)
        recorded = self.record.base
        if not self.needs_base:
            return trained
        paths = params_lib.flatten(trained)
        base, identity = load_base(
            self.model,
            self.base_path,
            recorded["seed"] or 0,
            paths.__contains__,
            shardings,
            self.frozen_dtype,
        )
        self.check_base(identity["fingerprint"])
        # adapters that did not train are not in the checkpoint: they are what the seed gives
        drawn = network.init_params(
            self.model, self.record.seed, lambda p: params_lib.is_adapter(p) and p not in paths
        )
        drawn = device_put(drawn, shardings)
        frozen = params_lib.select(params_lib.merge(drawn, base), lambda path: path not in paths)
        whole = params_lib.merge(trained, frozen)
        shapes = network.param_shapes(self.model)
        return params_lib.check_matches(whole, shapes, f"checkpoint {self.path} and its base")

    def shardings(self, mesh: Any, rules: partitioning.Rules) -> dict[str, Any]:
        """Where its parameters lie on a mesh, for `load`."""
        shapes = params_lib.flatten(network.param_shapes(self.model))
        axes = network.param_axes(self.model)
        return dict(partitioning.param_shardings(mesh, rules, axes, shapes))

    def load_trained(self, shardings: Shardings = None) -> dict[str, Any]:
        """What the run trained, float32.

        Raises:
          InputError: an array is missing, extra, of another shape or not finite.
        """
        assert self.record is not None
        shapes = params_lib.flatten(network.param_shapes(self.model))
        chosen = params_lib.trainable_paths(shapes, self.record.trainable)
        target = {
            path: jax.ShapeDtypeStruct(
                shapes[path].shape, jnp.float32, sharding=_of(shardings, path)
            )
            for path in shapes
            if path in chosen
        }
        return lazy_array.load_arrays(
            self.trained, params_lib.unflatten(target), f"checkpoint {self.path}"
        )

    def check_base(self, fingerprint: str) -> None:
        """Raises InputError where the adapters belong to a base of another fingerprint."""
        assert self.record is not None
        recorded = self.record.base
        if recorded["fingerprint"] not in (None, fingerprint):
            raise InputError(
                f"checkpoint {self.path} belongs to the base {recorded['path']} with fingerprint"
                f" {recorded['fingerprint']}; {self.base_path} has {fingerprint}"
            )

    def about(self) -> dict[str, Any]:
        """Name, method, checkpoint, step, dtype, counts and an adapter's base, for tables."""
        counts = {"trainable": 0, "total": params_lib.count(network.param_shapes(self.model))}
        return {
            "name": self.name,
            "method": "none" if self.record is None else self.record.method,
            "checkpoint": os.fspath(file_io.resolve(self.path)),
            "step": self.step,
            "dtype": self.model.config.dtype,
            **({} if self.frozen_dtype == quantized.ACTIVATIONS else {"frozen": self.frozen_dtype}),
            **(counts if self.record is None else self.record.counts),
            **({"base": self._base_in_words()} if self.needs_base else {}),
        }

    def _base_in_words(self) -> str:
        assert self.record is not None
        return self.base_path or f"random weights, seed {self.record.base['seed'] or 0}"


def open_models(
    paths: str | Sequence[str],
    model: Transformer | None = None,
    base_path: str | None = None,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
) -> list[OpenedModel]:
    """Opens each path: a base, a run's folder (its newest checkpoint), a checkpoint or an adapter.

    Args:
      paths: one or several.
      model: its activation dtype is that of bases that state none.
      base_path: read in place of the base that a run or an adapter names.
      dtype: of activations, in place of what checkpoints say; None: as they say.
      frozen_dtype: of frozen matrices (`quantized.FROZEN_DTYPES`); None: as a run was trained, and
        those of a base in the activations' type.

    Raises:
      InputError: nothing is there, or it is none of these.
    """
    if frozen_dtype is not None:
        quantized.check_frozen_dtype(frozen_dtype)
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, (list, tuple)) or not paths:
        raise InputError(f"CHECKPOINT_PATH: expected a path or a list of some, found {paths!r}")
    opened: list[OpenedModel] = []
    names: collections.Counter[str] = collections.Counter()
    for path in paths:
        place = file_io.resolve(path)
        with file_io.remote_errors(place):
            found = _open(path, model, base_path)
        if dtype is not None:
            config = dataclasses.replace(found.model.config, dtype=dtype)
            found.model = found.model.clone(config=config)
        if frozen_dtype is not None:
            if found.record is not None and not found.needs_base:
                raise InputError(
                    f"FROZEN_DTYPE {frozen_dtype!r}: {path} trained the whole model, in float32:"
                    " expected None"
                )
            found.frozen_dtype = frozen_dtype
        names[found.name] += 1
        if names[found.name] > 1:  # names become folders and rows, so they must differ
            found.name += f"_{names[found.name]}"
        opened.append(found)
    if base_path is not None and not any(one.needs_base for one in opened):
        shown = ", ".join(one.path for one in opened)
        raise InputError(
            f"{base_path} is given as the base of adapters, but {shown} needs none:"
            " are the two swapped?"
        )
    return opened


def open_model(path: str, base_path: str | None = None) -> OpenedModel:
    """One path, as `open_models`."""
    return open_models(path, base_path=base_path)[0]


def _open(path: str, model: Transformer | None, base_path: str | None) -> OpenedModel:
    if adapter_file.is_adapter(path):
        trained, record, step = adapter_file.open_adapter(path)
        name = (
            file_io.resolve(path).name
            if file_io.resolve(path).is_dir()
            else file_io.resolve(path).parent.name
        )
    elif peft.is_adapter(path):
        trained, record, step = _open_peft(path, base_path)
        name = file_io.resolve(path).name
    elif runs.is_run(path):
        trained, record, step = runs.open_trainable(path)
        name = runs.resolve(path)[0].name
    elif t5x_run.is_run(path):
        trained, record, step = t5x_run.open_trainable(path)
        name = t5x_run.run_folder(path).name
    else:
        try:
            found = base_lib.open_base(path)
        except base_lib.NotABaseModel as error:
            said = str(error).removeprefix("base model ")
            said = said.replace("expected a T5X", "expected a run, an adapter, a T5X")
            raise InputError(said) from error
        own = {} if model is None else {"dtype": model.config.dtype}
        config = T5Config(**{**own, **found.config()})
        return OpenedModel(_base_name(found.path), path, Transformer(config))
    if record.base["needed"] and base_path is None:
        base_path = record.base["path"]
        if base_path is not None and not file_io.resolve(base_path).exists():
            raise InputError(
                f"{path} belongs to the base {base_path}, which is not there: name a copy"
                " (INITIAL_CHECKPOINT_PATH, or --base of convert)"
            )
    model = build_model(record)
    kept = record.base.get("frozen_dtype", quantized.ACTIVATIONS)
    return OpenedModel(name, path, model, record, step, trained, base_path, kept)


def _base_name(path: str) -> str:
    """Of a file its stem; of a folder its name, or that of the folder a checkpoint_<step> is in."""
    place = file_io.resolve(path)
    if place.parent.name == "snapshots":  # of Hugging Face's cache
        return place.parent.parent.name.rpartition("--")[2]
    return place.parent.name if re.fullmatch(r"checkpoint_\d+", place.name) else place.stem


def _open_peft(path: str, base_path: str | None) -> tuple[dict[str, LazyArray], runs.Record, int]:
    """An adapter of PEFT's, with the record that a run of ours would have written."""
    named = base_path or peft.base_model_name(path)
    try:
        base = base_lib.open_base(named)
    except InputError as error:
        hint = "" if base_path else ": name its base (INITIAL_CHECKPOINT_PATH, --base of convert)"
        raise InputError(f"{path}, an adapter of PEFT's{hint}: {error}") from error
    config = T5Config(**base.config())
    description, arrays = peft.load_adapter(path, config.as_dict())
    model = Transformer(config, adapters.from_description(description))
    shapes = network.param_shapes(model)
    record = runs.Record(
        method=peft.method_name(description),
        trainable=[params_lib.ADAPTER_PATTERN],
        config=config.as_dict(),
        adapters=description,
        # PEFT does not say which weights these were, so any of these dimensions are taken
        base={"path": base.path, "seed": None, "fingerprint": None, "needed": True},
        counts={
            "trainable": params_lib.count(params_lib.select(shapes, params_lib.is_adapter)),
            "total": params_lib.count(shapes),
        },
        versions=runs.package_versions(),
    )
    return {name: lazy_array.from_numpy(array) for name, array in arrays.items()}, record, 0
