"""Small results of evaluations, and the tables that `pemoe report` prints of them."""

import json
from pathlib import Path

from pemoe_jax.analysis.zero_shot import paper_table
from pemoe_jax.analysis.zero_shot import results as results_lib
from pemoe_jax.tools import report

# Dataset of P3's tasks -> column of the paper.
EIGHT = {
    "anli": "ANLI",
    "cb": "CB",
    "rte": "RTE",
    "wsc.fixed": "WSC",
    "wic": "WiC",
    "copa": "COPA",
    "winogrande_winogrande_xl": "WNG",
    "hellaswag": "HS",
}


def write(folder: Path, runs: dict[str, dict[str, tuple[str, list[int]]]], **about) -> Path:
    """Writes an evaluation; `runs` is name -> task -> (dataset, 1 or 0 for each example)."""
    run_objects = []
    for name, answers in runs.items():
        tasks = {
            task: results_lib.task_result(
                list(map(bool, correct)), [0.5] * len(correct), dataset, "test", []
            )
            for task, (dataset, correct) in answers.items()
        }
        for task, (_, correct) in answers.items():
            lines = [json.dumps({"idx": i, "correct": bool(x)}) for i, x in enumerate(correct)]
            file = folder / "predictions" / name / f"{task}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n")
        run = {"name": name, "method": "mov", "variant": "mov-10", "checkpoint": f"runs/{name}"}
        run |= {"step": 5, "trainable": 32, "total": 10_000, **about}
        run_objects.append({**run, **results_lib.summarize(tasks), "tasks": tasks})
    (folder / "results.json").write_text(json.dumps({"runs": run_objects}))
    return folder


def eight(correct: int) -> dict[str, tuple[str, list[int]]]:
    """Returns a prompt of each of the eight datasets; `correct` of ten answers are correct."""
    return {f"{name}_a": (name, [1] * correct + [0] * (10 - correct)) for name in EIGHT}


def printed(capsys, *flags) -> dict[str, dict[str, dict[str, str]]]:
    """Runs the command and returns title -> first cell of a row -> column -> cell."""
    assert report.main([*map(str, flags), "--format=markdown"]) == 0, capsys.readouterr().err
    printed_tables: dict[str, dict[str, dict[str, str]]] = {}
    for part in capsys.readouterr().out.split("## ")[1:]:
        title, *lines = part.splitlines()
        rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
        columns, _rule, *rows = rows
        printed_tables[title] = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    return printed_tables


def table(printed_tables: dict, measure: str) -> dict[str, dict[str, str]]:
    return next(
        rows
        for title, rows in printed_tables.items()
        if title.startswith("Zero-shot") and measure in title
    )


def load(folder: Path) -> list[dict]:
    return results_lib.load_results(str(folder))["runs"]


def build(folder: Path, **flags) -> paper_table.PaperTable:
    return paper_table.build_paper_table(load(folder), **flags)


def step_time(seconds: float, device: str = "A", batch: str = "8 × (16 + 8)") -> dict:
    return {"seconds": seconds, "device": device, "batch": batch}
