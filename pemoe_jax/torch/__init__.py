"""(IA)³, LoRA, MoV and MoLORA on a T5 of Hugging Face transformers, in PyTorch.

    model = T5ForConditionalGeneration.from_pretrained("t5-large-lm-adapt")
    model = MixtureModel.from_pretrained(model, "mov_for_a_colleague")
    model.generate(**tokenizer("...", return_tensors="pt"))

Adapters are read and written in this package's format (`checkpoints.adapter_file`), so that JAX and
PyTorch share them. No module of `pemoe_jax.torch` imports jax, neither directly nor through other
modules.
"""

from pemoe_jax.torch.config import ExpertsConfig, MixtureConfig, RouterConfig
from pemoe_jax.torch.model import MixtureModel

__all__ = ["ExpertsConfig", "MixtureConfig", "MixtureModel", "RouterConfig"]
