"""Decodes tasks greedily and computes their metrics, for `pemoe infer`."""

import collections
import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pemoe_jax.analysis import evaluation, tables
from pemoe_jax.checkpoints.models import OpenedModel
from pemoe_jax.core import decoding, partitioning
from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.core.params import PyTree
from pemoe_jax.data import (
    choices,
    inference_batches,
    prefetch,
    seqio_import,
    seqio_tasks,
    shots,
)
from pemoe_jax.runtime import options, progress
from pemoe_jax.tasks import TaskRoles, metrics
from pemoe_jax.tasks.task_roles import abbreviate


@dataclasses.dataclass
class Task:
    """The examples of a task's evaluation split, seqio's Evaluator for them, and their shots."""

    name: str
    dataset: str
    split: str
    evaluator: Any  # seqio.Evaluator; None for a task of plain texts
    vocabulary: Any  # seqio.Vocabulary
    inputs: list[np.ndarray] = dataclasses.field(default_factory=list)  # int32 [Li] each
    input_texts: list[str] = dataclasses.field(default_factory=list)
    target_texts: list[str] = dataclasses.field(default_factory=list)
    is_truncated: list[bool] = dataclasses.field(default_factory=list)
    # whether decoding can produce each target
    is_reachable: list[bool] = dataclasses.field(default_factory=list)
    # [S] each for routers that read sentence embeddings, else empty
    sentences: list[np.ndarray] = dataclasses.field(default_factory=list)
    # extracts the answer that metrics compare from a prediction; None: metrics compare all its text
    extract_answer: Callable[[str], str] | None = None
    # number of shots in front of each input; empty if zero-shot
    num_shots: list[int] = dataclasses.field(default_factory=list)

    @property
    def has_target(self) -> list[bool]:
        """Whether each example has a target that is not empty."""
        return [bool(text.strip()) for text in self.target_texts]

    def add_shots(self, task_shots: shots.TaskShots, limit: int) -> None:
        """Puts shots in front of the inputs, up to `limit` tokens."""
        added = [task_shots.prepend_to(ids, limit) for ids in self.inputs]
        self.inputs = [ids for ids, _ in added]
        self.num_shots = [number for _, number in added]


# --- reading ---


def read_tasks(data: options.Data, lengths: Mapping[str, int], task_roles: TaskRoles) -> list[Task]:
    """Returns the tasks of a mixture with their examples.

    A task that has no data, no evaluation split or no examples is skipped, and a line is printed.

    Raises:
      InputError: all tasks would be skipped, or a task cannot be read or decoded.
    """
    use_cached = data.use_cached_tasks
    names = decoded_names(data.name)
    with_data = [task for task in names if seqio_tasks.has_data(task, use_cached)]
    if use_cached and not with_data:
        seqio_tasks.subtask_names(names[0], use_cached=True)  # raises with the reason
    _print_skipped("no data", [task for task in names if with_data and task not in with_data])
    # If no task has data, keep them all: reading the first one raises the error with the reason.
    eval_splits = {task: seqio_tasks.eval_split(task) for task in with_data or names}
    splits = {task: split for task, split in eval_splits.items() if split}
    if not splits:
        raise InputError(
            f"no task of {data.name!r} has an evaluation split"
            f" ({', '.join(seqio_tasks.EVAL_SPLITS)})"
        )
    _print_skipped("no evaluation split", [task for task in eval_splits if task not in splits])
    for name in splits:
        _set_metrics(name, task_roles)
    bar = progress.Progress("reading", len(splits), note="tasks")
    tasks = []
    try:
        for name, split in splits.items():
            with seqio_tasks.translate_read_errors(name, split, use_cached):
                task = _read_examples(name, split, lengths, use_cached, data.max_examples)
            # seqio's split `validation` may be read from test.jsonl: results then name it test.
            task.dataset = task_roles.datasets.get(name, name)
            task.split = task_roles.eval_splits.get(name) or split
            tasks.append(task)
            bar.report_if_slow(len(tasks), "tasks")
    finally:
        bar.close()
    empty = [task.name for task in tasks if not task.inputs]
    if len(empty) == len(tasks):
        raise InputError(f"nothing to decode in {data.name!r}: its evaluation splits have no rows")
    _print_skipped("no examples", empty)
    tasks = [task for task in tasks if task.inputs]
    _print_odd_rows(tasks, task_roles)
    without_target = {task.name: task.has_target.count(False) for task in tasks}
    if count := sum(without_target.values()):
        shown = abbreviate([name for name, number in without_target.items() if number], 3)
        examples = plural(count, "example")
        print(f"{examples} without a target, which metrics leave out: {shown}", flush=True)
    return tasks


