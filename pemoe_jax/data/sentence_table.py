"""Tables of sentence embeddings on disk, which map the token ids of an input to a vector.

A table is a folder that `pemoe embed` writes:

about.json             the encoder, the number of parts in the index, the files' checksums, …
parts/<n>.vectors.npy  [N, S], float16 or float32
parts/<n>.keys.npy     [N], 16 bytes each: `input_key` of each input; written last
keys.<parts>.npy       index: the keys of all parts, sorted
rows.<parts>.npy       index: the row of each key's vector, counted over all parts

The folder is local or in a bucket. The files of a bucket are downloaded when a table is opened.
Vectors are never rewritten: an addition writes further parts and a new index, and then replaces
about.json, which points to the index. Shapes: `S` size of the embedding, `N` inputs, `Li` length of
an input.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pemoe_jax.core.errors import InputError, check_choice, first_line
from pemoe_jax.runtime import atomic_write, checksums, file_io, folder_lock
from pemoe_jax.runtime.file_io import AnyPath

_KEY = np.dtype("S16")

# A part is written after this many vectors or seconds, whichever comes first: an interruption loses
# the vectors after the last part.
_PART_ROWS = 65_536
_PART_SECONDS = 60.0

EncoderInfo = Mapping[str, Any]  # name, dim, and fingerprint or probe: see `is_same_encoder`
About = dict[str, Any]  # content of about.json

_FORMAT: About = {"format": "pemoe_jax sentence embeddings", "version": 1}


def input_key(ids: ArrayLike) -> bytes:
    """Returns the key of an input: 128 bits of blake2b of its token ids [L] without padding (0)."""
    ids = np.asarray(ids)
    tokens = ids[ids != 0].astype("<i4").tobytes()
    return hashlib.blake2b(tokens, digest_size=_KEY.itemsize).digest()


def is_same_encoder(first: EncoderInfo, second: EncoderInfo) -> bool:
    """Returns whether two descriptions are of the same encoder.

    Name, dim and fingerprint must be equal. An encoder without a fingerprint may have a `probe`
    instead: the vector that it returns for a fixed sentence. Probes must be nearly equal.
    """
    if any(first.get(field) != second.get(field) for field in ("name", "dim", "fingerprint")):
        return False
    a, b = (np.asarray(info.get("probe") or [], np.float64) for info in (first, second))
    # Nearly, because other hardware rounds differently.
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=0.02, atol=0.05))


def check_same_encoder(
    path: str, trained_with: EncoderInfo | None, current: EncoderInfo | None
) -> None:
    """Raises InputError if a run uses another encoder than a checkpoint was trained with.

    Args:
      path: the checkpoint.
      trained_with: encoder that the checkpoint was trained with.
      current: encoder of the run. Nothing is checked if one of the two is None, which means no
        encoder or an unknown one.
    """
    if trained_with is None or current is None or is_same_encoder(trained_with, current):
        return
    raise InputError(
        f"{path}: expected the sentence embeddings that it was trained with, of"
        f" {format_encoder(trained_with)}, got those of {format_encoder(current)}"
        f"{_probe_hint(trained_with, current)}"
    )


def format_encoder(encoder: EncoderInfo) -> str:
    """Describes an encoder in a few words, for messages."""
    fingerprint = encoder.get("fingerprint")
    suffix = f", fingerprint {fingerprint}" if fingerprint else ""
    return f"{encoder.get('name')}{suffix}, size {encoder.get('dim')}"


def _probe_hint(first: EncoderInfo, second: EncoderInfo) -> str:
    """Returns the end of a message about two encoders that only their probes tell apart."""
    same_name = format_encoder(first) == format_encoder(second)
    return ", which now returns other vectors" if same_name else ""


class SentenceTable:
    """A complete table, opened for reading. Files are mapped into memory.

    Attributes:
      path: the folder.
      encoder: the encoder that computed the vectors.
      lengths: lengths that inputs were truncated to; several if additions used different ones.
      vocabulary: fingerprint of the inputs' vocabulary, see `sentences.vocabulary_fingerprint`.

    Raises:
      InputError: the folder holds no table, or one that is incomplete or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = file_io.resolve_output(path, "SENTENCE_EMBEDDINGS")
        about = _read_about(self.path)
        if about is None:
            actual = "a folder without about.json" if self.path.exists() else "no such folder"
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path}: expected the output of pemoe embed, got {actual}"
            )
        if about["parts"] is None:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path} is not finished: run pemoe embed again, which"
                " resumes where it stopped"
            )
        self.encoder: EncoderInfo = about["encoder"]
        self.lengths: list[int] = about["lengths"]
        self.vocabulary: str = about["vocabulary"]
        parts = about["parts"]
        # Checksums of the files that are not verified yet. A file of vectors is verified when it is
        # first used, so that a large table opens at once.
        self._unverified: dict[str, str] = dict(about["checksums"])
        self._verify(f"keys.{parts}.npy")
        self._verify(f"rows.{parts}.npy")
        map_file = functools.partial(_map_file, self.path, about["checksums"])
        self._keys = map_file(f"keys.{parts}.npy")
        self._rows = map_file(f"rows.{parts}.npy")
        self._parts = [map_file(_part_name(n, "vectors")) for n in range(parts)]
        self._first_rows = np.cumsum([0, *(len(part) for part in self._parts)])
        shapes = {part.shape[1:] for part in self._parts}
        if len(self._keys) != len(self._rows) or shapes != {(self.dim,)}:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path}: expected as many keys as rows and vectors of"
                f" size {self.dim}, got {len(self._keys)}, {len(self._rows)} and {sorted(shapes)}"
            )
        keys, rows, num_rows = self._keys, self._rows, self._first_rows[-1]
        is_index = keys.dtype == _KEY and rows.dtype.kind == "i" and keys.ndim == rows.ndim == 1
        if not is_index or rows.min() < 0 or rows.max() >= num_rows:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path}: damaged: expected an index of keys and of rows"
                f" below {num_rows:,}"
            )

    @property
    def dim(self) -> int:
        """S."""
        return int(self.encoder["dim"])

    def __len__(self) -> int:
        return len(self._keys)

    def rows(self, inputs: Iterable[ArrayLike]) -> np.ndarray:
        """Returns the row of each input's vector, int64 [N]; -1 for an input without a vector.

        Args:
          inputs: token ids [Li] of each input, with or without padding.
        """
        keys = np.frombuffer(b"".join(map(input_key, inputs)), _KEY)
        # searchsorted returns an index out of bounds for a key that sorts after the last one.
        indices = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[indices] == keys, self._rows[indices], -1)

    def vectors(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the vectors [S] in some rows as views of the files, in the stored dtype.

        Raises:
          InputError: a file of vectors is damaged.
        """
        parts = np.searchsorted(self._first_rows, rows, side="right") - 1
        in_part = rows - self._first_rows[parts]
        for part in np.unique(parts).tolist() if self._unverified else ():
            self._verify(_part_name(part, "vectors"))
        return [self._parts[n][row] for n, row in zip(parts, in_part, strict=True)]

    def verify(self) -> int:
        """Verifies the checksums of files that are not verified yet; returns their number.

        Opening the table has verified those of the index. Tables of earlier versions have none.

        Raises:
          InputError: a file is damaged.
        """
        names = list(self._unverified)
        for name in names:
            self._verify(name)
        return len(names)

    def _verify(self, name: str) -> None:
        if name in self._unverified:
            _verify_file(self.path, name, self._unverified[name])
            self._unverified.pop(name, None)


class TableWriter:
    """Creates a table or adds to one, and resumes after an interruption.

    Attributes:
      known_keys: keys of all inputs that have a vector, in the index or not yet in it.

    Args:
      path: the folder.
      encoder: the encoder of the vectors.
      dtype: 'float16' or 'float32'.
      vocabulary: fingerprint of the inputs' vocabulary, see `sentences.vocabulary_fingerprint`.
      length: length that inputs are truncated to.

    Raises:
      InputError: the folder holds something else, or a table with another encoder, dtype or
        vocabulary, or another process is adding to it (`folder_lock.hold`).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        encoder: EncoderInfo,
        dtype: str,
        vocabulary: str,
        length: int,
    ) -> None:
        check_choice("EMBEDDING_DTYPE", dtype, ("float16", "float32"))
        self.path = file_io.resolve_output_folder(path, "SENTENCE_EMBEDDINGS")
        about = _read_about(self.path)
        with file_io.remote_errors(self.path):
            files = [*self.path.iterdir()] if about is None and self.path.is_dir() else []
        # Hidden files do not count: they are the lock and the remains of an interrupted write.
        if any(file.name[0] != "." for file in files):
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path}: expected a new folder or a table, got one with"
                " other files in it"
            )
        new: About = {"encoder": dict(encoder), "dtype": dtype, "vocabulary": vocabulary}
        if about is not None:
            self._check_same(about, new)
        self._about = about or {
            **_FORMAT,
            **new,
            "lengths": [],
            "inputs": 0,
            "parts": None,
            "checksums": {},
        }
        folder_lock.hold(self.path, "SENTENCE_EMBEDDINGS")
        if length not in self._about["lengths"]:
            self._about["lengths"].append(length)
        self._write_about()
        self.known_keys: set[bytes] = set()
        self._parts = 0
        with file_io.remote_errors(self.path):
            while (self.path / _part_name(self._parts, "keys")).exists():
                self._verify_part(self._parts)
                # As V16, because numpy drops zero bytes at the end of an S16.
                self.known_keys.update(self._map_keys(self._parts).view("V16").tolist())
                self._parts += 1
        self._pending: list[tuple[bytes, np.ndarray]] = []
        self._last_write = time.monotonic()

    def add(self, keys: Sequence[bytes], vectors: ArrayLike) -> None:
        """Adds vectors [N, S] of new keys [N], and writes a part when one is due.

        Raises:
          InputError: the vectors have the wrong shape, or are not finite in the table's dtype.
        """
        expected, dtype = (len(keys), self._about["encoder"]["dim"]), self._about["dtype"]
        vectors = np.asarray(vectors)
        if vectors.shape != expected:
            raise InputError(
                f"SENTENCE_ENCODER must return an array of shape {expected}, got {vectors.shape}"
            )
        # numpy's warning about an overflow is off, because the next check reports it.
        with np.errstate(over="ignore"):
            stored = vectors.astype(dtype)
        if not np.isfinite(stored).all():
            raise InputError(f"SENTENCE_ENCODER must return numbers that are finite in {dtype}")
        self._pending += zip(keys, stored, strict=True)
        self.known_keys.update(keys)
        due = time.monotonic() - self._last_write > _PART_SECONDS
        if due or len(self._pending) >= _PART_ROWS:
            self._write_part()

    def finish(self) -> int:
        """Writes the last part and the index; returns the number of inputs in the table.

        Raises:
          InputError: the table is empty.
        """
        self._write_part()
        parts = self._parts
        if not parts:
            raise InputError(f"SENTENCE_EMBEDDINGS {self.path}: the tasks have no inputs to embed")
        if self._about["parts"] != parts:
            keys = np.concatenate([self._map_keys(n) for n in range(parts)])
            order = np.argsort(keys, kind="stable")
            self._write_array(f"keys.{parts}.npy", keys[order])
            self._write_array(f"rows.{parts}.npy", order)
            self._about |= {"parts": parts, "inputs": len(keys)}
        # Files outside of parts/ are indices, of which the older ones are deleted below.
        current = {f"keys.{parts}.npy", f"rows.{parts}.npy"}
        for name in [*self._about["checksums"]]:
            if "/" not in name and name not in current:
                del self._about["checksums"][name]
        self._write_about()
        # An old index is deleted rather than overwritten: processes that have mapped it into memory
        # can still read it.
        with file_io.remote_errors(self.path):
            for old in self.path.iterdir():
                index = re.fullmatch(r"(?:keys|rows)\.(\d+)\.npy", old.name)
                if index and int(index[1]) != parts:
                    old.unlink()
        return int(self._about["inputs"])

    def _check_same(self, about: About, new: About) -> None:
        old_encoder, new_encoder = about["encoder"], new["encoder"]
        if not is_same_encoder(old_encoder, new_encoder):
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path} has the encoder {format_encoder(old_encoder)}:"
                f" expected the same to add to it, got {format_encoder(new_encoder)}"
                f"{_probe_hint(old_encoder, new_encoder)}"
            )
        for field, setting in (("dtype", "EMBEDDING_DTYPE"), ("vocabulary", "the vocabulary")):
            if about[field] != new[field]:
                raise InputError(
                    f"SENTENCE_EMBEDDINGS {self.path} has {setting} {about[field]!r}: expected the"
                    f" same to add to it, got {new[field]!r}"
                )

    def _write_part(self) -> None:
        if self._pending:
            keys = np.frombuffer(b"".join(key for key, _ in self._pending), _KEY)
            vectors = np.stack([vector for _, vector in self._pending])
            # Keys are written last: a part without them is ignored, and the next run overwrites it.
            self._write_array(_part_name(self._parts, "vectors"), vectors)
            self._write_array(_part_name(self._parts, "keys"), keys)
            self._parts += 1
            self._write_about()
        self._pending, self._last_write = [], time.monotonic()

    def _write_array(self, name: str, array: np.ndarray) -> None:
        path = self.path / name
        with atomic_write.temporary_path(path, overwrite=True) as temporary:
            with temporary.open("wb") as file:
                np.save(file, array)
            self._about["checksums"][name] = checksums.crc32c_of_file(temporary)

    def _map_keys(self, number: int) -> np.ndarray:
        return _map_file(self.path, self._about["checksums"], _part_name(number, "keys"))

    def _verify_part(self, number: int) -> None:
        """Compares the checksum of a part's keys; adds checksums that are missing."""
        stored = self._about["checksums"]
        keys, vectors = (_part_name(number, kind) for kind in ("keys", "vectors"))
        if keys in stored:
            _verify_file(self.path, keys, stored[keys])
        # Earlier versions wrote no checksums, and about.json is written after the part.
        for name in {keys, vectors} - stored.keys():
            if (self.path / name).is_file():
                stored[name] = checksums.crc32c_of_file(self.path / name)

    def _write_about(self) -> None:
        atomic_write.write_json(self.path / "about.json", self._about, indent=1)


