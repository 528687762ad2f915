"""Counts the tokens that the experts of sparse layers are assigned, and compute, in training.

Assigned tokens beyond an expert's capacity are dropped. By default, evaluation has no capacity
limit and drops nothing. This probe therefore lays out examples in rows as training does, and runs
the model in training mode: with the capacity limit, GShard's random second expert and jitter, but
without dropout.

Shapes: `B` rows of `L` tokens, `E` experts, `T` tasks.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.analysis.routing import measure
from pemoe_jax.analysis.routing import probe as probe_lib
from pemoe_jax.checkpoints import run_settings
from pemoe_jax.core import network, partitioning, routing, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.data import packing

if TYPE_CHECKING:
    from pemoe_jax.data.choices import ChoiceGroup

Array = jax.Array

# Features whose nonzero ids are the tokens that a stack reads. The decoder's inputs are its targets
# shifted by one, and begin with the id of padding.
_STACK_TOKENS = {"encoder": "encoder_input_tokens", "decoder": "decoder_target_tokens"}


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """The layout of batch rows in training.

    Attributes:
      lengths: {'inputs': …, 'targets': …}, the numbers of tokens of a row.
      pack: whether a row holds several examples.
    """

    lengths: Mapping[str, int]
    pack: bool = True

    def __str__(self) -> str:
        kind = "packed rows" if self.pack else "rows of one example"
        return f"{kind}, {self.lengths['inputs']:,} + {self.lengths['targets']:,} tokens"


@flax.struct.dataclass
class DispatchTotals:
    """Counts of each task's tokens at a sparse layer, float32.

    Attributes:
      assigned: [T, E], tokens that chose an expert, or that an expert chose.
      placed: [T, E], how many of them are within the expert's capacity, so that it computes them.
      tokens_by_experts: [T, E + 1], tokens that exactly 0, 1, … E experts compute.
    """

    assigned: Array | np.ndarray
    placed: Array | np.ndarray
    tokens_by_experts: Array | np.ndarray


Totals = dict[str, DispatchTotals]  # by site, such as 'decoder/layers_1/mlp/experts'
Probe = Callable[[params_lib.Params, steps.Batch, Mapping[str, Array], Array, Totals], Totals]


def read_training_rows(path: str, default: TrainingRows) -> TrainingRows:
    """Reads the layout of a run's rows from its config.gin; `default` if settings are missing."""
    settings = run_settings.read_settings(path)
    try:
        lengths = ast.literal_eval(settings["TASK_FEATURE_LENGTHS"])
        return TrainingRows(
            {name: int(lengths[name]) for name in ("inputs", "targets")},
            bool(ast.literal_eval(settings["PACK"])),
        )
    except (KeyError, TypeError, ValueError, SyntaxError):
        return default


def init_totals(sites: Mapping[str, int], num_tasks: int) -> Totals:
    """Returns totals of zeros for the sparse layers in `sites`, {site: E}; skips adapters."""
    return {
        site: DispatchTotals(*(jnp.zeros((num_tasks, n)) for n in (size, size, size + 1)))
        for site, size in sites.items()
        if routing.is_sparse_layer(site)
    }


