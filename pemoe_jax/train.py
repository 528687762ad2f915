"""Trains adapters, or a whole model, configured by gin files: `pemoe train --help`."""

import collections
import dataclasses
import functools
import itertools
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    import jax

    from pemoe_jax.checkpoints.records import Record
    from pemoe_jax.core import network, optim, partitioning, steps
    from pemoe_jax.core.params import PyTree
    from pemoe_jax.data import sentences
    from pemoe_jax.data.packing import Batch, BatchIterator
    from pemoe_jax.runtime.file_io import AnyPath
    from pemoe_jax.runtime.stop_signals import StopSignals

FLAGS = gin_flags.make_parser(
    "train",
    "Trains adapters on a frozen T5, or all of its parameters, and writes checkpoints to\n"
    "MODEL_DIR. Running the same command again resumes from the newest checkpoint.",
    example="""\
  pemoe train \\
    --gin_file=models/t5_1_1_large.gin --gin_file=methods/mov.gin --gin_file=runs/finetune.gin \\
    --gin.MODEL_DIR=/tmp/mov --gin.INITIAL_CHECKPOINT_PATH=base.safetensors \\
    --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model --gin.TRAIN_STEPS=1000
""",
    macros=(*gin_flags.MODEL_AND_METHOD_FILES, "runs/finetune.gin"),
)
FLAGS.add_argument(
    "--allow_changes",
    action="store_true",
    help="resume a run although its data, seed or batches have changed",
)
FLAGS.add_argument(
    "--debug_nans",
    action="store_true",
    help="find the module where the first infinity or NaN comes from; keeps two copies of the"
    " state",
)


