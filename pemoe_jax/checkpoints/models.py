"""Opens checkpoints of every kind as models, loads their bases, and checks that adapters fit."""

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.checkpoints import (
    adapter_file,
    device_arrays,
    lazy_array,
    peft,
    runs,
    t5x,
    t5x_run,
    upcycling,
)
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.records import Record, package_versions
from pemoe_jax.core import adapters, fingerprints, network, partitioning, quantized
from pemoe_jax.core import params as params_lib
from pemoe_jax.core import sparse as sparse_lib
from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.core.network import T5Config, Transformer
from pemoe_jax.core.params import Params, PyTree
from pemoe_jax.runtime import checksums, file_io, options, progress
from pemoe_jax.runtime.file_io import JsonObject

# One sharding for all arrays, or path -> sharding; None: the default device.
Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None


def _sharding_of(shardings: Shardings, path: str) -> jax.sharding.Sharding | None:
    return shardings[path] if isinstance(shardings, Mapping) else shardings


def device_put(tree: Params, shardings: Shardings) -> dict[str, PyTree]:
    """Moves parameters to devices; every process must hold the same values."""
    if shardings is None:
        return dict(tree)
    by_path = {path: _sharding_of(shardings, path) for path in params_lib.flatten(tree)}
    return partitioning.device_put(dict(tree), params_lib.unflatten(by_path))


def _make_target(
    shapes: Mapping[str, PyTree], dtype_of: Callable[[str], jnp.dtype], shardings: Shardings
) -> dict[str, PyTree]:
    """Returns the argument `target` of `device_arrays.load_arrays`, given path -> shape."""
    return params_lib.unflatten(
        {
            path: jax.ShapeDtypeStruct(
                leaf.shape, dtype_of(path), sharding=_sharding_of(shardings, path)
            )
            for path, leaf in shapes.items()
        }
    )


