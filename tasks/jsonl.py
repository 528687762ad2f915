"""A folder of JSON lines as seqio tasks: train and score on your own prompts without seqio code.

The folder holds `<task>/<split>.jsonl`, a line an example: `{"inputs": str, "targets": str,
"answer_choices": [str]}`, the last only where there are choices. `register` turns it into

- a seqio task `<task>`, with the splits that have a file;
- for every task with choices a twin `<task>_score_eval` in the form of P3's: a row a choice, with
  `idx` [example, choice], `is_correct` and `weight`, and a metric, so that seqio's Evaluator and
  T5X score it too;
- the mixtures `jsonl_train` and `jsonl_score_eval`.

Of both kinds of task the split `validation` is the evaluation split: the first of validation, val
and test.

An optional `INDEX.json` maps a task to `dataset`, `subset`, `original_task`, `t0_do_train`,
`t0_do_eval` and `t0_blacklisted` (all optional). With roles in it, P3's are: training `t0_do_train
== "BASE"` and not blacklisted; evaluation `t0_do_eval == "BASE"`, original task, with choices. A
task without roles in it is for training, and one without a data set is a data set of its own.
TRAIN_TASKS and EVAL_TASKS, lists of shell-style patterns (`*`, `?`, `[abc]`; the whole name must
match), override the roles.

A data set that any template has the evaluation role for, or that EVAL_TASKS takes a task of, is
held out: none of its tasks is trained on, unless TRAIN_TASKS names it, and then the summary says
so.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import difflib
import fnmatch
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax import data
from pemoe_jax.core.errors import InputError

TRAIN_MIXTURE = "jsonl_train"
SCORE_MIXTURE = "jsonl_score_eval"
SCORE_EVAL = "_score_eval"
MAX_RATE = (
    500_000  # T0: a data set beyond this many examples counts as this many, shared by its templates
)

_READ = 64  # rows read at a time
_ODD = {
    "target_not_in_choices": "targets not among their choices",
    "doubled_choices": "doubled choices",
    "no_choices": "rows without choices in a task with choices (not scored)",
    "empty_input": "empty inputs",
    "empty_target": "empty targets",
}


@dataclasses.dataclass(frozen=True, eq=False)
class FileScan:
    """What reading a file through once has found."""

    offsets: np.ndarray  # int64 [rows]: where each row begins
    odd: Mapping[str, tuple[int, int]]  # kind -> number of rows, line of the first
    max_choices: int
    max_words: int  # of the longest input

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(self.offsets)


@dataclasses.dataclass(frozen=True)
class OddRows:
    """Rows that are not wrong but that a reader of the results should know of."""

    task: str
    split: str
    kind: str
    count: int
    path: str
    line: int  # of the first


@dataclasses.dataclass(frozen=True)
class Registered:
    """What `register` has registered, and what it left out."""

    folder: str
    has_index: bool
    train_tasks: list[str]
    eval_tasks: list[str]  # the twins' names
    datasets: dict[str, str]  # every task's and twin's data set
    eval_splits: dict[str, str]  # task -> the file behind its split `validation`
    held_out: list[str]  # data sets
    held_out_skipped: list[str]  # tasks with the training role that are not trained on
    held_out_trained: list[str]  # tasks trained on although held out
    no_train_split: list[str]  # tasks with the training role
    no_eval_split: list[str]  # tasks trained on or with the evaluation role
    no_choices: list[str]  # tasks that EVAL_TASKS takes and that cannot be scored
    not_in_index: list[str]
    examples: dict[
        str, int
    ]  # of the tasks trained on (train) and of the twins (their evaluation split)
    odd: list[OddRows]
    max_choices: int
    max_words: int

    def lines(self) -> list[str]:
        """The summary that a run prints."""
        tasks = [task for task in self.datasets if not self._is_twin(task)]
        labels = {self.datasets[task] for task in tasks}
        source = "data sets from INDEX.json" if self.has_index else "no INDEX.json"
        lines = [f"{self.folder}: {len(tasks)} tasks, {len(labels)} data sets ({source})"]
        for what, names, mixture in (
            ("training", self.train_tasks, TRAIN_MIXTURE),
            ("scoring", self.eval_tasks, SCORE_MIXTURE),
        ):
            if not names:
                lines.append(f"{what}: no task")
                continue
            counted = [self.examples[name] for name in names if name in self.examples]
            examples = f", {sum(counted):,} examples" if counted else ""
            data_sets = sorted({self.datasets[name] for name in names})
            lines.append(
                f"{what}: {len(names)} tasks of {len(data_sets)} data sets{examples} ({mixture}): "
                f"{_few(data_sets, 8)}"
            )
        if self.held_out:
            lines.append(f"held out: {_few(self.held_out, 12)}")
        for names, text in (
            (
                self.held_out_trained,
                "WARNING: held out, yet trained on because TRAIN_TASKS asks for it",
            ),
            (self.held_out_skipped, "held out, so not trained on"),
            (self.no_train_split, "no train split, so not trained on"),
            (self.no_eval_split, f"no evaluation split ({', '.join(data.EVAL_SPLITS)})"),
            (self.no_choices, "no answer choices, so not scored"),
            (self.not_in_index, "not in INDEX.json"),
        ):
            if names:
                lines.append(f"{text}: {len(names)} tasks ({_few(names, 3)})")
        for kind, text in _ODD.items():
            found = [odd for odd in self.odd if odd.kind == kind]
            if found:
                where = _few(
                    [f"{odd.task}/{pathlib.Path(odd.path).name}:{odd.line}" for odd in found], 2
                )
                lines.append(f"odd rows: {sum(odd.count for odd in found):,} {text} ({where})")
        if self.max_words:
            choices = f"; up to {self.max_choices} choices" if self.max_choices else ""
            lines.append(f"longest input: {self.max_words:,} words{choices}")
        return lines

    def _is_twin(self, name: str) -> bool:
        return name.endswith(SCORE_EVAL) and name.removesuffix(SCORE_EVAL) in self.datasets


def _few(names: Sequence[str], most: int) -> str:
    more = f", … {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- reading


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """One line's `inputs`, `targets` and `answer_choices` (a list, empty where there are none)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{where}: not an example: nested too deeply") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {_short(row)}")
    for key in ("inputs", "targets"):
        if key not in row:
            raise InputError(f"{where}: no field {key!r} (found: {', '.join(row) or 'none'})")
        if not isinstance(row[key], str):
            raise InputError(f"{where}: {key!r} must be a string, found {_short(row[key])}")
    choices = row.get("answer_choices")
    choices = [] if choices is None else choices
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(
            f"{where}: 'answer_choices' must be a list of strings, found {_short(choices)}"
        )
    try:
        "".join((row["inputs"], row["targets"], *choices)).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InputError(
            f"{where}: half a surrogate pair, \\u{code:04x}, is no character"
        ) from None
    return {"inputs": row["inputs"], "targets": row["targets"], "answer_choices": choices}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:39] + '…'}"


