"""Routing metrics as tables, CSV and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from pemoe_jax.analysis.routing import metrics, probe, specialization
from pemoe_jax.analysis.routing.metrics import ProbeResult
from pemoe_jax.analysis.tables import MISSING, Table, to_csv
from pemoe_jax.core import routing

_GROUPS = {True: "trained on", False: "held out", None: MISSING}  # by `ProbedTask.is_trained`
_TOKENS = {"encoder": "input tokens", "decoder": "tokens that the decoder reads"}
# Fields of `ProbedTask` and `RouterEntropy` -> keys of routes.json, which stay as earlier versions
# wrote them.
_JSON_KEYS = {
    "is_trained": "seen",
    "token_entropy": "per_token",
    "mean_entropy": "of_mean",
    "task_bits": "between_tasks",
    "mass": "kept",
}
# Sums of probabilities above this count as 1, which float32 rounds.
_FULL_MASS = 0.999
_ENTROPY_NOTE = (
    "Entropies are fractions of log E; every task has the same weight. Each token: mean entropy of"
    " single tokens; 0 if each uses one expert, 1 if each uses all equally. Mean: entropy of the"
    " mean over tokens and tasks; 0 if one expert serves everything. Tasks: by how many bits the"
    " mean entropy of the tasks is below the entropy of their mean; 0 if routing does not depend on"
    " the task."
)
_SPARSE_NOTE = (
    "mlp/experts is the router of a sparse layer, whose experts are whole MLPs; a layer without"
    " this row has a dense MLP. Each token, in this row: the entropy of the softmax over all"
    " experts, before a few are chosen; 0 if the router is certain. The other columns are about the"
    " weights of the chosen experts, before any token is dropped."
)
_LOAD_NOTE = (
    "Load: an expert's share of all assignments relative to an even share, over all tokens. Dead:"
    f" experts with a load below {routing.DEAD_LOAD:g}. Dropped: assignments that have no place."
    " The last columns are the shares of tokens that no expert, one expert, … computes. A token"
    " without an expert passes the layer by its residual connection."
)
# Tokens with at least this many experts share a column.
_MANY_EXPERTS = 4
_MASS_NOTE = (
    "Kept: the sum of a token's probabilities after top-k, averaged over tokens. All other columns"
    " are of probabilities normalized to sum to one."
)


def value_name(result: ProbeResult) -> str:
    """Returns the name of the values in mean distributions.

    They are weights if all sites are sparse layers, shares of the mixture if top-k leaves sums of
    probabilities below 1, and probabilities otherwise.
    """
    if all(map(routing.is_sparse_layer, result.sites)):
        return "mean weight"
    is_truncated = any(router.mass <= _FULL_MASS for router in metrics.router_entropies(result))
    return "mean share of the mixture" if is_truncated else "mean probability"


def runs_table(results: Sequence[ProbeResult]) -> Table:
    """Returns a table with a row per run: its model, and the examples that it was probed with."""
    rows = []
    for result in results:
        is_trained = [task.is_trained for task in result.tasks]
        is_known = None not in is_trained
        tokens = [int(np.sum(result.totals.num_tokens[stack])) for stack in probe.STACKS]
        # Sites may differ in E, such as '8–10': their numbers are joined.
        num_experts = "–".join(map(str, sorted(set(result.experts.values()))))
        rows.append(
            [
                str(result.run["name"]),
                str(result.run["method"]),
                f"{result.run['step']:,}",
                num_experts,
                f"{result.run['trainable']:,}",
                str(is_trained.count(True)) if is_known else MISSING,
                str(is_trained.count(False)) if is_known else MISSING,
                f"{sum(task.examples for task in result.tasks):,}",
                f"{tokens[0]:,} + {tokens[1]:,}",
            ]
        )
    columns = ["run", "method", "step", "experts", "trainable"]
    columns += ["measured: trained on", "held out", "examples", "tokens in + out"]
    return Table("Runs", columns, rows, num_text=2)


def site_tables(result: ProbeResult) -> dict[str, Table]:
    """Returns {site: table of mean distributions}, with a row per task and a column per expert."""
    tables = {}
    for site in result.sites:
        distributions = result.distributions(site)
        num_tokens = result.totals.num_tokens[probe.token_stack(site)]
        rows = [
            [task.name, task.dataset, _GROUPS[task.is_trained], f"{int(count):,}", *_decimals(row)]
            for task, row, count in zip(result.tasks, distributions, num_tokens, strict=True)
        ]
        num_experts = result.experts[site]
        mean, uniform = distributions.mean(axis=0), np.full(num_experts, 1 / num_experts)
        experts = [str(number + 1) for number in range(num_experts)]
        tables[site] = Table(
            f"{site}: {value_name(result)} by expert",
            ["prompt", "dataset", "seen", "tokens", *experts],
            rows,
            footer=[
                ["mean over tasks", "", "", "", *_decimals(mean)],
                ["uniform", "", "", "", *_decimals(uniform)],
            ],
            num_text=3,
        )
    return tables


def _decimals(values: np.ndarray) -> list[str]:
    return [f"{value:.3f}" for value in values]


def entropy_table(result: ProbeResult) -> Table:
    """Returns a table of entropies, with a row for the router of each site in each layer."""
    routers = metrics.router_entropies(result)
    shows_mass = any(router.mass <= _FULL_MASS for router in routers)
    rows = []
    for router in routers:
        values = [router.token_entropy, router.mean_entropy, router.task_bits]
        mass = [f"{router.mass:.3f}"] if shows_mass else []
        rows.append([router.site, *(f"{value:.4f}" for value in values), *mass])
    columns = ["site", "each token", "mean", "tasks (bits)", *(["kept"] if shows_mass else [])]
    is_sparse = any(routing.is_sparse_layer(router.site) for router in routers)
    notes = [_ENTROPY_NOTE, *([_SPARSE_NOTE] if is_sparse else [])]
    notes += [_MASS_NOTE] if shows_mass else []
    return Table("Entropy of the routers", columns, rows, notes=notes)


def load_table(result: ProbeResult) -> Table | None:
    """Returns a table of loads and drops, with a row per sparse layer; None for a dense model."""
    loads = metrics.sparse_loads(result)
    if not loads:
        return None
    # The largest number of experts that any token has; columns end there, or at `_MANY_EXPERTS`.
    largest = max(np.flatnonzero(load.tokens_by_experts).max(initial=1) for load in loads)
    many = min(int(largest), _MANY_EXPERTS)
    rows = []
    for load in loads:
        shares = load.shares_by_experts
        by_number = [*shares[:many], shares[many:].sum()]
        rows.append(
            [
                load.site,
                "experts" if load.experts_choose else "tokens",
                f"{load.tokens:,}",
                f"{load.load.max():.2f}",
                f"{load.load.min():.2f}",
                str(load.dead),
                MISSING if load.experts_choose else _percent(load.dropped),
                *map(_percent, by_number),
            ]
        )
    numbers = [f"{n} expert{'' if n == 1 else 's'}" for n in range(many + 1)]
    if largest > many:
        numbers[-1] = f"{many} or more"
    columns = ["site", "who chooses", "tokens", "largest load", "least load", "dead", "dropped"]
    title = "Load of the experts, and drops, with the capacity of training"
    notes = [_LOAD_NOTE, _rows_note(result)]
    return Table(title, [*columns, *numbers], rows, notes=notes, num_text=2)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rows_note(result: ProbeResult) -> str:
    return (
        f"Measured in training mode without dropout, on the examples in {result.rows}. By default,"
        " evaluation has no limit and drops nothing."
    )


def assignment_table(result: ProbeResult) -> Table | None:
    """Returns a table of tokens by expert, with up to two rows per sparse layer.

    None for a dense model. Experts that choose tokens drop none, so they have no second row.
    """
    loads = metrics.sparse_loads(result)
    if not loads:
        return None
    rows = []
    for load in loads:
        for name, counts in (("assigned", load.assigned), ("dropped", load.assigned - load.placed)):
            if name == "assigned" or not load.experts_choose:
                rows.append([load.site, name, *(f"{count:,.0f}" for count in counts)])
    experts = [str(number + 1) for number in range(max(len(load.assigned) for load in loads))]
    return Table("Tokens by expert", ["site", "", *experts], rows, num_text=2)


def nearest_table(result: ProbeResult) -> Table | None:
    """Returns a table of held-out tasks and their nearest training tasks; None without both."""
    nearest = metrics.nearest_trained(result)
    if not nearest:
        return None
    rows = [[name, other, f"{distance:.4f}"] for name, (other, distance) in nearest.items()]
    columns = ["held-out task", "nearest training task", "distance"]
    title = "Held-out tasks and their nearest training tasks by routing"
    return Table(title, columns, rows, num_text=2)


def token_tables(result: ProbeResult) -> list[Table]:
    """Returns a table of top tokens for each site, with a row per expert, for Markdown."""
    tables = []
    for site in result.sites:
        rows = []
        for number, tokens in enumerate(metrics.top_tokens(result, site), 1):
            text = "  ".join(f"{token.piece} {token.ratio:.2f}" for token in tokens) or MISSING
            # Code, since Markdown would read `<start>` as a tag and `*` as emphasis.
            rows.append([str(number), "`" + text.replace("`", "'") + "`"])
        title = f"{site}: {_TOKENS[probe.token_stack(site)]} by expert"
        tables.append(
            Table(title, ["expert", "tokens, with their probability times E"], rows, num_text=2)
        )
    return tables


def distributions_csv(results: Sequence[ProbeResult]) -> str:
    """Returns CSV with a line per run, site, task and expert."""
    lines: list[list[object]] = [
        ["run", "site", "task", "dataset", "seen", "expert", "probability"]
    ]
    for result in results:
        for site in result.sites:
            for task, row in zip(result.tasks, result.distributions(site), strict=True):
                seen = "" if task.is_trained is None else int(task.is_trained)
                key = [result.run["name"], site, task.name, task.dataset, seen]
                lines += [[*key, expert, f"{value:.6g}"] for expert, value in enumerate(row, 1)]
    return to_csv(lines)


def loads_csv(results: Sequence[ProbeResult]) -> str:
    """Returns CSV of assigned and dropped tokens: a line per run, sparse layer, task and expert."""
    lines: list[list[object]] = [
        ["run", "site", "task", "dataset", "seen", "expert", "assigned", "dropped"]
    ]
    for result in results:
        for site, totals in result.dispatch.items():
            by_task = np.asarray(totals.assigned), np.asarray(totals.placed)
            for task, assigned, placed in zip(result.tasks, *by_task, strict=True):
                seen = "" if task.is_trained is None else int(task.is_trained)
                key = [result.run["name"], site, task.name, task.dataset, seen]
                counts = zip(assigned, assigned - placed, strict=True)
                lines += [[*key, e, *map(int, count)] for e, count in enumerate(counts, 1)]
    return to_csv(lines)


def distances_csv(results: Sequence[ProbeResult]) -> str:
    """Returns CSV with a line per run and pair of tasks, each pair once."""
    lines: list[list[object]] = [["run", "task", "other", "distance"]]
    for result in results:
        distances, names = metrics.task_distances(result), result.task_names
        lines += [
            [result.run["name"], names[i], names[j], f"{distances[i, j]:.6g}"]
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ]
    return to_csv(lines)


def to_json(results: Sequence[ProbeResult]) -> str:
    """Returns all metrics of all runs as JSON."""
    contents = {"distance": metrics.DISTANCE_DEFINITION, "runs": [_run_entry(r) for r in results]}
    return json.dumps(contents, indent=1, ensure_ascii=False) + "\n"


def _run_entry(result: ProbeResult) -> dict[str, object]:
    num_tokens = {f"{stack}_tokens": result.totals.num_tokens[stack] for stack in probe.STACKS}
    return {
        **result.run,
        "tasks": [
            _with_json_keys(task) | {key: int(n[i]) for key, n in num_tokens.items()}
            for i, task in enumerate(result.tasks)
        ],
        "measure": value_name(result),
        "sites": {site: _site_entry(result, site) for site in result.sites},
        "entropies": [*map(_with_json_keys, metrics.router_entropies(result))],
        "specialization": specialization.to_json(specialization.measure(result)),
        **_sparse_entry(result),
        "distances": [_rounded(row) for row in metrics.task_distances(result)],
        "nearest_seen": {
            name: {"task": other, "distance": round(distance, 6)}
            for name, (other, distance) in metrics.nearest_trained(result).items()
        },
    }


def _with_json_keys(record: metrics.ProbedTask | metrics.RouterEntropy) -> dict[str, object]:
    """Returns the fields of a record under the keys of routes.json."""
    return {_JSON_KEYS.get(key, key): value for key, value in dataclasses.asdict(record).items()}


def _sparse_entry(result: ProbeResult) -> dict[str, object]:
    """Returns the entries about sparse layers; empty for a dense model."""
    entries = {
        load.site: {
            "experts_choose": load.experts_choose,
            "tokens": load.tokens,
            "dropped": round(load.dropped, 6),
            "without_expert": round(load.without_expert, 6),
            "assigned": load.assigned.astype(int).tolist(),
            "placed": load.placed.astype(int).tolist(),
            "tokens_by_experts": load.tokens_by_experts.astype(int).tolist(),
        }
        for load in metrics.sparse_loads(result)
    }
    return {"training_rows": result.rows, "sparse_layers": entries} if entries else {}


def _site_entry(result: ProbeResult, site: str) -> dict[str, object]:
    means = zip(result.task_names, result.distributions(site), strict=True)
    return {
        "experts": result.experts[site],
        "means": {name: _rounded(row) for name, row in means},
        "top_tokens": [
            [{**dataclasses.asdict(token), "ratio": round(token.ratio, 4)} for token in tokens]
            for tokens in metrics.top_tokens(result, site)
        ],
    }


def _rounded(row: np.ndarray) -> list[float]:
    # float32 totals are exact to about six decimals. Rounding lets equal runs write equal files.
    return [round(float(value), 6) for value in row]
