"""Checks the config.json of a Hugging Face folder, and makes one for a model."""

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

# Settings that are constants in `core`. A model with other values is refused.
_EXPECTED: JsonObject = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_EXPECTED_ROUTER: JsonObject = {"router_bias": False, "router_dtype": "float32"}
# transformers' activation -> ours. The "gelu" of transformers is missing, because it is the exact
# GELU, while ours is T5's tanh approximation.
_ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "linear": "linear",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}
_THEIR_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu": "gelu_new", "linear": "linear"}

# Key of config.json -> field of `T5Config`; `num_experts` is a field of `Sparse`.
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
# Largest number of tokens that an expert takes from a row of the batch: more than any row has, so
# that transformers drops none.
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
            raise InputError(f"{path}: {key}: only {value!r} is supported, got {config[key]!r:.80}")


def read_activations(path: epath.Path, config: JsonObject, is_gated: bool) -> tuple[str, ...]:
    """Returns `T5Config.mlp_activations`.

    Args:
      path: path of config.json, for errors.
      config: its contents.
      is_gated: whether the MLPs have the arrays wi_0 and wi_1, instead of one wi.

    Raises:
      InputError: the activation is unsupported, or contradicts the arrays.
    """
    key, default = "feed_forward_proj", "relu" if config["model_type"] == "t5" else "gated-gelu"
    names = {name: name for name in _ACTIVATIONS}  # accepted value -> transformers' activation
    if config["model_type"] == SWITCH:
        key, default = "dense_act_fn", "relu"
        # The only gated Switch model is switch-xxl-128, which transformers cannot load. Its
        # config.json says "gelu", but T5X's gated models use the tanh approximation. T5's name for
        # it, "gated-gelu", is accepted too. "gelu" is the default, because no gated model has relu.
        if is_gated:
            default, names = "gelu", dict.fromkeys(("gelu", "gated-gelu", "gelu_new"), "gelu_new")
    elif is_gated:
        names = {f"gated-{name}": name for name in names}
        # As in transformers: in "gated-gelu", unlike elsewhere, "gelu" means gelu_new.
        names["gated-gelu"] = "gelu_new"
    value = config.get(key, default)
    name = names.get(value) if isinstance(value, str) else None
    if name is None:
        accepted = ", ".join(map(repr, names))
        arrays = "wi_0 and wi_1" if is_gated else "one wi"
        note = "" if key in config else " (the default)"
        raise InputError(
            f"{path}: {key}: expected one of {accepted} (the arrays have {arrays}), got"
            f" {value!r:.80}{note}"
        )
    if config["model_type"] != SWITCH:
        for other, derived in (("dense_act_fn", name), ("is_gated_act", is_gated)):
            if config.get(other, derived) != derived:
                raise InputError(
                    f"{path}: {other}: expected {derived!r}, as {key} is {value!r}, got"
                    f" {config[other]!r:.80}"
                )
    return (_ACTIVATIONS[name], "linear") if is_gated else (_ACTIVATIONS[name],)


def check_sizes(
    path: epath.Path,
    config: JsonObject,
    sizes: Mapping[str, Any],
    layout: Layout,
    check_depths: bool,
) -> None:
    """Raises InputError if config.json contradicts the arrays.

    Args:
      path: path of config.json, for errors.
      config: its contents.
      sizes: the results of `dimensions.infer` and `infer_sparse` for the arrays.
      layout: the layout of the arrays.
      check_depths: whether to check the numbers of layers. False for switch-xxl-128 and
        switch-c-2048, whose config.json is wrong. That of switch-xxl-128 states 48 encoder layers
        and 12 decoder layers, where the arrays have 24 of each.
    """
    for key, field in _DIMENSIONS.items():
        if field not in sizes or (key in _DEPTHS and not check_depths):
            continue
        if config.get(key) not in (None, sizes[field]):
            raise InputError(
                f"{path}: {key}: expected {sizes[field]} (from the shapes of the arrays), got"
                f" {config[key]!r:.80}"
            )
    for stack, depth in layout.depths.items():
        key = f"num_sparse_{stack}_layers"
        count, layers = config.get(key), sorted(layout.sparse_layers.get(stack, ()))
        if not layout.is_switch or not check_depths or count is None:
            continue
        if type(count) is not int or _their_sparse_layers(depth, count) != layers:
            raise InputError(
                f"{path}: {key}: {count!r:.80} does not give the sparse layers of the arrays,"
                f" {layers} of {depth} layers"
            )


def _their_sparse_layers(depth: int, count: int) -> list[int]:
    """Returns the layers that transformers makes sparse, given `num_sparse_…_layers`."""
    # From transformers 5.24: configuration_switch_transformers.py has the step, and
    # modeling_switch_transformers.py the layers.
    step = depth // count if count > 0 else depth
    return [i for i in range(depth) if step == 1 or (step and i % step == 1)]


def check_writable(path: str, config: "T5Config", sparse: "Sparse | None") -> None:
    """Raises InputError if no transformers class can represent the model.

    Args:
      path: the folder to write, for errors.
      config: the model's configuration.
      sparse: settings of its sparse layers; None for a dense model.
    """
    second_activation = config.mlp_activations[1:]  # of wi_1; empty if the MLP is not gated
    if sparse is None:
        if second_activation not in ((), ("linear",)):
            raise InputError(
                f"{path}: transformers' T5 supports one activation, or one gated by 'linear', got"
                f" mlp_activations {config.mlp_activations}; use `pemoe convert base`"
            )
        return
    activations = config.mlp_activations
    settings = {  # setting -> whether transformers lacks it
        f"experts whose MLP is gated (mlp_activations {activations})": bool(second_activation),
        f"ROUTING {sparse.routing!r}": sparse.routing != "tokens",
        f"TOP_K {sparse.top_k}": sparse.top_k != 1,
        f"COMBINE {sparse.combine!r}": sparse.combine != "probability",
        "EXTRA_MLP True": sparse.extra_mlp,
    }
    for setting, is_missing in settings.items():
        if is_missing:
            raise InputError(
                f"{path}: transformers' Switch Transformers cannot represent {setting} (only"
                " experts with ungated MLPs, ROUTING 'tokens', TOP_K 1, COMBINE 'probability' and"
                " EXTRA_MLP False); use `pemoe convert base`"
            )
    for stack, depth in _depths(config).items():
        _num_sparse_layers(path, stack, depth, sparse)


def _depths(config: "T5Config") -> dict[str, int]:
    return {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}


def _num_sparse_layers(path: str, stack: str, depth: int, sparse: "Sparse") -> int:
    """Returns the `num_sparse_…_layers` for which transformers makes the same layers sparse.

    Raises:
      InputError: there is no such number, because SPARSE_STEP is 3 or more, or is 2 in a stack of
        one layer, which transformers always makes sparse.
    """
    layers = [i for i in range(depth) if sparse.is_sparse(i)]
    if _their_sparse_layers(depth, len(layers)) == layers:
        return len(layers)
    allowed = "1 or 2" if depth > 1 else "1, as its only layer is always sparse,"
    raise InputError(
        f"{path}: SPARSE_STEP must be {allowed} for transformers, got {sparse.sparse_step}"
        f" ({stack}: sparse layers {layers} of {depth}); use `pemoe convert base`"
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
        # Read by transformers 5, whose own T5Config nevertheless saves true for every model.
        "tie_word_embeddings": config.logits_via_embedding,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        # The name in transformers 4. transformers 5 calls it `dtype`, but reads this name too.
        "torch_dtype": dtype,
    }