def _lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Line number, offset and bytes of every line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def scan_file(path: str, limit: int | None = None) -> FileScan:
    """Reads and checks a file (its first `limit` rows); remembered until the file changes.

    Raises InputError with file and line for a row that is malformed.
    """
    stat = os.stat(path)
    return _scan(path, stat.st_mtime_ns, stat.st_size, limit)


@functools.cache
def _scan(path: str, mtime: int, size: int, limit: int | None) -> FileScan:
    del mtime, size  # part of what is remembered
    offsets = array.array("q")
    odd: dict[str, tuple[int, int]] = {}
    max_choices = max_words = 0
    without_choices = []

    def count(kind: str, line: int) -> None:
        number, first = odd.get(kind, (0, line))
        odd[kind] = number + 1, first

    for number, offset, line in _lines(path):
        if limit is not None and len(offsets) >= limit:
            break
        row = parse_row(line, f"{path}:{number}")
        offsets.append(offset)
        max_words = max(max_words, len(row["inputs"].split()))
        if not row["inputs"].strip():
            count("empty_input", number)
        if not row["targets"].strip():
            count("empty_target", number)
        choices = [choice.strip() for choice in row["answer_choices"]]
        max_choices = max(max_choices, len(choices))
        if not choices:
            without_choices.append(number)
            continue
        if row["targets"].strip() not in choices:
            count("target_not_in_choices", number)
        if len(set(choices)) < len(choices):
            count("doubled_choices", number)
    if not offsets:
        raise InputError(f"{path}: no rows in it")
    if max_choices and without_choices:
        odd["no_choices"] = len(without_choices), without_choices[0]
    return FileScan(np.array(offsets, np.int64), odd, max_choices, max_words)


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of some files under one numbering: file after file."""

    paths: Sequence[str]
    scans: Sequence[FileScan]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The number of each file's first row: int64 [files]."""
        return np.cumsum([0, *(scan.rows for scan in self.scans[:-1])])

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """The numbers, inputs, targets [N], choices [N, C] filled up with '', and how many [N]."""
        files = np.searchsorted(self.starts, numbers, side="right") - 1
        in_file = numbers - self.starts[files]
        rows: list[dict[str, Any]] = [{}] * len(numbers)
        order = np.argsort(files, kind="stable")
        for index, members in itertools.groupby(order, key=lambda i: files[i]):
            with open(self.paths[index], "rb") as file:
                for i in members:
                    offset = self.scans[index].offsets[in_file[i]]
                    file.seek(offset)
                    rows[i] = parse_row(file.readline(), f"{self.paths[index]}, byte {offset}")
        counts = np.array([len(row["answer_choices"]) for row in rows], np.int32)
        choices = np.full((len(rows), max(1, counts.max())), b"", object)
        for i, row in enumerate(rows):
            choices[i, : counts[i]] = [choice.encode() for choice in row["answer_choices"]]
        inputs, targets = (
            np.array([row[key].encode() for row in rows], object) for key in ("inputs", "targets")
        )
        return numbers.astype(np.int32), inputs, targets, choices, counts

    def dataset(self, numbers: Any) -> Any:
        """A dataset of row numbers as one of examples."""
        import tensorflow as tf

        @tf.autograph.experimental.do_not_convert
        def read(numbers: tf.Tensor) -> dict[str, tf.Tensor]:
            kinds = {
                "row": tf.int32,
                "inputs": tf.string,
                "targets": tf.string,
                "answer_choices": tf.string,
                "num_choices": tf.int32,
            }
            tensors = tf.numpy_function(self.read, [numbers], list(kinds.values()))
            for key, tensor in zip(kinds, tensors, strict=True):
                tensor.set_shape([None, None] if key == "answer_choices" else [None])
            return dict(zip(kinds, tensors, strict=True))

        return numbers.batch(_READ).map(read).unbatch()


