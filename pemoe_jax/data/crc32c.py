"""CRC-32C (RFC 3720, Castagnoli), the checksum of tfrecords, in numpy.

A checksum is linear over GF(2): that of a message, begun with zero, is the exclusive or of what
each byte gives at its distance from the end, which a table holds. What it is begun with, or carries
over from an earlier part of the message, comes in with the first four bytes.
"""

from __future__ import annotations

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_SPAN = 2048  # bytes looked up at once: the table has 2 MB
_ONES = 0xFFFFFFFF


def masked(data: bytes) -> int:
    """The checksum of some bytes as tfrecords have it: rotated, with a constant added."""
    crc = checksum(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ONES


def checksum(data: bytes) -> int:
    """CRC-32C of some bytes."""
    table, rows, last = _tables()
    state, at = _ONES, len(data) % 4
    for byte in data[:at]:
        state = state >> 8 ^ last[(state ^ byte) & 255]
    while at < len(data):
        part = np.frombuffer(data, np.uint8, min(_SPAN, len(data) - at), at)
        places = rows[_SPAN - len(part) :] + part
        places[:4] ^= np.frombuffer(state.to_bytes(4, "little"), np.uint8)
        state = int(np.bitwise_xor.reduce(table.take(places)))
        at += len(part)
    return state ^ _ONES


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, list[int]]:
    """What bytes give at each distance [_SPAN * 256], where each begins; of the last byte [256]."""
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = np.where(last & 1, last >> 1 ^ _POLYNOMIAL, last >> 1).astype(np.uint32)
    table = np.empty((_SPAN, 256), np.uint32)
    table[-1] = last
    for row in range(_SPAN - 2, -1, -1):
        table[row] = (table[row + 1] >> 8) ^ last[table[row + 1] & 255]
    return table.reshape(-1), np.arange(0, _SPAN * 256, 256), last.tolist()
