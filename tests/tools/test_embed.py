"""Tables of sentence embeddings, and runs whose routers read them."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jsonl_folder import write_folder, write_vocabulary
from test_train import CONFIG, DIMENSIONS, data_flags, read_metrics, train_flags

from pemoe_jax import evaluate, infer, train
from pemoe_jax.analysis.routing import probe as probe_lib
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints import models, runs
from pemoe_jax.core import cross_entropy, decoding, network, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import batching, choices, feed, sentence_table, sentences, seqio_tasks
from pemoe_jax.tools import convert, embed, encoders

ENCODER = {"name": "some", "dim": 3, "fingerprint": "f0"}


# --- the table ---


def ids_of(number: int) -> np.ndarray:
    return np.array([3 + number % 50, 3 + number // 50, 1], np.int32)


def writer(folder: pathlib.Path, **changes) -> sentence_table.TableWriter:
    settings = {"encoder": ENCODER, "dtype": "float32", "vocabulary": "v", "length": 8, **changes}
    return sentence_table.TableWriter(folder, *settings.values())


def vectors_of(numbers) -> np.ndarray:
    return np.array([[n, n / 7, -n] for n in numbers], np.float32)


def add(folder: pathlib.Path, numbers, finish: bool = True, **changes) -> None:
    one = writer(folder, **changes)
    new = [n for n in numbers if sentence_table.input_key(ids_of(n)) not in one.known_keys]
    for part in np.array_split(new, 3) if new else []:
        one.add([sentence_table.input_key(ids_of(n)) for n in part], vectors_of(part))
    if finish:
        one.finish()
    one.close()


def check(folder: pathlib.Path, numbers) -> None:
    """Each is found, in another order, and gives its own vector; others are not found."""
    table = sentence_table.SentenceTable(folder)
    numbers = np.random.default_rng(0).permutation(list(numbers))
    assert len(table) == len(numbers)
    found = table.vectors(table.rows(map(ids_of, numbers)))
    np.testing.assert_array_equal(np.stack(found), vectors_of(numbers))
    assert table.rows([ids_of(2000), ids_of(numbers[0])[:-1]]).tolist() == [-1, -1]


def test_table_round_trip_over_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sentence_table, "_PART_ROWS", 100)
    add(tmp_path / "table", range(700))
    assert len(list((tmp_path / "table" / "parts").glob("*.vectors.npy"))) > 2
    check(tmp_path / "table", range(700))
    about = json.loads((tmp_path / "table" / "about.json").read_text())
    assert (about["inputs"], about["encoder"], about["lengths"]) == (700, ENCODER, [8])


def test_keys():
    """blake2b of the int32 ids, padding left away: hashlib's own, by hand, of [5, 7, 1]."""
    import hashlib

    raw = bytes([5, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0])
    want = hashlib.blake2b(raw, digest_size=16).digest()
    for ids in ([5, 7, 1], [5, 7, 1, 0, 0], np.array([5, 7, 1], np.int64)):
        assert sentence_table.input_key(ids) == want
    others = [[7, 5, 1], [5, 7], [5, 7, 1, 1], []]
    assert len({want, *map(sentence_table.input_key, others)}) == 5


def test_keys_that_end_in_zeros_or_begin_high_are_found(tmp_path, monkeypatch):
    """numpy drops zeros at the end of bytes, and might take bytes from 128 on for negative."""
    names = [bytes([n]) * 15 + b"\0" for n in (0, 1, 127, 128, 255)]
    names += [b"\xff" * 14 + b"\0\0", b"\xff" * 15 + b"\1"]
    monkeypatch.setattr(sentence_table, "key", lambda ids: names[int(ids[0])])
    numbers = range(len(names))
    one = writer(tmp_path)
    one.add(names, vectors_of(numbers))
    one.finish()
    one.close()
    table = sentence_table.SentenceTable(tmp_path)
    found = table.vectors(table.rows([[n] for n in numbers]))
    np.testing.assert_array_equal(np.stack(found), vectors_of(numbers))
    again = writer(tmp_path)
    assert again.known_keys == set(names)
    again.close()


def test_later_additions_leave_what_is_there(tmp_path):
    add(tmp_path, range(50))
    before = sentence_table.SentenceTable(tmp_path)
    old = (tmp_path / "parts" / "00000.vectors.npy").stat()
    add(tmp_path, range(30, 90), length=16)
    check(tmp_path, range(90))
    assert (tmp_path / "parts" / "00000.vectors.npy").stat().st_mtime_ns == old.st_mtime_ns
    # who has it open keeps what he sees
    assert len(before) == 50 and before.rows([ids_of(49), ids_of(60)])[0] >= 0
    assert sentence_table.SentenceTable(tmp_path).lengths == [8, 16]
    assert len(list(tmp_path.glob("keys.*.npy"))) == 1
    add(tmp_path, range(90))  # nothing new
    check(tmp_path, range(90))


