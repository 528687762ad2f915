"""Settings of sparse MLPs: which layers are sparse, and how tokens are assigned to experts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pemoe_jax.core import dispatch
from pemoe_jax.core.errors import InputError, check_choice, check_integer

ROUTINGS = ("tokens", "experts")
SECOND_EXPERTS = ("all", "random")
PRIORITIES = ("position", "probability")


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Which MLPs of a model are sparse, and how tokens are assigned to experts.

    Attributes:
      num_experts: number of experts, E.
      sparse_step: layer i of a stack is sparse if i % sparse_step == sparse_step - 1.
      routing: 'tokens' (tokens choose their top_k experts) or 'experts' (experts choose tokens; in
        a decoder, tokens choose in any case, since experts would choose by later tokens too).
      top_k: k, the number of experts that a token chooses.
      combine: weights of the experts' outputs: 'probability' (p), 'normalized' (p / Σ p over the
        chosen) or 'straight' (p / stop_gradient(Σ p)); see `dispatch.combine_weights`.
      second_expert: 'all' (every choice is used) or 'random' (in training, a choice after the first
        is used with probability min(1, g / 0.2), where g is its normalized weight; see
        `dispatch.keep_at_random`).
      priority: which tokens take the places of an expert first: 'position' (from left to right) or
        'probability' (tokens whose first choice is most probable; encoder only).
      capacity_factor: in training, an expert has C = max(round(factor · tokens / E), min_capacity)
        places in a group. C does not grow with k (as in T5X). None: no limit.
      eval_capacity_factor: the factor in evaluation and decoding; None: no limit, or
        capacity_factor where experts choose.
      min_capacity: lower bound of the capacity C that is computed from a factor.
      capacity: C itself; replaces both factors and the minimum (as in Hugging Face's Switch).
      group: the groups of tokens in which an expert has C places: 'row' (each row of the batch is a
        group), or the desired number of tokens in a group of the global batch (as in T5X). The
        actual number may differ, see `dispatch.num_groups`.
      count_padding: whether padding is routed, takes places and counts in losses (as in T5X).
      jitter: ε; in training the router's input is multiplied by U(1 - ε, 1 + ε).
      expert_dropout_rate: dropout rate of the experts' hidden activations; None: the model's.
      balance_loss: coefficient of E·Σ f_e P_e, where f_e is the share of expert e in all choices
        and P_e is its mean probability. This product is 1 if routing is even. Not used in layers
        whose experts choose.
      router_z_loss: coefficient of the mean of log(Z)², where Z is the denominator of a router's
        softmax.
      extra_mlp: whether a dense MLP follows each sparse one (ST-MoE).

    Raises:
      InputError: a setting is out of its range.
    """

    num_experts: int = 8
    sparse_step: int = 2
    routing: str = "tokens"
    top_k: int = 1
    combine: str = "probability"
    second_expert: str = "all"
    priority: str = "position"
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    capacity: int | None = None
    group: int | str = "row"
    count_padding: bool = False
    jitter: float = 0.0
    expert_dropout_rate: float | None = None
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    extra_mlp: bool = False

    def __post_init__(self) -> None:
        check_integer("NUM_EXPERTS", self.num_experts, 2)
        check_integer("SPARSE_STEP", self.sparse_step)
        check_integer("TOP_K", self.top_k)
        if self.top_k > self.num_experts:
            raise InputError(
                f"TOP_K must be at most NUM_EXPERTS ({self.num_experts}), got {self.top_k}"
            )
        check_integer("MIN_CAPACITY", self.min_capacity)
        if self.capacity is not None:
            check_integer("CAPACITY", self.capacity)
        if not isinstance(self.group, str):
            check_integer("GROUP", self.group)
        elif self.group != "row":
            raise InputError(f"GROUP must be 'row' or a positive integer, got {self.group!r}")
        check_choice("ROUTING", self.routing, ROUTINGS)
        check_choice("COMBINE", self.combine, dispatch.COMBINE)
        check_choice("SECOND_EXPERT", self.second_expert, SECOND_EXPERTS)
        check_choice("PRIORITY", self.priority, PRIORITIES)
        _check_factor("CAPACITY_FACTOR", self.capacity_factor)
        _check_factor("EVAL_CAPACITY_FACTOR", self.eval_capacity_factor)
        if self.routing == "experts" and self.capacity_factor is None and self.capacity is None:
            raise InputError("CAPACITY_FACTOR must be a number with ROUTING='experts', got None")
        _check_number("JITTER", self.jitter, 1.0)
        if self.expert_dropout_rate is not None:
            _check_number("EXPERT_DROPOUT_RATE", self.expert_dropout_rate, 1.0)
        _check_number("BALANCE_LOSS", self.balance_loss)
        _check_number("ROUTER_Z_LOSS", self.router_z_loss)
        for name, value in (("COUNT_PADDING", self.count_padding), ("EXTRA_MLP", self.extra_mlp)):
            if not isinstance(value, bool):
                raise InputError(f"{name} must be True or False, got {value!r}")
        # The weight of a single expert is then p / p = 1, whatever the router computes.
        if self.combine == "normalized" and self.top_k == 1:
            raise InputError(
                "COMBINE='normalized' with TOP_K=1 gives routers no gradient from the task: pass"
                " --gin.COMBINE=\"'straight'\""
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether a stack's layer with this index has a sparse MLP."""
        return layer % self.sparse_step == self.sparse_step - 1

    def group_capacity(self, num_tokens: int, deterministic: bool) -> int | None:
        """Returns C for groups of `num_tokens` tokens; None without a limit.

        `deterministic` is True in evaluation and decoding.
        """
        if self.capacity is not None:
            return self.capacity
        factor = self.eval_capacity_factor if deterministic else self.capacity_factor
        if self.routing == "experts" and factor is None:  # experts that choose need a limit
            factor = self.capacity_factor
        if factor is None:
            return None
        return dispatch.capacity(num_tokens, self.num_experts, factor, self.min_capacity)


def describe(sparse: Sparse | None) -> dict[str, Any] | None:
    """Returns the settings as plain data, for checkpoints; None for a dense model."""
    return None if sparse is None else dataclasses.asdict(sparse)


def from_description(description: Mapping[str, Any] | None) -> Sparse | None:
    """Returns the settings of a description; the inverse of `describe`.

    A setting that the description does not have keeps its default.

    Raises:
      InputError: a setting is unknown or out of its range.
    """
    if description is None:
        return None
    known = {field.name for field in dataclasses.fields(Sparse)}
    if unknown := sorted(description.keys() - known):
        raise InputError(f"Sparse has no settings {unknown}: written by another version?")
    return Sparse(**description)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_factor(name: str, value: float | None) -> None:
    if value is not None and not (_is_number(value) and 0 < value < math.inf):
        raise InputError(f"{name} must be None or a positive number, got {value!r}")


def _check_number(name: str, value: float, upper_bound: float = math.inf) -> None:
    if not (_is_number(value) and 0 <= value < upper_bound):
        is_bounded = upper_bound < math.inf
        expected = f"in [0, {upper_bound:g})" if is_bounded else "a number of at least 0"
        raise InputError(f"{name} must be {expected}, got {value!r}")
