"""Parameter trees: creation, paths, trainable and frozen parts, checks, fingerprints.

A tree is Flax's nested dict of arrays. The path of an array joins the keys that lead to it:
'encoder/layers_0/…'.
"""

import contextlib
import contextvars
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning as nn_partitioning

from pemoe_jax.core import fingerprints, freezing, partitioning
from pemoe_jax.core.errors import InputError

PyTree: TypeAlias = partitioning.PyTree
Params: TypeAlias = Mapping[str, PyTree]
# (path, array) -> the leaf to store, such as the array cast, sharded or quantized.
Transform: TypeAlias = Callable[[str, jax.Array], PyTree]

# All parameters of adapters are under `<site>_adapter/`, so one pattern serves all methods.
ADAPTER_PATTERN = r".*_adapter/.*"


class ParamSpec(NamedTuple):
    """How a parameter is created: initializer, shape, and logical name of each axis."""

    init: Callable[..., jax.Array]
    shape: tuple[int, ...]
    axes: tuple[str, ...]


# Path -> spec of the parameters created so far, while `record_specs` is active. This is a context
# variable, so that one thread does not record what another thread traces.
_specs = contextvars.ContextVar[dict[str, ParamSpec] | None]("specs", default=None)


def param(
    module: nn.Module,
    name: str,
    init: jax.nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> jax.Array:
    """Creates or reads a float32 parameter of a module and annotates its axes.

    Every parameter of the package is created here.

    Args:
      module: the module; the call is inside its compact method or its `setup`.
      name: last part of the parameter's path.
      init: the initializer, a module-level constant: `initialize` compiles a program for each
        initializer object and shape.
      shape: shape of the parameter.
      axes: logical name of each axis.
    """
    specs = _specs.get()
    if specs is not None:
        specs["/".join((*module.path, name))] = ParamSpec(init, shape, axes)
        init = nn.initializers.zeros  # tracing random draws takes as long as tracing the network
    return nn_partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)


@contextlib.contextmanager
def record_specs() -> Iterator[dict[str, ParamSpec]]:
    """Collects path -> spec of the parameters created inside the context, which are all zeros."""
    specs: dict[str, ParamSpec] = {}
    token = _specs.set(specs)
    try:
        yield specs
    finally:
        _specs.reset(token)


_init_array = jax.jit(
    lambda key, init, shape: init(key, shape, jnp.float32), static_argnames=("init", "shape")
)


def identity(path: str, array: jax.Array) -> PyTree:
    """Identity transform: keeps an array as it was drawn or read."""
    return array


def initialize(
    specs: Mapping[str, ParamSpec], seed: int, transform: Transform = identity
) -> dict[str, PyTree]:
    """Draws random parameters; each depends only on its path and the seed.

    Args:
      specs: path -> spec.
      seed: seed of all draws.
      transform: applied to each float32 array before the next one is drawn, so that only one
        float32 array at a time is in memory.
    """
    key = jax.random.key(seed)
    arrays = {}
    for path, spec in specs.items():
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        # One small program for each shape, since a single program that draws the whole T5-Large
        # takes minutes to compile.
        arrays[path] = transform(path, _init_array(path_key, spec.init, spec.shape))
    return unflatten(arrays)


def flatten(tree: Params) -> dict[str, PyTree]:
    """Returns path -> leaf: {'encoder': {'layers_0': ...}} -> {'encoder/layers_0/...': leaf}."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns the nested dict of path -> leaf; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def count(tree: Params) -> int:
    """Returns the number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def select(tree: Params, predicate: Callable[[str], bool]) -> dict[str, PyTree]:
    """Returns the leaves whose path satisfies the predicate, as a nested dict."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if predicate(path)})


def is_adapter(path: str) -> bool:
    """Whether a path belongs to an adapter."""
    return re.fullmatch(ADAPTER_PATTERN, path) is not None


def is_base(path: str) -> bool:
    """Whether a path belongs to the base model."""
    return not is_adapter(path)


def trainable_paths(paths: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Returns the paths that a pattern matches in full, without those that a '!' pattern matches.

    Args:
      paths: all paths of a model.
      patterns: regular expressions over paths, or one of them. A pattern that begins with '!'
        excludes the paths that its rest matches (`core.freezing`).

    Raises:
      InputError: a pattern is not a regular expression or matches no parameter, a '!' pattern
        matches all parameters, or no parameter is left.
    """
    paths = list(paths)
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[str] = set()
    excluded: set[str] = set()
    for pattern in patterns:
        try:
            matched = {path for path in paths if re.fullmatch(pattern.removeprefix("!"), path)}
        except re.error as error:
            raise InputError(
                f"TRAINABLE must hold regular expressions, got {pattern!r}: {error}"
            ) from error
        if pattern.startswith("!"):
            excluded |= matched
            # In a dense model, FREEZE matches nothing ('router') or everything ('all_but_router').
            if not matched or not excluded < set(paths):
                raise InputError(
                    "FREEZE must be None unless the model has sparse layers (methods/flan_….gin),"
                    f" got {freezing.find_freeze_value(pattern)!r}"
                )
            continue
        if not matched:
            raise InputError(
                f"TRAINABLE matched 0 of {len(paths)} parameters: {[pattern]}"
                f" (an example of a parameter is {paths[0] if paths else None!r})"
            )
        chosen |= matched
    if not chosen:
        raise InputError("TRAINABLE must hold at least one pattern, got []")
    if not chosen - excluded:
        raise InputError(f"TRAINABLE and FREEZE leave nothing to train, got {[*patterns]}")
    return chosen - excluded