def test_a_table_that_is_being_made_cannot_be_read_and_what_is_made_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sentence_table, "_PART_ROWS", 10)
    add(tmp_path, range(40), finish=False)
    with pytest.raises(InputError, match=r"is not finished: run python -m pemoe_jax\.embed"):
        sentence_table.SentenceTable(tmp_path)
    one = writer(tmp_path)
    assert len(one.known_keys) == 40
    one.close()
    add(tmp_path, range(60))
    check(tmp_path, range(60))
    add(tmp_path, range(60, 90), finish=False)  # a finished one stays readable
    check(tmp_path, range(60))


def test_float16_is_kept_as_it_is_and_what_does_not_fit_is_refused(tmp_path):
    add(tmp_path, range(5), dtype="float16")
    table = sentence_table.SentenceTable(tmp_path)
    found = table.vectors(table.rows([ids_of(3)]))[0]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, vectors_of([3])[0].astype(np.float16))
    one = writer(tmp_path, dtype="float16")
    for vectors, says in (
        (np.full((1, 3), 1e6), "not finite in float16"),
        (np.full((1, 3), np.nan), "not finite"),
        (np.ones((1, 4)), r"shape \(1, 4\), expected \(1, 3\)"),
    ):
        with pytest.raises(InputError, match=says):
            one.add([b"x" * 16], vectors)
    with pytest.raises(InputError, match="another process is adding"):
        writer(tmp_path, dtype="float16")
    one.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder": {**ENCODER, "fingerprint": "f1"}}, "some, fingerprint f0, size 3: expected"),
        ({"encoder": {**ENCODER, "dim": 4}}, "size 4"),
        ({"dtype": "float16"}, "EMBEDDING_DTYPE 'float32'"),
        ({"dtype": "int8"}, "EMBEDDING_DTYPE: expected one of"),
        ({"vocabulary": "w"}, "vocabulary 'v': expected the same to add to it, found 'w'"),
    ],
)
def test_what_does_not_fit_a_table_is_not_added(tmp_path, changes, says):
    add(tmp_path, range(5))
    with pytest.raises(InputError, match=says):
        add(tmp_path, range(6), **changes)
    check(tmp_path, range(5))


def test_damaged_tables_and_other_folders(tmp_path):
    for path, says in ((tmp_path / "no", "nothing there"), (tmp_path, "no about.json"), (7, "7")):
        with pytest.raises(InputError, match=says):
            sentence_table.SentenceTable(path)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").touch()
    with pytest.raises(InputError, match="expected a new folder or a table"):
        writer(tmp_path / "others")
    empty = writer(tmp_path / "empty")
    with pytest.raises(InputError, match="no inputs were found"):
        empty.finish()
    empty.close()
    table = tmp_path / "table"
    for damage, says in (
        (lambda: os.truncate(table / "parts" / "00000.vectors.npy", 140), "00000.vectors.npy: dam"),
        (lambda: (table / "parts" / "00000.vectors.npy").unlink(), "00000.vectors.npy: no such"),
        (lambda: (table / "about.json").write_text("{"), "about.json: expected JSON"),
        (lambda: (table / "about.json").write_text("[]"), "about.json: expected"),
        (lambda: np.save(table / "rows.1.npy", np.arange(4)), "found 5, 4 and"),
    ):
        add(table, range(5))
        damage()
        with pytest.raises(InputError, match=says):
            sentence_table.SentenceTable(table)
        shutil.rmtree(table)


def test_encoders_without_a_fingerprint_are_told_apart_by_what_they_give():
    probe = {"name": "a", "dim": 4, "probe": [1.0, -2.0, 0.01]}
    assert sentence_table.is_same_encoder(probe, {**probe, "probe": [1.01, -2.02, 0.0]})
    for other in (
        {**probe, "probe": [1.2, -2.0, 0.01]},
        {**probe, "probe": [1.0, -2.0]},
        {**probe, "name": "b"},
        {"name": "a", "dim": 4},
    ):
        assert not sentence_table.is_same_encoder(probe, other)
    with pytest.raises(InputError, match="which gives other vectors now"):
        sentence_table.check_same_encoder("run", probe, {**probe, "probe": [0.0, 0.0, 0.0]})


# --- encoders ---


def tokens_of(lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 200, n).astype(np.int32) for n in lengths]


@functools.cache
def base_params() -> dict:
    return network.init_params(network.Transformer(CONFIG), 0, params_lib.is_base)


@jax.jit
def encoded(params: dict, ids: np.ndarray) -> jax.Array:
    model = network.Transformer(CONFIG)
    return model.apply({"params": params}, ids, enable_dropout=False, method=model.encode)


def mean_by_hand(ids: np.ndarray) -> np.ndarray:
    """Of an input alone, in a row as long as it is."""
    return np.asarray(encoded(base_params(), ids[None]), np.float64)[0].mean(axis=0)


@pytest.fixture(scope="module")
def pooled() -> encoders.MeanPooledEncoder:
    return encoders.MeanPooledEncoder(network.Transformer(CONFIG), None)


