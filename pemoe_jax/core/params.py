"""Parameter trees: paths, what trains, counts, and a merge that places everything or raises."""

import contextlib
import contextvars
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.linen import partitioning as nn_partitioning

from pemoe_jax.core import partitioning
from pemoe_jax.core.errors import InputError

# Any tree of arrays that jax.tree maps over; jax has no type of its own for it.
PyTree: TypeAlias = Any
Params: TypeAlias = Mapping[str, PyTree]

ADAPTER_PATTERN = r".*_adapter/.*"


# path -> (initialiser, shape, names of axes), while `network` looks a model over
_recorded: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "recorded", default=None
)


def param(
    module: nn.Module,
    name: str,
    init: jax.nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> jax.Array:
    """A float32 parameter of a module, its axes annotated; all modules make theirs here.

    Args:
      module: whose it is; inside its compact method.
      name: last part of the path.
      init: (key, shape, dtype) -> array; a constant, since draws are compiled once for each.
      shape: of the array.
      axes: logical name of each axis.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded["/".join((*module.path, name))] = (init, shape, axes)
    return nn_partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)


@contextlib.contextmanager
def record_specs() -> Iterator[dict[str, Any]]:
    """Collects path -> (initialiser, shape, axes) of the parameters that are made meanwhile."""
    found: dict[str, Any] = {}
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


@functools.cache
def _compiled_draw(
    init: jax.nn.initializers.Initializer, shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda key: init(key, shape, jnp.float32))


def identity(path: str, array: jax.Array) -> Any:
    """What becomes of an array that is drawn or read, where nothing is to be made of it."""
    return array


def initialize(
    recorded: Mapping[str, Any], seed: int, made: Callable[[str, jax.Array], Any] = identity
) -> dict[str, Any]:
    """Random arrays for recorded parameters, each by its path and the seed alone.

    One small program a shape is compiled; one of the whole model takes minutes at T5-Large.

    Returns:
      Nested dict of what is `made` of float32 arrays, one after another.
    """
    key = jax.random.key(seed)

    def drawn(path: str, init: Any, shape: tuple[int, ...]) -> Any:
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return made(path, _compiled_draw(init, shape)(own))

    return unflatten({path: drawn(path, *found[:2]) for path, found in recorded.items()})


def flatten(tree: Params) -> dict[str, Any]:
    """{'encoder': {'layers_0': ...}} -> {'encoder/layers_0/...': leaf}."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def count(tree: Params) -> int:
    """Number of scalars in a tree of arrays or of shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def select(tree: Params, keep: Callable[[str], bool]) -> dict[str, Any]:
    """The leaves whose path `keep` accepts."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if keep(path)})


def is_adapter(path: str) -> bool:
    """Whether a path belongs to an adapter: the one pattern of the house."""
    return re.fullmatch(ADAPTER_PATTERN, path) is not None


def is_base(path: str) -> bool:
    """Whether a path belongs to the base model."""
    return not is_adapter(path)


def trainable_paths(paths: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The paths that a pattern matches whole (regular expressions over 'a/b/c').

    Raises:
      InputError: a pattern is no regular expression, or one matches no parameter.
    """
    paths = list(paths)
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(f"TRAINABLE: {pattern!r} is no regular expression: {error}") from error
        matched = {path for path in paths if compiled.fullmatch(path)}
        if not matched:
            raise InputError(
                f"TRAINABLE matched 0 of {len(paths)} parameters: {[pattern]}"
                f" (they look like {paths[0] if paths else 'nothing'!r})"
            )
        chosen |= matched
    if not chosen:
        raise InputError(f"TRAINABLE matched 0 of {len(paths)} parameters: {list(patterns)}")
    return chosen


def split(params: Params, patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): two trees that `merge` puts together again."""
    flat = flatten(params)
    chosen = trainable_paths(flat, patterns)
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Params, frozen: Params) -> dict[str, Any]:
    """One tree of both; a parameter in both is an error."""
    a, b = flatten(trainable), flatten(frozen)
    both = sorted(a.keys() & b.keys())
    if both:
        raise ValueError(f"{len(both)} parameters are both trainable and frozen: {both[:3]}")
    return unflatten({**b, **a})


def check_matches(source: Params, target: Params, what: str) -> dict[str, Any]:
    """Checks that `source` holds every array of `target`, of its shape, and no other.

    Args:
      source: tree of arrays, as read.
      target: tree of arrays or shapes, as expected.
      what: names the source in the error.

    Returns:
      The source as a nested dict.

    Raises:
      InputError: names what is missing, extra or of another shape.
    """
    have, want = flatten(source), flatten(target)
    problems = []
    missing = sorted(want.keys() - have.keys())
    extra = sorted(have.keys() - want.keys())
    shapes = [
        f"{path} {tuple(have[path].shape)}, expected {tuple(want[path].shape)}"
        for path in sorted(want.keys() & have.keys())
        if tuple(have[path].shape) != tuple(want[path].shape)
    ]
    for label, found in (("missing", missing), ("extra", extra), ("of another shape", shapes)):
        if found:
            shown = "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
            problems.append(f"{len(found)} {label}: {shown}")
    if problems:
        raise InputError(
            f"{what} does not fit the model's {len(want)} parameters: {'. '.join(problems)}"
        )
    return unflatten(have)


_FINITE_AT_A_TIME = 1 << 20  # values


def all_finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity; takes no memory to speak of."""
    flat = array.ravel(order="K")  # a view, of a transposed array too
    starts = range(0, flat.size, _FINITE_AT_A_TIME)
    return all(bool(np.isfinite(flat[i : i + _FINITE_AT_A_TIME]).all()) for i in starts)


def check_finite(tree: Params, what: str) -> None:
    """Raises InputError where a numpy array holds NaN or infinity, and names it."""
    for path, array in flatten(tree).items():
        if not all_finite(array):
            raise InputError(f"{what}: {path} holds NaN or infinity")


def frozen_dtype(path: str, dtype: Any) -> Any:
    """The type that a frozen parameter is kept in: the activations', or float32.

    Norms, logits and adapters stay float32. The layers use the other matrices in the activation
    dtype anyhow, so this changes no result; frozen adapters (where a pattern trains a part of them)
    mix and route in float32.
    """
    keeps_float32 = (
        path.endswith("norm/scale")
        or path.startswith("decoder/logits_dense/")
        or "_adapter/" in path
    )
    return jnp.dtype(jnp.float32 if keeps_float32 else dtype)


def is_matrix(path: str) -> bool:
    """Whether a parameter is a matrix [in, out] of the base's attention or MLPs."""
    return path.endswith("/kernel") and is_base(path) and not path.startswith("decoder/logits")


_SAMPLED = 64  # values of an array


def sample_array(leaf: Any) -> Any:
    """Values spread evenly over an array, from first to last, as bfloat16's bits: uint16 [<= 64].

    Of a jax array they are picked where it lives; of a numpy array on the host.
    """
    return _sample_bits(leaf) if isinstance(leaf, jax.Array) else _pick(leaf).view(np.uint16)


def _pick(leaf: Any) -> Any:
    flat = np.linspace(0, leaf.size - 1, min(_SAMPLED, leaf.size)).astype(np.int64)
    return leaf[np.unravel_index(flat, leaf.shape)].astype(jnp.bfloat16)


@jax.jit
def _sample_bits(leaf: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_pick(leaf), jnp.uint16)


def fingerprint(params: Params) -> str:
    """A short name for a tree of parameters: its paths, shapes and a sample of each array.

    It is cheap at any size, computed where the arrays live, the same however they are sharded, and
    the same for float32 and for its bfloat16 rounding: adapters fit either copy of a base.

    Returns:
      16 hexadecimal digits.
    """
    flat = flatten(params)
    samples = partitioning.gather({path: sample_array(leaf) for path, leaf in flat.items()})
    return fingerprint_samples({path: (leaf.shape, samples[path]) for path, leaf in flat.items()})


def fingerprint_samples(samples: Mapping[str, tuple[tuple[int, ...], np.ndarray]]) -> str:
    """`fingerprint` by path -> (shape, `sample`), where the arrays are not in memory together."""
    digest = hashlib.sha256()
    for path, (shape, bits) in sorted(samples.items()):
        digest.update(f"{path} {tuple(shape)} {bits.tolist()}\n".encode())
    return digest.hexdigest()[:16]