def train(
    model: "network.Transformer | None",
    method: options.Method,
    data: options.Data,
    total_steps: int,
    optimizer: "optim.OptimizerFactory",
    schedule: "optim.Schedule",
    loss: "steps.Loss",
    checkpointing: options.Checkpointing,
    logging: options.Logging,
    mesh: "partitioning.MeshConfig",
    seed: int = 0,
    numerics: options.Numerics = options.STOP_AT_NONFINITE,
    allow_changes: bool = False,
    debug_nans: bool = False,
) -> None:
    """Trains from the newest checkpoint in MODEL_DIR; without one, from INITIAL_CHECKPOINT_PATH.

    Args:
      model: the network with its adapters, from a model file and a method file.
      method: name, trainable parameters and dtype of the frozen matrices.
      data: the tasks to train on, and the batches.
      total_steps: step to stop at, counted from the start of the run.
      optimizer: the optimizer, e.g. @optim.adafactor or @optim.adamw.
      schedule: function from a step to a learning rate.
      loss: settings of the loss.
      checkpointing: the model or run to start from, and where and how often to save.
      logging: what to report, and how often.
      mesh: the shape of the device mesh, and how parameters are sharded over it.
      seed: seed of new adapters, a random base model, the data order and dropout.
      numerics: what to do about a step that is not finite.
      allow_changes: whether a run may resume with other data, seed or batches.
      debug_nans: whether to find where the first infinity or NaN comes from.

    Raises:
      InputError: a setting or a file is wrong, in which case no file is written; or, while the run
        trains, a step is not finite, a save fails, or the data end before `total_steps`.
    """
    if model is None:
        raise InputError(
            "MODEL is not set: pass --gin_file=models/… before the run file (models/t5_1_1.gin for"
            " any base)"
        )

    import gin
    import jax

    from pemoe_jax.analysis import plots, sparse_layers
    from pemoe_jax.checkpoints import initial_run, new_run, run_settings, runs
    from pemoe_jax.core import network, partitioning, stacks
    from pemoe_jax.data import prefetch, seqio_tasks, task_fraction
    from pemoe_jax.runtime import (
        atomic_write,
        distributed,
        file_io,
        folder_lock,
        progress,
        run_file,
        step_times,
        train_loop,
    )
    from pemoe_jax.tasks.task_roles import abbreviate, run_register

    # Cheap checks come first: those that need only the headers of checkpoints, then those that need
    # the tasks (TensorFlow takes about 5 s to import), and last those that need the base's arrays.
    model_dir = file_io.resolve_output_folder(checkpointing.model_dir, "MODEL_DIR")
    file_io.check_no_pattern(model_dir, "MODEL_DIR")
    device_mesh, rules = distributed.start(mesh, data.batch_size, data.microbatches)
    base_path = checkpointing.initial_checkpoint_path
    _check_references(model, optimizer, schedule)
    initial = initial_run.open_initial_run(base_path)
    # The initial run is an earlier run at INITIAL_CHECKPOINT_PATH. If it trained a whole model, its
    # `opened` is None, and it serves as a base.
    if initial is None or initial.opened is None:
        model = new_run.take_base_dimensions(model, base_path, checkpointing.upcycle_noise)
    else:
        model = initial_run.take_dimensions(model, initial.opened)
    record = _describe_run(model, method, optimizer, seed)
    if initial is not None and initial.opened is not None:
        new_run.check_initial_run(
            initial.opened, record, model, method, checkpointing.upcycle_noise
        )
    checkpointing.check_keep_best(logging.eval_period)
    _check_before_tasks(model, method, data, record.adapters)
    folder = distributed.output_folder(model_dir)
    # The folder is locked before its checkpoints are read. A new folder is created, and locked,
    # only when all settings have been checked.
    if folder.is_dir():
        folder_lock.hold(folder, "MODEL_DIR")
    first_step, _ = _check_resume(model_dir, record, allow_changes)

    task_roles = run_register(data.register)
    mixture = data.name
    fraction_name = task_fraction.register_fraction(
        mixture, data.task_fraction, seed, data.use_cached_tasks
    )
    data = dataclasses.replace(data, mixture_or_task_name=fraction_name)
    trained_tasks = seqio_tasks.subtask_names(data.name)
    seqio_tasks.check_vocab_size(data.name, model.config.vocab_size)
    if initial is not None:
        seqio_tasks.check_vocabulary(initial.path, initial.record.vocabulary, data.name)
    record = dataclasses.replace(record, vocabulary=seqio_tasks.fingerprint_vocabulary(data.name))

    model, sentence_source = _open_sentences(model, data)
    transformation = optimizer(schedule, param_axes=network.param_axes(model))
    state, frozen, record = new_run.initialize(
        model, method, transformation, checkpointing, record, device_mesh, rules, initial
    )
    examples = seqio_tasks.describe_examples(data.name, "train", data.use_cached_tasks)
    training_record = task_roles.training_record(trained_tasks)
    record = dataclasses.replace(
        record,
        **initial_run.add_training(training_record, initial),
        sentence_encoder=None if sentence_source is None else dict(sentence_source.encoder),
        batches={
            "training data": examples,
            "BATCH_SIZE": data.batch_size,
            "PACK": data.pack,
            "TASK_FEATURE_LENGTHS": dict(data.task_feature_lengths),
        },
    )
    recipe = _describe_recipe(optimizer, schedule, total_steps)
    with partitioning.use_mesh(device_mesh, rules):
        sparse_lines = sparse_layers.summary_lines(
            model, record.base, data.task_feature_lengths, data.batch_size // data.microbatches
        )
    print(_summarize(state.params, frozen, record, recipe, sparse_lines), flush=True)
    task_roles.print_summary()
    if data.name != mixture:
        print(
            f"TASK_FRACTION {data.task_fraction}: {plural(len(trained_tasks), 'task')} of"
            f" {mixture}, drawn with seed {seed}: {abbreviate(trained_tasks, 8)}",
            flush=True,
        )

    # The run is compared again, because its record has the tasks and the base only now.
    _, allowed = _check_resume(model_dir, record, allow_changes)

    def find_best(steps: Collection[int]) -> tuple[int, float] | None:
        if (metric := checkpointing.keep_best) is None:
            return None
        return progress.best_step(folder / "metrics.jsonl", metric, steps)

    def find_best_step(steps: Collection[int]) -> int | None:
        best = find_best(steps)
        return None if best is None else best[0]

    checkpoints = runs.RunCheckpoints(str(model_dir), checkpointing.keep, find_best_step)
    draw_loss = functools.partial(
        plots.loss_curve,
        folder / "metrics.jsonl",
        folder / "loss.png",
        title=f"Training: {model_dir.name}",
    )
    if first_step >= total_steps:
        print(f"{model_dir} is at step {first_step}; TRAIN_STEPS is {total_steps}: nothing to do")
        # A run that was killed right after its last save has not done the following.
        checkpoints.delete_older(first_step)
        if (folder / "metrics.jsonl").exists():
            progress.truncate_metrics(folder / "metrics.jsonl", first_step)
            draw_loss()
        return
    config = gin.config_str()
    if first_step:
        # `_check_resume` has compared the settings that a run must keep. All others, such as
        # TRAIN_STEPS, may change; the changes are printed here.
        previous = run_settings.read_settings(str(model_dir))
        current = run_settings.parse_settings(config)
        if previous and (changes := run_settings.describe_changes(previous, current)):
            print(f"settings that changed since the last start: {changes}", flush=True)
        if allowed:
            print(f"WARNING: this run resumes with changes: {'; '.join(allowed)}", flush=True)
        state, first_step = checkpoints.restore_newest(state)
    shard = partitioning.data_shard(device_mesh)
    _, num_shards = shard
    positions: list[int] | None = [0] * num_shards
    if first_step:
        positions = runs.read_data_position(f"{model_dir}/checkpoint_{first_step}", num_shards)
    batches, eval_batches = _open_feeds(data, logging, seed, shard, positions, sentence_source)
    print(f"training on {data.name}: {examples}", flush=True)

    # All settings have been checked: files are written from here on.
    folder_lock.hold(folder, "MODEL_DIR")
    # A new folder was not locked before: another process may have saved a checkpoint in it.
    if not first_step and runs.saved_steps(model_dir):
        raise InputError(f"{model_dir}: another run has written to it: run the same command again")
    if first_step:
        print(f"resuming from {model_dir}/checkpoint_{first_step}", flush=True)
        if positions is None:
            print(f"the checkpoint has no position in the data: skipping {first_step} batches")
            collections.deque(itertools.islice(batches, first_step), maxlen=0)
    # The frozen parameters are stacked only now, because they were read, counted and compared layer
    # by layer. The trainable ones stay unstacked, as checkpoints have them; each step stacks them.
    if model.config.scan_layers:
        frozen = network.stack_layers(model, frozen, stacks.stack_and_delete)
    atomic_write.write_text(folder / "config.gin", config)
    run_file.begin(
        folder,
        versions=record.versions,
        devices=step_times.describe_devices([*device_mesh.devices.flat]),
        base=record.base,
        initial=record.initial,
        data={"mixture": data.name, **(record.batches or {})},
        seed=seed,
        first_step=first_step,
    )

    def save(state: "steps.TrainState", position: Mapping[str, int] | None) -> None:
        assert position is not None  # `feed.train_batches` has positions
        checkpoints.save(state, record, _gather_positions(position, device_mesh))

    loop = train_loop.TrainLoop(
        model=model,
        optimizer=transformation,
        schedule=schedule,
        loss=loss,
        microbatches=data.microbatches,
        mesh=device_mesh,
        folder=folder,
        rng=jax.random.key(seed + 1),  # dropout; new parameters are drawn from key(seed)
        total_steps=total_steps,
        logging=logging,
        eval_batches=eval_batches,
        save=save,
        check_save=checkpoints.check_save,
        save_period=checkpointing.period,
        numerics=numerics,
        debug_nans=debug_nans,
    )
    try:
        with partitioning.use_mesh(device_mesh, rules):
            stopped = loop.run(state, frozen, prefetch.prefetch(batches, transform=loop.to_devices))
    except BaseException as error:
        # close() waits for pending saves, in which all processes take part. An InputError is raised
        # in all of them; after another error, some may have ended. KeyboardInterrupt, which is no
        # Exception, comes from a second Ctrl-C, whose user does not want to wait.
        is_single_process = jax.process_count() == 1
        if isinstance(error, InputError) or (is_single_process and isinstance(error, Exception)):
            checkpoints.close()
        raise
    checkpoints.close()
    if stopped is not None and stopped.received is not None:
        _report_stop(stopped, f"{model_dir}/checkpoint_{runs.saved_steps(model_dir)[-1]}")
        return
    for line in batches.counts.describe():
        print(line)
    draw_loss()
    if best := find_best(runs.saved_steps(model_dir)):
        print(f"best by {checkpointing.keep_best}: checkpoint_{best[0]} ({best[1]:.4f})")
    run_file.finish("finished", "reached TRAIN_STEPS", last_step=total_steps)
    print(
        f"trained to step {total_steps}: {model_dir}/checkpoint_{total_steps}, {model_dir}/loss.png"
    )


