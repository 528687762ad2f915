"""Checks the config.json of a folder of transformers, and makes one for a model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from pemoe_jax.checkpoints.huggingface.names import Layout
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.file_io import JsonObject

if TYPE_CHECKING:  # `pemoe_jax.torch` imports this module, without jax
    from pemoe_jax.core.network import T5Config
    from pemoe_jax.core.sparse import Sparse

NAME = "config.json"
SWITCH = "switch_transformers"
_MODEL_TYPES = ("t5", "mt5", SWITCH)

# Settings that are constants in `core`: a model with other values is refused.
_EXPECTED: JsonObject = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_EXPECTED_ROUTER: JsonObject = {"router_bias": False, "router_dtype": "float32"}
# transformers' activation -> ours. "gelu" of transformers is missing, because it is the exact GELU;
# ours is T5's approximation by tanh.
_ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "linear": "linear",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
_THEIR_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu": "gelu_new", "linear": "linear"}

# Key of config.json -> field of `T5Config`, or of `Sparse`.
_DIMENSIONS = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_experts": "num_experts",
}
_DEPTHS = ("num_layers", "num_decoder_layers")
# Tokens that an expert takes from a row: more than any row has, so that transformers drops none.
_EXPERT_CAPACITY = 1 << 20


def check(path: epath.Path, config: JsonObject) -> None:
    """Raises InputError if config.json describes a model that `core` does not compute."""
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise InputError(
            f"{path}: model_type: expected one of {[*_MODEL_TYPES]}, got {model_type!r}"
        )
    if config.get("quantization_config"):
        raise InputError(f"{path}: quantization_config: expected none, got a quantized model")
    expected = _EXPECTED | (_EXPECTED_ROUTER if model_type == SWITCH else {})
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise InputError(f"{path}: {key}: expected {value!r} (a T5), got {config[key]!r:.80}")


def read_activations(path: epath.Path, config: JsonObject, is_gated: bool) -> tuple[str, ...]:
    """Returns `T5Config.mlp_activations`.

    Args:
      path: config.json, for errors.
      config: its contents.
      is_gated: whether the MLPs have the arrays wi_0 and wi_1, instead of one wi.

    Raises:
      InputError: the activation is unknown, or contradicts the arrays.
    """
    arrays = "wi_0 and wi_1" if is_gated else "one wi"
    if config["model_type"] == SWITCH:
        key = "dense_act_fn"
        value = config.get(key, "gelu" if is_gated else "relu")
        name = str(value)
        # Only switch-xxl-128 is gated, which transformers cannot load. Its config.json says gelu,
        # but T5's gated models have the approximation.
        if is_gated:
            name = "gelu_new" if name in ("gelu", "gated-gelu", "gelu_new") else ""
    else:
        key = "feed_forward_proj"
        value = config.get(key, "relu" if config["model_type"] == "t5" else "gated-gelu")
        name = str(value).removeprefix("gated-")
        if value == "gated-gelu":  # transformers reads "gated-gelu", and only it, as gelu_new
            name = "gelu_new"
        if is_gated != str(value).startswith("gated-"):
            name = ""
    if name not in _ACTIVATIONS:
        expected = "'gated-gelu' or" if is_gated else "'relu' or"
        default = "" if key in config else " (the default)"
        raise InputError(
            f"{path}: {key}: expected {expected} another activation of T5Config, by the arrays"
            f" ({arrays}), got {value!r:.80}{default}"
        )
    if config["model_type"] != SWITCH:
        for other, derived in (("dense_act_fn", name), ("is_gated_act", is_gated)):
            if config.get(other, derived) != derived:
                raise InputError(
                    f"{path}: {other}: expected {derived!r} (by {key} {value!r}),"
                    f" got {config[other]!r:.80}"
                )
    return (_ACTIVATIONS[name], "linear") if is_gated else (_ACTIVATIONS[name],)


def check_sizes(
    path: epath.Path, config: JsonObject, sizes: Mapping[str, Any], layout: Layout, has_depths: bool
) -> None:
    """Raises InputError if config.json contradicts the arrays.

    Args:
      path: config.json, for errors.
      config: its contents.
      sizes: the results of `dimensions.infer` and `infer_sparse` for the arrays.
      layout: the layout of the arrays.
      has_depths: whether config.json states the right numbers of layers, so that they are checked.
        Those of switch-xxl-128 and switch-c-2048 differ from the arrays (48 and 12 instead of 24
        and 24).
    """
    for key, field in _DIMENSIONS.items():
        if field not in sizes or (key in _DEPTHS and not has_depths):
            continue
        if config.get(key) not in (None, sizes[field]):
            raise InputError(
                f"{path}: {key}: expected {sizes[field]}, by the shapes of the arrays,"
                f" got {config[key]!r:.80}"
            )
    for stack, depth in layout.depths.items():
        key = f"num_sparse_{stack}_layers"
        count, layers = config.get(key), sorted(layout.sparse_layers.get(stack, ()))
        if not layout.is_switch or not has_depths or count is None:
            continue
        if type(count) is not int or _their_sparse_layers(depth, count) != layers:
            raise InputError(
                f"{path}: {key}: expected that of the sparse layers {layers} of {depth}, by the"
                f" arrays, got {count!r:.80}"
            )


def _their_sparse_layers(depth: int, count: int) -> list[int]:
    """Returns the layers that transformers makes sparse, given `num_sparse_…_layers`."""
    # As in configuration_switch_transformers.py (step) and modeling_switch_transformers.py (layers)
    # of transformers 5.24.
    step = depth // count if count > 0 else depth
    return [i for i in range(depth) if step == 1 or (step and i % step == 1)]


def check_writable(path: str, config: "T5Config", sparse: "Sparse | None") -> None:
    """Raises InputError if transformers has no class for a model; `sparse` None: a dense model."""
    gate = config.mlp_activations[1:]
    if sparse is None:
        if gate not in ((), ("linear",)):
            raise InputError(
                f"{path}: transformers' T5 has one activation, or one and 'linear', got"
                f" mlp_activations {config.mlp_activations}: use convert base"
            )
        return
    reasons = {  # reason -> whether it applies
        f"gated experts (mlp_activations {config.mlp_activations})": bool(gate),
        f"ROUTING {sparse.routing!r}": sparse.routing != "tokens",
        f"TOP_K {sparse.top_k}": sparse.top_k != 1,
        f"COMBINE {sparse.combine!r}": sparse.combine != "probability",
        "EXTRA_MLP True": sparse.extra_mlp,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(
                f"{path}: transformers' Switch Transformers have experts without a gate, TOP_K 1"
                f" and COMBINE 'probability', got {reason}: use convert base"
            )
    for stack, depth in _depths(config).items():
        _num_sparse_layers(path, stack, depth, sparse)


def _depths(config: "T5Config") -> dict[str, int]:
    return {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}


def _num_sparse_layers(path: str, stack: str, depth: int, sparse: "Sparse") -> int:
    """Returns the `num_sparse_…_layers` for which transformers makes the layers of `sparse` sparse.

    Raises:
      InputError: there is no such number.
    """
    layers = [i for i in range(depth) if sparse.is_sparse(i)]
    for count in range(len(layers), depth + 1):
        if _their_sparse_layers(depth, count) == layers:
            return count
    raise InputError(
        f"{path}: transformers has no {stack} of {depth} layers with the sparse layers {layers}"
        f" (SPARSE_STEP {sparse.sparse_step}): expected 1 or 2: use convert base"
    )


def make(
    config: "T5Config", sparse: "Sparse | None", dropout_rate: float, dtype: str
) -> JsonObject:
    """Returns the contents of config.json for a model that `check_writable` accepts."""
    sizes = config.as_dict() | ({} if sparse is None else {"num_experts": sparse.num_experts})
    activation = _THEIR_ACTIVATIONS[config.mlp_activations[0]]
    if sparse is None:
        is_gated = len(config.mlp_activations) > 1
        # transformers derives dense_act_fn and is_gated_act from feed_forward_proj, in which
        # "gated-gelu" means gelu_new.
        name = "gelu" if activation == "gelu_new" and is_gated else activation
        kind: JsonObject = {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "feed_forward_proj": f"gated-{name}" if is_gated else name,
        }
    else:
        kind = {
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": SWITCH,
            "dense_act_fn": activation,
            "expert_capacity": _EXPERT_CAPACITY,
            "router_jitter_noise": sparse.jitter,
            **_EXPECTED_ROUTER,
        }
        for stack, depth in _depths(config).items():
            kind[f"num_sparse_{stack}_layers"] = _num_sparse_layers("", stack, depth, sparse)
    return {
        **kind,
        **{key: sizes[field] for key, field in _DIMENSIONS.items() if field in sizes},
        **_EXPECTED,
        "dropout_rate": dropout_rate,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        # T5Config of transformers 5 would always save true here, whatever the model is.
        "tie_word_embeddings": config.logits_via_embedding,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        # The name in transformers 4. transformers 5 calls it `dtype`, but reads this name too.
        "torch_dtype": dtype,
    }
