"""`pemoe embed`, and runs whose routers read sentence embeddings."""

import contextlib
import dataclasses
import importlib
import json
import pathlib

import jax
import numpy as np
import optax
import pytest
from jsonl_folder import write_folder, write_vocabulary
from test_encoders import base_params, letters, mean_embedding
from test_train import CONFIG, DIMENSIONS, data_flags, read_metrics, train_flags

from pemoe_jax import evaluate, infer, train
from pemoe_jax.analysis.routing import probe as probe_lib
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints import models
from pemoe_jax.checkpoints.records import parse_record
from pemoe_jax.core import decoding, network, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, feed, inference_batches, sentence_table, sentences, seqio_tasks
from pemoe_jax.runtime import file_io
from pemoe_jax.tools import convert, embed

# --- runs ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Tasks, a vocabulary, two base models, and a table of the first over all tasks."""
    root = tmp_path_factory.mktemp("embed")
    write_folder(root / "tasks")
    write_vocabulary(root / "vocab.model")
    for name, seed in (("base", 0), ("other", 1)):
        base = network.init_params(network.Transformer(CONFIG), seed, params_lib.is_base)
        base_lib.save_base(root / f"{name}.safetensors", base, CONFIG.as_dict())
    assert embed.main(embed_flags(root, root / "table")) == 0
    return root


def embed_flags(folder: pathlib.Path, output: file_io.AnyPath, **macros) -> list[str]:
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


def test_table_holds_every_distinct_input(folder):
    lines = []
    for path in (folder / "tasks").glob("*/*.jsonl"):
        lines += [json.loads(line)["inputs"] for line in path.read_text().splitlines()]
    table = sentence_table.SentenceTable(folder / "table")
    assert len(table) == len(set(lines)) > 10
    vocabulary = seqio_tasks.get_mixture_or_task("jsonl_train").output_features["inputs"].vocabulary
    for text in sorted(set(lines))[::6]:
        ids = np.array([*vocabulary.encode(text), 1], np.int32)
        (row,) = table.vectors(table.rows([ids]))
        expected = mean_embedding(ids)
        atol = 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=atol)
    assert table.encoder["fingerprint"] == params_lib.fingerprint(base_params())


def test_a_table_in_a_bucket(folder, gcs):
    """Has the vectors of one on disk, and both folders say what wrote them."""
    path = file_io.to_path("gs://bucket/table")
    assert embed.main(embed_flags(folder, path)) == 0
    here, there = map(sentence_table.SentenceTable, (folder / "table", path))
    rows = np.arange(len(here))
    np.testing.assert_array_equal(here.vectors(rows), there.vectors(rows))
    for content in ((folder / "table" / "run.json").read_text(), gcs.read(path / "run.json")):
        about = json.loads(content)
        assert about["status"] == "finished" and "cores" in about["devices"]
        assert about["encoder"] == here.encoder


def test_truncated_inputs_are_found_by_every_reader(folder, tmp_path):
    """Training, its evaluation loss and scoring find truncated inputs in the table."""
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


def test_batches_have_the_embedding_of_each_rows_input(folder, trained):
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
            (expected,) = table.vectors(table.rows([ids]))
            np.testing.assert_array_equal(vector, expected.astype(np.float32))
    tokens = batch["encoder_input_tokens"]  # of 18 examples the last batch has 2
    assert tokens.shape[0] == 8 and tokens[1].any() and not tokens[2:].any()
    plain = next(feed.train_batches("jsonl_train", lengths, 8, pack=False))
    assert "sentence_embeddings" not in plain


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_training_updates_routers_and_records_the_encoder(folder, trained, method):
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
    changed = [not np.array_equal(start[path], after[path]) for path in kernels]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_router_probabilities_are_equal_for_all_tokens_of_an_example(folder, trained, method):
    opened = models.open_model(str(trained[method]))
    params = opened.load()
    groups = choices.load_choice_groups("jsonl_score_eval", {"inputs": 32, "targets": 8})
    source = sentences.open_for_models([opened], str(folder / "table"), "jsonl_score_eval", 32)
    batch, members = next(inference_batches.score_batches(source.attach_to(groups), 8))
    batch = {k: v[:, 0] if v.ndim == 3 else v for k, v in batch.items()}
    apply = jax.jit(
        lambda params, batch: steps.apply_model(
            opened.model, params, batch, None, mutable=["intermediates"]
        )
    )
    _, collections = apply(params, batch)
    sites = params_lib.flatten(collections["intermediates"])
    assert any(path.startswith("decoder") for path in sites)
    for (probs,) in sites.values():
        probs = np.asarray(probs)[: len(members)]
        assert probs.shape[-1] == 3
        np.testing.assert_array_equal(probs, np.broadcast_to(probs[:, :1], probs.shape))
        assert np.ptp(probs[:, 0], axis=0).max() > 1e-3
    zeros = probe_lib.init_totals(opened.model, len(members))
    rows = len(batch["encoder_input_tokens"])
    by_example = np.minimum(np.arange(rows), len(members) - 1)  # further rows are padding
    sums = probe_lib.make_probe(opened.model)(params, batch, by_example, zeros)
    for site, probs in sums.probs.items():
        np.testing.assert_allclose(
            np.asarray(probs / sums.num_tokens[probe_lib.token_stack(site)][:, None]),
            np.asarray(sites[f"{site}_adapter/probs"][0])[: len(members), 0],
            atol=1e-6,
        )


