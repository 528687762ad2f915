"""Writes a table of sentence embeddings for routers: `pemoe embed --help`."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    import numpy as np

    from pemoe_jax.core import network

FLAGS = gin_flags.make_parser(
    "embed",
    "Writes a vector for each different input of some tasks to the folder SENTENCE_EMBEDDINGS;\n"
    "train, evaluate and infer give them to routers that read sentences (routing/sentence.gin).\n"
    "The same command again goes on where it stopped; with other tasks it adds their inputs.",
    example="""\
  pemoe embed --gin_file=models/t5_1_1_large.gin --gin_file=runs/embed.gin \\
    --gin.SENTENCE_EMBEDDINGS=/tmp/sentences --gin.INITIAL_CHECKPOINT_PATH=base.safetensors \\
    --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model \\
    --gin.MIXTURE_OR_TASK_NAME="['jsonl_train', 'jsonl_score_eval']"
""",
    macros=["runs/embed.gin"],
)

_SPLITS = ("train", "evaluation")
_BLOCK = 256  # examples that TensorFlow hands over at a time
_CHUNK = 8192  # inputs that are put in order by length


@dataclasses.dataclass(frozen=True)
class EncoderInput:
    """What a vector is made of.

    Attributes:
      ids: int32 [Li], as the model will read them: cut, and with EOS.
      text: what they are the ids of; None where the encoder reads ids.
    """

    ids: "np.ndarray"
    text: str | None


class Encoder(Protocol):
    """What makes vectors; see `mean_pooled` and `OfTexts`."""

    reads_text: bool

    def describe(self) -> dict[str, Any]:
        """Name, dim, and fingerprint or probe: see `sentence_table.same_encoder`."""
        ...

    def encode(self, inputs: Sequence[EncoderInput], batch_size: int) -> "np.ndarray":
        """-> [N, S], in the inputs' order."""
        ...


def embed(
    output: str,
    data: options.Data,
    encoder: Any,
    splits: str | Sequence[str] = _SPLITS,
    dtype: str = "float16",
) -> None:
    """Writes a table of sentence embeddings, or adds the inputs that it lacks.

    Args:
      output: folder of the table.
      data: the tasks and mixtures whose inputs are embedded. Inputs are truncated to their length
        before they are looked up, so it must be that of the run that reads the table.
      encoder: @embed.mean_pooled(), the mean over tokens of the base model's own encoder, or the
        dotted name of a function from a list of texts to an array [N, S].
      splits: 'train', 'evaluation' or both.
      dtype: dtype of the vectors on disk, 'float16' or 'float32'.

    Raises:
      InputError: a setting or a file is wrong. What was written before stays.
    """
    from pemoe_jax.data import sentence_table, sentences, seqio_tasks
    from pemoe_jax.runtime import progress
    from pemoe_jax.tasks.registered import run_register

    names = data.names
    splits = [splits] if isinstance(splits, str) else splits
    if not splits or not set(splits) <= set(_SPLITS):
        raise InputError(f"EMBED_SPLITS must be some of {_SPLITS}, got {splits!r}")
    lengths = seqio_tasks.validate_lengths(data.task_feature_lengths)
    chosen = resolve_encoder(encoder)
    run_register(data.register).print_summary()
    parts = _parts(names, splits, data.use_cached_tasks)
    vocabularies = {sentences.vocabulary_fingerprint(name) for name in names}
    if len(vocabularies) > 1:
        raise InputError(
            f"MIXTURE_OR_TASK_NAME must name tasks of one vocabulary, got several in {names}"
        )
    description = chosen.describe()
    length = lengths["inputs"]
    writer = sentence_table.TableWriter(output, description, dtype, vocabularies.pop(), length)
    before = len(writer.known)
    if before:
        print(f"{writer.path} has {before:,} inputs already", flush=True)
    bar = progress.Progress("reading", sum(part.examples for part in parts), note="examples")
    try:
        read = functools.partial(
            _inputs, lengths=lengths, use_cached=data.use_cached_tasks, texts=chosen.reads_text
        )
        _add(parts, read, chosen, writer, data.batch_size, bar)
        total = writer.finish()
    finally:
        bar.close()
        writer.close()
    print(
        f"{writer.path}: {total:,} inputs, {total - before:,} of them new,"
        f" by {sentence_table.format_encoder(description)}"
    )


