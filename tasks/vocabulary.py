"""The SentencePiece vocabulary of a run: VOCAB_PATH."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import

if TYPE_CHECKING:
    import seqio

T5_VOCAB_PATH = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
SENTINELS = 100  # sentinel tokens of span corruption, added after the file's own pieces


def default_vocab_path() -> str:
    """Returns the environment's PEMOE_VOCAB_PATH, or else the path of T5's public vocabulary."""
    return os.environ.get("PEMOE_VOCAB_PATH") or T5_VOCAB_PATH


def load_vocabulary(path: str | os.PathLike[str]) -> seqio.SentencePieceVocabulary:
    """Loads a SentencePiece file and adds T5's sentinels; the same file returns the same object.

    Raises:
      InputError: the file does not exist, is not a SentencePiece model, or has other special ids
        than T5's.
    """
    if "://" in os.fspath(path):  # seqio reads remote files through TensorFlow
        return _load(os.fspath(path), 0)
    local = pathlib.Path(path).expanduser().absolute()
    if not local.is_file():
        raise InputError(f"VOCAB_PATH must be a SentencePiece model file, got no file at {path}")
    return _load(str(local), local.stat().st_mtime_ns)


# One object for each file: every object holds a copy of the model.
@functools.cache
def _load(path: str, modified: int) -> seqio.SentencePieceVocabulary:
    del modified  # part of the cache's key: a file that was replaced is loaded again
    vocabulary = seqio_import.import_seqio().SentencePieceVocabulary(path, extra_ids=SENTINELS)
    try:
        # seqio loads the file at the first access
        ids = vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id
    except Exception as error:  # protobuf, sentencepiece and tensorflow each raise their own types
        message = str(error).strip().split("\n")[0]
        if "://" in path:
            raise InputError(
                f"VOCAB_PATH {path} cannot be read: {message}; pass a local copy of the base"
                " model's SentencePiece file by --gin.VOCAB_PATH or the environment's"
                " PEMOE_VOCAB_PATH"
            ) from None
        raise InputError(f"VOCAB_PATH {path} is not a SentencePiece model: {message}") from None
    if ids != (0, 1, 2):
        raise InputError(f"VOCAB_PATH {path}: expected pad, eos, unk at ids (0, 1, 2), got {ids}")
    return vocabulary
