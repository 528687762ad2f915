"""Parameter trees: creation, paths, the trainable part, strict comparison, fingerprints.

A tree is a nested dict of arrays as Flax holds it. A path joins its keys: 'encoder/layers_0/…'.
"""

import contextlib
import contextvars
import functools
import hashlib
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

from pemoe_jax.core import partitioning
from pemoe_jax.core.errors import InputError

PyTree: TypeAlias = partitioning.PyTree
Params: TypeAlias = Mapping[str, PyTree]
# (path, array) -> the leaf to store, such as the array cast, sharded or quantized.
Transform: TypeAlias = Callable[[str, jax.Array], PyTree]

# Everything that adapters add is under `<site>_adapter/`, so this one pattern serves all methods.
ADAPTER_PATTERN = r".*_adapter/.*"


class ParamSpec(NamedTuple):
    """How a parameter is created: initializer, shape, and logical name of each axis."""

    init: Callable[..., jax.Array]
    shape: tuple[int, ...]
    axes: tuple[str, ...]


# Specs by path while `record_specs` is active; a context variable, so that one thread does not
# record what another traces.
_specs: contextvars.ContextVar[dict[str, ParamSpec] | None] = contextvars.ContextVar(
    "specs", default=None
)


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
      module: the module, inside its compact method.
      name: last part of the parameter's path.
      init: (key, shape, dtype) -> array. A module-level constant: `initialize` compiles one program
        for each initializer and shape.
      shape: shape of the parameter.
      axes: logical name of each axis.
    """
    specs = _specs.get()
    if specs is not None:
        specs["/".join((*module.path, name))] = ParamSpec(init, shape, axes)
    return nn_partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)


@contextlib.contextmanager
def record_specs() -> Iterator[dict[str, ParamSpec]]:
    """Collects path -> spec of the parameters that are created inside the context."""
    specs: dict[str, ParamSpec] = {}
    token = _specs.set(specs)
    try:
        yield specs
    finally:
        _specs.reset(token)


@functools.cache
def _compiled_init(
    init: Callable[..., jax.Array], shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda key: init(key, shape, jnp.float32))


def identity(path: str, array: jax.Array) -> PyTree:
    """Identity transform: keeps an array as it was drawn or read."""
    return array


def initialize(
    specs: Mapping[str, ParamSpec], seed: int, transform: Transform = identity
) -> dict[str, PyTree]:
    """Draws random parameters; each depends on its path and the seed alone.

    Args:
      specs: path -> spec.
      seed: seed of all draws.
      transform: applied to each float32 array before the next is drawn, so that one float32 array
        at a time is in memory.

    Returns:
      Nested dict of the transformed arrays.
    """
    key = jax.random.key(seed)
    arrays = {}
    for path, spec in specs.items():
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        # A small program for each shape: one for the model compiles for minutes at T5-Large.
        arrays[path] = transform(path, _compiled_init(spec.init, spec.shape)(path_key))
    return unflatten(arrays)


def flatten(tree: Params) -> dict[str, PyTree]:
    """{'encoder': {'layers_0': ...}} -> {'encoder/layers_0/...': leaf}."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Inverse of `flatten`."""
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
    """Returns the paths that at least one pattern matches in full.

    Args:
      paths: all paths of a model.
      patterns: regular expressions over 'a/b/c'.

    Raises:
      InputError: a pattern is not a regular expression, or matches no parameter.
    """
    paths = list(paths)
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"TRAINABLE must hold regular expressions, got {pattern!r}: {error}"
            ) from error
        matched = {path for path in paths if compiled.fullmatch(path)}
        if not matched:
            raise InputError(
                f"TRAINABLE matched 0 of {len(paths)} parameters: {[pattern]}"
                f" (an example of a parameter is {paths[0] if paths else None!r})"
            )
        chosen |= matched
    if not chosen:
        raise InputError(f"TRAINABLE matched 0 of {len(paths)} parameters: {list(patterns)}")
    return chosen


