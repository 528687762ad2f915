"""A text file as seqio tasks for pretraining: span corruption, and prefix language modelling.

`register(text_path, vocab_path)` makes, of a file with a text a line,

- `pretrain_span_corruption`: spans of the line are cut out, each for a sentinel; the targets name
  sentinels and spans (arXiv 1910.10683, section 3.1.4);
- `pretrain_prefix_lm`: the line is cut in two, and the second part is predicted from the first.
  Half of the cuts lie before the last sentence, which is where a question has its answer.

Each line is an example of its own, and where it is cut is drawn anew every time it is read.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import
from pemoe_jax.tasks import jsonl

SPAN_CORRUPTION = "pretrain_span_corruption"
PREFIX_LM = "pretrain_prefix_lm"
SENTENCE_ENDS = (".", "?", "!", ":")


def _lengths(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`parts` positive numbers that sum to `total`, all such ways equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).astype(int).tolist()


def span_corruption(
    ids: Sequence[int],
    rng: np.random.Generator,
    first_sentinel: int,
    noise_density: float = 0.3,
    mean_span_length: float = 2.0,
) -> tuple[list[int], list[int]]:
    """Cuts spans out of a text.

    Args:
      ids: a text of at least two tokens, without EOS.
      rng: where the draws come from.
      first_sentinel: id of the first sentinel; the next ones count down from it.
      noise_density: share of the tokens that is cut out. T5 has 0.15 and spans of 3, on 512
        tokens; of a sentence that would leave one span to learn from.
      mean_span_length: in tokens.

    Returns:
      (inputs, targets), without EOS. The text begins with what is kept and ends with what is cut.
    """
    noise = min(max(round(len(ids) * noise_density), 1), len(ids) - 1)
    spans = min(max(round(noise / mean_span_length), 1), len(ids) - noise)
    kept, cut = _lengths(len(ids) - noise, spans, rng), _lengths(noise, spans, rng)
    inputs: list[int] = []
    targets: list[int] = []
    at = 0
    for number, (keep, drop) in enumerate(zip(kept, cut, strict=True)):
        sentinel = first_sentinel - number
        inputs += [*ids[at : at + keep], sentinel]
        targets += [sentinel, *ids[at + keep : at + keep + drop]]
        at += keep + drop
    return inputs, targets


def prefix_lm(
    ids: Sequence[int],
    rng: np.random.Generator,
    sentence_ends: Sequence[int] = (),
    at_last_end: float = 0.5,
    at_an_end: float = 0.25,
) -> tuple[list[int], list[int]]:
    """Cuts a text in two.

    Args:
      ids: a text of at least two tokens, without EOS.
      rng: where the draws come from.
      sentence_ends: ids of full stops and the like.
      at_last_end: probability of a cut before the last sentence (it answers the ones before).
      at_an_end: probability of a cut after any sentence. Otherwise, or where there is one sentence
        only, anywhere.

    Returns:
      (inputs, targets), neither empty, without EOS.
    """
    ends = [place + 1 for place, token in enumerate(ids[:-1]) if token in sentence_ends]
    draw = rng.random()
    if ends and draw < at_last_end:
        cut = ends[-1]
    elif ends and draw < at_last_end + at_an_end:
        cut = ends[rng.integers(len(ends))]
    else:
        cut = 1 + int(rng.integers(len(ids) - 1))
    return list(ids[:cut]), list(ids[cut:])


def _preprocessor(
    cut: Callable[[Sequence[int], np.random.Generator], tuple[list[int], list[int]]],
) -> Callable[..., Any]:
    """A seqio preprocessor: ids in `targets` -> `inputs`, `targets`; draws follow seqio's seed."""
    seqio = seqio_import.import_seqio()
    import tensorflow as tf

    def cut_ids(ids: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = cut(ids.tolist(), np.random.default_rng(seed.astype(np.uint32).tolist()))
        return np.asarray(inputs, np.int32), np.asarray(targets, np.int32)

    @seqio.map_over_dataset(num_seeds=1)
    def preprocess(example: dict[str, Any], seed: Any) -> dict[str, Any]:
        inputs, targets = tf.numpy_function(
            cut_ids, [example["targets"], seed], [tf.int32, tf.int32]
        )
        inputs.set_shape([None])
        targets.set_shape([None])
        return {"inputs": inputs, "targets": targets}

    return preprocess


def _at_least_two(ds: Any) -> Any:
    """Leaves out lines that cannot be cut."""
    import tensorflow as tf

    return ds.filter(lambda example: tf.size(example["targets"]) > 1)


def register(text_path: str | os.PathLike[str], vocab_path: str | os.PathLike[str]) -> None:
    """Registers the two tasks over a text file, in place of those of an earlier call.

    Args:
      text_path: a text a line, in UTF-8 (TEXT_PATH).
      vocab_path: a SentencePiece model (VOCAB_PATH); seqio adds 100 sentinels on top of it.

    Raises InputError where a file is missing.
    """
    seqio = seqio_import.import_seqio()
    path = pathlib.Path(text_path).expanduser().absolute()
    if not path.is_file():
        raise InputError(
            f"TEXT_PATH {path}: no such file"
            " (pemoe_jax.tasks.quickstart.generate writes the quickstart's)"
        )
    vocabulary = jsonl.vocabulary(vocab_path)
    # .encode and not piece_to_id: a mark at a word's end may be a piece of its own or not
    ends = [ids[-1] for ids in (vocabulary.encode(f"a{end}") for end in SENTENCE_ENDS) if ids]
    first_sentinel = vocabulary.vocab_size - 1
    cuts: dict[str, Callable[[Sequence[int], np.random.Generator], tuple[list[int], list[int]]]] = {
        SPAN_CORRUPTION: lambda ids, rng: span_corruption(ids, rng, first_sentinel),
        PREFIX_LM: lambda ids, rng: prefix_lm(ids, rng, ends),
    }
    for name, cut in cuts.items():
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.TextLineDataSource({"train": str(path)}),
            preprocessors=[
                seqio.map_over_dataset(lambda line: {"targets": line}),
                seqio.preprocessors.tokenize,
                _at_least_two,
                _preprocessor(cut),
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features={
                key: seqio.Feature(vocabulary, add_eos=True) for key in ("inputs", "targets")
            },
        )
