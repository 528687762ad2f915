"""Means of benchmarks, by hand."""

import pytest

from pemoe_jax.analysis import benchmark_table
from pemoe_jax.tasks.benchmarks import Benchmark

SONGS = Benchmark(
    name="SONGS",
    noun="bird",
    metric="accuracy",
    members={"tit_high": "tit", "tit_low": "tit", "owl": "owl", "rook": "rook", "wren": "wren"},
    areas={"tit": "small", "wren": "small", "owl": "large", "rook": "large"},
    tasks={"s_tit_high": "tit_high", "s_tit_low": "tit_low", "s_owl": "owl", "s_rook": "rook"},
)


def test_means_have_equal_weights_and_missing_tasks_are_named():
    summary = SONGS.summarize({"s_tit_high": 0.5, "s_tit_low": 0.0, "s_owl": 1.0, "other": 0.3})
    assert summary == {
        "noun": "bird",
        "mean": pytest.approx((0.25 + 1.0) / 2),
        "members": 2,
        "of": 4,
        "areas": {
            "small": {"mean": 0.25, "members": 1, "of": 2},
            "large": {"mean": 1.0, "members": 1, "of": 2},
        },
        "missing": ["rook", "wren"],
    }
    assert SONGS.missing == ["wren"]
    assert SONGS.summarize({"other": 0.3}) is None
    areas = SONGS.summarize({"s_owl": 0.5})["areas"]
    assert areas["small"] == {"mean": None, "members": 0, "of": 2}


def test_tables():
    task_results = [
        {"s_owl": {"accuracy": 0.5, "shots_left_out": 1}, "s_tit_low": {"shots_left_out": 2}},
        {"s_owl": {"metrics": {"accuracy": 0.75, "f1": 0.5}, "shots_left_out": 1}},
    ]
    runs = [
        {
            "name": "base",
            "method": None,
            "shots": 4,
            "benchmarks": benchmark_table.summarize_benchmarks([SONGS], results),
        }
        for results in task_results
    ]
    (table,) = benchmark_table.benchmark_tables(runs, ["base", "mov"], scale=100)
    assert table.title == "SONGS: accuracy in %, mean over birds"
    assert table.columns == ["run", "method", "shots", "small", "large", "mean"]
    assert table.rows == [
        ["base", "–", "4", "–", "50.0", "50.0"],
        ["mov", "–", "4", "–", "75.0", "75.0"],
    ]
    assert table.footer == [
        ["birds", "", "", "0 of 2", "1 of 2", "1 of 4"],
        ["shots left out", "", "", "", "", "3"],
    ]
    assert table.notes == [
        "Without scores, and so not in the means over birds: tit_high, tit_low, rook, wren"
    ]
    del runs[0]["benchmarks"]["SONGS"]["shots_left_out"]
    (table,) = benchmark_table.benchmark_tables(runs[:1], ["base"], scale=1)
    assert table.columns == ["run", "method", "small", "large", "mean"]
    assert (table.rows, len(table.footer)) == ([["base", "–", "–", "0.5", "0.5"]], 1)
    assert benchmark_table.benchmark_tables([{"name": "base"}], ["base"], scale=100) == []
    assert benchmark_table.summarize_benchmarks([SONGS], {"other": {"accuracy": 1.0}}) == {}
