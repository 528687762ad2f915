"""Greedy decoding and metrics of what comes out: `pemoe infer --help`."""

import collections
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.core import network

FLAGS = gin_flags.make_parser(
    "infer",
    "Decodes the evaluation split of tasks greedily and writes predictions, results.json and\n"
    "results.md to EVAL_OUTPUT_DIR. A task's metrics are its own as registered, those that P3's\n"
    "table or the folder's INDEX.json name (Accuracy, BLEU, ROUGE, Squad, Spearman Correlation),\n"
    "or else accuracy: how many predictions are the target to the letter.",
    example="""\
  pemoe infer --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=/tmp/mov \\
    --gin.EVAL_OUTPUT_DIR=/tmp/decoded --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model
""",
    macros=["runs/infer.gin"],
)


@dataclasses.dataclass
class _Task:
    """A task's examples, and seqio's Evaluator that holds them."""

    name: str
    dataset: str
    split: str
    evaluator: Any
    vocabulary: Any
    inputs: list[Any]  # int32 [Li] each
    input_texts: list[str]
    target_texts: list[str]
    cut: list[bool]
    sentences: list[Any]  # [S] each, for routers that read them; or nothing


def infer(
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
    model_parallelism: int = 1,
    fsdp: bool = False,
    frozen_dtype: str | None = None,
) -> dict[str, Any]:
    """Decodes every task with every checkpoint and measures it by seqio's Evaluator.

    Args:
      checkpoint_path: runs, checkpoints or bases.
      output_dir: gets results.json, results.md and predictions/<run>/<task>.jsonl.
      mixture_or_task_name: tasks, or a mixture of them; of those without an evaluation split
        nothing is decoded.
      task_feature_lengths: tokens of 'inputs' (longer ones are cut and counted) and 'targets'.
      batch_size: inputs at a time over all devices.
      register: registers the tasks.
      model: dimensions of a base that does not state them.
      initial_checkpoint_path: in place of the base that a checkpoint names.
      dtype: of activations, in place of what checkpoints say.
      frozen_dtype: of frozen matrices, in place of what checkpoints say.
      use_cached_tasks: seqio's offline caches.
      max_examples: of a task; None: all.
      sentence_embeddings: table for routers that read them; None: the tasks' own feature.
      model_parallelism, fsdp: as of `train.train`.

    Returns:
      The results, as in results.json: figures in per cent.

    Raises:
      InputError: anything the user can mend.
    """
    from pemoe_jax.analysis import tables
    from pemoe_jax.analysis.zero_shot import result_tables
    from pemoe_jax.analysis.zero_shot import results as results_lib
    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import sentences, seqio_tasks
    from pemoe_jax.runtime import atomic_write, distributed, file_io

    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
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
    names = _plain_names(mixture_or_task_name)
    if results_lib.check_overwrites(output, [one.path for one in opened], names):
        print(f"replacing the results in {output}", flush=True)
    embedded = sentences.open_for_models(
        opened,
        sentence_embeddings,
        mixture_or_task_name,
        lengths["inputs"],
        use_cached_tasks,
    )
    tasks = _read(mixture_or_task_name, lengths, registered, use_cached_tasks, max_examples)
    if embedded is not None and embedded.table is not None:
        for task in tasks:
            task.sentences = embedded.vectors(task.inputs, task.name)
    results: dict[str, Any] = {"runs": []}
    for one in opened:
        params = one.load(one.shardings(mesh, rules))
        with partitioning.use_mesh(mesh, rules):
            tokens = _decode(one, params, tasks, batch_size, lengths["targets"], mesh)
        del params
        found = {}
        for task in tasks:
            rows = [tokens.popleft() for _ in task.inputs]
            found[task.name] = _measure(task, rows, one.step)
            atomic_write.write_text(
                folder / "predictions" / one.name / f"{task.name}.jsonl", _lines(task, rows)
            )
        results["runs"].append({**one.summary(), "tasks": found})
        # after each run, so that what is there stays if a later one fails
        atomic_write.write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
        found_tables = [*_tables(results, prompts=False), *_tables(results, prompts=True)]
        found_tables.append(result_tables.checkpoint_table(results["runs"]))
        atomic_write.write_text(folder / "results.md", tables.to_markdown(found_tables))
    tables.print_tables(_tables(results, prompts=False))
    print(f"results in {folder}/results.md, predictions in {folder}/predictions")
    return results


# --- reading ---


