"""`convert` in all directions, on small runs of every method: outputs are equivalent models."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from methods import (
    ADAPTER,
    CONFIG,
    METHODS,
    example_batch,
    forward,
    largest_difference,
    model,
    model_inputs,
    random_params,
    random_params_of,
)

from pemoe_jax.checkpoints import adapter_file, base_model, models, runs
from pemoe_jax.checkpoints.records import Record, package_versions
from pemoe_jax.core import adapters, network, params, sparse, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse
from pemoe_jax.tools import convert

PLAIN = ("ia3", "lora")
ROUTED = ("mov", "molora")


def write_run(
    folder: pathlib.Path,
    method: str,
    base_path: pathlib.Path,
    transformer: network.Transformer | None = None,
) -> pathlib.Path:
    """Writes a run's checkpoint with random parameters; by default of the method's small model."""
    transformer = transformer or model(method)
    values = random_params_of(transformer)
    trained, frozen = params.split(values, METHODS[method].trainable)
    identity = models.load_base(transformer, str(base_path), 0)[1]
    record = Record(
        method=method,
        trainable=list(METHODS[method].trainable),
        config=transformer.config.as_dict(),
        adapters=adapters.describe(transformer.adapters),
        sparse=sparse.describe(transformer.sparse),
        base={**identity, "needed": bool(frozen)},
        counts={"trainable": params.count(trained), "total": params.count(values)},
        versions=package_versions(),
    )
    write_checkpoint(folder, trained, record)
    return folder


def write_checkpoint(folder: pathlib.Path, trained: dict, record: Record) -> None:
    checkpoints = runs.RunCheckpoints(str(folder))
    checkpoints.save(steps.TrainState.create(trained, optax.sgd(0.1)), record)
    checkpoints.close()


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Returns name -> path of two bases, and of a run of every method on the first base."""
    root = tmp_path_factory.mktemp("convert")
    paths = {name: root / f"{name}.safetensors" for name in ("base", "other")}
    base_model.save_base(paths["base"], random_params("full"), CONFIG.as_dict())
    other = jax.tree.map(lambda leaf: leaf + 0.5, random_params("full"))
    base_model.save_base(paths["other"], other, CONFIG.as_dict())
    return paths | {name: write_run(root / name, name, paths["base"]) for name in METHODS}


def logits(opened: models.OpenedModel) -> np.ndarray:
    method = "full" if opened.record is None else opened.record.method
    described = adapters.describe(opened.model.adapters)
    assert described == adapters.describe(model(method).adapters)
    batch = example_batch()
    out = forward(method)(opened.load(), batch)
    return np.asarray(out)[batch["decoder_target_tokens"] > 0]


def check_same_model(opened: models.OpenedModel, expected: models.OpenedModel) -> None:
    """Checks that two models have the same network and bit for bit the same parameters."""
    assert opened.model.config == expected.model.config
    assert adapters.describe(opened.model.adapters) == adapters.describe(expected.model.adapters)
    arrays, expected_arrays = (params.flatten(m.load()) for m in (opened, expected))
    assert arrays.keys() == expected_arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, expected_arrays[path])


def run(*argv: object) -> int:
    return convert.main([str(part) for part in argv])


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("method", [*PLAIN, *ROUTED])
def test_adapter(paths, tmp_path, capsys, method):
    """The exported adapter opens as the same model, and its configuration describes it."""
    out = tmp_path / "exported"
    assert run("adapter", paths[method], out) == 0
    assert "adapter.safetensors" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
        "run.json",
    ]
    about = json.loads((out / "run.json").read_text())
    assert (about["status"], about["base"]["path"]) == ("finished", str(paths["base"]))
    assert about["source"] == {"path": str(paths[method]), "step": 0}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["method"] == method and "peft_type" not in config
    assert config["adapters"] == adapters.describe(model(method).adapters)
    assert config["base"]["fingerprint"] == base_model.open_base(paths["base"]).fingerprint()
    written = safetensors.numpy.load_file(out / "adapter.safetensors")
    expected = params.flatten(params.split(random_params(method), [ADAPTER])[0])
    assert written.keys() == expected.keys()
    for path, array in written.items():
        np.testing.assert_array_equal(array, expected[path])
    for path in (out, out / "adapter.safetensors"):
        opened = models.open_model(str(path))
        assert opened.name == "exported"
        check_same_model(opened, models.open_model(str(paths[method])))


