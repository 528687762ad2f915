"""Registers data sources as seqio tasks: P3, JSON lines, MMLU, BBH and pretraining.

A run's gin file binds the function that the command calls for this: `register` in this module, or
`pretrain.register`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks
from pemoe_jax.runtime import seqio_cache_dirs
from pemoe_jax.tasks.task_roles import TaskRoles
from pemoe_jax.tasks.vocabulary import default_vocab_path, locate_vocabulary

__all__ = ["TaskRoles", "check_p3_paths", "default_vocab_path", "register"]

# The names of T0's mixtures, for an error message. They are repeated here because importing `p3`,
# which defines them, would register P3's tasks.
_P3_MIXTURES = (
    "t0_train",
    "t0+_train",
    "t0++_train",
    "t0_train_one_og_prompt",
    "t0_train_all_og_prompts",
    "t0_eval_score_eval",
    "t0_train_score_eval",
)


def check_p3_paths(p3_dir: str | None, vocab_path: str | None) -> None:
    """Raises InputError for paths that do not exist.

    Commands call it before they import `p3`, because that imports seqio, which takes about 5 s.
    """
    if p3_dir and "://" not in p3_dir and not Path(p3_dir).expanduser().is_dir():
        raise InputError(f"P3_DIR {p3_dir} must be a folder, got no such folder")
    if vocab_path is not None:
        locate_vocabulary(vocab_path)


def register(
    jsonl_dir: str | None = None,
    vocab_path: str | None = None,
    module: str | None = None,
    p3_dir: str | None = None,
    inputs_eos: bool = True,
    train_tasks: Sequence[str] | None = None,
    eval_tasks: Sequence[str] | None = None,
    eval_examples: int | None = None,
    use: Collection[str] = ("train", "eval"),
    mmlu_dir: str | None = None,
    mmlu_split: str = "test",
    bbh_dir: str | None = None,
) -> TaskRoles:
    """Imports a user's module, if it is set, and then registers the tasks of a folder.

    Args:
      jsonl_dir: folder of <task>/<split>.jsonl, with an optional INDEX.json.
      vocab_path: the base model's SentencePiece file, T5's or mT5's; 'bytes' for ByT5.
      module: name of a Python module that registers seqio tasks.
      p3_dir: folder of P3, as tfrecords, Parquet or templates. If neither it nor other data is set,
        P3 is read from the environment's PEMOE_P3_DIR, or else from the caches in
        --seqio_additional_cache_dirs.
      inputs_eos: whether P3's inputs end in EOS; T0 was trained without it.
      train_tasks: names or patterns (*) of JSONL_DIR's tasks to train on. None: as INDEX.json says,
        else all tasks whose dataset is not held out.
      eval_tasks: names or patterns (*) of JSONL_DIR's tasks to score; their datasets are held out
        from training. None: as INDEX.json says.
      eval_examples: maximum number of examples of each evaluation split, counted from its start.
        None: all.
      use: see `jsonl.register`.
      mmlu_dir: folder of MMLU's csv files, for evaluation: <split>/<subject>_<split>.csv of the
        splits dev (for the shots) and MMLU_SPLIT.
      mmlu_split: MMLU's split to score, 'test' or 'val'.
      bbh_dir: folder of BIG-Bench Hard, for decoding: bbh/<task>.json and cot-prompts/<task>.txt.

    Returns:
      The tasks by role; `TaskRoles()` if only a module is set.

    Raises:
      InputError: no data or several folders are set, a setting does not apply to the folder, the
        module does not exist, or the `register` of the folder's kind raises.
    """
    if module is not None:
        _import_module(module)
    # PEMOE_P3_DIR is usually set for a whole machine, so a run that names other data ignores it.
    other_data = (jsonl_dir, module, mmlu_dir, bbh_dir)
    only_caches = False
    if all(setting is None for setting in other_data):
        p3_dir = p3_dir or os.environ.get("PEMOE_P3_DIR")
        only_caches = p3_dir is None and bool(seqio_cache_dirs.additional_cache_dirs)
    settings = {
        "JSONL_DIR": jsonl_dir,
        "P3_DIR": p3_dir,
        "MMLU_DIR": mmlu_dir,
        "BBH_DIR": bbh_dir,
    }
    folders = {macro: folder for macro, folder in settings.items() if folder}
    if len(folders) > 1:
        several = ", ".join(f"{macro}={folder!r}" for macro, folder in folders.items())
        raise InputError(f"expected one folder of tasks, got {several}")
    # The setting that chooses the kind of data; '' if only a module is set, or nothing.
    macro = next(iter(folders), "P3_DIR" if only_caches else "")
    if macro not in ("", "JSONL_DIR"):
        for name, patterns in (("TRAIN_TASKS", train_tasks), ("EVAL_TASKS", eval_tasks)):
            if patterns is not None:
                raise InputError(
                    f"{name} must be None with {macro}, got {patterns!r}: name a mixture or a task"
                    " by MIXTURE_OR_TASK_NAME"
                )
    if macro == "P3_DIR":
        check_p3_paths(p3_dir, vocab_path)
        from pemoe_jax.tasks import p3

        return p3.register(p3_dir, vocab_path, eval_examples, inputs_eos)
    # A gin file may still name a mixture whose data is not set. The error then says what to pass.
    for name in _P3_MIXTURES:
        seqio_tasks.unavailable[name] = "it is a mixture of P3: pass P3_DIR instead of other data"
    if not macro:
        if module is None:
            raise InputError(
                "no data is set: pass JSONL_DIR and VOCAB_PATH, or P3_DIR (or"
                " --seqio_additional_cache_dirs), MMLU_DIR, BBH_DIR or MIXTURE_OR_TASK_MODULE"
            )
        return TaskRoles()
    if vocab_path is None:
        raise InputError(
            "VOCAB_PATH is not set: pass --gin.VOCAB_PATH=… with the base model's SentencePiece"
            " file, or 'bytes' for ByT5"
        )
    benchmark = {"MMLU_DIR": "mmlu", "BBH_DIR": "bbh"}.get(macro)
    if benchmark is not None:
        hint = f"pass --gin_file=runs/{benchmark}.gin, or MIXTURE_OR_TASK_NAME={benchmark}"
        for mixture in ("jsonl_decode", "jsonl_train", "jsonl_score_eval"):
            seqio_tasks.unavailable[mixture] = f"it is a mixture of JSONL_DIR: with {macro} {hint}"
    if mmlu_dir is not None:
        from pemoe_jax.tasks import mmlu

        return mmlu.register(mmlu_dir, vocab_path, eval_examples, mmlu_split)
    if bbh_dir is not None:
        from pemoe_jax.tasks import bbh

        return bbh.register(bbh_dir, vocab_path, eval_examples)
    from pemoe_jax.tasks import jsonl

    assert jsonl_dir is not None
    return jsonl.register(jsonl_dir, vocab_path, train_tasks, eval_tasks, eval_examples, use)


def _import_module(module: str) -> None:
    """Imports a user's module; InputError if there is none of this name."""
    if "" in module.split("."):
        raise InputError(f"MIXTURE_OR_TASK_MODULE must be the name of a module, got {module!r:.80}")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it imports does not
        raise InputError(f"MIXTURE_OR_TASK_MODULE {module!r}: no such module") from error