def test_mean_pooling_is_the_mean_over_real_tokens(pooled):
    """Each input alone, as long as it is, and numpy's mean over all its tokens."""
    inputs = tokens_of([1, 3, 32, 33, 70, 3, 3, 3])
    found = pooled.encode([encoders.EncoderInput(ids, None) for ids in inputs], 2)
    assert found.shape == (8, CONFIG.emb_dim) and found.dtype == np.float32
    for ids, row in zip(inputs, found, strict=True):
        want = mean_by_hand(ids)
        np.testing.assert_allclose(row, want, atol=1e-6 * np.abs(want).max())
    assert len({row.tobytes() for row in found}) == 8


def test_of_no_token_the_mean_is_zero(pooled):
    found = pooled.encode([encoders.EncoderInput(np.zeros(0, np.int32), None)], 2)
    np.testing.assert_array_equal(found, np.zeros((1, CONFIG.emb_dim)))


def test_batches_are_of_few_shapes_and_hold_each_input_once():
    lengths = np.random.default_rng(0).integers(1, 1025, 3000)
    inputs = tokens_of(lengths)
    seen, shapes, area = [], set(), 0
    for tokens, numbers in batching.encoder_batches(inputs, 32, multiple_of=3):
        shapes.add(tokens.shape)
        area += tokens.size
        seen += numbers
        for row, number in zip(tokens, numbers, strict=False):
            np.testing.assert_array_equal(row[: len(inputs[number])], inputs[number])
        assert not tokens[len(numbers) :].any() and len(tokens) % 3 == 0
        assert tokens.sum() == sum(inputs[number].sum() for number in numbers)
    assert sorted(seen) == list(range(3000))
    assert len(shapes) == len({width for _, width in shapes}) <= 11
    assert lengths.sum() > 0.75 * area  # padding
    assert (33, 1024) in shapes and (42, 384) in shapes  # 32 · 512 / 384 = 42.7


def letters(texts: list[str]) -> list[list[float]]:
    """How often each text has some letters: an encoder of no use but to be told from others."""
    assert all(isinstance(text, str) for text in texts)
    return [[text.count(letter) + 0.5 for letter in "aeioscw"] for text in texts]


def test_functions_of_texts_are_encoders():
    texts = ["a", "see the grass", "snow", "ice is cool", "see"]
    inputs = [encoders.EncoderInput(np.arange(len(text)), text) for text in texts]
    for given in (letters, f"{__name__}.letters", f"{__name__}:letters"):
        encoder = encoders.resolve_encoder(given)
        np.testing.assert_array_equal(encoder.encode(inputs, 2), np.float32(letters(texts)))
        described = encoder.describe()
        assert (described["name"], described["dim"]) == (f"{__name__}.letters", 7)
        assert len(described["probe"]) == 7

    class Named:
        name, fingerprint = "mine", "v1"

        def __call__(self, texts):
            return np.ones((len(texts), 2))

    assert encoders.resolve_encoder(Named()).describe() == {
        "name": "mine",
        "dim": 2,
        "fingerprint": "v1",
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no.such.module", "expected 'module.function'"),
        ("letters", "expected 'module.function'"),
        (3, "or a function of texts, found 3"),
        (lambda texts: np.ones(3), r"shape \(3,\) for 1 texts"),
        (lambda texts: np.ones((2, 3)), r"shape \(2, 3\) for 1 texts"),
        (lambda texts: ["a"], "gives numbers"),
        (lambda: 3, "expected a function of a list of texts"),
    ],
)
def test_what_is_no_encoder(given, says):
    with pytest.raises(InputError, match=says):
        encoders.resolve_encoder(given).describe()


# --- runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Tasks, a vocabulary, two bases, and the table of the first of them over all tasks."""
    root = tmp_path_factory.mktemp("embed")
    write_folder(root / "tasks")
    write_vocabulary(root / "vocab.model")
    for name, seed in (("base", 0), ("other", 1)):
        base = network.init_params(network.Transformer(CONFIG), seed, params_lib.is_base)
        base_lib.save_base(root / f"{name}.safetensors", base, CONFIG.as_dict())
    assert embed.main(embed_flags(root, root / "table")) == 0
    return root


def embed_flags(folder: pathlib.Path, output: pathlib.Path, **macros) -> list[str]:
    settings = {
        "SENTENCE_EMBEDDINGS": output,
        "INITIAL_CHECKPOINT_PATH": folder / "base.safetensors",
        "MIXTURE_OR_TASK_NAME": "['jsonl_train', 'jsonl_score_eval', 'check_1', 'check_2']",
        "VOCAB_SIZE": 256,
        **macros,
    }
    return [
        "--gin_file=models/t5_1_1_tiny.gin",
        "--gin_file=runs/embed.gin",
        *(f"--gin.network.T5Config.{name}={value}" for name, value in DIMENSIONS.items()),
        *data_flags(folder),
        *(f"--gin.{name}={value}" for name, value in settings.items()),
    ]


def sentence_flags(
    folder: pathlib.Path, method: str, model_dir: pathlib.Path, **macros
) -> list[str]:
    settings = {"SENTENCE_EMBEDDINGS": folder / "table", "PACK": False, **macros}
    flags = train_flags(folder, method, model_dir, **settings)
    flags.insert(2, "--gin_file=routing/sentence.gin")
    return [*flags, "--gin.NUM_EXPERTS=3"]


