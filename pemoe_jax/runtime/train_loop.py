"""The training loop: steps, and the reports, evaluations and checkpoints between them.

On accelerators, a step is dispatched while the one before it still runs, so that the devices do not
wait for Python. For the same reason, metrics are read only at reports or after their step's end.
"""

import contextlib
import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

from pemoe_jax.core import network, nonfinite, optim, partitioning, steps
from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.core.params import PyTree
from pemoe_jax.runtime import host_memory, options, progress, step_times, stop_signals
from pemoe_jax.runtime.file_io import AnyPath

Batch = Mapping[str, np.ndarray]
DeviceBatch = tuple[dict[str, jax.Array], int]  # a batch and its number of tokens
Position = Mapping[str, int]  # where a feed is in its data, e.g. {'examples': 512}


class Batches(Iterator[DeviceBatch], Protocol):
    """An iterator over device batches that another thread fills (`data.prefetch`).

    Attributes:
      position: where in the data the last batch ended; None if the source has no positions.
      is_ready: whether the next batch is available without waiting.
    """

    @property
    def position(self) -> Position | None: ...

    @property
    def is_ready(self) -> bool: ...

    def close(self) -> None: ...


def count_tokens(batch: Batch) -> int:
    """Returns the number of input and target tokens of a batch, without padding."""
    return sum(int((batch[k] > 0).sum()) for k in ("encoder_input_tokens", "decoder_target_tokens"))


