"""Accuracy gains of a sweep's runs that start from another run (FROM) over those from the base."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pemoe_jax.analysis.tables import MISSING, Table
from pemoe_jax.runtime import file_io

_NOTE = (
    "Accuracy (median over prompts) of the experiment with FROM minus that of the same experiment"
    " without FROM, in percentage points: mean ± standard deviation (n - 1) over pairs of runs with"
    " the same seed. * marks a dataset that both runs were trained on."
)


def build_gains_table(pairs: Mapping[str, Sequence[tuple[Path, Path]]]) -> Table:
    """Returns a table with a row for each experiment and a column for each dataset.

    Args:
      pairs: experiment -> for each seed, two folders of results: those of the run that started from
        another run, and those of the direct run, which started from the base. Each folder has the
        results of one run.
    """
    rows: dict[str, dict[str, list[float]]] = {}
    trained: dict[str, set[str]] = {}
    for experiment, folders in pairs.items():
        differences = rows.setdefault(experiment, {})
        for run_folder, direct_folder in folders:
            run, direct = map(_read_run, (run_folder, direct_folder))
            # The direct run was trained on the experiment's datasets only, the other run on these
            # and more.
            trained.setdefault(experiment, set()).update(direct.get("trained_datasets", ()))
            scores, direct_scores = _medians(run), _medians(direct)
            for name in scores.keys() & direct_scores.keys():
                gain = 100 * (scores[name] - direct_scores[name])
                differences.setdefault(name, []).append(gain)
    datasets = sorted({name for gains in rows.values() for name in gains} - {"average"})
    columns = [*datasets, "average"]
    cells = [
        [
            experiment,
            str(len(pairs[experiment])),
            *(
                _format(gains.get(name, []), name in trained[experiment] and name != "average")
                for name in columns
            ),
        ]
        for experiment, gains in rows.items()
    ]
    return Table(
        "Gain over the experiment without FROM",
        ["experiment", "seeds", *columns],
        cells,
        notes=[_NOTE],
    )


def _read_run(folder: Path) -> dict:
    """Returns the only run of a results.json."""
    (run,) = file_io.read_json(folder / "results.json")["runs"]
    return run


def _medians(run: dict) -> dict[str, float]:
    medians = {name: score["median"] for name, score in run["datasets"].items()}
    return {**medians, "average": run["average"]["median"]}


def _format(gains: Sequence[float], is_trained: bool) -> str:
    if not gains:
        return MISSING
    deviation = f" ±{statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
    return f"{statistics.fmean(gains):+.1f}{deviation}{'*' if is_trained else ''}"
