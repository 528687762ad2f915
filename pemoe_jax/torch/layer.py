"""Experts and routers in PyTorch, with the equations, names and shapes of `core.adapters`.

Parameters are float32, even if the base computes in bfloat16. Probabilities and mixtures of vectors
are computed in float32.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from pemoe_jax.core import settings
from pemoe_jax.core.errors import InputError
from pemoe_jax.torch.config import ExpertsConfig, RouterConfig


@dataclasses.dataclass
class TokenInfo:
    """What routers use besides x and y; it is the same at all sites of a stack.

    Attributes:
      valid: [B, L], 0 at padding, which auxiliary losses ignore; None: no token is padding.
      sentence: [B, S], an embedding of each row's example; None: not passed.
    """

    valid: Tensor | None = None
    sentence: Tensor | None = None


class Router(nn.Module):
    """Computes `softmax(x W / τ)` over experts, in float32; top-k routing keeps the k largest.

    After a forward pass in training, `aux_loss` is the auxiliary loss, or None if both coefficients
    are 0.

    Args:
      num_features: size of the features' last axis.
      num_experts: number of experts, E.
      config: the other settings.
      device: device of the kernel [features, E].
    """

    def __init__(
        self, num_features: int, num_experts: int, config: RouterConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        # `check_router` reads the settings as attributes of the router, as in Flax.
        for field in dataclasses.fields(config):
            setattr(self, field.name, getattr(config, field.name))
        settings.check_router(self)
        self.config = config
        self.kernel = nn.Parameter(torch.empty(num_features, num_experts, device=device))
        nn.init.normal_(self.kernel, std=0.02)
        self.aux_loss: Tensor | None = None

    def forward(self, features: Tensor, tokens: TokenInfo) -> Tensor:
        """Returns probabilities, float32 [..., E], from features [..., D] or embeddings [B, S]."""
        # Autocast is disabled, because it would compute the product in bfloat16.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.has_noise():
                low, high = 1 - self.config.jitter_noise, 1 + self.config.jitter_noise
                features = features * torch.empty_like(features).uniform_(low, high)
            return self.route(features @ self.kernel.float(), tokens)

    def has_noise(self) -> bool:
        """Whether the features are multiplied by noise: in training, if ε > 0."""
        return self.training and self.config.jitter_noise > 0

    def route(self, logits: Tensor, tokens: TokenInfo) -> Tensor:
        """Turns float32 logits [..., E] into probabilities."""
        config = self.config
        if config.temperature != 1:
            logits = logits / config.temperature
        soft = _softmax(logits)
        if self.training and (config.balance_loss or config.z_loss):
            self.aux_loss = self._compute_aux_loss(logits, soft, tokens)
        if config.top_k is None or config.top_k >= self.num_experts:
            return soft
        probs = _keep_largest(soft, config.top_k)
        if config.renormalize:
            probs = probs / probs.sum(-1, keepdim=True)
        # Straight-through: the value of `probs` with the gradient of `soft`.
        return soft + (probs - soft).detach() if config.straight_through else probs

    def _compute_aux_loss(self, logits: Tensor, soft: Tensor, tokens: TokenInfo) -> Tensor:
        """Returns the auxiliary loss [], as `core.routing.compute_statistics` does.

        Load balance: E · Σ_e f_e P_e, with the share f_e of tokens whose top expert is e, and the
        mean probability P_e. Router z-loss: the mean of log(Z)².
        """
        weights = _token_weights(logits, tokens.valid)
        weight = weights.sum().clamp_min(1e-9)
        log_z = torch.logsumexp(logits, dim=-1)
        z_loss = (weights * log_z.square()).sum() / weight
        is_largest = (logits >= logits.amax(-1, keepdim=True)).float()  # ties all count
        axes = tuple(range(logits.dim() - 1))
        top_1 = (weights[..., None] * is_largest).sum(axes).detach()
        top_1_shares = top_1 / top_1.sum().clamp_min(1e-9)
        mean_probs = (weights[..., None] * soft).sum(axes) / weight
        balance_loss = self.num_experts * (top_1_shares * mean_probs).sum()
        return self.config.balance_loss * balance_loss + self.config.z_loss * z_loss


def _softmax(logits: Tensor) -> Tensor:
    if logits.device.type != "cpu":
        return functional.softmax(logits, dim=-1)
    # On a CPU, torch's softmax takes 0.17 µs for each row, however short the row is. For the 6144
    # rows of MoV-10 at a key of T5 Small that is 1.07 ms, while the lines below take 0.19 ms.
    exp = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    return exp / exp.sum(-1, keepdim=True)


def _keep_largest(probs: Tensor, k: int) -> Tensor:
    """Sets all but the k largest entries of the last axis to 0; keeps the first of equal ones."""
    # A stable sort, since `topk` does not specify which of equal entries it keeps.
    order = probs.detach().sort(dim=-1, descending=True, stable=True).indices
    return probs * torch.zeros_like(probs).scatter(-1, order[..., :k], 1.0)


def _token_weights(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Returns the weights of distributions in auxiliary losses; padding has the weight 0.

    Args:
      logits: [B, L, ..., E], or [B, E] with one distribution per row.
      valid: [B, L], 0 at padding; None: no token is padding.

    Returns:
      float32 [B, L, ...] or [B].
    """
    if valid is None:
        return logits.new_ones(logits.shape[:-1])
    valid = valid.to(logits)
    if logits.dim() == 2:  # the distribution of a row counts once for each of its tokens
        return valid.sum(1)
    return valid.reshape(*valid.shape, *[1] * (logits.dim() - 3)).expand(logits.shape[:-1])


