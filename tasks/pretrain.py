"""Pretraining on a text file as seqio tasks: span corruption and prefix language modeling.

`register(text_path, vocab_path)` adds two tasks over the lines of a file:

- `pretrain_span_corruption`: spans of the line are replaced by sentinels, and the targets list the
  sentinels with their spans (arXiv 1910.10683, section 3.1.4);
- `pretrain_prefix_lm`: the line is split in two, and the second part is predicted from the first.

Each line is an example. Its spans, or the place where it is split, are drawn anew each time the
line is read.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import
from pemoe_jax.tasks.task_roles import TaskRoles
from pemoe_jax.tasks.vocabulary import load_vocabulary, sentinel_ids

if TYPE_CHECKING:
    import tensorflow as tf

SPAN_CORRUPTION = "pretrain_span_corruption"
PREFIX_LM = "pretrain_prefix_lm"
_SENTENCE_ENDS = (".", "?", "!", ":")
# T5 removes 15 % of 512 tokens, in spans of 3 on average. Lines here are a few sentences of some 20
# tokens, from which these numbers would remove a single span.
_NOISE_DENSITY = 0.3
_MEAN_SPAN_LENGTH = 2.0

# (ids, rng) -> (inputs, targets), all without EOS
Objective = Callable[[Sequence[int], np.random.Generator], tuple[list[int], list[int]]]


def _random_lengths(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Draws `parts` positive integers with sum `total`, uniformly among all such lists."""
    # A list is the same as a choice of `parts` - 1 different boundaries between 1 and `total` - 1.
    bounds = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *bounds, total]).astype(int).tolist()


def span_corruption(
    ids: Sequence[int], rng: np.random.Generator, sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Replaces spans of a text by sentinels.

    Args:
      ids: a text of at least two tokens, without EOS.
      rng: source of the draws.
      sentinels: ids of the sentinels, in the order of their use. At most as many spans are removed.

    Returns:
      (inputs, targets), without EOS. Kept parts and spans alternate: the first token is always
      kept, and the last is always removed.
    """
    # The bounds ensure that no span and no gap between spans is empty, whatever the length.
    num_noise = min(max(round(len(ids) * _NOISE_DENSITY), 1), len(ids) - 1)
    num_spans = min(max(round(num_noise / _MEAN_SPAN_LENGTH), 1), len(ids) - num_noise)
    num_spans = min(num_spans, len(sentinels))
    keep_lengths = _random_lengths(len(ids) - num_noise, num_spans, rng)
    span_lengths = _random_lengths(num_noise, num_spans, rng)
    inputs: list[int] = []
    targets: list[int] = []
    start = 0
    for keep, span, sentinel in zip(keep_lengths, span_lengths, sentinels, strict=False):
        inputs += [*ids[start : start + keep], sentinel]
        targets += [sentinel, *ids[start + keep : start + keep + span]]
        start += keep + span
    return inputs, targets


def prefix_lm(
    ids: Sequence[int], rng: np.random.Generator, sentence_ends: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Splits a text in two.

    A text of several sentences is split before the last one (probability 0.5), after a random other
    one (0.25), or before a random token (0.25). A text of one sentence is split before a random
    token.

    Args:
      ids: a text of at least two tokens, without EOS.
      rng: source of the draws.
      sentence_ends: ids of the tokens that end a sentence, such as a full stop.

    Returns:
      (inputs, targets), neither empty, without EOS.
    """
    # Positions after the ends of all sentences but the last.
    ends = [position + 1 for position, token in enumerate(ids[:-1]) if token in sentence_ends]
    draw = rng.random()
    if ends and draw < 0.5:  # the last sentence is often the answer to a question
        split = ends[-1]
    elif ends and draw < 0.75:
        split = ends[rng.integers(len(ends))]
    else:
        split = 1 + int(rng.integers(len(ids) - 1))
    return list(ids[:split]), list(ids[split:])


def _preprocessor(objective: Objective) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Turns an objective into a preprocessor from `targets` to `inputs` and `targets`."""
    seqio = seqio_import.import_seqio()
    import tensorflow as tf

    def apply(ids: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed.astype(np.uint32).tolist())
        inputs, targets = objective(ids.tolist(), rng)
        return np.asarray(inputs, np.int32), np.asarray(targets, np.int32)

    # seqio derives the seeds of the examples from the pipeline's seed.
    @seqio.map_over_dataset(num_seeds=1)
    def preprocess(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs, targets = tf.numpy_function(apply, [example["targets"], seed], [tf.int32, tf.int32])
        # The next preprocessors need a static rank, which numpy_function does not know.
        inputs.set_shape([None])
        targets.set_shape([None])
        return {"inputs": inputs, "targets": targets}

    return preprocess


def _drop_short_texts(ds: tf.data.Dataset) -> tf.data.Dataset:
    """Drops texts of fewer than two tokens, which neither objective can divide."""
    import tensorflow as tf

    return ds.filter(lambda example: tf.size(example["targets"]) > 1)


def register(text_path: str | os.PathLike[str], vocab_path: str | os.PathLike[str]) -> TaskRoles:
    """Registers the two tasks over a text file, in place of those of an earlier call.

    Args:
      text_path: file with a text per line, in UTF-8.
      vocab_path: see `load_vocabulary` (VOCAB_PATH).

    Raises:
      InputError: a file does not exist, or the vocabulary is not a SentencePiece model.
    """
    seqio = seqio_import.import_seqio()
    path = pathlib.Path(text_path).expanduser().absolute()
    if not path.is_file():
        raise InputError(
            f"TEXT_PATH {path}: no such file"
            " (pemoe_jax.tasks.quickstart.generate writes the quickstart's)"
        )
    vocabulary = load_vocabulary(vocab_path)
    # Each mark is encoded after a letter, as in a text: `piece_to_id` would miss a mark whose token
    # depends on what precedes it. The last token is the mark's.
    ends = [ids[-1] for ids in (vocabulary.encode(f"a{end}") for end in _SENTENCE_ENDS) if ids]
    sentinels = sentinel_ids(vocabulary)
    objectives: dict[str, Objective] = {
        SPAN_CORRUPTION: lambda ids, rng: span_corruption(ids, rng, sentinels),
        PREFIX_LM: lambda ids, rng: prefix_lm(ids, rng, ends),
    }
    for name, objective in objectives.items():
        # seqio refuses a name that exists, and a later call may have another file.
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.TextLineDataSource({"train": str(path)}),
            preprocessors=[
                seqio.map_over_dataset(lambda line: {"targets": line}),
                seqio.preprocessors.tokenize,
                _drop_short_texts,
                _preprocessor(objective),
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features={
                key: seqio.Feature(vocabulary, add_eos=True) for key in ("inputs", "targets")
            },
        )
    return TaskRoles()
