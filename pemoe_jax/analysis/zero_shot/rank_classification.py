"""Rank classification: scores the answer choices of an example and predicts the likeliest."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pemoe_jax.analysis import evaluation
from pemoe_jax.analysis.zero_shot import results
from pemoe_jax.core import network, partitioning, steps
from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.core.params import PyTree
from pemoe_jax.data import inference_batches, prefetch, seqio_tasks
from pemoe_jax.data.choices import ChoiceGroup
from pemoe_jax.runtime import atomic_write, progress
from pemoe_jax.runtime.file_io import AnyPath
from pemoe_jax.tasks.task_roles import TaskRoles, abbreviate


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The scores of an input's answer choices.

    Attributes:
      best: index of the choice with the highest score, the first if several have it.
      is_tied: whether a choice of another text has the same score.
      scores: log-probability of each choice.
    """

    best: int
    is_tied: bool
    scores: list[float]


def report_rows(
    name: str, groups_by_task: Mapping[str, Sequence[ChoiceGroup]], task_roles: TaskRoles
) -> None:
    """Prints the tasks without rows to score, and the odd rows that the task summary did not count.

    Odd rows are scored, but may be mistakes, such as duplicate choices (see `data.row_checks`).

    Args:
      name: the task or mixture to evaluate.
      groups_by_task: the examples of each task.
      task_roles: the registered tasks by role.

    Raises:
      InputError: there is nothing to score.
    """
    empty = [task for task, groups in groups_by_task.items() if not groups]
    reason = "no rows with answer choices in the evaluation split"
    if len(empty) == len(groups_by_task):
        tasks = f" of {abbreviate(empty, 3)}" if empty != [name] else ""
        raise InputError(f"nothing to score in {name!r}: {reason}{tasks}")
    if empty:
        print(f"not scored, {reason}: {plural(len(empty), 'task')} ({abbreviate(empty, 3)})")
    task_roles.print_odd_rows(
        (group.task, group.idx + 1, kind)
        for groups in groups_by_task.values()
        for group in groups
        for kind in group.anomalies
    )


def score_groups(
    model: network.Transformer,
    params: PyTree,
    groups: Sequence[ChoiceGroup],
    batch_size: int,
    mesh: jax.sharding.Mesh,
    label: str = "scoring",
) -> dict[ChoiceGroup, Prediction]:
    """Returns the prediction for each group of answer choices.

    Args:
      model: the network.
      params: its parameters, on the mesh.
      groups: inputs with their choices.
      batch_size: inputs per batch, over all devices.
      mesh: the device mesh.
      label: label of the progress bar.

    Raises:
      InputError: a score is not finite.
    """
    score = jax.jit(
        functools.partial(steps.score_choices, model),
        out_shardings=partitioning.replicated_sharding(mesh),
    )
    bar = progress.Progress(label, len(groups))
    multiple_of = partitioning.data_parallelism(mesh)
    batches = inference_batches.score_batches(groups, batch_size, multiple_of=multiple_of)
    # Lazy: `keep_in_flight` reads the scores of a batch while the device computes the next ones.
    results = (
        (score(params, partitioning.shard_batch(batch, mesh)), members)
        for batch, members in prefetch.prefetch(batches)
    )
    predictions: dict[ChoiceGroup, Prediction] = {}
    for scores, members in prefetch.keep_in_flight(results):
        # Not strict: rows that fill up a batch [B, C] have no group.
        for row, group in zip(np.asarray(scores), members, strict=False):
            group_scores = row[: len(group.choices)]
            if not np.isfinite(group_scores).all():
                raise InputError(
                    f"{label}: expected finite scores, got {group_scores.tolist()} for"
                    f" {group.task}, example {group.idx + 1}: {evaluation.NOT_FINITE_ADVICE}"
                )
            best = int(np.argmax(group_scores))
            # Choices of the same text, such as two equal wrong answers, always have equal scores.
            # They are no tie.
            tied_texts = {
                group.choice_texts[i].strip()
                for i in np.flatnonzero(group_scores == group_scores[best])
            }
            predictions[group] = Prediction(best, len(tied_texts) > 1, group_scores.tolist())
        bar.report_if_due(len(predictions), "inputs")
    bar.close()
    return predictions


