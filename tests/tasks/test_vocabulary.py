"""Vocabularies of T5, mT5 and ByT5: special ids, sentinels, files that cannot be read."""

import json

import pytest
import sentencepiece

from pemoe_jax import tasks
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks import p3, pretrain, tokenizer, vocabulary
from pemoe_jax.tools import cache_tasks


def write_model(path, sentinels=()) -> int:
    """Writes a SentencePiece file with `sentinels` among its pieces; returns their number."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a hat is not a cat"] * 9),
            model_writer=file,
            vocab_size=len(sentinels) + 20,
            hard_vocab_limit=False,
            user_defined_symbols=list(sentinels),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


@pytest.mark.parametrize("space", ["", "▁"])
def test_sentinels_of_the_file_are_not_added_again(tmp_path, space):
    path = tmp_path / "mt5.model"
    # mT5's file has the last of them first
    sentinels = [f"{space}<extra_id_{number}>" for number in reversed(range(100))]
    num_pieces = write_model(path, sentinels)
    loaded = vocabulary.load_vocabulary(path)
    assert loaded.vocab_size == num_pieces and loaded.extra_ids == 0
    ids = vocabulary.sentinel_ids(loaded)
    assert ids == list(range(102, 2, -1)), "the pieces follow pad, eos and unk"
    assert vocabulary.load_vocabulary(path) is loaded


def test_sentinels_are_added_to_a_file_without_them(tmp_path):
    path = tmp_path / "t5.model"
    num_pieces = write_model(path)
    loaded = vocabulary.load_vocabulary(path)
    assert loaded.vocab_size == num_pieces + 100
    assert vocabulary.sentinel_ids(loaded) == list(range(num_pieces + 99, num_pieces - 1, -1))


def test_bytes_are_byt5(tmp_path):
    loaded = vocabulary.load_vocabulary("bytes")
    # ByT5: pad, eos and unk, then the bytes; the last 100 bytes serve as sentinels
    assert loaded.vocab_size == 259 and vocabulary.sentinel_ids(loaded)[:2] == [258, 257]
    rows = [{"inputs": "aé", "targets": "b"}, {"inputs": "", "targets": "cd"}]
    path = tmp_path / "tasks" / "t" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.register(jsonl_dir=str(tmp_path / "tasks"), vocab_path="bytes")
    task = seqio_tasks.get_mixture_or_task("t")
    ds = task.get_dataset({"inputs": 8, "targets": 2}, split="train", shuffle=False)
    read = [(row["inputs"].tolist(), row["targets"].tolist()) for row in ds.as_numpy_iterator()]
    # a is byte 97, é is 195 169; targets are truncated to one byte and EOS
    assert read == [([100, 198, 172, 1], [101, 1]), ([1], [102, 1])]
    assert p3.source.Settings(loaded).encode(["aé"]) == [[100, 198, 172]]
    seqio_tasks.check_vocab_size("t", 384)  # ByT5's rows, of which the last ones are padding
    with pytest.raises(InputError, match="must be at least 259"):
        seqio_tasks.check_vocab_size("t", 258)


def test_spans_are_no_more_than_the_sentinels():
    import numpy as np

    ids = list(range(1000, 1100))
    inputs, targets = pretrain.span_corruption(ids, np.random.default_rng(0), sentinels=[7, 5])
    assert [token for token in inputs if token < 1000] == [7, 5]
    assert [token for token in targets if token < 1000] == [7, 5]
    assert len(inputs) + len(targets) == 104


def test_a_remote_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys):
    """As T5's public file without a network: here a scheme that TensorFlow does not know."""
    url = "none://vocab.model"
    monkeypatch.setenv("PEMOE_VOCAB_PATH", url)
    message = f"VOCAB_PATH {url} cannot be read: "
    with pytest.raises(InputError, match=message):
        vocabulary.load_vocabulary(vocabulary.default_vocab_path())
    path = tmp_path / "p3" / "trec_fine_grained_open" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"inputs": "a", "targets": "b"}) + "\n")
    task_roles = tasks.register(p3_dir=str(tmp_path / "p3"))
    assert task_roles.summary, "ids in tfrecords need no vocabulary"
    with pytest.raises(InputError, match=message):
        seqio_tasks.check_vocab_size("trec_fine_grained_open", 640)
    out = tmp_path / "out"
    assert cache_tasks.main([f"--p3_dir={tmp_path / 'p3'}", f"--output={out}"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"error: {message}") and "PEMOE_VOCAB_PATH" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not out.exists() or not list(out.iterdir())


def test_fingerprints(tmp_path):
    """Of the pieces: a copy has the same, other pieces have another."""
    write_model(tmp_path / "t5.model")
    (tmp_path / "copy.model").write_bytes((tmp_path / "t5.model").read_bytes())
    with (tmp_path / "other.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["another text of words"] * 9),
            model_writer=file,
            vocab_size=20,
            hard_vocab_limit=False,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
        )
    names = ("t5", "copy", "other")
    loaded = [vocabulary.load_vocabulary(tmp_path / f"{name}.model") for name in names]
    loaded.append(vocabulary.load_vocabulary("bytes"))
    first, copy, *others = map(seqio_tasks.fingerprint_vocabulary, loaded)
    assert first == copy and len({first, *others}) == 3
    seqio_tasks.check_vocabulary("run", first, loaded[1])
    seqio_tasks.check_vocabulary("run", None, loaded[2])
    with pytest.raises(InputError, match=f"that run was trained with .fingerprint {first}., got"):
        seqio_tasks.check_vocabulary("run", first, loaded[2])


def test_tokenizers_without_seqio_have_the_same_ids(tmp_path):
    """T5's file with sentinels and without, mT5's, and ByT5's; texts and unknown ids."""
    plain, t5, mt5 = (tmp_path / name for name in ("plain.model", "t5.model", "mt5.model"))
    numbers = range(100)
    write_model(plain)
    write_model(t5, [f"<extra_id_{number}>" for number in reversed(numbers)])
    write_model(mt5, [f"▁<extra_id_{number}>" for number in reversed(numbers)])
    texts = ["a hat", "", "  a  cat \n is é½ ", "not <extra_id_0> a <extra_id_99>", "日本 {x}\t"]
    for source in (str(plain), str(t5), str(mt5), "bytes"):
        loaded, light = vocabulary.load_vocabulary(source), tokenizer.open_tokenizer(source)
        assert (light.vocab_size, light.eos_id) == (loaded.vocab_size, loaded.eos_id)
        fingerprint = seqio_tasks.fingerprint_vocabulary
        assert fingerprint(light) == fingerprint(loaded)
        for text in texts:
            ids = light.encode(text)
            assert ids == list(loaded.encode(text)) == loaded.encode_tf(text).numpy().tolist()
            for row in (ids, [*ids, 1, 0, 0], [*ids, light.vocab_size + 3], [light.vocab_size - 1]):
                assert light.decode(row) == loaded.decode(row)


def test_tokenizers_of_transformers():
    class T5Tokenizer:
        pad_token_id, eos_token_id = 0, 1

        def __len__(self):
            return 32100

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [len(word) for word in text.split()]

        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return " ".join("x" * number for number in ids)

    light = tokenizer.open_tokenizer(T5Tokenizer())
    assert (light.vocab_size, light.encode("aaa aa")) == (32100, [3, 2])
    assert light.decode([3, 2, 1, 4]) == "xxx xx"
    assert seqio_tasks.fingerprint_vocabulary(light) is None, "it has no pieces to compare"
    seqio_tasks.check_vocabulary("run", "0123456789abcdef", light)
    T5Tokenizer.pad_token_id = 1
    with pytest.raises(InputError, match="vocabulary must be a tokenizer of T5"):
        tokenizer.open_tokenizer(T5Tokenizer())
