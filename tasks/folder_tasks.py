"""Base classes for the seqio tasks and mixtures of the folders JSONL_DIR and P3_DIR.

They combine seqio's classes with the interfaces of `data.seekable_tasks`, and implement what the
tasks of both folders have in common. `jsonl.source` and `p3.source` derive from them.

Importing this module imports seqio, which takes about 5 s.
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
    """A task that reads the rows in a folder's files by index."""

    def get_dataset(
        self, *args: object, use_cached: bool = False, **kwargs: object
    ) -> tf.data.Dataset:
        """See seqio.Task; arguments after `sequence_length` and `split` must be named."""
        if not use_cached:
            # The source shuffles row indices itself. seqio's shuffle buffer of examples, and its
            # copy of a small dataset in memory, would cost memory and gain nothing.
            kwargs.update(shuffle_buffer_size=1, try_in_mem_cache=False)
        ds = super().get_dataset(*args, use_cached=use_cached, **kwargs)
        # `data.seqio_tasks` does this too, but seqio's Evaluator and T5X iterate by themselves.
        return seqio_import.disable_autotune(ds)

    def cached_examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset | None:
        return cached_example_dataset([self], [1.0], sequence_length, split, options)


class FolderMixture(SeekableMixture, seqio.Mixture):
    """A mixture of `FolderTask`s that draws row indices and reads their rows in one pipeline.

    seqio's Mixture builds a pipeline for each task, which takes 0.1 s each. Examples and rates are
    the same here; their order is that of `data.order.ExampleOrder`.
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
        # seqio reads its caches by itself, and the pipeline below yields only `inputs` and
        # `targets`, not features that are to be passed through.
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
    """Truncates features to their lengths, and ends those with `add_eos` in one EOS.

    A seqio preprocessor. seqio's own one would add a second EOS to ids that end in one already,
    and some caches of P3 have an EOS on inputs, while others do not.
    """

    # Autograph is slow, and there is no control flow on tensors to convert.
    @tf.autograph.experimental.do_not_convert
    def trim(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        trimmed = {}
        for key, feature in output_features.items():
            ids, eos = example[key], feature.vocabulary.eos_id
            # An EOS at the end is dropped first, and added again where the feature has one.
            keep = tf.size(ids) - tf.cast(tf.reduce_any(ids[-1:] == eos), tf.int32)
            length = (sequence_length or {}).get(key)
            if length is not None:
                keep = tf.minimum(keep, length - int(feature.add_eos))
            trimmed[key] = tf.concat([ids[:keep], [eos] * int(feature.add_eos)], axis=0)
        return example | trimmed

    return ds.map(trim, num_parallel_calls=tf.data.AUTOTUNE)


def shard_of(shard_info: seqio.ShardInfo | None) -> tuple[int, int]:
    """Returns (index, count) of a shard; (0, 1) if the data is not sharded."""
    return (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
