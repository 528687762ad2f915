"""The fingerprint of a model: a hash of a sample of each of its arrays.

This module imports no jax, so that `pemoe_jax.torch` computes the same fingerprint without it.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Sample(Protocol):
    """The sampled values of an array, as a numpy or a jax array."""

    def tolist(self) -> list[int]:
        """Returns the values."""
        ...


def sample_indices(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Returns the indices, by axis, of up to 64 evenly spaced values, first and last included."""
    size = math.prod(shape)
    indices = np.linspace(0, size - 1, min(64, size)).astype(np.int64)
    return np.unravel_index(indices, shape)


def hash_samples(samples: Mapping[str, tuple[tuple[int, ...], Sample]]) -> str:
    """Returns the fingerprint of a model, 16 hexadecimal digits; see `params.fingerprint`.

    Args:
      samples: path -> (shape, sample) of each array. A sample is uint16 [<= 64], the bits of the
        values at `sample_indices`, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for path, (shape, sample) in sorted(samples.items()):
        # Adapters store this fingerprint of their base, so the text must stay as it is.
        digest.update(f"{path} {tuple(shape)} {sample.tolist()}\n".encode())
    return digest.hexdigest()[:16]
