"""A worker with the training step of flaxformer's sparse T5 (see `workers.Worker`).

The model is that of flaxformer's shipped gin files, the optimizer is optax's AdamW. Its spec:
`dimensions`; `sparse` with `num_experts`, `top_k` and `capacity_factor`; `rows` and `lengths`;
`one_hot`, whether tokens are embedded by a product with one-hot vectors, as in the shipped files.
Its environment is that of the T5X peer, with google/flaxformer at 399ea3a and aqtp. The worker
imports no model code of this project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import common
import machine
import ours
import workers


def make_network(spec: Mapping[str, Any]) -> Any:
    """Returns flaxformer's encoder-decoder of models/switch_base.gin with the spec's sizes."""
    import pathlib

    import flaxformer
    import gin

    dimensions, sparse = spec["dimensions"], spec["sparse"]
    root = pathlib.Path(flaxformer.__path__[0]).parent
    gin.add_config_file_search_path(str(root))
    macros = {
        "NUM_ENCODER_LAYERS": dimensions["num_encoder_layers"],
        "NUM_DECODER_LAYERS": dimensions["num_decoder_layers"],
        "NUM_ENCODER_SPARSE_LAYERS": dimensions["num_encoder_layers"] // 2,
        "NUM_DECODER_SPARSE_LAYERS": dimensions["num_decoder_layers"] // 2,
        "NUM_HEADS": dimensions["num_heads"],
        "HEAD_DIM": dimensions["head_dim"],
        "EMBED_DIM": dimensions["emb_dim"],
        "MLP_DIM": dimensions["mlp_dim"],
        "NUM_EMBEDDINGS": common.VOCAB_SIZE,
        "NUM_EXPERTS": sparse["num_experts"],
        "NUM_SELECTED_EXPERTS": sparse["top_k"],
        "TRAIN_EXPERT_CAPACITY_FACTOR": sparse["capacity_factor"],
        "NUM_MODEL_PARTITIONS": 1,
        "ACTIVATION_DTYPE": "'float32'",
        "MOE_TRUNCATED_DTYPE": "'float32'",
        "DROPOUT_RATE": 0.0,
    }
    bindings = [f"{name} = {value}" for name, value in macros.items()]
    # Not a macro of the file, so it is bound directly.
    bindings.append(f"embedding.Embed.one_hot = {spec['one_hot']}")
    gin.parse_config_files_and_bindings(
        ["flaxformer/t5x/configs/moe/models/switch_base.gin"], bindings, finalize_config=False
    )
    return gin.query_parameter("%ARCHITECTURE").scoped_configurable_fn()


def main() -> None:
    """Runs the worker."""
    worker = workers.Worker()
    spec = worker.spec
    import jax
    import jax.numpy as jnp
    import optax

    batch = jax.device_put(ours.random_batch(spec["rows"], spec["lengths"]))
    before = machine.memory("VmRSS")
    network = make_network(spec)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    tokens = {name: batch[name] for name in names}
    init = jax.jit(lambda key: network.init(key, **tokens, enable_dropout=False)["params"])
    params = init(jax.random.key(0))
    optimizer = optax.adamw(3e-4)
    state = params, jax.jit(optimizer.init)(params)

    def loss(params: Any) -> jax.Array:
        logits, sown = network.apply(
            {"params": params}, **tokens, enable_dropout=True, mutable=["intermediates"],
            rngs={"dropout": jax.random.key(0), "jitter": jax.random.key(0)},
        )  # fmt: skip
        targets = tokens["decoder_target_tokens"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        # Each sparse layer sows its balance loss. Half of the encoder's layers and half of the
        # decoder's are sparse. 0.01 is the weight of the Switch paper (arXiv 2101.03961).
        leaves = jax.tree_util.tree_leaves_with_path(sown["intermediates"])
        balance = [leaf for path, leaf in leaves if "auxiliary_loss" in jax.tree_util.keystr(path)]
        assert len(balance) == spec["dimensions"]["num_encoder_layers"]
        return jnp.mean(nll) + 0.01 * jnp.mean(jnp.stack(balance))

    def train_step(state: Any) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    compiled = jax.jit(train_step, donate_argnums=0).lower(state).compile()

    def step() -> Any:
        nonlocal state
        state, value = compiled(state)
        jax.block_until_ready(state)
        return value

    info = {
        "before": before,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "trained": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "tokens": spec["rows"] * sum(spec["lengths"]),
        **workers.jax_info(False),
    }
    worker.run(step, info)


if __name__ == "__main__":
    main()