def test_adapter_of_a_moved_base(paths, tmp_path):
    """The base's new path can be passed; another base is refused."""
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(paths["base"].read_bytes())
    out = tmp_path / "adapter"
    assert run("adapter", paths["mov"], out) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    config["base"]["path"] = "/home/a/colleague/base.safetensors"
    (out / "adapter_config.json").write_text(json.dumps(config))
    message = "belongs to the base /home/a/colleague/base.safetensors, which does not exist: pass"
    with pytest.raises(InputError, match=message):
        models.open_model(str(out))
    assert models.open_model(str(out), str(moved)).load()
    with pytest.raises(InputError, match="belongs to the base /home.*fingerprint"):
        models.open_model(str(out), str(paths["other"])).load()


def test_a_base_with_the_same_fingerprint_and_another_value(paths, tmp_path):
    """A value that the fingerprint does not sample. Earlier versions recorded no checksum."""
    out, changed = tmp_path / "adapter", tmp_path / "changed.safetensors"
    assert run("adapter", paths["mov"], out, f"--base={paths['base']}") == 0
    arrays = safetensors.numpy.load_file(paths["base"])
    arrays["token_embedder/embedding"][0, 1] += 1
    safetensors.numpy.save_file(arrays, changed)
    assert models.open_model(str(out), str(paths["base"])).load()
    with pytest.raises(InputError, match="with checksum .*: some of its values differ"):
        models.open_model(str(out), str(changed)).load()
    config = json.loads((out / "adapter_config.json").read_text())
    del config["base"]["checksum"]
    damage(out, base=config["base"])
    assert models.open_model(str(out), str(changed)).load()


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("direction", ["base", "huggingface"])
def test_merged(paths, tmp_path, method, direction):
    """Merged into the base, the model computes the same function without adapters."""
    out = tmp_path / ("merged.safetensors" if direction == "base" else "merged")
    assert run(direction, paths[method], out) == 0
    merged = models.open_model(str(out))
    assert merged.model.adapters == adapters.Adapters()
    with_adapters = logits(models.open_model(str(paths[method])))
    assert largest_difference(logits(merged), with_adapters) < 2e-6
    plain = logits(models.open_model(str(paths["base"])))
    assert largest_difference(plain, with_adapters) > 0.1


@pytest.mark.parametrize("source", ["base", "full"])
def test_whole_model(paths, tmp_path, source):
    """A base, or a run that trained the whole model, to each format and back: bit for bit."""
    expected = params.flatten(random_params("full"))
    for direction, name in (("huggingface", "hf"), ("base", "own.safetensors")):
        assert run(direction, paths[source], tmp_path / name) == 0
        base = base_model.open_base(tmp_path / name)
        assert base.arrays.keys() == expected.keys()
        for path, array in base.arrays.items():
            np.testing.assert_array_equal(array.read(), expected[path])


T5_1_0 = dataclasses.replace(CONFIG, mlp_activations=("relu",), logits_via_embedding=True)
SWITCH = dataclasses.replace(T5_1_0, num_encoder_layers=2, num_decoder_layers=2)


def save_run(root: pathlib.Path, method: str, config: network.T5Config, experts: Sparse | None):
    """Returns (model, parameters) of a run in `root/run` on a base in `root/base.safetensors`."""
    transformer = network.Transformer(config, METHODS[method].adapters(), experts)
    values = random_params_of(transformer)
    base, path = params.select(values, params.is_base), root / "base.safetensors"
    base_model.save_base(path, base, config.as_dict(), sparse=sparse.describe(experts))
    write_run(root / "run", method, path, transformer)
    return transformer, values