def run_flags(folder: pathlib.Path, command: str, path, output: pathlib.Path, **macros):
    settings = {
        "CHECKPOINT_PATH": path,
        "EVAL_OUTPUT_DIR": output,
        "SENTENCE_EMBEDDINGS": folder / "table",
        **macros,
    }
    return [
        f"--gin_file=runs/{command}.gin",
        *data_flags(folder),
        *(f"--gin.{name}={value}" for name, value in settings.items()),
    ]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("runs")
    for method in ("mov", "molora"):
        flags = sentence_flags(folder, method, root / method, EVAL_PERIOD=6)
        assert train.main(flags) == 0
    return {method: root / method for method in ("mov", "molora")}


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_the_table_holds_each_input_once(folder):
    lines = []
    for path in (folder / "tasks").glob("*/*.jsonl"):
        lines += [json.loads(line)["inputs"] for line in path.read_text().splitlines()]
    table = sentence_table.SentenceTable(folder / "table")
    assert len(table) == len(set(lines)) > 10
    vocabulary = seqio_tasks.get_mixture_or_task("jsonl_train").output_features["inputs"].vocabulary
    for text in sorted(set(lines))[::6]:
        ids = np.array([*vocabulary.encode(text), 1], np.int32)
        (row,) = table.vectors(table.rows([ids]))
        want = mean_by_hand(ids)
        np.testing.assert_allclose(row, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    assert table.encoder["fingerprint"] == params_lib.fingerprint(base_params())


def test_cut_inputs_are_those_that_runs_read(folder, tmp_path):
    """A table of short inputs has all that training, its evaluation, scoring and decoding ask."""
    short = {"TASK_FEATURE_LENGTHS": "{'inputs': 5, 'targets': 8}"}
    flags = embed_flags(folder, tmp_path / "table", **short)
    assert embed.main(flags) == 0
    source = sentences.SentenceSource({}, 5, sentence_table.SentenceTable(tmp_path / "table"))
    lengths = {"inputs": 5, "targets": 8}
    settings = {"pack": False, "sentences": source}
    batches = feed.train_batches("jsonl_train", lengths, 8, num_epochs=1, **settings)
    batches = [*batches, *feed.eval_batches("jsonl_train", lengths, 8, **settings)]
    assert len(batches) > 6
    for batch in batches:
        assert batch["encoder_input_tokens"].shape == (8, 5)
        assert batch["sentence_embeddings"].dtype == np.float32
    groups = choices.load_choice_groups("jsonl_score_eval", lengths)
    assert any(group.input_truncated for group in groups)
    assert all(group.sentence_embedding is not None for group in source.attach_to(groups))


def test_the_feed_gives_each_row_its_inputs_embedding(folder, trained):
    table = sentence_table.SentenceTable(folder / "table")
    source = sentences.SentenceSource(table.encoder, 32, table)
    lengths = {"inputs": 32, "targets": 8}
    for batch in (
        next(feed.train_batches("jsonl_train", lengths, 8, pack=False, sentences=source)),
        *feed.eval_batches("jsonl_train", lengths, 8, sentences=source),
    ):
        for ids, vector in zip(
            batch["encoder_input_tokens"], batch["sentence_embeddings"], strict=True
        ):
            if not ids.any():
                assert not vector.any()
                continue
            (want,) = table.vectors(table.rows([ids]))
            np.testing.assert_array_equal(vector, want.astype(np.float32))
    tokens = batch["encoder_input_tokens"]  # of 18 examples the last batch has 2
    assert tokens.shape[0] == 8 and tokens[1].any() and not tokens[2:].any()
    plain = next(feed.train_batches("jsonl_train", lengths, 8, pack=False))
    assert "sentence_embeddings" not in plain


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_training_moves_routers_and_records_the_encoder(folder, trained, method):
    losses = read_metrics(trained[method])
    assert losses[12] < losses[1] - 0.02
    assert set(read_metrics(trained[method], "eval/loss")) == {6, 12}
    opened = models.open_model(str(trained[method]))
    table = sentence_table.SentenceTable(folder / "table")
    assert opened.record.sentence_encoder == table.encoder
    assert opened.record.config["sentence_dim"] == CONFIG.emb_dim
    after = params_lib.flatten(opened.load())
    start = params_lib.flatten(network.init_params(opened.model, 0, params_lib.is_adapter))
    kernels = [path for path in start if path.endswith("router/kernel")]
    assert kernels and all(start[path].shape == (CONFIG.emb_dim, 3) for path in kernels)
    moved = [not np.array_equal(start[path], after[path]) for path in kernels]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_probabilities_are_of_examples_and_not_of_tokens(folder, trained, method):
    opened = models.open_model(str(trained[method]))
    params = opened.load()
    groups = choices.load_choice_groups("jsonl_score_eval", {"inputs": 32, "targets": 8})
    source = sentences.open_for_models([opened], str(folder / "table"), "jsonl_score_eval", 32)
    batch, members = next(batching.score_batches(source.attach_to(groups), 8))
    batch = {k: v[:, 0] if v.ndim == 3 else v for k, v in batch.items()}
    _, told = steps.apply_model(opened.model, params, batch, None, mutable=["intermediates"])
    sites = params_lib.flatten(told["intermediates"])
    assert any(path.startswith("decoder") for path in sites)
    for (probs,) in sites.values():
        probs = np.asarray(probs)[: len(members)]
        assert probs.shape[-1] == 3
        np.testing.assert_array_equal(probs, np.broadcast_to(probs[:, :1], probs.shape))
        assert np.ptp(probs[:, 0], axis=0).max() > 1e-3
    zeros = probe_lib.init_totals(opened.model, len(members))
    rows = len(batch["encoder_input_tokens"])
    by_example = np.minimum(np.arange(rows), len(members) - 1)  # rows below are padding
    sums = probe_lib.make_probe(opened.model)(params, batch, by_example, zeros)
    for site, probs in sums.probs.items():
        np.testing.assert_allclose(
            np.asarray(probs / sums.num_tokens[probe_lib.token_stack(site)][:, None]),
            np.asarray(sites[f"{site}_adapter/probs"][0])[: len(members), 0],
            atol=1e-6,
        )


def padded(ids: list[int], length: int) -> np.ndarray:
    """[1, length]."""
    assert len(ids) <= length
    return np.array([[*ids, *[0] * (length - len(ids))]], np.int32)


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_choices_scored_together_are_as_scored_one_by_one(folder, trained, method, tmp_path):
    assert evaluate.main(run_flags(folder, "evaluate", trained[method], tmp_path)) == 0
    opened = models.open_model(str(trained[method]))
    params = opened.load()
    table = sentence_table.SentenceTable(folder / "table")
    vocabulary = seqio_tasks.get_mixture_or_task("check_1").output_features["inputs"].vocabulary
    lines = (tmp_path / "predictions" / method / "check_1_score_eval.jsonl").read_text()
    losses = jax.jit(
        lambda batch: cross_entropy.token_losses(
            steps.apply_model(opened.model, params, batch, None), batch["decoder_target_tokens"]
        )[0]
    )
    for line in list(map(json.loads, lines.splitlines()))[:3]:
        ids = padded([*vocabulary.encode(line["inputs"]), 1], 32)
        vector = np.float32(table.vectors(table.rows(ids)))
        for choice, score in zip(line["answer_choices"], line["scores"], strict=True):
            target = padded([*vocabulary.encode(choice), 1], 8)
            batch = {
                "encoder_input_tokens": ids,
                "decoder_target_tokens": target,
                "decoder_input_tokens": np.pad(target[:, :-1], ((0, 0), (1, 0))),
                "sentence_embeddings": vector,
            }
            nll = losses(batch) * (target > 0)
            assert score == pytest.approx(-float(nll.sum()), abs=2e-5)


def test_embeddings_change_what_is_scored(folder, trained, tmp_path):
    """With each input's embedding in another's place, and louder."""
    table = sentence_table.SentenceTable(folder / "table")
    names = [table._keys[i : i + 1].tobytes() for i in range(len(table))]
    swapped = sentence_table.TableWriter(
        tmp_path / "swapped", table.encoder, "float32", table.vocabulary, 32
    )
    swapped.add(names, 3 * np.float32(table.vectors(np.roll(table._rows, 1))))
    swapped.finish()
    swapped.close()
    said = {}
    for path in (folder / "table", tmp_path / "swapped"):
        macros = {"SENTENCE_EMBEDDINGS": path}
        flags = run_flags(folder, "evaluate", trained["molora"], tmp_path / "out", **macros)
        assert evaluate.main(flags) == 0
        lines = (tmp_path / "out/predictions/molora/check_1_score_eval.jsonl").read_text()
        said[path] = [json.loads(line)["scores"] for line in lines.splitlines()]
    one, other = said.values()
    assert np.abs(np.array(one) - np.array(other)).max() > 1e-3


def test_decoding_gives_each_example_its_own_embedding(folder, trained, tmp_path, monkeypatch):
    """Whatever batches and buckets are made of them; rows that fill a batch up repeat the last."""
    table = sentence_table.SentenceTable(folder / "table")
    seen = []

    def record(model, params, tokens, length, eos_id, vectors):
        for ids, vector in zip(np.asarray(tokens), np.asarray(vectors), strict=True):
            (want,) = table.vectors(table.rows([ids]))
            np.testing.assert_array_equal(vector, want.astype(np.float32))
            seen.append(ids.tobytes())
        return np.ones((len(tokens), length), np.int32)

    monkeypatch.setattr(decoding, "greedy_decode", record)
    few = {"EVAL_EXAMPLES": 3}
    assert infer.main(run_flags(folder, "infer", trained["mov"], tmp_path, **few)) == 0
    assert len(set(seen)) == 9 and len(seen) == 12  # of three tasks, in two batches of six


def test_decoding_with_embeddings_goes_through(folder, trained, tmp_path):
    one = {"MIXTURE_OR_TASK_NAME": "free_1"}
    assert infer.main(run_flags(folder, "infer", trained["molora"], tmp_path, **one)) == 0
    lines = (tmp_path / "predictions" / "molora" / "free_1.jsonl").read_text()
    assert len(lines.splitlines()) == 6


def test_a_feed_that_is_entered_again_gives_the_same_embeddings(folder, trained):
    table = sentence_table.SentenceTable(folder / "table")
    source = sentences.SentenceSource(table.encoder, 32, table)
    lengths = {"inputs": 32, "targets": 8}
    settings = {"pack": False, "sentences": source}
    whole = feed.train_batches("jsonl_train", lengths, 8, **settings)
    first = next(whole)["sentence_embeddings"]
    again = feed.train_batches("jsonl_train", lengths, 8, start=whole.position, **settings)
    for _ in range(3):
        one, other = next(whole), next(again)
        assert not np.array_equal(one["sentence_embeddings"], first)
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])


