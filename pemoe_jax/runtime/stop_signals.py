"""Handles SIGTERM, SIGUSR1 and Ctrl-C by a flag that a run reads between its steps.

An exception would not do: if the handler raised one within a step, nothing could be saved, because
the state is already donated to the step. In a callback of JAX, the exception would even be lost.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# With `--signal=USR1@120`, Slurm sends SIGUSR1 120 s before the end of a job's time.
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Records the first signal after `install`; a SIGINT after it raises KeyboardInterrupt.

    Attributes:
      received: the signal; None: none yet.
      time: when this process learned of the signal, by `time.monotonic`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.time = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Replaces the process's handlers; a no-op in other threads than the main one."""
        # Python lets only the main thread set handlers.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _HANDLED:
            # With several processes, JAX handles SIGTERM and tells the others.
            if number != signal.SIGTERM or jax.process_count() == 1:
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Sets the process's previous handlers again."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def is_due(self, step: int) -> bool:
        """Whether to stop after a step; all processes must call this, and stop at the same step.

        The processes do not communicate until a signal arrives.
        """
        if jax.process_count() == 1:
            return self.received is not None
        is_due = multihost_utils.reached_preemption_sync_point(step)
        if is_due:  # the signal of one process reaches all of them as SIGTERM
            self.time = self.time or time.monotonic()
            self.received = signal.SIGTERM
        return is_due

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                signal.default_int_handler(number, frame)
            return
        self.received, self.time = signal.Signals(number), time.monotonic()
        # Not `print`, whose buffer the interrupted code may be writing to.
        os.write(2, b"\nstopping after this step; interrupt again to stop at once\n")
        if jax.process_count() > 1:
            # For JAX's handler of SIGTERM, through which all processes agree on the last step.
            os.kill(os.getpid(), signal.SIGTERM)