@pytest.mark.parametrize("method", PLAIN)
def test_t5_1_0(tmp_path, method):
    """Merged, or as PEFT's adapter: an MLP without gate, logits by the embedding."""
    transformer, values = save_run(tmp_path, method, T5_1_0, None)
    folder = tmp_path / "run"
    assert run("huggingface", folder, tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["feed_forward_proj"] == "relu" and config["tie_word_embeddings"]
    assert run("peft", folder, tmp_path / "peft") == 0
    names = " ".join(safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert "wi_0" not in names and (".wi." in names) == (method == "lora")
    batch = model_inputs(example_batch())
    expected = apply(transformer, values, batch)
    for source in (tmp_path / "hf", tmp_path / "peft", folder):
        opened = models.open_model(str(source))
        assert opened.model.config == T5_1_0
        assert largest_difference(apply(opened.model, opened.load(), batch), expected) < 2e-6


@pytest.mark.parametrize("method", PLAIN)
def test_a_sparse_base(tmp_path, capsys, method):
    """Adapters of attention and dense MLPs are merged, and the experts kept bit for bit."""
    transformer, values = save_run(tmp_path, method, SWITCH, Sparse(3))
    expert = "encoder/layers_1/mlp/expert/wi/kernel"
    assert not any("layers_1/mlp/" in path for path in params.flatten(values) if "_adap" in path)
    batch = model_inputs(example_batch())
    expected = apply(transformer, values, batch)
    for direction, name in (("huggingface", "hf"), ("base", "own.safetensors")):
        assert run(direction, tmp_path / "run", tmp_path / name) == 0
        opened = models.open_model(str(tmp_path / name))
        assert opened.model.config == SWITCH and opened.model.sparse == Sparse(3)
        loaded = opened.load()
        np.testing.assert_array_equal(
            params.flatten(loaded)[expert], params.flatten(values)[expert]
        )
        assert largest_difference(apply(opened.model, loaded, batch), expected) < 2e-6
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "switch_transformers"
    # Hugging Face's folder to our file and back, also as another dtype.
    assert run("base", tmp_path / "hf", tmp_path / "again.safetensors") == 0
    assert run("huggingface", tmp_path / "again.safetensors", tmp_path / "again") == 0
    first, again = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        for name in ("hf", "again")
    )
    assert first.keys() == again.keys()
    for name, array in first.items():
        assert array.tobytes() == again[name].tobytes(), name
    assert run("huggingface", tmp_path / "hf", tmp_path / "half", "--dtype=bfloat16") == 0
    half = safetensors.numpy.load_file(tmp_path / "half" / "model.safetensors")
    for name, array in half.items():
        np.testing.assert_array_equal(array, first[name].astype(jnp.bfloat16))
    capsys.readouterr()
    assert run("peft", tmp_path / "run", tmp_path / "peft") == 1
    assert "PEFT would adapt the experts as well" in error_line(capsys)


def test_sparse_models_that_transformers_lacks(tmp_path, capsys):
    """Settings of a run, also after it was converted to our own file."""
    save_run(tmp_path, "full", SWITCH, Sparse(3, combine="straight"))
    assert run("base", tmp_path / "run", tmp_path / "own.safetensors") == 0
    capsys.readouterr()
    for source in ("run", "own.safetensors"):
        assert run("huggingface", tmp_path / source, tmp_path / "hf") == 1
        assert "cannot represent COMBINE 'straight' (" in error_line(capsys)


def apply(transformer: network.Transformer, values: dict, batch: dict) -> np.ndarray:
    """Returns the logits of the targets' tokens."""
    return np.asarray(_apply(transformer, values, batch))[batch["decoder_target_tokens"] > 0]


@functools.partial(jax.jit, static_argnums=0)
def _apply(transformer: network.Transformer, values: dict, batch: dict) -> jax.Array:
    return transformer.apply({"params": values}, **batch, enable_dropout=False)


def test_dtype(paths, tmp_path):
    """Merged kernels are rounded once, to the dtype that is passed."""
    half = tmp_path / "half.safetensors"
    assert run("base", paths["base"], half, "--dtype=bfloat16") == 0
    opened = base_model.open_base(half)
    assert {array.dtype for array in opened.arrays.values()} == {jnp.dtype("bfloat16")}
    assert opened.fingerprint() == base_model.open_base(paths["base"]).fingerprint()
    for dtype in ("float32", "float16"):
        out = tmp_path / f"{dtype}.safetensors"
        assert run("base", paths["lora"], out, f"--base={half}", f"--dtype={dtype}") == 0
        merged = base_model.open_base(out).arrays["encoder/layers_0/mlp/wo/kernel"].read()
        flat = params.flatten(random_params("lora"))
        prefix = "encoder/layers_0/mlp/wo"
        kernel = np.asarray(flat[f"{prefix}/kernel"].astype(jnp.bfloat16), np.float32)
        a, b = (np.asarray(flat[f"{prefix}_adapter/lora_{x}"]) for x in "ab")
        expected = kernel + 16 / 4 * (a[:, 0] @ b[0])
        np.testing.assert_allclose(merged, expected.astype(dtype), rtol=1e-3, atol=1e-6)
        assert merged.dtype == dtype


@pytest.mark.parametrize("method", PLAIN)
def test_to_peft_and_back(paths, tmp_path, method):
    """An adapter in PEFT's format, and converted back, has the same arrays."""
    assert run("peft", paths[method], tmp_path / "peft", "--base_name=google/t5") == 0
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "google/t5"
    flags = f"--base={paths['base']}"
    assert run("adapter", tmp_path / "peft", tmp_path / "back", flags) == 0
    arrays, record, _ = adapter_file.open_adapter(tmp_path / "back")
    assert record.method == method
    assert record.base["fingerprint"] == base_model.open_base(paths["base"]).fingerprint()
    expected = params.flatten(params.split(random_params(method), [ADAPTER])[0])
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array.read(), expected[path])
    direct = models.open_model(str(tmp_path / "peft"), str(paths["base"]))
    check_same_model(direct, models.open_model(str(paths[method])))


