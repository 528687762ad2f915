"""The fingerprint of a model: a hash of a sample of each of its arrays.

This module imports no jax, so that `pemoe_jax.torch` computes the same fingerprint without it.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Sample(Protocol):
    """The sampled values of an array: of numpy or jax."""

    def tolist(self) -> list[int]:
        """Returns the values."""
        ...


def sample_indices(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Returns the indices, by axis, of up to 64 evenly spaced values, first and last included."""
    size = math.prod(shape)
    indices = np.linspace(0, size - 1, min(64, size)).astype(np.int64)
    return np.unravel_index(indices, shape)


def hash_samples(samples: Mapping[str, tuple[tuple[int, ...], Sample]]) -> str:
    """Returns 16 hexadecimal digits from path -> (shape, sample), see `params.fingerprint`.

    A sample is uint16 [<= 64], the bits of the values at `sample_indices` as bfloat16.
    """
    digest = hashlib.sha256()
    for path, (shape, sample) in sorted(samples.items()):
        digest.update(f"{path} {tuple(shape)} {sample.tolist()}\n".encode())
    return digest.hexdigest()[:16]