# --- model and state ---


def _check_references(model: object, optimizer: Any, schedule: object) -> None:
    """Raises InputError unless MODEL is a network and OPTIMIZER an optimizer factory.

    gin accepts a reference to any function or class in their place.
    """
    import inspect

    from pemoe_jax.core import network

    if not isinstance(model, network.Transformer):
        raise InputError(f"MODEL must be @network.Transformer() (models/….gin), got {model!r:.80}")
    try:
        if inspect.isclass(optimizer):  # its signature might fit, but it returns no transformation
            raise TypeError
        # `bind_partial`, since gin may bind further required parameters of a user's own optimizer.
        inspect.signature(optimizer).bind_partial(schedule, param_axes=None)
    except (TypeError, ValueError):
        raise InputError(
            "OPTIMIZER must be a function of (schedule, param_axes), such as @optim.adamw, got"
            f" {optimizer!r:.80}"
        ) from None


def _describe_run(
    model: "network.Transformer",
    method: options.Method,
    optimizer: "optim.OptimizerFactory",
    seed: int,
) -> "Record":
    """Returns the part of a run's record that is known before its base and tasks are read."""
    from pemoe_jax.checkpoints import records
    from pemoe_jax.core import adapters, sparse

    return records.Record(
        method=method.name,
        trainable=list(method.trainable),
        config=model.config.as_dict(),
        adapters=adapters.describe(model.adapters),
        sparse=sparse.describe(model.sparse),
        base={},
        counts={},
        versions=records.package_versions(),
        seed=seed,
        optimizer=getattr(optimizer, "__name__", type(optimizer).__name__),
    )