def _read(
    name: str,
    lengths: Mapping[str, int],
    registered: Any,
    use_cached: bool,
    max_examples: int | None,
) -> list[_Task]:
    """The tasks with their examples; of a mixture, those that are not there are told of."""
    from pemoe_jax.data import seqio_tasks
    from pemoe_jax.runtime import progress

    names = _plain_names(name)
    there = [task for task in names if seqio_tasks.has_data(task, use_cached)]
    if use_cached and not there:
        seqio_tasks.cached_subtask_names(names[0])  # raises
    _tell_left_out("no data", [task for task in names if there and task not in there])
    names = there or names  # of one that is not there its source says what is missing
    splits = {task: split for task in names if (split := seqio_tasks.eval_split(task)) is not None}
    without = [task for task in names if task not in splits]
    if not splits:
        raise InputError(
            f"no task of {name!r} has an evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})"
        )
    _tell_left_out("no evaluation split", without)
    _give_metrics(list(splits), registered)
    labels = registered.datasets if registered is not None else {}
    behind = registered.eval_splits if registered is not None else {}
    bar = progress.Progress("reading", len(splits), note="tasks")
    tasks = []
    try:
        for task, split in splits.items():
            with seqio_tasks.translate_read_errors(task, split, use_cached):
                found = _examples(task, split, lengths, use_cached, max_examples)
            found.dataset, found.split = labels.get(task, task), behind.get(task) or split
            tasks.append(found)
            bar.report_if_slow(len(tasks), "tasks")
    finally:
        bar.close()
    return tasks


def _tell_left_out(why: str, tasks: Sequence[str]) -> None:
    if tasks:
        more = f", … {len(tasks) - 3} more" if len(tasks) > 3 else ""
        print(f"{why}, so not decoded: {len(tasks)} tasks ({', '.join(tasks[:3])}{more})")


def _plain_names(name: str) -> list[str]:
    """The tasks of a name; in place of a twin, whose rows are choices, the task it is of."""
    from pemoe_jax.data import seqio_import, seqio_tasks

    plain = []
    for task in seqio_tasks.subtask_names(name):
        base = task.removesuffix("_score_eval")
        if base != task and base not in seqio_import.import_seqio().TaskRegistry.names():
            raise InputError(
                f"{task!r} has a row for each answer choice, which pemoe_jax.evaluate scores;"
                f" expected a task to decode, found no {base!r}"
            )
        plain.append(base)
    return list(dict.fromkeys(plain))


def _give_metrics(names: Sequence[str], registered: Any) -> None:
    from pemoe_jax.data import seqio_import, seqio_tasks
    from pemoe_jax.tasks import metrics
    from pemoe_jax.tasks.jsonl import files, roles

    seqio = seqio_import.import_seqio()
    of_lines: Mapping[str, Any] = {}
    index, where = {}, ""
    if isinstance(registered, roles.Registered):
        of_lines = registered.datasets
        path = Path(registered.folder) / "INDEX.json"
        index, where = files.read_index(path) or {}, str(path)
    for name in names:
        found = metrics.names_of(name, index if name in of_lines else None, where)
        metrics.give(name, found)
        kinds = {
            metric.model_output_type for metric in seqio_tasks.get_mixture_or_task(name).metric_objs
        }
        other = kinds - {seqio.metrics.ModelOutputType.PREDICTION}
        if other:
            raise InputError(
                f"{name!r} has a metric of {min(kind.name for kind in other)}:"
                " expected metrics of PREDICTION alone, which is what decoding gives"
            )


@functools.cache
def _converter() -> Any:
    """Leaves examples as they are: what is decoded from is made by `buckets.input_batches`.

    seqio's own takes most of the time that reading a task does.
    """
    from pemoe_jax.data import seqio_import

    seqio = seqio_import.import_seqio()

    class Unconverted(seqio.EncDecFeatureConverter):  # type: ignore[name-defined]
        def __call__(self, ds: Any, task_feature_lengths: Mapping[str, int]) -> Any:
            return ds

    return Unconverted(pack=False)


def _examples(
    name: str,
    split: str,
    lengths: Mapping[str, int],
    use_cached: bool,
    max_examples: int | None,
) -> _Task:
    from pemoe_jax.data import choices, seqio_import, seqio_tasks

    seqio = seqio_import.import_seqio()
    evaluator = seqio.Evaluator(
        name,
        _converter(),
        eval_split=split,
        use_cached=use_cached,
        # one token more: so one that has to be cut can be told from one that just fits
        sequence_length={key: length + 1 for key, length in lengths.items()},
        num_examples=max_examples,
        async_compute_metrics=False,
    )
    features = seqio_tasks.get_mixture_or_task(name).output_features
    eos_id = features["inputs"].vocabulary.eos_id
    task = _Task(name, name, split, evaluator, features["targets"].vocabulary, [], [], [], [], [])
    for row in evaluator.cached_task_datasets[name].as_numpy_iterator():
        ids, was_cut = choices.truncate(row["inputs"], lengths["inputs"], eos_id)
        task.inputs.append(ids)
        task.cut.append(was_cut)
        task.input_texts.append(choices.feature_text(features, row, "inputs"))
        task.target_texts.append(choices.feature_text(features, row, "targets"))
        if seqio_tasks.SENTENCE_FEATURE in row:
            task.sentences.append(row[seqio_tasks.SENTENCE_FEATURE])
    return task