@contextlib.contextmanager
def array_progress(label: str, num_arrays: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar; yields a function that takes the number of arrays processed so far."""
    bar = progress.Progress(label, num_arrays, note="arrays")
    try:
        yield lambda done: bar.report_if_slow(done, "arrays")
    finally:
        bar.close()


def build_model(record: Record) -> Transformer:
    """Returns the network, with its adapters and sparse layers, that a record describes.

    Raises:
      InputError: the record has settings that this version does not know.
    """
    config = _make_config(record.config, "the checkpoint")
    return _build_model(config, json.dumps(record.adapters), json.dumps(record.sparse))


def _make_config(values: JsonObject, source: str) -> T5Config:
    """Returns the configuration of a record or a base.

    Raises:
      InputError: a field is unknown, or an integer field is not a positive integer.
    """
    try:
        config = T5Config(**values)
    except TypeError as error:
        raise InputError(
            f"{source}'s T5Config does not fit this version of the package: {error}"
        ) from error
    for field in dataclasses.fields(T5Config):
        value = getattr(config, field.name)
        # Checked here, since a wrong value would only raise when the network is traced.
        if field.type is int or (field.type == int | None and value is not None):
            check_integer(f"{source}'s T5Config.{field.name}", value)
    return config


@functools.cache
def _build_model(config: T5Config, description: str, sparse: str) -> Transformer:
    # Cached by JSON texts, because dicts are not hashable. Functions of `network` trace each new
    # model (0.3 s of CPU time and more), and a process may open several checkpoints of one model.
    sites = adapters.from_description(json.loads(description))
    return Transformer(config, sites, sparse_lib.from_description(json.loads(sparse)))


@dataclasses.dataclass(frozen=True)
class _ParamFormat:
    """The dtype, sharding and quantization of a base's parameters; see `load_base`."""

    dtype: str
    is_trainable: Callable[[str], bool]
    shardings: Shardings
    frozen_dtype: str

    def is_quantized(self, name: str) -> bool:
        """Whether a parameter is quantized: frozen matrices are, if `frozen_dtype` says so."""
        is_plain = self.frozen_dtype == quantized.ACTIVATIONS or self.is_trainable(name)
        return not is_plain and params_lib.is_matrix(name)

    def dtype_of(self, name: str) -> jnp.dtype:
        """Returns the dtype in which a parameter is loaded, before it is quantized."""
        # Matrices are quantized from float32: rounding to bfloat16 first would add its error.
        if self.is_trainable(name) or self.is_quantized(name):
            return jnp.dtype(jnp.float32)
        return params_lib.frozen_dtype(name, self.dtype)

    def cast_and_put(self, name: str, array: jax.Array) -> jax.Array:
        """Casts a drawn array and moves it to its devices."""
        array, sharding = array.astype(self.dtype_of(name)), _sharding_of(self.shardings, name)
        return array if sharding is None else partitioning.device_put(array, sharding)

    def maybe_quantize(self, name: str, array: jax.Array) -> PyTree:
        """Quantizes an array if `is_quantized`."""
        if not self.is_quantized(name):
            return array
        # Waits, so that only one float32 array is on the device at a time.
        return jax.block_until_ready(quantized.quantize(array, self.frozen_dtype))


def load_base(
    model: Transformer,
    path: str | None,
    seed: int,
    is_trainable: Callable[[str], bool] = lambda _: False,
    shardings: Shardings = None,
    frozen_dtype: str = quantized.ACTIVATIONS,
    upcycle_noise: float = 0.0,
    keep: Callable[[str], bool] = lambda _: True,
) -> tuple[dict[str, PyTree], JsonObject]:
    """Loads the base parameters of a model, or draws them at random.

    A dense base of a sparse model is upcycled, see `upcycling`.

    Args:
      model: the network, which determines names, shapes and the dtype of frozen matrices.
      path: file or folder of a base in any format of `base_model`; None: random weights.
      seed: seed of random weights, or of the routers and the noise of upcycling.
      is_trainable: maps a parameter's path to whether it is trained; trained ones are float32.
      shardings: one for all arrays, or parameter path -> sharding; None: the default device.
      frozen_dtype: one of `quantized.FROZEN_DTYPES`, for the frozen matrices of attention and
        MLPs. Each is quantized from float32 as soon as it is on the device.
      upcycle_noise: σ of the experts' noise, see `upcycling`.
      keep: maps a parameter's path to whether it is returned. Parameters that are not returned are
        read too, since the fingerprint covers them.

    Returns:
      (parameters, identity). The identity is `Record.base` without `needed` and `frozen_dtype`. Its
      fingerprint and checksum are those of the arrays before quantization.

    Raises:
      InputError: the base states other activations; see also `base_model.open_base`,
        `upcycling.should_upcycle` and `device_arrays.load_arrays`.
    """
    param_format = _ParamFormat(model.config.dtype, is_trainable, shardings, frozen_dtype)
    shapes = params_lib.flatten(network.param_shapes(model, params_lib.is_base))
    opened = None if path is None else base_lib.open_base(path)
    upcycler = upcycling.Upcycling(model, seed, upcycle_noise)
    is_upcycled = False
    if opened is not None:
        opened.check_activations(model.config.mlp_activations)
        is_upcycled = upcycling.should_upcycle(model, opened)
    # Path of an array of the base -> paths of the parameters that are made from it.
    names = upcycling.names_by_source(shapes) if is_upcycled else {name: [name] for name in shapes}
    loaded: dict[str, PyTree] = {}
    source_shapes: dict[str, tuple[int, ...]] = {}
    samples: dict[str, jax.Array | np.ndarray] = {}

    # Passed as a `transform`, but adds to `loaded` itself, since several parameters may be made
    # from one array.
    def add_source(source: str, array: jax.Array) -> None:
        # Sampled before quantization, so that the fingerprint does not depend on FROZEN_DTYPE.
        source_shapes[source], samples[source] = array.shape, params_lib.sample_array(array)
        for name in filter(keep, names[source]):
            dtype = param_format.dtype_of(name)
            if is_upcycled and upcycling.is_expert(name):
                leaf = upcycler.copy_to_experts(name, array, dtype, _sharding_of(shardings, name))
            else:
                leaf = array.astype(dtype)
            loaded[name] = param_format.maybe_quantize(name, leaf)

    def add_drawn(name: str, array: jax.Array) -> None:
        add_source(name, param_format.cast_and_put(name, array))

    def format_drawn(name: str, array: jax.Array) -> PyTree:
        return param_format.maybe_quantize(name, param_format.cast_and_put(name, array))

    identity: JsonObject
    if opened is None:
        # No checksum, because values that are drawn from a seed differ slightly between kinds of
        # devices.
        identity = {"path": None, "format": "random", "seed": seed}
        network.init_params(model, seed, params_lib.is_base, add_drawn)
    else:
        identity = {"path": opened.path, "format": opened.format, "seed": None}
        if is_upcycled:
            identity["upcycled"] = {"seed": seed, "noise": upcycle_noise}
            loaded |= upcycler.draw(filter(keep, shapes), format_drawn)
        targets = {
            source: _source_target(paths, shapes, param_format, is_upcycled, upcycle_noise)
            for source, paths in names.items()
        }
        crcs: dict[str, tuple[str, int]] = {}
        with array_progress("loading the base", len(targets)) as report:
            opened.load(params_lib.unflatten(targets), report, add_source, crcs)
        if crcs.keys() == targets.keys():  # this process has read every array whole
            identity["checksum"] = checksums.join(crcs)
    fingerprint = fingerprints.hash_samples(
        {
            source: (source_shapes[source], sample)
            for source, sample in partitioning.gather(samples).items()
        }
    )
    base = params_lib.unflatten({name: loaded[name] for name in shapes if name in loaded})
    return base, {**identity, "fingerprint": fingerprint}


def _source_target(
    paths: Sequence[str],
    shapes: Mapping[str, PyTree],
    param_format: _ParamFormat,
    is_upcycled: bool,
    upcycle_noise: float,
) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding in which to read an array of a base.

    Args:
      paths: the parameters that are made from the array.
      shapes: parameter path -> shape.
      param_format: dtypes and shardings of the parameters.
      is_upcycled, upcycle_noise: see `load_base`.
    """
    first = paths[0]
    shape, sharding = shapes[first].shape, _sharding_of(param_format.shardings, first)
    # The array is read once for all parameters, in the widest of their dtypes.
    dtype = jnp.result_type(*map(param_format.dtype_of, paths))
    if is_upcycled and upcycling.is_expert(first):
        shape, sharding = shape[1:], upcycling.dense_sharding(sharding)
    # Noise multiplies float32 values, because rounding them before and after would add an error.
    # All paths are searched for experts, since an extra MLP may be made from the same array.
    if is_upcycled and upcycle_noise and any(map(upcycling.is_expert, paths)):
        dtype = jnp.dtype(jnp.float32)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@dataclasses.dataclass
class OpenedModel:
    """A model whose arrays are not read yet.

    Attributes:
      name: folder or file name of the base or the run; unique among models opened together.
      path: the path that the user passed.
      model: the network with its adapters.
      record: the record of a run or an adapter; None for a base.
      step: training step of the checkpoint.
      trained_arrays: parameter path -> array that a run or an adapter trained; empty for a base.
      base_path: path of the base, if `needs_base`; None: random weights.
      frozen_dtype: dtype of the base's frozen matrices, see `load_base`.
    """

    name: str
    path: str
    model: Transformer
    record: Record | None = None
    step: int = 0
    trained_arrays: dict[str, LazyArray] = dataclasses.field(default_factory=dict)
    base_path: str | None = None
    frozen_dtype: str = quantized.ACTIVATIONS

    @property
    def needs_base(self) -> bool:
        """Whether frozen parameters come from a base, which is stored or drawn at random."""
        return self.record is not None and self.record.base["needed"]

    def load(self, shardings: Shardings = None) -> dict[str, PyTree]:
        """Loads all parameters.

        Raises:
          InputError: the base is missing, or not the one that the adapters were trained on; an
            array is missing, of another shape or not finite.
        """
        if self.record is None:  # a base has all parameters, so nothing is drawn from the seed 0
            return load_base(
                self.model, self.path, 0, shardings=shardings, frozen_dtype=self.frozen_dtype
            )[0]
        return self.load_with_identity(shardings)[0]

    def load_with_identity(
        self, shardings: Shardings = None, trainable: Collection[str] = ()
    ) -> tuple[dict[str, PyTree], JsonObject]:
        """Loads all parameters of a run, and the identity of its base; see `load_base`.

        Args:
          shardings: see `load_base`.
          trainable: paths of parameters to load in float32, besides those that the run trained.

        Raises:
          InputError: see `load`.
        """
        assert self.record is not None
        # Trained parameters first: adapters are small, so a wrong one fails before the base is
        # read.
        trained = self.load_trained(shardings)
        if not self.needs_base:
            return trained, self.record.base
        trained_paths = params_lib.flatten(trained).keys()
        upcycled = self.record.base.get("upcycled", {})
        base, identity = load_base(
            self.model,
            self.base_path,
            self.record.base["seed"] or upcycled.get("seed", 0),
            {*trained_paths, *trainable}.__contains__,
            shardings,
            self.frozen_dtype,
            upcycled.get("noise", 0.0),
            lambda path: path not in trained_paths,
        )
        return self.join_base(trained, base, identity, shardings), identity

    def join_base(
        self,
        trained: Params,
        base: Params,
        identity: Mapping[str, Any],
        shardings: Shardings = None,
    ) -> dict[str, PyTree]:
        """Returns all parameters of a run, given its trained parameters and its loaded base.

        Args:
          trained: the parameters of `load_trained`.
          base, identity: the result of `load_base`, without the trained parameters.
          shardings: see `load_base`.

        Raises:
          InputError: the base is not the one that the adapters were trained on.
        """
        assert self.record is not None
        self.check_base(identity)
        trained_paths = params_lib.flatten(trained).keys()
        # Checkpoints omit frozen adapters: they are drawn again by the run's seed.
        frozen_adapters = network.init_params(
            self.model,
            self.record.seed,
            lambda path: params_lib.is_adapter(path) and path not in trained_paths,
        )
        frozen = params_lib.merge(device_put(frozen_adapters, shardings), base)
        params = params_lib.merge(trained, frozen)
        shapes = network.param_shapes(self.model)
        return params_lib.check_matches(params, shapes, f"checkpoint {self.path} and its base")

    def shardings(
        self, mesh: jax.sharding.Mesh, rules: partitioning.Rules
    ) -> dict[str, jax.sharding.Sharding]:
        """Returns the sharding of each parameter on a mesh, for `load`."""
        shapes = params_lib.flatten(network.param_shapes(self.model))
        axes = network.param_axes(self.model)
        return dict(partitioning.param_shardings(mesh, rules, axes, shapes))

    def load_trained(self, shardings: Shardings = None) -> dict[str, PyTree]:
        """Loads the parameters that the run trained, in float32.

        Raises:
          InputError: an array is missing, extra, of another shape or not finite.
        """
        assert self.record is not None
        shapes = params_lib.flatten(network.param_shapes(self.model))
        paths = params_lib.trainable_paths(shapes, self.record.trainable)
        trainable = {path: leaf for path, leaf in shapes.items() if path in paths}
        target = _make_target(trainable, lambda _: jnp.dtype(jnp.float32), shardings)
        return device_arrays.load_arrays(self.trained_arrays, target, f"checkpoint {self.path}")

    def check_base(self, identity: Mapping[str, Any]) -> None:
        """Raises `InputError` if the adapters belong to a base with another identity.

        Values that one side lacks are not compared: PEFT adapters have no fingerprint, and adapters
        of earlier versions have no checksum.
        """
        assert self.record is not None
        base = self.record.base
        upcycled = base.get("upcycled")
        if base["fingerprint"] not in (None, identity["fingerprint"]):
            name, note = "fingerprint", ": pass the base that they were trained on"
        elif checksums.is_other(base.get("checksum"), identity.get("checksum")):
            name, note = "checksum", ": some of its values differ"
        elif None not in (upcycled, identity.get("upcycled")) and upcycled != identity["upcycled"]:
            # Sparse models that were upcycled differently from one dense base have its fingerprint.
            # `Model.set_adapter` may combine an adapter with a model that was not its base.
            name, note = "upcycled", ": its routers and noise differ"
        else:
            return
        raise InputError(
            f"checkpoint {self.path} belongs to the base {base['path']} with {name} {base[name]};"
            f" {self.base_path or 'the random base'} has {identity[name]}{note}"
        )

    def summary(self) -> JsonObject:
        """Returns the model's name, method, path, step, dtypes, counts and base, for results."""
        summary: JsonObject = {
            "name": self.name,
            "method": "none" if self.record is None else self.record.method,
            "checkpoint": os.fspath(file_io.resolve(self.path)),
            "step": self.step,
            "dtype": self.model.config.dtype,
        }
        if self.frozen_dtype != quantized.ACTIVATIONS:
            summary["frozen"] = self.frozen_dtype
        if self.record is None:
            total = params_lib.count(network.param_shapes(self.model))
            return summary | {"trainable": 0, "total": total}
        summary |= self.record.counts
        if self.needs_base:
            random = f"random weights, seed {self.record.base['seed'] or 0}"
            summary["base"] = self.base_path or random
        return summary


def open_selected(models: options.Models) -> list[OpenedModel]:
    """Opens the models of a command's options; see `open_models`."""
    return open_models(
        models.checkpoint_path,
        models.model,
        models.initial_checkpoint_path,
        models.dtype,
        models.frozen_dtype,
    )


def open_models(
    paths: str | Sequence[str],
    model: Transformer | None = None,
    base_path: str | None = None,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
) -> list[OpenedModel]:
    """Opens each path: a base, a run (its newest checkpoint), a run's checkpoint, or an adapter.

    Args:
      paths: a path or a list of paths (CHECKPOINT_PATH).
      model: the model of the gin files. Its dtype and activations are used for bases that state
        none.
      base_path: replaces the base that a run or an adapter names.
      dtype: dtype of activations; None: the checkpoint's.
      frozen_dtype: dtype of frozen matrices (`quantized.FROZEN_DTYPES`); None: as in training, or
        for a base the dtype of activations.

    Raises:
      InputError: a path does not exist or is not a checkpoint, `frozen_dtype` is unknown or passed
        for a run that trained the whole model, or no model needs `base_path`.
    """
    if frozen_dtype is not None:
        quantized.check_frozen_dtype(frozen_dtype)
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, (list, tuple)) or not paths:
        raise InputError(f"CHECKPOINT_PATH must be a path or a list of paths, got {paths!r}")
    models: list[OpenedModel] = []
    counts: collections.Counter[str] = collections.Counter()
    for path in paths:
        with file_io.remote_errors(file_io.resolve(path)):
            opened = _open(path, model, base_path)
        if dtype is not None:
            config = dataclasses.replace(opened.model.config, dtype=dtype)
            opened.model = opened.model.clone(config=config)
        if frozen_dtype is not None:
            if opened.record is not None and not opened.needs_base:
                raise InputError(
                    f"FROZEN_DTYPE must be None for {path}, whose run trained the whole model in"
                    f" float32, got {frozen_dtype!r}"
                )
            opened.frozen_dtype = frozen_dtype
        counts[opened.name] += 1
        if counts[opened.name] > 1:  # unique, since names become folders and table rows
            opened.name += f"_{counts[opened.name]}"
        models.append(opened)
    if base_path is not None and not any(opened.needs_base for opened in models):
        shown = ", ".join(opened.path for opened in models)
        raise InputError(
            f"{base_path} was passed as the base of adapters, but the model to open is not an"
            f" adapter: {shown}: are the two swapped?"
        )
    return models


