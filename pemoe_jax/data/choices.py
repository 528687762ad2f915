"""Reads examples with answer choices, for rank classification.

The examples are those of `_score_eval` tasks, a form of task that P3 introduced. Such a task has a
row for each answer choice of an example. The row's targets are the choice, its `idx` is [example,
choice], and its `is_correct` says whether the choice is the right one.

Shapes: `C` answer choices, `Li` and `Lt` lengths of inputs and targets, `S` embedding size.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.data import row_checks, seqio_import, seqio_tasks
from pemoe_jax.data.seekable_tasks import SeekableMixture
from pemoe_jax.data.seqio_tasks import Row

if TYPE_CHECKING:
    import seqio


# Features of a row that belong to its choice, and those that belong to its example.
_CHOICE_KEYS = ("targets", "targets_pretokenized", "is_correct")
_EXAMPLE_KEYS = ("inputs", "inputs_pretokenized", seqio_tasks.SENTENCE_FEATURE)


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceGroup:
    """An input with all its answer choices.

    Attributes:
      task: name of the task.
      idx: index of the example in its split.
      inputs: token ids, int32 [Li], ending in EOS if the task's inputs do (T0's do not).
      choices: token ids of each choice, C times int32 [Lt], ending in EOS if the targets do.
      is_correct: whether each choice is the target. Usually one is; several are if choices are
        repeated, and none is if the target is not among them.
      input_text, choice_texts: the texts of the ids.
      input_truncated, target_truncated: whether the input, or any choice, was too long.
      sentence_embedding: [S], for routers that read it; None if there is none.
      num_shots: number of solved examples in front of the input; None in zero-shot evaluation.
    """

    task: str
    idx: int
    inputs: np.ndarray
    choices: tuple[np.ndarray, ...]
    is_correct: tuple[bool, ...]
    input_text: str
    choice_texts: tuple[str, ...]
    input_truncated: bool
    target_truncated: bool
    sentence_embedding: np.ndarray | None = None
    num_shots: int | None = None

    @functools.cached_property
    def anomalies(self) -> tuple[str, ...]:
        """The keys of `row_checks.ODD_ROWS` that apply to the example."""
        texts = [text.strip() for text in self.choice_texts]  # as `is_correct` compares them
        tokens_of_text = {
            text: tokens.tobytes() for text, tokens in zip(texts, self.choices, strict=True)
        }
        kinds = {
            "target_not_in_choices": not any(self.is_correct),
            "doubled_choices": len(tokens_of_text) < len(texts),
            "equal_tokens": len(set(tokens_of_text.values())) < len(tokens_of_text),
            "empty_input": not self.input_text.strip(),
            "cut_input": self.input_truncated,
            "cut_target": self.target_truncated,
        }
        return tuple(kind for kind, applies in kinds.items() if applies)


def load_choice_groups(
    name: str,
    task_feature_lengths: Mapping[str, int],
    *,
    split: str | None = None,
    max_examples: int | None = None,
    use_cached: bool = False,
) -> list[ChoiceGroup]:
    """Returns the examples of a `_score_eval` task, or of a mixture's tasks, one after the other.

    Args:
      name: the task or mixture. Without `split` and `use_cached`, a `SeekableMixture` is read in
        one pipeline, which is much faster than one pipeline for each task.
      task_feature_lengths: lengths that 'inputs' and 'targets' are truncated to; an EOS at their
        end is kept.
      split: the split; None: the evaluation split.
      max_examples: maximum number of examples of each task; None: all.
      use_cached: whether to read seqio's offline caches.

    Raises:
      InputError: an argument is wrong, or a task has no answer choices or cannot be read.
    """
    seqio = seqio_import.import_seqio()
    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    if max_examples is not None:
        check_integer("EVAL_EXAMPLES", max_examples)
    # One token more than fits, to tell a sequence that is too long from one that just fits.
    longer = {key: length + 1 for key, length in lengths.items()}
    provider = seqio_tasks.get_mixture_or_task(name)
    tasks = seqio_tasks.subtask_names(name, use_cached)
    # `starts`: the name of each task in `ds`, and the number that `idx` has for its first example.
    if not isinstance(provider, seqio.Mixture):
        task_split = split or seqio_tasks.eval_split(name)
        if task_split not in provider.splits:
            kind = repr(split) if split else "evaluation"
            has = ", ".join(sorted(provider.splits)) or "none"
            raise InputError(f"{name!r} has no {kind} split (it has: {has})")
        if not use_cached:
            seqio_tasks.check_source_files([name], task_split)
        with seqio_tasks.translate_read_errors(name, task_split, use_cached):
            ds = seqio_tasks.get_dataset(name, longer, task_split, use_cached)
        starts = [(name, 0)]
    elif isinstance(provider, SeekableMixture) and split is None and not use_cached:
        ds, starts = provider.eval_examples(longer, interleave=False)
    else:
        load = functools.partial(
            load_choice_groups, split=split, max_examples=max_examples, use_cached=use_cached
        )
        return [group for task in tasks for group in load(task, lengths)]
    missing = [key for key in ("idx", "is_correct") if key not in ds.element_spec]
    if missing:
        score_task = f"{name}_score_eval"
        is_registered = score_task in seqio.TaskRegistry.names()
        hint = f"; did you mean {score_task!r}?" if is_registered else ""
        raise InputError(
            f"{name!r} has no answer choices to score (no feature {missing[0]!r}){hint}"
        )
    choice_rows = _rows_by_example(seqio_tasks.numpy_iterator(ds, name, split, use_cached), name)
    groups = []
    counts: collections.Counter[str] = collections.Counter()
    first_numbers = [start for _, start in starts]
    for number in sorted(choice_rows):
        task, start = starts[bisect.bisect_right(first_numbers, number) - 1]
        counts[task] += 1
        if max_examples is None or counts[task] <= max_examples:
            # `pop` frees the rows, so that they and the groups are not both in memory.
            rows = choice_rows.pop(number)
            groups.append(_make_group(task, number - start, rows, provider, lengths))
    return groups


def _rows_by_example(rows: Iterable[Row], name: str) -> dict[int, dict[int, Row]]:
    """Returns the rows of a `_score_eval` task or mixture as {example: {choice: row}}.

    Only the row that was read first of an example keeps the example's features (`_EXAMPLE_KEYS`).

    Raises:
      InputError: a row has no valid `idx`, the same `idx` as another row, or other inputs than the
        first row of its example.
    """
    # The rows may come in any order: seqio shuffles its caches, and a user's task need not have the
    # choices of an example next to each other.
    choice_rows: dict[int, dict[int, Row]] = collections.defaultdict(dict)
    for count, row in enumerate(rows, 1):
        example, choice = _choice_index(row, f"{name}: row {count}")
        earlier = choice_rows[example]
        if choice in earlier:
            raise InputError(
                f"{name}: row {count}: expected unique 'idx', got [{example}, {choice}] again"
            )
        first = next(iter(earlier.values()), row)
        if not np.array_equal(row["inputs"], first["inputs"]):
            raise InputError(
                f"{name}: row {count}: expected the same inputs for all choices of example"
                f" {example} (by 'idx'), got different ones"
            )
        # Inputs are much longer than choices, so they are kept once for each example.
        keys = _CHOICE_KEYS if earlier else (*_CHOICE_KEYS, *_EXAMPLE_KEYS)
        earlier[choice] = {key: row[key] for key in keys if key in row}
    return choice_rows


def _choice_index(row: Row, where: str) -> tuple[int, int]:
    """Returns `idx` of a row, (example, choice); `where` is the row's location, for errors."""
    fields = {key: np.asarray(row[key]) for key in ("idx", "is_correct")}
    values = {key: value.tolist() for key, value in fields.items()}
    example, choice = row_checks.check_choice_fields(values, where)["idx"]
    return example, choice