def pad(ids: list[int], length: int) -> np.ndarray:
    """Returns token ids as int32 [1, length], padded with zeros."""
    assert len(ids) <= length
    return np.array([[*ids, *[0] * (length - len(ids))]], np.int32)


def test_scores_of_choices_equal_those_scored_one_by_one(folder, trained, tmp_path):
    method = "molora"
    assert evaluate.main(run_flags(folder, "evaluate", trained[method], tmp_path)) == 0
    opened = models.open_model(str(trained[method]))
    params = opened.load()
    table = sentence_table.SentenceTable(folder / "table")
    vocabulary = seqio_tasks.get_mixture_or_task("check_1").output_features["inputs"].vocabulary
    lines = (tmp_path / "predictions" / method / "check_1_score_eval.jsonl").read_text()
    losses = jax.jit(
        lambda batch: optax.softmax_cross_entropy_with_integer_labels(
            steps.apply_model(opened.model, params, batch, None), batch["decoder_target_tokens"]
        )
    )
    for line in list(map(json.loads, lines.splitlines()))[:3]:
        ids = pad([*vocabulary.encode(line["inputs"]), 1], 32)
        vector = np.float32(table.vectors(table.rows(ids)))
        for choice, score in zip(line["answer_choices"], line["scores"], strict=True):
            target = pad([*vocabulary.encode(choice), 1], 8)
            batch = {
                "encoder_input_tokens": ids,
                "decoder_target_tokens": target,
                "decoder_input_tokens": np.pad(target[:, :-1], ((0, 0), (1, 0))),
                "sentence_embeddings": vector,
            }
            nll = losses(batch) * (target > 0)
            assert score == pytest.approx(-float(nll.sum()), abs=2e-5)


def test_embeddings_change_what_is_scored(folder, trained, tmp_path):
    """Scores with the embeddings of other inputs, three times as large, differ."""
    table = sentence_table.SentenceTable(folder / "table")
    keys = [table._keys[i : i + 1].tobytes() for i in range(len(table))]
    swapped = sentence_table.TableWriter(
        tmp_path / "swapped", table.encoder, "float32", table.vocabulary, 32
    )
    swapped.add(keys, 3 * np.float32(table.vectors(np.roll(table._rows, 1))))
    swapped.finish()
    scores = {}
    for path in (folder / "table", tmp_path / "swapped"):
        macros = {"SENTENCE_EMBEDDINGS": path}
        flags = run_flags(folder, "evaluate", trained["molora"], tmp_path / "out", **macros)
        assert evaluate.main(flags) == 0
        lines = (tmp_path / "out/predictions/molora/check_1_score_eval.jsonl").read_text()
        scores[path] = [json.loads(line)["scores"] for line in lines.splitlines()]
    original, changed = scores.values()
    assert np.abs(np.array(original) - np.array(changed)).max() > 1e-3


def test_decoding_uses_the_embedding_of_each_example(folder, trained, tmp_path, monkeypatch):
    """Batches have several shapes, and rows of padding repeat the last example."""
    table = sentence_table.SentenceTable(folder / "table")
    seen = []

    def record(model, params, tokens, length, eos_id, vectors):
        for ids, vector in zip(np.asarray(tokens), np.asarray(vectors), strict=True):
            (expected,) = table.vectors(table.rows([ids]))
            np.testing.assert_array_equal(vector, expected.astype(np.float32))
            seen.append(ids.tobytes())
        return np.ones((len(tokens), length), np.int32)

    monkeypatch.setattr(decoding, "greedy_decode", record)
    few = {"EVAL_EXAMPLES": 3}
    assert infer.main(run_flags(folder, "infer", trained["mov"], tmp_path, **few)) == 0
    assert len(set(seen)) == 9 and len(seen) == 12  # of three tasks, in two batches of six


