"""Base classes of our seqio tasks and mixtures, whose training streams start at any example.

Importing this imports seqio, which takes about 5 s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.data.seekable_datasets import cached_example_dataset
from pemoe_jax.data.seekable_tasks import SeekableMixture, SeekableTask, StreamOptions

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and filters its log
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402


class FolderTask(SeekableTask, seqio.Task):
    """A task that reads rows of a folder by index."""

    def get_dataset(
        self, *args: object, use_cached: bool = False, **kwargs: object
    ) -> tf.data.Dataset:
        """See seqio.Task; arguments after `sequence_length` and `split` must be named."""
        if not use_cached:
            # The source shuffles row indices, so that a buffer of examples and a copy of all
            # examples in memory would cost and gain nothing.
            kwargs.update(shuffle_buffer_size=1, try_in_mem_cache=False)
        ds = super().get_dataset(*args, use_cached=use_cached, **kwargs)
        # Here too, for seqio's Evaluator and T5X, which make the iterators themselves.
        return seqio_import.disable_autotune(ds)

    def cached_examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset | None:
        return cached_example_dataset([self], [1.0], sequence_length, split, options)


class FolderMixture(SeekableMixture, seqio.Mixture):
    """A mixture of `FolderTask`s that draws row indices and reads them in one pipeline.

    Examples and rates are those of seqio's Mixture, which builds a pipeline for each task (0.1 s
    each); the order is that of `ExampleOrder`.
    """

    def get_dataset(
        self,
        sequence_length: Mapping[str, int] | None = None,
        split: str = "train",
        use_cached: bool = False,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = None,
        **kwargs: object,
    ) -> tf.data.Dataset:
        if use_cached or kwargs.get("passthrough_features"):
            ds = super().get_dataset(
                sequence_length, split, use_cached, shuffle, seed, shard_info, num_epochs, **kwargs
            )
            return seqio_import.disable_autotune(ds)
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "big") if shuffle else 0
        options = StreamOptions(
            seed=seed,
            shuffle=shuffle,
            num_epochs=num_epochs,
            shard=shard_of(shard_info),
            include_text=bool(kwargs.get("copy_pretokenized")),
        )
        ds = self.examples_from(sequence_length or {}, split, options)
        return seqio_import.disable_autotune(ds)

    def cached_examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset | None:
        names = seqio_tasks.subtask_names(self.name, use_cached=True)
        tasks = [task for task in self.tasks if task.name in names and split in task.splits]
        rates = self.rates(tasks)
        return cached_example_dataset(tasks, rates, sequence_length, split, options)

    def rates(self, tasks: Sequence[seqio.Task]) -> list[float]:
        """Returns the mixing rate of each task."""
        return [self.get_rate(task) for task in tasks]


def trim_and_append_eos(
    ds: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """Preprocessor: truncates to the length, and ends in one EOS if the feature has `add_eos`.

    seqio's own preprocessor would add a second EOS to ids that end in one already: some caches of
    P3 have an EOS on inputs, others do not.
    """

    # without autograph, which is slow to build
    @tf.autograph.experimental.do_not_convert
    def trim(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        trimmed = {}
        for key, feature in output_features.items():
            ids, eos = example[key], feature.vocabulary.eos_id
            keep = tf.size(ids) - tf.cast(tf.reduce_any(ids[-1:] == eos), tf.int32)
            length = (sequence_length or {}).get(key)
            if length is not None:
                keep = tf.minimum(keep, length - int(feature.add_eos))
            trimmed[key] = tf.concat([ids[:keep], [eos] * int(feature.add_eos)], axis=0)
        return example | trimmed

    return ds.map(trim, num_parallel_calls=tf.data.AUTOTUNE)


def shard_of(shard_info: seqio.ShardInfo | None) -> tuple[int, int]:
    """Returns (index, count) of a shard."""
    return (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
