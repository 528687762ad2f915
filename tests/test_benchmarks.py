"""The benchmarks: their arithmetic by hand, and each script on a tiny model."""

import dataclasses
import json
import os
import pathlib
import runpy
import sys
from unittest import mock

import numpy as np
import pytest
import sparse_models

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_ratios_are_paired_by_round():
    import common

    # 2/1, 3/3, 8/2, 9/3, 10/2 = 2, 1, 4, 3, 5
    assert common.paired_ratios([2, 3, 8, 9, 10], [1, 3, 2, 3, 2]) == (2, 3, 4)
    assert common.quartiles([7.0]) == (7, 7, 7)


def test_dimensions_come_from_the_gin_file():
    import common

    assert common.dimensions("large") == {
        "emb_dim": 1024,
        "num_heads": 16,
        "num_encoder_layers": 24,
        "num_decoder_layers": 24,
        "head_dim": 64,
        "mlp_dim": 2816,
    }


def test_sides_alternate_in_rotating_order():
    import workers

    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    sides, other_load = workers.alternate_functions(functions, rounds=2)
    assert calls == ["a", "b", "c", "b", "c", "a"]
    assert [len(side.times) for side in sides] == [2, 2, 2]
    assert other_load >= 0  # /proc/stat is too coarse for more in so short a time


def test_ratios_of_steps_of_different_size_are_per_token():
    import common
    import workers

    ours = workers.Side("ours", info={"tokens": 200}, times=[(4.0, 8.0)])
    peer = workers.Side("peer", info={"tokens": 100}, times=[(1.0, 1.0)])
    row = common.make_row("x", ours, peer, other_load=0.0)
    assert row["ratio"] == (2, 2, 2)  # 4/200 over 1/100
    assert row["cpu ratio"] == (4, 4, 4)


SPEC = {
    "dimensions": {
        "emb_dim": 4,
        "num_heads": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "head_dim": 3,
        "mlp_dim": 5,
    },
    "method": "ia3",
}


def test_floor_of_a_training_step():
    import floors
    import ours

    from pemoe_jax.core import network, params

    model = ours.make_model(SPEC)
    shapes = params.flatten(network.param_shapes(model))
    trainable = {path for path in shapes if params.is_adapter(path)}
    floor = floors.train_step_floor(model, shapes, trainable, 2, (7, 3))
    # V = 32128, D = 4, H·K = 6, F = 5; tokens: 14 of inputs, 6 of targets.
    # The four matrices [4, 6] of an attention have 96 numbers, the three [4, 5] of an MLP 60. The
    # keys and values of the decoder's cross-attention, 48, process the inputs. Products:
    # 14·(96 + 60 + 48) + 6·(96 + 48 + 60 + 32128·4) = 2856 + 772296
    products = 775_152
    # attention: pairs 2·(7·7 + 3·3 + 3·7) = 158, two products of 6 each: 4·158·6
    attention = 3_792
    assert floor["flops"] == 2 * 2 * products + 3 * attention
    # Bytes, float32: all base parameters, except the embedding: 20 rows are read and written
    norms = (2 + 3 + 2) * 4  # in layers, and at the end of each stack
    biases = 2 * 2 * 32
    once = 96 + 60 + 96 + 96 + 60 + 32128 * 4 + norms + biases
    # inputs and outputs of each matrix per token, twice: [4, 6] and [6, 4] 10, [4, 5] and [5, 4] 9
    through = 14 * (4 * 10 + 3 * 9 + 2 * 10) + 6 * (4 * 10 + 2 * 10 + 3 * 9 + 4)
    # vectors: keys and values of 6 in three attentions, two gates of 5; moved 2 + 8 times
    vectors = 3 * 2 * 6 + 2 * 5
    looked_up = 20 * 4
    assert floor["bytes"] == 4 * (2 * once + 2 * through + 10 * vectors + 2 * looked_up)


def test_floors_of_experts_and_tied_logits():
    """One expert a token costs the products of the dense model, and the weights of all experts."""
    import floors

    from pemoe_jax.core import network, params

    shape = {"logits_via_embedding": True, "mlp_activations": ("relu",)}
    sparse = sparse_models.sparse_model(sparse_models.ROUTINGS["switch"], **shape)
    step, score = [], []
    for model in (sparse.clone(sparse=None), sparse):
        shapes = params.flatten(network.param_shapes(model))
        step.append(floors.train_step_floor(model, shapes, set(), 2, (8, 4)))
        score.append(floors.scoring_floor(model, shapes, 2, 3, (8, 4)))
    # D = 16, F = 20, E = 4, V = 32; a router [16, 4] in each stack
    router = 16 * 4
    assert step[1]["flops"] - step[0]["flops"] == 4 * router * (16 + 8)
    assert score[1]["flops"] - score[0]["flops"] == 2 * router * (16 + 24)
    weights = 3 * 2 * (2 * 16 * 20) + 2 * router
    moved = 4 * (weights + (16 + 24) * (16 + 4))
    assert score[1]["bytes"] - score[0]["bytes"] == moved
    # The logits of 24 target tokens: 32 · 16 products each, the matrix, and the tokens' rows.
    untied = sparse.clone(config=dataclasses.replace(sparse.config, logits_via_embedding=False))
    shapes = params.flatten(network.param_shapes(untied))
    assert floors.scoring_floor(untied, shapes, 2, 3, (8, 4)) == score[1]


