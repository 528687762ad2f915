"""Tables of sentence embeddings on disk: a vector for each input, found by its token ids.

A table is a folder that `pemoe embed` writes:

about.json             what made it, and how many parts are in the index
parts/<n>.vectors.npy  [N, S], float16 or float32
parts/<n>.keys.npy     [N], 16 bytes each: `key` of each input; a part is there when these are
keys.<parts>.npy       the keys of all parts, sorted
rows.<parts>.npy       of each the row of its vector, parts laid end to end

Vectors are never rewritten: what is added later is further parts and another index, which
about.json, renamed last, names. Shapes: `S` the embedding's size, `N` inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write

FORMAT = "pemoe_jax sentence embeddings"
VERSION = 1
DTYPES = ("float16", "float32")

_KEY = np.dtype("S16")
# A part is written when it has so many vectors, or when so much time has gone by.
_PART_ROWS = 65_536
_PART_SECONDS = 60.0
_OURS = {".lock", ".about.json"}  # what is there before about.json is

EncoderInfo = Mapping[str, Any]  # name, dim, fingerprint and probe: see `same_encoder`


def input_key(ids: Any) -> bytes:
    """What an input is found by: blake2b, 128 bits, of its token ids [L], padding (0) left away."""
    ids = np.asarray(ids)
    real = np.ascontiguousarray(ids[ids != 0], "<i4")
    return hashlib.blake2b(real.tobytes(), digest_size=_KEY.itemsize).digest()


def is_same_encoder(one: EncoderInfo, other: EncoderInfo) -> bool:
    """Whether two descriptions are of one encoder.

    Name, dim and fingerprint must be equal. Where an encoder has no fingerprint, its vectors of a
    fixed sentence (`probe`) must be alike, up to the rounding of another machine.
    """
    if any(one.get(field) != other.get(field) for field in ("name", "dim", "fingerprint")):
        return False
    a, b = (np.asarray(found.get("probe") or [], np.float64) for found in (one, other))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=0.02, atol=0.05))


def check_same_encoder(
    where: str, trained_with: EncoderInfo | None, now: EncoderInfo | None
) -> None:
    """Raises InputError where a run has not the encoder that a checkpoint was trained with.

    Args:
      where: the checkpoint.
      trained_with, now: None where it is not known, or there is none.
    """
    if trained_with is None or now is None or is_same_encoder(trained_with, now):
        return
    raise InputError(
        f"{where} was trained with sentence embeddings of {format_encoder(trained_with)}:"
        f" expected the same, found {format_encoder(now)}{_probe_hint(trained_with, now)}"
    )


def format_encoder(encoder: EncoderInfo | None) -> str:
    """An encoder in a few words."""
    if not encoder:
        return "none"
    fingerprint = encoder.get("fingerprint")
    of = f", fingerprint {fingerprint}" if fingerprint else ""
    return f"{encoder.get('name')}{of}, size {encoder.get('dim')}"


class SentenceTable:
    """A finished table, opened for reading: nothing of it is in memory but what is looked up.

    Attributes:
      path: of the folder.
      encoder: what made it.
      lengths: that inputs were cut to, of each time that some were added.

    Raises:
      InputError: there is none, it is not finished, or a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _folder(path)
        about = _read_about(self.path)
        if about is None:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path}: expected a folder of pemoe embed,"
                f" found {'no about.json in it' if self.path.exists() else 'nothing there'}"
            )
        if about["parts"] is None:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path} is not finished: run pemoe embed"
                " again, which goes on where it stopped"
            )
        self.encoder: EncoderInfo = about["encoder"]
        self.lengths: list[int] = about["lengths"]
        self.vocabulary: str = about["vocabulary"]
        parts = about["parts"]
        self._keys = _mapped(self.path / f"keys.{parts}.npy")
        self._rows = _mapped(self.path / f"rows.{parts}.npy")
        self._parts = [_mapped(_part(self.path, n, "vectors")) for n in range(parts)]
        sizes = [len(part) for part in self._parts]
        self._firsts = np.cumsum([0, *sizes])
        shapes = {part.shape[1:] for part in self._parts}
        if len(self._keys) != len(self._rows) or shapes != {(self.dim,)}:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path}: expected as many keys as rows and vectors of"
                f" {self.dim}, found {len(self._keys)}, {len(self._rows)} and {sorted(shapes)}"
            )

    @property
    def dim(self) -> int:
        """S."""
        return int(self.encoder["dim"])

    def __len__(self) -> int:
        return len(self._keys)

    def rows(self, inputs: Iterable[Any]) -> np.ndarray:
        """Of token ids, [Li] each, the rows of their vectors, int64 [N]; -1 where there is none."""
        wanted = np.frombuffer(b"".join(map(input_key, inputs)), _KEY)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._rows[at], -1)

    def vectors(self, rows: np.ndarray) -> list[np.ndarray]:
        """The vectors [S] of some rows, as stored: views of the files."""
        parts = np.searchsorted(self._firsts, rows, side="right") - 1
        places = rows - self._firsts[parts]
        return [self._parts[n][at] for n, at in zip(parts, places, strict=True)]


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path) or "://" in os.fspath(path):
        raise InputError(f"SENTENCE_EMBEDDINGS: expected a local folder, found {path!r}")
    return pathlib.Path(path).expanduser().absolute()


