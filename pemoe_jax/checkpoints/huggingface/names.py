"""Converts names and layouts of a model's arrays between transformers and this package.

    encoder.block.1.layer.1.DenseReluDense.wi.weight         T5 1.0; wi_0 and wi_1 in T5 v1.1
    encoder.block.1.layer.1.mlp.wi.weight                    a dense layer of Switch Transformers
    encoder.block.1.layer.1.mlp.router.classifier.weight     a sparse layer's router, [E, D]
    encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight   one of its experts, [F, D]

A kernel is [out, in] in transformers and [in, out] here. The kernels of all experts of a layer are
one array [E, in, out] here. The relative position bias is [32, H] in transformers and [H, 32] here.
Our names are those of T5X.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

from pemoe_jax.checkpoints import lazy_array
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core.errors import InputError

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
OUR_HEAD = "decoder/logits_dense/kernel"
# The head in switch-xxl-128 and switch-c-2048, which transformers does not load.
DECODER_HEAD = "decoder.lm_head.weight"
# Copies of the embedding. They are in files of transformers 4, and of Switch Transformers whose
# head is not tied to it.
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# An array in checkpoints of T5 from before 2020. No model uses it, and transformers ignores it too.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# The sublayers of a block: (stack, module in transformers, our module, prefix of the name of our
# norm).
SUBLAYERS = (
    ("encoder", "layer.0.SelfAttention", "attention", "pre_attention"),
    ("encoder", "layer.1.DenseReluDense", "mlp", "pre_mlp"),
    ("decoder", "layer.0.SelfAttention", "self_attention", "pre_self_attention"),
    ("decoder", "layer.1.EncDecAttention", "encoder_decoder_attention", "pre_cross_attention"),
    ("decoder", "layer.2.DenseReluDense", "mlp", "pre_mlp"),
)
_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}

# Groups: stack, layer, 'router' or 'experts', rest. A layer has at most nine digits, because `int`
# refuses very long numbers, which an untrusted name may have.
_EXPERT = re.compile(r"(encoder|decoder)\.block\.(\d{1,9})\.layer\.\d\.mlp\.(router|experts)\.(.*)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The properties of a model that determine the names of its arrays in transformers.

    Attributes:
      depths: stack -> number of layers.
      is_gated: whether an MLP has `wi_0` and `wi_1`, instead of one `wi`.
      is_switch: whether the model is a Switch Transformer.
      sparse_layers: stack -> indices of the sparse layers.
      num_experts: number of experts, E.
    """

    depths: Mapping[str, int]
    is_gated: bool
    is_switch: bool = False
    sparse_layers: Mapping[str, frozenset[int]] = dataclasses.field(default_factory=dict)
    num_experts: int = 0


def find_layout(weights: Mapping[str, LazyArray], is_switch: bool) -> Layout:
    """Returns the layout of a folder's arrays.

    Args:
      weights: transformers' name -> array; untrusted, some may be missing or damaged.
      is_switch: whether config.json says that it is a Switch Transformer.
    """
    layers: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
    experts: set[str] = set()
    # E, the number of a router's rows -> number of routers that have it
    router_rows: collections.Counter[int] = collections.Counter()
    for match in filter(None, map(_EXPERT.fullmatch, weights)):
        layers[match[1]].add(int(match[2]))
        if match[3] == "experts":
            experts.add(match[4].partition(".")[0])
        elif match[4] == "classifier.weight" and weights[match[0]].shape:
            router_rows[weights[match[0]].shape[0]] += 1
    # E is taken from most routers, so that one damaged router does not change it. It is limited to
    # one more than the experts that exist, which suffices to report a missing expert: a malicious
    # router [10**9, 0], which takes no bytes in a file, must not create billions of names.
    num_experts = router_rows.most_common(1)[0][0] if router_rows else len(experts)
    num_experts = min(num_experts, len(experts) + 1)
    return Layout(
        {stack: _num_layers(weights, stack) for stack in layers},
        any(name.endswith(".wi_0.weight") for name in weights),
        is_switch,
        {stack: frozenset(indices) for stack, indices in layers.items()},
        num_experts,
    )


def _num_layers(names: Iterable[str], stack: str) -> int:
    # Counts the indices instead of taking the largest: a damaged name may have an index of
    # 99999999, for which `name_table` would create as many layers.
    matches = (re.match(rf"{stack}\.block\.(\d+)\.", name) for name in names)
    return len({match[1] for match in matches if match})


def name_table(layout: Layout) -> dict[str, str]:
    """Returns {name in transformers: our path} of every array except the head.

    The names of all experts of a layer map to the same path, in the order of the experts.
    """
    projections = ("wi_0", "wi_1", "wo") if layout.is_gated else ("wi", "wo")
    names = {EMBEDDING: "token_embedder/embedding"}
    for stack, depth in layout.depths.items():
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[bias] = f"{stack}/relpos_bias/rel_embedding"
        names[f"{stack}.final_layer_norm.weight"] = f"{stack}/{stack}_norm/scale"
        for i in range(depth):
            for _, module, ours, norm in (sub for sub in SUBLAYERS if sub[0] == stack):
                if layout.is_switch:
                    module = module.replace("DenseReluDense", "mlp")
                prefix, our_layer = f"{stack}.block.{i}.{module}", f"{stack}/layers_{i}"
                norm_name = f"{prefix.rpartition('.')[0]}.layer_norm.weight"
                names[norm_name] = f"{our_layer}/{norm}_layer_norm/scale"
                if ours != "mlp":
                    leaves = {f"{leaf}.weight": name for leaf, name in _ATTENTION.items()}
                elif i not in layout.sparse_layers.get(stack, ()):
                    leaves = {f"{leaf}.weight": leaf for leaf in projections}
                else:
                    leaves = {"router.classifier.weight": "router/router_weights/w"} | {
                        f"experts.expert_{e}.{leaf}.weight": f"expert/{leaf}"
                        for leaf in projections
                        for e in range(layout.num_experts)
                    }
                for leaf, name in leaves.items():
                    names[f"{prefix}.{leaf}"] = f"{our_layer}/{ours}/{name}/kernel"
    return names


