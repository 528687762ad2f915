"""Worker processes that take single steps in turn.

Each side of a comparison is a process: it loads, compiles, warms up, and then takes one step for
each line on its input. Steps of the sides alternate, so that both see the same disturbances, and
one sleeps while the other works. A peer may run in another Python environment, so this module needs
only the standard library and `runtime.host_memory`. Worker programs: `ours.py`, `choices.py`,
`torch_peer.py`, `torch_choices.py`, `t5x_peer.py`, `flaxformer_peer.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import machine

from pemoe_jax.runtime import host_memory

T = TypeVar("T")
REPO = pathlib.Path(__file__).resolve().parent.parent


# --- in the worker ---


class Worker:
    """The worker's end of the pipe: `spec` says what to build, `run` takes steps on request.

    Standard output is reserved for answers. Output of libraries goes to the error stream.
    """

    def __init__(self) -> None:
        self.spec: dict[str, Any] = json.loads(sys.argv[1])
        # Libraries print from C++ too, so descriptor 1 is redirected and not only sys.stdout.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        if not self.spec.get("gpu"):
            machine.pin()
            host_memory.configure()  # in peers too, since it makes them faster as well
            if importlib.util.find_spec("jax"):
                host_memory.disable_async_dispatch()

    def run(
        self,
        step: Callable[[], Any],
        info: Mapping[str, Any],
        final_info: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Warms up with two steps, answers, and takes one more step for each input line.

        Args:
          step: takes a step, waits for its end, and returns a number (a loss).
          info: entries for the row; `before` is the memory before the model was built, in bytes.
          final_info: returns entries for the row after the last step, while the other side rests.
        """
        # The first step allocates what later ones reuse, and torch compiles in it.
        clock = time.perf_counter()
        first = float(step())
        host_memory.trim_heap()  # returns the compiler's memory, which later steps do not need
        step()
        warm_up = time.perf_counter() - clock
        build_peak = machine.memory("VmHWM")
        # A second peak, of the steps alone, shows the memory of a run after compilation.
        machine.reset_peak_memory()
        self._answer({**info, "first": first, "warm-up": warm_up})
        steps = self.spec.get("steps", 1)
        for _ in sys.stdin:
            clock, cpu = time.perf_counter(), time.process_time()
            step()
            seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
            self._answer({"seconds": seconds / steps, "cpu": cpu / steps})
        peak = machine.memory("VmHWM")
        self._answer({"peak": max(peak, build_peak), "peak of steps": peak, **final_info()})

    def _answer(self, values: Mapping[str, Any]) -> None:
        print(json.dumps(values), file=self._answers, flush=True)


# --- in the benchmark ---