def open_model(path: str, base_path: str | None = None) -> OpenedModel:
    """Opens one path; see `open_models`."""
    return open_models(path, base_path=base_path)[0]


def _open(path: str, model: Transformer | None, base_path: str | None) -> OpenedModel:
    # The order matters: our adapters have an `adapter_config.json` as PEFT's do, and a run that
    # trained the whole model is a base too.
    if adapter_file.is_adapter(path):
        trained_arrays, record, step = adapter_file.open_adapter(path)
        name = adapter_file.adapter_folder(path).name
    elif peft.is_adapter(path):
        trained_arrays, record, step = _open_peft(path, base_path)
        name = file_io.resolve(path).name
    elif runs.is_run(path):
        trained_arrays, record, step = runs.open_trained(path)
        name = runs.resolve(path)[0].name
    elif t5x_run.is_run(path):
        trained_arrays, record, step = t5x_run.open_trained(path)
        name = t5x_run.run_folder(path).name
    else:
        expected = f"a run, an adapter, {base_lib.EXPECTED}"
        kind = "model" if base_path is None else "model or adapter"
        base = base_lib.open_base(path, kind, expected)
        # The gin files supply what the checkpoint does not state: the dtype of activations, and the
        # names of activation functions.
        gin_config = None if model is None else model.config
        defaults = {} if gin_config is None else {"dtype": gin_config.dtype}
        config = _make_config({**defaults, **base.config(gin_config)}, base.path)
        sparse = json.dumps(base.sparse)
        return OpenedModel(_base_name(base.path), path, _build_model(config, "{}", sparse))
    if record.base["needed"] and base_path is None:
        base_path = record.base["path"]
        if base_path is not None and not file_io.resolve(base_path).exists():
            raise InputError(
                f"{path} belongs to the base {base_path}, which does not exist: pass the path of a"
                " copy (INITIAL_CHECKPOINT_PATH, or --base of pemoe convert)"
            )
    # Records of earlier versions lack `frozen_dtype`.
    frozen_dtype = record.base.get("frozen_dtype", quantized.ACTIVATIONS)
    return OpenedModel(
        name, path, build_model(record), record, step, trained_arrays, base_path, frozen_dtype
    )