def _check_before_tasks(
    model: "network.Transformer",
    method: options.Method,
    data: options.Data,
    descriptions: Mapping[str, Any],
) -> None:
    """Checks settings that need no tasks, so that a mistake shows before TensorFlow is imported.

    Args:
      model, method, data: see `train`.
      descriptions: the result of `core.adapters.describe` for the model's adapters.

    Raises:
      InputError: the lengths, the sentence embeddings or TRAINABLE are wrong.
    """
    from pemoe_jax.checkpoints import new_run
    from pemoe_jax.core import network
    from pemoe_jax.core import params as params_lib
    from pemoe_jax.data import sentences, seqio_tasks

    seqio_tasks.validate_lengths(data.task_feature_lengths)
    reads_sentences = sentences.check_settings(descriptions, data.sentence_embeddings, data.pack)
    # A router that reads sentence embeddings has a kernel of their size, which may be known only
    # from the tasks. `new_run.initialize` checks TRAINABLE then.
    if not reads_sentences:
        new_run.find_trainable_paths(method, params_lib.flatten(network.param_shapes(model)))


def _describe_recipe(
    optimizer: "optim.OptimizerFactory", schedule: "optim.Schedule", total_steps: int
) -> str:
    """Returns the names of optimizer and schedule, and the highest learning rate with its step."""
    import jax
    import numpy as np

    # Blocks of one length share a compiled program. JAX keeps a program for each length, so that an
    # array of `total_steps` would cost 22 MiB for each new value of TRAIN_STEPS in this process.
    block_rates = jax.jit(jax.vmap(schedule))
    blocks = [np.arange(first, first + 1000) for first in range(0, total_steps, 1000)]
    rates = np.concatenate([block_rates(steps) for steps in blocks])[:total_steps]
    names = [getattr(function, "__name__", repr(function)) for function in (optimizer, schedule)]
    step = int(rates.argmax())
    return f"{', '.join(names)}, learning rate up to {rates[step]:.3g} (at step {step + 1})"


def _summarize(
    trainable: "PyTree",
    frozen: "PyTree",
    record: "Record",
    recipe: str,
    sparse_lines: Mapping[str, str],
) -> str:
    """Returns the table of parameters and settings that a run prints before its first step."""
    import jax

    from pemoe_jax.analysis import counts
    from pemoe_jax.checkpoints import initial_run
    from pemoe_jax.core import params as params_lib

    base = record.base
    name = base["path"] or f"RANDOM WEIGHTS (INITIAL_CHECKPOINT_PATH=None, seed {base['seed']})"
    return counts.parameter_summary(
        params_lib.flatten(trainable),
        params_lib.flatten(frozen),
        base=f"{name}, fingerprint {base['fingerprint']}",
        method=record.method,
        extra={
            **({"initial run": initial_run.summarize(record.initial)} if record.initial else {}),
            **sparse_lines,
            "optimizer": recipe,
            "devices": str(len(jax.devices())),
            "activations": record.config["dtype"],
            **({"matrices": f"{base['frozen_dtype']} (frozen)"} if frozen else {}),
        },
    )


def _report_stop(stopped: "StopSignals", checkpoint: str) -> None:
    """Prints how to resume a run that a signal has stopped; raises KeyboardInterrupt for SIGINT."""
    from pemoe_jax.runtime import run_file

    assert stopped.received is not None
    seconds = time.monotonic() - stopped.time
    reason = f"stopped by {stopped.received.name}"
    print(
        f"{reason}, saved in {seconds:.1f} s: the same command resumes from {checkpoint}",
        flush=True,
    )
    step = int(checkpoint.rpartition("_")[2])
    run_file.finish("stopped", reason, last_step=step, save_seconds=round(seconds, 1))
    # `gin_flags.run_command` then exits with 130, as shells expect after Ctrl-C. Schedulers, which
    # send the other signals, see a run that has saved as a success.
    if stopped.received == signal.SIGINT:
        raise KeyboardInterrupt


