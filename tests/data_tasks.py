"""A folder of JSON-lines tasks and a vocabulary, for the tests of data and tasks."""

import io
import json
import pathlib

import numpy as np

from pemoe_jax.tasks import jsonl

LENGTHS = {"inputs": 32, "targets": 8}
YES_NO = ["yes", "no"]
WORDS = "yes no maybe red green blue is the sky grass sea what colour of a good bad film it was"
WORDS = WORDS.split()


def make_vocab(folder: pathlib.Path, **settings) -> pathlib.Path:
    """Writes a SentencePiece model of a few dozen pieces."""
    import sentencepiece

    settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | settings
    model = io.BytesIO()
    rng = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choice(WORDS, 8)) for _ in range(200)),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def write(folder: pathlib.Path, task: str, split: str, rows: list) -> pathlib.Path:
    """Writes rows, dicts or (inputs, targets[, choices]), to <folder>/<task>/<split>.jsonl."""
    path = folder / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        if not isinstance(row, dict):
            row = dict(zip(("inputs", "targets", "answer_choices"), row, strict=False))
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def register(folder: pathlib.Path) -> tuple:
    """Registers tasks a and b for training, and plain and scored, with choices, for evaluation.

    Returns:
      The return value of `jsonl.register`, and the rows of scored.
    """
    rng = np.random.default_rng(0)

    def words(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    for task, num_train in (("a", 40), ("b", 25)):
        for split, count in (("train", num_train), ("validation", 5)):
            rows = [(f"{task} {words(1, 12)}", words(1, 4)) for _ in range(count)]
            write(folder, task, split, rows)
    rows = []
    for i in range(23):
        choices = [words(1, 3 if i % 2 else 9) for _ in range(2 + i % 5)]
        rows.append((words(1, 60), choices[i % len(choices)], choices))
    write(folder, "scored", "validation", rows)
    write(folder, "plain", "validation", [("sky", "yes", YES_NO)])
    summary = jsonl.register(
        folder,
        make_vocab(folder),
        train_tasks=["a", "b"],
        eval_tasks=["plain", "scored"],
    )
    return summary, rows


_added: set[str] = set()  # names of `add_rows`


def remove_rows() -> None:
    """Removes the tasks that `add_rows` added."""
    if _added:
        import seqio

        for name in _added:
            seqio.TaskRegistry.remove(name)
        _added.clear()


def add_rows(
    name: str, rows: list[dict], split: str = "validation", train: list[dict] | None = None
) -> None:
    """Adds (or replaces) a user's own seqio task of rows of token ids, read as they are.

    Its vocabulary is that of the registered task `a`. The split `train` is optional.
    """
    import seqio
    import tensorflow as tf

    specs = {"inputs": ([None], tf.int32), "targets": ([None], tf.int32)}
    specs |= {"idx": ([2], tf.int32), "is_correct": ([], tf.bool)} if "idx" in rows[0] else {}
    signature = {key: tf.TensorSpec(*spec) for key, spec in specs.items()}
    splits = {split: rows} | ({} if train is None else {"train": train})
    seqio.TaskRegistry.remove(name)
    _added.add(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_generator(
                lambda: iter(splits[split]), output_signature=signature
            ),
            splits=splits,
        ),
        output_features=seqio.TaskRegistry.get("a").output_features,
        preprocessors=[],
    )
