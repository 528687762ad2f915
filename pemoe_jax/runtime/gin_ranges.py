"""The range of each number that gin files and flags can set."""

import math
from typing import NamedTuple


class Interval(NamedTuple):
    """The numbers between two bounds; square brackets include a bound, round ones exclude it.

    Attributes:
      left: '[' or '('.
      low, high: the bounds.
      right: ']' or ')'.
    """

    left: str
    low: float
    high: float
    right: str

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        above = value >= self.low if self.left == "[" else value > self.low
        below = value <= self.high if self.right == "]" else value < self.high
        return above and below  # false for NaN

    def describe(self, is_integer: bool) -> str:
        """Returns e.g. 'a positive integer', 'a number of at least 0' or 'a number in [0, 1)'."""
        noun = "integer" if is_integer else "number"
        if self == POSITIVE:
            return f"a positive {noun}"
        if self == SIZE:
            return f"a positive {noun} up to {self.high}"
        article = "an" if is_integer else "a"
        if self.high == math.inf:
            return f"{article} {noun} of at least {self.low}"
        return f"{article} {noun} in {self.left}{self.low}, {self.high}{self.right}"


POSITIVE = Interval("(", 0, math.inf, ")")
# Sizes of arrays. They have a limit because JAX's errors for sizes beyond int32 name no setting.
SIZE = Interval("[", 1, 2**24, "]")
SEVERAL = SIZE._replace(low=2)
NOT_NEGATIVE = Interval("[", 0, math.inf, ")")
FRACTION = Interval("[", 0, 1, ")")
UP_TO_ONE = Interval("(", 0, 1, "]")
# Steps and seeds are int32 in jax.
STEPS = Interval("[", 1, 2**31 - 1, "]")
SEED = Interval("[", 0, 2**31 - 1, "]")
OFFSET = Interval("[", 1 - 2**31, 2**31 - 1, "]")
# Adafactor raises (step - offset + 1) to a power. A positive offset would make this number negative
# in the first steps.
EARLIER_STEPS = OFFSET._replace(high=0)

# Function -> parameter -> range. A test checks that every numeric parameter has a range.
RANGES: dict[str, dict[str, Interval]] = {
    "train.train": {"total_steps": STEPS, "seed": SEED},
    "options.Data": {
        "batch_size": POSITIVE,
        "microbatches": POSITIVE,
        "max_examples": POSITIVE,
        "task_fraction": UP_TO_ONE,
    },
    "options.FewShot": {"shots": NOT_NEGATIVE, "seed": SEED},
    "options.Checkpointing": {
        "period": POSITIVE,
        "keep": POSITIVE,
        "upcycle_noise": NOT_NEGATIVE,
    },
    "options.Numerics": {"max_skipped": POSITIVE},
    "options.Logging": {
        "log_period": POSITIVE,
        "eval_period": NOT_NEGATIVE,
        "eval_batches": POSITIVE,
    },
    "infer.decode_texts": {"batch_size": POSITIVE},
    "tasks.register": {"eval_examples": POSITIVE},
    "routes.routes": {"examples": POSITIVE, "min_count": POSITIVE},
    "partitioning.MeshConfig": {
        "model_parallelism": POSITIVE,
        "expert_parallelism": POSITIVE,
    },
    "steps.Loss": {
        "z_loss": NOT_NEGATIVE,
        "label_smoothing": FRACTION,
        "loss_normalizing_factor": POSITIVE,
    },
    "optim.create_learning_rate_scheduler": {
        "base_learning_rate": NOT_NEGATIVE,
        "warmup_steps": NOT_NEGATIVE,
        "total_steps": STEPS,
        "decay_factor": UP_TO_ONE,
        "steps_per_decay": POSITIVE,
        "steps_per_cycle": POSITIVE,
        "step_offset": OFFSET,
        "min_learning_rate": NOT_NEGATIVE,
    },
    "optim.adafactor": {
        "decay_rate": UP_TO_ONE,
        "step_offset": EARLIER_STEPS,
        "clipping_threshold": POSITIVE,
        "min_dim_size_to_factor": POSITIVE,
        "weight_decay_rate": NOT_NEGATIVE,
        "clip_norm": POSITIVE,
    },
    "optim.adamw": {
        "b1": FRACTION,
        "b2": FRACTION,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "clip_norm": POSITIVE,
    },
    "adapters.VectorExperts": {"num_experts": SIZE},
    "adapters.LoRAExperts": {"num_experts": SIZE, "rank": SIZE, "alpha": POSITIVE},
    "routing.Router": {
        "num_experts": SIZE,
        "top_k": POSITIVE,
        "temperature": POSITIVE,
        "jitter_noise": FRACTION,
        "balance_loss": NOT_NEGATIVE,
        "z_loss": NOT_NEGATIVE,
    },
    "sparse.Sparse": {
        "num_experts": SEVERAL,
        "sparse_step": POSITIVE,
        "top_k": POSITIVE,
        "capacity_factor": POSITIVE,
        "eval_capacity_factor": POSITIVE,
        "min_capacity": POSITIVE,
        "capacity": POSITIVE,
        "group": POSITIVE,
        "jitter": FRACTION,
        "expert_dropout_rate": FRACTION,
        "balance_loss": NOT_NEGATIVE,
        "router_z_loss": NOT_NEGATIVE,
    },
    "network.T5Config": {
        "vocab_size": SIZE,
        "emb_dim": SIZE,
        "num_heads": SIZE,
        "head_dim": SIZE,
        "mlp_dim": SIZE,
        "sentence_dim": SIZE,
        "num_encoder_layers": SIZE,
        "num_decoder_layers": SIZE,
        "dropout_rate": FRACTION,
    },
}