@dataclasses.dataclass
class TrainLoop:
    """Trains a state up to step `total_steps`.

    Attributes:
      model: the network.
      optimizer: optimizer of the trainable parameters.
      schedule: function from a step to a learning rate, for reports.
      loss: settings of the loss.
      microbatches: number of pieces that a batch is split into, see `steps.grads_and_metrics`.
      mesh: the device mesh.
      folder: folder for metrics.
      rng: key of dropout masks.
      total_steps: step to stop at.
      logging: what to report, and how often.
      eval_batches: batches of an evaluation of the loss.
      save: saves a state with the feed's position.
      check_save: raises InputError if the last save has failed; called after each step.
      save_period: steps between two checkpoints.
      numerics: what to do about a step that is not finite.
      debug_nans: whether to wait for each step, and to find the module that the first infinity or
        NaN comes from. This keeps a second copy of the state.
    """

    model: network.Transformer
    optimizer: optax.GradientTransformation
    schedule: optim.Schedule
    loss: steps.Loss
    microbatches: int
    mesh: jax.sharding.Mesh
    folder: AnyPath
    rng: jax.Array
    total_steps: int
    logging: options.Logging
    eval_batches: Sequence[Batch]
    save: Callable[[steps.TrainState, Position | None], None]
    check_save: Callable[[], None]
    save_period: int
    numerics: options.Numerics = options.STOP_AT_NONFINITE
    debug_nans: bool = False
    _last_saved: int = dataclasses.field(default=0, init=False)  # 0: no checkpoint

    def __post_init__(self) -> None:
        self._eval_step = steps.make_eval_step(self.model, self.loss)

    def to_devices(self, batch: Batch) -> DeviceBatch:
        """Returns the global batch of this process's rows, and its number of tokens."""
        return partitioning.make_global_batch(batch, self.mesh), count_tokens(batch)

    def run(
        self, state: steps.TrainState, frozen: PyTree, batches: Batches
    ) -> stop_signals.StopSignals | None:
        """Trains on batches from `to_devices`.

        After SIGTERM, SIGUSR1 or the first SIGINT (Ctrl-C), the loop finishes the running step,
        saves its state and ends, without an evaluation. Until the first step is compiled, these
        signals end the process.

        Args:
          state: the state at the start.
          frozen: the parameters that do not train.
          batches: closed at the end.

        Returns:
          The signal that ended the loop; None if it reached the last step.

        Raises:
          InputError: the data ends too early, a number is not finite, or a save has failed.
        """
        train_step: Any = steps.make_train_step(
            self.model,
            self.optimizer,
            self.loss,
            self.microbatches,
            self.logging.router_metrics is not None,
            jax.tree.map(lambda leaf: leaf.sharding, state),
            skip_nonfinite=self.numerics.skips,
            donate=not self.debug_nans,
        )
        first_step = self._last_saved = int(state.step)
        bar = progress.Progress("step", self.total_steps, first_step)
        writer = progress.MetricWriter(self.folder, first_step)
        window = _Window(self.numerics.max_skipped if self.numerics.skips else 0)
        trend = LossTrend(first_step, self.total_steps)
        stop = stop_signals.StopSignals()
        try:
            for step in range(first_step + 1, self.total_steps + 1):
                arrays, tokens = self._next_batch(batches, window, step)
                if window.has_failed_before_last():
                    # Raises the error, after a report of the steps up to here.
                    self._report(step - 1, window, writer, bar, is_first=False)
                position = batches.position
                is_first, is_last = step == first_step + 1, step == self.total_steps
                if is_first:
                    # Compiled before the first call, so that the compiler's memory is freed before
                    # the step allocates its own.
                    train_step = train_step.lower(state, frozen, arrays, self.rng).compile()
                    host_memory.trim_heap()
                    stop.install()
                    window.texts = {
                        step_times.DEVICE: step_times.describe_devices([*self.mesh.devices.flat]),
                        step_times.BATCH: _describe_batch(arrays),
                    }
                dispatch_time = time.monotonic()
                previous = state if self.debug_nans else None
                state, metrics = train_step(state, frozen, arrays, self.rng)
                if previous is not None and not _is_finite(metrics):
                    self._find_nonfinite(step, previous, frozen, arrays)
                window.append(step, metrics, tokens, dispatch_time)
                bar.advance(step)
                if step % self.logging.log_period == 0 or is_last or is_first:
                    losses = self._report(step, window, writer, bar, is_first)
                    if warning := trend.update(step, losses):
                        bar.print_line(warning)
                pause_start = time.monotonic()
                eval_period = self.logging.eval_period
                is_stopping = stop.is_due(step)
                if eval_period and (is_last or (step % eval_period == 0 and not is_stopping)):
                    loss, accuracy = self._evaluate(state, frozen)
                    writer.write(step, {"eval/loss": loss, "eval/accuracy": accuracy})
                    scores = f"validation loss {loss:.4f}  accuracy {accuracy:.3f} (tokens)"
                    bar.print_line(f"step {step}  {scores}")
                self.check_save()
                if step % self.save_period == 0 or is_last or is_stopping:
                    # First the metrics up to this step: a run that resumes deletes only later ones.
                    writer.flush()
                    self._save(state, position)
                # Evaluations and saves do not count for the speed of the steps.
                window.start += time.monotonic() - pause_start
                if is_stopping and not is_last:
                    return stop
            return None
        finally:
            stop.restore()
            batches.close()
            bar.close()
            # After an error, errors of `close` would hide it: on a full disk, the save fails first
            # and then the metrics.
            has_failed = sys.exc_info()[0] is not None
            with contextlib.suppress(Exception) if has_failed else contextlib.nullcontext():
                writer.close()

    def _next_batch(self, batches: Batches, window: "_Window", step: int) -> DeviceBatch:
        """Returns the batch of a step, and measures how long the devices are idle until then."""
        # One step keeps running if the batch is ready. Otherwise all steps end first, so that the
        # time of the wait for the batch is time in which the devices are idle.
        window.timer.wait(max_running=1 if batches.is_ready else 0)
        start = time.monotonic()
        batch = next(batches, None)
        window.waited += time.monotonic() - start
        if batch is None:
            raise InputError(f"the training data ended at step {step - 1} of {self.total_steps}")
        return batch

    def _report(
        self,
        step: int,
        window: "_Window",
        writer: progress.MetricWriter,
        bar: progress.Progress,
        is_first: bool,
    ) -> list[float]:
        """Reports the steps since the last report.

        Returns:
          The loss per token of each step that was not skipped.

        Raises:
          InputError: a step is not finite, or too many steps in a row are skipped.
        """
        scalars, rows, losses, damage = window.summarize()
        if is_first:  # the first step takes longer: it loads the program and the devices' libraries
            del scalars["step_seconds"]
        scalars["learning_rate"] = float(self.schedule(step - 1))
        values = {f"train/{name}": value for name, value in scalars.items()}
        dropped = ""
        if rows:
            metrics = steps.summarize_routers(
                steps.router_paths(self.model), rows, self.logging.router_metrics or ""
            )
            values |= {f"router/{name}": float(value) for name, value in metrics.items()}
            shares = [float(metrics.get(name, 0.0)) for name in ("dropped", "without_expert")]
            if any(shares):
                dropped = f"  dropped {shares[0]:.1%} of assignments, {shares[1]:.1%} of tokens"
        if window.texts and not is_first:
            values[step_times.PEAK_MEMORY] = step_times.peak_memory(self.mesh.local_devices)
        writer.write(step, values, {} if is_first else window.texts)
        wait_share = scalars["wait_share"]
        waiting = f"  waiting for data {wait_share:.0%} of the time" if wait_share > 0.05 else ""
        bar.report(
            step,
            f"loss {scalars['loss']:.4f}  accuracy {scalars['accuracy']:.3f}"
            f"  {progress.format_count(scalars['tokens_per_second'])} tokens/s{dropped}{waiting}",
        )
        if skipped := scalars.get("skipped"):
            bar.print_line(f"step {step}  skipped {plural(int(skipped), 'step')}: not finite")
        if damage:
            raise InputError(self._describe_damage(damage, rows, is_first))
        return losses

    def _describe_damage(
        self, damage: "_Damage", rows: Mapping[str, np.ndarray], is_first: bool
    ) -> str:
        """Returns the error for a step that ends the run.

        Args:
          damage: the step.
          rows: its router metrics (`_Summary.router_rows`); empty without routers.
          is_first: whether it is the first step since the start of the process.
        """
        advice = f"lower LEARNING_RATE and {self._resume_advice()}"
        if is_first:  # no learning rate has had an effect yet
            advice = "the run starts from damaged parameters, or their numbers overflow in DTYPE"
        router = self._first_damaged_router(rows) if rows else None
        where = f", and the router at {router} has logits that are not finite" if router else ""
        skips = ""
        if self.numerics.skips:
            allowed = plural(self.numerics.max_skipped, "step")
            skips = f", after {allowed} in a row that were skipped (MAX_SKIPPED_STEPS)"
        rate = float(self.schedule(damage.step - 1))
        return (
            f"{damage.metric} is {damage.value} at step {damage.step}"
            f" (learning rate {rate:g}){where}{skips}: {advice}"
        )

    def _resume_advice(self) -> str:
        # The last save may still be running, but the command waits for it before it ends.
        if not self._last_saved:
            return "start again: there is no checkpoint yet"
        return f"resume from checkpoint_{self._last_saved}"

    def _find_nonfinite(
        self, step: int, state: steps.TrainState, frozen: PyTree, arrays: dict[str, jax.Array]
    ) -> None:
        """Raises InputError that names the module of the first number that is not finite."""
        rng = jax.random.fold_in(self.rng, state.step)
        source = nonfinite.find_source(
            self.model, self.loss, state.params, frozen, arrays, rng, self.microbatches
        )
        raise InputError(f"{source} is the first that is not finite, at step {step}")

    def _first_damaged_router(self, rows: Mapping[str, np.ndarray]) -> str | None:
        """Returns the first router, in the order of a forward pass, with damaged statistics.

        None if the statistics of all routers are finite.
        """
        is_finite = np.isfinite(rows["routers"]).all(axis=-1)
        paths = np.array(steps.router_paths(self.model))[~is_finite].tolist()

        def depth(path: str) -> tuple[bool, int]:
            match = re.match(r"(\w+)/layers_(\d+)/", path)
            assert match is not None
            return match[1] == "decoder", int(match[2])  # the encoder comes first

        return min(paths, key=depth).removesuffix("_adapter") if paths else None

    def _save(self, state: steps.TrainState, position: Position | None) -> None:
        """Saves a state.

        Raises:
          InputError: a value is infinite or NaN. To resume from such a state would be useless.
        """
        if not steps.is_tree_finite((state.params, state.opt_state)):
            step = int(state.step)
            raise InputError(
                f"parameters are infinite or NaN after step {step}, which is not saved"
                f" (learning rate {float(self.schedule(step - 1)):g}): lower LEARNING_RATE and"
                f" {self._resume_advice()}"
            )
        self.save(state, position)
        self._last_saved = int(state.step)

    def _evaluate(self, state: steps.TrainState, frozen: PyTree) -> tuple[float, float]:
        """Returns the loss and the accuracy per target token on the evaluation batches."""
        sums = [
            self._eval_step(state.params, frozen, partitioning.shard_batch(batch, self.mesh))
            for batch in self.eval_batches
        ]
        total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        tokens = max(total["tokens"], 1.0)
        return total["nll"] / tokens, total["correct"] / tokens