def text_task(texts: Sequence[str], vocabulary: Any, max_length: int) -> Task:
    """Returns a task whose inputs are these texts, without targets and metrics."""
    task = Task("text", "text", "", None, vocabulary)
    for text in texts:
        ids = np.array([*vocabulary.encode(text), vocabulary.eos_id], np.int32)
        ids, is_truncated = choices.truncate(ids, max_length, vocabulary.eos_id)
        task.inputs.append(ids)
        task.input_texts.append(text)
        task.is_truncated.append(is_truncated)
    if any(task.is_truncated):
        truncated = plural(sum(task.is_truncated), "input")
        print(f"{truncated} truncated to {max_length} tokens", file=sys.stderr)
    return task


def check_decodes_texts(opened: OpenedModel, vocabulary: Any, setting: str = "VOCAB_PATH") -> None:
    """Raises an InputError that names `setting` if a model cannot read texts of a vocabulary."""
    if vocabulary.vocab_size > opened.model.config.vocab_size:
        raise InputError(
            f"{setting} must have at most {opened.model.config.vocab_size} ids, the vocabulary size"
            f" of {opened.path}, got {vocabulary.vocab_size}"
        )
    if opened.record is not None:
        seqio_tasks.check_vocabulary(opened.path, opened.record.vocabulary, vocabulary, setting)
    if opened.record is not None and opened.record.sentence_encoder is not None:
        raise InputError(
            f"the routers of {opened.path} read sentence embeddings, which a text alone does not"
            " have: use tasks that have them"
        )


def _print_odd_rows(tasks: Sequence[Task], task_roles: TaskRoles) -> None:
    odd = []
    for task in tasks:
        for number, inputs in enumerate(task.input_texts, 1):
            kinds = {
                "empty_input": not inputs.strip(),
                "unreachable_target": not task.is_reachable[number - 1],
                "cut_input": task.is_truncated[number - 1],
            }
            odd += [(task.name, number, kind) for kind, applies in kinds.items() if applies]
    task_roles.print_odd_rows(odd)


def _print_skipped(reason: str, tasks: Sequence[str]) -> None:
    if tasks:
        print(f"skipping {plural(len(tasks), 'task')}, {reason}: {abbreviate(tasks, 3)}")


def decoded_names(name: str) -> list[str]:
    """Returns the tasks of a task or mixture, with `<task>` in place of `<task>_score_eval`.

    Raises:
      InputError: `<task>_score_eval`, which has a row for each answer choice, has no `<task>`.
    """
    names = []
    for task in seqio_tasks.subtask_names(name):
        base = task.removesuffix("_score_eval")
        if base != task and base not in seqio_import.import_seqio().TaskRegistry.names():
            raise InputError(
                f"MIXTURE_OR_TASK_NAME must be a task to decode, got {task!r}, which has a row for"
                f" each answer choice (pemoe evaluate scores it), and no task {base!r}"
            )
        names.append(base)
    return list(dict.fromkeys(names))


def _set_metrics(name: str, task_roles: TaskRoles) -> None:
    """Adds the metrics of a folder's INDEX.json, or else of P3's table, to a task without metrics.

    Raises:
      InputError: the task has a metric that needs more than predictions, such as scores.
    """
    from pemoe_jax.tasks.p3 import published  # here, as importing P3 registers its tasks

    prediction = seqio_import.import_seqio().metrics.ModelOutputType.PREDICTION
    metrics.add_metrics(name, task_roles.metrics.get(name, published.metric_names(name)))
    types = {
        metric.model_output_type for metric in seqio_tasks.get_mixture_or_task(name).metric_objs
    }
    if others := types - {prediction}:
        raise InputError(
            f"{name!r} has a metric of {min(kind.name for kind in others)}:"
            " pemoe infer computes only metrics of PREDICTION"
        )


@functools.cache
def _identity_converter() -> Any:
    seqio = seqio_import.import_seqio()

    # seqio's own converter would pad each example to the full length, which takes most of the time
    # of reading a task. `inference_batches` pads each batch to the length that it needs.
    class IdentityConverter(seqio.EncDecFeatureConverter):  # type: ignore[name-defined]
        def __call__(self, ds: Any, task_feature_lengths: Mapping[str, int]) -> Any:
            return ds

    return IdentityConverter(pack=False)


