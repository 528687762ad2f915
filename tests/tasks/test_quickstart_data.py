"""The quickstart's sample, generator, pretraining tasks, vocabulary and base model."""

from __future__ import annotations

import collections
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.tasks import pretrain, quickstart
from pemoe_jax.tasks.quickstart import corpus, generate
from pemoe_jax.tasks.quickstart.world import TextRng

FOLDER = pathlib.Path(quickstart.__file__).parent
SAMPLE = FOLDER / "sample"
VOCAB = FOLDER / "vocab.model"
BASE = FOLDER / "base.safetensors"
MIB = 1 << 20


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


@pytest.fixture(scope="module")
def index() -> dict[str, dict[str, Any]]:
    return json.loads((SAMPLE / "INDEX.json").read_text())


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    files = sorted(SAMPLE.glob("*/*.jsonl"))
    return {
        f"{file.parent.name}/{file.stem}": [json.loads(line) for line in file.open()]
        for file in files
    }


@pytest.fixture(scope="module")
def corpus_lines() -> list[str]:
    return list(corpus.lines(0, 20_000))


def is_odd(row: dict[str, Any]) -> bool:
    choices = row["answer_choices"]
    long = len(row["inputs"].split()) > 100
    return (
        row["targets"] not in choices
        or len(set(choices)) < len(choices)
        or len(choices) > 8
        or long
        or not row["inputs"]
    )


def test_generator_reproduces_the_committed_sample(tmp_path: pathlib.Path) -> None:
    generate.write_sample(tmp_path / "sample")
    generated = {
        file.relative_to(tmp_path / "sample"): file.read_text()
        for file in (tmp_path / "sample").rglob("*.json*")
    }
    committed = {file.relative_to(SAMPLE): file.read_text() for file in SAMPLE.rglob("*.json*")}
    assert generated == committed


def test_vocabulary_has_the_words_of_the_corpus(
    corpus_lines: list[str], tmp_path: pathlib.Path
) -> None:
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("".join(f"{line}\n" for line in corpus_lines))
    generate.write_vocabulary(tmp_path / "vocab.model", tmp_path / "corpus.txt")
    generated, committed = (
        sentencepiece.SentencePieceProcessor(str(path))
        for path in (tmp_path / "vocab.model", VOCAB)
    )
    pieces, expected = (
        [model.id_to_piece(i) for i in range(len(model))] for model in (generated, committed)
    )
    assert pieces == expected


def test_another_seed_generates_another_sample(rows: dict[str, Any]) -> None:
    other = generate.sample(1)[0]
    assert other.keys() == rows.keys() and other != rows


def test_sizes() -> None:
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*.json*")) <= 2 * MIB
    assert VOCAB.stat().st_size <= MIB
    assert BASE.stat().st_size <= 16 * MIB


def test_roles_and_task_types(index: dict[str, dict[str, Any]], rows: dict[str, Any]) -> None:
    prompts = collections.Counter(
        (bool(entry["t0_do_eval"]), entry["dataset"]) for entry in index.values()
    )
    assert sum(not held_out for held_out, _ in prompts) >= 12
    assert sum(held_out for held_out, _ in prompts) >= 5
    for (is_held_out, dataset), n in prompts.items():
        assert n >= (3 if is_held_out else 4), dataset
    trained = {entry["task_type"] for entry in index.values() if entry["t0_do_train"]}
    held_out = {entry["task_type"] for entry in index.values() if entry["t0_do_eval"]}
    assert not trained & held_out and len(trained) >= 6 and len(held_out) >= 5
    for task, entry in index.items():
        assert (entry["t0_do_train"], entry["t0_do_eval"]) in (("BASE", ""), ("", "BASE"))
        splits = {name.split("/")[1] for name in rows if name.split("/")[0] == task}
        assert splits == ({"train", "validation"} if entry["t0_do_train"] else {"validation"})
        assert entry["n"] == {split: len(rows[f"{task}/{split}"]) for split in splits}


def test_splits_are_disjoint_and_answers_balanced(rows: dict[str, Any]) -> None:
    for name, lines in rows.items():
        task, split = name.split("/")
        plain = [row for row in lines if not is_odd(row)]
        if split == "train":
            seen = {(row["inputs"], tuple(row["answer_choices"])) for row in plain}
            assert not [
                row
                for row in rows[f"{task}/validation"]
                if (row["inputs"], tuple(row["answer_choices"])) in seen
            ]
        max_count = collections.Counter(row["targets"] for row in plain).most_common(1)[0][1]
        assert max_count <= 0.75 * len(plain), name


