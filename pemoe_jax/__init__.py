"""Mixtures of parameter-efficient experts on a frozen T5.

    model = pemoe_jax.load_model("t5-large-lm-adapt", adapter="mov_for_a_colleague")
    model.rank("… Did they like it?", ["yes", "no"])

The names in `__all__` are imported at their first use. Importing the package alone imports neither
JAX nor NumPy, so that `pemoe --help` prints at once and `pemoe_jax.torch` works without JAX.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pemoe_jax.api import Model, ScoredChoice, finetune, load_model
    from pemoe_jax.core.errors import InputError

__all__ = ["InputError", "Model", "ScoredChoice", "__version__", "finetune", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "InputError":  # `pemoe_jax.api` does not have it
        from pemoe_jax.core.errors import InputError

        return InputError
    if name in __all__:
        from pemoe_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
