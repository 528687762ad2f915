"""The benchmarks: their arithmetic by hand, and each script once on a tiny model."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts_import_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_ratios_are_taken_round_by_round():
    import common

    # 2/1, 3/3, 8/2, 9/3, 10/2 = 2, 1, 4, 3, 5
    assert common.paired([2, 3, 8, 9, 10], [1, 3, 2, 3, 2]) == (2, 3, 4)
    assert common.quartiles([7.0]) == (7, 7, 7)


def test_dimensions_are_those_of_the_gin_file():
    import common

    assert common.dimensions("large") == {
        "emb_dim": 1024,
        "num_heads": 16,
        "num_encoder_layers": 24,
        "num_decoder_layers": 24,
        "head_dim": 64,
        "mlp_dim": 2816,
    }


def test_sides_take_turns_and_ends_are_told():
    import common

    taken = []
    ways = {name: lambda name=name: taken.append(name) for name in "abc"}
    sides, others = common.in_turn(ways, rounds=2)
    assert taken == ["a", "b", "c", "b", "c", "a"]
    assert [len(side.times) for side in sides] == [2, 2, 2]
    assert others >= 0  # so short a time is read too coarsely for more


def test_steps_of_different_size_are_compared_by_the_token():
    import common

    ours, peer = (common.Side(name, "", {}, told={}) for name in ("ours", "peer"))
    ours.times, ours.told = [(4.0, 8.0)], {"tokens": 200}
    peer.times, peer.told = [(1.0, 1.0)], {"tokens": 100}
    found = common.row("x", ours, peer, others=0.0)
    assert found["ratio"] == (2, 2, 2)  # 4/200 over 1/100
    assert found["cpu ratio"] == (4, 4, 4)


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


def test_floor_of_a_step():
    import floors
    import ours

    from pemoe_jax.core import network, params

    model = ours.transformer(SPEC)
    shapes = params.flatten(network.param_shapes(model))
    trains = {path for path in shapes if params.is_adapter(path)}
    found = floors.of_step(model, shapes, trains, 2, (7, 3))
    # V = 32128, D = 4, H·K = 6, F = 5; tokens: 14 of inputs, 6 of targets.
    # An attention's four matrices [4, 6] have 96 numbers, an MLP's three [4, 5] 60; of the decoder
    # the keys and values of the cross-attention, 48, go over the inputs: products
    # 14·(96 + 60 + 48) + 6·(96 + 48 + 60 + 32128·4) = 2856 + 772296
    products = 775_152
    # of attention: pairs 2·(7·7 + 3·3 + 3·7) = 158, two products of 6 each: 4·158·6
    attention = 3_792
    assert found["flops"] == 2 * 2 * products + 3 * attention
    # Bytes, float32: the base's parameters but the embedding, of which 20 rows are read and written
    norms = (2 + 3 + 2) * 4  # of layers, and at the end of each stack
    biases = 2 * 2 * 32
    once = 96 + 60 + 96 + 96 + 60 + 32128 * 4 + norms + biases
    # in and out of each matrix, for every token, twice: [4, 6] and [6, 4] 10, [4, 5] and [5, 4] 9
    through = 14 * (4 * 10 + 3 * 9 + 2 * 10) + 6 * (4 * 10 + 2 * 10 + 3 * 9 + 4)
    # vectors: three attentions' keys and values of 6, two gates of 5: read twice, and 8 times more
    vectors = 3 * 2 * 6 + 2 * 5
    looked_up = 20 * 4
    assert found["bytes"] == 4 * (2 * once + 2 * through + 10 * vectors + 2 * looked_up)


def test_floor_is_the_larger_of_operations_and_bytes_at_the_best_rates():
    import floors

    slow, fast = {"flops": 10, "bytes": 4}, {"flops": 20, "bytes": 2}
    found = floors.together({"flops": 100, "bytes": 40}, slow, fast)
    assert found["seconds"] == 10  # 40 / 4, more than 100 / 20


def test_missed_and_missing_rows_say_so():
    import results

    by_name = {row.name: row for row in results.ROWS}
    row = by_name["mov_against_ia3/cpu"]
    found = {
        "ratio": [1.2, 1.3, 1.4],
        "ours": {"seconds": 1.3, "peak": 3e9, "before": 1e9, "temporaries": 5e8},
        "peer": {"seconds": 1.0, "peak": 2e9},
        "floor": {"seconds": 0.5},
    }
    line = results.line(row, found)
    assert "time 1.3 (1.2–1.4), **missed**" in line
    assert "| 1.3 s | 1 s | 500 ms | 2.00 + 1.00 GB<br>T 500 MB | 2.00 GB |" in line
    assert "missed" not in results.line(row, {**found, "ratio": [1.1, 1.2, 1.3]})
    speed = results.line(by_name["score_choices/cpu passes"], {**found, "ratio": [0.2, 0.25, 0.5]})
    assert "speed 4 (2–5) |" in speed
    assert "not measured |" in results.line(row, None)
    assert "needs a GPU" in results.line(by_name["xxl_on_one_gpu/gpu"], None)


def test_results_are_the_table_of_the_rows_measured():
    import results

    before = (FOLDER / "RESULTS.md").read_text()
    results.main()
    after = (FOLDER / "RESULTS.md").read_text()
    (FOLDER / "RESULTS.md").write_text(before)
    assert after == before, "python benchmarks/results.py"


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
        ("gpu_throughput", "--size tiny --methods mov --rows 2", ["gpu_throughput/trial mov"]),
        (
            "xxl_on_one_gpu",
            "--size tiny --rows 2 --microbatches 2 --frozen int8",
            ["xxl_on_one_gpu/trial"],
        ),
        ("startup", "", ["startup/cpu"]),
    ],
)
def test_script(script: str, flags: str, rows: list[str], tmp_path: pathlib.Path):
    to = tmp_path / "rows.json"
    rounds = 1 if script == "startup" else 2  # each of whose rounds is a run of its own
    command = [
        sys.executable,
        str(FOLDER / f"{script}.py"),
        *flags.split(),
        "--rounds",
        str(rounds),
    ]
    done = subprocess.run([*command, "--json", str(to)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(to.read_text())
    assert [row["row"] for row in found] == rows
    for row in found:
        assert row["ours"]["seconds"] > 0
        assert row["rounds"] == rounds
        assert "--json" not in row["command"]