@dataclasses.dataclass
class Side:
    """One side of a comparison and its measurements.

    Attributes:
      name: name in the table.
      program: the worker's file in benchmarks/.
      spec: what the worker builds.
      python: the worker's interpreter.
      info: the worker's answers before and after its steps.
      times: (seconds, CPU seconds) of each step.
    """

    name: str
    program: str = ""
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    python: str = sys.executable
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    times: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def start(self) -> None:
        """Starts the worker; `wait` returns when it is warm."""
        program = pathlib.Path(__file__).with_name(self.program)
        environment = {**os.environ, "PYTHONPATH": str(REPO), "TF_CPP_MIN_LOG_LEVEL": "2"}
        if self.spec.get("gpu"):  # both sides hold their memory at the same time
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        self.process = subprocess.Popen(
            [self.python, str(program), json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env=environment,
        )

    def wait(self) -> None:
        """Waits until the worker is warm."""
        self.info = self._read_answer()

    def step(self) -> None:
        """Makes the worker take a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self._read_answer()
        self.times.append((answer["seconds"], answer["cpu"]))

    def end(self) -> None:
        """Ends the worker and reads its memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.info |= self._read_answer()
        self.process.wait()

    def _read_answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with {self.process.wait()}")
        return json.loads(line)

    @property
    def seconds(self) -> list[float]:
        return [seconds for seconds, _ in self.times]

    def as_dict(self) -> dict[str, Any]:
        """Returns medians, memory and versions for a row."""
        return {
            "name": self.name,
            "seconds": statistics.median(self.seconds),
            "fastest": min(self.seconds),
            "cpu seconds": statistics.median(cpu for _, cpu in self.times),
            **self.info,
        }


def alternate(sides: Sequence[Side], rounds: int, sequential: bool = False) -> float:
    """Makes each side take `rounds` steps in turn; the order rotates with every round.

    Args:
      sides: sides whose workers are not started yet.
      rounds: number of steps per side.
      sequential: whether one side takes all its steps before the next starts, for a GPU that has
        no memory for both. A GPU runs nothing else, so its times are steady.

    Returns:
      The share of the cores that other processes used.
    """
    if sequential and len(sides) > 1:
        return statistics.mean(alternate([side], rounds) for side in sides)
    for side in sides:  # all load and compile at once: none of that is measured
        side.start()
    for side in sides:
        side.wait()
    load = machine.OtherLoad()
    for side in _turns(sides, rounds):
        time.sleep(0.05)  # until the threads of the previous side sleep
        side.step()
    cpu_seconds = sum(side.spec.get("steps", 1) * cpu for side in sides for _, cpu in side.times)
    share = load.share(cpu_seconds)
    for side in sides:
        side.end()
    return share


def alternate_functions(
    functions: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[list[Side], float]:
    """Does what `alternate` does, for functions of this process.

    The functions must be warm and return only when their work is done.

    Returns:
      A side per function, and the share of the cores that other processes used.
    """
    sides = [(Side(name), function) for name, function in functions.items()]
    load, start = machine.OtherLoad(), time.process_time()
    for side, function in _turns(sides, rounds):
        clock, cpu = time.perf_counter(), time.process_time()
        function()
        side.times.append((time.perf_counter() - clock, time.process_time() - cpu))
    return [side for side, _ in sides], load.share(time.process_time() - start)


def _turns(sides: Sequence[T], rounds: int) -> Iterator[T]:
    # Rotating the order spreads effects of a side on the next one over all sides.
    for number in range(rounds):
        start = number % len(sides)
        yield from [*sides[start:], *sides[:start]]


def alternate_programs(
    programs: Mapping[str, Any],
    inputs: Sequence[Any],
    rounds: int,
    gpu: bool = False,
    calls: int = 1,
) -> tuple[list[Side], float]:
    """Does what `alternate_functions` does, for programs that jax compiled.

    Args:
      programs: the programs by name.
      inputs: their arguments.
      rounds: number of steps of each program.
      gpu: whether they run on a GPU.
      calls: number of calls in a step.

    Returns:
      A side per program, with times per call, and the share of the cores that other processes used.
    """
    import jax

    def make_function(program: Any) -> Callable[[], Any]:
        def function() -> None:
            for _ in range(calls):  # one call on a GPU is too short to time
                output = program(*inputs)
            jax.block_until_ready(output)

        return function

    functions = {name: make_function(program) for name, program in programs.items()}
    for function in functions.values():
        function()
    sides, other_load = alternate_functions(functions, rounds)
    for side in sides:
        side.times = [(seconds / calls, cpu / calls) for seconds, cpu in side.times]
        memory = programs[side.name].memory_analysis()
        side.info = {"temporaries": memory.temp_size_in_bytes, **jax_info(gpu)}
    return sides, other_load


def check_gpu(spec: Mapping[str, Any]) -> None:
    """Ends a JAX worker whose spec asks for a GPU if there is none."""
    # Models of GPU rows would fill the memory of a machine without a GPU.
    import jax

    if spec.get("gpu") and jax.default_backend() != "gpu":
        raise SystemExit(f"--gpu needs a GPU, got JAX's backend {jax.default_backend()!r}")


def jax_info(gpu: bool) -> dict[str, Any]:
    """Returns a side's versions and, with `gpu`, the name of the GPU."""
    import jax

    versions = {"versions": machine.versions("jax", "jaxlib", "flax")}
    return versions | ({"device": jax.devices()[0].device_kind} if gpu else {})
