"""Converts names and shapes of an adapter's arrays between this package and PEFT.

    ours     encoder/layers_0/attention/key_adapter/vectors [heads, 1, head_dim]
    PEFT's   base_model.model.encoder.block.0.layer.0.SelfAttention.k.ia3_l [heads · head_dim, 1]

The axis of size 1 in our arrays is the axis of experts: an adapter without a router has one expert.

PEFT's (IA)³ scales the output of a module or, for a feedforward module, its input. In T5 v1.1 the
input of `wo` is gelu(wi_0 x) · wi_1 x, and our site `gate` is gelu(wi_0 x). So a vector that scales
the input of `wo` is equivalent to one at `gate`. In T5 1.0 the two are the same: relu(wi x).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from pemoe_jax.checkpoints.huggingface.names import SUBLAYERS
from pemoe_jax.runtime.file_io import JsonObject

Description = Mapping[str, JsonObject]  # `core.adapters.describe`: site -> settings

STACKS = ("encoder", "decoder")
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class PeftModule:
    """The module that PEFT adapts at one of our sites (query, …, wo)."""

    name: str
    in_axis: str  # last axis of the module's input
    # Last axis of the array that our adapter scales or adds to: the module's output, or at gate its
    # input.
    adapted_axis: str


_ATTENTION = {
    "query": PeftModule("q", "embed", "joined_kv"),
    "key": PeftModule("k", "embed", "joined_kv"),
    "value": PeftModule("v", "embed", "joined_kv"),
    "out": PeftModule("o", "joined_kv", "embed"),
}
_MLP = {
    "wi_0": PeftModule("wi_0", "embed", "mlp"),
    "wi_1": PeftModule("wi_1", "embed", "mlp"),
    "gate": PeftModule("wo", "mlp", "mlp"),
    "wo": PeftModule("wo", "mlp", "embed"),
}
SITES = {**_ATTENTION, **_MLP}
# The MLP of T5 1.0 has only one input projection, wi, which is our site wi_0.
_UNGATED_SITES = {
    **{site: module for site, module in SITES.items() if site != "wi_1"},
    "wi_0": PeftModule("wi", "embed", "mlp"),
}
MODULES = tuple(dict.fromkeys(m.name for m in (*SITES.values(), *_UNGATED_SITES.values())))


def sites_of(is_gated: bool) -> dict[str, PeftModule]:
    """Returns site -> module.

    Args:
      is_gated: whether MLPs have wi_0 and wi_1, instead of one wi.
    """
    return SITES if is_gated else _UNGATED_SITES


# Kind of adapter -> {our name of an array: PEFT's name}.
_LEAVES = {
    "VectorExperts": {"vectors": "ia3_l"},
    "LoRAExperts": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
}


@dataclasses.dataclass(frozen=True)
class AdapterArray:
    """An array of an adapter without a router."""

    path: str
    peft_name: str
    site: str
    leaf: str  # vectors, lora_a or lora_b
    rank: int  # LoRA's; 0 for (IA)³

    def axes(self) -> tuple[str | int, ...]:
        """Returns our shape, with the name of an axis in place of a dimension of the model.

        The axis of size 1 is the axis of experts: an adapter without a router has one expert.
        """
        module = SITES[self.site]
        if self.leaf == "lora_a":
            return (module.in_axis, 1, self.rank)
        if self.leaf == "lora_b":
            return (1, self.rank, module.adapted_axis)
        # PEFT joins heads and kv in one axis, in row-major order: the conversion is a reshape.
        if module.adapted_axis == "joined_kv":
            return ("heads", 1, "kv")
        return (1, module.adapted_axis)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns our shape; an axis that is not in `sizes` is 0.

        `save_adapter` infers sizes from the arrays. An axis that no array has becomes 0, which it
        then reports as a mismatch.
        """
        return tuple(a if isinstance(a, int) else sizes.get(a, 0) for a in self.axes())

    def peft_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns PEFT's shape."""
        return self.to_peft(np.empty(self.shape(sizes), np.float32)).shape

    def from_peft(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Converts PEFT's tensor to our array."""
        tensor = tensor if self.leaf == "vectors" else tensor.T
        return np.ascontiguousarray(tensor.reshape(self.shape(sizes)))

    def to_peft(self, array: np.ndarray) -> np.ndarray:
        """Converts our array to PEFT's tensor.

        lora_A is [R, in], lora_B [out, R], ia3_l [out, 1] or, for a feedforward module, [1, in].
        """
        if self.leaf == "vectors":
            return array.reshape((1, -1) if self.site == "gate" else (-1, 1))
        return (array[:, 0] if self.leaf == "lora_a" else array[0]).T


def adapter_arrays(
    description: Description, num_layers: Mapping[str, int], is_gated: bool
) -> list[AdapterArray]:
    """Returns every array of adapters without routers.

    Args:
      description: `core.adapters.describe` of the adapters.
      num_layers: stack -> number of layers.
      is_gated: whether MLPs have wi_0 and wi_1, instead of one wi.
    """
    return [
        AdapterArray(
            path=f"{path}/{site}_adapter/{leaf}",
            peft_name=f"{PREFIX}{module}.{sites[site].name}.{peft_leaf}",
            site=site,
            leaf=leaf,
            rank=description[site].get("rank", 0),
        )
        for path, module, sites in _sublayers(num_layers, is_gated)
        for site in sites
        if site in description
        for leaf, peft_leaf in _LEAVES[description[site]["kind"]].items()
    ]


def module_names(num_layers: Mapping[str, int], is_gated: bool) -> list[str]:
    """Returns the names of all attention and MLP projections, which correspond to our sites.

    For example 'encoder.block.0.layer.0.SelfAttention.q'.
    """
    return [
        f"{module}.{name}"
        for _, module, sites in _sublayers(num_layers, is_gated)
        for name in dict.fromkeys(peft_module.name for peft_module in sites.values())
    ]


def _sublayers(
    num_layers: Mapping[str, int], is_gated: bool
) -> Iterator[tuple[str, str, dict[str, PeftModule]]]:
    """Yields (our path, PEFT's path, site -> module) for every attention and MLP of every layer."""
    mlp = {site: module for site, module in sites_of(is_gated).items() if site in _MLP}
    for stack, module, ours, _ in SUBLAYERS:
        sites = mlp if ours == "mlp" else _ATTENTION
        for i in range(num_layers[stack]):
            yield f"{stack}/layers_{i}/{ours}", f"{stack}.block.{i}.{module}", sites


def strip_adapter_name(name: str) -> str:
    """Removes the name of the default adapter: '….lora_A.default.weight' -> '….lora_A.weight'.

    Files written from a raw `state_dict()` contain it, those of `save_pretrained` do not. PEFT 0.21
    reads both if the adapter is loaded as 'default'.
    """
    return re.sub(r"\.(ia3_l|lora_[AB])\.default(\.weight)?$", r".\1\2", name)


def module_of(name: str) -> str | None:
    """Returns which module a PEFT tensor adapts; None if it is no adapter tensor.

    For example, '….SelfAttention.q.lora_A.weight' adapts 'q'.
    """
    match = re.fullmatch(r".*\.(\w+)\.(?:ia3_l|lora_[AB]\.weight)", name)
    return match[1] if match else None