class Experts(nn.Module):
    """Base class of the two kinds of experts: holds the settings and the router.

    Args:
      config: settings.
      x_features: size of x's last axis.
      y_shape: axes of y after batch and length: (H, K), (D,) or (F,).
      sentence_dim: size of sentence embeddings, S.
      tokens: inputs of the router, which the model sets before each forward pass.
      device: device of the parameters.
    """

    default_source = "x"  # what the router reads unless its setting `reads` is set

    def __init__(
        self,
        config: ExpertsConfig,
        x_features: int,
        y_shape: tuple[int, ...],
        sentence_dim: int,
        tokens: TokenInfo,
        device: torch.device,
    ) -> None:
        super().__init__()
        settings.check_experts(config)
        self.num_experts = config.num_experts
        self.tokens = tokens
        self.router: Router | None = None
        if config.router is not None:
            self.source = config.router.reads or self.default_source
            # Vectors are mixed per head, so their router reads each head of y by itself.
            y_features = y_shape[-1] if config.kind == "VectorExperts" else _product(y_shape)
            sizes = {"x": x_features, "y": y_features, "sentence": sentence_dim}
            self.router = Router(sizes[self.source], config.num_experts, config.router, device)
        self._make_parameters(config, x_features, y_shape, device)

    def _make_parameters(
        self,
        config: ExpertsConfig,
        x_features: int,
        y_shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """Creates the parameters of the experts; each kind has its own."""
        raise NotImplementedError

    def _route(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the probabilities [B, L, E], or [B, L, H, E] if the router reads a y with heads.

        L is 1 if the router reads sentence embeddings.
        """
        assert self.router is not None
        if self.source != "sentence":
            return self.router(x if self.source == "x" else y, self.tokens)
        sentence = self.tokens.sentence
        if sentence is None:
            raise InputError(
                "sentence_embeddings must be passed to the model, whose routers read them, got None"
            )
        probs = self.router(sentence.to(x.device), self.tokens)[:, None]
        # `generate` repeats each example for its beams and returned sequences, as consecutive rows.
        return probs.repeat_interleave(x.shape[0] // probs.shape[0], 0)


class VectorExperts(Experts):
    """`y * Σ_e p_e l_e`: (IA)³ without a router, MoV with one, which reads y by default.

    Parameters: `vectors` l, [H, E, K] at query, key and value, else [E, D or F]; initially ones.
    """

    default_source = "y"

    def _make_parameters(
        self,
        config: ExpertsConfig,
        x_features: int,
        y_shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        *heads, features = y_shape
        shape = (*heads, config.num_experts, features)
        self.vectors = nn.Parameter(torch.ones(shape, device=device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the scaled y, [B, L, Dout] in y's dtype, from x [B, L, Din] and y.

        Dout is H·K at a site with heads.
        """
        if self.router is None:
            return y * self.vectors[..., 0, :].reshape(-1).to(y.dtype)
        by_head = y
        if self.vectors.dim() == 3:
            by_head = y.unflatten(-1, (self.vectors.shape[0], self.vectors.shape[2]))
        scale = _mix_vectors(self._route(x, by_head), self.vectors)  # [B, L, Dout]
        # The scale is rounded once, after mixing: bfloat16 has steps of 0.8 % above 1.
        return y * scale.to(y.dtype)


def _mix_vectors(probs: Tensor, vectors: Tensor) -> Tensor:
    """Returns `Σ_e p_e l_e`, float32 [B, L, (H·) K].

    Args:
      probs: p, [B, L, H, E], or [B, L, E] if all heads share a distribution or there are no heads.
      vectors: l, [H, E, K] or [E, K].
    """
    vectors = vectors.float()
    with torch.autocast(probs.device.type, enabled=False):
        if probs.dim() == 4:
            return torch.einsum("blhe,hek->blhk", probs, vectors).flatten(-2)
        # Heads are joined: one product with [E, (H·) K].
        return probs @ vectors.movedim(-2, 0).reshape(vectors.shape[-2], -1)


class LoRAExperts(Experts):
    """`y + (α/R) Σ_e p_e B_e A_e x`: LoRA without a router, MoLORA with one, reading x by default.

    The probabilities are multiplied in at the rank axis, `((x @ A[Din, E·R]) * p) @ B[E·R, Dout]`,
    so that the experts' outputs [B, L, E, Dout] are never materialized.

    Parameters: `lora_a` [Din, E, R] ~ N(0, 0.02²), `lora_b` [E, R, Dout] = 0; Dout is H·K with
    heads.
    """

    def _make_parameters(
        self,
        config: ExpertsConfig,
        x_features: int,
        y_shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.rank, self.scaling = config.rank, config.alpha / config.rank
        shape = (x_features, config.num_experts, config.rank)
        self.lora_a = nn.Parameter(torch.empty(shape, device=device))
        nn.init.normal_(self.lora_a, std=0.02)
        shape = (config.num_experts, config.rank, _product(y_shape))
        self.lora_b = nn.Parameter(torch.zeros(shape, device=device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y plus the experts' output, [B, L, Dout] in y's dtype, from x [B, L, Din]."""
        dtype = y.dtype
        lora_a = self.lora_a.flatten(1).to(dtype)
        lora_b = self.lora_b.flatten(0, 1).to(dtype)
        if self.router is None:
            low_rank = x.to(dtype) @ lora_a  # [B, L, R]
        else:
            probs, low_rank = self._route_and_project(x, y, lora_a)
            by_expert = low_rank.unflatten(-1, (self.num_experts, self.rank))
            low_rank = (probs[..., None] * by_expert).flatten(-2)  # [B, L, E·R]
        # Scaled before the second product, where there are E·R columns instead of Dout.
        low_rank = (low_rank * self.scaling).to(dtype).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), low_rank, lora_b).view_as(y)

    def _route_and_project(self, x: Tensor, y: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the probabilities [B, L or 1, E] and `x @ lora_a`, [B, L, E·R]."""
        assert self.router is not None
        kernel = self.router.kernel
        is_float32 = x.dtype == lora_a.dtype == kernel.dtype == torch.float32
        # One product is faster than two. It serves both if LoRA computes in float32, as the router
        # always does.
        if self.source == "x" and is_float32 and not self.router.has_noise():
            with torch.autocast(x.device.type, enabled=False):
                logits, low_rank = (x @ torch.cat([kernel, lora_a], 1)).split(
                    [kernel.shape[1], lora_a.shape[1]], -1
                )
                return self.router.route(logits, self.tokens), low_rank
        return self._route(x, y), x.to(lora_a.dtype) @ lora_a


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class AdaptedLinear(nn.Module):
    """A projection of the base, with the experts at its site."""

    def __init__(self, base_layer: nn.Module, adapter: Experts) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter

    @property
    def weight(self) -> Tensor:
        """The projection's matrix, whose dtype transformers reads."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, in] to [B, L, out]."""
        return self.adapter(x, self.base_layer(x))


class AdaptedMlp(nn.Module):
    """An MLP of the base with experts at gate, the activation.

    No module of the base computes the activation alone, so the whole MLP is computed here.
    """

    def __init__(self, base_layer: nn.Module, adapter: Experts) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, D] to [B, L, D]."""
        mlp = self.base_layer
        is_gated = hasattr(mlp, "wi_1")
        wi_0 = mlp.wi_0 if is_gated else mlp.wi
        hidden = self.adapter(x, mlp.act(wi_0(x)))
        if is_gated:
            hidden = hidden * mlp.wi_1(x)
        hidden = mlp.dropout(hidden)
        # As in transformers' `T5DenseGatedActDense`, which keeps wo in float32 in a float16 model.
        if mlp.wo.weight.is_floating_point():
            hidden = hidden.to(mlp.wo.weight.dtype)
        return mlp.wo(hidden)