def _part_name(number: int, kind: str) -> str:
    return f"parts/{number:05d}.{kind}.npy"


def _verify_file(folder: AnyPath, name: str, expected: str) -> None:
    path = folder / name
    if file_io.is_remote(path):
        _download(path, expected)
    elif not path.is_file():
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: no such file")
    else:
        _check_crc(path, path, expected)


def _check_crc(file: AnyPath, path: AnyPath, expected: str) -> None:
    """Compares the checksum of a file; `path` is its name in errors."""
    if (actual := checksums.crc32c_of_file(file)) != expected:
        raise InputError(
            f"SENTENCE_EMBEDDINGS: {path}: damaged: expected the checksum {expected!r},"
            f" got {actual!r}"
        )


def _map_file(folder: AnyPath, stored_checksums: Mapping[str, str], name: str) -> np.ndarray:
    """Maps an array into memory; downloads and verifies it first if it is in a bucket."""
    path = folder / name
    if file_io.is_remote(path):
        return _download(path, stored_checksums.get(name))
    return _map_array(path, path)


@functools.cache  # commands open a table several times: to check it, and to read it
def _download(path: AnyPath, expected: str | None) -> np.ndarray:
    """Downloads an array, compares its checksum, and maps it into memory."""
    with file_io.local_copy(path) as file:
        if expected is not None:
            _check_crc(file, path, expected)
        # The mapping outlives the file's name, so that even a kill leaves no file behind.
        return _map_array(file, path)


