"""Answer choices of scored examples, grouped by example."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.data.providers import SeekableMixture


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceGroup:
    """One input with all its answer choices, as token ids that end in EOS."""

    task: str
    idx: int  # the example's number in its split
    inputs: np.ndarray  # int32 [Li]
    choices: tuple[np.ndarray, ...]  # C times int32 [Lt]
    is_correct: tuple[
        bool, ...
    ]  # several where choices are doubled, none where the target is not among them
    input_text: str
    choice_texts: tuple[str, ...]
    input_truncated: bool
    target_truncated: bool
    sentence_embedding: np.ndarray | None = None  # [S], for routers that read it

    @property
    def anomalies(self) -> tuple[str, ...]:
        """What is odd about it, in the words of results.json."""
        found = {
            "target_not_in_choices": not any(self.is_correct),
            "doubled_choices": len(set(self.choice_texts)) < len(self.choice_texts),
            "empty_input": not self.input_text.strip(),
            "cut_input": self.input_truncated,
            "cut_target": self.target_truncated,
        }
        return tuple(kind for kind, is_so in found.items() if is_so)


def load_choice_groups(
    name: str,
    task_feature_lengths: Mapping[str, int],
    *,
    split: str | None = None,
    max_examples: int | None = None,
    use_cached: bool = False,
) -> list[ChoiceGroup]:
    """The examples of a `_score_eval` task, whose rows are choices with `idx` and `is_correct`.

    Of a mixture, those of its tasks, one after the other: much faster than task by task for the
    mixtures that `tasks.jsonl` makes. Of the evaluation split unless `split` names another; at most
    `max_examples` a task. Sequences beyond the lengths are cut and keep their EOS.
    """
    seqio = seqio_import.import_seqio()
    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    if max_examples is not None:
        seqio_tasks.check_integer("max_examples", max_examples, 1)
    # One token more than allowed: so one that has to be cut can be told from one that just fits.
    longer = {key: length + 1 for key, length in lengths.items()}
    provider = seqio_tasks.get_mixture_or_task(name)
    names = (
        seqio_tasks.cached_subtask_names(name) if use_cached else seqio_tasks.subtask_names(name)
    )
    if not isinstance(provider, seqio.Mixture):
        found = split or seqio_tasks.eval_split(name)
        if found not in provider.splits:
            wanted = repr(split) if split else "evaluation"
            raise InputError(
                f"{name!r} has no {wanted} split (it has: {', '.join(sorted(provider.splits))})"
            )
        if not use_cached:
            seqio_tasks.check_source_files([name], found)
        with seqio_tasks.translate_read_errors(name, found, use_cached):
            ds = provider.get_dataset(
                longer, split=found, use_cached=use_cached, shuffle=False, seed=0, num_epochs=1
            )
        starts = [(name, 0)]
    elif isinstance(provider, SeekableMixture) and split is None and not use_cached:
        ds, starts = provider.eval_examples(longer, interleave=False)
    else:
        of_task = functools.partial(
            load_choice_groups, split=split, max_examples=max_examples, use_cached=use_cached
        )
        return [group for task in names for group in of_task(task, lengths)]
    missing = [key for key in ("idx", "is_correct") if key not in ds.element_spec]
    if missing:
        twin = f"{name}_score_eval"
        hint = f"; did you mean {twin!r}?" if twin in seqio.TaskRegistry.names() else ""
        raise InputError(
            f"{name!r} has no answer choices to score (no feature {missing[0]!r}){hint}"
        )
    features = provider.output_features
    eos_ids = {key: features[key].vocabulary.eos_id for key in lengths}

    groups = []
    counts: collections.Counter[str] = collections.Counter()
    first_rows = [start for _, start in starts]
    stream: Iterator[Any] = seqio_tasks.numpy_iterator(ds, name, split, use_cached)
    if use_cached:  # seqio's own caches are shuffled, choices of one example apart
        stream = iter(sorted(stream, key=lambda row: tuple(row["idx"])))
    for number, members in itertools.groupby(stream, key=lambda row: int(row["idx"][0])):
        task, start = starts[bisect.bisect_right(first_rows, number) - 1]
        counts[task] += 1
        if max_examples is not None and counts[task] > max_examples:
            if task == starts[-1][0]:
                break
            continue
        rows = list(members)
        inputs, cut_input = truncate(rows[0]["inputs"], lengths["inputs"], eos_ids["inputs"])
        targets = [truncate(row["targets"], lengths["targets"], eos_ids["targets"]) for row in rows]
        groups.append(
            ChoiceGroup(
                task=task,
                idx=number - start,
                inputs=inputs,
                choices=tuple(ids for ids, _ in targets),
                is_correct=tuple(bool(row["is_correct"]) for row in rows),
                input_text=feature_text(features, rows[0], "inputs"),
                choice_texts=tuple(feature_text(features, row, "targets") for row in rows),
                input_truncated=cut_input,
                target_truncated=any(was_cut for _, was_cut in targets),
                sentence_embedding=rows[0].get(seqio_tasks.SENTENCE_FEATURE),
            )
        )
    return groups


def truncate(ids: np.ndarray, length: int, eos_id: int) -> tuple[np.ndarray, bool]:
    """Token ids, at most `length` of them; an EOS at their end stays. -> (int32 ids, was it cut)"""
    ids = np.asarray(ids, np.int32)
    if len(ids) <= length:
        return ids, False
    return (np.append(ids[: length - 1], ids[-1]) if ids[-1] == eos_id else ids[:length]), True


def feature_text(features: Any, row: Mapping[str, Any], key: str) -> str:
    """What was tokenised to a row's feature; decoded where the text is not there."""
    text = row.get(f"{key}_pretokenized")
    if text is None:  # a cache may have been written without the text
        return features[key].vocabulary.decode([int(i) for i in row[key]])
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
