"""Tasks of the package, and `register`: the one place where a run's data gets its seqio names."""

import importlib
import os
from typing import Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import seqio_caches

T5_VOCAB_PATH = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"


def default_vocab_path() -> str:
    """VOCAB_PATH where none is given: the environment's PEMOE_VOCAB_PATH, or T5's public file."""
    return os.environ.get("PEMOE_VOCAB_PATH") or T5_VOCAB_PATH


def register(
    jsonl_dir: str | None = None,
    vocab_path: str | None = None,
    module: str | None = None,
    p3_dir: str | None = None,
    inputs_eos: bool = True,
    **settings: Any,
) -> Any:
    """Registers a folder of JSON lines or P3; before it, imports a module that registers tasks.

    Args:
      jsonl_dir: folder of <task>/<split>.jsonl (JSONL_DIR), or None.
      vocab_path: the SentencePiece file (VOCAB_PATH).
      module: name of a module to import (MIXTURE_OR_TASK_MODULE), or None.
      p3_dir: folder of P3 (P3_DIR); None: where nothing else is given, the environment's
        PEMOE_P3_DIR, or else the caches in --seqio_additional_cache_dirs.
      inputs_eos: whether P3's inputs end in EOS (P3_INPUTS_EOS), see `p3.register`.
      **settings: further arguments of `jsonl.register`; of `eval_examples` P3 takes account too.

    Returns:
      What `jsonl.register` or `p3.register` returns; None where a module is all there is.

    Raises:
      InputError: nothing is given, or both folders, or something is wrong with what is.
    """
    if module is not None:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # something that the module itself imports is missing
            raise InputError(f"MIXTURE_OR_TASK_MODULE {module!r}: no such module") from error
    if jsonl_dir is None and module is None:
        p3_dir = p3_dir or os.environ.get("PEMOE_P3_DIR")
    only_caches = jsonl_dir is None and module is None and bool(seqio_caches.additional_cache_dirs)
    if p3_dir or only_caches:
        if jsonl_dir is not None:
            raise InputError(f"expected JSONL_DIR or P3_DIR, found both: {jsonl_dir}, {p3_dir}")
        for macro in ("train_tasks", "eval_tasks"):
            if settings.get(macro) is not None:
                raise InputError(
                    f"{macro.upper()} chooses among JSONL_DIR's tasks, found it with P3_DIR:"
                    " name a mixture or a task by MIXTURE_OR_TASK_NAME"
                )
        from pemoe_jax.tasks import p3

        return p3.register(p3_dir, vocab_path, settings.get("eval_examples"), inputs_eos)
    if jsonl_dir is None:
        if module is None:
            raise InputError(
                "no data: set JSONL_DIR and VOCAB_PATH, or P3_DIR (or give"
                " --seqio_additional_cache_dirs), or MIXTURE_OR_TASK_MODULE"
            )
        return None
    if vocab_path is None:
        raise InputError("VOCAB_PATH is not set: expected the SentencePiece file of the base model")
    from pemoe_jax.tasks import jsonl

    return jsonl.register(jsonl_dir, vocab_path, **settings)
