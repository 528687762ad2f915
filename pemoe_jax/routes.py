"""What the experts are used for: mean routing probabilities by site and task."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

EXAMPLES = 32  # of a task, enough for a mean over some hundred tokens


def by_task(
    model: Any, params: Any, groups: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, Any]]:
    """Mean probabilities over the first examples of each task with their right answers.

    Args:
      model, params: a method with routers.
      groups: {task: its `data.ChoiceGroup`s}.

    Returns:
      {site: {task: [E]}}; empty for a method without routers.
    """
    import jax
    import numpy as np

    from pemoe_jax import data
    from pemoe_jax.core import steps

    route = jax.jit(functools.partial(steps.routing_by_example, model))
    result: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for task, members in groups.items():
        answered = [_with_its_answer(group) for group in members[:EXAMPLES]]
        rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        for batch, real in data.score_batches(answered, EXAMPLES):
            first_choice = {
                name: array[:, 0] if array.ndim == 3 else array for name, array in batch.items()
            }
            for site, probs in route(params, first_choice).items():
                rows[site].append(np.asarray(probs)[: len(real)])
        for site, parts in rows.items():
            result[site][task] = np.concatenate(parts).mean(axis=0)
    return dict(result)


def _with_its_answer(group: Any) -> Any:
    best = group.is_correct.index(True) if any(group.is_correct) else 0
    return dataclasses.replace(
        group,
        choices=(group.choices[best],),
        is_correct=(group.is_correct[best],),
        choice_texts=(group.choice_texts[best],),
    )


def last_decoder_block(probs: Mapping[str, Any], num_decoder_layers: int) -> dict[str, Any]:
    """The sites that arXiv 2309.05444 looks at."""
    prefix = f"decoder/layers_{num_decoder_layers - 1}/"
    return {site: rows for site, rows in probs.items() if site.startswith(prefix)}