def _describe_batch(arrays: Mapping[str, jax.Array]) -> str:
    """Returns the shape of a batch, '32 × (1,024 + 256)': rows, input tokens and target tokens."""
    (rows, inputs), (_, targets) = (
        arrays[name].shape for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    return f"{rows:,} × ({inputs:,} + {targets:,})"


_MIN_TREND_LOSSES = 10  # three at each end, from which `summarize_trend` takes medians


class LossTrend:
    """Warns once, after a tenth of a run but not before 50 steps, if its loss has not fallen.

    In fewer steps, the noise of small batches hides what a run with the default learning rate has
    learned since its warm-up.
    """

    def __init__(self, first_step: int, total_steps: int) -> None:
        self._check_step = max(total_steps // 10, 50)
        # None: nothing is left to check, or the run has resumed.
        self._losses: list[float] | None = None if first_step else []

    def update(self, step: int, losses: Sequence[float]) -> str | None:
        """Adds the losses of the steps up to `step`; returns the warning if it is due."""
        if self._losses is None:
            return None
        self._losses += losses
        if step < self._check_step:
            return None
        losses, self._losses = self._losses, None
        if len(losses) < _MIN_TREND_LOSSES:  # nearly all steps were skipped
            return None
        start, end, has_fallen = summarize_trend(losses)
        if has_fallen:
            return None
        return (
            f"step {step}  the loss has not fallen since the start ({start:.4f} to {end:.4f}):"
            " try another LEARNING_RATE"
        )


def summarize_trend(losses: Sequence[float]) -> tuple[float, float, bool]:
    """Returns the medians of the first and the last third, and whether the loss has fallen.

    The loss has fallen if the second median is lower by more than 1 % and by more than two standard
    errors of the difference. The noise of a step is estimated from the differences between
    neighboring steps, which a trend hardly changes.
    """
    array = np.asarray(losses, float)
    third = len(array) // 3
    start, end = float(np.median(array[:third])), float(np.median(array[-third:]))
    # For normal noise: the standard deviation is 1.48 times the median absolute deviation. That of
    # the differences of neighbors is √2 times that of the losses. The standard error of a median is
    # 1.25 times that of a mean.
    noise = 1.48 * float(np.median(np.abs(np.diff(array)))) / math.sqrt(2)
    error = 1.25 * noise * math.sqrt(2 / third)
    return start, end, start - end > max(0.01 * start, 2 * error)


class _Damage(NamedTuple):
    """A step that is not finite.

    Attributes:
      step: the step.
      metric: what is not finite, 'the loss' or 'the gradient norm'.
      value: its value, infinite or NaN.
    """

    step: int
    metric: str
    value: float


class _Summary(NamedTuple):
    """What `_Window.summarize` returns.

    Attributes:
      scalars: mean metrics, and speeds.
      router_rows: means of the metrics in `steps.ROUTER_ROWS`. If a step ends the run, they are the
        metrics of that step, because all routers are damaged after it.
      losses: loss per token of each step that was not skipped.
      damage: the step that ends the run: the first that is not finite, or with NONFINITE 'skip' the
        first beyond MAX_SKIPPED_STEPS in a row. None if the run continues.
    """

    scalars: dict[str, float]
    router_rows: dict[str, np.ndarray]
    losses: list[float]
    damage: _Damage | None


def _nonfinite_metric(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """Returns the name and the value of the first metric that is not finite, or None."""
    for key, name in (("loss", "the loss"), ("grad_norm", "the gradient norm")):
        if key in metrics and not math.isfinite(value := float(metrics[key])):
            return name, value
    return None


def _is_finite(metrics: Mapping[str, Any]) -> bool:
    return _nonfinite_metric(metrics) is None


class _Window:
    """The steps since the last report.

    Args:
      max_skipped: number of steps in a row that may be skipped; 0: no steps are skipped.

    Attributes:
      start: time at which the window began, plus the time of evaluations and saves since then.
      waited: seconds in which the devices were idle, because the next batch was not ready.
      timer: measures the steps.
      texts: descriptions of the devices and the batch, under the keys of `step_times`.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        self._max_skipped = max_skipped
        self._num_nonfinite = 0  # steps in a row that are not finite, up to the last one checked
        self._num_checked = 0
        self._steps: list[tuple[int, steps.Metrics, int]] = []  # step, metrics, number of tokens
        self.start, self.waited = time.monotonic(), 0.0
        self.timer = step_times.StepTimer()
        self.texts: dict[str, str] = {}

    def append(self, step: int, metrics: steps.Metrics, tokens: int, dispatch_time: float) -> None:
        """Adds a step, which may still be running."""
        self._steps.append((step, metrics, tokens))
        self.timer.add(dispatch_time, metrics)

    def has_failed_before_last(self) -> bool:
        """Whether a step before the last one ends the run, because it is not finite.

        The steps before the last have ended (`timer.wait`), so their losses can be read while the
        last step runs. The last step is not read even if it has ended too: all processes must stop
        at the same step, but may differ in whether their next batch is ready.
        """
        return self._check(self._steps[:-1]) is not None

    def _check(self, ended: Sequence[tuple[int, Mapping[str, Any], int]]) -> _Damage | None:
        """Checks the steps that are not checked yet; returns the one that ends the run, if any."""
        for index, (step, metrics, _) in enumerate(ended):
            if index < self._num_checked:
                continue
            damage = _nonfinite_metric(metrics)
            if damage is None:
                self._num_nonfinite = 0
            elif self._num_nonfinite == self._max_skipped:
                return _Damage(step, *damage)
            else:
                self._num_nonfinite += 1
            self._num_checked = index + 1
        return None

    def summarize(self) -> _Summary:
        """Waits for all steps, summarizes them without skipped ones, and starts a new window."""
        self.timer.wait(max_running=0)
        fetched = jax.device_get([metrics for _, metrics, _ in self._steps])
        numbers = [step for step, _, _ in self._steps]
        damage = self._check([(s, m, 0) for s, m in zip(numbers, fetched, strict=True)])
        taken = [m for m in fetched if _is_finite(m)] if self._max_skipped else fetched
        # If all steps were skipped, the means show what was not finite.
        means = {name: np.mean([m[name] for m in taken or fetched], axis=0) for name in fetched[0]}
        rows = {name: means.pop(name) for name in steps.ROUTER_ROWS if name in means}
        if damage is not None:  # after this step, all routers are damaged
            rows = {name: fetched[numbers.index(damage.step)][name] for name in rows}
        scalars = {name: float(mean) for name, mean in means.items()}
        if self._max_skipped:
            scalars["skipped"] = float(len(fetched) - len(taken))
        now = time.monotonic()
        seconds = now - self.start
        scalars["tokens_per_second"] = sum(tokens for _, _, tokens in self._steps) / seconds
        scalars["steps_per_second"] = len(self._steps) / seconds
        scalars["wait_share"] = self.waited / seconds
        scalars["step_seconds"] = float(np.median(self.timer.take_seconds()))
        self._steps, self.start, self.waited = [], now, 0.0
        self._num_checked = 0
        losses = [float(metrics["cross_ent_loss"]) for metrics in taken]
        return _Summary(scalars, rows, losses, damage)
