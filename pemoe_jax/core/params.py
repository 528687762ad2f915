"""Parameter trees: paths, what trains, counts, and a merge that places everything or raises."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pemoe_jax.core.errors import InputError

Tree = Mapping[str, Any]

ADAPTER_PATTERN = r".*_adapter/.*"


def flatten(tree: Tree) -> dict[str, Any]:
    """{'encoder': {'layers_0': ...}} -> {'encoder/layers_0/...': leaf}."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or of shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def select(tree: Tree, keep: Callable[[str], bool]) -> dict[str, Any]:
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


def split(params: Tree, patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): two trees that `merge` puts together again."""
    flat = flatten(params)
    chosen = trainable_paths(flat, patterns)
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Tree, frozen: Tree) -> dict[str, Any]:
    """One tree of both; a parameter in both is an error."""
    a, b = flatten(trainable), flatten(frozen)
    both = sorted(a.keys() & b.keys())
    if both:
        raise ValueError(f"{len(both)} parameters are both trainable and frozen: {both[:3]}")
    return unflatten({**b, **a})


def place(source: Tree, target: Tree, what: str) -> dict[str, Any]:
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
        raise InputError(f"{what} does not fit the model's {len(want)} parameters: {'. '.join(problems)}")
    return unflatten(have)


def cast_frozen(frozen: Tree, dtype: Any) -> dict[str, Any]:
    """Frozen matrices in the activation dtype; norms and the logits matrix stay float32.

    The layers use a matrix in the activation dtype anyhow, so this changes no result.
    """

    def cast(path: str, leaf: jax.Array) -> jax.Array:
        keeps_float32 = path.endswith("norm/scale") or path.startswith("decoder/logits_dense/")
        return leaf if keeps_float32 else leaf.astype(dtype)

    return unflatten({path: cast(path, leaf) for path, leaf in flatten(frozen).items()})


@jax.jit
def _bit_sums(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    bits = bits.reshape(-1)
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * place)])


def fingerprint(params: Tree) -> str:
    """A short name for the values of a tree, the same for float32 and for its bfloat16 rounding.

    Integer sums modulo 2³² do not depend on order, so it is exact, computed where the arrays
    live, and the same however they are sharded.

    Returns:
      16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    sums = {path: _bit_sums(leaf) for path, leaf in flatten(params).items()}
    for path in sorted(sums):
        digest.update(f"{path} {np.asarray(sums[path]).tolist()}\n".encode())
    return digest.hexdigest()[:16]
