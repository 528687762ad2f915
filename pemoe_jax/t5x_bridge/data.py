"""T5X's data by our own feed: the batches that our runner trains on, and an exact resume."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from clu.data import dataset_iterator
from etils import epath

from pemoe_jax.data import feed, prefetch, seqio_tasks
from pemoe_jax.tasks.registered import Register, Registered, run_register


@dataclasses.dataclass
class _State:
    """What `register` had to say the last time."""

    registered: Registered = dataclasses.field(default_factory=Registered)


_state = _State()


def mixture_or_task(name: str, register: Register) -> str:
    """The name, once its tasks are registered.

    Args:
      name: what seqio knows the data by (MIXTURE_OR_TASK_NAME).
      register: `pemoe_jax.tasks.register`.

    Raises:
      InputError: there is no such data.
    """
    _state.registered = run_register(register)
    seqio_tasks.get_mixture_or_task(name)
    return name


def vocabulary(name: str, register: Register, feature: str = "targets") -> Any:
    """The vocabulary of a feature; arguments as of `mixture_or_task`."""
    mixture_or_task(name, register)
    return seqio_tasks.get_mixture_or_task(name).output_features[feature].vocabulary


def datasets(name: str) -> list[str]:
    """The data sets of a mixture, under their names in tables."""
    return _state.registered.datasets_of(seqio_tasks.subtask_names(name))


def get_dataset(
    cfg: Any,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Any = None,
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = True,
) -> "Batches":
    """Batches for `t5x.train`: rows [B, L] in T5X's names, the same for the same seed.

    Args:
      cfg: T5X's DatasetConfig.
      shard_id, num_shards: of the data that this process reads.
      feature_converter_cls: not asked; the layout is that of seqio's EncDecFeatureConverter.
      num_epochs: None: for ever.
      continue_from_last_checkpoint: not asked; checkpoints hold how far the data has come.

    Raises:
      InputError: anything about the data that the user can mend, when the first batch is made.
    """
    del feature_converter_cls, continue_from_last_checkpoint
    lengths = seqio_tasks.validate_lengths(cfg.task_feature_lengths)
    rows = cfg.batch_size // num_shards

    def batches_from(position: Mapping[str, int] | None) -> Any:
        found = feed.train_batches(
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
        return prefetch.prefetch(found)

    return Batches(batches_from, _spec(lengths, rows, cfg.pack))


def _spec(lengths: Mapping[str, int], rows: int, pack: bool) -> dict[str, Any]:
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
    """A feed as T5X's trainer takes it, and puts its position into checkpoints.

    Args:
      batches_from: position -> batches; None: from the beginning.
      spec: of a batch's arrays.
    """

    def __init__(self, batches_from: Callable[[Any], Any], spec: Mapping[str, Any]) -> None:
        self._batches_from, self._spec = batches_from, dict(spec)
        self._restart(0, None)

    def _restart(self, step: int, position: Mapping[str, int] | None) -> None:
        self._first_step, self._start = step, position
        self._positions: list[Any] = [position or {"examples": 0}]
        self._batches: Any = None

    def __next__(self) -> dict[str, np.ndarray]:
        """int32 [B, L] by name."""
        if self._batches is None:
            self._batches = self._batches_from(self._start)
        batch = next(self._batches)
        self._positions.append(self._batches.position)
        return {name: batch[name] for name in self._spec}

    def reset(self) -> None:
        """Back to where it began."""
        self._restart(self._first_step, self._start)

    @property
    def element_spec(self) -> dict[str, Any]:
        """Of a batch's arrays."""
        return self._spec

    def save(self, filename: Any) -> None:
        """Writes the position that belongs to the checkpoint's step.

        T5X takes a batch ahead of the first step, so where the data is does not tell it.
        """
        position = self._positions[_step(filename) - self._first_step]
        epath.Path(filename).write_text(json.dumps(position))

    def restore(self, filename: Any) -> None:
        """Goes on where `save` was."""
        self._restart(_step(filename), json.loads(epath.Path(filename).read_text()))


def _step(filename: Any) -> int:
    """Of the checkpoint_<step> that a file lies in."""
    return int(re.findall(r"checkpoint_(\d+)", str(filename))[-1])
