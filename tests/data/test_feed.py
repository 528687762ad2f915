"""Training and evaluation batches: determinism, resuming, packing, truncation."""

import gc
import itertools
import json
import time
import weakref

import data_tasks
import numpy as np
import pytest
from data_tasks import LENGTHS

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, feed, packing, prefetch, seqio_import, seqio_tasks
from pemoe_jax.data.seekable_tasks import StreamOptions
from pemoe_jax.tasks.jsonl import files


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return data_tasks.register(tmp_path_factory.mktemp("data"))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


UNPACKED = {
    "encoder_input_tokens": 32,
    "decoder_input_tokens": 8,
    "decoder_target_tokens": 8,
    "decoder_loss_weights": 8,
}
PACKED = UNPACKED | {
    "encoder_segment_ids": 32,
    "encoder_positions": 32,
    "decoder_segment_ids": 8,
    "decoder_positions": 8,
}


@pytest.mark.parametrize(("pack", "features"), [(False, UNPACKED), (True, PACKED)])
def test_batches_have_t5x_features(registered, pack, features):
    batch = next(feed.train_batches("jsonl_train", LENGTHS, 3, pack=pack))
    assert {key: value.shape for key, value in batch.items()} == {
        key: (3, length) for key, length in features.items()
    }
    assert {value.dtype.name for value in batch.values()} == {"int32"}
    np.testing.assert_array_equal(
        batch["decoder_loss_weights"], (batch["decoder_target_tokens"] > 0).astype(np.int32)
    )


@pytest.mark.parametrize("name", ["jsonl_train", "a"])
def test_same_seed_same_batches(registered, name):
    first = take(feed.train_batches(name, LENGTHS, 4, seed=3), 12)
    assert_same(first, take(feed.train_batches(name, LENGTHS, 4, seed=3), 12))
    other = take(feed.train_batches(name, LENGTHS, 4, seed=4), 12)
    assert any(
        (a["encoder_input_tokens"] != b["encoder_input_tokens"]).any()
        for a, b in zip(first, other, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("jsonl_train", True),
        ("jsonl_train", False),
        ("a", True),
        ("scored_score_eval", True),
        ("users_own", True),
    ],
)
def test_batches_resume_at_any_position(registered, users_own, name, pack):
    settings = {"split": SPLITS.get(name, "train"), "seed": 3, "pack": pack}
    whole = feed.train_batches(name, LENGTHS, 3, **settings)
    positions, batches = [whole.position], []
    for batch in itertools.islice(whole, 25):
        batches.append(batch)
        positions.append(json.loads(json.dumps(whole.position)))
    assert positions[0] == {"examples": 0}
    for number in (0, 2, 24):
        resumed = feed.train_batches(name, LENGTHS, 3, start=positions[number], **settings)
        assert resumed.position == positions[number]
        assert_same(take(resumed, 25 - number), batches[number:])
        assert resumed.position == positions[25]
    counted = sum(
        batch["decoder_segment_ids"].max(axis=1).sum() if pack else 3 for batch in batches
    )
    assert positions[25] == {"examples": counted}


SPLITS = {"scored_score_eval": "validation"}


@pytest.fixture
def users_own(registered):
    """A mixture that is not seekable: resuming reads and drops the earlier examples."""
    import seqio

    seqio.MixtureRegistry.add("users_own", [("a", 1.0), ("b", 1.0)])
    yield "users_own"
    seqio.MixtureRegistry.remove("users_own")


def test_a_distant_start_reads_no_examples_before_it(registered, monkeypatch):
    read = []
    plain = files.Rows.read
    monkeypatch.setattr(
        files.Rows,
        "read",
        lambda self, numbers: read.append(len(numbers)) or plain(self, numbers),
    )
    next(feed.train_batches("jsonl_train", LENGTHS, 2, start={"examples": 1_000_000}))
    assert 0 < sum(read) < 20_000