def _row_numbers(start: int, rows: int, shuffle: bool, seed: int | None, shard: Any) -> Any:
    """A dataset of a file's row numbers (a shard of them), shuffled as a whole, anew each epoch."""
    import tensorflow as tf

    first, step = (shard.index, shard.num_shards) if shard else (0, 1)
    if shuffle:
        first %= rows  # no training shard may be empty: a task of one row would end the mixture
    numbers = tf.data.Dataset.range(start + first, start + rows, step)
    return numbers.shuffle(rows, seed=seed) if shuffle else numbers


# --- seqio


@functools.cache
def _classes() -> tuple[Any, Any, Any]:
    """The data source, task and mixture; in a function because `import seqio` takes 8 s."""
    data.import_seqio()
    import seqio
    import tensorflow as tf

    class JsonLinesSource(seqio.DataSource):
        """Files of JSON lines, one a split, read by the row: memory holds the rows' offsets."""

        def __init__(self, paths: Mapping[str, str], eval_examples: int | None):
            super().__init__(splits=paths.keys())
            self.paths = dict(paths)
            self._eval_examples = eval_examples

        @property
        def supports_arbitrary_sharding(self) -> bool:
            """Any number of shards can be cut from the rows."""
            return True

        def list_shards(self, split: str) -> list[str]:
            """The file."""
            return [self.paths[split]]

        def scan(self, split: str) -> FileScan:
            """What is in the file of a split."""
            return scan_file(self.paths[split], None if split == "train" else self._eval_examples)

        def num_input_examples(self, split: str) -> int:
            """Number of rows; reads the file, the first time."""
            return self.scan(split).rows

        def get_dataset(
            self,
            split: str = "train",
            shuffle: bool = True,
            seed: int | None = None,
            shard_info: Any = None,
            **unused: Any,
        ) -> tf.data.Dataset:
            """Elements `row`, `inputs`, `targets`, `answer_choices`, `num_choices` of them."""
            scan = self.scan(split)
            rows = _Rows([self.paths[split]], [scan])
            return rows.dataset(_row_numbers(0, scan.rows, shuffle, seed, shard_info))

    class JsonLinesTask(seqio.Task):
        """A task whose source shuffles: no buffer of encoded examples, no copy of the rows."""

        def get_dataset(
            self, *args: Any, use_cached: bool = False, **kwargs: Any
        ) -> tf.data.Dataset:
            """See seqio.Task; name the arguments beyond `sequence_length` and `split`."""
            if not use_cached:
                kwargs.update(shuffle_buffer_size=1, try_in_mem_cache=False)
            return super().get_dataset(*args, use_cached=use_cached, **kwargs)

    class JsonLinesMixture(seqio.Mixture):
        """A mixture of tasks made here: it mixes row numbers and reads them in one pipeline.

        The examples and rates are those of seqio's Mixture, which builds a pipeline for each task
        (0.1 s each).
        """

        def get_dataset(
            self,
            sequence_length: Mapping[str, int] | None = None,
            split: str = "train",
            use_cached: bool = False,
            shuffle: bool = True,
            seed: int | None = None,
            shard_info: Any = None,
            num_epochs: int | None = None,
            **kwargs: Any,
        ) -> tf.data.Dataset:
            """See seqio.Mixture."""
            tasks = [task for task in self.tasks if split in task.splits]
            if use_cached or kwargs.get("passthrough_features") or not tasks:
                return super().get_dataset(
                    sequence_length,
                    split,
                    use_cached,
                    shuffle,
                    seed,
                    shard_info,
                    num_epochs,
                    **kwargs,
                )
            rows = self._rows(tasks, split)
            numbers = []
            for i, (start, scan) in enumerate(zip(rows.starts, rows.scans, strict=True)):
                task_seed = None if seed is None else seed + i
                part = _row_numbers(int(start), scan.rows, shuffle, task_seed, shard_info)
                numbers.append(part if num_epochs == 1 else part.repeat(num_epochs))
            sample_seed = seed if seed is not None or shuffle else 42
            mixed = self._sample_fn(numbers, [self.get_rate(task) for task in tasks], sample_seed)
            keep = {"inputs", "targets"}
            if kwargs.get("copy_pretokenized"):
                keep |= {"inputs_pretokenized", "targets_pretokenized"}
            ds = self._finish(rows.dataset(mixed), tasks[0], sequence_length, seed)
            return ds.map(lambda example: {key: example[key] for key in keep})

        def every_example(
            self, sequence_length: Mapping[str, int], in_turns: bool
        ) -> tuple[tf.data.Dataset, list[tuple[str, int]]]:
            """Each example of the evaluation splits once, tasks in turns or one after the other.

            With it each task's name and the number that its rows are counted from (in the twins'
            `idx`).
            """
            tasks = [task for task in self.tasks if "validation" in task.splits]
            rows = self._rows(tasks, "validation")
            turn = np.concatenate([np.arange(scan.rows) for scan in rows.scans])
            numbers = np.argsort(turn, kind="stable") if in_turns else np.arange(len(turn))
            ds = rows.dataset(tf.data.Dataset.from_tensor_slices(numbers))
            starts = [
                (task.name, int(start)) for task, start in zip(tasks, rows.starts, strict=True)
            ]
            return self._finish(ds, tasks[0], sequence_length, 0), starts

        def _rows(self, tasks: Sequence[Any], split: str) -> _Rows:
            sources = [task.source for task in tasks]
            return _Rows(
                [source.paths[split] for source in sources],
                [source.scan(split) for source in sources],
            )

        def _finish(self, ds: Any, task: Any, lengths: Any, seed: int | None) -> Any:
            ds = task.preprocess_precache(
                ds, seed=seed
            )  # all tasks of a mixture have the same preprocessors
            ds = task.preprocess_postcache(ds, sequence_length=lengths, seed=seed)
            return ds.prefetch(tf.data.AUTOTUNE)

    return JsonLinesSource, JsonLinesTask, JsonLinesMixture


