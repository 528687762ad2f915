"""Scores held-out tasks by rank classification: `pemoe evaluate --help`."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    import jax

    from pemoe_jax.analysis.evaluation import Evaluation
    from pemoe_jax.checkpoints.models import OpenedModel
    from pemoe_jax.core import network, partitioning
    from pemoe_jax.core.params import PyTree
    from pemoe_jax.data.choices import ChoiceGroup
    from pemoe_jax.tasks import TaskRoles

FLAGS = gin_flags.make_parser(
    "evaluate",
    "Scores held-out tasks by rank classification and writes results.json, results.md and\n"
    "predictions to EVAL_OUTPUT_DIR. Checkpoints record their model, so no model file is needed.",
    example="""\
  pemoe evaluate --gin_file=runs/evaluate.gin \\
    --gin.CHECKPOINT_PATH="['base.safetensors', '/tmp/mov', '/tmp/lora']" \\
    --gin.EVAL_OUTPUT_DIR=/tmp/results --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model
""",
    macros=["runs/evaluate.gin"],
)


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


def evaluate(
    models: options.Models,
    data: options.Data,
    output_dir: str,
    mesh: "partitioning.MeshConfig",
    routing_picture: bool = False,
) -> dict[str, Any]:
    """Scores every model on every task; each input is encoded once for all of its choices.

    Args:
      models: the models to score, each a row of the table.
      data: `_score_eval` tasks, or a mixture of them.
      output_dir: folder for results.json, results.md, predictions/<run>/<task>.jsonl and
        routing_<run>.png.
      mesh: how each model is spread over the devices.
      routing_picture: whether to draw which experts the tasks use, if the model has routers.

    Returns:
      The contents of results.json.

    Raises:
      InputError: a setting or a file is wrong.
    """
    from pemoe_jax.analysis import evaluation
    from pemoe_jax.analysis.zero_shot import result_tables
    from pemoe_jax.analysis.zero_shot import results as results_lib
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import choices, row_checks, seqio_tasks

    setup = evaluation.open_evaluation(models, data, output_dir, mesh, seqio_tasks.subtask_names)

    def read_groups(name: str) -> "list[ChoiceGroup]":
        groups = choices.load_choice_groups(
            name, setup.lengths, max_examples=data.max_examples, use_cached=data.use_cached_tasks
        )
        return groups if setup.sentences is None else setup.sentences.attach_to(groups)

    groups = read_groups(data.name)
    groups_by_task: dict[str, list[ChoiceGroup]] = {name: [] for name in setup.task_names}
    for group in groups:
        groups_by_task[group.task].append(group)
    _report_rows(data.name, groups_by_task, setup.task_roles)
    results: dict[str, Any] = {"runs": []}
    for opened in setup.models:
        params = opened.load(opened.shardings(setup.mesh, setup.rules))
        with partitioning.use_mesh(setup.mesh, setup.rules):
            predictions = score_groups(
                opened.model, params, groups, data.batch_size, setup.mesh, f"scoring {opened.name}"
            )
        ties = [
            ("tied_scores", f"{group.task} example {group.idx + 1}")
            for group in groups
            if predictions[group].is_tied
        ]
        for line in row_checks.describe_odd_rows(ties):
            print(f"{opened.name}: {line}", flush=True)
        tasks = _task_results(groups_by_task, predictions, setup.task_roles)
        _write_predictions(setup.folder / "predictions" / opened.name, groups_by_task, predictions)
        summary = results_lib.summarize(tasks)
        about = describe_run(opened, summary["datasets"])
        results["runs"].append({**about, **summary, "tasks": tasks})
        # Written after each run, so that a later run that fails leaves the results so far.
        setup.write(results, result_tables.results_markdown(results))
        if routing_picture and setup.task_roles.datasets:
            _draw_routing(setup, opened, params, groups_by_task, read_groups, data.batch_size)
        del params  # before the next model is loaded
    result_tables.print_results(results)
    print(f"results in {setup.folder}/results.md, predictions in {setup.folder}/predictions")
    return results


def _report_rows(
    name: str, groups_by_task: "Mapping[str, Sequence[ChoiceGroup]]", task_roles: "TaskRoles"
) -> None:
    """Prints the tasks without rows to score, and the odd rows that the summary has not counted.

    Raises:
      InputError: there is nothing to score.
    """
    from pemoe_jax.core.errors import InputError, plural
    from pemoe_jax.data import row_checks
    from pemoe_jax.tasks.task_roles import abbreviate

    empty = [task for task, groups in groups_by_task.items() if not groups]
    without = "no rows with answer choices in the evaluation split"
    if len(empty) == len(groups_by_task):
        tasks = f" of {abbreviate(empty, 3)}" if empty != [name] else ""
        raise InputError(f"nothing to score in {name!r}: {without}{tasks}")
    if empty:
        print(f"not scored, {without}: {plural(len(empty), 'task')} ({abbreviate(empty, 3)})")
    odd = [
        (kind, f"{group.task} example {group.idx + 1}")
        for groups in groups_by_task.values()
        for group in groups
        for kind in group.anomalies
        if kind not in task_roles.counted_odd_rows.get(group.task, ())
    ]
    for line in row_checks.describe_odd_rows(odd):
        print(line, flush=True)


def score_groups(
    model: "network.Transformer",
    params: "PyTree",
    groups: "Sequence[ChoiceGroup]",
    batch_size: int,
    mesh: "jax.sharding.Mesh",
    label: str = "scoring",
) -> "dict[ChoiceGroup, Prediction]":
    """Returns the prediction for each group of answer choices.

    Args:
      model, params: the network, and its parameters on the mesh.
      groups: inputs with their choices.
      batch_size: inputs per batch, over all devices.
      mesh: the device mesh.
      label: label of the progress bar.

    Raises:
      InputError: a score is not finite.
    """
    import jax
    import numpy as np

    from pemoe_jax.analysis import evaluation
    from pemoe_jax.core import partitioning, steps
    from pemoe_jax.core.errors import InputError
    from pemoe_jax.data import inference_batches, prefetch
    from pemoe_jax.runtime import progress

    score = jax.jit(
        functools.partial(steps.score_choices, model),
        out_shardings=partitioning.replicated_sharding(mesh),
    )
    bar = progress.Progress(label, len(groups))
    batches = inference_batches.score_batches(groups, batch_size, multiple_of=mesh.shape["data"])
    results = (
        (score(params, partitioning.shard_batch(batch, mesh)), members)
        for batch, members in prefetch.prefetch(batches)
    )
    predictions: dict[ChoiceGroup, Prediction] = {}
    for scores, members in prefetch.keep_in_flight(results):
        for row, group in zip(np.asarray(scores), members, strict=False):  # [B, C]
            group_scores = row[: len(group.choices)]
            if not np.isfinite(group_scores).all():
                raise InputError(
                    f"{label}: expected finite scores, got {group_scores.tolist()} for"
                    f" {group.task}, example {group.idx + 1}: {evaluation.NOT_FINITE_ADVICE}"
                )
            best = int(np.argmax(group_scores))
            tied = {
                group.choice_texts[i].strip()
                for i in np.flatnonzero(group_scores == group_scores[best])
            }
            predictions[group] = Prediction(best, len(tied) > 1, group_scores.tolist())
        bar.report_if_due(len(predictions), "inputs")
    bar.close()
    return predictions


def _odd_kinds(group: "ChoiceGroup", prediction: Prediction) -> tuple[str, ...]:
    return (*group.anomalies, *(["tied_scores"] if prediction.is_tied else []))


def _task_results(
    groups_by_task: "Mapping[str, Sequence[ChoiceGroup]]",
    predictions: "Mapping[ChoiceGroup, Prediction]",
    task_roles: "TaskRoles",
) -> dict[str, Any]:
    """Returns the entry of each task in a run's `tasks` in results.json."""
    from pemoe_jax.analysis.zero_shot import results as results_lib
    from pemoe_jax.data import seqio_tasks

    return {
        name: results_lib.task_result(
            correct=[group.is_correct[predictions[group].best] for group in groups],
            chance=[sum(group.is_correct) / len(group.choices) for group in groups],
            dataset=task_roles.datasets.get(name, name),
            split=task_roles.eval_splits.get(name.removesuffix("_score_eval"))
            or seqio_tasks.eval_split(name)
            or "",
            odd=[kind for group in groups for kind in _odd_kinds(group, predictions[group])],
            same_answer=results_lib.same_answer(
                (predictions[group].best, group.choice_texts) for group in groups
            ),
        )
        for name, groups in groups_by_task.items()
        if groups
    }