def test_shards_take_every_nth_example(registered):
    def examples(shard=(0, 1), count=30, **kwargs):
        batches = feed.train_batches("jsonl_train", LENGTHS, 1, pack=False, shard=shard, **kwargs)
        return [batch["encoder_input_tokens"][0].tolist() for batch in take(batches, count)]

    whole = examples(count=90)
    for index in range(3):
        assert examples((index, 3)) == whole[index::3]
        assert examples((index, 3), 10, start={"examples": 20}) == whole[60 + index :: 3]


@pytest.mark.parametrize("pack", [True, False])
def test_batches_equal_those_of_seqio(registered, pack):
    """In the first max(lengths) examples, the block that seqio packs at a time."""
    import seqio

    lengths = {"inputs": 64, "targets": 24}
    ours = take(feed.train_batches("jsonl_train", lengths, 1, pack=pack), 8)
    ds = seqio_tasks.get_mixture_or_task("jsonl_train").examples_from(
        lengths, "train", StreamOptions(seed=0)
    )
    converter = seqio.EncDecFeatureConverter(pack=pack)
    theirs = converter(ds.take(64), task_feature_lengths=lengths).batch(1)
    theirs = list(theirs.take(8).as_numpy_iterator())
    assert_same([dict(sorted(b.items())) for b in ours], [dict(sorted(b.items())) for b in theirs])


def test_empty_sequences_are_counted(registered):
    rows = [{"inputs": ids, "targets": [7, 1]} for ids in ([], [1], [5], [5, 1])]
    data_tasks.add_rows("users_rows", [*rows, {"inputs": [5, 1], "targets": [1]}], "train")
    batches = feed.train_batches("users_rows", LENGTHS, 5, pack=False, num_epochs=1)
    next(batches)
    assert batches.counts.describe() == ["2 inputs and 1 targets of 5 examples were empty"]


