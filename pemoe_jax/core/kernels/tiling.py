"""Tile sizes and types of the Pallas kernels."""

from typing import Any, TypeAlias

import jax

MIN_SIDE = 16  # the shortest side of a matrix product in Triton

Index: TypeAlias = int | jax.Array
Ref: TypeAlias = Any  # a program's block of an array, for which Pallas has no public type


def power_of_two(size: int) -> int:
    """Returns the least power of two that is at least `size` and `MIN_SIDE`."""
    return max(MIN_SIDE, 1 << (size - 1).bit_length())


def num_tiles(size: int, tile: int) -> int:
    """Returns the number of tiles that cover `size`."""
    return -(-size // tile)
