"""Settings of adapters and routers, named as in `core.adapters` and `core.routing`."""

import dataclasses
from collections.abc import Mapping

from pemoe_jax.core import settings
from pemoe_jax.core.errors import InputError, check_choice, check_integer
from pemoe_jax.runtime.file_io import JsonObject

_VECTOR_SITES = ("key", "value", "gate")
_LORA_SITES = ("query", "key", "value", "out", "wi_0", "wo")
SITES = ("query", "key", "value", "out", "wi_0", "wi_1", "gate", "wo")
_KINDS = ("VectorExperts", "LoRAExperts")
# Method -> (kind of experts, whether a router mixes them, sites).
_METHODS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "ia3": ("VectorExperts", False, _VECTOR_SITES),
    "mov": ("VectorExperts", True, _VECTOR_SITES),
    "lora": ("LoRAExperts", False, _LORA_SITES),
    "molora": ("LoRAExperts", True, _LORA_SITES),
}


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Settings of a router, see `core.routing.Router`.

    Attributes:
      top_k: number of largest probabilities to keep; None keeps all.
      renormalize: whether the kept probabilities are rescaled to sum to one.
      straight_through: whether top-k routing has the gradients of soft routing.
      temperature: τ, by which the logits are divided.
      jitter_noise: ε; in training, the router's input is multiplied by U(1 - ε, 1 + ε).
      balance_loss: coefficient of the load-balance loss.
      z_loss: coefficient of the router z-loss.
      reads: the router's input, 'x' or 'y' of its site, or 'sentence', an embedding of the example;
        None: y for vectors and x for LoRA.
    """

    top_k: int | None = None
    renormalize: bool = False
    straight_through: bool = False
    temperature: float = 1.0
    jitter_noise: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    reads: str | None = None

    def __post_init__(self) -> None:
        _check_types("Router", self)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Settings of the experts at a site.

    Attributes:
      kind: 'VectorExperts' or 'LoRAExperts'.
      num_experts: number of experts, E.
      rank: R of LoRA experts.
      alpha: α of LoRA experts; the product of their matrices is scaled by α / R.
      router: settings of the router; None for (IA)³ and LoRA, which have one expert.
    """

    kind: str
    num_experts: int = 1
    rank: int = 4
    alpha: float = 16.0
    router: RouterConfig | None = None

    def __post_init__(self) -> None:
        check_choice("an adapter's kind", self.kind, _KINDS)
        _check_types(self.kind, self)

    def describe(self) -> JsonObject:
        """Returns the settings as `core.adapters.describe` does."""
        description = dataclasses.asdict(self)
        # As in JAX, where vectors have no rank and no alpha.
        if self.kind == "VectorExperts":
            del description["rank"], description["alpha"]
        if self.router is not None:
            description["router"] = {"kind": "Router", **description["router"]}
        return description


def _check_types(kind: str, config: "RouterConfig | ExpertsConfig") -> None:
    # Only types. `layer` checks ranges, since some depend on other settings: top_k is at most E.
    for field in dataclasses.fields(config):
        settings.check_type(f"{kind}.{field.name}", getattr(config, field.name), field.type)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A method and its settings.

    Attributes:
      method: 'ia3', 'mov', 'lora' or 'molora'. If `adapters` is passed, any name.
      num_experts: E of mov and molora.
      rank, alpha: R and α of lora and molora.
      router: settings of the routers of mov and molora.
      sentence_dim: S, size of the sentence embeddings that routers may read; None: D.
      adapters: site -> settings of its experts, which replace the settings from `num_experts` to
        `router`; None: made from these settings, at the sites of the method.
    """

    method: str
    num_experts: int = 10
    rank: int = 4
    alpha: float = 16.0
    router: RouterConfig = RouterConfig()
    sentence_dim: int | None = None
    adapters: Mapping[str, ExpertsConfig] | None = None

    def __post_init__(self) -> None:
        if self.sentence_dim is not None:
            check_integer("MixtureConfig.sentence_dim", self.sentence_dim)
        if self.adapters is not None:
            _check_sites(self.adapters)
            return
        check_choice("MixtureConfig.method", self.method, tuple(_METHODS))
        kind, is_routed, sites = _METHODS[self.method]
        num_experts, router = (self.num_experts, self.router) if is_routed else (1, None)
        experts = ExpertsConfig(kind, num_experts, self.rank, self.alpha, router)
        # The class is frozen, so plain assignment raises.
        object.__setattr__(self, "adapters", dict.fromkeys(sites, experts))

    def describe(self) -> dict[str, JsonObject]:
        """Returns site -> settings as `core.adapters.describe` does, for checkpoints."""
        assert self.adapters is not None
        return {site: self.adapters[site].describe() for site in SITES if site in self.adapters}


def parse_description(description: Mapping[str, object]) -> dict[str, ExpertsConfig]:
    """Returns site -> settings of its experts; the inverse of `MixtureConfig.describe`.

    Raises:
      InputError: a site, a kind of adapter or a setting is unknown.
    """
    _check_sites(description)
    return {site: _parse_experts(fields) for site, fields in description.items()}


def _check_sites(adapters: Mapping[str, object]) -> None:
    unknown = sorted(adapters.keys() - set(SITES))
    if unknown:
        raise InputError(f"unknown adapter sites {unknown}: expected some of {[*SITES]}")


def _parse_experts(description: object) -> ExpertsConfig:
    fields = _known_fields(description, ExpertsConfig)
    router = fields.get("router")
    if router is not None:
        router_fields = _known_fields(router, RouterConfig)
        if router_fields.pop("kind", "Router") != "Router":
            raise InputError(f"unknown router {router!r:.80}: expected one of kind 'Router'")
        fields["router"] = RouterConfig(**router_fields)
    if "kind" not in fields:
        raise InputError(f"an adapter must have a kind, got {description!r:.60}")
    return ExpertsConfig(**fields)


def _known_fields(description: object, config: type) -> JsonObject:
    """Returns a description's fields; raises InputError if one is neither `kind` nor a setting."""
    if not isinstance(description, Mapping):
        noun = "a router" if config is RouterConfig else "an adapter"
        raise InputError(f"{noun} must be described by an object, got {description!r:.60}")
    names = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(description.keys() - {"kind", *names})
    if unknown:
        kind = description.get("kind", config.__name__)
        raise InputError(f"{kind} has no settings {unknown}: written by another version?")
    return dict(description)