def test_sample_contains_every_kind_of_odd_row(rows: dict[str, Any]) -> None:
    lines = [row for part in rows.values() for row in part]
    assert any(row["targets"] not in row["answer_choices"] for row in lines)
    assert any(len(set(row["answer_choices"])) < len(row["answer_choices"]) for row in lines)
    assert max(len(row["answer_choices"]) for row in lines) == 50
    assert any(not row["inputs"] for row in lines)
    assert max(len(row["inputs"].split()) for row in lines) == 2000
    assert sum(map(is_odd, lines)) <= 10


def test_every_word_of_the_sample_is_pretrained_and_one_piece(
    rows: dict[str, Any], corpus_lines: list[str]
) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(str(VOCAB))
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    counts = collections.Counter(word for line in corpus_lines for word in words(line))
    sample_words = {
        word
        for part in rows.values()
        for row in part
        if not is_odd(row)
        for word in words(row["inputs"] + " " + row["targets"])
    }
    assert not {word for word in sample_words if counts[word] < 5}
    assert not {word for word in sample_words if len(pieces.encode(word)) != 1}


def test_no_prompt_is_pretrained(rows: dict[str, Any], corpus_lines: list[str]) -> None:
    lines = set(corpus_lines)
    assert not [row for part in rows.values() for row in part if row["inputs"] in lines]
    # Questions and the like, which every prompt has, are in scraps alone: never in prose.
    rng = TextRng("prose")
    prose = [corpus.prose_line(rng) for _ in range(5_000)]
    cues = re.compile(r"[?:]|\b(answer|choose|pick|decide|complete|options|yes|no)\b")
    assert not [text for text in prose if cues.search(text.lower())]
    prompts = [
        template
        for entry in json.loads((FOLDER / "prompts.json").read_text()).values()
        for template in entry["prompts"].values()
    ]
    assert not [template for template in prompts if not cues.search(template.lower())]


def test_span_corruption_is_invertible() -> None:
    rng = np.random.default_rng(0)
    for length in (2, 3, 7, 40):
        ids = list(range(10, 10 + length))
        inputs, targets = pretrain.span_corruption(ids, rng, sentinels=range(999, 899, -1))
        spans: dict[int, list[int]] = {}
        for token in targets:
            if token > 900:
                spans[token] = []
            else:
                spans[max(spans) if len(spans) == 1 else min(spans)].append(token)
        filled = [t for token in inputs for t in (spans[token] if token > 900 else [token])]
        assert filled == ids
        assert list(spans) == [999 - n for n in range(len(spans))]
        # 40 tokens: round(40 * 0.3) = 12 removed in round(12 / 2) = 6 spans
        if length == 40:
            assert (len(spans), sum(map(len, spans.values()))) == (6, 12)


def test_prefix_lm_splits_at_sentence_ends() -> None:
    rng = np.random.default_rng(0)
    ids = [5, 9, 7, 9, 5, 6, 7, 8, 9]
    splits = collections.Counter()
    for _ in range(400):
        inputs, targets = pretrain.prefix_lm(ids, rng, sentence_ends=[9])
        assert inputs + targets == ids and inputs and targets
        splits[len(inputs)] += 1
    # after the last inner 9 with 0.5 + 0.25 / 2 + 0.25 / 8 = 0.65625 of 400 = 262,
    # after the first with 0.25 / 2 + 0.25 / 8 = 0.15625 = 62
    assert 230 <= splits[4] <= 295
    assert 40 <= splits[2] <= 90
    assert set(splits) == set(range(1, 9))


def test_pretraining_batches_are_reproducible(tmp_path: pathlib.Path) -> None:
    from pemoe_jax.data import feed, seqio_tasks

    path = tmp_path / "text.txt"
    path.write_text("".join(f"{line}\n" for line in corpus.lines(0, 300)))
    pretrain.register(path, VOCAB)
    size = seqio_tasks.vocab_size(pretrain.PREFIX_LM)
    for name in (pretrain.SPAN_CORRUPTION, pretrain.PREFIX_LM):
        first, second = (
            next(feed.train_batches(name, {"inputs": 64, "targets": 64}, 4, seed=3))
            for _ in range(2)
        )
        assert first["encoder_segment_ids"].max() > 1
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])
        sentinels = first["encoder_input_tokens"] >= size - 100
        assert sentinels.any() == (name == pretrain.SPAN_CORRUPTION)
        assert first["decoder_target_tokens"].max() < size


def test_missing_text_is_an_input_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="TEXT_PATH .*no such file"):
        pretrain.register(tmp_path / "nothing.txt", VOCAB)


def test_base_model_fits_the_vocabulary() -> None:
    import sentencepiece

    from pemoe_jax.checkpoints import base_model

    config = base_model.open_base(BASE).config()
    ids = len(sentencepiece.SentencePieceProcessor(str(VOCAB))) + 100
    assert ids <= config["vocab_size"] < ids + 128