def drop_copies(source: str, weights: dict[str, LazyArray]) -> None:
    """Removes copies of the embedding, and an array that no model uses, from `weights`.

    Raises:
      InputError: a supposed copy has other values than the embedding. transformers 5 would use
        these values in the encoder or the decoder.
    """
    weights.pop(_UNUSED, None)
    for name in EMBEDDING_COPIES:
        if name not in weights:
            continue
        # Some programs write the embedding once, under any of the three names.
        embedding = weights.setdefault(EMBEDDING, weights[name])
        if embedding is not weights[name] and not lazy_array.is_equal(embedding, weights[name]):
            raise InputError(f"{source}: {name}: expected a copy of {EMBEDDING}, got another array")
        del weights[name]


def to_ours(source: str, weights: Mapping[str, LazyArray], layout: Layout) -> dict[str, LazyArray]:
    """Returns {our path: array in our layout} of all arrays except the head.

    Raises:
      InputError: an array is missing or unknown, or an expert's shape or dtype differs from that of
        most experts.
    """
    kind = "a Switch Transformer" if layout.is_switch else "a T5"
    for name in weights:
        if name.endswith(".router.classifier.bias"):
            raise InputError(f"{source}: {name}: expected routers without biases, got one")
    table = name_table(layout)
    # An unknown array means another architecture, for which the other arrays alone would give wrong
    # outputs.
    missing = sorted(table.keys() - weights.keys(), key=_natural_order)
    unknown = sorted(weights.keys() - table.keys(), key=_natural_order)
    for names, problem in ((missing, "missing"), (unknown, "unknown")):
        if names:
            shown = "; ".join(f"{name:.100}" for name in names[:3])
            raise InputError(
                f"{source}: expected the arrays of {kind}, got {len(names)} {problem}: {shown}"
            )
    _check_experts(source, weights)
    names_by_path: dict[str, list[str]] = {}
    for name, path in table.items():
        names_by_path.setdefault(path, []).append(name)
    return {
        path: lazy_array.stack([weights[name].T for name in names])
        if "/mlp/expert/" in path
        else convert_layout(path, weights[names[0]])
        for path, names in names_by_path.items()
    }


def to_theirs(arrays: Mapping[str, LazyArray], layout: Layout) -> dict[str, LazyArray]:
    """Returns {name in transformers: array}; the inverse of `to_ours`, but includes the head."""
    table = name_table(layout)
    if OUR_HEAD in arrays:
        table[HEAD] = OUR_HEAD
        # A Switch Transformer whose head is not tied needs the copies of the embedding too: without
        # them transformers 5 would draw the embeddings of both stacks at random.
        if layout.is_switch:
            table |= dict.fromkeys(EMBEDDING_COPIES, table[EMBEDDING])
    experts = {
        path: iter(lazy_array.unstack(arrays[path]))
        for path in dict.fromkeys(table.values())
        if "/mlp/expert/" in path
    }
    return {
        name: next(experts[path]).T if path in experts else convert_layout(path, arrays[path])
        for name, path in table.items()
    }


def convert_layout(path: str, array: LazyArray) -> LazyArray:
    """Converts an array, in either direction, between the layouts of transformers and ours."""
    return array.T if path.endswith(("/kernel", "/rel_embedding")) else array


def _check_experts(source: str, weights: Mapping[str, LazyArray]) -> None:
    """Raises InputError for the first expert whose shape or dtype is not that of most experts."""
    # Projection ('wi', 'wo', …) -> how many experts have each (shape, dtype).
    kinds: dict[str, collections.Counter[tuple[tuple[int, ...], str]]] = {}
    experts = [name for name in weights if ".mlp.experts." in name]
    for name in experts:
        kind = weights[name].shape, weights[name].dtype.name
        kinds.setdefault(name.split(".")[-2], collections.Counter())[kind] += 1
    for name in sorted(experts, key=_natural_order):
        ((expected, _),) = kinds[name.split(".")[-2]].most_common(1)
        actual = weights[name].shape, weights[name].dtype.name
        if actual != expected or len(actual[0]) != 2:
            shape = expected[0] if len(expected[0]) == 2 else "a matrix"
            raise InputError(
                f"{source}: {name}: expected {shape} {expected[1]}, got {actual[0]} {actual[1]}"
            )


def _natural_order(name: str) -> list[str | tuple[int, str]]:
    """Returns a sort key that puts expert_2 before expert_10."""
    # Numbers are compared by length first, then as text. `int` would refuse numbers of more than
    # 4,300 digits, which an untrusted name may have.
    parts = re.split(r"(\d+)", name)
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)]
