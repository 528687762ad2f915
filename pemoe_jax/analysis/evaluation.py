"""Code that `pemoe evaluate` and `pemoe infer` share: checks, opened models, result files."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pemoe_jax.analysis.zero_shot import results as results_lib
from pemoe_jax.checkpoints import models as models_lib
from pemoe_jax.checkpoints import run_settings
from pemoe_jax.checkpoints.records import package_versions
from pemoe_jax.core import partitioning
from pemoe_jax.core.errors import plural
from pemoe_jax.data import sentences, seqio_tasks, shots
from pemoe_jax.runtime import (
    atomic_write,
    distributed,
    file_io,
    folder_lock,
    gin_flags,
    options,
    run_file,
    step_times,
)
from pemoe_jax.tasks import TaskRoles
from pemoe_jax.tasks.task_roles import run_register

# Ends the errors about scores or logits that are not finite. It need not mention token ids out of
# range, another cause, since they are checked when rows are read.
NOT_FINITE_ADVICE = (
    "the checkpoint is damaged or diverged, or its numbers overflow in the model's dtype"
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The models and tasks of an evaluation.

    Attributes:
      folder: folder for the results; a temporary one in all processes but the first.
      mesh, rules: the device mesh and the sharding rules.
      models: the opened models.
      task_roles: the registered tasks by role, such as training and evaluation.
      task_names: the tasks to evaluate.
      lengths: maximum number of tokens of 'inputs' and 'targets'.
      sentences: source of sentence embeddings; None if no router reads them.
    """

    folder: file_io.AnyPath
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules
    models: list[models_lib.OpenedModel]
    task_roles: TaskRoles
    task_names: list[str]
    lengths: dict[str, int]
    sentences: sentences.SentenceSource | None

    def write(self, results: dict[str, Any], markdown: str) -> None:
        """Writes results.json and results.md."""
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        atomic_write.write_text(self.folder / "results.json", text)
        atomic_write.write_text(self.folder / "results.md", markdown)


def open_evaluation(
    models: options.Models,
    data: options.Data,
    output_dir: str,
    mesh: partitioning.MeshConfig,
    find_tasks: Callable[[str], list[str]],
    few_shot: options.FewShot = options.ZERO_SHOT,
) -> Evaluation:
    """Joins the run's processes, opens the models, registers the tasks and locks the folder.

    Args:
      models, data, output_dir, mesh: arguments of the command.
      find_tasks: function from the name of a task or mixture to the tasks to evaluate.
      few_shot: argument of the command.

    Raises:
      InputError: a setting or a checkpoint is wrong, the folder has results that this evaluation
        would not replace, or another command writes to the folder.
    """
    lengths = seqio_tasks.validate_lengths(data.task_feature_lengths)
    output = file_io.resolve_output_folder(output_dir, "EVAL_OUTPUT_DIR")
    device_mesh, rules = distributed.start(mesh, data.batch_size)
    opened_models = models_lib.open_selected(models)
    paths = [opened.path for opened in opened_models]
    # Check now what needs no tasks: importing TensorFlow to register them takes about 5 s.
    shots_used = results_lib.shots_of(few_shot.record)
    results_lib.check_overwrites(output, paths, shots=shots_used)
    warn_of_other_eos(paths)
    task_roles = run_register(data.register)
    task_roles.print_summary()
    for opened in opened_models:
        seqio_tasks.check_vocab_size(data.name, opened.model.config.vocab_size)
        if opened.record is not None:
            seqio_tasks.check_vocabulary(opened.path, opened.record.vocabulary, data.name)
    task_names = find_tasks(data.name)
    folder = distributed.output_folder(output)
    folder_lock.hold(folder, "EVAL_OUTPUT_DIR")
    # Now the tasks and their splits are known too, and no other command can add results.
    if results_lib.check_overwrites(output, paths, task_names, shots_used, task_roles.eval_splits):
        print(f"replacing the results in {output}", flush=True)
    begin_run_file(folder, opened_models, device_mesh, data, few_shot.record)
    return Evaluation(
        folder=folder,
        mesh=device_mesh,
        rules=rules,
        models=opened_models,
        task_roles=task_roles,
        task_names=task_names,
        lengths=lengths,
        sentences=sentences.open_for_models(
            opened_models,
            data.sentence_embeddings,
            data.name,
            lengths["inputs"],
            data.use_cached_tasks,
        ),
    )


def begin_run_file(
    folder: file_io.AnyPath,
    models: Sequence[models_lib.OpenedModel],
    mesh: jax.sharding.Mesh,
    data: options.Data,
    few_shot: Mapping[str, int],
) -> None:
    """Writes the run.json of an evaluation: versions, devices, models and tasks."""
    run_file.begin(
        folder,
        versions=package_versions(),
        devices=step_times.describe_devices([*mesh.devices.flat]),
        models=[
            {"path": each.path, "step": each.step, "base": each.record and each.record.base}
            for each in models
        ],
        data={"tasks": data.mixture_or_task_name, **few_shot},
    )


def report_shots(
    folder: file_io.AnyPath,
    shots_by_task: Mapping[str, shots.TaskShots],
    num_shots: Sequence[int],
    length: int,
) -> None:
    """Writes <folder>/shots/<task>.jsonl, and prints how many shots were left out.

    Shots are solved examples in front of an input.

    Args:
      folder: folder of the results.
      shots_by_task: task -> its shots.
      num_shots: for each input of all tasks, the number of shots in front of it.
      length: maximum number of tokens of an input with its shots.
    """
    for task, task_shots in shots_by_task.items():
        rows = [
            {"inputs": example.input_text, "targets": example.target_text}
            for example in task_shots.examples
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write.write_text(folder / "shots" / f"{task}.jsonl", lines)
    # SHOTS sets the count of all tasks alike.
    count = max(task_shots.count for task_shots in shots_by_task.values())
    total = count * len(num_shots)
    # Examples that a task prescribes, as MMLU does, are never replaced by others: an input that is
    # one of them has one shot fewer.
    has_prescribed = any(task_shots.is_prescribed for task_shots in shots_by_task.values())
    print(
        f"{plural(count, 'shot')} in front of each input; {total - sum(num_shots):,} of {total:,}"
        f" left out, as they do not fit into {length:,} tokens"
        + (" or solve the input itself" if has_prescribed else ""),
        flush=True,
    )


def warn_of_other_eos(paths: Sequence[str]) -> None:
    """Warns of each run that was trained with a P3_INPUTS_EOS other than the current value."""
    current = gin_flags.macro_value("P3_INPUTS_EOS")
    for path in paths:
        # A base model, or a run without P3, has no such setting and gets no warning.
        trained = run_settings.read_settings(path).get("P3_INPUTS_EOS", str(current))
        if current is not None and trained != str(current):
            seqio_tasks.warn_once(
                f"{path} was trained with P3_INPUTS_EOS={trained}, and P3_INPUTS_EOS is"
                f" {current}: pass --gin.P3_INPUTS_EOS={trained} for equal inputs"
            )