def _read_examples(
    name: str, split: str, lengths: Mapping[str, int], use_cached: bool, max_examples: int | None
) -> Task:
    evaluator = seqio_import.import_seqio().Evaluator(
        name,
        _identity_converter(),
        eval_split=split,
        use_cached=use_cached,
        # One token more than fits, to tell an input that is too long from one that just fits.
        sequence_length={key: length + 1 for key, length in lengths.items()},
        num_examples=max_examples,
        async_compute_metrics=False,
    )
    from pemoe_jax.tasks.benchmark_tasks import BenchmarkTask  # here, as it imports seqio

    provider = seqio_tasks.get_mixture_or_task(name)
    features = provider.output_features
    eos_id = features["inputs"].vocabulary.eos_id
    task = Task(name, name, split, evaluator, features["targets"].vocabulary)
    if isinstance(provider, BenchmarkTask):
        task.extract_answer = provider.extract_answer
    # A cache, because many examples have the same target, and tokenizing takes longer than reading.
    reachable = functools.cache(
        functools.partial(is_reachable, task.vocabulary, max_length=lengths["targets"])
    )
    for number, row in enumerate(evaluator.cached_task_datasets[name].as_numpy_iterator(), 1):
        seqio_tasks.check_ids(features, row, f"{name}: example {number}")
        ids, is_truncated = choices.truncate(row["inputs"], lengths["inputs"], eos_id)
        task.inputs.append(ids)
        task.is_truncated.append(is_truncated)
        task.input_texts.append(choices.feature_text(features, row, "inputs"))
        task.target_texts.append(choices.feature_text(features, row, "targets"))
        task.is_reachable.append(reachable(task.target_texts[-1]))
        if seqio_tasks.SENTENCE_FEATURE in row:
            task.sentences.append(row[seqio_tasks.SENTENCE_FEATURE])
    if not all(task.has_target):
        # Metrics compare the predictions with the examples of this dataset.
        ds = evaluator.cached_task_datasets[name]
        evaluator.cached_task_datasets[name] = seqio_tasks.keep_rows(ds, task.has_target)
    return task


def is_reachable(vocabulary: Any, text: str, max_length: int) -> bool:
    """Returns whether decoding at most `max_length` tokens can produce a text, up to whitespace.

    A vocabulary may lack characters (T5's has no braces) and change others ('½' to '1/2').
    """
    ids = vocabulary.encode(text)
    return len(ids) <= max_length and vocabulary.decode(ids).split() == text.split()


# --- decoding ---


def decode(
    opened: OpenedModel,
    params: PyTree,
    tasks: Sequence[Task],
    batch_size: int,
    length: int,
    mesh: jax.sharding.Mesh,
) -> collections.deque[np.ndarray]:
    """Returns the decoded tokens [length] of every example, task after task.

    The result is a deque, so that the caller can take the examples of each task from its left end.

    Raises:
      InputError: the model's logits for an example are not finite.
    """
    inputs = [ids for task in tasks for ids in task.inputs]
    sentences = [vector for task in tasks for vector in task.sentences]
    # A model has one vocabulary, hence one EOS, which its tasks share.
    eos_id = tasks[0].vocabulary.eos_id

    def decode_batch(tokens: np.ndarray, indices: list[int]) -> jax.Array:
        batch = {"inputs": tokens}
        if len(sentences) == len(inputs):
            # Rows that fill up a batch repeat its last input, so its embedding is repeated too.
            examples = indices + [indices[-1]] * (len(tokens) - len(indices))
            batch["sentences"] = np.stack([sentences[i] for i in examples], dtype=np.float32)
        arrays = partitioning.shard_batch(batch, mesh)
        return decoding.greedy_decode(
            opened.model, params, arrays["inputs"], length, eos_id, arrays.get("sentences")
        )

    multiple_of = partitioning.data_parallelism(mesh)
    batches = inference_batches.input_batches(inputs, batch_size, multiple_of=multiple_of)
    # Lazy: `keep_in_flight` reads the tokens of a batch while the device decodes the next ones.
    results = (
        (decode_batch(tokens, indices), indices) for tokens, indices in prefetch.prefetch(batches)
    )
    bar = progress.Progress(f"decoding {opened.name}", len(inputs))
    decoded: dict[int, np.ndarray] = {}  # batches are sorted by length, not in the inputs' order
    for tokens, indices in prefetch.keep_in_flight(results):
        # Not strict: the rows that fill up a batch have no index.
        decoded.update(zip(indices, partitioning.gather(tokens), strict=False))
        for index in indices:
            if (decoded[index] == decoding.NOT_FINITE).any():
                raise _not_finite_error(opened, tasks, index)
        bar.report_if_due(len(decoded), "inputs")
    bar.close()
    return collections.deque(decoded[index] for index in range(len(inputs)))


def _not_finite_error(opened: OpenedModel, tasks: Sequence[Task], index: int) -> InputError:
    """Returns the error for an example whose logits are not finite."""
    names = [(task.name, number) for task in tasks for number in range(1, 1 + len(task.inputs))]
    name, number = names[index]
    return InputError(
        f"{opened.path}: expected finite logits, got infinite or NaN ones for {name}, example"
        f" {number}: {evaluation.NOT_FINITE_ADVICE}"
    )