def _make_group(
    task: str,
    idx: int,
    choice_rows: Mapping[int, Row],
    provider: seqio.Task | seqio.Mixture,
    lengths: Mapping[str, int],
) -> ChoiceGroup:
    """Makes an example's group from its rows, an item of `_rows_by_example`."""
    features = provider.output_features
    example = next(iter(choice_rows.values()))  # the first row, which has the inputs
    rows = [row for _, row in sorted(choice_rows.items())]
    for choice, row in sorted(choice_rows.items()):
        keys = [key for key in lengths if key in row]
        seqio_tasks.check_ids(features, row, f"{task}: example {idx + 1}", keys)
        if not np.any(row["targets"]):  # 0 is padding
            raise InputError(
                f"{task}: example {idx + 1}: choice {choice + 1}: expected a token in 'targets',"
                " got none: its log-probability would be 0, above all others"
            )
    eos_ids = {key: features[key].vocabulary.eos_id for key in lengths}
    inputs, input_truncated = truncate(example["inputs"], lengths["inputs"], eos_ids["inputs"])
    targets = [truncate(row["targets"], lengths["targets"], eos_ids["targets"]) for row in rows]
    return ChoiceGroup(
        task=task,
        idx=idx,
        inputs=inputs,
        choices=tuple(ids for ids, _ in targets),
        is_correct=tuple(bool(row["is_correct"]) for row in rows),
        input_text=feature_text(features, example, "inputs"),
        choice_texts=tuple(feature_text(features, row, "targets") for row in rows),
        input_truncated=input_truncated,
        target_truncated=any(truncated for _, truncated in targets),
        sentence_embedding=example.get(seqio_tasks.SENTENCE_FEATURE),
    )


def truncate(ids: np.ndarray, length: int, eos_id: int) -> tuple[np.ndarray, bool]:
    """Truncates token ids to a length; an EOS at their end is kept.

    Returns:
      The ids, int32, and whether they were too long.
    """
    ids = np.asarray(ids, np.int32)
    if len(ids) <= length:
        return ids, False
    if ids[-1] == eos_id:
        return np.append(ids[: length - 1], ids[-1]), True
    return ids[:length], True


def feature_text(features: Mapping[str, seqio.Feature], row: Row, key: str) -> str:
    """Returns the text of a row's feature; decodes the ids if the row has no text."""
    text = row.get(f"{key}_pretokenized")
    # Some caches have no text, others an empty one, and rows of token ids have none.
    if text is None or (len(text) == 0 and len(row[key]) > 0):
        return str(features[key].vocabulary.decode([int(i) for i in row[key]]))
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
