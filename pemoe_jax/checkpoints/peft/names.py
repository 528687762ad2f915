"""Our adapters' arrays and PEFT's tensors for them: names, shapes, and one from the other.

    encoder/layers_0/attention/key_adapter/vectors [H, 1, K]
    base_model.model.encoder.block.0.layer.0.SelfAttention.k.ia3_l [out, 1]

PEFT's (IA)³ scales what a module gives or, of a feedforward module, what it reads. What `wo` reads
is gelu(wi_0 x) · wi_1 x, so one vector there does what one at our `gate` does.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

STACKS = ("encoder", "decoder")
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Site:
    """A site of ours in PEFT's eyes.

    Attributes:
      theirs: the module's name.
      reads, gives: the last axis of what it reads and of what an adapter of ours changes.
    """

    theirs: str
    reads: str
    gives: str


ATTENTION = {
    "query": Site("q", "embed", "joined_kv"),
    "key": Site("k", "embed", "joined_kv"),
    "value": Site("v", "embed", "joined_kv"),
    "out": Site("o", "joined_kv", "embed"),
}
MLP = {
    "wi_0": Site("wi_0", "embed", "mlp"),
    "wi_1": Site("wi_1", "embed", "mlp"),
    "gate": Site("wo", "mlp", "mlp"),
    "wo": Site("wo", "mlp", "embed"),
}
SITES = {**ATTENTION, **MLP}
MODULES = tuple(dict.fromkeys(site.theirs for site in SITES.values()))

# stack, our module, theirs, the sites in it
_BLOCK = (
    ("encoder", "attention", "layer.0.SelfAttention", ATTENTION),
    ("encoder", "mlp", "layer.1.DenseReluDense", MLP),
    ("decoder", "self_attention", "layer.0.SelfAttention", ATTENTION),
    ("decoder", "encoder_decoder_attention", "layer.1.EncDecAttention", ATTENTION),
    ("decoder", "mlp", "layer.2.DenseReluDense", MLP),
)
_LEAVES = {
    "VectorExperts": {"vectors": "ia3_l"},
    "LoRAExperts": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a plain adapter.

    Attributes:
      ours, theirs: its path and its name.
      site: of ours.
      leaf: 'vectors', 'lora_a' or 'lora_b'.
      rank: of LoRA, else 0.
    """

    ours: str
    theirs: str
    site: str
    leaf: str
    rank: int

    def axes(self) -> tuple[str | int, ...]:
        """Our shape, with the names of the model's dimensions for their sizes."""
        site = SITES[self.site]
        if self.leaf == "lora_a":
            return (site.reads, 1, self.rank)
        if self.leaf == "lora_b":
            return (1, self.rank, site.gives)
        return ("heads", 1, "kv") if site.gives == "joined_kv" else (1, site.gives)

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Our shape; 0 where a size is not known."""
        return tuple(a if isinstance(a, int) else sizes.get(a, 0) for a in self.axes())

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """lora_A [R, in], lora_B [out, R], ia3_l [out, 1] or, of a feedforward module, [1, in]."""
        site = SITES[self.site]
        if self.leaf == "lora_a":
            return (self.rank, sizes[site.reads])
        if self.leaf == "lora_b":
            return (sizes[site.gives], self.rank)
        return (1, sizes[site.gives]) if self.site == "gate" else (sizes[site.gives], 1)

    def to_ours(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Their tensor in our shape."""
        turned = array if self.leaf == "vectors" else array.T
        return np.ascontiguousarray(turned.reshape(self.our_shape(sizes)))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array in their shape."""
        if self.leaf == "vectors":
            return np.ascontiguousarray(array.reshape((1, -1) if self.site == "gate" else (-1, 1)))
        return np.ascontiguousarray((array[:, 0] if self.leaf == "lora_a" else array[0]).T)


def arrays(description: Mapping[str, Mapping[str, Any]], layers: Mapping[str, int]) -> list[Array]:
    """Every array of adapters without routers.

    Args:
      description: `core.adapters.describe` of them.
      layers: of each stack.
    """
    return [
        Array(
            ours=f"{ours}/{site}_adapter/{leaf}",
            theirs=f"{_PREFIX}{theirs}.{SITES[site].theirs}.{name}",
            site=site,
            leaf=leaf,
            rank=description[site].get("rank", 0),
        )
        for ours, theirs, sites in _parts(layers)
        for site in sites
        if site in description
        for leaf, name in _LEAVES[description[site]["kind"]].items()
    ]


def modules(layers: Mapping[str, int]) -> list[str]:
    """Every module that PEFT can adapt: 'encoder.block.0.layer.0.SelfAttention.q', …."""
    return [
        f"{theirs}.{name}"
        for _, theirs, sites in _parts(layers)
        for name in dict.fromkeys(site.theirs for site in sites.values())
    ]


def _parts(layers: Mapping[str, int]) -> Iterator[tuple[str, str, dict[str, Site]]]:
    """Our path and their name of every attention and MLP, and its sites."""
    for stack, ours, theirs, sites in _BLOCK:
        for i in range(layers[stack]):
            yield f"{stack}/layers_{i}/{ours}", f"{stack}.block.{i}.{theirs}", sites


def depth(stack: str, paths: Iterable[str]) -> int:
    """Layers of a stack by our paths, at least one."""
    found = (re.match(rf"{stack}/layers_(\d+)/", path) for path in paths)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def without_adapter_name(name: str) -> str:
    """'….lora_A.default.weight' -> '….lora_A.weight'.

    Files that hold a model's own state dict have the name in them, and PEFT loads them.
    """
    return re.sub(r"\.(ia3_l|lora_[AB])\.default(\.weight)?$", r".\1\2", name)


def module_of(name: str) -> str | None:
    """The last part of the adapted module's name; None where a tensor is not an adapter's."""
    found = re.fullmatch(r".*\.(\w+)\.(?:ia3_l|lora_[AB]\.weight)", name)
    return found[1] if found else None
