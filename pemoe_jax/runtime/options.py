"""Options of the commands, as dataclasses that gin files configure.

To add an option, add a field, its line in the docstring, and a macro and a binding in a run file;
for a number, also its range in `gin_ranges`. `--help` shows the docstring's line next to the macro
and its default (`gin_help`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError, check_choice

# Only for an annotation: modules without jax import this one.
if TYPE_CHECKING:
    from pemoe_jax.core import network


@dataclasses.dataclass(frozen=True)
class Data:
    """The tasks that a command reads, and its batches.

    Attributes:
      mixture_or_task_name: a seqio task or mixture; for `pemoe embed` also a list of them.
      task_feature_lengths: maximum number of tokens of 'inputs' and 'targets'; longer examples are
        truncated and counted.
      batch_size: number of rows of a batch, over all devices.
      microbatches: number of pieces that a training batch is split into, to save memory.
      pack: whether a training row holds several examples.
      register: registers the tasks with seqio; returns a `tasks.TaskRoles` or None.
      use_cached_tasks: whether to read the tasks from seqio's offline caches.
      sentence_embeddings: folder of the table that `pemoe embed` writes, for routers that read
        sentence embeddings; None: a feature of the tasks holds them.
      max_examples: maximum number of examples of each evaluated task; None: all.
      task_fraction: fraction of the mixture's tasks to train on, drawn by SEED; the tasks of a
        smaller fraction are among those of a larger one.
    """

    mixture_or_task_name: str | Sequence[str] = ""
    task_feature_lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    batch_size: int = 32
    microbatches: int = 1
    pack: bool = True
    register: Callable[[], Any] | None = None
    use_cached_tasks: bool = False
    sentence_embeddings: str | None = None
    max_examples: int | None = None
    task_fraction: float = 1.0

    @property
    def name(self) -> str:
        """The task or mixture; InputError for a list of them."""
        if not isinstance(self.mixture_or_task_name, str):
            raise InputError(
                f"MIXTURE_OR_TASK_NAME must be a string, got {self.mixture_or_task_name!r}"
            )
        return self.mixture_or_task_name

    @property
    def names(self) -> list[str]:
        """The tasks and mixtures as a list."""
        names = self.mixture_or_task_name
        return [names] if isinstance(names, str) else [*names]


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Solved examples ("shots") in front of each evaluated input.

    Attributes:
      shots: number of examples of the task's train split in front of each input; 0: zero-shot.
        Those that do not fit into the length of 'inputs' are left out whole, from the front, and
        counted.
      seed: seed of the draw of a task's shots.
    """

    shots: int = 0
    seed: int = 0

    @property
    def record(self) -> dict[str, int]:
        """The entries of a run in results.json; none in zero-shot evaluation."""
        return {"shots": self.shots, "shots_seed": self.seed} if self.shots else {}


ZERO_SHOT = FewShot()


@dataclasses.dataclass(frozen=True)
class Method:
    """A fine-tuning method: which parameters train, and the dtype of the frozen matrices.

    Attributes:
      name: name of the method in tables and records.
      trainable: regular expressions of the paths of trainable parameters; each must match at least
        one.
      frozen_dtype: dtype of frozen matrices: 'activations' (the dtype of activations), 'int8' or
        'float8_e4m3fn'.
    """

    name: str
    trainable: Sequence[str]
    frozen_dtype: str = "activations"

    def __post_init__(self) -> None:
        # None if no method file sets the macro (`gin_flags`).
        if not self.trainable:
            raise InputError("TRAINABLE is not set: pass --gin_file=methods/… before the run file")


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Where a training run starts, and where and how often it saves checkpoints.

    Attributes:
      model_dir: folder of config.gin, metrics.jsonl, loss.png, tensorboard/ and checkpoint_<step>/;
        a run resumes from the newest checkpoint in it.
      initial_checkpoint_path: base model, in the format of T5X, Hugging Face or this package, or a
        run to continue from; None: random weights.
      upcycle_noise: σ of the noise in a sparse model that starts from a dense base: each weight of
        each expert is the dense MLP's, times its own draw of 1 + N(0, σ²); None: 0.
      period: steps between two checkpoints.
      keep: number of newest checkpoints to keep; None: all.
      keep_best: metric by which the best checkpoint is kept too: 'eval/loss', 'eval/accuracy' or
        None.
    """

    model_dir: str
    initial_checkpoint_path: str | None
    upcycle_noise: float | None = None
    period: int = 1000
    keep: int | None = 1
    keep_best: str | None = None

    def __post_init__(self) -> None:
        check_choice("KEEP_BEST", self.keep_best, ("eval/loss", "eval/accuracy", None))

    def check_keep_best(self, eval_period: int) -> None:
        """Raises InputError unless each checkpoint that KEEP_BEST compares is evaluated."""
        # A checkpoint without an evaluation at its step has no value of the metric.
        if self.keep_best is not None and (not eval_period or self.period % eval_period):
            raise InputError(
                f"EVAL_PERIOD must divide CHECKPOINT_PERIOD {self.period} with KEEP_BEST, got"
                f" {eval_period}"
            )


@dataclasses.dataclass(frozen=True)
class Numerics:
    """What a training run does about numbers that are not finite.

    Attributes:
      nonfinite: what happens at a step whose loss or gradient is infinite or NaN: 'stop' ends the
        run; 'skip' leaves parameters and optimizer state as they were.
      max_skipped: number of steps in a row that may be skipped; one more ends the run.
    """

    nonfinite: str = "stop"
    max_skipped: int = 10

    def __post_init__(self) -> None:
        check_choice("NONFINITE", self.nonfinite, ("stop", "skip"))

    @property
    def skips(self) -> bool:
        """Whether steps that are not finite are skipped."""
        return self.nonfinite == "skip"


STOP_AT_NONFINITE = Numerics()


@dataclasses.dataclass(frozen=True)
class Logging:
    """What a training run reports and how often.

    Attributes:
      log_period: steps between two reports of the training loss, averaged over these steps.
      eval_period: steps between two evaluations of the loss on the evaluation splits; 0: never.
      eval_batches: maximum number of batches of an evaluation of the loss.
      router_metrics: router metrics to report: 'sites' (each site, averaged over layers), 'layers'
        (each router) or None.
    """

    log_period: int = 50
    eval_period: int = 0
    eval_batches: int = 10
    router_metrics: str | None = "sites"

    def __post_init__(self) -> None:
        check_choice("ROUTER_METRICS", self.router_metrics, ("sites", "layers", None))


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that a command reads.

    Attributes:
      checkpoint_path: a run (its newest checkpoint), a checkpoint_<step>, an adapter of this
        package or of PEFT, or a base model; or a list of these.
      initial_checkpoint_path: base model to use instead of the recorded one, such as a moved copy.
      dtype: dtype of activations, 'float32' or 'bfloat16'; None: as in training.
      frozen_dtype: dtype of frozen matrices: 'activations', 'int8' or 'float8_e4m3fn'; None: as in
        training.
      model: the model of the gin files; its dtype and activations are used for a base that does not
        state them.
    """

    checkpoint_path: str | Sequence[str]
    initial_checkpoint_path: str | None = None
    dtype: str | None = None
    frozen_dtype: str | None = None
    model: "network.Transformer | None" = None