def _add(
    parts: Sequence["_Part"],
    read: Callable[["_Part"], Iterator[EncoderInput]],
    encoder: Encoder,
    writer: Any,
    batch_size: int,
    bar: Any,
) -> None:
    """Encodes what the table lacks."""
    from pemoe_jax.data import sentence_table
    from pemoe_jax.runtime import progress

    new: dict[bytes, EncoderInput] = {}

    def encode() -> None:
        if new:
            writer.add(list(new), encoder.encode(list(new.values()), batch_size))
            new.clear()

    before, done = len(writer.known), 0

    def note() -> str:
        return f"{progress.format_count(len(writer.known) + len(new) - before)} new inputs"

    for part in parts:
        for seen, one in enumerate(read(part), 1):
            key = sentence_table.input_key(one.ids)
            if key not in writer.known:
                new.setdefault(key, one)
            if len(new) >= _CHUNK:
                encode()
            if seen % _BLOCK == 0:
                bar.report_if_slow(done + min(seen, part.examples), note())
        done += part.examples
        bar.report_if_slow(done, note())
    encode()


# --- reading ---


@dataclasses.dataclass(frozen=True)
class _Part:
    """A split of a task, and about how many examples it has."""

    task: str
    split: str
    evaluation: bool
    examples: int


def _parts(names: Sequence[str], splits: Sequence[str], use_cached: bool) -> list[_Part]:
    """What is read; tasks that the data lacks are told of."""
    from pemoe_jax.data import seqio_tasks

    subtasks = seqio_tasks.cached_subtask_names if use_cached else seqio_tasks.subtask_names
    tasks = list(dict.fromkeys(task for name in names for task in subtasks(name)))
    # mixtures of P3 leave out the tasks that the folder does not have
    left_out = [task for task in tasks if not use_cached and not seqio_tasks.has_data(task, False)]
    if left_out:
        more = f", … {len(left_out) - 3} more" if len(left_out) > 3 else ""
        print(f"no data, so left out: {len(left_out)} tasks ({', '.join(left_out[:3])}{more})")
    there = [task for task in tasks if task not in left_out]
    parts = {}
    for task in there:
        wanted = [("train", False)] if "train" in splits else []
        if "evaluation" in splits and (found := seqio_tasks.eval_split(task)) is not None:
            wanted.append((found, True))
        for split, evaluation in wanted:
            if split in seqio_tasks.get_mixture_or_task(task).splits:
                count = (
                    1
                    if use_cached
                    else seqio_tasks.get_mixture_or_task(task).num_input_examples(split) or 1
                )
                parts[task, split] = _Part(task, split, evaluation, count)
    if not parts:
        raise InputError(
            f"MIXTURE_OR_TASK_NAME {', '.join(names)}: expected a split of EMBED_SPLITS"
            f" {', '.join(splits)}, found none in {len(tasks)} tasks"
        )
    return list(parts.values())


def _inputs(
    part: _Part, lengths: Mapping[str, int], use_cached: bool, texts: bool
) -> Iterator[EncoderInput]:
    """The inputs of a split as runs read them, those of answer choices repeated."""
    from pemoe_jax.data import choices, providers, seqio_tasks

    task = seqio_tasks.get_mixture_or_task(part.task)
    feature = task.output_features["inputs"]
    eos_id, length = feature.vocabulary.eos_id, lengths["inputs"]
    # evaluate and infer read one token more and cut it off behind EOS, which seqio's own tasks may
    # not: there both ways of cutting are wanted
    further = [0, 1] if part.evaluation else [0]
    if part.evaluation and isinstance(task, providers.SeekableTask):
        further = [1]
    for more in further:
        longer = {key: value + more for key, value in lengths.items()}
        with seqio_tasks.translate_read_errors(part.task, part.split, use_cached):
            ds = task.get_dataset(
                longer,
                split=part.split,
                use_cached=use_cached,
                shuffle=False,
                seed=0,
                num_epochs=1,
            )
        for ids, found in _rows(ds, part, use_cached, texts):
            row = {"inputs": ids, **({} if found is None else {"inputs_pretokenized": found})}
            text = choices.feature_text({"inputs": feature}, row, "inputs") if texts else None
            yield EncoderInput(choices.truncate(ids, length, eos_id)[0] if more else ids, text)


