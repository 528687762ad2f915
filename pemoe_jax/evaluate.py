"""Zero-shot evaluation by rank classification: `pemoe evaluate --help`."""

import collections
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.core import network

FLAGS = gin_flags.make_parser(
    "evaluate",
    "Scores held-out tasks by rank classification and writes results.json, results.md and\n"
    "predictions to EVAL_OUTPUT_DIR. Checkpoints say themselves what model they are of.",
    example="""\
  pemoe evaluate --gin_file=runs/evaluate.gin \\
    --gin.CHECKPOINT_PATH="['base.safetensors', '/tmp/mov', '/tmp/lora']" \\
    --gin.EVAL_OUTPUT_DIR=/tmp/results --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model
""",
    macros=["runs/evaluate.gin"],
)


def evaluate(
    checkpoint_path: str | Sequence[str],
    output_dir: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int = 32,
    register: Callable[[], Any] | None = None,
    model: "network.Transformer | None" = None,
    initial_checkpoint_path: str | None = None,
    dtype: str | None = None,
    use_cached_tasks: bool = False,
    max_examples: int | None = None,
    sentence_embeddings: str | None = None,
    routing_picture: bool = False,
    model_parallelism: int = 1,
    fsdp: bool = False,
    frozen_dtype: str | None = None,
) -> dict[str, Any]:
    """Scores every checkpoint on every task, each input encoded once for all its choices.

    Args:
      checkpoint_path: runs, checkpoints or bases; one row of the table each.
      output_dir: gets results.json, results.md, predictions/<run>/<task>.jsonl, routing_<run>.png.
      mixture_or_task_name: `_score_eval` tasks, or a mixture of them.
      task_feature_lengths: tokens of 'inputs' and 'targets'; longer ones are cut and counted.
      batch_size: inputs at a time over all devices.
      register: registers the tasks.
      model: dimensions of a base that does not state them.
      initial_checkpoint_path: in place of the base that a checkpoint names.
      dtype: of activations, in place of what checkpoints say.
      frozen_dtype: of frozen matrices, in place of what checkpoints say.
      use_cached_tasks: seqio's offline caches.
      max_examples: of a task; None: all.
      sentence_embeddings: table for routers that read them; None: the tasks' own feature.
      routing_picture: draw what each expert is used for, for methods with routers.
      model_parallelism, fsdp: as of `train.train`.

    Returns:
      The results, as in results.json.

    Raises:
      InputError: anything the user can mend.
    """
    from pemoe_jax.analysis.zero_shot import result_tables
    from pemoe_jax.analysis.zero_shot import results as results_lib
    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import choices, sentences, seqio_tasks
    from pemoe_jax.runtime import atomic_write, distributed, file_io, progress

    output = file_io.resolve_local(output_dir, "EVAL_OUTPUT_DIR")
    distributed.initialize()
    folder = distributed.output_folder(output)
    mesh, rules = partitioning.make_mesh(model_parallelism), partitioning.axis_rules(fsdp)
    partitioning.check_batch_size(batch_size, mesh)
    partitioning.connect_processes(mesh)
    opened = models.open_models(
        checkpoint_path, model, initial_checkpoint_path, dtype, frozen_dtype
    )
    registered = register() if register is not None else None
    if registered is not None:
        print("\n".join(registered.lines()), flush=True)
    for one in opened:
        seqio_tasks.check_vocab_size(mixture_or_task_name, one.model.config.vocab_size)
    names = seqio_tasks.subtask_names(mixture_or_task_name)
    if results_lib.check_overwrites(output, [one.path for one in opened], names):
        print(f"replacing the results in {output}", flush=True)

    embedded = sentences.open_for_models(
        opened,
        sentence_embeddings,
        mixture_or_task_name,
        seqio_tasks.validate_lengths(task_feature_lengths)["inputs"],
        use_cached_tasks,
    )

    def read(name: str) -> list[Any]:
        found = choices.load_choice_groups(
            name, task_feature_lengths, max_examples=max_examples, use_cached=use_cached_tasks
        )
        return found if embedded is None else embedded.attach_to(found)

    everything = read(mixture_or_task_name)
    groups: dict[str, list[Any]] = {name: [] for name in names}
    for group in everything:
        groups[group.task].append(group)
    labels = registered.datasets if registered is not None else {}
    splits = registered.eval_splits if registered is not None else {}
    results: dict[str, Any] = {"runs": []}
    for one in opened:
        params = one.load(one.shardings(mesh, rules))
        bar = progress.Progress(f"scoring {one.name}", len(everything))
        with partitioning.use_mesh(mesh, rules):
            predicted = _score(one.model, params, everything, batch_size, mesh, bar)
        bar.close()
        tasks = {
            name: results_lib.task_result(
                correct=[group.is_correct[predicted[id(group)][0]] for group in members],
                chance=[sum(group.is_correct) / len(group.choices) for group in members],
                dataset=labels.get(name, name),
                split=splits.get(name.removesuffix("_score_eval"))
                or seqio_tasks.eval_split(name)
                or "",
                odd=[kind for group in members for kind in group.anomalies],
            )
            for name, members in groups.items()
            if members
        }
        _write_predictions(folder / "predictions" / one.name, groups, predicted)
        summary = results_lib.summarize(tasks)
        results["runs"].append({**_about(one, summary["datasets"]), **summary, "tasks": tasks})
        # after each run, so that what is there stays if a later one fails
        atomic_write.write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
        atomic_write.write_text(folder / "results.md", result_tables.results_markdown(results))
        if routing_picture and registered is not None:
            png = folder / f"routing_{one.name}.png"
            _draw_routing(one, params, groups, registered, png, read, batch_size, mesh)
        del params
    result_tables.print_results(results)
    print(f"results in {folder}/results.md, predictions in {folder}/predictions")
    return results