def _map_array(file: AnyPath, path: AnyPath) -> np.ndarray:
    """Maps an array into memory; `path` is the file's name in errors."""
    try:
        array = np.load(file, mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: no such file") from error
    except Exception as error:  # numpy parses a header as Python: it may raise anything
        raise InputError(
            f"SENTENCE_EMBEDDINGS: {path}: damaged ({first_line(error):.200})"
        ) from error
    # np.load also opens zip archives, which are no arrays.
    if not isinstance(array, np.ndarray) or not array.ndim or not len(array):
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: damaged (expected an array with rows)")
    # As a plain array, because it is indexed once for each example, which is slow for an np.memmap.
    return np.asarray(array)


def _read_about(folder: AnyPath) -> About | None:
    """Returns the content of about.json; None if there is no such file.

    Raises:
      InputError: the file has another format, lacks a field, or has a wrong value.
    """
    path = folder / "about.json"
    with file_io.remote_errors(path):
        if not path.exists():
            return None
        about = file_io.read_json(path)
    actual = {name: about.get(name) for name in _FORMAT}
    if actual != _FORMAT:
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: expected {_FORMAT}, got {actual}")
    fields = {"encoder", "dtype", "vocabulary", "lengths", "inputs", "parts"}
    if missing := sorted(fields - about.keys()):
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: expected {missing[0]!r} in it, got none")
    encoder, parts = about["encoder"], about["parts"]
    stored = about.setdefault("checksums", {})  # missing in tables of earlier versions
    valid = {
        "checksums": isinstance(stored, dict) and all(map(_is_file_name, stored)),
        "encoder": isinstance(encoder, dict) and _is_positive(encoder.get("dim")),
        "dtype": about["dtype"] in ("float16", "float32"),
        "vocabulary": isinstance(about["vocabulary"], str),
        "lengths": isinstance(about["lengths"], list) and all(map(_is_positive, about["lengths"])),
        "inputs": about["inputs"] == 0 or _is_positive(about["inputs"]),
        "parts": parts is None or _is_positive(parts),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            raise InputError(
                f"SENTENCE_EMBEDDINGS: {path}: damaged: {name} cannot be {about[name]!r:.80}"
            )
    return about


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0


def _is_file_name(name: str) -> bool:
    # Files of these names are opened, so no other name, such as ../../x, may be among them.
    return re.fullmatch(r"(parts/\d{5,}\.|)(keys|rows|vectors)\.(\d+\.)?npy", name) is not None
