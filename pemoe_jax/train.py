"""Trains adapters (or a whole model) by gin files: `pemoe train --help`."""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.checkpoints import runs
    from pemoe_jax.core import network, optim, steps

FLAGS = gin_flags.make_parser(
    "train",
    "Trains adapters on a frozen T5, or the whole of it, and writes checkpoints to MODEL_DIR.\n"
    "The same command again goes on from the newest checkpoint.",
    example="""\
  pemoe train \\
    --gin_file=models/t5_1_1_large.gin --gin_file=methods/mov.gin --gin_file=runs/finetune.gin \\
    --gin.MODEL_DIR=/tmp/mov --gin.INITIAL_CHECKPOINT_PATH=base.safetensors \\
    --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model --gin.TRAIN_STEPS=1000
""",
    macros=(*gin_flags.MODEL_AND_METHOD_FILES, "runs/finetune.gin"),
)


def train(
    model: "network.Transformer | None",
    method: str,
    trainable: Sequence[str],
    model_dir: str,
    initial_checkpoint_path: str | None,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    total_steps: int,
    optimizer: "optim.OptimizerFactory",
    schedule: "optim.Schedule",
    loss: "steps.Loss",
    register: Callable[[], Any] | None = None,
    use_cached_tasks: bool = False,
    microbatches: int = 1,
    pack: bool = True,
    seed: int = 0,
    log_period: int = 50,
    eval_period: int = 0,
    eval_batches: int = 10,
    router_metrics: str | None = "sites",
    sentence_embeddings: str | None = None,
    checkpoint_period: int = 1000,
    keep_checkpoints: int | None = 1,
    model_parallelism: int = 1,
    fsdp: bool = False,
    frozen_dtype: str = "activations",
) -> None:
    """Trains, from the newest checkpoint in `model_dir` where there is one.

    Args:
      model: network with its adapters.
      method: its name, for tables.
      trainable: patterns of the parameters that train; each must match something.
      model_dir: gets config.gin, metrics.jsonl, tensorboard/ and checkpoint_<step>/.
      initial_checkpoint_path: the base, None for random weights.
      mixture_or_task_name: what seqio knows the training data by.
      task_feature_lengths: tokens of 'inputs' and 'targets'.
      batch_size: rows of a step over all devices.
      total_steps: the step to stop at.
      optimizer: schedule -> optax transformation.
      schedule: step -> learning rate.
      loss: its settings.
      register: registers the tasks and returns what it has to say of them.
      use_cached_tasks: seqio's offline caches.
      microbatches: pieces a batch is run in.
      pack: several examples in a row.
      seed: of adapters, data order and dropout.
      log_period, checkpoint_period, eval_period: in steps; eval_period 0: never.
      eval_batches: most batches of an evaluation of the loss.
      router_metrics: what is told of the routers: 'sites' (each site, over the layers), 'layers'
        (each router), None (nothing).
      sentence_embeddings: table for routers that read them; None: the tasks' own feature.
      keep_checkpoints: how many are kept; None: all.
      model_parallelism: over how many devices each matrix is spread; the others share the batch.
      fsdp: parameters are spread over the devices that share the batch, too.
      frozen_dtype: what frozen matrices are kept as, one of `quantized.FROZEN_DTYPES`.

    Raises:
      InputError: anything the user can mend.
    """
    if model is None:
        raise InputError("no model: expected --gin_file=models/… before the run file")
    if not trainable:
        raise InputError("TRAINABLE is not set: expected --gin_file=methods/… before the run file")
    for name, value, least in (
        ("TRAIN_STEPS", total_steps, 1),
        ("MICROBATCHES", microbatches, 1),
        ("KEEP_CHECKPOINTS", 1 if keep_checkpoints is None else keep_checkpoints, 1),
        ("LOG_PERIOD", log_period, 1),
        ("CHECKPOINT_PERIOD", checkpoint_period, 1),
        ("EVAL_PERIOD", eval_period, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, found {value!r}")
    if router_metrics not in (None, "sites", "layers"):
        raise InputError(
            f"ROUTER_METRICS: expected 'sites', 'layers' or None, found {router_metrics!r}"
        )

    import jax

    from pemoe_jax.analysis import plots
    from pemoe_jax.checkpoints import runs
    from pemoe_jax.core import adapters, network, partitioning, quantized, stacks, steps
    from pemoe_jax.data import feed, prefetch, sentences, seqio_tasks
    from pemoe_jax.runtime import distributed, file_io

    quantized.check_frozen_dtype(frozen_dtype)
    folder = file_io.resolve_local(model_dir, "MODEL_DIR")
    distributed.initialize()
    mesh, rules = partitioning.make_mesh(model_parallelism), partitioning.axis_rules(fsdp)
    partitioning.check_batch_size(batch_size, mesh, microbatches)
    partitioning.connect_processes(mesh)
    registered = register() if register is not None else None
    seqio_tasks.check_vocab_size(mixture_or_task_name, model.config.vocab_size)
    embedded = sentences.open_for_training(
        adapters.describe(model.adapters),
        sentence_embeddings,
        mixture_or_task_name,
        seqio_tasks.validate_lengths(task_feature_lengths)["inputs"],
        pack,
        use_cached_tasks,
    )
    if embedded is not None:
        model = model.clone(config=dataclasses.replace(model.config, sentence_dim=embedded.dim))

    transformation = optimizer(schedule)
    state, frozen, record = _prepare(
        model,
        method,
        trainable,
        initial_checkpoint_path,
        frozen_dtype,
        transformation,
        seed,
        mesh,
        rules,
    )
    record = dataclasses.replace(
        record,
        trained_datasets=_datasets(seqio_tasks.subtask_names(mixture_or_task_name), registered),
        sentence_encoder=None if embedded is None else dict(embedded.encoder),
    )
    print(_summary(state.params, frozen, record, registered, len(jax.devices())), flush=True)

    first = _step_to_go_on_from(folder, record)
    if first >= total_steps:
        print(f"{folder} is at step {first}; TRAIN_STEPS is {total_steps}: nothing to do")
        return
    share, shares = partitioning.data_shard(mesh)
    consumed = runs.read_data_position(str(folder), shares) if first else [0] * shares
    batches = feed.train_batches(
        mixture_or_task_name,
        task_feature_lengths,
        batch_size // shares,
        seed=seed,
        pack=pack,
        start={"examples": consumed[share]} if consumed else None,
        use_cached=use_cached_tasks,
        shard=(share, shares),
        sentences=embedded,
    )
    evaluation: list[Any] = []
    if eval_period:
        evaluation = list(
            feed.eval_batches(
                mixture_or_task_name,
                task_feature_lengths,
                batch_size,
                eval_batches,
                use_cached=use_cached_tasks,
                sentences=embedded,
            )
        )
    # nothing has been written so far, and what the user can have got wrong has been looked at
    checkpoints = runs.RunCheckpoints(str(folder), keep_checkpoints)
    if first:
        state = checkpoints.restore(first, state)
        print(f"resuming from {folder}/checkpoint_{first}", flush=True)
        if consumed is None:
            print(f"it does not say where in the data it was: reading past {first} batches")
            for _ in itertools.islice(batches, first):
                pass
    if model.config.scan_layers:
        frozen = network.stack_layers(model, frozen, stacks.stack_and_delete)
    written = distributed.output_folder(folder)
    _write_config(written)
    loop = _Loop(
        train_step=steps.make_train_step(
            model,
            transformation,
            loss,
            microbatches,
            router_metrics is not None,
            jax.tree.map(lambda leaf: leaf.sharding, state),
        ),
        eval_step=steps.make_eval_step(model, loss),
        mesh=mesh,
        folder=written,
        schedule=schedule,
        rng=jax.random.key(seed + 1),
        total_steps=total_steps,
        log_period=log_period,
        eval_period=eval_period,
        evaluation=evaluation,
        routers=steps.router_paths(model) if router_metrics else [],
        router_detail=router_metrics or "",
        save=lambda state, position: checkpoints.save(state, record, _of_shares(position, mesh)),
        save_period=checkpoint_period,
    )
    try:
        with partitioning.use_mesh(mesh, rules):
            loop.run(state, frozen, prefetch.prefetch(batches, transform=loop.placed))
    except BaseException as error:
        # a save under way needs all processes, of which one may have gone
        if isinstance(error, InputError) or jax.process_count() == 1:
            checkpoints.close()
        raise
    checkpoints.close()
    if batches.truncations.inputs or batches.truncations.targets:
        print(batches.truncations)
    plots.loss_curve(
        written / "metrics.jsonl", written / "loss.png", title=f"Training: {folder.name}"
    )
    print(f"trained to step {total_steps}: {folder}/checkpoint_{total_steps}, {folder}/loss.png")


def _prepare(
    model: "network.Transformer",
    method: str,
    trainable: Sequence[str],
    base_path: str | None,
    frozen_dtype: str,
    optimizer: Any,
    seed: int,
    mesh: Any,
    rules: Any,
) -> "tuple[steps.TrainState, Any, runs.Record]":
    """What trains with its optimiser's state, what does not, both placed, and the run's record."""
    import jax

    from pemoe_jax.checkpoints import models, runs
    from pemoe_jax.core import adapters, network, partitioning, quantized, steps
    from pemoe_jax.core import params as params_lib

    shapes = params_lib.flatten(network.param_shapes(model))
    trains = params_lib.trainable_paths(shapes, trainable)  # fails before the base is read
    lies = partitioning.param_shardings(mesh, rules, network.param_axes(model), shapes)
    if frozen_dtype != quantized.ACTIVATIONS and not any(
        params_lib.is_matrix(path) for path in shapes.keys() - trains
    ):
        raise InputError(
            f"FROZEN_DTYPE {frozen_dtype!r}: {method} trains all matrices: expected 'activations'"
        )
    base, identity = models.load_base(
        model, base_path, seed, trains.__contains__, lies, frozen_dtype
    )
    added = models.device_put(network.init_params(model, seed, params_lib.is_adapter), lies)
    trained, frozen = params_lib.split(params_lib.merge(added, base), trainable)
    record = runs.Record(
        method=method,
        trainable=list(trainable),
        config=model.config.as_dict(),
        adapters=adapters.describe(model.adapters),
        base={**identity, "needed": bool(frozen), "frozen_dtype": frozen_dtype},
        counts={"trainable": params_lib.count(trained), "total": params_lib.count(shapes)},
        versions=runs.package_versions(),
        seed=seed,
    )

    def create(trained: Any) -> steps.TrainState:
        return steps.TrainState.create(trained, optimizer)

    of_state = partitioning.state_shardings(jax.eval_shape(create, trained), lies, mesh)
    return jax.jit(create, out_shardings=of_state)(trained), frozen, record


def _summary(trainable: Any, frozen: Any, record: Any, registered: Any, devices: int) -> str:
    from pemoe_jax.analysis import counts
    from pemoe_jax.core import params as params_lib

    identity = record.base
    base = (
        identity["path"]
        or f"RANDOM WEIGHTS (INITIAL_CHECKPOINT_PATH=None, seed {identity['seed']})"
    )
    text = counts.parameter_summary(
        params_lib.flatten(trainable),
        params_lib.flatten(frozen),
        base=f"{base}, fingerprint {identity['fingerprint']}",
        method=record.method,
        extra={
            "devices": str(devices),
            "activations": record.config["dtype"],
            "matrices": f"{identity['frozen_dtype']}, where frozen",
        },
    )
    lines = registered.lines() if registered is not None else []
    return "\n".join([text, *lines])


def _datasets(tasks: Sequence[str], registered: Any) -> list[str]:
    """The data sets of some tasks, under their names in tables."""
    known = {} if registered is None else registered.datasets
    return sorted({known.get(task, task) for task in tasks})


def _step_to_go_on_from(folder: Path, record: "runs.Record") -> int:
    """The newest checkpoint's step, 0 where there is none; it must be of this base and method."""
    from pemoe_jax.checkpoints import runs
    from pemoe_jax.data import sentence_table

    saved = runs.saved_steps(folder)
    if not saved:
        return 0
    found = runs.read_record(str(folder))
    sentence_table.check_same_encoder(str(folder), found.sentence_encoder, record.sentence_encoder)
    before, now = (_identity(one, found.base["needed"]) for one in (found, record))
    for name, value in before.items():
        if now.get(name) != value:
            raise InputError(
                f"{folder} holds a run with {name} {value!r}, expected the same to go on,"
                f" found {now.get(name)!r}: choose another MODEL_DIR or mend the setting"
            )
    return saved[-1]


def _of_shares(position: Mapping[str, int], mesh: Any) -> dict[str, list[int]]:
    """A feed's position -> those of all shares, in their order."""
    import jax

    if jax.process_count() == 1:
        return {name: [count] for name, count in position.items()}
    import numpy as np
    from jax.experimental import multihost_utils

    from pemoe_jax.core import partitioning

    share, shares = partitioning.data_shard(mesh)
    of_shares = {}
    for name, count in position.items():
        told = multihost_utils.process_allgather(np.array([share, count]))  # [processes, 2]
        by_share = dict(told.tolist())
        of_shares[name] = [by_share[share] for share in range(shares)]
    return of_shares


def _identity(record: "runs.Record", with_base: bool) -> dict[str, Any]:
    """What must not change from one part of a run to the next, by the names that users know."""
    identity: dict[str, Any] = {
        "method": record.method,
        "adapters": record.adapters,
        "TRAINABLE": record.trainable,
        **{f"T5Config.{k}": v for k, v in record.config.items() if k != "dropout_rate"},
    }
    if with_base:
        identity["base fingerprint"] = record.base["fingerprint"]
        identity["FROZEN_DTYPE"] = record.base.get("frozen_dtype", "activations")
    return identity


def _write_config(folder: Path) -> None:
    import gin

    from pemoe_jax.runtime import atomic_write

    atomic_write.write_text(folder / "config.gin", gin.config_str())


@dataclasses.dataclass
class _Loop:
    """The steps, and what is said and written between them."""

    train_step: Any  # `steps.make_train_step`
    eval_step: Callable[..., Any]
    mesh: Any
    folder: Path
    schedule: "optim.Schedule"
    rng: Any
    total_steps: int
    log_period: int
    eval_period: int
    evaluation: Sequence[Any]
    routers: Sequence[str]
    router_detail: str
    save: Callable[[Any, Any], None]
    save_period: int

    def placed(self, batch: Mapping[str, Any]) -> tuple[Any, int]:
        """A batch of this process's share, on the devices, and its number of real tokens."""
        from pemoe_jax.core import partitioning

        return partitioning.make_global_batch(batch, self.mesh), _real_tokens(batch)

    def run(self, state: Any, frozen: Any, batches: Any) -> None:
        """Trains on `placed` batches."""
        import jax

        from pemoe_jax.core import routing
        from pemoe_jax.runtime import host_memory, progress

        first = int(state.step)
        bar = progress.Progress("step", self.total_steps, first)
        metrics = progress.MetricWriter(self.folder, first)
        window: list[tuple[Any, int]] = []
        waited, clock = 0.0, time.monotonic()
        # by step, so that an interrupted run saves the one that belongs to its state
        positions = {first: batches.position}
        try:
            for step in range(first + 1, self.total_steps + 1):
                _settle(window, batches.is_ready)
                asked = time.monotonic()
                batch = next(batches, None)
                waited += time.monotonic() - asked
                if batch is None:
                    raise InputError(
                        f"the training data ended at step {step - 1} of {self.total_steps}"
                    )
                positions = {step - 1: positions[step - 1], step: batches.position}
                arrays, tokens = batch
                if step == first + 1:  # by itself, so that its memory is free for the step's
                    taken = self.train_step.lower(state, frozen, arrays, self.rng).compile()
                    host_memory.trim_heap()
                state, step_metrics = taken(state, frozen, arrays, self.rng)
                window.append((step_metrics, tokens))
                bar.advance(step)
                last = step == self.total_steps
                if step % self.log_period == 0 or last or step == first + 1:
                    means = _means(window)
                    now = time.monotonic()
                    means["tokens_per_second"] = sum(t for _, t in window) / (now - clock)
                    means["steps_per_second"] = len(window) / (now - clock)
                    means["wait_share"] = waited / (now - clock)
                    means["learning_rate"] = float(self.schedule(step - 1))
                    window, waited, clock = [], 0.0, now
                    told = means.pop("routers", None)
                    scalars = {f"train/{k}": v for k, v in means.items()}
                    if told is not None:
                        found = routing.summarize_statistics(self.routers, told, self.router_detail)
                        scalars |= {f"router/{k}": v for k, v in found.items()}
                    metrics.write(step, scalars)
                    bar.report(step, _note(means))
                    _check_finite(means, step)
                paused = time.monotonic()
                if self.eval_period and (step % self.eval_period == 0 or last):
                    scalars = self._evaluate(state, frozen)
                    metrics.write(step, {f"eval/{k}": v for k, v in scalars.items()})
                    bar.print_line(
                        f"step {step}  validation loss {scalars['loss']:.4f}"
                        f"  accuracy {scalars['accuracy']:.3f} (tokens)"
                    )
                if step % self.save_period == 0 or last:
                    self.save(state, positions[step])
                clock += time.monotonic() - paused
        except KeyboardInterrupt:
            # not where it fell into the step that took the state over, nor where other processes,
            # which would have to save too, know nothing of it
            if not state.step.is_deleted() and jax.process_count() == 1:
                step = int(state.step)
                bar.print_line(f"interrupted: saving step {step}")
                self.save(state, positions[step])
            raise
        finally:
            batches.close()
            bar.close()
            metrics.close()

    def _evaluate(self, state: Any, frozen: Any) -> dict[str, float]:
        from pemoe_jax.core import partitioning

        sums = [
            self.eval_step(state.params, frozen, partitioning.shard_batch(batch, self.mesh))
            for batch in self.evaluation
        ]
        total = {k: sum(float(s[k]) for s in sums) for k in sums[0]}
        tokens = max(total["tokens"], 1.0)
        return {"loss": total["nll"] / tokens, "accuracy": total["correct"] / tokens}


def _settle(window: Sequence[tuple[Any, int]], ready: bool) -> None:
    """Lets at most two steps be under way, and none where the next batch is not `ready`.

    So what the next batch is waited for is time in which the devices have nothing to do.
    """
    import jax

    for step_metrics, _ in window[-2:-1] if ready else window[-1:]:
        jax.block_until_ready(step_metrics)


def _real_tokens(batch: Mapping[str, Any]) -> int:
    return sum(int((batch[k] > 0).sum()) for k in ("encoder_input_tokens", "decoder_target_tokens"))


def _means(window: list[tuple[Any, int]]) -> dict[str, Any]:
    """Of scalars, and of the routers' arrays."""
    import jax
    import numpy as np

    fetched = jax.device_get([metrics for metrics, _ in window])
    means = {name: np.mean([m[name] for m in fetched], axis=0) for name in fetched[0]}
    return {name: mean if mean.ndim else float(mean) for name, mean in means.items()}


def _note(means: Mapping[str, Any]) -> str:
    from pemoe_jax.runtime import progress

    share = means["wait_share"]
    waiting = f"  waiting for data {share:.0%} of the time" if share > 0.05 else ""
    return (
        f"loss {means['loss']:.4f}  accuracy {means['accuracy']:.3f}"
        f"  {progress.format_count(means['tokens_per_second'])} tokens/s{waiting}"
    )


def _check_finite(means: Mapping[str, Any], step: int) -> None:
    if not math.isfinite(means["loss"]):
        raise InputError(
            f"the loss is {means['loss']} at step {step}"
            f" (learning rate {means['learning_rate']:g}):"
            " lower LEARNING_RATE and go on from the last checkpoint"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, train, argv)


if __name__ == "__main__":
    # imported by its name, so that gin files configure this very module and not a second copy
    from pemoe_jax.train import main as _main

    sys.exit(_main())