def _base_name(base_path: str) -> str:
    """Returns a short name for a base: of its file, its folder, or its model on the Hub."""
    path = file_io.resolve(base_path)
    # A path in the Hugging Face cache is models--google--t5-large/snapshots/<commit>.
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.stem if t5x.step_of(path.name) is None else path.parent.name


def _open_peft(path: str, base_path: str | None) -> tuple[dict[str, LazyArray], Record, int]:
    """Opens a PEFT adapter, with the record that a run of this package would have written."""
    try:
        base = base_lib.open_base(base_path or peft.base_model_name(path))
    except InputError as error:
        hint = "" if base_path else ": pass its base (INITIAL_CHECKPOINT_PATH, or --base)"
        raise InputError(f"PEFT adapter {path}{hint}: {error}") from error
    config = _make_config(base.config(), base.path)
    description, arrays = peft.load_adapter(path, config.as_dict())
    model = _build_model(config, json.dumps(description), json.dumps(base.sparse))
    shapes = network.param_shapes(model)
    record = Record(
        method=peft.method_name(description),
        trainable=[params_lib.ADAPTER_PATTERN],
        config=config.as_dict(),
        adapters=description,
        sparse=sparse_lib.describe(model.sparse),
        # PEFT does not record a fingerprint: any base of these dimensions is accepted.
        base={"path": base.path, "seed": None, "fingerprint": None, "needed": True},
        counts={
            "trainable": params_lib.count(params_lib.select(shapes, params_lib.is_adapter)),
            "total": params_lib.count(shapes),
        },
        versions=package_versions(),
    )
    return {name: lazy_array.from_numpy(np.asarray(a)) for name, a in arrays.items()}, record, 0
