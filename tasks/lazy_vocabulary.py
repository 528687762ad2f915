"""`LazyVocabulary`, the seqio vocabulary that `vocabulary` makes of a SentencePiece file.

It is in a module of its own because importing it imports seqio, which takes about 5 s.
"""

from __future__ import annotations

from typing import Any

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.data import seqio_import
from pemoe_jax.tasks.vocabulary import SENTINELS, check_special_ids, find_sentinels

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and filters its log
import seqio  # noqa: E402


class LazyVocabulary(seqio.SentencePieceVocabulary):
    """T5's or mT5's vocabulary, with sentinels added if the file has none.

    The file is read at the first use.

    Raises:
      InputError: at the first use, if the file cannot be read, is not a SentencePiece model, or has
        other special ids than T5's.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, extra_ids=SENTINELS)

    # seqio calls this before each use and keeps its result, the loaded model, in `_model`.
    def _model_context(self) -> Any:
        if self._model is not None:
            return self._model
        path = self.sentencepiece_model_file
        try:
            plain = seqio.SentencePieceVocabulary(path).tokenizer
        # protobuf, sentencepiece and TensorFlow each raise their own types.
        except Exception as error:
            if "://" not in path:
                raise InputError(
                    f"VOCAB_PATH {path} is not a SentencePiece model: {first_line(error)}"
                ) from None
            raise InputError(
                f"VOCAB_PATH {path} cannot be read: {first_line(error)}; pass a local copy of the"
                " base model's SentencePiece file (VOCAB_PATH, --vocab_path of cache_tasks, or the"
                " environment's PEMOE_VOCAB_PATH)"
            ) from None
        check_special_ids(plain, path)
        # mT5's file and some copies of T5's have sentinels, to which seqio would add more.
        if find_sentinels(plain):
            self._extra_ids = 0
        return super()._model_context()