def test_decoding_with_embeddings(folder, trained, tmp_path):
    one = {"MIXTURE_OR_TASK_NAME": "free_1"}
    assert infer.main(run_flags(folder, "infer", trained["molora"], tmp_path, **one)) == 0
    lines = (tmp_path / "predictions" / "molora" / "free_1.jsonl").read_text()
    assert len(lines.splitlines()) == 6


def test_resumed_batches_have_the_same_embeddings(folder, trained):
    table = sentence_table.SentenceTable(folder / "table")
    source = sentences.SentenceSource(table.encoder, 32, table)
    lengths = {"inputs": 32, "targets": 8}
    settings = {"pack": False, "sentences": source}
    whole = feed.train_batches("jsonl_train", lengths, 8, **settings)
    first = next(whole)["sentence_embeddings"]
    resumed = feed.train_batches("jsonl_train", lengths, 8, start=whole.position, **settings)
    for _ in range(3):
        batch, resumed_batch = next(whole), next(resumed)
        assert not np.array_equal(batch["sentence_embeddings"], first)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, resumed_batch[name])


def test_conversion_to_an_adapter_keeps_the_encoder(folder, trained, tmp_path):
    assert convert.main(["adapter", str(trained["mov"]), str(tmp_path / "adapter")]) == 0
    opened = models.open_model(str(tmp_path / "adapter"))
    assert opened.record == models.open_model(str(trained["mov"])).record
    assert opened.record.sentence_encoder is not None


def test_records_without_encoder_can_be_opened(trained):
    record = models.open_model(str(trained["mov"])).record
    fields = dataclasses.asdict(record)
    del fields["sentence_encoder"]
    assert parse_record(fields, "x").sentence_encoder is None
    with pytest.raises(InputError, match="sentence_encoder: expected an object, got 3"):
        parse_record({**fields, "sentence_encoder": 3}, "x")


def test_training_checks_embeddings_before_it_writes(folder, tmp_path, capsys):
    flags = sentence_flags(folder, "mov", tmp_path)
    assert train.main([*flags, "--gin.PACK=True"]) == 1
    assert "PACK must be False for routers that read sentence embeddings" in one_line(capsys)
    assert train.main([*flags, "--gin.SENTENCE_EMBEDDINGS=None"]) == 1
    assert "SENTENCE_EMBEDDINGS is not set: pass" in one_line(capsys)
    assert train.main([*flags, f"--gin.SENTENCE_EMBEDDINGS={tmp_path / 'no'}"]) == 1
    assert "no such folder" in one_line(capsys)
    assert train.main([flag for flag in flags if "sentence.gin" not in flag]) == 1
    assert "because no router reads them" in one_line(capsys)
    plain = [flag for flag in sentence_flags(folder, "ia3", tmp_path) if "NUM_EXPERTS" not in flag]
    assert train.main(plain) == 1
    assert "routing.Router.reads has no effect: no adapter of ia3 has a router" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_table_of_another_encoder_is_refused(folder, trained, tmp_path, capsys):
    other = {"INITIAL_CHECKPOINT_PATH": folder / "other.safetensors"}
    assert embed.main(embed_flags(folder, tmp_path / "table", **other)) == 0
    assert embed.main(embed_flags(folder, folder / "table", **other)) == 1
    assert "has the encoder mean_pooled, fingerprint" in one_line(capsys)
    macros = {"SENTENCE_EMBEDDINGS": tmp_path / "table"}
    for command, main in (("evaluate", evaluate.main), ("infer", infer.main)):
        assert main(run_flags(folder, command, trained["mov"], tmp_path / "out", **macros)) == 1
        error = one_line(capsys)
        assert str(trained["mov"]) in error and "that it was trained with, of mean_pooled" in error
    assert train.main(sentence_flags(folder, "mov", trained["mov"], **macros, TRAIN_STEPS=20)) == 1
    assert "that it was trained with, of mean_pooled" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_table_must_be_set_exactly_for_models_that_read_it(folder, trained, tmp_path, capsys):
    base = folder / "base.safetensors"
    assert evaluate.main(run_flags(folder, "evaluate", base, tmp_path / "out")) == 1
    assert "no router of" in one_line(capsys)
    none = {"SENTENCE_EMBEDDINGS": None}
    assert evaluate.main(run_flags(folder, "evaluate", trained["mov"], tmp_path / "o", **none)) == 1
    assert "SENTENCE_EMBEDDINGS is not set: pass" in one_line(capsys)
    # Scored together with a model that reads them, a base model has the same scores as alone.
    both = f"['{base}', '{trained['mov']}']"
    assert evaluate.main(run_flags(folder, "evaluate", both, tmp_path / "both")) == 0
    assert evaluate.main(run_flags(folder, "evaluate", base, tmp_path / "alone", **none)) == 0
    name = "predictions/base/check_1_score_eval.jsonl"
    assert (tmp_path / "both" / name).read_text() == (tmp_path / "alone" / name).read_text()


