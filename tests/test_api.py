"""The Python API on the quickstart's base, with small random adapters."""

import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import pemoe_jax
from pemoe_jax.api import loaded_model
from pemoe_jax.api import model as api_model
from pemoe_jax.checkpoints import adapter_file, base_model, export, models, runs
from pemoe_jax.core import adapters, decoding, network, params, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router
from pemoe_jax.core.sparse import Sparse, describe
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks.tokenizer import SentencePieceTokenizer, open_tokenizer

REPO = pathlib.Path(__file__).parent.parent
BASE = str(REPO / "tasks/quickstart/base.safetensors")
VOCAB = str(REPO / "tasks/quickstart/vocab.model")
TEXTS = ["Did they like it? It was fun.", "What is the subject of this text? " * 6, "Why?"]
CHOICES = [["yes", "no"], ["farming", "sailing", "a school", "sport"], ["because"]]


@functools.cache
def base_identity() -> dict:
    return {"path": BASE, "seed": None, "needed": True, **opened_base().identity("float32")}


@functools.cache
def opened_base() -> base_model.BaseModel:
    return base_model.open_base(BASE)


def make_network(method: str, **config) -> network.Transformer:
    experts = {"num_experts": 3, "router": Router} if method in ("mov", "molora") else {}
    if method == "full":
        factory, sites = None, ()
    elif method in ("ia3", "mov"):
        factory, sites = functools.partial(adapters.VectorExperts, **experts), ("key", "value")
        sites += ("gate",)
    else:
        factory, sites = functools.partial(adapters.LoRAExperts, **experts), ("query", "wo")
    t5_config = network.T5Config(**{**opened_base().config(), **config})
    return network.Transformer(t5_config, adapters.Adapters(**dict.fromkeys(sites, factory)))


def write_adapter(
    folder: pathlib.Path, method: str, seed: int, vocabulary: str | None = None, **base
) -> str:
    """Writes an adapter of random values with which the model's answers change."""
    model = make_network(method, dropout_rate=0.1 * (seed % 2))
    shapes = params.flatten(network.param_shapes(model, params.is_adapter))
    rng = np.random.default_rng(seed)
    arrays = {
        path: (rng.normal(size=leaf.shape) * 0.3 + path.endswith("vectors")).astype(np.float32)
        for path, leaf in shapes.items()
    }
    record = runs.Record(
        method=method,
        trainable=[params.ADAPTER_PATTERN],
        config=model.config.as_dict(),
        adapters=adapters.describe(model.adapters),
        base={**base_identity(), **base},
        counts={"trainable": 1, "total": 2},
        versions={},
        vocabulary=vocabulary,
    )
    path = folder / f"{method}_{seed}"
    adapter_file.save_adapter(path, arrays, record, step=1)
    return str(path)


def write_run(
    folder: pathlib.Path,
    method: str,
    trainable: list[str],
    base: str | None,
    sparse: Sparse | None = None,
    seed: int = 0,
) -> str:
    """Writes the first checkpoint of a run; returns the run's folder."""
    model = make_network(method).clone(sparse=sparse)
    values, identity = models.load_base(model, base, seed)
    values = params.merge(values, network.init_params(model, 0, params.is_adapter))
    trained, frozen = params.split(values, trainable)
    record = runs.Record(
        method=method,
        trainable=trainable,
        config=model.config.as_dict(),
        adapters=adapters.describe(model.adapters),
        sparse=describe(model.sparse),
        base={**identity, "needed": bool(frozen)},
        counts={"trainable": 1, "total": 2},
        versions={},
    )
    checkpoints = runs.RunCheckpoints(str(folder))
    checkpoints.save(steps.TrainState.create(trained, optax.sgd(0.1)), record)
    checkpoints.close()
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def mov(folder) -> str:
    return write_adapter(folder, "mov", 0)