def test_conversion_to_an_adapter_keeps_the_encoder(folder, trained, tmp_path):
    assert convert.main(["adapter", str(trained["mov"]), str(tmp_path / "adapter")]) == 0
    opened = models.open_model(str(tmp_path / "adapter"))
    assert opened.record == models.open_model(str(trained["mov"])).record
    assert opened.record.sentence_encoder is not None


def test_records_without_the_field_open(trained):
    record = models.open_model(str(trained["mov"])).record
    fields = dataclasses.asdict(record)
    del fields["sentence_encoder"]
    assert runs.parse_record(fields, "x").sentence_encoder is None
    with pytest.raises(InputError, match="sentence_encoder: expected an object, found 3"):
        runs.parse_record({**fields, "sentence_encoder": 3}, "x")


def test_what_training_refuses_before_the_base_is_read(folder, tmp_path, capsys):
    missing = {"INITIAL_CHECKPOINT_PATH": tmp_path / "no_such_base"}
    flags = sentence_flags(folder, "mov", tmp_path, **missing)
    assert train.main([*flags, "--gin.PACK=True"]) == 1
    assert "PACK=True puts several examples in a row" in one_line(capsys)
    assert train.main([*flags, "--gin.SENTENCE_EMBEDDINGS=None"]) == 1
    assert "expected SENTENCE_EMBEDDINGS to name a table" in one_line(capsys)
    assert train.main([*flags, f"--gin.SENTENCE_EMBEDDINGS={tmp_path / 'no'}"]) == 1
    assert "nothing there" in one_line(capsys)
    assert train.main([flag for flag in flags if "sentence.gin" not in flag]) == 1
    assert "no router reads sentence embeddings" in one_line(capsys)
    plain = [flag for flag in sentence_flags(folder, "ia3", tmp_path) if "NUM_EXPERTS" not in flag]
    assert train.main(plain) == 1
    assert "no router reads sentence embeddings" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_another_encoders_table_is_refused(folder, trained, tmp_path, capsys):
    other = {"INITIAL_CHECKPOINT_PATH": folder / "other.safetensors"}
    assert embed.main(embed_flags(folder, tmp_path / "table", **other)) == 0
    assert embed.main(embed_flags(folder, folder / "table", **other)) == 1
    assert "is of the encoder mean_pooled, fingerprint" in one_line(capsys)
    macros = {"SENTENCE_EMBEDDINGS": tmp_path / "table"}
    for command, main in (("evaluate", evaluate.main), ("infer", infer.main)):
        assert main(run_flags(folder, command, trained["mov"], tmp_path / "out", **macros)) == 1
        error = one_line(capsys)
        assert str(trained["mov"]) in error and "was trained with sentence embeddings of" in error
    assert train.main(sentence_flags(folder, "mov", trained["mov"], **macros, TRAIN_STEPS=20)) == 1
    assert "was trained with sentence embeddings of" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_tables_for_models_that_read_none_and_none_for_models_that_do(
    folder, trained, tmp_path, capsys
):
    base = folder / "base.safetensors"
    assert evaluate.main(run_flags(folder, "evaluate", base, tmp_path / "out")) == 1
    assert "no router of" in one_line(capsys)
    none = {"SENTENCE_EMBEDDINGS": None}
    assert evaluate.main(run_flags(folder, "evaluate", trained["mov"], tmp_path / "o", **none)) == 1
    assert "expected SENTENCE_EMBEDDINGS to name a table" in one_line(capsys)
    # beside one that reads them, a base is scored as it is without
    both = f"['{base}', '{trained['mov']}']"
    assert evaluate.main(run_flags(folder, "evaluate", both, tmp_path / "both")) == 0
    assert evaluate.main(run_flags(folder, "evaluate", base, tmp_path / "alone", **none)) == 0
    name = "predictions/base/check_1_score_eval.jsonl"
    assert (tmp_path / "both" / name).read_text() == (tmp_path / "alone" / name).read_text()