def _part(folder: pathlib.Path, number: int, kind: str) -> pathlib.Path:
    return folder / "parts" / f"{number:05d}.{kind}.npy"


def _mapped(path: pathlib.Path) -> np.ndarray:
    try:
        # a plain array over the map: slices of numpy's own kind of map cost much more
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: {what}") from error


def _read_about(folder: pathlib.Path) -> dict[str, Any] | None:
    """What about.json says; None where there is none."""
    path = folder / "about.json"
    try:
        about = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: expected JSON ({error})") from error
    expected = {"format": FORMAT, "version": VERSION}
    found = {name: about.get(name) for name in expected} if isinstance(about, dict) else about
    if found != expected:
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: expected {expected}, found {found}")
    fields = {"encoder", "dtype", "vocabulary", "lengths", "inputs", "parts"}
    if missing := sorted(fields - about.keys()):
        raise InputError(f"SENTENCE_EMBEDDINGS: {path}: expected {missing[0]!r} in it, found none")
    return dict(about)


class TableWriter:
    """Adds to a table, or begins one; stopped at any point, the next one goes on there.

    Attributes:
      known: keys of the inputs that have a vector, the ones of parts in no index yet among them.

    Args:
      path: of the folder.
      encoder: that makes the vectors.
      dtype: 'float16' or 'float32'.
      vocabulary: of the inputs, see `sentences.vocabulary_of`.
      length: that inputs are cut to.

    Raises:
      InputError: the folder holds something else, or a table of another encoder, type or
        vocabulary, or another process is adding to it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        encoder: EncoderInfo,
        dtype: str,
        vocabulary: str,
        length: int,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"EMBEDDING_DTYPE: expected one of {DTYPES}, found {dtype!r}")
        self.path = _folder(path)
        about = _read_about(self.path)
        if about is None and self.path.exists() and {*os.listdir(self.path)} - _OURS:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {self.path}: expected a new folder or a table, found others'"
                " files in it"
            )
        now: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "encoder": dict(encoder),
            "dtype": dtype,
            "vocabulary": vocabulary,
            "lengths": [],
            "inputs": 0,
            "parts": None,
        }
        self._about = now if about is None else _checked(about, now, self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        lengths: list[int] = self._about["lengths"]
        lengths += [length] if length not in lengths else []
        self._write_about()
        (self.path / "parts").mkdir(exist_ok=True)
        self.known: set[bytes] = set()
        self._parts = 0
        while (file := _part(self.path, self._parts, "keys")).exists():
            self.known.update(_split(_mapped(file)))
            self._parts += 1
        self._waiting: list[tuple[bytes, np.ndarray]] = []
        self._written = time.monotonic()

    def add(self, inputs: Sequence[bytes], vectors: np.ndarray) -> None:
        """Takes vectors [N, S] of keys [N] that are not known; a part is written now and then.

        Raises:
          InputError: the vectors are of another shape, or not finite in the table's type.
        """
        dim = self._about["encoder"]["dim"]
        vectors = np.asarray(vectors)
        if vectors.shape != (len(inputs), dim):
            raise InputError(
                f"SENTENCE_ENCODER gave an array of shape {vectors.shape}, expected"
                f" ({len(inputs)}, {dim})"
            )
        with np.errstate(over="ignore"):
            stored = vectors.astype(self._about["dtype"])
        if not np.isfinite(stored).all():
            raise InputError(
                f"SENTENCE_ENCODER gave numbers that are not finite in {self._about['dtype']}"
            )
        self._waiting += zip(inputs, stored, strict=True)
        self.known.update(inputs)
        late = time.monotonic() - self._written > _PART_SECONDS
        if late or len(self._waiting) >= _PART_ROWS:
            self._write_part()

    def finish(self) -> int:
        """Writes what is left and the index -> number of inputs in the table.

        Raises:
          InputError: there is nothing in it.
        """
        self._write_part()
        parts = self._parts
        if not parts:
            raise InputError(f"SENTENCE_EMBEDDINGS {self.path}: no inputs were found to embed")
        if self._about["parts"] != parts:
            found = np.concatenate([_mapped(_part(self.path, n, "keys")) for n in range(parts)])
            order = np.argsort(found, kind="stable")
            _write_array(self.path / f"keys.{parts}.npy", found[order])
            _write_array(self.path / f"rows.{parts}.npy", order)
            self._about |= {"parts": parts, "inputs": len(found)}
        self._write_about()
        for old in self.path.iterdir():  # those who have it open keep what they see
            named = re.fullmatch(r"(?:keys|rows)\.(\d+)\.npy", old.name)
            if named and int(named[1]) != parts:
                old.unlink()
        return int(self._about["inputs"])

    def close(self) -> None:
        """Lets others add; what is in no part is lost."""
        os.close(self._lock)

    def _write_part(self) -> None:
        if self._waiting:
            added = np.frombuffer(b"".join(name for name, _ in self._waiting), _KEY)
            _write_array(
                _part(self.path, self._parts, "vectors"), np.stack([v for _, v in self._waiting])
            )
            _write_array(_part(self.path, self._parts, "keys"), added)
            self._parts += 1
        self._waiting, self._written = [], time.monotonic()

    def _write_about(self) -> None:
        atomic_write.write_json(self.path / "about.json", self._about)


def _checked(about: dict[str, Any], now: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """A table's description; InputError where what is to be added does not fit it."""
    if not is_same_encoder(about["encoder"], now["encoder"]):
        raise InputError(
            f"SENTENCE_EMBEDDINGS {path} is of the encoder"
            f" {format_encoder(about['encoder'])}: expected the same to add"
            f" to it, found {format_encoder(now['encoder'])}"
            f"{_probe_hint(about['encoder'], now['encoder'])}"
        )
    for field, macro in (("dtype", "EMBEDDING_DTYPE"), ("vocabulary", "a vocabulary")):
        if about[field] != now[field]:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {path} is of {macro} {about[field]!r}: expected the same to"
                f" add to it, found {now[field]!r}"
            )
    return about


def _probe_hint(one: EncoderInfo, other: EncoderInfo) -> str:
    return ", which gives other vectors now" if format_encoder(one) == format_encoder(other) else ""


def _split(found: np.ndarray) -> list[bytes]:
    """Keys [N] -> each as bytes, of which numpy would drop zeros at the end."""
    size, joined = _KEY.itemsize, found.tobytes()
    return [joined[at : at + size] for at in range(0, len(joined), size)]


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
    with (
        atomic_write.temporary_path(path, overwrite=True) as temporary,
        temporary.open("wb") as file,
    ):
        np.save(file, array)


def _locked(folder: pathlib.Path) -> int:
    """A descriptor that holds the folder until it is closed, or the process ends."""
    import fcntl

    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"SENTENCE_EMBEDDINGS {folder}: another process is adding to it"
        ) from error
    return descriptor