@pytest.fixture(scope="module")
def model(mov) -> pemoe_jax.Model:
    return pemoe_jax.load_model(BASE, adapter=mov, vocabulary=VOCAB)


def scores(ranked) -> np.ndarray:
    return np.array([choice.log_prob for row in ranked for choice in row])


def test_import_is_light():
    """Importing the package imports nothing; loading and scoring import neither TensorFlow nor
    seqio."""
    code = (
        "import sys, time; start = time.process_time(); import pemoe_jax, pemoe_jax as package\n"
        "assert time.process_time() - start < 0.3, time.process_time() - start\n"
        "assert not {'jax', 'numpy'} & sys.modules.keys()\n"
        "assert set(pemoe_jax.__all__) <= set(dir(pemoe_jax))\n"
        f"model = pemoe_jax.load_model({BASE!r}, vocabulary={VOCAB!r})\n"
        "assert len(model.rank('Did they like it?', ['yes', 'no'])) == 2\n"
        "assert isinstance(model.generate('Why?', 2), str)\n"
        "assert not {'seqio', 'tensorflow', 'matplotlib', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr


def test_scores_and_routing_are_those_of_the_commands(model, tmp_path):
    """Of `pemoe evaluate` and `pemoe routes`, from their tokens on."""
    from pemoe_jax.analysis.routing import measure
    from pemoe_jax.analysis.zero_shot import rank_classification
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import choices
    from pemoe_jax.tasks import jsonl

    jsonl.register(REPO / "docs/my_prompts", VOCAB, eval_tasks=["reviews_liked", "titles_choose"])
    groups = choices.load_choice_groups("jsonl_score_eval", {"inputs": 128, "targets": 16})[::9]
    ranked = model.rank([g.input_text for g in groups], [g.choice_texts for g in groups])
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    opened = models.open_models(model.adapter, base_path=BASE)[0]
    weights = opened.load()
    expected = rank_classification.score_groups(opened.model, weights, groups, 32, mesh)
    for group, row in zip(groups, ranked, strict=True):
        assert row[0].choice == group.choice_texts[expected[group].best]
        by_choice = [dict(row)[choice] for choice in group.choice_texts]
        np.testing.assert_allclose(by_choice, expected[group].scores, rtol=2e-5)
        assert [choice.log_prob for choice in row] == sorted(by_choice, reverse=True)

    few = [measure.keep_correct_choice(group) for group in groups[:3]]
    totals = measure.measure_examples(opened.model, weights, {"task": few}, 2, mesh)
    texts, targets = [g.input_text for g in few], [g.choice_texts[0] for g in few]
    routing = model.routing(texts, targets)
    assert sorted(routing) == sorted(totals.probs)
    for site, probs in routing.items():
        sums = totals.probs[site]
        np.testing.assert_allclose(probs, sums / sums.sum(-1, keepdims=True), atol=1e-5)


def test_routing_without_targets(model):
    one = model.routing(TEXTS[0])
    several = model.routing(TEXTS)
    assert one["encoder/layers_0/mlp/gate"].shape == (3,)
    assert not any(site.endswith("self_attention/key") for site in one)
    for site, probs in one.items():
        np.testing.assert_allclose(several[site].sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(probs, several[site][0], atol=1e-5)


def test_results_do_not_depend_on_the_batch(model):
    together = model.rank(TEXTS, CHOICES)
    alone = [model.rank(text, row) for text, row in zip(TEXTS, CHOICES, strict=True)]
    assert [[c.choice for c in row] for row in together] == [[c.choice for c in r] for r in alone]
    np.testing.assert_allclose(scores(together), scores(alone), rtol=2e-5)
    assert model.generate(TEXTS, 6) == [model.generate(text, 6) for text in TEXTS]
    shared = model.rank(TEXTS, ["yes", "no"])
    assert [{c.choice for c in row} for row in shared] == [{"yes", "no"}] * 3


def test_scores_are_in_order_and_say_what_is_generated():
    base = pemoe_jax.load_model(BASE, vocabulary=VOCAB)
    text = "What is a good title for this text? The rain fell on the harbour."
    answer = base.generate(text, 16)
    choices = ["yes", answer, f"{answer} no"]
    (row,) = base.score([text], [choices])
    assert [is_greedy for _, is_greedy in row] == [False, True, False]
    ranked = dict(base.rank(text, choices))
    assert [log_prob for log_prob, _ in row] == pytest.approx([ranked[c] for c in choices])
    with pytest.raises(InputError, match="texts must be a list of texts, got 3"):
        base.score(3, ["yes"])


def test_programs_are_shared_by_lengths(model):
    """Texts of 1 to 30 words, in calls of 1 to 4 texts, need a program for few shapes."""
    before = api_model._score_choices()._cache_size(), decoding.greedy_decode._cache_size()
    for count in (1, 3, 4):
        for words in (1, 8, 9, 15, 22):
            texts = ["word " * (words + extra) for extra in range(count)]
            model.rank(texts, ["yes", "no"])
    model.generate(["a"] * 3, 3)
    model.generate(["a b c", "d", "e", "f"], 3)
    after = api_model._score_choices()._cache_size(), decoding.greedy_decode._cache_size()
    assert after[0] - before[0] <= 4 and after[1] - before[1] == 1


def test_set_adapter(model, mov, folder):
    """Another adapter of the same method needs no other program; None is the base alone."""
    other = write_adapter(folder, "mov", 1)  # of another dropout rate
    lora = write_adapter(folder, "lora", 2)
    first = model.rank(TEXTS, CHOICES), model.generate(TEXTS, 6)
    caches = api_model._score_choices(), decoding.greedy_decode
    before = [cache._cache_size() for cache in caches]
    base = model._loaded.base
    try:
        model.set_adapter(other)
        second = model.rank(TEXTS, CHOICES), model.generate(TEXTS, 6)
        assert [cache._cache_size() for cache in caches] == before
        assert model.adapter == other
        assert np.abs(scores(first[0]) - scores(second[0])).max() > 0.01
        for adapter in (other, lora, None):
            model.set_adapter(adapter)
            assert model._loaded.base is base
            loaded = pemoe_jax.load_model(BASE, adapter=adapter, vocabulary=VOCAB)
            np.testing.assert_array_equal(
                scores(model.rank(TEXTS, CHOICES)), scores(loaded.rank(TEXTS, CHOICES))
            )
        with pytest.raises(InputError, match=f"{BASE}: expected a method with routers, got none"):
            model.routing("a text")
    finally:
        model.set_adapter(mov)
    np.testing.assert_array_equal(scores(model.rank(TEXTS, CHOICES)), scores(first[0]))


@pytest.mark.parametrize(
    ("method", "options"), [("mov", {"num_beams": 2}), ("lora", {"do_sample": True, "top_k": 9})]
)
def test_adapters_of_one_batch(folder, method, options):
    """Each row's result is that of its adapter alone, also in a batch with a filling row."""
    first, second = (write_adapter(folder, method, seed) for seed in (10, 11))
    model = pemoe_jax.load_model(BASE, vocabulary=VOCAB)
    adapters = [second, first, second]
    together = model.rank(TEXTS, CHOICES, adapter=adapters)
    answers = model.generate(TEXTS, 4, adapter=adapters, **options)
    own_scores = []
    for adapter in (first, second):
        model.set_adapter(adapter)
        alone, own = model.rank(TEXTS, CHOICES), model.generate(TEXTS, 4, **options)
        for row in (row for row, name in enumerate(adapters) if name == adapter):
            np.testing.assert_allclose(scores([together[row]]), scores([alone[row]]), rtol=1e-4)
            assert answers[row] == own[row]
        own_scores.append(scores(alone))
    assert np.abs(own_scores[0] - own_scores[1]).max() > 0.01
    with pytest.raises(InputError, match="adapter must be a list of 3 paths, one for each text"):
        model.rank(TEXTS, CHOICES, adapter=[first])
    with pytest.raises(InputError, match="adapter must be a list of paths, got"):
        model.rank(TEXTS, CHOICES, adapter=[first, None, second])
    other = write_adapter(folder, "ia3", {"mov": 12, "lora": 13}[method])
    with pytest.raises(InputError, match="list of adapters of the same method and settings"):
        model.generate(TEXTS[:2], 4, adapter=[first, other])


def test_adapters_that_were_used_last_stay_in_memory(model, folder, monkeypatch):
    first, second, third = adapters = [write_adapter(folder, "mov", seed) for seed in (20, 21, 22)]
    loaded, read = model._loaded, []
    load_adapter = loaded._load_adapter
    monkeypatch.setattr(
        loaded, "_load_adapter", lambda name: read.append(name) or load_adapter(name)
    )
    monkeypatch.setattr(loaded, "_adapters", {})
    monkeypatch.setattr(loaded_model, "MAX_ADAPTERS", 2)
    for name in (first, second, first, third, first, second):
        loaded.select_adapters([name], 1)
    assert read == [first, second, third, second]
    assert len(jax.tree.leaves(loaded.select_adapters(adapters, 3).params)[0]) == 3
    assert list(loaded._adapters) == [second, third]


def test_an_adapter_of_another_base_is_refused(model, mov, folder):
    other = write_adapter(folder, "mov", 3, fingerprint="0123456789abcdef")
    message = f"checkpoint {other} belongs to the base .* has .*: pass the base that"
    with pytest.raises(pemoe_jax.InputError, match=message):
        model.set_adapter(other)
    with pytest.raises(
        pemoe_jax.InputError, match="^model or adapter none: no such file or folder"
    ):
        model.set_adapter("none")
    assert model.adapter == mov and model.rank("a", ["b"])
    with pytest.raises(pemoe_jax.InputError, match=message):
        pemoe_jax.load_model(BASE, adapter=other, vocabulary=VOCAB)


def test_an_adapter_alone_names_its_base(model, mov):
    loaded = pemoe_jax.load_model(mov, vocabulary=VOCAB)
    assert (loaded.path, loaded.adapter) == (BASE, mov)
    np.testing.assert_array_equal(
        scores(loaded.rank(TEXTS, CHOICES)), scores(model.rank(TEXTS, CHOICES))
    )


@pytest.mark.parametrize(
    ("method", "trainable", "base", "expected"),
    [
        ("full", [".*"], BASE, "RUN"),
        ("full", [".*"], None, "RUN"),
        ("mov", [".*"], BASE, "RUN"),
        ("mov", [".*"], None, "RUN"),
        ("mov", [params.ADAPTER_PATTERN], BASE, "BASE with adapter RUN"),
        ("mov", [params.ADAPTER_PATTERN], None, "random base with adapter RUN"),
        ("mov", [params.ADAPTER_PATTERN, ".*norm/scale"], BASE, "BASE with adapter RUN"),
        ("full", [".*norm/scale"], BASE, "BASE with adapter RUN"),
        ("full", [".*norm/scale"], None, "random base with adapter RUN"),
    ],
    ids=[
        *("full", "full_random", "mov_and_base", "mov_and_random", "mov", "mov_on_random"),
        *("mov_and_norms", "norms", "norms_of_random"),
    ],
)
def test_paths_of_a_run(tmp_path, mov, method, trainable, base, expected):
    """A run that trained everything is the model itself; of another, `path` is its base.

    Adapters can be set on the first without adapters, and on the base of a run of adapters alone.
    """
    run = write_run(tmp_path / "run", method, trainable, base)
    loaded = pemoe_jax.load_model(run, vocabulary=VOCAB)
    assert f"{loaded}".replace(run, "RUN").replace(BASE, "BASE") == expected
    is_whole = trainable == [".*"]
    assert loaded.path == (run if is_whole else base)
    assert loaded.adapter == (None if is_whole else run)
    if (method == "full" and is_whole) or trainable == [params.ADAPTER_PATTERN]:
        loaded.set_adapter(None)
        assert (loaded.path, loaded.adapter) == (run if is_whole else base, None)
        if base is None:  # otherwise it has the values of BASE, on which `mov` was trained
            name = run if is_whole else "the random base"
            message = f"{mov} belongs to the base {BASE} with .*; {name} has"
            with pytest.raises(InputError, match=message):
                loaded.set_adapter(mov)
        else:
            loaded.set_adapter(mov)
            assert loaded.adapter == mov
    else:
        reason = "has adapters" if is_whole else "saves only what it trained"
        with pytest.raises(InputError, match=f"got one of method '{method}', which {reason}"):
            base_model.open_base(run)
        for adapter in (mov, None):
            with pytest.raises(InputError, match=f"^{run} trained parameters of its base: load a"):
                loaded.set_adapter(adapter)


def test_only_adapters_can_be_set(tmp_path, mov):
    """The message says what the path is instead; the model keeps its adapter."""
    run = write_run(tmp_path / "run", "full", [".*norm/scale"], BASE)
    on_base = pemoe_jax.load_model(BASE, mov, VOCAB)
    on_random = pemoe_jax.load_model(
        write_run(tmp_path / "random", "mov", [params.ADAPTER_PATTERN], None), vocabulary=VOCAB
    )
    for loaded, path, message in (
        (on_base, run, f"{run} must be an adapter, got a run that trained parameters of its base"),
        (on_random, BASE, f"{BASE} must be an adapter, got a base"),
        (on_base, BASE, f"the model to open is not an adapter: {BASE}"),
    ):
        before = f"{loaded}"
        with pytest.raises(InputError, match=message):
            loaded.set_adapter(path)
        assert f"{loaded}" == before


def test_adapters_of_an_upcycled_base(tmp_path, mov):
    """The routers of upcycling are drawn by the run's seed: another run's adapter is refused."""
    sparse = Sparse(num_experts=2, sparse_step=2)
    first, same, other = (
        write_run(tmp_path / name, "mov", [params.ADAPTER_PATTERN], BASE, sparse, seed)
        for name, seed in (("first", 0), ("same", 0), ("other", 1))
    )
    loaded = pemoe_jax.load_model(first, vocabulary=VOCAB)
    loaded.set_adapter(same)
    message = f"{other} belongs to the base {BASE} with upcycled .*'seed': 1.*; {BASE} has .*: 0"
    with pytest.raises(InputError, match=message):
        loaded.set_adapter(other)
    assert (loaded.path, loaded.adapter) == (BASE, same)
    for model, adapter in ((loaded, mov), (pemoe_jax.load_model(BASE, vocabulary=VOCAB), first)):
        with pytest.raises(InputError, match=f"checkpoint {adapter} and its base"):
            model.set_adapter(adapter)


def test_vocabularies(tmp_path, monkeypatch):
    """`spiece.model` beside a base is found; otherwise one line asks for the vocabulary."""
    monkeypatch.delenv("PEMOE_VOCAB_PATH", raising=False)
    export.write_huggingface(models.open_model(BASE), tmp_path / "hf", None)
    assert not (tmp_path / "hf/spiece.model").exists()
    shutil.copy(VOCAB, tmp_path / "hf/spiece.model")
    export.write_huggingface(models.open_model(str(tmp_path / "hf")), tmp_path / "copy", None)
    assert (tmp_path / "copy/spiece.model").read_bytes() == pathlib.Path(VOCAB).read_bytes()
    loaded = pemoe_jax.load_model(tmp_path / "hf")
    np.testing.assert_allclose(
        scores([loaded.rank(TEXTS[0], CHOICES[0])]),
        scores([pemoe_jax.load_model(BASE, vocabulary=VOCAB).rank(TEXTS[0], CHOICES[0])]),
        rtol=1e-5,
    )
    with pytest.raises(InputError, match="vocabulary must be .* got None, and .* has no spiece"):
        pemoe_jax.load_model(BASE)
    by_folder = pemoe_jax.load_model(BASE, vocabulary=tmp_path / "hf")
    assert by_folder.tokenizer.encode(TEXTS[0]) == loaded.tokenizer.encode(TEXTS[0])
    with pytest.raises(InputError, match="^vocabulary must be .* got no file at"):
        pemoe_jax.load_model(BASE, vocabulary=tmp_path / "none.model")
    with pytest.raises(InputError, match="^vocabulary must be .* got a folder at"):
        pemoe_jax.load_model(BASE, vocabulary=tmp_path)
    with pytest.raises(InputError, match="vocabulary must be a SentencePiece file"):
        pemoe_jax.load_model(BASE, vocabulary=7)
    monkeypatch.setenv("PEMOE_VOCAB_PATH", VOCAB)
    assert pemoe_jax.load_model(BASE).tokenizer.decode([]) == ""


def test_a_tokenizer_of_transformers(tmp_path):
    """It is accepted by an adapter of the same pieces, and by no other one."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(VOCAB, tmp_path / "spiece.model")
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    empty = transformers.T5Tokenizer()
    vocabulary = seqio_tasks.fingerprint_vocabulary(open_tokenizer(VOCAB))
    mov = write_adapter(tmp_path, "mov", 0, vocabulary=vocabulary)
    loaded = pemoe_jax.load_model(BASE, mov, tokenizer)
    expected = pemoe_jax.load_model(BASE, mov, VOCAB)
    np.testing.assert_array_equal(
        scores([loaded.rank(TEXTS[0], CHOICES[0])]), scores([expected.rank(TEXTS[0], CHOICES[0])])
    )
    loaded.set_adapter(mov)
    message = rf"^vocabulary must be .* {mov} .* {vocabulary}\), got one"
    with pytest.raises(InputError, match=message):
        pemoe_jax.load_model(BASE, mov, empty)


def test_wrong_arguments_are_one_line(model):
    for call, message in (
        (
            lambda: model.rank("a", []),
            r"choices of a text must be a list of at least one text, got \[\]",
        ),
        (lambda: model.rank("a", "yes"), "choices of a text must be a list of .*, got 'yes'"),
        (lambda: model.rank(["a", "b"], [["c"]]), "choices must have a list for each of 2 texts"),
        (lambda: model.rank([3], ["c"]), r"texts must be a list of texts, got \[3\]"),
        # A string is not a list of its characters.
        (lambda: model.score("ab", [["c"], ["d"]]), "texts must be a list of texts, got 'ab'"),
        (lambda: model.rank(["a", "b"], "cd"), "choices of a text must be a list .*, got 'cd'"),
        (lambda: model.rank(["a"], ["b"], "mov"), "adapter must be a list of paths, got 'mov'"),
        (lambda: model.routing(["a", "b"], "cd"), "targets must be a list of texts, got 'cd'"),
        (lambda: model.routing("a", ["b"]), r"targets of a text must be a text, got \['b'\]"),
        (lambda: model.generate("a\ud800", 1), "texts must be encodable as UTF-8"),
        (lambda: model.generate("a", 0), "max_new_tokens must be a positive integer, got 0"),
        (lambda: model.generate("a", 1, do_sample=True, top_p=0), r"top_p must be in \(0, 1\]"),
        (lambda: model.routing(["a"], ["b", "c"]), "targets must be a list of 1 text, .*, got 2"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_long_texts_are_truncated_with_a_warning(mov):
    short = pemoe_jax.load_model(BASE, mov, VOCAB, max_input_tokens=8, max_target_tokens=3)
    with pytest.warns(
        UserWarning, match=r"1 of 2 texts truncated to 8 tokens \(max_input_tokens\)"
    ) as warned:
        short.generate(["word " * 30, "a"], 2)
    assert warned[0].filename == __file__
    with pytest.warns(
        UserWarning, match=r"1 of 2 choices truncated to 3 tokens \(max_target_tokens\)"
    ):
        short.rank("a", ["a long choice of words", "a"])


def test_the_examples_of_the_docs(tmp_path, monkeypatch):
    """Every example of docs/python.md runs, without unknown tokens; the last but one fine-tunes."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) == 9
    (tmp_path / "tasks").symlink_to(REPO / "tasks")
    (tmp_path / "quickstart").mkdir()
    pathlib.Path(write_adapter(tmp_path, "mov", 0)).rename(tmp_path / "quickstart/mov")
    monkeypatch.chdir(tmp_path)
    encoded: dict = {}
    encode = SentencePieceTokenizer.encode
    record = lambda tokenizer, text: encoded.setdefault(text, encode(tokenizer, text))  # noqa: E731
    monkeypatch.setattr(SentencePieceTokenizer, "encode", record)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(encoded) > 8
    assert not [text for text, ids in encoded.items() if 2 in ids]
    assert not [row for row in names["rows"] if 2 in names["model"].tokenizer.encode(row["inputs"])]
    assert names["ranked"][0].log_prob > names["ranked"][1].log_prob
    assert len(names["answers"]) == 1 and isinstance(names["sample"], str)
    assert names["probs"]["encoder/layers_0/mlp/gate"].shape == (3,)
    run = tmp_path / "my_run"
    assert (run / "checkpoint_4").is_dir()
    tuned = names["tuned"]
    assert tuned.adapter == names["folder"] == "my_run", "and its VOCAB_PATH was found"
    assert tuned.routing("a")["encoder/layers_0/mlp/gate"].shape == (10,)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    # It resumes as the command does: nothing may change that makes it another run.
    with pytest.raises(pemoe_jax.InputError, match="SEED|seed"):
        pemoe_jax.finetune(
            *(BASE, "mov", names["rows"], "my_run"),
            **{"vocabulary": VOCAB, "train_steps": 5, "batch_size": 2, "seed": 3},
            task_feature_lengths={"inputs": 32, "targets": 8},
        )


def test_errors_of_finetune_are_those_of_the_command(tmp_path):
    rows, steps = [{"inputs": "a word", "targets": "yes"}], {"train_steps": 1}
    for train, options, message in (
        (rows, {}, "^train_steps is not set: pass train_steps="),
        (rows, steps | {"train_step": 4}, "--gin.TRAIN_STEP: no gin file has a macro of this name"),
        (rows, {"train_steps": "x"}, "TRAIN_STEPS must be"),
        (rows, steps | {"routing": "none"}, "routing/none.gin"),
        ([3], steps, r"train must be a list of rows \(mappings .*\), got \[3\]: 'int' object"),
        ([""], steps, "train must be a list of rows .*: 'str' object"),
        ([[("inputs", "a")]], steps, "train must be a list of rows .*: 'list' object"),
        (rows, steps | {"validation": "folder"}, "validation must be a list of rows .*: 'str'"),
        (rows, steps | {"validation": tmp_path}, "validation must be a list of rows .* iterable"),
        (rows, {"gin_files": "x.gin"}, "gin_files must be a list of paths, got 'x.gin'"),
        (tmp_path, {"validation": rows}, "validation must be None if train is a folder"),
        (rows, {"vocabulary": object()}, "^vocabulary must be a SentencePiece file .* a object: "),
        (rows, {"vocabulary": tmp_path}, "^vocabulary must be .* got a folder at "),
    ):
        options = {"vocabulary": VOCAB, **options}
        with pytest.raises(InputError, match=message):
            pemoe_jax.finetune(BASE, "mov", train, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
