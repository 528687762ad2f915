"""A worker with T5X's training step on its minimal T5 (see `workers.Worker`).

T5X has no adapters. A user adds them to the modules of the T5 and freezes the base model with a
`MultiOptimizer`, as the MoV paper's code does. This worker does the same: `DenseGeneral`, the
module of all of T5X's matrices, gets (IA)³'s vector or LoRA's two matrices at our sites. The rest
is T5X's own: model, loss, `trainer.train_with_lr`, Adafactor and the partitioner. XLA removes the
unused gradients of the base model. The worker imports no model code of this project.

Its spec: `dimensions`, `method` (ia3, lora) with `rank`, `rows`, `lengths`. Its environment is that
of `make t5x VENV=.venv-t5x`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import common
import machine
import ours
import workers


def add_adapters(method: str, rank: int) -> None:
    """Adds adapters to `t5x.examples.t5.layers`."""
    import jax.numpy as jnp
    from flax import linen as nn
    from t5x.examples.t5 import layers

    plain = layers.DenseGeneral
    # A vector at wi_1 equals one at the gate, because their outputs are multiplied.
    sites = {
        "ia3": ("key", "value", "wi_1"),
        "lora": ("query", "key", "value", "out", "wi_0", "wo"),
    }[method]

    class WithAdapter(plain):  # type: ignore[misc, valid-type]
        @nn.compact
        def __call__(self, inputs: Any) -> Any:
            outputs = super().__call__(inputs)
            if self.name not in sites:
                return outputs
            # A DenseGeneral contracts the last axes of its inputs, those from `start` on.
            start = inputs.ndim - len(layers._canonicalize_tuple(self.axis))
            out_shape = outputs.shape[start:]
            size_in, size_out = math.prod(inputs.shape[start:]), math.prod(out_shape)
            ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
            if method == "ia3":
                vector = layers.param_with_axes(
                    "vector_adapter", ones, (size_out,), jnp.float32, axes=self.kernel_axes[1:]
                )
                return outputs * jnp.asarray(vector, self.dtype).reshape(out_shape)
            normal = nn.initializers.normal(0.02)
            lora_a = layers.param_with_axes(
                "a_adapter", normal, (size_in, rank), jnp.float32, axes=("embed", "stack")
            )
            lora_b = layers.param_with_axes(
                "b_adapter", zeros, (rank, size_out), jnp.float32, axes=("stack", "embed")
            )
            low = inputs.reshape(*inputs.shape[:start], size_in) @ jnp.asarray(lora_a, self.dtype)
            delta = low @ jnp.asarray(lora_b, self.dtype) * (16 / rank)
            return outputs + delta.reshape(outputs.shape)

    layers.DenseGeneral = WithAdapter


def make_model(spec: Mapping[str, Any]) -> Any:
    """Returns T5X's model with an optimizer of the adapters alone."""
    import seqio
    from flax import traverse_util
    from t5x import adafactor, models, optimizers
    from t5x.examples.t5 import network

    adapters = traverse_util.ModelParamTraversal(lambda path, _: "_adapter" in path)
    # Parameters that match none of the traversals get no update.
    rules = adafactor.standard_logical_factor_rules()
    optimizer = optimizers.MultiOptimizer(
        [(adapters, adafactor.Adafactor(decay_rate=0.8, step_offset=0, logical_factor_rules=rules))]
    )
    config = network.T5Config(
        vocab_size=common.VOCAB_SIZE,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        **spec["dimensions"],
    )
    vocabulary = seqio.PassThroughVocabulary(common.VOCAB_SIZE)
    return models.EncoderDecoderModel(
        network.Transformer(config), vocabulary, vocabulary, optimizer_def=optimizer
    )


def main() -> None:
    """Runs the worker."""
    worker = workers.Worker()
    spec = worker.spec
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import traverse_util
    from flax.core import unfreeze
    from t5x import partitioning, trainer, utils

    add_adapters(spec["method"], spec.get("rank", 4))
    batch = ours.random_batch(spec["rows"], spec["lengths"])
    # T5X's feature converters add weights, which its loss reads.
    batch["decoder_loss_weights"] = np.ones_like(batch["decoder_target_tokens"])
    before = machine.memory("VmRSS")
    model = make_model(spec)
    partitioner = partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=partitioning.standard_logical_axis_rules()
    )
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in batch.items()},
        input_types={name: array.dtype for name, array in batch.items()},
        partitioner=partitioner,
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    axes = initializer.train_state_axes

    def train_step(state: Any, batch: Any) -> Any:
        return trainer.train_with_lr(
            state,
            batch,
            learning_rate=jnp.asarray(3e-4),
            dropout_rng=jax.random.fold_in(jax.random.PRNGKey(0), state.step),
            model=model,
            num_microbatches=None,
            data_partition_spec=partitioner.data_partition_spec,
        )

    partitioned = partitioner.partition(
        train_step,
        in_axis_resources=(axes, partitioner.data_partition_spec),
        out_axis_resources=(axes, None),
        donate_argnums=(0,),
    )
    batch = jax.device_put(batch)
    compiled = partitioner.compile(partitioned, state, batch)

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state.params, metrics))
        return metrics["loss"].total / metrics["loss"].steps

    flat = traverse_util.flatten_dict(unfreeze(state.params), sep="/")
    info = {
        "before": before,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "trained": sum(array.size for path, array in flat.items() if "_adapter" in path),
        "versions": machine.versions("jax", "jaxlib", "flax") + ", T5X at " + t5x_commit(),
    }
    worker.run(step, info)


def t5x_commit() -> str:
    """Returns the commit that `make t5x` installs."""
    text = (workers.REPO / "pemoe_jax" / "t5x_bridge" / "installed.py").read_text(encoding="utf-8")
    match = re.search(r"google-research/t5x\W+(\w{10})", text)
    return match[1] if match else "an unknown commit"


if __name__ == "__main__":
    main()