def split(params: Params, patterns: Sequence[str]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Splits parameters into (trainable, frozen), see `trainable_paths`; `merge` is the inverse."""
    chosen = trainable_paths(flatten(params), patterns)
    return select(params, chosen.__contains__), select(params, lambda path: path not in chosen)


def merge(trainable: Params, frozen: Params) -> dict[str, PyTree]:
    """Merges two trees into one.

    Raises:
      ValueError: a parameter is in both.
    """
    flat_trainable, flat_frozen = flatten(trainable), flatten(frozen)
    both = sorted(flat_trainable.keys() & flat_frozen.keys())
    if both:
        raise ValueError(f"{len(both)} parameters are both trainable and frozen: {both[:3]}")
    return unflatten({**flat_frozen, **flat_trainable})


def check_matches(source: Params, target: Params, source_name: str) -> dict[str, PyTree]:
    """Returns `source` as a nested dict if it has exactly the paths and shapes of `target`.

    Args:
      source: tree of arrays, as read.
      target: tree of arrays or shapes, as expected.
      source_name: name of the source in the error.

    Raises:
      InputError: names the arrays that are missing, extra or of another shape.
    """
    flat, expected = flatten(source), flatten(target)
    mismatches = [
        f"{path}: expected {tuple(expected[path].shape)}, got {tuple(flat[path].shape)}"
        for path in sorted(expected.keys() & flat.keys())
        if tuple(flat[path].shape) != tuple(expected[path].shape)
    ]
    differences = {
        "missing": sorted(expected.keys() - flat.keys()),
        "extra": sorted(flat.keys() - expected.keys()),
        "of another shape": mismatches,
    }
    problems = [
        f"{len(items)} {label}: {'; '.join(items[:3])}{'; …' if len(items) > 3 else ''}"
        for label, items in differences.items()
        if items
    ]
    if problems:
        raise InputError(
            f"{source_name} does not fit the model's {len(expected)} parameters:"
            f" {'. '.join(problems)}"
        )
    return unflatten(flat)


_FINITE_CHUNK = 1 << 20  # values that `is_array_finite` checks at once


def is_array_finite(array: np.ndarray) -> bool:
    """Whether a numpy array holds neither NaN nor infinity."""
    # In chunks, since `np.isfinite` of a whole embedding allocates a quarter of its size.
    flat = array.ravel(order="K")  # a view for transposed arrays too
    starts = range(0, flat.size, _FINITE_CHUNK)
    return all(bool(_is_finite(flat[i : i + _FINITE_CHUNK]).all()) for i in starts)


def _is_finite(values: np.ndarray) -> np.ndarray:
    if values.dtype != jnp.bfloat16:
        return np.isfinite(values)
    # A bfloat16 is infinite or NaN if all 8 bits of its exponent are set. `np.isfinite` takes 9
    # times as long, since it is not vectorized for bfloat16.
    return (values.view(np.uint16) & 0x7F80) != 0x7F80


def check_finite(tree: Params, source_name: str) -> None:
    """Raises InputError if an array of a tree of numpy arrays holds NaN or infinity."""
    for path, array in flatten(tree).items():
        if not is_array_finite(array):
            raise InputError(f"{source_name}: {path} holds NaN or infinity")


def frozen_dtype(path: str, dtype: jax.typing.DTypeLike) -> np.dtype:
    """Returns the dtype to store a frozen parameter in: the activations' `dtype`, or float32."""
    # The layers cast matrices to the activation dtype, so storing them in this dtype changes no
    # result. Logits and routers compute in float32. Norms and adapters are small. An adapter may be
    # frozen, since TRAINABLE can select a part of the adapters; it then keeps its trained values.
    keep_float32 = (
        path.endswith("norm/scale")
        or path.startswith("decoder/logits_dense/")
        or is_adapter(path)
        or is_router(path)
    )
    return jnp.dtype(jnp.float32 if keep_float32 else dtype)


def is_matrix(path: str) -> bool:
    """Whether a parameter is a kernel of attention or of an MLP: [in, out], or [E, in, out].

    The matrices of adapters, of routers and of the logits layer do not count.
    """
    is_excluded = path.startswith("decoder/logits") or is_adapter(path) or is_router(path)
    return path.endswith("/kernel") and not is_excluded


def is_router(path: str) -> bool:
    """Whether a parameter belongs to the router of a sparse MLP, which computes in float32."""
    return "/router/router_weights/" in path


def sample_array(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Samples up to 64 evenly spaced values of an array, first and last included.

    Returns:
      uint16 [<= 64], the bits of the values as bfloat16; on the array's device, or in host memory
      for a numpy array.
    """
    if isinstance(leaf, jax.Array) and not _is_in_host_memory(leaf):
        return _sample_on_device(leaf)
    return _sample(np.asarray(leaf))


def _is_in_host_memory(array: jax.Array) -> bool:
    """Whether numpy can use an array without a copy."""
    devices = array.devices()
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def _sample(leaf: PyTree) -> PyTree:
    return leaf[fingerprints.sample_indices(leaf.shape)].astype(jnp.bfloat16).view(np.uint16)


_sample_on_device = jax.jit(_sample)


def fingerprint(params: Params) -> str:
    """Returns 16 hexadecimal digits, a hash of paths, shapes and a sample of each array.

    It is fast for models of any size, since arrays are sampled on their devices. The hash does not
    depend on shardings. A float32 model and its rounding to bfloat16 have the same fingerprint, so
    an adapter fits both copies of its base model.
    """
    flat = flatten(params)
    samples = partitioning.gather({path: sample_array(leaf) for path, leaf in flat.items()})
    return fingerprints.hash_samples(
        {path: (leaf.shape, samples[path]) for path, leaf in flat.items()}
    )