def _odd_kinds(group: ChoiceGroup, prediction: Prediction) -> tuple[str, ...]:
    """Returns the kinds of odd rows that an example belongs to, and 'tied_scores' for a tie."""
    return (*group.anomalies, *(["tied_scores"] if prediction.is_tied else []))


def best_by_length(group: ChoiceGroup, scores: Sequence[float]) -> dict[str, int]:
    """Returns the choice with the highest score per unit of length, for each of `NORMALIZED`.

    Characters and bytes are those of the text. Tokens include the EOS, whose log-probability is a
    part of the score. As in lm-evaluation-harness, the first of the choices with equal scores wins.

    Source: `process_results` of api/task.py in lm_eval 0.4.13.
    """
    texts = group.choice_texts
    lengths = {
        "acc_norm": [len(text) for text in texts],
        "acc_bytes": [len(text.encode()) for text in texts],
        "acc_tokens": [len(tokens) for tokens in group.choices],
    }
    return {
        # At least 1, because an empty answer has a score too, that of its EOS.
        name: int(np.argmax(np.asarray(scores) / np.maximum(lengths[name], 1)))
        for name in results.NORMALIZED
    }


def _normalized_correct(
    groups: Sequence[ChoiceGroup], predictions: Mapping[ChoiceGroup, Prediction]
) -> dict[str, list[bool]]:
    """Returns name in `NORMALIZED` -> whether the best choice of each example is correct."""
    best = [best_by_length(group, predictions[group].scores) for group in groups]
    return {
        name: [group.is_correct[choice[name]] for group, choice in zip(groups, best, strict=True)]
        for name in results.NORMALIZED
    }


def task_results(
    groups_by_task: Mapping[str, Sequence[ChoiceGroup]],
    predictions: Mapping[ChoiceGroup, Prediction],
    task_roles: TaskRoles,
    shots: int = 0,
    length_normalized: bool = False,
) -> dict[str, Any]:
    """Returns the entry of each task in a run's `tasks` in results.json.

    Args:
      groups_by_task: the examples of each task.
      predictions: the prediction for each example.
      task_roles: the registered tasks by role.
      shots: number of shots in front of each input, including those that did not fit.
      length_normalized: whether to add the accuracies of `results.NORMALIZED`.
    """
    return {
        name: results.task_result(
            correct=[group.is_correct[predictions[group].best] for group in groups],
            chance=[sum(group.is_correct) / len(group.choices) for group in groups],
            dataset=task_roles.datasets.get(name, name),
            split=task_roles.eval_splits.get(name.removesuffix("_score_eval"))
            or seqio_tasks.eval_split(name)
            or "",
            odd=[kind for group in groups for kind in _odd_kinds(group, predictions[group])],
            same_answer=results.same_answer(
                (predictions[group].best, group.choice_texts) for group in groups
            ),
            shots_left_out=sum(shots - (group.num_shots or 0) for group in groups)
            if shots
            else None,
            normalized=_normalized_correct(groups, predictions) if length_normalized else None,
        )
        for name, groups in groups_by_task.items()
        if groups
    }


def write_predictions(
    folder: AnyPath,
    groups_by_task: Mapping[str, Sequence[ChoiceGroup]],
    predictions: Mapping[ChoiceGroup, Prediction],
) -> None:
    """Writes <folder>/<task>.jsonl with a line for each example."""
    for name, groups in groups_by_task.items():
        rows = [
            {
                "idx": group.idx,
                "inputs": group.input_text,
                "answer_choices": group.choice_texts,
                "scores": [round(score, 5) for score in predictions[group].scores],
                "prediction": group.choice_texts[predictions[group].best],
                "correct": group.is_correct[predictions[group].best],
                "odd": _odd_kinds(group, predictions[group]),
                **({} if group.num_shots is None else {"shots": group.num_shots}),
            }
            for group in groups
        ]
        lines = "\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        atomic_write.write_text(folder / f"{name}.jsonl", lines + "\n")
