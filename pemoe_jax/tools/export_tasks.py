"""Writes evaluation tasks for lm-evaluation-harness: `pemoe export_tasks --help`."""

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    from pemoe_jax.data.choices import ChoiceGroup

FLAGS = gin_flags.make_parser(
    "export_tasks",
    "Writes the prompts that pemoe evaluate scores as tasks of lm-evaluation-harness: a YAML file\n"
    "and a file of JSON lines for each, in the folder LM_EVAL_DIR.",
    example="""\
  pemoe export_tasks --gin_file=runs/export_tasks.gin --gin.LM_EVAL_DIR=/tmp/lm_eval_tasks \\
    --gin.JSONL_DIR=my_prompts --gin.EVAL_TASKS="['reviews_*']" --gin.VOCAB_PATH=spiece.model
""",
    macros=["runs/export_tasks.gin"],
)

TAG = "pemoe"  # `--tasks pemoe` selects all exported tasks


def export_tasks(output_dir: str, data: options.Data) -> list[str]:
    """Writes the tasks that have answer choices, as the texts that `pemoe evaluate` tokenizes.

    Args:
      output_dir: output folder, a new or an empty one.
      data: `_score_eval` tasks, which have a row for each answer choice, or a mixture of them.

    Returns:
      The names of the tasks in lm-evaluation-harness.

    Raises:
      InputError: a setting or a file is wrong, the folder has files, or a choice is empty.
    """
    from pemoe_jax.data import choices, seqio_tasks
    from pemoe_jax.runtime import atomic_write, file_io
    from pemoe_jax.tasks import score_eval
    from pemoe_jax.tasks.task_roles import run_register

    folder = file_io.resolve_output_folder(
        file_io.resolve_local(output_dir, "LM_EVAL_DIR"), "LM_EVAL_DIR"
    )
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"LM_EVAL_DIR must be a new or an empty folder, got {folder} with files")
    lengths = seqio_tasks.validate_lengths(data.task_feature_lengths)
    roles = run_register(data.register)
    roles.print_summary()
    groups = choices.load_choice_groups(
        data.name, lengths, max_examples=data.max_examples, use_cached=data.use_cached_tasks
    )
    by_task: dict[str, list[ChoiceGroup]] = {}
    for group in groups:
        if "" in group.choice_texts:
            raise InputError(
                f"{group.task}: example {group.idx + 1}: answer choices must not be empty, got"
                f" {[*group.choice_texts]!r:.80}: lm-evaluation-harness divides by their length;"
                " leave the task out"
            )
        by_task.setdefault(group.task, []).append(group)
    if not by_task:
        raise InputError(f"nothing to export in {data.name!r}: no rows with answer choices")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for task, members in by_task.items():
        # The name becomes that of a file, and users pass it to lm_eval's --tasks.
        name = re.sub(r"[^\w.-]", "_", score_eval.plain_name(task))
        rows_file = folder / f"{name}.jsonl"
        lines = [json.dumps(_row(group), ensure_ascii=False) + "\n" for group in members]
        atomic_write.write_text(rows_file, "".join(lines))
        config = _task_config(name, os.path.abspath(rows_file), roles.datasets.get(task, task))
        # JSON is valid YAML, so no YAML writer is needed.
        atomic_write.write_text(folder / f"{name}.yaml", json.dumps(config, indent=2) + "\n")
        names.append(name)
    print(
        f"{folder}: {plural(len(names), 'task')} with {len(groups):,} examples; next: pemoe lm_eval"
        f" --model pemoe --tasks {TAG} --include_path {folder} --batch_size 32 --model_args base=…"
    )
    return names


def _row(group: "ChoiceGroup") -> dict[str, Any]:
    """Returns an example as an object of the file of JSON lines."""
    gold = [index for index, is_correct in enumerate(group.is_correct) if is_correct]
    # If no choice is correct, the index is -100, for which lm-evaluation-harness counts every
    # answer as wrong.
    return {"inputs": group.input_text, "choices": [*group.choice_texts], "gold": gold or [-100]}


def _task_config(name: str, rows_file: str, dataset: str) -> dict[str, Any]:
    """Returns the content of a task's YAML file.

    Its `doc_to_…` entries are names of fields of `_row`. They could also be templates, but the
    inputs are whole prompts already.

    Args:
      name: name of the task.
      rows_file: absolute path of the rows, since lm-evaluation-harness may run in any folder.
      dataset: name of the dataset, for the second tag.
    """
    metrics = ("acc", "acc_norm", "acc_bytes")
    return {
        "task": name,
        "tag": [TAG, f"{TAG}_{dataset}"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": rows_file}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "inputs",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        # Targets of T5 have no space in front.
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, export_tasks, argv)