def test_missing_inputs_are_reported_and_can_be_added(folder, trained, tmp_path, capsys):
    table = tmp_path / "table"
    partly = {"MIXTURE_OR_TASK_NAME": "jsonl_train", "EMBED_SPLITS": "train"}
    assert embed.main(embed_flags(folder, table, **partly)) == 0
    macros = {"SENTENCE_EMBEDDINGS": table}
    flags = run_flags(folder, "evaluate", trained["mov"], tmp_path / "out", **macros)
    assert evaluate.main(flags) == 1
    error = one_line(capsys)
    assert f"{table} lacks an input of 'check_1_score_eval': 'is the " in error
    assert "pemoe embed with --gin.MIXTURE_OR_TASK_NAME=check_1_score_eval adds it" in error
    shorter = "--gin.TASK_FEATURE_LENGTHS={'inputs': 5, 'targets': 8}"
    assert evaluate.main([*flags, shorter]) == 1
    assert "(inputs are truncated to 5 tokens here, to 32 there)" in one_line(capsys)
    assert embed.main(embed_flags(folder, table, MIXTURE_OR_TASK_NAME="jsonl_score_eval")) == 0
    assert evaluate.main(flags) == 0
    only = {"MIXTURE_OR_TASK_NAME": "colour_1"}
    assert embed.main(embed_flags(folder, tmp_path / "only", **only)) == 0
    macros = {"SENTENCE_EMBEDDINGS": tmp_path / "only"}
    assert train.main(sentence_flags(folder, "mov", tmp_path / "run_2", **macros)) == 1
    assert "lacks an input of 'jsonl_train'" in one_line(capsys)


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"EMBED_SPLITS": "test"}, "EMBED_SPLITS must be some of"),
        ({"EMBEDDING_DTYPE": "int8"}, "EMBEDDING_DTYPE must be one of"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE must be a positive integer"),
        ({"MIXTURE_OR_TASK_NAME": "colour"}, "unknown task or mixture 'colour'"),
        ({"SENTENCE_ENCODER": 3}, "SENTENCE_ENCODER must be"),
        ({"INITIAL_CHECKPOINT_PATH": "/no/base"}, "no such file"),
        ({"INITIAL_CHECKPOINT_PATH": None}, "INITIAL_CHECKPOINT_PATH is not set"),
        ({"MODEL": None}, "MODEL is not set: pass --gin_file=models/"),
    ],
)
def test_wrong_settings_are_reported(folder, tmp_path, capsys, macros, message):
    assert embed.main(embed_flags(folder, tmp_path / "table", **macros)) == 1
    assert message in one_line(capsys)
    assert not (tmp_path / "table").exists()


def test_user_defined_encoder(folder, tmp_path, capsys):
    """A function of texts needs no model file and no base model."""
    flags = [
        "--gin_file=runs/embed.gin",
        *data_flags(folder),
        f"--gin.SENTENCE_EMBEDDINGS={tmp_path / 'table'}",
        "--gin.SENTENCE_ENCODER=test_encoders.letters",
    ]
    assert embed.main(flags) == 0
    table = sentence_table.SentenceTable(tmp_path / "table")
    assert table.dim == 7
    ids = (
        seqio_tasks.get_mixture_or_task("colour_1")
        .output_features["inputs"]
        .vocabulary.encode("say grass")
    )
    (vector,) = table.vectors(table.rows([[*ids, 1]]))
    np.testing.assert_array_equal(vector, letters(["say grass"])[0])
    macros = {"SENTENCE_EMBEDDINGS": tmp_path / "table"}
    macros["TRAIN_STEPS"] = 1
    assert train.main(sentence_flags(folder, "mov", tmp_path / "run", **macros)) == 0
    opened = models.open_model(str(tmp_path / "run"))
    assert opened.model.config.sentence_dim == 7
    kernel = "encoder/layers_0/mlp/gate_adapter/router/kernel"
    assert params_lib.flatten(opened.load())[kernel].shape == (7, 3)
    by_gin = [flag for flag in flags if "ENCODER" not in flag]
    by_gin += ["--gin_bindings=import test_encoders"]
    by_gin += ["--gin.SENTENCE_ENCODER=@test_encoders.letters"]
    capsys.readouterr()
    assert embed.main(by_gin) == 0
    assert "0 of them new" in capsys.readouterr().out


