"""A tiny T5 in JAX and in PyTorch with the same weights, and adapters on it in both."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from methods import ADAPTER, CONFIG, METHODS, example_batch, model_inputs, random_params_of

from pemoe_jax.checkpoints import adapter_file, base_model, huggingface, lazy_array
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import adapters, network, params, routing
from pemoe_jax.core.adapters import Adapters, LoRAExperts, VectorExperts
from pemoe_jax.core.routing import Router

torch.set_num_threads(1)
partial = functools.partial

SENTENCE_DIM = 5
CONFIGS = {
    "v1.1": dataclasses.replace(CONFIG, num_encoder_layers=2, sentence_dim=SENTENCE_DIM),
    "1.0": dataclasses.replace(CONFIG, mlp_activations=("relu",), logits_via_embedding=True),
}
BATCH = model_inputs(example_batch())
IS_TARGET = BATCH["decoder_target_tokens"] > 0
_RNG = np.random.default_rng(0)
SENTENCES = _RNG.standard_normal((4, SENTENCE_DIM)).astype(np.float32)
# The loss is the sum of the logits, weighted at random: it needs no labels.
LOSS_WEIGHTS = _RNG.standard_normal((*IS_TARGET.shape, CONFIG.vocab_size)).astype(np.float32)
LOSS_WEIGHTS *= IS_TARGET[..., None]


def _mixed(expert: type, **by_site) -> Adapters:
    """Returns adapters with another router at each site, so that one program has all of them."""
    routers = {
        "query": partial(Router, temperature=0.5, z_loss=0.02),
        "key": partial(Router, top_k=1),
        "value": partial(Router, top_k=2, renormalize=True, balance_loss=0.03),
        "out": partial(Router, reads="sentence", balance_loss=0.05, z_loss=0.01),
        "wi_0": partial(Router, reads="y", top_k=2, straight_through=True),
        "wi_1": partial(Router, reads="sentence", top_k=2),
        "gate": partial(Router, reads="x", top_k=1, straight_through=True),
        "wo": partial(Router, top_k=3, balance_loss=0.1),
    }
    return Adapters(
        **{site: partial(expert, num_experts=3, router=r) for site, r in routers.items()}
    )


ADAPTERS = {name: METHODS[name].adapters() for name in ("ia3", "mov", "lora", "molora")}
ADAPTERS["mixed vectors"] = _mixed(VectorExperts)
ADAPTERS["mixed LoRA"] = _mixed(LoRAExperts)
ADAPTERS["heads, by x and sentence"] = Adapters(
    query=partial(VectorExperts, num_experts=2, router=partial(Router, reads="x", z_loss=0.1)),
    key=partial(VectorExperts, num_experts=2, router=partial(Router, reads="sentence")),
    value=partial(LoRAExperts, num_experts=2, rank=2, router=partial(Router, reads="y")),
    wi_1=VectorExperts,
    wo=partial(LoRAExperts, rank=3, alpha=4.0),
)
ADAPTERS["T5 1.0"] = Adapters(
    wi_0=partial(LoRAExperts, num_experts=2, router=Router),
    gate=partial(VectorExperts, num_experts=2, router=Router),
)


@functools.cache
def model(name: str, dtype: str = "float32") -> network.Transformer:
    config = CONFIGS["1.0" if name == "T5 1.0" else "v1.1"]
    return network.Transformer(dataclasses.replace(config, dtype=dtype), ADAPTERS[name])


@functools.cache
def arrays(name: str) -> dict[str, jax.Array]:
    """Returns path -> random array of a model, base and adapters."""
    return params.flatten(random_params_of(model(name)))


def adapter_arrays(name: str) -> dict[str, np.ndarray]:
    return {path: np.asarray(a) for path, a in arrays(name).items() if params.is_adapter(path)}


@functools.cache
def program(name: str, dtype: str = "float32"):
    """Returns a jitted (adapter, batch) -> logits, gradients of the adapter by path."""
    base = {path: a for path, a in arrays(name).items() if not params.is_adapter(path)}

    def loss_fn(adapter, batch):
        logits, sown = model(name, dtype).apply(
            {"params": params.unflatten(base | adapter)},
            **batch,
            sentence_embeddings=SENTENCES,
            enable_dropout=False,
            mutable=["routers"],
        )
        statistics = routing.sown_by_router(sown.get("routers", {}), "statistics")
        loss = jnp.sum(logits * LOSS_WEIGHTS)
        if statistics:
            losses = jnp.stack([s[-1] for s in statistics.values()])
            loss += 100 * routing.total_aux_loss(list(statistics), losses)
        return loss, logits

    return jax.jit(lambda *args: _swap(jax.value_and_grad(loss_fn, has_aux=True)(*args)))


def _swap(result):
    (_, logits), grads = result
    return logits, grads


def jax_result(name: str, dtype: str = "float32", adapter=None, batch=BATCH):
    return program(name, dtype)(adapter or adapter_arrays(name), batch)


def save_base(folder: pathlib.Path, version: str) -> pathlib.Path:
    """Writes the base for transformers."""
    name = "T5 1.0" if version == "1.0" else "ia3"
    base = {path: a for path, a in arrays(name).items() if not params.is_adapter(path)}
    lazy = {path: lazy_array.from_numpy(np.asarray(a)) for path, a in base.items()}
    activations = CONFIGS[version].mlp_activations
    huggingface.save_checkpoint(folder, lazy, activations=activations, dropout_rate=0.0)
    return folder


def load_t5(folder: pathlib.Path, dtype: torch.dtype = torch.float32):
    return transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def save_adapter(path: pathlib.Path, name: str, base: pathlib.Path, description=None, values=None):
    """Writes an adapter as a run in JAX would."""
    transformer = model(name)
    record = Record(
        method=name,
        trainable=[ADAPTER],
        config=transformer.config.as_dict(),
        adapters=description or adapters.describe(transformer.adapters),
        base={
            "path": str(base),
            "seed": None,
            "needed": True,
            "fingerprint": base_model.open_base(base).fingerprint(),
        },
        counts={"trainable": 0, "total": 0},
        versions={},
    )
    adapter_file.save_adapter(path, values or adapter_arrays(name), record, 7)
    return path


def torch_batch(batch=BATCH) -> dict[str, torch.Tensor]:
    """Returns the batch under the names of transformers."""
    tensors = {k: torch.from_numpy(np.asarray(v)).long() for k, v in batch.items()}
    return {
        "input_ids": tensors["encoder_input_tokens"],
        "attention_mask": (tensors["encoder_input_tokens"] > 0).long(),
        "decoder_input_ids": tensors["decoder_input_tokens"],
        "decoder_attention_mask": (tensors["decoder_target_tokens"] > 0).long(),
    }


def torch_logits(mixture, **kwargs) -> np.ndarray:
    """Returns the logits at targets that are not padding."""
    with torch.no_grad():
        logits = mixture(**torch_batch(), **kwargs).logits
    return logits.float().numpy()[IS_TARGET]