def describe_run(opened: "OpenedModel", datasets: Mapping[str, object]) -> dict[str, Any]:
    """Returns a model's entry in results.json, without its scores.

    `trained_datasets` are the scored datasets that the run was trained on; the key is absent if
    they are unknown. `settings` is equal for runs that differ only by `seed`.
    """
    from pemoe_jax.analysis import counts
    from pemoe_jax.analysis.zero_shot import run_settings
    from pemoe_jax.core import adapters, network, params

    about = opened.summary()
    shapes = params.flatten(network.param_shapes(opened.model))
    described = adapters.describe(opened.model.adapters)
    about["variant"] = counts.method_label(about["method"], shapes, described)
    record = opened.record
    if record is None:
        return about
    settings = run_settings.read_settings(opened.path)
    if settings:
        about |= {"seed": record.seed, "settings": run_settings.fingerprint(settings)}
    if record.trained_datasets is not None:
        about["trained_datasets"] = sorted(set(record.trained_datasets) & set(datasets))
    return about


def _write_predictions(
    folder: Path,
    groups_by_task: "Mapping[str, Sequence[ChoiceGroup]]",
    predictions: "Mapping[ChoiceGroup, Prediction]",
) -> None:
    from pemoe_jax.runtime import atomic_write

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
            }
            for group in groups
        ]
        lines = "\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        atomic_write.write_text(folder / f"{name}.jsonl", lines + "\n")