# --- data ---


def _open_sentences(
    model: "network.Transformer", data: options.Data
) -> "tuple[network.Transformer, sentences.SentenceSource | None]":
    """Returns the model, sized for the sentence embeddings that it reads, and their source.

    The source is None if no router reads sentence embeddings.
    """
    from pemoe_jax.core import adapters
    from pemoe_jax.data import sentences, seqio_tasks

    source = sentences.open_for_training(
        adapters.describe(model.adapters),
        data.sentence_embeddings,
        data.name,
        seqio_tasks.validate_lengths(data.task_feature_lengths)["inputs"],
        data.pack,
        data.use_cached_tasks,
    )
    if source is not None:
        model = model.clone(config=dataclasses.replace(model.config, sentence_dim=source.dim))
    return model, source


def _open_feeds(
    data: options.Data,
    logging: options.Logging,
    seed: int,
    shard: tuple[int, int],
    positions: list[int] | None,
    sentence_source: "sentences.SentenceSource | None",
) -> "tuple[BatchIterator, list[Batch]]":
    """Opens the training batches, and reads the batches for the evaluation of the loss.

    Args:
      data, logging, seed: see `train`.
      shard: (index, number of shards): the part of each batch that this process reads.
      positions: number of examples that each shard has read before; None: unknown, so the batches
        start from the beginning.
      sentence_source: source of sentence embeddings, if routers read them.

    Returns:
      (training batches of this process, whole evaluation batches of all processes). There are no
      evaluation batches if EVAL_PERIOD is 0.
    """
    from pemoe_jax.data import feed

    shard_index, num_shards = shard
    batches = feed.train_batches(
        data.name,
        data.task_feature_lengths,
        data.batch_size // num_shards,
        seed=seed,
        pack=data.pack,
        start=None if positions is None else {"examples": positions[shard_index]},
        use_cached=data.use_cached_tasks,
        shard=shard,
        sentences=sentence_source,
    )
    if not logging.eval_period:
        return batches, []
    eval_batches = feed.eval_batches(
        data.name,
        data.task_feature_lengths,
        data.batch_size,
        logging.eval_batches,
        use_cached=data.use_cached_tasks,
        sentences=sentence_source,
    )
    return batches, list(eval_batches)


def _gather_positions(
    position: Mapping[str, int], mesh: "jax.sharding.Mesh"
) -> dict[str, list[int]]:
    """Returns {'examples': [number of examples that each shard has read]} of the training data.

    Args:
      position: this process's position, {'examples': number}.
      mesh: the device mesh.
    """
    import jax

    if jax.process_count() == 1:
        return {"examples": [position["examples"]]}
    import numpy as np
    from jax.experimental import multihost_utils

    from pemoe_jax.core import partitioning

    index, shards = partitioning.data_shard(mesh)
    # Processes of one model-parallel group feed the same shard and report the same count.
    gathered = multihost_utils.process_allgather(np.array([index, position["examples"]]))
    count_by_shard = dict(gathered.tolist())  # from [processes, 2]
    return {"examples": [count_by_shard[shard] for shard in range(shards)]}


# --- resuming ---


def _check_resume(
    model_dir: "AnyPath", record: "Record", allow_changes: bool
) -> tuple[int, Sequence[str]]:
    """Checks that a run can resume from the newest checkpoint in its folder, if there is one.

    Args:
      model_dir: folder of the run.
      record: the run's record. As long as its `base` is empty, because the base has not been read,
        the base and the sentence encoder are not compared.
      allow_changes: see `train`.

    Returns:
      (step of the checkpoint, 0 without one; the changes that `allow_changes` permits)

    Raises:
      InputError: the run cannot resume from the checkpoint.
    """
    from pemoe_jax.checkpoints import runs, same_run
    from pemoe_jax.data import sentence_table

    step = runs.newest_readable_step(model_dir)
    if not step:
        return 0, ()
    saved = runs.read_record(str(model_dir / f"checkpoint_{step}"))
    if record.base:
        sentence_table.check_same_encoder(
            str(model_dir), saved.sentence_encoder, record.sentence_encoder
        )
    return step, same_run.check_same_run(model_dir, saved, record, allow_changes)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, train, argv, ("allow_changes", "debug_nans"))


if __name__ == "__main__":
    # `python -m` runs this file as the module `__main__`, but gin configures the functions of
    # `pemoe_jax.train`, a second copy: call that one.
    from pemoe_jax import train as imported

    sys.exit(imported.main())
