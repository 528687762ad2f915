"""Sentence embeddings that a run's routers read, from a table or from a feature of the tasks.

Shapes: `S` size of the embedding, `Li` length of an input.
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
from pemoe_jax.data.seqio_tasks import SENTENCE_FEATURE


def vocabulary_fingerprint(name: str) -> str:
    """Returns a fingerprint of the vocabulary of a task's or mixture's inputs, for tables.

    Checkpoints have another one, `seqio_tasks.fingerprint_vocabulary`, which ignores sentinels.
    """
    vocabulary = seqio_tasks.get_mixture_or_task(name).output_features["inputs"].vocabulary
    # Hashes the content of SentencePiece's model file, as its path differs between machines.
    if model := getattr(vocabulary, "sp_model", None):
        return hashlib.blake2b(model, digest_size=8).hexdigest()
    return f"{type(vocabulary).__name__} of {vocabulary.vocab_size} ids"


@dataclasses.dataclass(frozen=True)
class SentenceSource:
    """Source of a run's sentence embeddings.

    Attributes:
      encoder: the encoder, as checkpoints record it.
      length: length that the run's inputs are truncated to.
      table: the table; None: the embeddings are a feature of the tasks.
    """

    encoder: EncoderInfo
    length: int
    table: SentenceTable | None = None

    @property
    def dim(self) -> int:
        """S."""
        return int(self.encoder["dim"])

    def vectors(self, inputs: Sequence[np.ndarray], names: str | Sequence[str]) -> list[np.ndarray]:
        """Returns the vectors [S] of inputs from the table; `table` must not be None.

        Args:
          inputs: token ids [Li] as the model reads them.
          names: the task or mixture of each input, or one for all inputs; for errors.

        Raises:
          InputError: an input is not in the table.
        """
        table = self.table
        assert table is not None
        rows = table.rows(inputs)
        missing = np.flatnonzero(rows < 0)
        if not len(missing):
            return table.vectors(rows)
        index = int(missing[0])
        name = names if isinstance(names, str) else names[index]
        vocabulary = seqio_tasks.get_mixture_or_task(name).output_features["inputs"].vocabulary
        text = vocabulary.decode([int(i) for i in inputs[index]])
        truncated = ""
        if self.length not in table.lengths:
            lengths = " and ".join(map(str, table.lengths))
            truncated = f" (inputs are truncated to {self.length} tokens here, to {lengths} there)"
        raise InputError(
            f"SENTENCE_EMBEDDINGS {table.path} lacks an input of {name!r}: {text[:60]!r}{truncated}"
            f"; pemoe embed with --gin.MIXTURE_OR_TASK_NAME={name} adds it"
        )

    def attach_to(self, groups: Sequence[ChoiceGroup]) -> list[ChoiceGroup]:
        """Returns the groups with the embeddings of their inputs; raises what `vectors` raises."""
        if self.table is None:  # `load_choice_groups` has read the feature
            return list(groups)
        vectors = self.vectors([group.inputs for group in groups], [group.task for group in groups])
        return [
            dataclasses.replace(group, sentence_embedding=vector)
            for group, vector in zip(groups, vectors, strict=True)
        ]


def reads_sentence_embeddings(adapters: Mapping[str, Mapping[str, object]]) -> bool:
    """Returns whether a router reads sentence embeddings; see `core.adapters.describe`."""
    routers = [site.get("router") for site in adapters.values()]
    return any(isinstance(r, Mapping) and r.get("reads") == "sentence" for r in routers)


def check_settings(
    adapters: Mapping[str, Mapping[str, object]], path: str | None, pack: bool
) -> bool:
    """Returns whether a router reads embeddings; checks the settings that do not depend on tasks.

    Args:
      adapters: the model's adapters, as `core.adapters.describe` returns them.
      path: folder of a table; None: the embeddings are a feature of the tasks.
      pack: whether rows hold several examples.

    Raises:
      InputError: a table is set that no router reads or that cannot be opened, or a router reads
        embeddings and rows are packed.
    """
    if not reads_sentence_embeddings(adapters):
        if path is not None:
            raise InputError(
                f"SENTENCE_EMBEDDINGS must be None, because no router reads them, got {path}:"
                " to read them add --gin_file=routing/sentence.gin after a method with routers"
            )
        return False
    if pack:
        # A packed row would need a distribution over experts for each of its examples.
        raise InputError(
            "PACK must be False for routers that read sentence embeddings, because they compute one"
            " distribution over experts for a row, got True"
        )
    if path is not None:
        SentenceTable(path)  # raises InputError if the table is not readable
    return True


def open_for_training(
    adapters: Mapping[str, Mapping[str, object]],
    path: str | None,
    name: str,
    length: int,
    pack: bool,
    use_cached: bool = False,
) -> SentenceSource | None:
    """Returns the sentence embeddings to train with; None if no router reads them.

    Args:
      adapters, path, pack: see `check_settings`.
      name: the task or mixture.
      length: length that its inputs are truncated to.
      use_cached: whether tasks are read from seqio's offline caches.

    Raises:
      InputError: see `check_settings`; or a router reads embeddings and there are none.
    """
    reads_embeddings = check_settings(adapters, path, pack)
    return _open(path, name, length, use_cached) if reads_embeddings else None


def open_for_models(
    models: Sequence[Any],
    path: str | None,
    name: str,
    length: int,
    use_cached: bool = False,
) -> SentenceSource | None:
    """Returns the sentence embeddings to run models with; None if no router reads them.

    Args:
      models: models opened by `checkpoints.models`.
      path, name, length, use_cached: see `open_for_training`.

    Raises:
      InputError: a table is set but no router reads it, a router reads embeddings and there are
        none, or a model was trained with another encoder.
    """
    # Base models and runs without such routers have no encoder to compare.
    trained_with = {
        model.path: model.record.sentence_encoder
        for model in models
        if model.record and reads_sentence_embeddings(model.record.adapters)
    }
    if not trained_with:
        if path is not None:
            raise InputError(
                "SENTENCE_EMBEDDINGS must be None, because no router of"
                f" {', '.join(model.path for model in models)} reads them, got {path}"
            )
        return None
    source = _open(path, name, length, use_cached)
    for model_path, encoder in trained_with.items():
        check_same_encoder(model_path, encoder, source.encoder)
    return source


def _open(path: str | None, name: str, length: int, use_cached: bool) -> SentenceSource:
    """Opens the table at a path, or the feature of the tasks if `path` is None."""
    if path is None:
        dim = _feature_dim(name, use_cached)
        return SentenceSource({"name": f"feature {SENTENCE_FEATURE}", "dim": dim}, length)
    table = SentenceTable(path)
    vocabulary = vocabulary_fingerprint(name)
    if table.vocabulary != vocabulary:
        raise InputError(
            f"SENTENCE_EMBEDDINGS {table.path}: expected inputs in the vocabulary of {name!r},"
            f" {vocabulary}, got {table.vocabulary}"
        )
    return SentenceSource(table.encoder, length, table)


def _feature_dim(name: str, use_cached: bool) -> int:
    """Returns S for embeddings that are a feature of the tasks."""
    names = seqio_tasks.subtask_names(name, use_cached)
    tasks = [seqio_tasks.get_mixture_or_task(task) for task in names]
    for task in tasks:
        if SENTENCE_FEATURE not in task.output_features:
            raise InputError(
                "SENTENCE_EMBEDDINGS is not set: pass --gin.SENTENCE_EMBEDDINGS=… with a table of"
                f" pemoe embed, or give {task.name!r} a feature {SENTENCE_FEATURE!r}"
            )
    first = tasks[0]
    split = next(iter(first.splits))
    # The lengths of the tokens do not matter here.
    with seqio_tasks.translate_read_errors(first.name, split, use_cached):
        ds = seqio_tasks.get_dataset(first.name, {"inputs": 1, "targets": 1}, split, use_cached)
    shape = tuple(ds.element_spec[SENTENCE_FEATURE].shape)
    if shape == (None,):
        # The task does not declare the size, so an example is read.
        example = next(seqio_tasks.numpy_iterator(ds.take(1), first.name, split, use_cached))
        shape = example[SENTENCE_FEATURE].shape
    if len(shape) != 1 or not shape[0]:
        raise InputError(
            f"{first.name!r}: feature {SENTENCE_FEATURE!r} must have shape (S,), got {shape}"
        )
    return int(shape[0])