def test_floor_time_is_the_larger_time_at_the_best_rates():
    import floors

    slow, fast = {"flops": 10, "bytes": 4}, {"flops": 20, "bytes": 2}
    floor = floors.floor_time({"flops": 100, "bytes": 40}, slow, fast)
    assert floor["seconds"] == 10  # 40 / 4, more than 100 / 20


def test_missed_and_missing_rows_are_marked():
    import results

    by_name = {row.name: row for row in results.ROWS}
    row = by_name["mov_against_ia3/cpu"]
    measured = {
        "ratio": [1.2, 1.3, 1.4],
        "ours": {"seconds": 1.3, "peak": 3e9, "before": 1e9, "temporaries": 5e8},
        "peer": {"seconds": 1.0, "peak": 2e9},
        "floor": {"seconds": 0.5},
    }
    line = results.format_line(row, measured)
    assert "time 1.3 (1.2–1.4), **missed**" in line
    assert "| 1.3 s | 1 s | 500 ms | 2.00 + 1.00 GB<br>T 500 MB | 2.00 GB |" in line
    assert "missed" not in results.format_line(row, {**measured, "ratio": [1.1, 1.2, 1.3]})
    measured["ratio"] = [0.2, 0.25, 0.5]
    speed = results.format_line(by_name["score_choices/cpu passes"], measured)
    assert "speed 4 (2–5) |" in speed
    assert "not measured |" in results.format_line(row, None)
    assert "needs a GPU" in results.format_line(by_name["xxl_on_one_gpu/gpu"], None)


def test_results_file_is_up_to_date():
    import results

    committed = (FOLDER / "RESULTS.md").read_text()
    results.main()
    generated = (FOLDER / "RESULTS.md").read_text()
    (FOLDER / "RESULTS.md").write_text(committed)
    assert generated == committed, "run python benchmarks/results.py"


def test_packed_rows_hold_four_examples():
    import ours

    batch = ours.random_batch(2, (8, 4), packed=True)
    np.testing.assert_array_equal(batch["encoder_segment_ids"][1], [1, 1, 2, 2, 3, 3, 4, 4])
    np.testing.assert_array_equal(batch["encoder_positions"][1], [0, 1, 0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(batch["decoder_segment_ids"][0], [1, 2, 3, 4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "rows"),
    [
        ("mov_against_ia3", "--size tiny", ["mov_against_ia3/cpu"]),
        (
            "molora_formulation",
            "--experts 3 --shape 2 4 8",
            ["molora_formulation/cpu D to D", "molora_formulation/cpu D to 2D"],
        ),
        (
            "mov_layer",
            "--experts 3 --rows 1",
            [f"mov_layer/cpu {s} {p}" for s in ("gate", "key") for p in ("forward", "both")],
        ),
        (
            "score_choices",
            "--size tiny --inputs 2 --choices 3 --lengths 8 4 --torch /nowhere",
            ["score_choices/cpu passes"],
        ),
        (
            "api_rank",
            "--size tiny --inputs 2 --choices 3",
            ["api_rank/cpu", "api_rank/cpu first answer"],
        ),
        ("gpu_throughput", "--size tiny --methods mov --rows 2", ["gpu_throughput/trial mov"]),
        (
            "xxl_on_one_gpu",
            "--size tiny --rows 2 --microbatches 2 --frozen int8",
            ["xxl_on_one_gpu/trial"],
        ),
        ("sparse_step", "--size tiny --pairs no_limit", ["sparse_step/no_limit"]),
        ("sparse_routing", "--experts 4 --rows 1", ["sparse_routing/cpu"]),
        ("torch_mixture", "--size tiny", ["torch_mixture/mov", "torch_mixture/molora"]),
        ("startup", "", ["startup/cpu"]),
    ],
)
def test_script(script: str, flags: str, rows: list[str], tmp_path: pathlib.Path, monkeypatch):
    """In this process, which has imported most of it; its workers are processes."""
    import machine

    path = tmp_path / "rows.json"
    rounds = 1 if script == "startup" else 2  # whose rounds are whole runs
    command = [str(FOLDER / f"{script}.py"), *flags.split(), f"--rounds={rounds}"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(path)])
    monkeypatch.setattr(machine, "pin", lambda: None)  # other tests may use all cores
    with mock.patch.dict(os.environ):
        runpy.run_path(command[0], run_name="__main__")
    written = json.loads(path.read_text())
    assert [row["row"] for row in written] == rows
    for row in written:
        assert row["ours"]["seconds"] > 0
        assert row["rounds"] == rounds
        assert "--json" not in row["command"]