@pytest.mark.parametrize("name", ["jsonl_train", "a"])
def test_truncations_are_counted(registered, name):
    """Examples that just fit are not counted."""

    def examples(lengths):
        batches = feed.train_batches(name, lengths, 1, pack=False, num_epochs=1, shuffle=False)
        keys = ("encoder_input_tokens", "decoder_target_tokens")
        pairs = [[batch[key][0] for key in keys] for batch in batches]
        return batches.counts, [[row[row > 0].tolist() for row in pair] for pair in pairs]

    none, whole = examples({"inputs": 500, "targets": 100})
    assert none == packing.ExampleCounts(examples=len(whole)) and not none.describe()
    limit = sorted(len(inputs) for inputs, _ in whole)[len(whole) // 2]
    counts, truncated = examples({"inputs": limit, "targets": 100})
    longer = [inputs for inputs, _ in whole if len(inputs) > limit]
    assert counts.cut_inputs == len(longer) > 0 and counts.cut_targets == 0
    assert any(len(inputs) == limit for inputs, _ in whole)
    expected = [i if len(i) <= limit else [*i[: limit - 1], 1] for i, _ in whole]
    assert [inputs for inputs, _ in truncated] == expected


def segments(batch):
    """Yields every packed example as (input ids, target ids)."""
    for row in range(len(batch["encoder_segment_ids"])):
        for segment in range(1, batch["encoder_segment_ids"][row].max() + 1):
            yield tuple(
                tuple(batch[tokens][row][batch[ids][row] == segment].tolist())
                for tokens, ids in (
                    ("encoder_input_tokens", "encoder_segment_ids"),
                    ("decoder_target_tokens", "decoder_segment_ids"),
                )
            )


def test_packed_batches_hold_every_example_whole(registered):
    lengths = {"inputs": 64, "targets": 24}
    packed, plain = (
        list(feed.train_batches("a", lengths, 1, pack=pack, shuffle=False, num_epochs=1))
        for pack in (True, False)
    )
    assert len(plain) == 40 > len(packed)
    expected = [
        tuple(
            tuple(batch[key][0][batch[key][0] > 0].tolist())
            for key in ("encoder_input_tokens", "decoder_target_tokens")
        )
        for batch in plain
    ]
    assert [example for batch in packed for example in segments(batch)] == expected
    vocabulary = seqio_tasks.get_mixture_or_task("a").output_features["inputs"].vocabulary
    assert vocabulary.decode(list(expected[0][0])).split()[0] == "a"
    for batch in packed:
        for side in ("encoder", "decoder"):
            ids = batch[f"{side}_segment_ids"][0]
            for segment in range(1, ids.max() + 1):
                positions = batch[f"{side}_positions"][0][ids == segment]
                np.testing.assert_array_equal(positions, np.arange(len(positions)))
        # Every target starts from pad 0, also in the middle of a row, and is shifted by itself.
        fed, target = batch["decoder_input_tokens"][0], batch["decoder_target_tokens"][0]
        starts = batch["decoder_positions"][0] == 0
        assert not fed[starts].any()
        within = ~starts
        np.testing.assert_array_equal(fed[within], np.roll(target, 1)[within])


def test_mixture_draws_by_rate_and_covers_every_example(registered):
    batches = take(feed.train_batches("jsonl_train", LENGTHS, 8, pack=False), 120)
    vocabulary = seqio_tasks.get_mixture_or_task("a").output_features["inputs"].vocabulary
    texts = [vocabulary.decode(row.tolist()) for b in batches for row in b["encoder_input_tokens"]]
    share = np.mean([text.split()[0] == "a" for text in texts])
    assert abs(share - 40 / 65) < 0.06  # standard error of 960 draws: 0.016
    assert len(set(texts)) > 55  # of 65, a few of them equal once truncated


def test_mixture_has_the_examples_of_a_seqio_mixture(registered):
    """Each task's examples come in the same order; how tasks are drawn differs."""
    import seqio

    ours = seqio.MixtureRegistry.get("jsonl_train")
    theirs = seqio.Mixture("theirs", [(task, ours.get_rate(task)) for task in ours.tasks])
    kwargs = {"split": "train", "shuffle": False, "num_epochs": None, "copy_pretokenized": True}
    read = [
        list(mixture.get_dataset(LENGTHS, **kwargs).take(50).as_numpy_iterator())
        for mixture in (ours, theirs)
    ]
    for task in (b"a", b"b"):
        by_mixture = [
            [row for row in rows if row["inputs_pretokenized"][:1] == task] for rows in read
        ]
        shared = min(map(len, by_mixture))
        assert shared > 10
        assert_same(by_mixture[0][:shared], by_mixture[1][:shared])


def test_t5x_reads_the_same_mixture(registered):
    """seqio.get_dataset, as T5X calls it, returns the first training examples."""
    import seqio

    ds = seqio.get_dataset(
        "jsonl_train",
        LENGTHS,
        dataset_split="train",
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        shuffle=True,
        seed=5,
        num_epochs=None,
        shard_info=seqio.ShardInfo(1, 2),
    )
    theirs = [
        {key: value[None] for key, value in batch.items()}
        for batch in ds.take(40).as_numpy_iterator()
    ]
    ours = feed.train_batches("jsonl_train", LENGTHS, 1, pack=False, seed=5, shard=(1, 2))
    for a, b in zip(take(ours, 40), theirs, strict=True):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])


def test_eval_batches_interleave_every_example_once(registered):
    batches = list(feed.eval_batches("jsonl_train", LENGTHS, 4, pack=False))
    assert [len(batch["encoder_input_tokens"]) for batch in batches] == [4, 4, 4]
    real = [row for b in batches for row in b["encoder_input_tokens"] if row.any()]
    assert len(real) == 10
    assert not batches[-1]["decoder_loss_weights"][2:].any()  # padding
    vocabulary = seqio_tasks.get_mixture_or_task("a").output_features["inputs"].vocabulary
    assert [vocabulary.decode(row.tolist()).split()[0] for row in real] == ["a", "b"] * 5
    assert_same(take(batches, 1), list(feed.eval_batches("jsonl_train", LENGTHS, 4, 1, pack=False)))
    single = list(feed.eval_batches("a", LENGTHS, 4, pack=False))
    assert sum(row.any() for b in single for row in b["encoder_input_tokens"]) == 5