# --- decoding ---


def _decode(
    opened: Any, params: Any, tasks: Sequence[_Task], batch_size: int, length: int, mesh: Any
) -> "collections.deque[Any]":
    """The tokens [length] of every example, tasks one after the other."""
    import numpy as np

    from pemoe_jax.core import decoding, partitioning
    from pemoe_jax.data import batching, prefetch
    from pemoe_jax.runtime import progress

    inputs = [ids for task in tasks for ids in task.inputs]
    sentences = [vector for task in tasks for vector in task.sentences]
    eos_id = tasks[0].vocabulary.eos_id
    bar = progress.Progress(f"decoding {opened.name}", len(inputs))
    found: dict[int, Any] = {}
    waiting: collections.deque[tuple[Any, list[int]]] = collections.deque()

    def collect() -> None:
        tokens, numbers = waiting.popleft()
        found.update(zip(numbers, partitioning.gather(tokens), strict=False))
        bar.report_if_due(len(found), "inputs")

    batches = batching.input_batches(inputs, batch_size, multiple_of=mesh.shape["data"])
    for tokens, numbers in prefetch.prefetch(batches):
        batch = {"inputs": tokens}
        if len(sentences) == len(inputs):
            last = [numbers[-1]] * (len(tokens) - len(numbers))  # as `tokens` is filled up
            batch["sentences"] = np.stack([sentences[n] for n in numbers + last], dtype=np.float32)
        given = partitioning.shard_batch(batch, mesh)
        decoded = decoding.greedy_decode(
            opened.model, params, given["inputs"], length, eos_id, given.get("sentences")
        )
        waiting.append((decoded, numbers))
        if len(waiting) > 2:  # a few in flight keep the device busy
            collect()
    while waiting:
        collect()
    bar.close()
    return collections.deque(found[number] for number in range(len(inputs)))


# --- results ---


def _measure(task: _Task, rows: Sequence[Any], step: int) -> dict[str, Any]:
    """One task's entry in results.json."""
    measured, _ = task.evaluator.evaluate(
        compute_metrics=True, step=step, predict_fn=lambda _: list(enumerate(rows))
    )
    figures = measured.result()[task.name]
    return {
        "dataset": task.dataset,
        "split": task.split,
        "examples": len(rows),
        "cut_inputs": sum(task.cut),
        "metrics": {name: float(getattr(value, "value", value)) for name, value in figures.items()},
    }


def _lines(task: _Task, rows: Sequence[Any]) -> str:
    lines = []
    for number, row in enumerate(rows):
        line = {
            "inputs": task.input_texts[number],
            "targets": task.target_texts[number],
            "prediction": task.vocabulary.decode([int(i) for i in row]),
            **({"cut_input": True} if task.cut[number] else {}),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _tables(results: Mapping[str, Any], prompts: bool) -> list[Any]:
    """Of each run means over the prompts of a data set, or a row a prompt."""
    make = _by_task if prompts else _by_dataset
    return [make(run["name"], run["tasks"]) for run in results["runs"]]


def _metrics_of(tasks: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for task in tasks.values() for name in task["metrics"]))


def _mean_of(tasks: Sequence[Mapping[str, Any]], metric: str) -> str:
    figures = [task["metrics"][metric] for task in tasks if metric in task["metrics"]]
    return f"{statistics.fmean(figures):.1f}" if figures else "–"


def _by_dataset(run: str, tasks: Mapping[str, Any]) -> Any:
    from pemoe_jax.analysis import tables

    names = _metrics_of(tasks)
    groups: dict[str, list[Any]] = collections.defaultdict(list)
    for task in tasks.values():
        groups[task["dataset"]].append(task)
    rows = [
        [dataset, str(len(members)), f"{sum(task['examples'] for task in members):,}"]
        + [_mean_of(members, name) for name in names]
        for dataset, members in sorted(groups.items())
    ]
    title = f"{run}: decoded greedily, in %, mean over the prompts of a data set"
    return tables.Table(title, ["data set", "prompts", "examples", *names], rows)


def _by_task(run: str, tasks: Mapping[str, Any]) -> Any:
    from pemoe_jax.analysis import tables

    names = _metrics_of(tasks)
    rows = [
        [name, task["split"], f"{task['examples']:,}", f"{task['cut_inputs']:,}"]
        + [_mean_of([task], metric) for metric in names]
        for name, task in tasks.items()
    ]
    title = f"{run}: decoded greedily, in %, prompt by prompt"
    return tables.Table(title, ["prompt", "split", "examples", "inputs cut", *names], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, infer, argv)


if __name__ == "__main__":
    from pemoe_jax.infer import main as _main

    sys.exit(_main())
