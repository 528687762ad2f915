"""Scores held-out tasks by rank classification: `pemoe evaluate --help`."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    from pemoe_jax.analysis.evaluation import Evaluation
    from pemoe_jax.checkpoints.models import OpenedModel
    from pemoe_jax.core import partitioning
    from pemoe_jax.core.params import PyTree
    from pemoe_jax.data.choices import ChoiceGroup

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


def evaluate(
    models: options.Models,
    data: options.Data,
    output_dir: str,
    mesh: "partitioning.MeshConfig",
    routing_picture: bool = False,
    few_shot: options.FewShot = options.ZERO_SHOT,
    length_normalized: bool = False,
) -> dict[str, Any]:
    """Scores every model on every task; each input is encoded once for all of its choices.

    Args:
      models: the models to score, each a row of the table.
      data: `_score_eval` tasks, which have a row for each answer choice, or a mixture of them.
      output_dir: folder for results.json, results.md, predictions/<run>/<task>.jsonl,
        shots/<task>.jsonl and routing_<run>.png.
      mesh: the shape of the device mesh, and how parameters are sharded over it.
      routing_picture: whether to draw which experts the tasks use, on inputs without shots, for
        models with routers.
      few_shot: the solved examples in front of each input.
      length_normalized: whether to also report accuracy by log-likelihood per character, byte and
        token of a choice.

    Returns:
      The contents of results.json.

    Raises:
      InputError: a setting or a file is wrong.
    """
    from pemoe_jax.analysis import benchmark_table, evaluation
    from pemoe_jax.analysis.zero_shot import rank_classification, result_tables
    from pemoe_jax.analysis.zero_shot import results as results_lib
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import choices, row_checks, seqio_tasks, shots

    setup = evaluation.open_evaluation(
        models, data, output_dir, mesh, seqio_tasks.subtask_names, few_shot
    )

    def read_groups(name: str) -> "list[ChoiceGroup]":
        groups = choices.load_choice_groups(
            name, setup.lengths, max_examples=data.max_examples, use_cached=data.use_cached_tasks
        )
        return groups if setup.sentences is None else setup.sentences.attach_to(groups)

    groups = read_groups(data.name)
    # `groups_by_task` may get shots below; the routing picture needs the inputs without them.
    groups_by_task = zero_shot_groups = _group_by_task(groups, setup.task_names)
    rank_classification.report_rows(data.name, groups_by_task, setup.task_roles)
    if few_shot.shots:
        names = [name for name, members in zero_shot_groups.items() if members]
        length = setup.lengths["inputs"]
        task_shots = shots.load_shots(names, few_shot, length, data.use_cached_tasks)
        groups = shots.add_shots(groups, task_shots, length)
        groups_by_task = _group_by_task(groups, setup.task_names)
        num_shots = [group.num_shots or 0 for group in groups]
        evaluation.report_shots(setup.folder, task_shots, num_shots, length)
    results: dict[str, Any] = {"runs": []}
    for opened in setup.models:
        params = opened.load(opened.shardings(setup.mesh, setup.rules))
        # Only scoring is timed: the time to load a model depends on the disk.
        start = time.monotonic()
        with partitioning.use_mesh(setup.mesh, setup.rules):
            predictions = rank_classification.score_groups(
                opened.model, params, groups, data.batch_size, setup.mesh, f"scoring {opened.name}"
            )
        seconds = time.monotonic() - start
        ties = [
            ("tied_scores", f"{group.task} example {group.idx + 1}")
            for group in groups
            if predictions[group].is_tied
        ]
        for line in row_checks.describe_odd_rows(ties):
            print(f"{opened.name}: {line}", flush=True)
        tasks = rank_classification.task_results(
            groups_by_task, predictions, setup.task_roles, few_shot.shots, length_normalized
        )
        rank_classification.write_predictions(
            setup.folder / "predictions" / opened.name, groups_by_task, predictions
        )
        summary = results_lib.summarize(tasks)
        benchmarks = benchmark_table.summarize_benchmarks(setup.task_roles.benchmarks, tasks)
        if benchmarks:
            summary["benchmarks"] = benchmarks
        description = describe_run(opened, summary["datasets"])
        description["evaluation_seconds"] = round(seconds, 3)
        results["runs"].append({**description, **few_shot.record, **summary, "tasks": tasks})
        # Written after each run, so that a later run that fails leaves the results so far.
        setup.write(results, result_tables.results_markdown(results))
        if routing_picture and setup.task_roles.datasets:
            _draw_routing(setup, opened, params, zero_shot_groups, read_groups, data.batch_size)
        # Otherwise two models would be in memory while the next one is loaded.
        del params
    result_tables.print_results(results)
    print(f"results in {setup.folder}/results.md, predictions in {setup.folder}/predictions")
    return results


def _group_by_task(
    groups: "Sequence[ChoiceGroup]", names: Sequence[str]
) -> "dict[str, list[ChoiceGroup]]":
    """Returns the groups of each named task, an empty list for a task without rows."""
    by_task: dict[str, list[ChoiceGroup]] = {name: [] for name in names}
    for group in groups:
        by_task[group.task].append(group)
    return by_task


def describe_run(opened: "OpenedModel", datasets: Mapping[str, object]) -> dict[str, Any]:
    """Returns a model's entry in results.json, without its scores.

    Its keys are those of `OpenedModel.summary` and:
      variant: the method with its experts, rank and routing, see `counts.method_label`.
      used: number of parameters that a token uses.
      flops, flops_with_places: the two numbers that `flops.token_flops` returns.
      seed: the run's seed.
      settings: a fingerprint of all other settings; runs that differ only in their seeds share it.
      step_times: see `step_times.read_step_times`.
      trained_datasets: the scored datasets that the run was trained on.

    A key whose value is unknown is absent, such as `settings` of a base model.
    """
    from pemoe_jax.analysis import counts
    from pemoe_jax.analysis.planning import flops
    from pemoe_jax.checkpoints import initial_run, runs
    from pemoe_jax.core import adapters, network, params
    from pemoe_jax.runtime import step_times

    entry = opened.summary()
    model = opened.model
    shapes = params.flatten(network.param_shapes(model))
    sites = adapters.describe(model.adapters)
    entry["variant"] = counts.method_label(entry["method"], shapes, sites, model.sparse)
    entry["used"] = flops.used_parameters(shapes, model.sparse)
    router_reads = flops.describe_router_reads(sites)
    entry["flops"], entry["flops_with_places"] = flops.token_flops(
        shapes, router_reads, model.sparse
    )
    record = opened.record
    if record is None:
        return entry
    settings = initial_run.fingerprint_settings(opened.path, record)
    if settings is not None:
        entry |= {"seed": record.seed, "settings": settings}
    if runs.is_run(opened.path):
        metrics = runs.resolve(opened.path)[0] / "metrics.jsonl"
        entry["step_times"] = step_times.read_step_times(metrics, opened.step)
    if record.trained_datasets is not None:
        entry["trained_datasets"] = sorted(set(record.trained_datasets) & set(datasets))
    return entry


def _draw_routing(
    setup: "Evaluation",
    opened: "OpenedModel",
    params: "PyTree",
    groups_by_task: "Mapping[str, Sequence[ChoiceGroup]]",
    read_groups: "Callable[[str], Sequence[ChoiceGroup]]",
    batch_size: int,
) -> None:
    """Draws which experts each dataset uses, for the datasets of training and the scored ones.

    A dataset is represented by its first task, and a task by its first examples.

    Args:
      setup: the evaluation.
      opened, params: the model.
      groups_by_task: scored task -> its examples, without shots.
      read_groups: reads the examples of a task that is not scored.
      batch_size: number of rows of a batch.
    """
    from pemoe_jax.analysis import plots
    from pemoe_jax.analysis.routing import measure, probe
    from pemoe_jax.tasks import score_eval

    experts = probe.expert_counts(opened.model)
    if not experts:
        return
    datasets = setup.task_roles.datasets
    scored_tasks, training_tasks = (
        measure.first_task_per_dataset({name: datasets[name] for name in names})
        for names in (groups_by_task, setup.task_roles.train_score_tasks)
    )
    groups = {name: read_groups(name) for name in training_tasks}
    groups |= {name: groups_by_task[name] for name in scored_tasks}
    examples = {
        score_eval.plain_name(name): members[: measure.DEFAULT_EXAMPLES]
        for name, members in groups.items()
    }
    by_example = measure.measure_examples(opened.model, params, examples, batch_size, setup.mesh)
    totals = measure.sum_by_task(by_example, list(examples), measure.example_tasks(examples))
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
    # `python -m` runs this file as the module `__main__`, but gin configures the functions of
    # `pemoe_jax.evaluate`, a second copy: call that one.
    from pemoe_jax import evaluate as imported

    sys.exit(imported.main())