def test_eval_batches_of_a_plain_seqio_mixture(users_own):
    theirs = list(feed.eval_batches(users_own, LENGTHS, 4))
    assert_same(theirs, list(feed.eval_batches("jsonl_train", LENGTHS, 4)))


def test_plain_seqio_task_can_be_trained_on(registered, tmp_path):
    import seqio
    import tensorflow as tf

    features = seqio_tasks.get_mixture_or_task("a").output_features
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {"inputs": ["sky", "grass"], "targets": ["blue", "green"]}
        ),
        splits=["train"],
    )
    seqio.TaskRegistry.add(
        "users_task",
        source=source,
        output_features=features,
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )
    try:
        batch = next(feed.train_batches("users_task", LENGTHS, 2, pack=False, shuffle=False))
        vocabulary = features["inputs"].vocabulary
        assert vocabulary.decode(batch["decoder_target_tokens"][0].tolist()) == "blue"
        with pytest.raises(InputError, match="no task of 'users_task' has an evaluation split"):
            feed.eval_batches("users_task", LENGTHS, 2)
    finally:
        seqio.TaskRegistry.remove("users_task")


def test_wrong_arguments_raise_at_once(registered):
    with pytest.raises(InputError, match="'a' has no split 'test' "):
        feed.train_batches("a", LENGTHS, 2, split="test")
    with pytest.raises(InputError, match=r"TASK_FEATURE_LENGTHS\['targets'\] must be a positive"):
        feed.train_batches("a", {"inputs": 8}, 2)
    with pytest.raises(InputError, match="BATCH_SIZE must be a positive integer, got 0"):
        feed.train_batches("a", LENGTHS, 0)
    with pytest.raises(
        InputError, match=r"start\['examples'\] must be an integer of at least 0, got -1"
    ):
        feed.train_batches("a", LENGTHS, 2, start={"examples": -1})


def test_prefetched_position_is_that_of_the_last_batch(registered):
    batches = feed.train_batches("jsonl_train", LENGTHS, 3)
    plain = feed.train_batches("jsonl_train", LENGTHS, 3)
    ahead = prefetch.prefetch(batches, 4)
    assert ahead.position == {"examples": 0}
    for _ in range(6):
        assert_same([next(ahead)], [next(plain)])
        deadline = time.time() + 5
        while not ahead.is_ready and time.time() < deadline:
            time.sleep(0.01)
        assert ahead.position == plain.position != batches.position
    ahead.close()


def test_no_iterator_tunes_itself(registered, users_own, monkeypatch):
    """Its destructor would wait for the tuning thread, up to a minute on one core."""
    import tensorflow as tf

    read, make_iterator = [], tf.data.Dataset.__iter__

    def record(ds):
        read.append(ds.options().autotune.enabled)
        return make_iterator(ds)

    monkeypatch.setattr(tf.data.Dataset, "__iter__", record)
    for name in ("jsonl_train", "a", users_own):
        next(feed.train_batches(name, LENGTHS, 2))
    next(feed.eval_batches("jsonl_train", LENGTHS, 2))
    choices.load_choice_groups("scored_score_eval", LENGTHS)
    for name in ("jsonl_train", "a"):  # as seqio's Evaluator does
        provider = seqio_tasks.get_mixture_or_task(name)
        next(provider.get_dataset(LENGTHS, num_epochs=1).as_numpy_iterator())
    assert len(read) >= 7
    assert set(read) == {False}


def test_dropped_iterator_closes_its_pipeline(registered):
    gc.disable()
    try:
        earlier = set(seqio_import._open_generators)  # held by cycles of other tests
        batches = feed.train_batches("jsonl_train", LENGTHS, 2)
        next(batches)
        (reader,) = set(seqio_import._open_generators) - earlier
        before = weakref.ref(reader)
        del reader, batches
        assert before() is None
    finally:
        gc.enable()