def _rows(
    ds: Any, part: _Part, use_cached: bool, texts: bool
) -> Iterator[tuple["np.ndarray", bytes | None]]:
    """Each example's ids, int32 [Li], and text, where it has one and it is wanted."""
    import numpy as np
    import tensorflow as tf

    from pemoe_jax.data import seqio_tasks

    has_text = texts and "inputs_pretokenized" in ds.element_spec

    def kept(example: Mapping[str, Any]) -> Any:
        text = example["inputs_pretokenized"] if has_text else ""
        return tf.cast(example["inputs"], tf.int32), text

    blocks = ds.map(kept).ragged_batch(_BLOCK).prefetch(2)
    flat = blocks.map(lambda ids, text: (ids.values, ids.row_splits, text))
    for values, ends, found in seqio_tasks.numpy_iterator(flat, part.task, part.split, use_cached):
        for ids, text in zip(np.split(values, ends[1:-1]), found, strict=True):
            yield ids, text if has_text else None


# --- encoders ---


@dataclasses.dataclass
class MeanPooledEncoder:
    """A frozen T5's own encoder: the mean of what it gives for the real tokens, float32 [D].

    Attributes:
      model: dimensions and activation dtype; adapters are left away.
      base_path: of the base; None: random weights.
      seed: of random weights.
    """

    model: "network.Transformer"
    base_path: str | None
    seed: int = 0
    reads_text = False

    def describe(self) -> dict[str, Any]:
        """The base's fingerprint is the encoder's: the same for float32 and bfloat16."""
        _, identity = self._loaded
        return {
            "name": "mean_pooled",
            "dim": self.model.config.emb_dim,
            "fingerprint": identity["fingerprint"],
        }

    @functools.cached_property
    def _mesh(self) -> Any:
        from pemoe_jax.core import partitioning

        return partitioning.make_mesh()

    @functools.cached_property
    def _loaded(self) -> tuple[Any, dict[str, Any]]:
        """(the encoder's parameters, identity of the base)."""
        from pemoe_jax.checkpoints import models
        from pemoe_jax.core import network, partitioning
        from pemoe_jax.core import params as params_lib

        self.model = network.Transformer(dataclasses.replace(self.model.config, dropout_rate=0.0))
        base, identity = models.load_base(
            self.model,
            self.base_path,
            self.seed,
            shardings=partitioning.replicated_sharding(self._mesh),
        )
        return params_lib.select(base, lambda path: not path.startswith("decoder/")), identity

    @functools.cached_property
    def _pooled(self) -> Callable[[Any, Any], Any]:
        import jax
        import jax.numpy as jnp

        def pooled(params: Any, tokens: Any) -> Any:
            """int32 [B, L] -> float32 [B, D]; of padding alone zeros."""
            model = self.model
            encoded: Any = model.apply(
                {"params": params}, tokens, enable_dropout=False, method=model.encode
            )
            real = (tokens > 0).astype(jnp.float32)[..., None]
            total = jnp.sum(encoded.astype(jnp.float32) * real, axis=1)
            return total / jnp.maximum(jnp.sum(real, axis=1), 1.0)

        return jax.jit(pooled)

    def encode(self, inputs: Sequence[EncoderInput], batch_size: int) -> "np.ndarray":
        """See `Encoder`: inputs of like length share a batch, of short ones more."""
        import numpy as np

        from pemoe_jax.core import partitioning
        from pemoe_jax.runtime import in_flight

        params, _ = self._loaded
        found = np.zeros((len(inputs), self.model.config.emb_dim), np.float32)

        def pool(tokens: np.ndarray) -> Any:
            sharded = partitioning.shard_batch({"tokens": tokens}, self._mesh)
            return self._pooled(params, sharded["tokens"])

        token_batches = batches([one.ids for one in inputs], batch_size, self._mesh.shape["data"])
        results = ((pool(tokens), numbers) for tokens, numbers in token_batches)
        for vectors, numbers in in_flight.keep_in_flight(results):
            found[numbers] = np.asarray(vectors)[: len(numbers)]
        return found