def test_interrupted_table_is_resumed(folder, tmp_path, monkeypatch, capsys):
    flags = embed_flags(folder, tmp_path / "table")
    parts = tmp_path / "table" / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(sentence_table, "_PART_ROWS", 4)
        patch.setattr(embed, "_CHUNK", 4)
        add = sentence_table.TableWriter.add

        def add_some(writer, keys, vectors):
            if len(writer.known_keys) == 8:
                raise KeyboardInterrupt
            add(writer, keys, vectors)

        patch.setattr(sentence_table.TableWriter, "add", add_some)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            embed.main(flags)
    assert len(list(parts.glob("*.keys.npy"))) == 2
    assert not list((tmp_path / "table").glob("keys.*.npy"))
    (parts / "00002.vectors.npy").write_bytes(b"half")  # as a kill would leave
    before = (parts / "00000.vectors.npy").read_bytes()
    capsys.readouterr()
    assert embed.main(flags) == 0
    assert "has 8 inputs already" in capsys.readouterr().out
    assert (parts / "00000.vectors.npy").read_bytes() == before
    tables = [sentence_table.SentenceTable(path / "table") for path in (tmp_path, folder)]
    np.testing.assert_array_equal(tables[0]._keys, tables[1]._keys)
    vectors = [np.float32(table.vectors(table._rows[:])) for table in tables]
    np.testing.assert_allclose(*vectors, rtol=2e-3, atol=2e-3 * np.abs(vectors[1]).max())


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
seqio.TaskRegistry.add("with_feature", source, preprocessors=last, output_features=features)
seqio.TaskRegistry.add(
    "with_feature_score_eval", source, preprocessors=[choices, *last], output_features=features
)
"""


def test_embeddings_can_be_a_feature_of_the_tasks(folder, tmp_path, monkeypatch, capsys):
    text = _TASKS.format(vocabulary=str(folder / "vocab.model"))
    (tmp_path / "feature_tasks.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own = [
        "--gin.MIXTURE_OR_TASK_MODULE=feature_tasks",
        "--gin.JSONL_DIR=None",
        "--gin.SENTENCE_EMBEDDINGS=None",
    ]
    named = "--gin.MIXTURE_OR_TASK_NAME=with_feature"
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
        next(feed.train_batches("with_feature", lengths, 8, pack=False, sentences=source)),
        next(feed.eval_batches("with_feature", lengths, 8, sentences=source)),
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
    groups = choices.load_choice_groups("with_feature_score_eval", lengths)
    assert [int(np.argmax(group.sentence_embedding)) for group in groups] == [0, 1, 2, 0, 1, 2]
    assert infer.main([*run_flags(folder, "infer", run, tmp_path / "said"), *own, named]) == 0
    capsys.readouterr()
    # Tasks without the feature are unaffected.
    assert "sentence_embedding" not in seqio_tasks.get_mixture_or_task("colour_1").output_features


def test_the_size_of_a_feature_is_that_of_a_task_with_a_cache(tmp_path, monkeypatch):
    """The first task supports caching and has no cache, so that the mixture leaves it out."""
    import seqio

    from pemoe_jax.tasks.folder_tasks import FolderMixture

    class Skipping(FolderMixture):
        skips_missing_tasks = True
        examples_from = eval_examples = None  # abstract, and not called here

    write_vocabulary(tmp_path / "vocab.model")
    text = _TASKS.format(vocabulary=str(tmp_path / "vocab.model")).replace("with_feature", "sized")
    (tmp_path / "sized_tasks.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("sized_tasks")
    task = seqio.TaskRegistry.get("sized")
    cacheable = [seqio.CacheDatasetPlaceholder(), *task.preprocessors]
    features = task.output_features
    seqio.TaskRegistry.add(
        "cacheable", task.source, preprocessors=cacheable, output_features=features
    )
    mixture = Skipping("sized_mixture", ["cacheable", "sized"], 1.0)
    seqio.MixtureRegistry.add_provider("sized_mixture", mixture)
    assert sentences._feature_dim("sized_mixture", use_cached=True) == 5


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        embed.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for macro in ("SENTENCE_EMBEDDINGS", "SENTENCE_ENCODER", "EMBED_SPLITS", "EMBEDDING_DTYPE"):
        assert macro in text
