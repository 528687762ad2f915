"""Tile sizes and types of the Pallas kernels."""

from typing import Any, TypeAlias

import jax

Index: TypeAlias = int | jax.Array
Ref: TypeAlias = Any  # a program's block of an array, for which Pallas has no public type


def power_of_two(size: int) -> int:
    """Returns the least power of two that is at least `size` and 16.

    Triton's products need sides that are powers of two from 16 on.
    """
    return max(16, 1 << (size - 1).bit_length())


def num_tiles(size: int, tile: int) -> int:
    """Returns the number of tiles of size `tile` that cover `size`."""
    return -(-size // tile)