def make_probe(model: network.Transformer) -> Probe:
    """Returns the jitted `probe(params, batch, task_ids, rng, totals) -> totals`.

    `task_ids` are {stack: int32 [B, L]}: the index of each token's task, -1 for padding. The probe
    donates `totals`.
    """
    assert model.sparse is not None
    model = model.clone(
        config=dataclasses.replace(model.config, dropout_rate=0.0),
        sparse=dataclasses.replace(model.sparse, expert_dropout_rate=0.0),
    )

    def sum_by_task(tasks: Array, by_token: Array) -> Array:  # [B, L, T], [B, L, N] -> [T, N]
        return probe_lib.exact_einsum("blt,ble->te", tasks, by_token.astype(jnp.float32))

    def probe(
        params: params_lib.Params,
        batch: steps.Batch,
        task_ids: Mapping[str, Array],
        rng: Array,
        totals: Totals,
    ) -> Totals:
        _, collections = steps.apply_model(model, params, batch, rng, mutable=["intermediates"])
        sown = routing.sown_by_router(collections["intermediates"], "assignments")
        result = {}
        for site, total in totals.items():
            assignments = sown[site]  # [B, L, E]
            num_tasks, num_experts = total.assigned.shape
            tasks = jax.nn.one_hot(task_ids[site.partition("/")[0]], num_tasks)  # zeros at -1
            num_placed = jnp.sum(assignments == routing.PLACED, axis=-1)
            by_token = DispatchTotals(
                assigned=assignments != routing.NOT_ASSIGNED,
                placed=assignments == routing.PLACED,
                tokens_by_experts=jax.nn.one_hot(num_placed, num_experts + 1),
            )
            by_task = jax.tree.map(functools.partial(sum_by_task, tasks), by_token)
            result[site] = jax.tree.map(jnp.add, total, by_task)
        return result

    return jax.jit(probe, donate_argnums=(4,))


def training_batches(
    groups: Mapping[str, Sequence[ChoiceGroup]], rows: TrainingRows, batch_size: int
) -> Iterator[tuple[packing.Batch, dict[str, np.ndarray]]]:
    """Yields batches as in training, with the tasks of their tokens.

    Args:
      groups: {task: its examples}, each with its correct choice alone.
      rows: the layout of rows.
      batch_size: B; the last batch is filled up with padding.

    Yields:
      T5X's features, and {stack: int32 [B, L]}, -1 for padding.
    """
    examples, tasks = [], []
    for task, members in enumerate(groups.values()):
        for group in members:
            sequences = group.inputs, group.choices[0]
            embedding = () if group.sentence_embedding is None else (group.sentence_embedding,)
            examples.append((*sequences, *embedding))
            # Sequences of task numbers are packed in the same way as the tokens, which yields the
            # task of each token. Numbers begin at 1, as 0 is padding.
            tasks.append(tuple(np.full(len(ids), task + 1, np.int32) for ids in sequences))
    # As in training, a packed row has examples of several tasks.
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    layout = rows.lengths, batch_size, rows.pack
    batches = packing.BatchIterator((examples[i] for i in order), *layout, pad_last=True)
    task_batches = packing.BatchIterator((tasks[i] for i in order), *layout, pad_last=True)
    for batch, task_batch in zip(batches, task_batches, strict=True):
        yield batch, {stack: task_batch[name] - 1 for stack, name in _STACK_TOKENS.items()}


def measure_dispatch(
    model: network.Transformer,
    params: params_lib.Params,
    groups: Mapping[str, Sequence[ChoiceGroup]],
    rows: TrainingRows,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Totals:
    """Returns the totals of a model's sparse layers as NumPy arrays; empty for a dense model.

    Args:
      model: the network.
      params: its parameters, replicated on every device.
      groups: {task: its examples}; totals have the tasks in this order.
      rows: the layout of rows in training.
      batch_size: number of rows in a batch, over all devices.
      mesh: the devices.
    """
    if model.sparse is None:
        return {}
    probe_batch = make_probe(model)
    zeros = init_totals(probe_lib.expert_counts(model), len(groups))
    totals = partitioning.replicate(zeros, mesh)
    correct = {task: [measure.keep_correct_choice(g) for g in groups[task]] for task in groups}
    batches = training_batches(correct, rows, batch_size)
    for number, (batch, task_ids) in enumerate(batches):
        totals = probe_batch(
            params,
            partitioning.shard_batch(batch, mesh),
            partitioning.shard_batch(task_ids, mesh),
            jax.random.key(number),  # equal runs draw equal jitter and second experts
            totals,
        )
    totals = jax.device_get(totals)
    return {site: totals[site] for site in zeros}  # in layer order, which jit does not keep