@functools.cache
def _load_vocabulary(path: str, mtime: int) -> Any:
    del mtime
    seqio = data.import_seqio()
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=100)
    try:
        ids = vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id
    except Exception as error:  # protobuf's and sentencepiece's own kinds
        message = str(error).strip().split("\n")[0]
        raise InputError(f"VOCAB_PATH {path} is not a SentencePiece model: {message}") from None
    if ids != (0, 1, 2):
        raise InputError(f"VOCAB_PATH {path}: expected pad, eos, unk at ids (0, 1, 2), found {ids}")
    return vocabulary


def vocabulary(path: str | os.PathLike[str]) -> Any:
    """The seqio vocabulary of a SentencePiece file with T5's 100 sentinels; one object a file."""
    found = pathlib.Path(path).expanduser().absolute()
    if not found.is_file():
        raise InputError(f"VOCAB_PATH must be a SentencePiece model file; there is none at {path}")
    return _load_vocabulary(str(found), found.stat().st_mtime_ns)


@functools.cache
def _tf_tokenizer(model: bytes) -> Any:
    # seqio makes a tokenizer (32 ms, a copy of the model) for each feature of each task.
    import tensorflow as tf
    import tensorflow_text as tf_text

    with tf.init_scope():
        return tf_text.SentencepieceTokenizer(model=model)