def _draw_routing(
    setup: "Evaluation",
    opened: "OpenedModel",
    params: "PyTree",
    groups_by_task: "Mapping[str, Sequence[ChoiceGroup]]",
    read_groups: "Callable[[str], Sequence[ChoiceGroup]]",
    batch_size: int,
) -> None:
    """Draws which experts the first prompt of each dataset uses, trained on and held out."""
    from pemoe_jax.analysis import plots
    from pemoe_jax.analysis.routing import measure, probe

    experts = probe.expert_counts(opened.model)
    if not experts:
        return
    datasets = setup.task_roles.datasets
    scored, trained = (
        measure.first_task_per_dataset({name: datasets[name] for name in names})
        for names in (groups_by_task, setup.task_roles.train_score_tasks)
    )
    groups = {name: read_groups(name) for name in trained}
    groups |= {name: groups_by_task[name] for name in scored}
    examples = {
        name.removesuffix("_score_eval"): members[: measure.DEFAULT_EXAMPLES]
        for name, members in groups.items()
    }
    totals = measure.measure_routing(opened.model, params, examples, batch_size, setup.mesh)
    means = measure.mean_probs(totals, list(examples))
    trained_datasets = measure.trained_datasets(opened, setup.task_roles) or set()
    plots.routing_map(
        {site: means[site] for site in measure.select_sites(None, experts)},
        setup.folder / f"routing_{opened.name}.png",
        trained=[name for name in examples if datasets[name] in trained_datasets],
        title=f"Where tasks are routed: {opened.name}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, evaluate, argv)


if __name__ == "__main__":
    # Imported by name, so that gin configures this very module and not a second copy of it.
    from pemoe_jax import evaluate as imported

    sys.exit(imported.main())
