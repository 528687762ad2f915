"""Fine-tunes a model from Python: `finetune`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pemoe_jax.api import loading
from pemoe_jax.api.loaded_model import StrPath
from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime import compile_cache


def finetune(
    base: StrPath | None,
    method: str,
    train: StrPath | Sequence[Mapping[str, Any]],
    model_dir: StrPath,
    *,
    validation: Sequence[Mapping[str, Any]] | None = None,
    vocabulary: StrPath | None = None,
    size: str = "t5_1_1",
    routing: str | Sequence[str] = (),
    gin_files: Sequence[StrPath] = (),
    allow_changes: bool = False,
    **options: Any,
) -> str:
    """Fine-tunes a base as `pemoe train` does, with its gin files, checks and messages.

    A call with the same `model_dir` resumes from its newest checkpoint. The function imports
    TensorFlow, and configures gin for the whole process.

    Args:
      base: the base model, or a run to continue from (INITIAL_CHECKPOINT_PATH); None: random
        weights of `size`.
      method: name of a file in gin/methods/: 'mov', 'molora', 'ia3', 'lora', 'full', ….
      train: a folder of JSON lines (JSONL_DIR); or a list of rows, each a mapping with 'inputs',
        'targets' and optionally 'answer_choices', which are written to `model_dir`/data.
      model_dir: folder of the run (MODEL_DIR).
      validation: rows on which the loss is evaluated every EVAL_PERIOD steps; only if `train` is a
        list of rows.
      vocabulary: the base's SentencePiece file, a folder with a `spiece.model`, or 'bytes'
        (VOCAB_PATH); None: the `spiece.model` in the folder of the base, or else the command's
        default.
      size: name of a file in gin/models/.
      routing: name of a file in gin/routing/, or several: 'top_2', ….
      gin_files: paths of further gin files.
      allow_changes: whether a run may resume with different data, seed or batches.
      options: the macros that `pemoe train --help` lists, in lower case: train_steps, batch_size,
        num_experts, …. A string that begins with '@' or '%' is a gin reference.

    Returns:
      The folder of the run, for `load_model`.

    Raises:
      InputError: a setting or a file is wrong, in which case no checkpoint is written; or a step is
        not finite, or the data end before `train_steps`.
    """
    compile_cache.enable_in_process()
    from pemoe_jax import train as train_lib
    from pemoe_jax.runtime import folder_lock, gin_flags, run_file
    from pemoe_jax.tasks.vocabulary import BYTES, locate_vocabulary

    gin_flags.silence_libraries()
    run_folder = os.fspath(model_dir)
    data_folder: StrPath
    rows: Sequence[Mapping[str, Any]] | None
    if isinstance(train, (str, os.PathLike)):
        data_folder, rows = train, None
        if validation is not None:
            raise InputError(
                "validation must be None if train is a folder, which has its own splits"
            )
    else:
        data_folder, rows = f"{run_folder}/data", train
    if isinstance(gin_files, (str, os.PathLike)):
        raise InputError(f"gin_files must be a list of paths, got {gin_files!r}")
    if not isinstance(vocabulary, (str, os.PathLike, type(None))):
        raise InputError(
            f"vocabulary must be a SentencePiece file or {BYTES!r}, got a"
            f" {type(vocabulary).__name__}: training cannot use a tokenizer of transformers"
        )
    if vocabulary is None and base is not None:
        vocabulary = loading.find_spiece(base)
    elif vocabulary is not None:
        vocabulary = loading.find_spiece(vocabulary) or vocabulary
        # Checked here too, so that an error names the argument instead of VOCAB_PATH.
        locate_vocabulary(vocabulary, "vocabulary")
    if "train_steps" not in options and not gin_files:
        raise InputError("train_steps is not set: pass train_steps=…, the number of steps")
    macros = {
        "MODEL_DIR": run_folder,
        "INITIAL_CHECKPOINT_PATH": base,
        "JSONL_DIR": data_folder,
        **({} if vocabulary is None else {"VOCAB_PATH": vocabulary}),
        **{name.upper(): value for name, value in options.items()},
    }
    files = [f"models/{size}.gin", f"methods/{method}.gin"]
    files += [
        f"routing/{name}.gin" for name in ([routing] if isinstance(routing, str) else routing)
    ]
    files += [os.fspath(file) for file in gin_files]
    args = train_lib.FLAGS.parse_args([f"--gin_file={f}" for f in (*files, "runs/finetune.gin")])
    try:
        gin_flags.load_config(args, [f"{name} = {_gin_text(v)}" for name, v in macros.items()])
        if rows is not None:
            _write_rows(data_folder, {"train": rows, "validation": validation})
        gin_flags.call_configured(train_lib.train, allow_changes=allow_changes)
        run_file.finish("finished", "the work is done")
    # Records how the run ended, as `gin_flags.run_command` does for the commands.
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if is_interrupt else f"{type(error).__name__}: {first_line(error)}"
        run_file.finish("stopped" if is_interrupt else "failed", reason)
        raise
    finally:
        folder_lock.release_all()
    return run_folder


def _gin_text(value: object) -> str:
    """Returns a value as gin text: a literal, or a reference such as '@optim.adamw' unchanged."""
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    return value if isinstance(value, str) and value[:1] in ("@", "%") else repr(value)


def _write_rows(folder: StrPath, splits: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> None:
    """Writes rows as a folder of JSON lines with a single task, `rows`.

    Args:
      folder: the folder.
      splits: split -> its rows, or None to delete a file that an earlier call wrote.

    Raises:
      InputError: a split is not a list of rows. Nothing is written then.
    """
    from pemoe_jax.runtime import atomic_write, file_io

    texts = {
        split: None if rows is None else _to_json_lines(split, rows)
        for split, rows in splits.items()
    }
    for split, text in texts.items():
        path = file_io.resolve_local(folder, "MODEL_DIR") / "rows" / f"{split}.jsonl"
        if text is None:
            path.unlink(missing_ok=True)
        # If a call resumes with the same rows, their file is not written again.
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write.write_text(path, text)


def _to_json_lines(split: str, rows: Sequence[Mapping[str, Any]]) -> str:
    try:
        # `{**row}` raises TypeError unless a row is a mapping; `dict(row)` would accept a list of
        # pairs too.
        return "".join(json.dumps({**row}, ensure_ascii=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{split} must be a list of rows (mappings that JSON can represent), got"
            f" {rows!r:.80}: {error}"
        ) from None
