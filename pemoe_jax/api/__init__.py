"""The Python API: `load_model`, the `Model` that it returns, and `finetune`."""

from pemoe_jax.api.finetuning import finetune
from pemoe_jax.api.loading import load_model
from pemoe_jax.api.model import Model, ScoredChoice

__all__ = ["Model", "ScoredChoice", "finetune", "load_model"]