@pytest.mark.parametrize("method", ROUTED)
def test_routed_adapters_are_not_merged_nor_written_for_peft(paths, tmp_path, capsys, method):
    for direction in ("peft", "base", "huggingface"):
        assert run(direction, paths[method], tmp_path / "out") == 1
        assert "rout" in error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("adapter", "base", "out"), "expected adapters on a frozen base, got a whole model"),
        (("adapter", "full", "out"), "expected adapters on a frozen base, got a whole model"),
        (("peft", "base", "out"), "got a whole model"),
        (("base", "ia3", "out.safetensors", "--base", "other"), "belongs to the base"),
        (("adapter", "ia3", "out", "--base", "other"), "belongs to the base"),
        (("peft", "ia3", "out", "--base", "other"), "belongs to the base"),
        (
            ("huggingface", "base", "out", "--base", "other"),
            "are the two swapped?",
        ),
        (("base", "base", "out"), "OUTPUT must be a .safetensors file"),
        (("huggingface", "base", "out.safetensors"), "OUTPUT must be a folder"),
        (("huggingface", "lora", "out", "--base", "other"), "belongs to the base"),
        (("adapter", "nowhere", "out"), "nowhere: no such file or folder"),
        (("base", "base", "base"), "OUTPUT must be a new path"),
        (("base", "base", "s3://bucket/out"), "OUTPUT must be a local path or gs:"),
    ],
)
def test_refused(paths, tmp_path, capsys, argv, message):
    filled = [
        str(tmp_path / part) if part.startswith("out") else str(paths.get(part, part))
        for part in argv
    ]
    assert run(argv[0], *filled[1:]) == 1
    assert message in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_swapped_paths_are_detected(paths):
    with pytest.raises(InputError, match="lora was passed as the base .*not an adapter"):
        models.open_models(str(paths["base"]), base_path=str(paths["lora"]))


