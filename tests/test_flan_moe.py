"""A sparse model end to end: upcycled, trained, stopped and resumed, evaluated and exported."""

import json

import numpy as np
import pytest
from methods import random_params_of
from sparse_models import sparse_model
from test_train import assert_ends_alike, data_flags, train_flags
from test_train import folder as folder  # the fixture

from pemoe_jax import evaluate, infer, train
from pemoe_jax.checkpoints import base_model, models, new_run
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import flatten
from pemoe_jax.core.sparse import Sparse
from pemoe_jax.tools import convert, encoders

LAYERS = {f"network.T5Config.num_{stack}_layers": 2 for stack in ("encoder", "decoder")}
SETTINGS = {
    **{"NUM_EXPERTS": 4, "FREEZE": "router", "UPCYCLE_NOISE": 0.05},
    **{"TRAIN_STEPS": 6, "LOG_PERIOD": 2, "CHECKPOINT_PERIOD": 3},
}


@pytest.fixture(scope="module")
def deep_folder(folder):
    """`folder` with a base of two layers in each stack, a run of which is whole."""
    settings = LAYERS | {"INITIAL_CHECKPOINT_PATH": None, "TRAIN_STEPS": 1}
    assert train.main(train_flags(folder, "full", folder / "deep", **settings)) == 0
    assert convert.main(["base", str(folder / "deep"), str(folder / "deep.safetensors")]) == 0
    return folder


@pytest.mark.slow
def test_a_sparse_model_end_to_end(deep_folder, tmp_path, capsys):
    base = deep_folder / "deep.safetensors"

    def run(name: str, **more: object) -> int:
        settings = LAYERS | SETTINGS | {"INITIAL_CHECKPOINT_PATH": base} | more
        return train.main(train_flags(deep_folder, "flan_st", tmp_path / name, **settings))

    assert run("whole") == 0
    out = capsys.readouterr().out
    assert "upcycled from a dense base: 4 experts in 2 of 4 layers, noise 0.05\n" in out
    assert run("parts", TRAIN_STEPS=3) == 0
    assert run("parts", NUM_EXPERTS=8) == 1
    assert "NUM_EXPERTS 4 -> 8" in capsys.readouterr().err
    assert run("parts", UPCYCLE_NOISE=0.1) == 1
    assert "UPCYCLE_NOISE 0.05 -> 0.1" in capsys.readouterr().err
    assert run("parts") == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "parts")

    opened = models.open_model(str(tmp_path / "whole"))
    start = flatten(models.load_base(opened.model, str(base), 0, upcycle_noise=0.05)[0])
    end = flatten(opened.load())
    is_same = {path: np.array_equal(end[path], array) for path, array in start.items()}
    assert {path for path in start if is_same[path]} == {p for p in start if "/mlp/router/" in p}
    assert opened.trained_arrays.keys() == {path for path in start if not is_same[path]}
    assert params_lib.count(opened.trained_arrays) == opened.record.counts["trainable"]

    # A whole model, whose routers and settings are in its file, scores as the small checkpoint.
    exported = tmp_path / "exported.safetensors"
    assert convert.main(["base", str(tmp_path / "whole"), str(exported)]) == 0
    scores = []
    for path in (tmp_path / "whole", exported):
        output = tmp_path / f"{path.stem}_results"
        flags = ["--gin_file=runs/evaluate.gin", *data_flags(deep_folder)]
        flags += [f"--gin.CHECKPOINT_PATH={path}", f"--gin.EVAL_OUTPUT_DIR={output}"]
        assert evaluate.main(flags) == 0
        files = sorted((output / "predictions").rglob("*.jsonl"))
        scores.append([json.loads(line) for file in files for line in file.open()])
    assert scores[0] == scores[1] and len(scores[0]) > 4
    flags = ["--gin_file=runs/infer.gin", *data_flags(deep_folder), "--text", "a b"]
    assert infer.main([*flags, f"--gin.CHECKPOINT_PATH={exported}"]) == 0


@pytest.fixture(scope="module")
def switch(tmp_path_factory) -> str:
    """A base as Switch Transformers are: a single file that states no settings of its experts."""
    path = tmp_path_factory.mktemp("switch") / "switch.safetensors"
    model = sparse_model(Sparse(4))
    base_model.save_base(path, random_params_of(model), model.config.as_dict())
    return str(path)


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        (Sparse(4), ""),
        (
            Sparse(4, combine="straight"),
            "COMBINE 'probability' (this run: 'straight')|--gin.COMBINE=probability",
        ),
        (
            Sparse(4, top_k=2, combine="normalized"),
            "TOP_K 1 (this run: 2), COMBINE 'probability' (this run: 'normalized')|--gin.TOP_K=1"
            " --gin.COMBINE=probability",
        ),
    ],
)
def test_another_routing_than_that_of_a_base_is_a_warning(switch, capsys, sparse, expected):
    model = sparse_model(sparse)
    assert new_run.take_base_dimensions(model, switch) == model
    settings, _, flags = expected.partition("|")
    warning = (
        f"WARNING: {switch} was trained with {settings}: to start as its function, pass {flags}\n"
    )
    assert capsys.readouterr().out == (warning if expected else "")


def test_noise_without_a_dense_base(switch):
    """It would have no effect."""
    for model, path in ((sparse_model(Sparse(4)), switch), (sparse_model(Sparse(4)), None)):
        with pytest.raises(InputError, match=r"UPCYCLE_NOISE must be 0.0 unless .*, got 0.1$"):
            new_run.take_base_dimensions(model, path, 0.1)


def test_sparse_step_divides_the_layers_of_the_base(switch):
    """Not those of the model file, which the base's replace."""
    model = sparse_model(Sparse(4), num_encoder_layers=3)
    network.param_shapes(new_run.take_base_dimensions(model, switch))


def test_a_sparse_base_for_a_dense_model(switch):
    """Refused for training; sentence embeddings are those of its encoder as it is."""
    dense = sparse_model(None)
    with pytest.raises(InputError, match=r"has 4 experts in one of every 2 layers: pass a method"):
        new_run.take_base_dimensions(dense, switch)
    encoder = encoders.resolve_encoder(encoders.mean_pooled(dense, switch))
    assert encoder.model.sparse == Sparse(4)