def test_missing_inputs_are_named_and_can_be_added(folder, trained, tmp_path, capsys):
    table = tmp_path / "table"
    partly = {"MIXTURE_OR_TASK_NAME": "jsonl_train", "EMBED_SPLITS": "train"}
    assert embed.main(embed_flags(folder, table, **partly)) == 0
    macros = {"SENTENCE_EMBEDDINGS": table}
    flags = run_flags(folder, "evaluate", trained["mov"], tmp_path / "out", **macros)
    assert evaluate.main(flags) == 1
    error = one_line(capsys)
    assert f"{table} lacks an input of 'check_1_score_eval': 'is the " in error
    assert (
        "pemoe_jax.tools.embed with --gin.MIXTURE_OR_TASK_NAME=check_1_score_eval adds it" in error
    )
    shorter = "--gin.TASK_FEATURE_LENGTHS={'inputs': 5, 'targets': 8}"
    assert evaluate.main([*flags, shorter]) == 1
    assert "(inputs are cut to 5 tokens here, to 32 in the table)" in one_line(capsys)
    assert embed.main(embed_flags(folder, table, MIXTURE_OR_TASK_NAME="jsonl_score_eval")) == 0
    assert evaluate.main(flags) == 0
    only = {"MIXTURE_OR_TASK_NAME": "colour_1"}
    assert embed.main(embed_flags(folder, tmp_path / "only", **only)) == 0
    macros = {"SENTENCE_EMBEDDINGS": tmp_path / "only"}
    assert train.main(sentence_flags(folder, "mov", tmp_path / "run_2", **macros)) == 1
    assert "lacks an input of 'jsonl_train'" in one_line(capsys)