def test_passed_base_is_recorded(paths, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(paths["base"].read_bytes())
    assert run("adapter", paths["mov"], tmp_path / "a", f"--base={moved}") == 0
    assert adapter_file.open_adapter(tmp_path / "a")[1].base["path"] == str(moved)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_nonfinite_values_are_not_written(paths, tmp_path, capsys, value):
    """NaN, and a value that overflows the output dtype."""
    flat = dict(params.flatten(random_params("full")))
    path = "encoder/layers_0/mlp/wo/kernel"
    flat[path] = flat[path].at[0, 0].set(value)
    base_model.save_base(tmp_path / "bad.safetensors", params.unflatten(flat), CONFIG.as_dict())
    for direction, out in (("base", "o.safetensors"), ("huggingface", "o")):
        assert run(direction, tmp_path / "bad.safetensors", tmp_path / out, "--dtype=float16") == 1
        assert f"{path}: NaN or infinity as float16: not written" in error_line(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.safetensors"]


def test_paths_with_tilde(paths, monkeypatch):
    monkeypatch.setenv("HOME", str(paths["mov"].parent))
    assert models.open_model("~/mov").load()
    assert models.open_model("~/base.safetensors").load()


def test_unwritable_output(paths, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("adapter", paths["mov"], tmp_path / "file" / "x") == 1
    assert "file" in error_line(capsys)


def test_adapters_and_base_trained_together_are_merged(paths, tmp_path):
    """With every parameter trained, the merged model needs no base."""
    record = runs.read_record(str(paths["lora"]))
    base = {**record.base, "needed": False}
    record = dataclasses.replace(record, trainable=[".*"], base=base)
    write_checkpoint(tmp_path / "run", random_params("lora"), record)
    assert run("huggingface", tmp_path / "run", tmp_path / "hf") == 0
    merged = logits(models.open_model(str(tmp_path / "hf")))
    assert largest_difference(merged, logits(models.open_model(str(tmp_path / "run")))) < 2e-6


def test_frozen_adapters_are_drawn_again(paths, tmp_path):
    """With frozen routers a checkpoint has the vectors only; the seed reproduces the routers."""
    record = runs.read_record(str(paths["mov"]))
    record = dataclasses.replace(record, trainable=[".*_adapter/vectors"], seed=5)
    vectors = params.select(random_params("mov"), lambda path: path.endswith("vectors"))
    write_checkpoint(tmp_path / "run", vectors, record)
    loaded = params.flatten(models.open_model(str(tmp_path / "run")).load())
    drawn = params.flatten(network.init_params(model("mov"), 5, lambda path: "router" in path))
    assert drawn
    for path, array in drawn.items():
        np.testing.assert_array_equal(loaded[path], array)


def damage(folder: pathlib.Path, **config: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def rewrite(folder: pathlib.Path, change) -> None:
    path = folder / "adapter.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)


def add_nan(arrays: dict) -> None:
    arrays["encoder/layers_0/mlp/gate_adapter/router/kernel"][0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: rewrite(f, add_nan), "gate_adapter/router/kernel holds NaN or infinity"),
        (lambda f: rewrite(f, lambda a: a.popitem()), "1 missing"),
        (lambda f: rewrite(f, lambda a: a.update(x=np.ones(1))), "1 extra: x"),
        (
            lambda f: rewrite(f, lambda a: a.update({next(iter(a)): np.ones((1, 1), np.float32)})),
            "1 of another shape",
        ),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "expected JSON"),
        (lambda f: damage(f, format_version=9), "expected format 'pemoe_jax adapter', version 1"),
        (lambda f: damage(f, adapters={"knee": {}}), "unknown adapter sites"),
        (lambda f: damage(f, adapters={"key": {"kind": "Knee"}}), "unknown adapter kind 'Knee'"),
        (lambda f: damage(f, adapters=3), "adapter_config.json: adapters"),
        (lambda f: damage(f, adapters={"key": 3}), "must be described by an object, got 3"),
        (lambda f: damage(f, adapters={"key": {"kind": "VectorExperts", "router": 3}}), "got 3"),
        (
            lambda f: damage(f, adapters={"key": {"kind": "VectorExperts", "num_experts": 1.5}}),
            "VectorExperts.num_experts must be a positive integer, got 1.5",
        ),
        (lambda f: damage(f, config={"emb_dim": 1.5}), "T5Config.emb_dim must be a positive integ"),
        (lambda f: damage(f, config={"emb": 3}), "the checkpoint's T5Config does not fit .*emb"),
        (lambda f: damage(f, step=None), "adapter_config.json: step"),
    ],
)
def test_damaged_adapters(paths, tmp_path, change, message):
    folder = tmp_path / "adapter"
    assert run("adapter", paths["mov"], folder) == 0
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        models.open_model(str(folder)).load()
    assert "\n" not in str(caught.value)


def test_truncated_adapter(paths, tmp_path):
    assert run("adapter", paths["mov"], tmp_path / "a") == 0
    file = tmp_path / "a" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        models.open_model(str(tmp_path / "a"))


def test_an_adapter_is_no_base(paths, tmp_path):
    assert run("adapter", paths["lora"], tmp_path / "a") == 0
    for path in (tmp_path / "a", tmp_path / "a" / "adapter.safetensors"):
        with pytest.raises(InputError, match="got an adapter"):
            base_model.open_base(path)


def test_a_peft_adapter_is_no_base(tmp_path):
    """A command that accepts adapters names the folder; otherwise only the base is accepted."""
    from pemoe_jax.checkpoints import safetensors_file

    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.encoder.block.0.layer.0.SelfAttention.k.ia3_l"
    safetensors_file.save_file(path, {name: np.ones((4, 1), np.float32)}, {})
    with pytest.raises(InputError, match="is not a base model: pass the base that it adapts"):
        base_model.open_base(path)
    with pytest.raises(InputError, match="^model .*: got a PEFT adapter: pass the folder that it"):
        base_model.open_base(path, "model")


def test_help(capsys):
    """The help text explains each direction."""
    for argv, words in (
        (["--help"], ("adapter", "peft", "huggingface", "base", "T5X", "gs://", "examples:")),
        (["peft", "--help"], ("SOURCE", "OUTPUT", "--base_name", "routers out")),
        (["huggingface", "--help"], ("--dtype", "from_pretrained", "spiece.model")),
    ):
        with pytest.raises(SystemExit) as caught:
            convert.main(argv)
        text = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in text for word in words), text


@pytest.mark.parametrize("argv", [[], ["gguf", "a", "b"], ["adapter", "a"]])
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        convert.main(argv)
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err
