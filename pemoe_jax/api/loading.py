"""Loads a model with its vocabulary: `load_model`."""

from __future__ import annotations

import ast
import os
from typing import TYPE_CHECKING, Any

from pemoe_jax.api.loaded_model import LoadedModel, StrPath
from pemoe_jax.api.model import Model
from pemoe_jax.api.texts import Limits
from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.runtime import compile_cache

if TYPE_CHECKING:
    from pemoe_jax.checkpoints.models import OpenedModel
    from pemoe_jax.tasks.tokenizer import Tokenizer


def load_model(
    path: StrPath,
    adapter: StrPath | None = None,
    vocabulary: Any = None,
    *,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
    max_input_tokens: int = 1024,
    max_target_tokens: int = 256,
    batch_size: int = 32,
) -> Model:
    """Loads a model onto JAX's default device.

    Compiled programs are cached on disk, in the folder that the commands use, unless JAX already
    has a cache folder.

    Args:
      path: a base model, in the format of T5X, Hugging Face or this package; or a run, a run's
        checkpoint or an adapter, which is loaded together with its base.
      adapter: a run, a run's checkpoint, an exported adapter or a PEFT adapter, trained on the base
        `path`; None: `path` alone.
      vocabulary: the base's SentencePiece file, a folder with a `spiece.model`, 'bytes' for ByT5,
        or a tokenizer of transformers. None: the `spiece.model` in a folder of the base, or else
        the VOCAB_PATH of the run, or else the environment's PEMOE_VOCAB_PATH.
      dtype: dtype of activations, 'float32' or 'bfloat16'; None: as in training, or float32 for a
        base.
      frozen_dtype: dtype of frozen matrices, 'int8', 'float8_e4m3fn' or 'activations' (equal to
        `dtype`); None: as in training, or 'activations' for a base.
      max_input_tokens: longer texts are truncated.
      max_target_tokens: longer answer choices are truncated.
      batch_size: largest number of texts that are computed together.

    Raises:
      InputError: a path is not a model, the adapter belongs to another base, or the vocabulary is
        missing or differs from that of training.
    """
    compile_cache.enable_in_process()
    from pemoe_jax.checkpoints import models

    for name, value in (
        ("max_input_tokens", max_input_tokens),
        ("max_target_tokens", max_target_tokens),
        ("batch_size", batch_size),
    ):
        check_integer(name, value)
    base_path = None if adapter is None else os.fspath(path)
    opened = models.open_models(
        os.fspath(path if adapter is None else adapter),
        base_path=base_path,
        dtype=dtype,
        frozen_dtype=frozen_dtype,
    )[0]
    tokenizer = _open_vocabulary(vocabulary, opened)
    limits = Limits(max_input_tokens, max_target_tokens, batch_size)
    return Model(LoadedModel(opened, tokenizer), tokenizer, limits)


def _open_vocabulary(vocabulary: Any, opened: OpenedModel) -> Tokenizer:
    """Returns the tokenizer that `vocabulary` names; for None, the tokenizer of the base or run.

    Raises:
      InputError: see `load_model`.
    """
    from pemoe_jax.checkpoints import huggingface, run_settings
    from pemoe_jax.runtime import file_io
    from pemoe_jax.tasks import tokenizer

    if vocabulary is not None:
        if isinstance(vocabulary, (str, os.PathLike)):
            vocabulary = find_spiece(vocabulary) or vocabulary
        return tokenizer.open_tokenizer(vocabulary)
    # The recorded value is gin text: a quoted string, or a reference to a function.
    recorded = run_settings.read_settings(opened.path).get("VOCAB_PATH", "None")
    if recorded == repr(tokenizer.BYTES):
        return tokenizer.ByteTokenizer()
    files = [find_spiece(path) for path in (opened.path, opened.base_path)]
    if recorded[:1] in ("'", '"'):  # a path, not a reference such as @tasks.default_vocab_path()
        files.append(ast.literal_eval(recorded))
    files.append(os.environ.get("PEMOE_VOCAB_PATH"))
    # The first local file that exists is used, because the recorded file may have been moved, and a
    # tokenizer cannot read from a bucket. `LoadedModel` compares it with the recorded fingerprint.
    for file in filter(None, files):
        if "://" not in file and file_io.to_path(file).expanduser().is_file():
            return tokenizer.open_tokenizer(file)
    raise InputError(
        "vocabulary must be the SentencePiece file of the base model (such as"
        f" vocabulary='t5-large-lm-adapt/{huggingface.VOCABULARY}'), 'bytes' or a tokenizer of"
        f" transformers, got None, and {opened.base_path or opened.path} has no"
        f" {huggingface.VOCABULARY}, and PEMOE_VOCAB_PATH is not set to a file"
    )


def find_spiece(path: StrPath | None) -> str | None:
    """Returns the path of `spiece.model` in a local folder; None if there is no such file."""
    from pemoe_jax.checkpoints import huggingface

    file = os.path.join(os.path.expanduser(path or ""), huggingface.VOCABULARY)
    return file if path is not None and os.path.isfile(file) else None