@pytest.mark.parametrize(
    ("macros", "says"),
    [
        ({"EMBED_SPLITS": "test"}, "EMBED_SPLITS: expected some of"),
        ({"EMBEDDING_DTYPE": "int8"}, "EMBEDDING_DTYPE: expected one of"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE must be an integer"),
        ({"MIXTURE_OR_TASK_NAME": "colour"}, "unknown task or mixture 'colour'"),
        ({"SENTENCE_ENCODER": 3}, "SENTENCE_ENCODER: expected"),
        ({"INITIAL_CHECKPOINT_PATH": "/no/base"}, "no such file"),
        ({"INITIAL_CHECKPOINT_PATH": None}, "INITIAL_CHECKPOINT_PATH is not set"),
        ({"MODEL": None}, "no model: expected --gin_file=models/"),
    ],
)
def test_what_embed_refuses(folder, tmp_path, capsys, macros, says):
    assert embed.main(embed_flags(folder, tmp_path / "table", **macros)) == 1
    assert says in one_line(capsys)
    assert not (tmp_path / "table").exists()


def test_an_encoder_of_the_users(folder, tmp_path, capsys):
    """Of texts, without a model or a base; another function of the same name is told apart."""
    flags = [
        "--gin_file=runs/embed.gin",
        *data_flags(folder),
        f"--gin.SENTENCE_EMBEDDINGS={tmp_path / 'table'}",
        f"--gin.SENTENCE_ENCODER={__name__}.letters",
    ]
    assert embed.main(flags) == 0
    table = sentence_table.SentenceTable(tmp_path / "table")
    assert table.dim == 7
    ids = (
        seqio_tasks.get_mixture_or_task("colour_1")
        .output_features["inputs"]
        .vocabulary.encode("say grass")
    )
    (found,) = table.vectors(table.rows([[*ids, 1]]))
    np.testing.assert_array_equal(found, letters(["say grass"])[0])
    macros = {"SENTENCE_EMBEDDINGS": tmp_path / "table"}
    macros["TRAIN_STEPS"] = 1
    assert train.main(sentence_flags(folder, "molora", tmp_path / "run", **macros)) == 0
    opened = models.open_model(str(tmp_path / "run"))
    assert opened.model.config.sentence_dim == 7
    kernel = "encoder/layers_0/mlp/wo_adapter/router/kernel"
    assert params_lib.flatten(opened.load())[kernel].shape == (7, 3)
    by_gin = [flag for flag in flags if "ENCODER" not in flag]
    by_gin += [f"--gin_bindings=import {__name__}"]
    by_gin += [f"--gin.SENTENCE_ENCODER=@{__name__}.letters"]
    capsys.readouterr()
    assert embed.main(by_gin) == 0
    assert "0 of them new" in capsys.readouterr().out


_KILLED = """
import sys, time
from pemoe_jax.data import sentence_table
from pemoe_jax.tools import embed
sentence_table._PART_ROWS, embed._CHUNK, embed._BLOCK = 4, 4, 1
add = sentence_table.Writer.add

def slowly(*args):
    add(*args)
    print("added", flush=True)
    time.sleep(0.5)

sentence_table.Writer.add = slowly
sys.exit(embed.main(sys.argv[1:]))
"""


def test_a_table_whose_making_was_killed_is_made_on(folder, tmp_path, capsys):
    flags = embed_flags(folder, tmp_path / "table")
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for line in process.stdout:
        if line == "added\n" and len(list((tmp_path / "table" / "parts").glob("*.keys.npy"))) > 1:
            break
    process.kill()
    assert process.wait() != 0
    parts = len(list((tmp_path / "table" / "parts").glob("*.keys.npy")))
    assert parts > 1 and not list((tmp_path / "table").glob("keys.*.npy"))
    (tmp_path / "table" / "parts" / f"{parts:05d}.vectors.npy").write_bytes(b"half")
    kept = (tmp_path / "table" / "parts" / "00000.vectors.npy").read_bytes()
    assert embed.main(flags) == 0
    assert f"has {4 * parts} inputs already" in capsys.readouterr().out
    assert (tmp_path / "table" / "parts" / "00000.vectors.npy").read_bytes() == kept
    found, want = (sentence_table.SentenceTable(path / "table") for path in (tmp_path, folder))
    np.testing.assert_array_equal(found._keys, want._keys)
    rows = [np.float32(table.vectors(table._rows[:])) for table in (found, want)]
    np.testing.assert_allclose(*rows, rtol=2e-3, atol=2e-3 * np.abs(rows[1]).max())


# --- a feature of the task ---

_TASKS = """
import seqio, tensorflow as tf
from pemoe_jax.tasks.vocabulary import load_vocabulary

vocabulary = load_vocabulary({vocabulary!r})
features = {{
    "inputs": seqio.Feature(vocabulary), "targets": seqio.Feature(vocabulary),
    "sentence_embedding": seqio.ContinuousFeature(dtype=tf.float32),
}}

def rows(split, shuffle_files, seed=None):
    numbers = tf.data.Dataset.range(24 if split == "train" else 6)
    return numbers.map(lambda n: {{
        "inputs": tf.gather(["say grass", "say snow", "say coal"], n % 3),
        "targets": tf.gather(["green", "white", "black"], n % 3),
        "sentence_embedding": tf.one_hot(n % 3, 5),
    }})

def choices(ds):
    words = tf.constant(["green", "white", "black"])
    return ds.enumerate().flat_map(lambda i, row: tf.data.Dataset.range(3).map(lambda c: {{
        **row, "targets": words[c], "is_correct": words[c] == row["targets"],
        "idx": tf.stack([tf.cast(i, tf.int32), tf.cast(c, tf.int32)]),
    }}))

source = seqio.FunctionDataSource(rows, splits=("train", "validation"))
last = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
seqio.TaskRegistry.add("given", source, preprocessors=last, output_features=features)
seqio.TaskRegistry.add(
    "given_score_eval", source, preprocessors=[choices, *last], output_features=features
)
"""


def test_a_feature_of_the_task_needs_no_table(folder, tmp_path, monkeypatch, capsys):
    text = _TASKS.format(vocabulary=str(folder / "vocab.model"))
    (tmp_path / "given_tasks.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own = [
        "--gin.MIXTURE_OR_TASK_MODULE=given_tasks",
        "--gin.JSONL_DIR=None",
        "--gin.SENTENCE_EMBEDDINGS=None",
    ]
    named = "--gin.MIXTURE_OR_TASK_NAME=given"
    run = tmp_path / "run"
    flags = [*sentence_flags(folder, "mov", run, TRAIN_STEPS=2), *own, named]
    assert train.main(flags) == 0
    opened = models.open_model(str(run))
    encoder = {"name": "feature sentence_embedding", "dim": 5}
    assert opened.record.sentence_encoder == encoder
    assert opened.model.config.sentence_dim == 5
    lengths = {"inputs": 32, "targets": 8}
    source = sentences.SentenceSource(encoder, 32)
    for batch in (
        next(feed.train_batches("given", lengths, 8, pack=False, sentences=source)),
        next(feed.eval_batches("given", lengths, 8, sentences=source)),
    ):
        by_row = {}
        for ids, row in zip(
            batch["encoder_input_tokens"], batch["sentence_embeddings"], strict=True
        ):
            by_row.setdefault(tuple(ids), set()).add(tuple(row))
        real = [rows for ids, rows in by_row.items() if any(ids)]
        assert len(real) == 3 and all(len(rows) == 1 for rows in real)
        assert {row.index(1.0) for rows in real for row in rows} == {0, 1, 2}
    scored = [*run_flags(folder, "evaluate", run, tmp_path / "scored"), *own, f"{named}_score_eval"]
    assert evaluate.main(scored) == 0
    groups = choices.load_choice_groups("given_score_eval", lengths)
    assert [int(np.argmax(group.sentence_embedding)) for group in groups] == [0, 1, 2, 0, 1, 2]
    assert infer.main([*run_flags(folder, "infer", run, tmp_path / "said"), *own, named]) == 0
    capsys.readouterr()
    # a run of a table does not take the feature instead
    assert "sentence_embedding" not in seqio_tasks.get_mixture_or_task("colour_1").output_features


def test_help_names_what_is_to_be_set():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pemoe_jax", "embed", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and time.perf_counter() - start < 30
    for macro in ("SENTENCE_EMBEDDINGS", "SENTENCE_ENCODER", "EMBED_SPLITS", "EMBEDDING_DTYPE"):
        assert macro in done.stdout
