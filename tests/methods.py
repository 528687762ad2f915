"""The table of methods that the tests run over, with small models and batches."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.core import network, params
from pemoe_jax.core.adapters import Adapters, LoRAExperts, VectorExperts
from pemoe_jax.core.routing import Router

EXPERTS = 3
VECTOR_SITES = ("key", "value", "gate")
LORA_SITES = ("query", "key", "value", "out", "wi_0", "wo")
ADAPTER = r".*_adapter/.*"

# H * K = 12 differs from D = 16, so that a reshape that confuses them fails. One layer each, since
# compilation takes most of the time; test_hf_parity.py compares deeper stacks.
CONFIG = network.T5Config(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: sites and kind of its adapters, and patterns of the trainable parameters."""

    sites: tuple[str, ...]
    expert: type | None  # VectorExperts, LoRAExperts or None
    routed: bool
    trainable: tuple[str, ...]

    def adapters(self, num_experts: int = EXPERTS) -> Adapters:
        if self.expert is None:
            return Adapters()
        kwargs = {"num_experts": num_experts, "router": Router} if self.routed else {}
        return Adapters(**{site: functools.partial(self.expert, **kwargs) for site in self.sites})


METHODS = {
    "full": Method((), None, False, (".*",)),
    "ia3": Method(VECTOR_SITES, VectorExperts, False, (ADAPTER,)),
    "mov": Method(VECTOR_SITES, VectorExperts, True, (ADAPTER,)),
    "lora": Method(LORA_SITES, LoRAExperts, False, (ADAPTER,)),
    "molora": Method(LORA_SITES, LoRAExperts, True, (ADAPTER,)),
}
PEFT_METHODS = tuple(name for name in METHODS if name != "full")
# A routed method -> the method that it equals with one expert.
PLAIN = {"mov": "ia3", "molora": "lora"}


@functools.cache
def model(
    method: str, num_experts: int = EXPERTS, dtype: str = "float32", dropout_rate: float = 0.0
) -> network.Transformer:
    config = dataclasses.replace(CONFIG, dtype=dtype, dropout_rate=dropout_rate)
    return network.Transformer(config, METHODS[method].adapters(num_experts))


@functools.cache
def random_params(method: str, num_experts: int = EXPERTS) -> dict:
    return random_params_of(model(method, num_experts))


def random_params_of(transformer: network.Transformer) -> dict:
    """Returns random parameters with which no adapter is the identity and experts differ.

    An array depends on its path and shape alone, so all methods have the same base.
    """
    arrays = {}
    for path, shape in params.flatten(network.param_shapes(transformer)).items():
        noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape.shape)
        if path.endswith(("scale", "vectors")):
            noise = 1 + 0.3 * noise
        elif "lora_" in path:
            noise *= 0.2
        elif path.endswith("kernel") and "router" not in path:
            noise *= shape.shape[0] ** -0.5
        # NumPy's name: tests in double precision patch `jnp.float32`, and this result is cached.
        arrays[path] = jnp.asarray(noise.astype(np.float32))
    return params.unflatten(arrays)


@functools.cache
def start(method: str) -> dict:
    """Returns a random base with the initial adapters of a run."""
    base = params.flatten(random_params("full"))
    adapters = network.init_params(model(method), 0, lambda path: "_adapter/" in path)
    return params.unflatten(base | params.flatten(adapters))


@functools.cache
def forward(method: str, num_experts: int = EXPERTS, dtype: str = "float32"):
    """Returns a jitted (params, batch) -> logits [B, L, V], without dropout."""
    return jax.jit(
        lambda p, batch: model(method, num_experts, dtype).apply(
            {"params": p}, **model_inputs(batch), enable_dropout=False
        )
    )


def model_inputs(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k != "decoder_loss_weights"}


def rows(rng: np.random.Generator, lengths: list[int], width: int) -> np.ndarray:
    """Returns random int32 tokens [len(lengths), width] that end in eos (1), padded with 0."""
    out = np.zeros((len(lengths), width), np.int32)
    for row, n in zip(out, lengths, strict=True):
        row[: n - 1] = rng.integers(3, CONFIG.vocab_size, n - 1)
        row[n - 1] = 1
    return out


def shift_right(target: np.ndarray) -> np.ndarray:
    """Returns decoder inputs: the targets shifted right by a 0."""
    pad = [(0, 0)] * (target.ndim - 1) + [(1, 0)]
    return np.pad(target, pad)[..., :-1]


def example_batch(
    inputs: tuple[int, ...] = (7, 4, 2, 5),
    targets: tuple[int, ...] = (5, 3, 1, 4),
    seed: int = 0,
    widths: tuple[int, int] = (8, 6),
) -> dict[str, np.ndarray]:
    """Returns an unpacked batch with rows of these lengths."""
    rng = np.random.default_rng(seed)
    encoder, target = rows(rng, list(inputs), widths[0]), rows(rng, list(targets), widths[1])
    return {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": shift_right(target),
        "decoder_target_tokens": target,
        "decoder_loss_weights": (target > 0).astype(np.int32),
    }


def pack(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packs the rows of a batch into one row with segment ids, positions and two of padding."""
    columns: dict[str, list[np.ndarray]] = {}
    for i in range(len(batch["encoder_input_tokens"])):
        for side, key in (
            ("encoder", "encoder_input_tokens"),
            ("decoder", "decoder_target_tokens"),
        ):
            n = int((batch[key][i] > 0).sum())
            for name in [k for k in batch if k.startswith(side)]:
                columns.setdefault(name, []).append(batch[name][i, :n])
            columns.setdefault(f"{side}_segment_ids", []).append(np.full(n, i + 1))
            columns.setdefault(f"{side}_positions", []).append(np.arange(n))
    packed = {k: np.concatenate(v).astype(np.int32)[None] for k, v in columns.items()}
    return {k: np.pad(v, ((0, 0), (0, 2))) for k, v in packed.items()}


def largest_difference(a, b) -> float:
    """Returns the largest difference, relative to the largest magnitude of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())
