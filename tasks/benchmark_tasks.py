"""seqio tasks of benchmarks: rows in memory, and solved examples that the benchmark prescribes.

This module imports seqio, which takes about 5 s, so `mmlu` and `bbh` import it inside functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import
from pemoe_jax.data.shots import SolvedExample, TaskWithShots
from pemoe_jax.tasks import score_eval
from pemoe_jax.tasks.folder_tasks import trim_and_append_eos

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and filters its log
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

Pairs = Sequence[tuple[str, str]]  # input and target of each example
# The only split of every task. It has this name because T5X's gin files evaluate `validation`. Its
# published name is in `TaskRoles.eval_splits`.
_SPLIT = "validation"
_registered: list[str] = []  # tasks and mixtures in seqio's registries


@dataclasses.dataclass(frozen=True)
class ShotsSource:
    """Where the shots of a task come from; they are read on first use.

    Attributes:
      header: text in front of the first shot.
      read: returns the input and target of each solved example.
    """

    header: str
    read: Callable[[], Pairs]


class BenchmarkTask(TaskWithShots, seqio.Task):
    """A seqio task with solved examples that its benchmark prescribes.

    Attributes:
      extract_answer: function from a decoded text to the answer that the metric compares; None for
        tasks with answer choices.
    """

    def __init__(
        self,
        name: str,
        shots: ShotsSource,
        extract_answer: Callable[[str], str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(name, **arguments)
        self._shots = shots
        self.extract_answer = extract_answer

    @functools.cached_property
    def _solved_examples(self) -> list[SolvedExample]:
        encode = {key: self.output_features[key].vocabulary.encode for key in ("inputs", "targets")}
        return [
            SolvedExample(encode["inputs"](inputs), encode["targets"](target), inputs, target)
            for inputs, target in self._shots.read()
        ]

    def solved_examples(self) -> Sequence[SolvedExample]:
        return self._solved_examples

    def shots_header(self) -> Sequence[int]:
        return self.output_features["inputs"].vocabulary.encode(self._shots.header)


def make_score_task(
    name: str,
    rows: Pairs,
    answer_choices: Sequence[str],
    shots: ShotsSource,
    vocabulary: seqio.Vocabulary,
) -> BenchmarkTask:
    """Returns a `_score_eval` task of examples that all have the same answer choices.

    Args:
      name: name of the task.
      rows: input and correct choice of each example.
      answer_choices: the choices.
      shots: solved examples for the shots.
      vocabulary: vocabulary of inputs and targets.
    """
    # A row for each choice of an example; see `score_eval`.
    choice_rows = [
        (inputs, choice, (example, number), choice == target)
        for example, (inputs, target) in enumerate(rows)
        for number, choice in enumerate(answer_choices)
    ]
    inputs, targets, indices, is_correct = (
        list(column) for column in zip(*choice_rows, strict=True)
    )
    tensors = {
        "inputs": inputs,
        "targets": targets,
        "idx": tf.constant(indices, tf.int32),
        "is_correct": is_correct,
        "weight": [1.0] * len(choice_rows),
        "answer_choices": [list(answer_choices)] * len(choice_rows),
    }
    return _make_task(
        name,
        tensors,
        shots,
        vocabulary,
        postprocess_fn=score_eval.target_of_row,
        metric_fns=[score_eval.rank_accuracy],
    )


def make_decoded_task(
    name: str,
    rows: Pairs,
    shots: ShotsSource,
    vocabulary: seqio.Vocabulary,
    extract_answer: Callable[[str], str],
    metric: Callable[[Sequence[str], Sequence[str]], dict[str, float]],
) -> BenchmarkTask:
    """Returns a task whose answers are decoded.

    `extract_answer` is applied to targets and decoded texts, and `metric` compares the results.
    """

    # seqio also passes the example and whether the text is the target.
    def postprocess(text: str, **unused: object) -> str:
        return extract_answer(text)

    inputs, targets = (list(column) for column in zip(*rows, strict=True))
    tensors = {"inputs": inputs, "targets": targets}
    return _make_task(
        name,
        tensors,
        shots,
        vocabulary,
        extract_answer=extract_answer,
        postprocess_fn=postprocess,
        metric_fns=[metric],
    )


def _make_task(
    name: str,
    tensors: Mapping[str, Any],
    shots: ShotsSource,
    vocabulary: seqio.Vocabulary,
    **arguments: Any,
) -> BenchmarkTask:
    """Returns a task whose rows are `tensors`, with their inputs and targets tokenized."""

    # seqio requires these names of arguments. The rows are scored in their order.
    def make_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        texts = {key: tensors[key] for key in ("inputs", "targets")}
        ids = {key: _tokenize(text, vocabulary) for key, text in texts.items()}
        pretokenized = {f"{key}_pretokenized": text for key, text in texts.items()}
        return tf.data.Dataset.from_tensor_slices({**tensors, **ids, **pretokenized})

    source = seqio.FunctionDataSource(
        make_dataset, [_SPLIT], {_SPLIT: len(tensors["inputs"])}, caching_permitted=False
    )
    features = {key: seqio.Feature(vocabulary, add_eos=True) for key in ("inputs", "targets")}
    return BenchmarkTask(
        name,
        shots,
        source=source,
        output_features=features,
        preprocessors=[trim_and_append_eos],
        **arguments,
    )


def _tokenize(texts: Sequence[str], vocabulary: seqio.Vocabulary) -> tf.RaggedTensor:
    """Returns token ids, int32 [texts, None], without EOS.

    Equal texts are tokenized once. seqio's preprocessor tokenizes an input again for each of its
    choices, which takes 0.78 s of CPU time instead of 0.51 s for a task of 246 questions.
    """
    ids_by_text = {text: vocabulary.encode(text) for text in dict.fromkeys(texts)}
    rows = [np.asarray(ids_by_text[text], np.int32) for text in texts]
    return tf.RaggedTensor.from_row_lengths(np.concatenate(rows), list(map(len, rows)))


def register(tasks: Sequence[BenchmarkTask], mixtures: Mapping[str, Sequence[str]]) -> None:
    """Registers tasks and mixtures of them, in place of those of an earlier call.

    Args:
      tasks: the tasks.
      mixtures: name of each mixture -> names of its tasks, which are mixed at equal rates.

    Raises:
      InputError: a name is already that of another task or mixture.
    """
    names = [*(task.name for task in tasks), *mixtures]
    taken = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} - {*_registered}
    for name in names:
        if name in taken:
            raise InputError(f"a seqio task or mixture named {name!r} exists already")
    remove()
    _registered.extend(names)
    for task in tasks:
        seqio.TaskRegistry.add_provider(task.name, task)
    for mixture, members in mixtures.items():
        seqio.MixtureRegistry.add(mixture, [(name, 1.0) for name in members])


def remove() -> None:
    """Removes everything that `register` added to seqio's registries."""
    for name in _registered:
        seqio.TaskRegistry.remove(name)
        seqio.MixtureRegistry.remove(name)
    _registered.clear()
