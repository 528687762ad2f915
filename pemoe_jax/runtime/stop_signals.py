"""SIGTERM, SIGUSR1 and Ctrl-C as a flag that a run reads between its steps.

An exception that is raised inside of a step finds the state already donated to it, so that nothing
can be saved. One that is raised in a callback of JAX is even swallowed.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# Slurm sends SIGUSR1 before the end of a job's time if it is asked to (`--signal=USR1@120`).
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """The first signal after `install`; a second SIGINT raises KeyboardInterrupt.

    Attributes:
      received: the signal; None: none.
      time: when this process learned of it, by `time.monotonic`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.time = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Replaces the process's handlers; a no-op outside of the main thread, which has them."""
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
        """Whether to stop after a step: the same step in all processes, which must all call this.

        It costs no communication until a signal arrives.
        """
        if jax.process_count() == 1:
            return self.received is not None
        is_due = multihost_utils.reached_preemption_sync_point(step)
        if is_due:
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
            os.kill(os.getpid(), signal.SIGTERM)
