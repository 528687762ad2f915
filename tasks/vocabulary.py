"""Loads and checks the seqio vocabulary of a command's tasks (VOCAB_PATH).

`lazy_vocabulary` has the class of this vocabulary for SentencePiece files. The Python API does
without seqio: it uses `tokenizer`, whose token ids are the same.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import

if TYPE_CHECKING:
    import sentencepiece
    import seqio

T5_VOCAB_PATH = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
BYTES = "bytes"  # VOCAB_PATH of ByT5's vocabulary, which has no file
SENTINELS = 100  # number of sentinels, T5's tokens that stand for spans in span corruption


def default_vocab_path() -> str:
    """Returns the environment's PEMOE_VOCAB_PATH, or else the path of T5's public vocabulary."""
    return os.environ.get("PEMOE_VOCAB_PATH") or T5_VOCAB_PATH


def load_vocabulary(path: str | os.PathLike[str]) -> seqio.Vocabulary:
    """Loads a vocabulary; calls with the same file return the same object.

    Args:
      path: T5's or mT5's SentencePiece file (100 sentinels are added if it has none), or 'bytes'
        for ByT5's vocabulary (its sentinels are the last 100 bytes).

    Raises:
      InputError: the file does not exist, is not a SentencePiece model, or has other special ids
        than T5's.
    """
    vocabulary = open_vocabulary(*locate_vocabulary(path))
    _ = vocabulary.vocab_size  # reads the file
    return vocabulary


def locate_vocabulary(path: str | os.PathLike[str], setting: str = "VOCAB_PATH") -> tuple[str, int]:
    """Returns the absolute path of a vocabulary and the time of its last change, in ns.

    These are the arguments of `open_vocabulary`. The time is 0 for 'bytes' and for remote files.

    Args:
      path: see `load_vocabulary`.
      setting: name of the setting that holds the path, for errors.

    Raises:
      InputError: the path is local, but not that of a file.
    """
    text = os.fspath(path)
    if text == BYTES or "://" in text:
        return text, 0
    local = pathlib.Path(text).expanduser().absolute()
    if not local.is_file():
        raise InputError(
            f"{setting} must be a SentencePiece model file or {BYTES!r}, got"
            f" {'a folder' if local.is_dir() else 'no file'} at {path}"
        )
    return str(local), local.stat().st_mtime_ns


# Cached, because every object holds a copy of the model.
@functools.cache
def open_vocabulary(path: str, modified: int = 0) -> seqio.Vocabulary:
    """Returns a vocabulary whose file is read at its first use.

    Args:
      path: absolute path of a SentencePiece file, or 'bytes'.
      modified: time of the file's last change. It is part of the cache's key, so that a file that
        was replaced is opened again.
    """
    del modified
    if path == BYTES:
        return seqio_import.import_seqio().ByteVocabulary()
    from pemoe_jax.tasks.lazy_vocabulary import LazyVocabulary  # imports seqio

    return LazyVocabulary(path)


def check_special_ids(
    tokenizer: sentencepiece.SentencePieceProcessor, path: str, setting: str = "VOCAB_PATH"
) -> None:
    """Raises InputError unless pad, EOS and unknown have T5's ids."""
    ids = tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()
    if ids != (0, 1, 2):
        raise InputError(f"{setting} {path}: expected pad, eos, unk at ids (0, 1, 2), got {ids}")


def find_sentinels(tokenizer: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Returns the ids of the pieces <extra_id_0>, <extra_id_1>, …; [] if there are none."""
    ids = {}
    for token_id in range(tokenizer.get_piece_size()):
        # The pieces of mT5 and those that seqio adds begin with SentencePiece's mark for a space.
        if match := re.fullmatch(r"▁?<extra_id_(\d+)>", tokenizer.id_to_piece(token_id)):
            ids[int(match[1])] = token_id
    return [ids[number] for number in sorted(ids)]


def sentinel_ids(vocabulary: seqio.Vocabulary) -> list[int]:
    """Returns the ids of a vocabulary's sentinels, in the order of their use.

    Args:
      vocabulary: a vocabulary that `load_vocabulary` returned.
    """
    if isinstance(vocabulary, seqio_import.import_seqio().ByteVocabulary):
        last = vocabulary.vocab_size - 1
        return [last - number for number in range(SENTINELS)]
    return find_sentinels(vocabulary.tokenizer)