def _preprocessor(function: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """A preprocessor that maps function(example, tokenize), with tokenize(key, text) -> ids."""

    def preprocess(ds: Any, output_features: Mapping[str, Any]) -> Any:
        import tensorflow as tf

        models = {key: feature.vocabulary.sp_model for key, feature in output_features.items()}

        @tf.autograph.experimental.do_not_convert
        def call(example: dict[str, Any]) -> dict[str, Any]:
            return function(example, lambda key, text: _tf_tokenizer(models[key]).tokenize(text))

        return ds.map(call, num_parallel_calls=tf.data.AUTOTUNE)

    return preprocess


def _encode(example: dict[str, Any], tokenize: Callable[..., Any]) -> dict[str, Any]:
    texts = {key: example[key] for key in ("inputs", "targets")}
    encoded = {key: tokenize(key, text) for key, text in texts.items()}
    return encoded | {f"{key}_pretokenized": text for key, text in texts.items()}


def _encode_with_choices(example: dict[str, Any], tokenize: Callable[..., Any]) -> dict[str, Any]:
    choices = example["answer_choices"][: example["num_choices"]]
    return _encode(example, tokenize) | {"answer_choices": choices}


def _repeat_per_choice(example: dict[str, Any], tokenize: Callable[..., Any]) -> dict[str, Any]:
    """P3's form, still stacked; a choice is correct where it reads as the target does."""
    import tensorflow as tf

    number = example["num_choices"]
    choices = example["answer_choices"][:number]
    text = example["inputs"]
    same = {
        # Tokenised once for all choices. TensorFlow 2.21 crashes where rows of no elements are
        # unbatched, as an empty input's would be: a 0 goes before, until _encode_choice.
        "inputs": tf.pad(tokenize("inputs", text), [[1, 0]]),
        "inputs_pretokenized": text,
        "answer_choices": choices,
    }
    row = tf.fill([number], example["row"])
    return {key: tf.repeat(value[None], number, axis=0) for key, value in same.items()} | {
        "targets": choices,
        "idx": tf.stack([row, tf.range(number)], axis=1),
        "is_correct": tf.strings.strip(choices) == tf.strings.strip(example["targets"]),
        "weight": tf.ones([number], tf.float32),
    }


def _encode_choice(example: dict[str, Any], tokenize: Callable[..., Any]) -> dict[str, Any]:
    text = example["targets"]
    return example | {
        "inputs": example["inputs"][1:],
        "targets": tokenize("targets", text),
        "targets_pretokenized": text,
    }


def _with_choices(ds: Any) -> Any:
    return ds.filter(lambda example: example["num_choices"] > 0)  # unbatching none of them crashes


def _unbatch(ds: Any) -> Any:
    return ds.unbatch()


def _append_eos(
    ds: Any, output_features: Mapping[str, Any], sequence_length: Mapping[str, int] | None = None
) -> Any:
    """seqio's append_eos_after_trim, without autograph, which makes it slow to build."""
    import tensorflow as tf

    @tf.autograph.experimental.do_not_convert
    def append(example: dict[str, Any]) -> dict[str, Any]:
        ended = {}
        for key, feature in output_features.items():
            length = (sequence_length or {}).get(key)
            ids = example[key] if length is None else example[key][: length - 1]
            ended[key] = tf.concat([ids, [feature.vocabulary.eos_id]], axis=0)
        return example | ended

    return ds.map(append, num_parallel_calls=tf.data.AUTOTUNE)


def _score_target(
    output: Any, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> Any:
    """The postprocessor of a twin: what `rank_accuracy` needs of a row."""
    if not is_target or example is None:
        return output
    return tuple(int(i) for i in example["idx"]), bool(example["is_correct"])


def rank_accuracy(targets: Sequence[tuple[tuple[int, int], bool]], scores: Any) -> dict[str, float]:
    """Share (0 to 1) of the examples whose best-scored choice is correct, as `accuracy`."""
    scores = scores[0] if isinstance(scores, tuple) else scores
    best: dict[int, tuple[float, bool]] = {}
    for ((example, _), is_correct), score in zip(targets, scores, strict=True):
        if example not in best or score > best[example][0]:
            best[example] = float(score), is_correct
    return {"accuracy": float(np.mean([is_correct for _, is_correct in best.values()]))}


# --- roles


def _find_files(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """task -> split -> path."""
    if not folder.exists():
        raise InputError(f"JSONL_DIR {folder} does not exist")
    if not folder.is_dir():
        raise InputError(
            f"JSONL_DIR {folder} must be a folder of <task>/<split>.jsonl, found a file"
        )
    files: dict[str, dict[str, str]] = {}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        splits = {path.stem: str(path) for path in sorted(entry.glob("*.jsonl")) if path.is_file()}
        if not splits:
            continue
        if not re.fullmatch(r"[\w.:#]+", entry.name):
            raise InputError(f"{entry}: a task's name may hold letters, digits and _ . : # only")
        files[entry.name] = splits
    if not files:
        loose = sorted(path.name for path in folder.glob("*.jsonl"))
        found = f"found {_few(loose, 3)} directly in it" if loose else "found none"
        raise InputError(f"JSONL_DIR {folder} must hold <task>/<split>.jsonl; {found}")
    for task in files:
        if task in (TRAIN_MIXTURE, SCORE_MIXTURE) or task.removesuffix(
            SCORE_EVAL
        ) in files.keys() - {task}:
            raise InputError(
                f"{folder / task}: {task!r} is the name that register gives to what it makes"
            )
    return files


_INDEX_TYPES: dict[str, tuple[type, ...]] = {
    "dataset": (str, type(None)),
    "subset": (str, type(None)),
    "original_task": (bool,),
    "t0_do_train": (str, type(None)),
    "t0_do_eval": (str, type(None)),
    "t0_blacklisted": (bool,),
}


def _read_index(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        index = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(index, dict):
        raise InputError(f"{path}: expected an object of tasks, found {_short(index)}")
    for task, entry in index.items():
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {task!r} must be an object, found {_short(entry)}")
        for key, types in _INDEX_TYPES.items():
            if key in entry and not isinstance(entry[key], types):
                expected = " or ".join(
                    "null" if kind is type(None) else kind.__name__ for kind in types
                )
                raise InputError(
                    f"{path}: {task!r}: {key!r} must be {expected}, found {_short(entry[key])}"
                )
    return index


def _label(task: str, entry: Mapping[str, Any]) -> str:
    """The data set's name in tables: SuperGLUE's are known by their own names."""
    dataset, subset = entry.get("dataset"), entry.get("subset")
    if not dataset:
        return task
    if not subset:
        return dataset
    return subset if dataset == "super_glue" else f"{dataset}_{subset}"


def _patterns(macro: str, value: Any) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise InputError(f"{macro} must be a list of name patterns, found {value!r}")
    return [
        pattern.removesuffix(SCORE_EVAL) if macro == "EVAL_TASKS" else pattern
        for pattern in patterns
    ]


def _match(
    macro: str, patterns: Sequence[str], files: Mapping[str, Any], usable: Callable[[str], str]
) -> list[str]:
    """The tasks that match; each pattern must match one that lacks nothing (`usable` gives '')."""
    matched = set()
    for pattern in patterns:
        names = [task for task in files if fnmatch.fnmatchcase(task, pattern)]
        if not names:
            close = difflib.get_close_matches(pattern.strip("*"), files, n=2)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise InputError(
                f"{macro} pattern {pattern!r} matched none of {len(files)} tasks{hint}"
            )
        lacks = [usable(task) for task in names]
        if all(lacks):
            which = (
                f"names {pattern!r}, which"
                if names == [pattern]
                else f"pattern {pattern!r}: each of {len(names)} tasks"
            )
            raise InputError(f"{macro} {which} has {lacks[0]}")
        matched.update(names)
    return [task for task in files if task in matched]


@dataclasses.dataclass
class _State:
    key: Any = None
    registered: Registered | None = None
    tasks: list[str] = dataclasses.field(default_factory=list)


_state = _State()


def register(
    jsonl_dir: str | os.PathLike[str],
    vocab_path: str | os.PathLike[str],
    train_tasks: Sequence[str] | None = None,
    eval_tasks: Sequence[str] | None = None,
    eval_examples: int | None = None,
    use: Sequence[str] = ("train", "eval"),
) -> Registered:
    """Registers a folder's tasks, twins and mixtures, in place of an earlier call's.

    Args:
      jsonl_dir: the folder (JSONL_DIR).
      vocab_path: a SentencePiece model with pad 0, eos 1, unk 2 (VOCAB_PATH).
      train_tasks: patterns of the tasks to train on (TRAIN_TASKS), instead of those with the
      training role.
      eval_tasks: patterns of the tasks to score (EVAL_TASKS), instead of those with the evaluation
      role.
      eval_examples: at most this many examples, the first, of every split but `train`
      (EVAL_EXAMPLES).
      use: which mixtures' files to read through and check now: 'train', 'eval'. Others are checked
      when used.

    Raises InputError for whatever is wrong with the arguments or in the files, and then changes
    nothing.
    """
    if eval_examples is not None and (not isinstance(eval_examples, int) or eval_examples < 1):
        raise InputError(
            f"EVAL_EXAMPLES must be a positive integer or None, found {eval_examples!r}"
        )
    folder = pathlib.Path(jsonl_dir).expanduser().absolute()
    files = _find_files(folder)
    vocab = vocabulary(vocab_path)
    index_path = folder / "INDEX.json"
    stats = [os.stat(path) for splits in files.values() for path in splits.values()]
    key = (
        str(folder),
        tuple(path for splits in files.values() for path in splits.values()),
        tuple((stat.st_mtime_ns, stat.st_size) for stat in stats),
        index_path.stat().st_mtime_ns if index_path.exists() else None,
        id(vocab),
        repr((train_tasks, eval_tasks, eval_examples, sorted(use))),
    )
    seqio = data.import_seqio()
    names = seqio.TaskRegistry.names()
    if _state.registered and _state.key == key and all(task in names for task in _state.tasks):
        return _state.registered

    eval_paths = {}  # task -> split, path
    for task, splits in files.items():
        split = next((split for split in data.EVAL_SPLITS if split in splits), None)
        if split is not None:
            eval_paths[task] = split, splits[split]
    has_choices = {}
    for task, splits in files.items():
        path = (
            eval_paths[task][1]
            if task in eval_paths
            else splits.get("train", next(iter(splits.values())))
        )
        first = next(_lines(path), None)
        if first is None:
            raise InputError(f"{path}: no rows in it")
        has_choices[task] = bool(parse_row(first[2], f"{path}:{first[0]}")["answer_choices"])

    registered = _plan(
        folder,
        files,
        _read_index(index_path) if index_path.exists() else None,
        has_choices,
        {task: split for task, (split, _) in eval_paths.items()},
        None if train_tasks is None else _patterns("TRAIN_TASKS", train_tasks),
        None if eval_tasks is None else _patterns("EVAL_TASKS", eval_tasks),
    )
    used: list[
        tuple[str | None, str, str, str]
    ] = []  # what its rows are the examples of, task, split, path
    if "train" in use:
        for task in registered.train_tasks:
            used.append((task, task, "train", files[task]["train"]))
            if task in eval_paths:  # for the loss on it
                used.append((None, task, *eval_paths[task]))
    if "eval" in use:
        for twin in registered.eval_tasks:
            task = twin.removesuffix(SCORE_EVAL)
            used.append((twin, task, *eval_paths[task]))
    max_choices = max_words = 0
    for name, task, split, path in used:
        scan = scan_file(path, None if split == "train" else eval_examples)
        if name is not None:
            registered.examples[name] = scan.rows
        max_choices, max_words = max(max_choices, scan.max_choices), max(max_words, scan.max_words)
        for kind, (count, line) in scan.odd.items():
            registered.odd.append(OddRows(task, split, kind, count, path, line))
    registered = dataclasses.replace(registered, max_choices=max_choices, max_words=max_words)

    made = [*files, *(task + SCORE_EVAL for task in files if has_choices[task])]
    taken = [task for task in made if task in names and task not in _state.tasks]
    if taken:
        raise InputError(
            f"{folder / taken[0]}: another seqio task {taken[0]!r} is registered already"
        )
    _remove()
    _state.tasks = made
    for task, splits in files.items():
        paths = dict(splits)
        if task in eval_paths:
            paths["validation"] = eval_paths[task][1]
        _add_task(task, paths, has_choices[task], vocab, eval_examples)
    templates = collections.Counter(registered.datasets[task] for task in files)
    train = [(task, _rate(templates[registered.datasets[task]])) for task in registered.train_tasks]
    _add_mixture(TRAIN_MIXTURE, train, f"{folder} has no task to train on")
    score = [(twin, 1.0) for twin in registered.eval_tasks]
    _add_mixture(
        SCORE_MIXTURE,
        score,
        f"{folder} has no task to score (EVAL_TASKS, or roles in INDEX.json, choose them)",
    )
    _state.key, _state.registered = key, registered
    return registered


def _plan(
    folder: pathlib.Path,
    files: Mapping[str, Mapping[str, str]],
    index: Mapping[str, Mapping[str, Any]] | None,
    has_choices: Mapping[str, bool],
    eval_splits: dict[str, str],
    train_patterns: list[str] | None,
    eval_patterns: list[str] | None,
) -> Registered:
    """Who is trained on, who is scored, who is held out."""
    entries = {task: (index or {}).get(task, {}) for task in files}
    labels = {task: _label(task, entry) for task, entry in entries.items()}

    def may_train(task: str) -> bool:
        entry = entries[task]
        if "t0_do_train" not in entry and "t0_do_eval" not in entry:
            return True
        return entry.get("t0_do_train") == "BASE" and not entry.get("t0_blacklisted", False)

    def may_score(task: str) -> bool:
        entry = entries[task]
        return (
            entry.get("t0_do_eval") == "BASE"
            and entry.get("original_task", True)
            and has_choices[task]
        )

    def lacks_to_score(task: str) -> str:
        if not has_choices[task]:
            return "no answer_choices and cannot be scored"
        return "" if task in eval_splits else f"no evaluation split ({', '.join(data.EVAL_SPLITS)})"

    by_index = [task for task in files if may_score(task)]
    to_score = by_index
    if eval_patterns is not None:
        to_score = _match("EVAL_TASKS", eval_patterns, files, lacks_to_score)
    # EVAL_TASKS may pick a few of the tasks to score; that sets no other free to train on.
    held_out = {labels[task] for task in (*by_index, *to_score)}

    if train_patterns is not None:
        wanted = _match(
            "TRAIN_TASKS",
            train_patterns,
            files,
            lambda task: "" if "train" in files[task] else "no train split",
        )
        skipped = []
    else:
        role = [task for task in files if may_train(task)]
        wanted = [task for task in role if labels[task] not in held_out]
        # A task that is scored is where it belongs; one left out for its data set's sake is news.
        skipped = [task for task in role if labels[task] in held_out and task not in to_score]
    train = [task for task in wanted if "train" in files[task]]
    scored = [task for task in to_score if not lacks_to_score(task)]
    concerned = {*train, *(task for task in to_score if has_choices[task])}
    return Registered(
        folder=str(folder),
        has_index=index is not None,
        train_tasks=train,
        eval_tasks=[task + SCORE_EVAL for task in scored],
        datasets={
            **labels,
            **{task + SCORE_EVAL: label for task, label in labels.items() if has_choices[task]},
        },
        eval_splits=eval_splits,
        held_out=sorted(held_out),
        held_out_skipped=skipped,
        held_out_trained=[task for task in train if labels[task] in held_out],
        no_train_split=[task for task in wanted if "train" not in files[task]],
        no_eval_split=[task for task in files if task in concerned and task not in eval_splits],
        no_choices=[task for task in to_score if not has_choices[task]],
        not_in_index=[task for task in files if index is not None and task not in index],
        examples={},
        odd=[],
        max_choices=0,
        max_words=0,
    )


def _rate(templates: int) -> Callable[[Any], float]:
    """T0's: the number of examples, or beyond 500,000 that, shared by the data set's templates."""

    def rate(task: Any) -> float:
        examples = task.num_input_examples("train")
        return float(examples if examples <= MAX_RATE else MAX_RATE / templates)

    return rate


def _remove() -> None:
    seqio = data.import_seqio()
    for task in _state.tasks:
        seqio.TaskRegistry.remove(task)
    for mixture in (TRAIN_MIXTURE, SCORE_MIXTURE):
        seqio.MixtureRegistry.remove(mixture)
    _state.key, _state.registered, _state.tasks = None, None, []


def _add_task(
    task: str, paths: Mapping[str, str], has_choices: bool, vocab: Any, eval_examples: int | None
) -> None:
    seqio = data.import_seqio()
    source_class, task_class, _ = _classes()
    source = source_class(paths, eval_examples)
    features = {key: seqio.Feature(vocab, add_eos=True) for key in ("inputs", "targets")}
    last = (seqio.CacheDatasetPlaceholder(), _append_eos)
    encode = _preprocessor(_encode_with_choices if has_choices else _encode)
    seqio.TaskRegistry.add(
        task,
        source=source,
        output_features=features,
        preprocessors=(encode, *last),
        task_cls=task_class,
    )
    if not has_choices:
        return
    repeat, encode_choice = _preprocessor(_repeat_per_choice), _preprocessor(_encode_choice)
    seqio.TaskRegistry.add(
        task + SCORE_EVAL,
        source=source,
        output_features=features,
        preprocessors=(_with_choices, repeat, _unbatch, encode_choice, *last),
        postprocess_fn=_score_target,
        metric_fns=[rank_accuracy],
        task_cls=task_class,
    )


def _add_mixture(name: str, tasks: list[tuple[str, Any]], why_not: str) -> None:
    seqio = data.import_seqio()
    data.unregistered.pop(name, None)
    if tasks:
        mixture_class = _classes()[2]
        seqio.MixtureRegistry.add_provider(name, mixture_class(name, tasks))
    else:
        data.unregistered[name] = why_not
