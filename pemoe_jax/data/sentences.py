"""Sentence embeddings that a run's routers read: of a table, or a feature of the tasks themselves.

Shapes: `S` the embedding's size, `N` inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks
from pemoe_jax.data.choices import ChoiceGroup
from pemoe_jax.data.sentence_table import EncoderInfo, SentenceTable, check_same_encoder


def vocabulary_fingerprint(name: str) -> str:
    """What a table says of the vocabulary of a task's or mixture's inputs."""
    vocabulary = seqio_tasks.get_mixture_or_task(name).output_features["inputs"].vocabulary
    model = getattr(vocabulary, "sp_model", None)
    if model:
        return hashlib.blake2b(model, digest_size=8).hexdigest()
    return f"{type(vocabulary).__name__} of {vocabulary.vocab_size} ids"


@dataclasses.dataclass(frozen=True)
class SentenceSource:
    """Where a run's embeddings come from: a table, or for None the tasks' own feature.

    Attributes:
      encoder: what made them, for records.
      length: that the run's inputs are cut to.
    """

    encoder: EncoderInfo
    length: int
    table: SentenceTable | None = None

    @property
    def dim(self) -> int:
        """S."""
        return int(self.encoder["dim"])

    def vectors(self, inputs: Sequence[np.ndarray], names: str | Sequence[str]) -> list[np.ndarray]:
        """The table's vectors [S] of token ids, [Li] each.

        Args:
          inputs: as the model reads them.
          names: by which seqio knows the task or mixture, of each or of all.

        Raises:
          InputError: one is not in the table.
        """
        assert self.table is not None
        rows = self.table.rows(inputs)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            number = int(missing[0])
            name = names if isinstance(names, str) else names[number]
            raise InputError(self._absent(inputs[number], name))
        return self.table.vectors(rows)

    def attach_to(self, groups: Sequence[ChoiceGroup]) -> list[ChoiceGroup]:
        """Groups of answer choices with the embeddings of their inputs.

        Raises:
          InputError: one is not in the table.
        """
        if self.table is None:  # `choice_groups` has read the feature
            return list(groups)
        vectors = self.vectors([group.inputs for group in groups], [group.task for group in groups])
        return [
            dataclasses.replace(group, sentence_embedding=vector)
            for group, vector in zip(groups, vectors, strict=True)
        ]

    def _absent(self, ids: np.ndarray, name: str) -> str:
        assert self.table is not None
        vocabulary = seqio_tasks.get_mixture_or_task(name).output_features["inputs"].vocabulary
        text = vocabulary.decode([int(i) for i in ids])
        cut = ""
        if self.length not in self.table.lengths:
            lengths = " and ".join(map(str, self.table.lengths))
            cut = f" (inputs are cut to {self.length} tokens here, to {lengths} in the table)"
        return (
            f"SENTENCE_EMBEDDINGS {self.table.path} lacks an input of {name!r}: {text[:60]!r}{cut};"
            f" pemoe embed with --gin.MIXTURE_OR_TASK_NAME={name} adds it"
        )


def reads_sentence_embeddings(description: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a router of adapters, as `core.adapters.describe` has them, reads embeddings."""
    routers = [site.get("router") or {} for site in description.values()]
    return any(router.get("reads") == "sentence" for router in routers)


def open_for_training(
    description: Mapping[str, Mapping[str, Any]],
    path: str | None,
    name: str,
    length: int,
    pack: bool,
    use_cached: bool = False,
) -> SentenceSource | None:
    """What a run trains with; None where its routers read something else.

    Args:
      description: of the adapters, as `core.adapters.describe` has them.
      path: of a table, or None.
      name: of the task or mixture.
      length: that its inputs are cut to.
      pack: whether rows hold several examples.
      use_cached: seqio's offline caches.

    Raises:
      InputError: routers read embeddings and there are none, or the other way round; or rows are
        packed.
    """
    if not reads_sentence_embeddings(description):
        if path is not None:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {path} is set and no router reads sentence embeddings:"
                " expected --gin_file=routing/sentence.gin behind a method with routers, or None"
            )
        return None
    if pack:
        raise InputError(
            "routers that read sentence embeddings have one distribution a row, and PACK=True puts"
            " several examples in a row: expected --gin.PACK=False"
        )
    return _open(path, name, length, use_cached)


def open_for_models(
    models: Sequence[Any],
    path: str | None,
    name: str,
    length: int,
    use_cached: bool = False,
) -> SentenceSource | None:
    """What some opened models are run with; None where no router of theirs reads embeddings.

    Args:
      models: `models.OpenedModel`s.
      path, name, length, use_cached: as of `for_training`.

    Raises:
      InputError: as of `for_training`, or a model was trained with those of another encoder.
    """
    readers = [
        one for one in models if one.record and reads_sentence_embeddings(one.record.adapters)
    ]
    if not readers:
        if path is not None:
            raise InputError(
                f"SENTENCE_EMBEDDINGS {path} is set and no router of"
                f" {', '.join(one.path for one in models)} reads sentence embeddings: expected None"
            )
        return None
    source = _open(path, name, length, use_cached)
    for one in readers:
        check_same_encoder(one.path, one.record.sentence_encoder, source.encoder)
    return source


def _open(path: str | None, name: str, length: int, use_cached: bool) -> SentenceSource:
    if path is None:
        return SentenceSource(
            {
                "name": f"feature {seqio_tasks.SENTENCE_FEATURE}",
                "dim": _feature_dim(name, use_cached),
            },
            length,
        )
    table = SentenceTable(path)
    found = vocabulary_fingerprint(name)
    if table.vocabulary != found:
        raise InputError(
            f"SENTENCE_EMBEDDINGS {table.path} is of inputs in another vocabulary than that of"
            f" {name!r}: expected {found}, found {table.vocabulary}"
        )
    return SentenceSource(table.encoder, length, table)


def _feature_dim(name: str, use_cached: bool) -> int:
    """S of the feature that tasks give themselves."""
    tasks = [seqio_tasks.get_mixture_or_task(task) for task in seqio_tasks.subtask_names(name)]
    for task in tasks:
        if seqio_tasks.SENTENCE_FEATURE not in task.output_features:
            raise InputError(
                "routers read sentence embeddings: expected SENTENCE_EMBEDDINGS to name a table of"
                f" pemoe embed, or {task.name!r} to have a feature"
                f" {seqio_tasks.SENTENCE_FEATURE!r}; found neither"
            )
    lengths = {key: 1 for key in ("inputs", "targets")}
    split = next(iter(tasks[0].splits))
    with seqio_tasks.translate_read_errors(tasks[0].name, split, use_cached):
        ds = tasks[0].get_dataset(
            lengths, split=split, use_cached=use_cached, shuffle=False, seed=0, num_epochs=1
        )
    shape = tuple(ds.element_spec[seqio_tasks.SENTENCE_FEATURE].shape)
    if shape == (None,):
        first = next(iter(seqio_tasks.numpy_iterator(ds.take(1), tasks[0].name, split, use_cached)))
        shape = first[seqio_tasks.SENTENCE_FEATURE].shape
    if len(shape) != 1 or not shape[0]:
        raise InputError(
            f"{tasks[0].name!r}: feature {seqio_tasks.SENTENCE_FEATURE!r}: "
            f" expected shape (S,), found {shape}"
        )
    return int(shape[0])