def _about(opened: Any, scored: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a run: its variant ('mov-30'), and the scored data sets it was trained on.

    Without `trained_datasets` it is not known which it was trained on; without `settings` not which
    runs differ from it by `seed` only.
    """
    from pemoe_jax.analysis import counts
    from pemoe_jax.analysis.zero_shot import run_settings
    from pemoe_jax.checkpoints import runs
    from pemoe_jax.core import adapters, network, params

    about = opened.summary()
    about["variant"] = counts.method_label(
        about["method"],
        params.flatten(network.param_shapes(opened.model)),
        adapters.describe(opened.model.adapters),
    )
    if opened.record is not None and runs.is_run(opened.path):
        config_file = runs.resolve(opened.path)[0] / "config.gin"
        if config_file.is_file():
            about["seed"] = opened.record.seed
            about["settings"] = run_settings.fingerprint(
                run_settings.parse_settings(config_file.read_text())
            )
    trained = getattr(opened.record, "trained_datasets", None)
    if trained is not None:
        about["trained_datasets"] = sorted(set(trained) & set(scored))
    return about


def _score(
    model: Any, params: Any, groups: Sequence[Any], batch_size: int, mesh: Any, bar: Any
) -> dict[int, tuple[int, list[float]]]:
    """id(group) -> (index of the best choice, score of each)."""
    import functools

    import jax
    import numpy as np

    from pemoe_jax.core import partitioning, steps
    from pemoe_jax.data import batching, prefetch

    score = jax.jit(
        functools.partial(steps.score_choices, model),
        out_shardings=partitioning.replicated_sharding(mesh),
    )
    devices = mesh.shape["data"]
    found: dict[int, tuple[int, list[float]]] = {}
    waiting: collections.deque[tuple[Any, list[Any]]] = collections.deque()

    def collect() -> None:
        scores, members = waiting.popleft()
        rows = np.asarray(scores)
        for row, group in zip(rows, members, strict=False):
            own = row[: len(group.choices)]
            found[id(group)] = (int(np.argmax(own)), [float(s) for s in own])
        bar.report_if_due(len(found), "inputs")

    for batch, members in prefetch.prefetch(
        batching.score_batches(groups, batch_size, multiple_of=devices)
    ):
        waiting.append((score(params, partitioning.shard_batch(batch, mesh)), members))
        if len(waiting) > 2:  # a few in flight keep the device busy
            collect()
    while waiting:
        collect()
    return found


def _write_predictions(
    folder: Path, groups: Mapping[str, Sequence[Any]], predicted: Mapping[int, tuple[int, Any]]
) -> None:
    from pemoe_jax.runtime import atomic_write

    for name, members in groups.items():
        lines = []
        for group in members:
            best, scores = predicted[id(group)]
            row = {
                "idx": group.idx,
                "inputs": group.input_text,
                "answer_choices": group.choice_texts,
                "scores": [round(score, 5) for score in scores],
                "prediction": group.choice_texts[best],
                "correct": group.is_correct[best],
                "odd": group.anomalies,
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        atomic_write.write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def _draw_routing(
    opened: Any,
    params: Any,
    groups: Mapping[str, Sequence[Any]],
    registered: Any,
    png: Path,
    read: Callable[[str], Sequence[Any]],
    batch_size: int,
    mesh: Any,
) -> None:
    """A picture of where tasks are routed, one prompt of each data set, trained on and held out."""
    from pemoe_jax.analysis import plots
    from pemoe_jax.analysis.routing import measure, probe

    experts = probe.expert_counts(opened.model)
    if not experts:
        return
    labels = registered.datasets
    shown = measure.first_task_per_dataset({name: labels[name] for name in groups})
    others = measure.first_task_per_dataset(
        {name: labels[name] for name in registered.train_score_tasks}
    )
    members = {name: read(name) for name in others} | {name: groups[name] for name in shown}
    members = {
        name.removesuffix("_score_eval"): of[: measure.DEFAULT_EXAMPLES]
        for name, of in members.items()
    }
    means = measure.mean_probs(
        measure.measure_routing(opened.model, params, members, batch_size, mesh), list(members)
    )
    trained = measure.trained_datasets(opened, registered) or set()
    plots.routing_map(
        {site: means[site] for site in measure.select_sites(None, experts)},
        png,
        trained=[name for name in members if labels[name] in trained],
        title=f"Where tasks are routed: {opened.name}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, evaluate, argv)


if __name__ == "__main__":
    from pemoe_jax.evaluate import main as _main

    sys.exit(_main())
