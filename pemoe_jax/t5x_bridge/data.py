"""The data pipeline of `pemoe train` in T5X: the same batches, and an exact resume."""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from clu.data import dataset_iterator
from etils import epath

from pemoe_jax.core.errors import check_integer
from pemoe_jax.data import feed, prefetch, seqio_tasks, task_fraction
from pemoe_jax.runtime import file_io
from pemoe_jax.tasks.task_roles import Register, TaskRoles, run_register

if TYPE_CHECKING:
    import seqio
    from t5x import utils

    from pemoe_jax.data.prefetch import PrefetchIterator

# Number of steps that a checkpoint may lag behind the batches that were read. T5X takes one batch
# before the first step, and its trainer takes one for each step, so a lag of 1 is usual.
_MAX_LAG = 16

Batch: TypeAlias = dict[str, np.ndarray]
# Position in the data: {'examples': number of examples that this process has read}.
Position: TypeAlias = Mapping[str, int]


class _LastRegistration:
    """The result of the last call of `register`, for `training_record`.

    gin calls `mixture_or_task`, and T5X passes on only the name that it returns.
    """

    task_roles = TaskRoles()


def mixture_or_task(name: str, register: Register, fraction: float = 1.0, seed: int = 0) -> str:
    """Registers the tasks and returns the name of a mixture or task.

    Args:
      name: name of a seqio mixture or task (MIXTURE_OR_TASK_NAME).
      register: `pemoe_jax.tasks.register`.
      fraction: fraction of the mixture's tasks (TASK_FRACTION). If it is less than 1, the returned
        name is that of a new mixture of these tasks, see `task_fraction.register_fraction`.
      seed: seed of the draw of the fraction.

    Raises:
      InputError: no mixture or task has this name, or the fraction leaves none.
    """
    _LastRegistration.task_roles = run_register(register)
    return task_fraction.register_fraction(name, fraction, seed)


def vocabulary(name: str, register: Register, feature: str = "targets") -> "seqio.Vocabulary":
    """Returns the vocabulary of a feature; the arguments are those of `mixture_or_task`."""
    mixture_or_task(name, register)
    return seqio_tasks.get_mixture_or_task(name).output_features[feature].vocabulary


def training_record(name: str) -> dict[str, Any]:
    """Returns the fields of a run's `Record` that describe its training data."""
    record = _LastRegistration.task_roles.training_record(seqio_tasks.subtask_names(name))
    return {**record, "vocabulary": seqio_tasks.fingerprint_vocabulary(name)}


def get_dataset(
    cfg: "utils.DatasetConfig",
    shard_id: int,
    num_shards: int,
    feature_converter_cls: object = None,
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = True,
) -> "Batches":
    """Returns the batches of `t5x.train`: rows [B, L] under T5X's names, determined by the seed.

    Args:
      cfg: T5X's DatasetConfig.
      shard_id, num_shards: the part of each batch that this process reads.
      feature_converter_cls: ignored; batches are laid out as by seqio's EncDecFeatureConverter.
      num_epochs: number of passes over the data; None: unlimited.
      continue_from_last_checkpoint: ignored; checkpoints hold the position in the data.

    Raises:
      InputError: the lengths are wrong. Errors in the data or other settings are raised with the
        first batch.
    """
    del feature_converter_cls, continue_from_last_checkpoint
    lengths = seqio_tasks.validate_lengths(cfg.task_feature_lengths)
    rows = cfg.batch_size // num_shards

    def batches_from(position: Position | None) -> "PrefetchIterator[Batch]":
        batches = feed.train_batches(
            cfg.mixture_or_task_name,
            lengths,
            rows,
            split=cfg.split,
            seed=cfg.seed or 0,
            pack=cfg.pack,
            shuffle=cfg.shuffle,
            start=position,
            num_epochs=num_epochs,
            use_cached=cfg.use_cached,
            shard=(shard_id, num_shards),
        )
        return prefetch.prefetch(batches)

    return Batches(batches_from, _spec(lengths, rows, cfg.pack))


def _spec(
    lengths: Mapping[str, int], rows: int, pack: bool
) -> dict[str, dataset_iterator.ArraySpec]:
    """Returns the shapes and dtypes of a batch: int32 [rows, L] for each name."""
    # Name of an array -> the feature whose length it has.
    decoder = ["target_tokens", "input_tokens", "loss_weights"]
    names = {"encoder_input_tokens": "inputs"} | {f"decoder_{name}": "targets" for name in decoder}
    if pack:
        for side, feature in (("encoder", "inputs"), ("decoder", "targets")):
            names |= {f"{side}_{kind}": feature for kind in ("segment_ids", "positions")}
    return {
        name: dataset_iterator.ArraySpec(dtype=np.dtype(np.int32), shape=(rows, lengths[feature]))
        for name, feature in names.items()
    }


class Batches(dataset_iterator.DatasetIterator):
    """An iterator of batches for T5X's trainer, whose checkpoints contain its position.

    Args:
      batches_from: position -> batches; None for the beginning.
      spec: shapes and dtypes of a batch.
    """

    def __init__(
        self,
        batches_from: Callable[[Position | None], "PrefetchIterator[Batch]"],
        spec: Mapping[str, dataset_iterator.ArraySpec],
    ) -> None:
        self._batches_from, self._spec = batches_from, dict(spec)
        self._restart(0, None)

    def _restart(self, step: int, position: Position | None) -> None:
        self._first_step, self._start = step, position
        # Step -> position, for the last steps: `save` writes the position of an earlier step.
        self._newest = step
        self._positions: dict[int, Position | None] = {step: position or {"examples": 0}}
        self._batches: PrefetchIterator[Batch] | None = None

    def __next__(self) -> Batch:
        """Returns the next batch: int32 [B, L] by name."""
        if self._batches is None:
            self._batches = self._batches_from(self._start)
        batch = next(self._batches)
        self._newest += 1
        self._positions[self._newest] = self._batches.position
        self._positions.pop(self._newest - _MAX_LAG - 1, None)
        return {name: batch[name] for name in self._spec}

    def reset(self) -> None:
        """Returns to the position at which the iterator was created or last restored."""
        self._restart(self._first_step, self._start)

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        """Shapes and dtypes of a batch."""
        return self._spec

    def save(self, filename: os.PathLike[str] | str) -> None:
        """Writes the position in the data at the checkpoint's step."""
        # Not the newest position: T5X is one batch ahead, since it takes one before the first step.
        position = self._positions[_step(filename)]
        epath.Path(filename).write_text(json.dumps(position), encoding="utf-8")

    def restore(self, filename: os.PathLike[str] | str) -> None:
        """Continues from the position that `save` wrote."""
        position = file_io.read_json(filename)
        check_integer(f"{filename}: examples", position.get("examples"), 0)
        self._restart(_step(filename), position)


def _step(filename: os.PathLike[str] | str) -> int:
    """Returns the step of the folder checkpoint_<step> that contains a file."""
    return int(re.findall(r"checkpoint_(\d+)", str(filename))[-1])
