"""Tokenizers for the Python API, without seqio and TensorFlow; token ids are those of seqio."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime import file_io
from pemoe_jax.tasks.vocabulary import (
    BYTES,
    SENTINELS,
    check_special_ids,
    find_sentinels,
    locate_vocabulary,
)


class Tokenizer(Protocol):
    """Encodes texts as token ids without EOS, and decodes ids up to the first EOS.

    Attributes:
      eos_id: id of EOS, the end of a text.
      vocab_size: number of ids, sentinels included.
    """

    @property
    def eos_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


def _until_eos(ids: Iterable[int], eos_id: int) -> list[int]:
    ids = [int(token_id) for token_id in ids]
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


class SentencePieceTokenizer:
    """T5's or mT5's SentencePiece file; 100 sentinels are added if it has none.

    Raises:
      InputError: the file does not exist, is not a SentencePiece model, or its special ids are
        not T5's.
    """

    # Hashed by `seqio_tasks.fingerprint_vocabulary` in place of the name of this class, so that
    # fingerprints equal those of seqio's vocabularies.
    fingerprint_kind = "LazyVocabulary"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        protos: Any = sentencepiece_model_pb2
        self.path, _ = locate_vocabulary(path, "vocabulary")
        if "://" in self.path:
            raise InputError(f"vocabulary must be a local file, got {self.path}: pass a copy of it")
        model = pathlib.Path(self.path).read_bytes()
        try:
            self.tokenizer = SentencePieceProcessor(model_proto=model)
        except Exception as error:  # sentencepiece raises types of its own
            raise InputError(
                f"vocabulary {self.path} is not a SentencePiece model: {first_line(error)}"
            ) from None
        check_special_ids(self.tokenizer, self.path, "vocabulary")
        if not find_sentinels(self.tokenizer):
            proto = protos.ModelProto.FromString(model)
            # In seqio's order: <extra_id_0> has the last id.
            for number in reversed(range(SENTINELS)):
                piece = f"▁<extra_id_{number}>"
                proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.USER_DEFINED)
            self.tokenizer = SentencePieceProcessor(model_proto=proto.SerializeToString())

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_id())

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_piece_size())

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        # A model can output larger ids: its embedding may have more rows than the vocabulary ids.
        known_ids = [
            token_id if token_id < self.vocab_size else self.tokenizer.unk_id()
            for token_id in _until_eos(ids, self.eos_id)
        ]
        return str(self.tokenizer.decode(known_ids))


class ByteTokenizer:
    """ByT5's vocabulary: ids 0 to 2 are padding, EOS and unknown; byte b has the id b + 3."""

    fingerprint_kind = "ByteVocabulary"
    eos_id = 1
    vocab_size = 3 + 256

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        ids = _until_eos(ids, self.eos_id)
        data = bytes(token_id - 3 for token_id in ids if 3 <= token_id < self.vocab_size)
        return data.decode(errors="ignore")


class _Unigram:
    """The pieces and scores of a tokenizer of transformers, with the methods of SentencePiece's."""

    def __init__(self, vocab: list[tuple[str, float]]) -> None:
        self._vocab = vocab

    def get_piece_size(self) -> int:
        return len(self._vocab)

    def id_to_piece(self, token_id: int) -> str:
        return self._vocab[token_id][0]

    def get_score(self, token_id: int) -> float:
        # A decimal of few digits, as in some tokenizer.json, is the float32 of SentencePiece.
        return float(np.float32(self._vocab[token_id][1]))


class HuggingFaceTokenizer:
    """Adapts a tokenizer of transformers to `Tokenizer`.

    Raises:
      InputError: its padding is not id 0, or it has no EOS.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.pad_token_id != 0 or tokenizer.eos_token_id is None:
            raise InputError(
                "vocabulary must be a tokenizer of T5, with padding at id 0 and an end token, got"
                f" {type(tokenizer).__name__} with {tokenizer.pad_token_id} and"
                f" {tokenizer.eos_token_id}"
            )
        self.eos_id = int(tokenizer.eos_token_id)
        self.vocab_size = len(tokenizer)

    @functools.cached_property
    def tokenizer(self) -> _Unigram | None:
        """The pieces of a T5 or mT5 tokenizer; None for others, such as ByT5's."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        model = {} if backend is None else file_io.parse_json(backend.to_str())["model"]
        return _Unigram(model["vocab"]) if model.get("type") == "Unigram" else None

    @property
    def fingerprint_kind(self) -> str | None:
        return None if self.tokenizer is None else SentencePieceTokenizer.fingerprint_kind

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(_until_eos(ids, self.eos_id), skip_special_tokens=True))


def open_tokenizer(vocabulary: object) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece file, 'bytes', or an object of transformers.

    Raises:
      InputError: it is none of these; see `SentencePieceTokenizer`.
    """
    if vocabulary == BYTES:
        return ByteTokenizer()
    if isinstance(vocabulary, (str, os.PathLike)):
        return SentencePieceTokenizer(vocabulary)
    if hasattr(vocabulary, "encode") and hasattr(vocabulary, "eos_token_id"):
        return HuggingFaceTokenizer(vocabulary)
    raise InputError(
        f"vocabulary must be a SentencePiece file, {BYTES!r} or a tokenizer of transformers, got"
        f" {vocabulary!r:.80}"
    )