def batches(
    inputs: Sequence["np.ndarray"], batch_size: int, devices: int = 1
) -> Iterator[tuple["np.ndarray", list[int]]]:
    """Batches int32 [B, L] of inputs, the longest first, and whose rows they are; others are zeros.

    L is one of few lengths, and B depends on it alone: `batch_size` at 512 tokens and more, up to
    8 times as many of shorter ones. So there are few programs to compile, however often it is
    called.

    Args:
      inputs: token ids, [Li] each.
      batch_size: rows of the longest.
      devices: B is a multiple of it.
    """
    import numpy as np

    order = sorted(range(len(inputs)), key=lambda number: -len(inputs[number]))
    while order:
        length = _width(len(inputs[order[0]]))
        rows = max(batch_size, min(8 * batch_size, batch_size * 512 // length))
        rows = -(-rows // devices) * devices
        numbers, order = order[:rows], order[rows:]
        tokens = np.zeros((rows, length), np.int32)
        for row, number in zip(tokens, numbers, strict=False):
            row[: len(inputs[number])] = inputs[number]
        yield tokens, numbers


def _width(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, 192, … that is not less."""
    width = 32
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


def mean_pooled(
    model: "network.Transformer | None" = None,
    initial_checkpoint_path: str | None = None,
) -> MeanPooledEncoder:
    """The built-in encoder; nothing is read before it is used.

    Args:
      model: of a model file.
      initial_checkpoint_path: the frozen base.

    Raises:
      InputError: one of them is not given.
    """
    if model is None:
        raise InputError("no model: expected --gin_file=models/… before the run file")
    if initial_checkpoint_path is None:
        raise InputError(
            "INITIAL_CHECKPOINT_PATH is not set: expected the base whose encoder gives embeddings,"
            " or SENTENCE_ENCODER to name another encoder"
        )
    return MeanPooledEncoder(model, initial_checkpoint_path)


# Encoded to tell encoders apart that do not say who they are.
_PROBE = "The quick brown fox jumps over the lazy dog, and the dog does not mind."
_PROBED = 16  # of the vector's numbers


@dataclasses.dataclass
class TextEncoder:
    """A function of the user's, list of texts -> array [N, S], as an encoder.

    It is known by its attributes `name` and `fingerprint`, where it has them, or else by where it
    is defined and by what it makes of a fixed sentence.
    """

    function: Callable[[list[str]], Any]
    reads_text = True

    def describe(self) -> dict[str, Any]:
        """See `Encoder`.

        Raises:
          InputError: it gives no vector.
        """
        import numpy as np

        vector = self._vectors([_PROBE])[0]
        of = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        name = getattr(self.function, "name", None)
        found = {
            "name": name if isinstance(name, str) else f"{of.__module__}.{of.__qualname__}",
            "dim": len(vector),
        }
        fingerprint = getattr(self.function, "fingerprint", None)
        if isinstance(fingerprint, str):
            return {**found, "fingerprint": fingerprint}
        size = max(float(np.sqrt(np.mean(np.square(vector)))), 1e-30)
        return {**found, "probe": [round(float(x), 4) for x in vector[:_PROBED] / size]}

    def encode(self, inputs: Sequence[EncoderInput], batch_size: int) -> "np.ndarray":
        """See `Encoder`: texts of like length at a time."""
        import numpy as np

        order = sorted(range(len(inputs)), key=lambda number: -len(inputs[number].ids))
        parts = []
        for at in range(0, len(order), batch_size):
            texts = [inputs[number].text or "" for number in order[at : at + batch_size]]
            parts.append(self._vectors(texts))
        found = np.concatenate(parts)
        return found[np.argsort(order)]

    def _vectors(self, texts: list[str]) -> "np.ndarray":
        import numpy as np

        try:
            found = np.asarray(self.function(texts), np.float32)
        except (TypeError, ValueError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"SENTENCE_ENCODER: expected a function of a list of texts that gives numbers"
                f" [N, S]: {line}"
            ) from error
        if found.ndim != 2 or len(found) != len(texts) or not found.shape[1]:
            raise InputError(
                f"SENTENCE_ENCODER gave an array of shape {found.shape} for {len(texts)} texts,"
                f" expected ({len(texts)}, S)"
            )
        return found


def resolve_encoder(given: Any) -> Encoder:
    """What SENTENCE_ENCODER names.

    Raises:
      InputError: it is no encoder, no function and no name of one.
    """
    if isinstance(given, str):
        module, _, name = given.replace(":", ".").rpartition(".")
        try:
            given = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"SENTENCE_ENCODER {given!r}: expected 'module.function': {error}"
            ) from error
    if hasattr(given, "describe") and hasattr(given, "encode"):
        encoder: Encoder = given
        return encoder
    if not callable(given):
        raise InputError(
            f"SENTENCE_ENCODER: expected @embed.mean_pooled() or a function of texts,"
            f" found {given!r:.80}"
        )
    return TextEncoder(given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, embed, argv)