# --- results ---


def compute_metrics(
    task: Task, decoded: Sequence[np.ndarray], step: int, num_shots: int = 0
) -> dict[str, Any]:
    """Returns one task's entry in results.json.

    Args:
      task: the task.
      decoded: tokens of each example, also of those without a target.
      step: training step of the model, which seqio receives for its logs.
      num_shots: number of shots in front of each input, including those that did not fit.
    """
    with_target = np.flatnonzero(task.has_target).tolist()
    values: dict[str, Any] = {}
    if with_target:
        # seqio expects (index, tokens); its indices count the examples that have a target.
        predictions = [*enumerate(decoded[index] for index in with_target)]
        all_metrics, _ = task.evaluator.evaluate(
            compute_metrics=True, step=step, predict_fn=lambda _: predictions
        )
        values = all_metrics.result()[task.name]
    return {
        "dataset": task.dataset,
        "split": task.split,
        "examples": len(decoded),
        "cut_inputs": sum(task.is_truncated),
        "unreachable_targets": task.is_reachable.count(False),
        **({"shots_left_out": num_shots * len(decoded) - sum(task.num_shots)} if num_shots else {}),
        **(
            {"without_target": len(decoded) - len(with_target)}
            if len(with_target) < len(decoded)
            else {}
        ),
        "metrics": {
            # A metric is a number, or a seqio `Scalar` that holds it.
            name: _finite_or_none(float(getattr(value, "value", value)))
            for name, value in values.items()
        },
    }


def _finite_or_none(value: float) -> float | None:
    """Returns a metric, or None if it is not finite, since JSON has no NaN."""
    return value if math.isfinite(value) else None


def prediction_lines(task: Task, decoded: Sequence[np.ndarray]) -> str:
    """Returns the content of a task's file of predictions, a JSON object per line."""
    has_target = task.has_target
    predictions = [task.vocabulary.decode(tokens.tolist()) for tokens in decoded]
    extract = task.extract_answer
    lines = [
        {
            "inputs": task.input_texts[index],
            **({"targets": task.target_texts[index]} if has_target[index] else {}),
            "prediction": prediction,
            **({"answer": extract(prediction)} if extract is not None else {}),
            **({"cut_input": True} if task.is_truncated[index] else {}),
            **({} if task.is_reachable[index] else {"unreachable_target": True}),
            **({"shots": task.num_shots[index]} if task.num_shots else {}),
        }
        for index, prediction in enumerate(predictions)
    ]
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)


def _metric_names(run: Mapping[str, Any]) -> list[str]:
    """Returns the names of the metrics in a run, which is an entry of `runs` in results.json."""
    return list(dict.fromkeys(name for task in run["tasks"].values() for name in task["metrics"]))


def _format_means(tasks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns the mean of each metric over the tasks in which it is defined."""
    values = [
        [value for task in tasks if (value := task["metrics"].get(name)) is not None]
        for name in names
    ]
    return [f"{statistics.fmean(members):.1f}" if members else tables.MISSING for members in values]


def _describe(run: Mapping[str, Any]) -> str:
    with_shots = f" with {plural(run['shots'], 'shot')}" if run.get("shots") else ""
    return f"{run['name']}: decoded greedily{with_shots}"


def dataset_table(run: Mapping[str, Any]) -> tables.Table:
    """Returns a table with a row for each dataset: means over its prompts, which are tasks."""
    names = _metric_names(run)
    by_dataset: dict[str, list[Any]] = collections.defaultdict(list)
    for task in run["tasks"].values():
        by_dataset[task["dataset"]].append(task)
    rows = [
        [dataset, str(len(tasks)), f"{sum(task['examples'] for task in tasks):,}"]
        + _format_means(tasks, names)
        for dataset, tasks in sorted(by_dataset.items())
    ]
    title = f"{_describe(run)}, in %, mean over the prompts of a dataset"
    return tables.Table(title, ["dataset", "prompts", "examples", *names], rows)


def prompt_table(run: Mapping[str, Any]) -> tables.Table:
    """Returns a table with a row for each prompt, that is, for each task."""
    names = _metric_names(run)
    counts = {
        "examples": "examples",
        "cut_inputs": "inputs truncated",
        "unreachable_targets": "targets out of reach",
    }
    if run.get("shots"):
        counts["shots_left_out"] = tables.SHOTS_LEFT_OUT
    rows = [
        [name, task["split"]] + [f"{task[key]:,}" for key in counts] + _format_means([task], names)
        for name, task in run["tasks"].items()
    ]
    title = f"{_describe(run)}, in %, by prompt"
    columns = ["prompt", "split", *counts.values(), *names]
    return tables.Table(title, columns, rows, num_text=2)
