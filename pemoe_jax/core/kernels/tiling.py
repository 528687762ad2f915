"""What the Pallas kernels share: sizes of tiles, and types."""

from typing import Protocol, TypeAlias

import jax

MIN_SIDE = 16  # the shortest side of a matrix product in Triton

Index: TypeAlias = int | jax.Array


class Ref(Protocol):
    """A program's block of an array in memory, as Pallas passes it to a kernel."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> jax.numpy.dtype: ...

    def __getitem__(self, index: object) -> jax.Array: ...

    def __setitem__(self, index: object, value: jax.Array) -> None: ...


def power_of_two(size: int) -> int:
    """Returns the least power of two that holds `size` and is a side of a product."""
    return max(MIN_SIDE, 1 << (size - 1).bit_length())


def num_tiles(size: int, tile: int) -> int:
    """Returns the number of tiles that cover `size`."""
    return -(-size // tile)
