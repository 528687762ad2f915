"""What routers did as tables, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pemoe_jax.analysis.routing import metrics, probe
from pemoe_jax.analysis.routing.metrics import ProbeResult
from pemoe_jax.analysis.tables import NONE, Table

_SEEN = {True: "trained on", False: "held out", None: NONE}
_ENTROPY_NOTE = (
    "Entropies as shares of log E, tasks counting alike. Each token: 0 where it takes one expert, 1"
    " where it takes all alike. Mean: of the mean over tokens and tasks; 0 where one expert does it"
    " all. Tasks: how many bits less the entropy is within tasks (0: tasks are routed alike)."
)
_KEPT_NOTE = (
    "Kept: the mean sum of a token's probabilities, of which the other ones are masked. All other"
    " figures are of the probabilities scaled to sum to one."
)


def value_name(routing: ProbeResult) -> str:
    """What a mean distribution is called: probabilities are scaled where some are masked."""
    whole = all(layer.mass > 0.999 for layer in metrics.router_entropies(routing))
    return "mean probability" if whole else "mean share of the mixture"


def runs_table(routings: Sequence[ProbeResult]) -> Table:
    """The runs and what they were shown."""
    rows = []
    for one in routings:
        seen = [task.seen for task in one.tasks]
        tokens = {stack: int(np.sum(one.totals.num_tokens[stack])) for stack in probe.STACKS}
        rows.append(
            [
                str(one.about["name"]),
                str(one.about["method"]),
                f"{one.about['step']:,}",
                "–".join(dict.fromkeys(map(str, sorted(set(one.experts.values()))))),
                f"{one.about['trainable']:,}",
                str(seen.count(True)) if None not in seen else NONE,
                str(seen.count(False)) if None not in seen else NONE,
                f"{sum(task.examples for task in one.tasks):,}",
                f"{tokens['encoder']:,} + {tokens['decoder']:,}",
            ]
        )
    columns = ["run", "method", "step", "experts", "trainable", "tasks trained on", "held out"]
    return Table("Runs", [*columns, "examples", "tokens in + out"], rows)


def site_tables(routing: ProbeResult) -> dict[str, Table]:
    """{site: its mean distributions, a row a task, a column an expert}."""
    found = {}
    for site in routing.sites:
        shares = metrics.mean_distributions(routing.totals, site)
        tokens = routing.totals.num_tokens[probe.token_stack(site)]
        rows = [
            [task.name, task.dataset, _SEEN[task.seen], f"{int(count):,}"]
            + [f"{value:.3f}" for value in row]
            for task, row, count in zip(routing.tasks, shares, tokens, strict=True)
        ]
        experts = [str(number + 1) for number in range(shares.shape[1])]
        even = [f"{1 / len(experts):.3f}"] * len(experts)
        mean = [f"{value:.3f}" for value in shares.mean(axis=0)]
        found[site] = Table(
            f"{site}: {value_name(routing)} by expert",
            ["prompt", "data set", "seen", "tokens", *experts],
            rows,
            below=[["mean over tasks", "", "", "", *mean], ["all alike", "", "", "", *even]],
        )
    return found


def entropy_table(routing: ProbeResult) -> Table:
    """A row a router, of all layers."""
    layers = metrics.router_entropies(routing)
    partly = any(layer.mass <= 0.999 for layer in layers)
    rows = [
        [
            layer.site,
            f"{layer.token_entropy:.4f}",
            f"{layer.mean_entropy:.4f}",
            f"{layer.task_bits:.4f}",
        ]
        + ([f"{layer.mass:.3f}"] if partly else [])
        for layer in layers
    ]
    columns = ["site", "each token", "mean", "tasks (bits)", *(["kept"] if partly else [])]
    notes = [_ENTROPY_NOTE, *([_KEPT_NOTE] if partly else [])]
    return Table("Entropy of the routers", columns, rows, notes=notes)


def nearest_table(routing: ProbeResult) -> Table | None:
    """Of each held-out task the trained one that is routed most alike; None where none is."""
    found = metrics.nearest_trained(routing)
    if not found:
        return None
    rows = [[name, near, f"{far:.4f}"] for name, (near, far) in found.items()]
    columns = ["held-out task", "nearest trained on", "distance"]
    return Table("Held-out tasks and the trained ones that are routed most alike", columns, rows)


def token_tables(routing: ProbeResult) -> dict[str, Table]:
    """{site: a row an expert, its tokens with their shares as multiples of 1/E}."""
    found = {}
    for site in routing.sites:
        rows = [
            [str(number), "  ".join(f"{token.piece} {token.ratio:.2f}" for token in tokens) or NONE]
            for number, tokens in enumerate(metrics.top_tokens(routing, site), 1)
        ]
        read = {"encoder": "of the input", "decoder": "that the decoder reads"}
        stack = probe.token_stack(site)
        found[site] = Table(
            f"{site}: tokens {read[stack]}, by expert",
            ["expert", "tokens by share"],
            rows,
        )
    return found


def distributions_csv(routings: Sequence[ProbeResult]) -> str:
    """A line a run, site, task and expert."""
    lines: list[list[Any]] = [["run", "site", "task", "dataset", "seen", "expert", "probability"]]
    for one in routings:
        for site in one.sites:
            for task, row in zip(
                one.tasks, metrics.mean_distributions(one.totals, site), strict=True
            ):
                seen = "" if task.seen is None else int(task.seen)
                lines += [
                    [one.about["name"], site, task.name, task.dataset, seen, e, f"{value:.6g}"]
                    for e, value in enumerate(row, 1)
                ]
    return _csv(lines)


def distances_csv(routings: Sequence[ProbeResult]) -> str:
    """A line a run and pair of tasks, each pair once."""
    lines: list[list[Any]] = [["run", "task", "other", "distance"]]
    for one in routings:
        found, names = metrics.task_distances(one), one.names
        lines += [
            [one.about["name"], names[i], names[j], f"{found[i, j]:.6g}"]
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ]
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def to_json(routings: Sequence[ProbeResult]) -> str:
    """All of it."""
    whole = {"distance": metrics.DISTANCE_DEFINITION, "runs": [_as_dict(one) for one in routings]}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _as_dict(one: ProbeResult) -> dict[str, Any]:
    counts = {stack: np.asarray(one.totals.num_tokens[stack]) for stack in probe.STACKS}
    tasks = [
        dataclasses.asdict(task)
        | {f"{stack}_tokens": int(counts[stack][i]) for stack in probe.STACKS}
        for i, task in enumerate(one.tasks)
    ]
    return {
        **one.about,
        "tasks": tasks,
        "measure": value_name(one),
        "sites": {
            site: {
                "experts": one.experts[site],
                "means": {
                    name: _rounded(row)
                    for name, row in zip(
                        one.names, metrics.mean_distributions(one.totals, site), strict=True
                    )
                },
                "top_tokens": [
                    [dataclasses.asdict(token) | {"ratio": round(token.ratio, 4)} for token in of]
                    for of in metrics.top_tokens(one, site)
                ],
            }
            for site in one.sites
        },
        "entropies": [_entropy_entry(entropy) for entropy in metrics.router_entropies(one)],
        "distances": [_rounded(row) for row in metrics.task_distances(one)],
        "nearest_seen": {
            name: {"task": near, "distance": round(far, 6)}
            for name, (near, far) in metrics.nearest_trained(one).items()
        },
    }


def _entropy_entry(entropy: metrics.RouterEntropy) -> dict[str, Any]:
    return {
        "site": entropy.site,
        "stack": entropy.stack,
        "layer": entropy.layer,
        "kind": entropy.kind,
        "per_token": entropy.token_entropy,
        "of_mean": entropy.mean_entropy,
        "between_tasks": entropy.task_bits,
        "kept": entropy.mass,
    }


def _rounded(row: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in row]
