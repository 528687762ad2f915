"""The format of Hugging Face PEFT for T5 v1.1, read and written: (IA)³ and LoRA.

An adapter is a folder of adapter_config.json and adapter_model.safetensors (or .bin). Names,
shapes and the meaning of settings follow PEFT 0.21. PEFT has no routed adapters.
"""

from pemoe_jax.checkpoints.peft.load import (
    base_model_name,
    is_adapter,
    load_adapter,
    method_name,
)
from pemoe_jax.checkpoints.peft.save import save_adapter

__all__ = ["base_model_name", "is_adapter", "load_adapter", "method_name", "save_adapter"]