def split(params: Params, patterns: Sequence[str]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Splits parameters into (trainable, frozen) by `trainable_paths`; `merge` is the inverse."""
    flat = flatten(params)
    chosen = trainable_paths(flat, patterns)
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


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
    """Checks that `source` has the paths and shapes of `target`, no fewer and no more.

    Args:
      source: tree of arrays, as read.
      target: tree of arrays or shapes, as expected.
      source_name: name of the source in the error.

    Returns:
      The source as a nested dict.

    Raises:
      InputError: names the arrays that are missing, extra or of another shape.
    """
    flat, expected = flatten(source), flatten(target)
    missing = sorted(expected.keys() - flat.keys())
    extra = sorted(flat.keys() - expected.keys())
    shapes = [
        f"{path}: expected {tuple(expected[path].shape)}, got {tuple(flat[path].shape)}"
        for path in sorted(expected.keys() & flat.keys())
        if tuple(flat[path].shape) != tuple(expected[path].shape)
    ]
    problems = [
        f"{len(items)} {label}: {'; '.join(items[:3])}{'; …' if len(items) > 3 else ''}"
        for label, items in (("missing", missing), ("extra", extra), ("of another shape", shapes))
        if items
    ]
    if problems:
        raise InputError(
            f"{source_name} does not fit the model's {len(expected)} parameters:"
            f" {'. '.join(problems)}"
        )
    return unflatten(flat)


_FINITE_CHUNK = 1 << 20  # values


def all_finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    # In chunks, for `np.isfinite` of a whole embedding allocates a mask of a quarter of its size.
    flat = array.ravel(order="K")  # a view for transposed arrays too
    starts = range(0, flat.size, _FINITE_CHUNK)
    return all(bool(np.isfinite(flat[i : i + _FINITE_CHUNK]).all()) for i in starts)


def check_finite(tree: Params, source_name: str) -> None:
    """Raises InputError if a numpy array holds NaN or infinity."""
    for path, array in flatten(tree).items():
        if not all_finite(array):
            raise InputError(f"{source_name}: {path} holds NaN or infinity")


def frozen_dtype(path: str, dtype: jax.typing.DTypeLike) -> np.dtype:
    """Returns the dtype to keep a frozen parameter in: that of the activations, or float32."""
    # Norms, logits and adapters compute in float32. The layers cast the other matrices to the
    # activation dtype anyway, so storing them in it changes no result. Adapters can be frozen: a
    # pattern may train a part of them.
    keep_float32 = (
        path.endswith("norm/scale")
        or path.startswith("decoder/logits_dense/")
        or "_adapter/" in path
    )
    return jnp.dtype(jnp.float32 if keep_float32 else dtype)


def is_matrix(path: str) -> bool:
    """Whether a parameter is a matrix [in, out] of the base model's attention or MLPs."""
    return path.endswith("/kernel") and is_base(path) and not path.startswith("decoder/logits")


_SAMPLE_SIZE = 64  # values of an array


def sample_array(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Samples evenly spaced values of an array, first and last included.

    Returns:
      uint16 [<= 64], the bits of the values as bfloat16; on the array's device, or in host memory
      for a numpy array.
    """
    if isinstance(leaf, jax.Array):
        return _sample_on_device(leaf)
    return _sample_bfloat16(leaf).view(np.uint16)


def _sample_bfloat16(leaf: PyTree) -> PyTree:
    flat = np.linspace(0, leaf.size - 1, min(_SAMPLE_SIZE, leaf.size)).astype(np.int64)
    return leaf[np.unravel_index(flat, leaf.shape)].astype(jnp.bfloat16)


@jax.jit
def _sample_on_device(leaf: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_sample_bfloat16(leaf), jnp.uint16)


def fingerprint(params: Params) -> str:
    """Returns a short identity of a tree: a hash of its paths, shapes and a sample of each array.

    It costs next to nothing at any size, is computed where the arrays are, and does not depend on
    their sharding. It is the same for float32 and its bfloat16 rounding: an adapter fits either
    copy of a base model.

    Returns:
      16 hexadecimal digits.
    """
    flat = flatten(params)
    samples = partitioning.gather({path: sample_array(leaf) for path, leaf in flat.items()})
    return fingerprint_samples({path: (leaf.shape, samples[path]) for path, leaf in flat.items()})


def fingerprint_samples(
    samples: Mapping[str, tuple[tuple[int, ...], jax.Array | np.ndarray]],
) -> str:
    """`fingerprint` from path -> (shape, sample), for arrays that are never in memory together."""
    digest = hashlib.sha256()
    for path, (shape, bits) in sorted(samples.items()):
        digest.update(f"{path} {tuple(shape)} {bits.tolist()}\n".encode())
    return digest.hexdigest()[:16]
