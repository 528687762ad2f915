"""What the scripts share: workers that take turns, their memory, medians and ratios, the machine.

Each side of a comparison is a process of its own: it loads, compiles, warms up, and then takes one
step at each line that it is sent, so that single steps alternate and one side sleeps while the
other works. A peer may so live in another Python. Worker programs: `ours.py`, `torch_peer.py`,
`t5x_peer.py`. This module needs the standard library alone, and so does what it imports.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pemoe_jax.runtime import atomic_write, host_memory

REPO = pathlib.Path(__file__).resolve().parent.parent
CORES = 2  # of a comparison on CPU
VOCABULARY = 32128
MEGABYTE = 1e6


def parser(
    doc: str | None, rounds: int = 9, size: str | None = None, gpu: bool = False
) -> argparse.ArgumentParser:
    """The flags that scripts have in common.

    Args:
      doc: the script's.
      rounds: steps that a side takes unless the flag says otherwise.
      size: the size unless the flag says otherwise; None: there is no such flag.
      gpu: whether there is a flag for the GPU.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", default=rounds, type=int, help="steps that each side takes")
    if size is not None:
        made.add_argument("--size", default=size, help="dimensions: gin/models/t5_1_1_SIZE.gin")
    if gpu:
        made.add_argument("--gpu", action="store_true", help="on the GPU, not on two CPU threads")
    made.add_argument("--json", type=pathlib.Path, help="a file to write the rows to")
    return made


def dimensions(size: str) -> dict[str, int]:
    """The numbers of a size's gin file, by T5Config's names."""
    text = (REPO / "gin" / "models" / f"t5_1_1_{size}.gin").read_text()
    return {name: int(number) for name, number in re.findall(r"^  (\w+) = (\d+)$", text, re.M)}


# --- memory, and how busy the machine is (Linux) ---


def memory(field: str) -> int:
    """Bytes of this process by their name in /proc/self/status.

    VmRSS: what it holds now; VmHWM: the most it ever held; RssAnon: now, mapped files left out.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def _forget_peak() -> None:
    """From here on VmHWM is the most that is held from here on."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


class Peak:
    """The most anonymous memory of a block less what there was before it: `added`, in bytes."""

    def __init__(self, every: float = 0.02):
        self.every = every  # seconds

    def __enter__(self) -> "Peak":
        self.before = self.highest = memory("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(self.every):
            self.highest = max(self.highest, memory("RssAnon"))

    def __exit__(self, *unused: Any) -> None:
        self._over.set()
        self._thread.join()
        self.added = self.highest - self.before


def busy_seconds() -> float:
    """What all processes together have used of the cores since the machine started."""
    fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    used = [int(field) for field in fields]
    return (sum(used[:8]) - used[3] - used[4]) / os.sysconf("SC_CLK_TCK")


class Others:
    """How busy other processes keep the cores from here on."""

    def __init__(self) -> None:
        self._before, self._clock = busy_seconds(), time.perf_counter()

    def share(self, own: float) -> float:
        """Of all cores, where `own` are the CPU seconds that were used on purpose meanwhile."""
        passed = (time.perf_counter() - self._clock) * (os.cpu_count() or 1)
        return max(0.0, busy_seconds() - self._before - own) / passed


# --- a worker's side ---


def pin(cores: int = CORES) -> None:
    """Keeps this process on the first cores; before jax or torch look how many there are."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))


class Service:
    """A worker's end of the line: `spec` says what to build, `run` takes steps when asked.

    What libraries print goes to the error stream; the line is kept for answers.
    """

    def __init__(self) -> None:
        self.spec: dict[str, Any] = json.loads(sys.argv[1])
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        if not self.spec.get("gpu"):
            pin()
            host_memory.configure()  # peers too: it serves them as well
            if importlib.util.find_spec("jax"):
                host_memory.disable_async_dispatch()

    def run(
        self,
        step: Callable[[], Any],
        told: Mapping[str, Any],
        at_the_end: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Takes two steps, says what there is to tell, and takes one more at each line.

        Args:
          step: waits until it is done, and returns a number (a loss) that is told too.
          told: anything; `before`, bytes held before the model was built, is expected.
          at_the_end: what there is to tell then, when the other side is at rest.
        """
        clock = time.perf_counter()
        first = float(step())
        host_memory.trim_heap()  # what compilation took, which peers do now
        step()
        warm_up = time.perf_counter() - clock
        building = memory("VmHWM")
        _forget_peak()
        self._answer({**told, "first": first, "warm-up": warm_up})
        many = self.spec.get("steps", 1)
        for _ in sys.stdin:
            clock, cpu = time.perf_counter(), time.process_time()
            step()
            seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
            self._answer({"seconds": seconds / many, "cpu": cpu / many})
        peak = memory("VmHWM")
        self._answer({"peak": max(peak, building), "peak of steps": peak, **at_the_end()})

    def _answer(self, what: Mapping[str, Any]) -> None:
        print(json.dumps(what), file=self._answers, flush=True)


def versions(*packages: str) -> str:
    """'Python 3.11.9, jax 0.10.2, …'."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


# --- the other side ---


@dataclasses.dataclass
class Side:
    """One side of a comparison, and what was seen of it.

    Attributes:
      name: what the table calls it.
      program: the worker's file in benchmarks/.
      spec: what the worker builds.
      python: its interpreter.
      told: what it said before and after its steps.
      times: (seconds, CPU seconds) of each step.
    """

    name: str
    program: str
    spec: Mapping[str, Any]
    python: str = sys.executable
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    times: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def start(self) -> None:
        """Starts the worker; `wait` says when it is ready."""
        program = pathlib.Path(__file__).with_name(self.program)
        ours = {"PYTHONPATH": str(REPO), "TF_CPP_MIN_LOG_LEVEL": "2"}
        if self.spec.get("gpu"):  # both sides have their memory at the same time
            ours["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        self.process = subprocess.Popen(
            [self.python, str(program), json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env={**os.environ, **ours},
        )

    def wait(self) -> None:
        """Waits for what the worker has to tell when it is warm."""
        self.told = self._next()

    def step(self) -> None:
        """Has it take a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        taken = self._next()
        self.times.append((taken["seconds"], taken["cpu"]))

    def end(self) -> None:
        """Lets it go, and takes down its memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.told |= self._next()
        self.process.wait()

    def _next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with {self.process.wait()}")
        return json.loads(line)

    @property
    def seconds(self) -> list[float]:
        """Of its steps, by the clock."""
        return [seconds for seconds, _ in self.times]

    def as_dict(self) -> dict[str, Any]:
        """For a row: medians, memory and versions."""
        return {
            "name": self.name,
            "seconds": statistics.median(self.seconds),
            "fastest": min(self.seconds),
            "cpu seconds": statistics.median(cpu for _, cpu in self.times),
            **self.told,
        }


def alternate(sides: Sequence[Side], rounds: int, one_after_another: bool = False) -> float:
    """Has the sides take `rounds` steps each, in turn, in an order that turns too.

    Args:
      sides: not started yet.
      rounds: their number.
      one_after_another: all steps of one side and then all of the next, where the memory of a GPU
        would not do for both; nothing else runs there, and its clock is steady.

    Returns:
      The share of the cores that others used meanwhile.
    """
    if one_after_another and len(sides) > 1:
        return statistics.mean(alternate([side], rounds) for side in sides)
    for side in sides:  # all load and compile at once: no time of this is told
        side.start()
    for side in sides:
        side.wait()
    others = Others()
    for number in range(rounds):
        for place in range(len(sides)):
            time.sleep(0.05)  # until the threads of the last one sleep
            sides[(number + place) % len(sides)].step()
    own = [side.spec.get("steps", 1) * cpu for side in sides for _, cpu in side.times]
    share = others.share(sum(own))
    for side in sides:
        side.end()
    return share


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[list[Side], float]:
    """As `alternate`, of functions of this process that wait until they are done and are warm.

    Returns:
      (a side for each, the share of the cores that others used meanwhile).
    """
    sides = [Side(name, "", {}) for name in ways]
    works = list(ways.values())
    others, start = Others(), time.process_time()
    for number in range(rounds):
        for place in range(len(sides)):
            which = (number + place) % len(sides)
            begun, cpu = time.perf_counter(), time.process_time()
            works[which]()
            sides[which].times.append((time.perf_counter() - begun, time.process_time() - cpu))
    return sides, others.share(time.process_time() - start)


def fastest(make: Callable[[str], Side], ways: Sequence[str], rounds: int) -> str:
    """Tries a peer's ways, one after another, says what they take, and returns the fastest."""
    taken = {}
    for way in ways:
        side = make(way)
        alternate([side], rounds)
        taken[way] = quartiles(side.seconds)[1]
        peak = side.told["peak"] / MEGABYTE
        print(f"{side.name}: {taken[way]:.3f} s, least {min(side.seconds):.3f}, {peak:.0f} MB")
    return min(taken, key=lambda way: taken[way])


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """The ends of the middle half, and the median between them."""
    if len(numbers) == 1:
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def paired(ours: Sequence[float], peers: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of ours over the peer's, round by round."""
    return quartiles([a / b for a, b in zip(ours, peers, strict=True)])


def peer_python(name: str) -> str:
    """Where `make bench-peers` puts a peer's interpreter, or where the environment says it is."""
    default = str(REPO / f".venv-{name}" / "bin" / "python")
    return os.environ.get(f"PEMOE_{name.upper()}_PYTHON", default)


def check_peer(python: str, flag: str) -> None:
    """Ends the script in a line where a peer's interpreter is not there."""
    if shutil.which(python) is None:
        raise SystemExit(f"--{flag}: {python} is not there: make bench-peers makes it")


# --- rows ---


def machine() -> str:
    """The processor, the cores that are used, and the memory."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    total = pathlib.Path("/proc/meminfo").read_text().split()[1]
    name = names[0] if names else platform.machine()
    return f"{name}, {CORES} of {os.cpu_count()} cores, {int(total) / 1e6:.0f} GB"


def row(
    name: str,
    ours: Side,
    peer: Side | None,
    others: float,
    floor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the table has of one comparison, or of ours alone; `name` is that of `results.ROWS`.

    Ratios are of seconds a token where the two sides' steps are of different size.
    """
    found: dict[str, Any] = {"row": name, "ours": ours.as_dict()}
    if peer is not None:
        scale = ours.told.get("tokens", 1) / peer.told.get("tokens", ours.told.get("tokens", 1))
        clock, cpu = zip(*ours.times, strict=True), zip(*peer.times, strict=True)
        ratios = [paired(a, [b * scale for b in p]) for a, p in zip(clock, cpu, strict=True)]
        found |= {"peer": peer.as_dict(), "ratio": ratios[0], "cpu ratio": ratios[1]}
    return {
        **found,
        "floor": dict(floor or {}),
        "rounds": len(ours.times),
        "others used": others,
        "machine": ours.told.get("device") or machine(),
        "command": command(),
    }


def command() -> str:
    """As it was given, without the file that rows are written to."""
    words = ["benchmarks/" + pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    for i, word in enumerate(words):
        if word == "--json":
            words[i : i + 2] = []
            break
    return f"python {shlex.join(words)}"


def write(rows: Sequence[Mapping[str, Any]], to: pathlib.Path | None) -> None:
    """Prints the rows, and writes them as JSON where a file is named."""
    for one in rows:
        print(in_words(one), flush=True)
    if to is not None:
        atomic_write.write_text(to, json.dumps(list(rows), indent=1) + "\n")


def in_words(one: Mapping[str, Any]) -> str:
    """A row as some lines."""
    lines = [f"{one['row']}: {one['rounds']} rounds, others used {one['others used']:.0%}"]
    if "ratio" in one:
        low, middle, high = one["ratio"]
        lines[0] += (
            f"; {middle:.3f} of the peer's time, middle half {low:.3f}–{high:.3f},"
            f" of its CPU time {one['cpu ratio'][1]:.3f}"
        )
    for side in (one["ours"], one.get("peer")):
        if side is not None:
            lines.append(f"  {side['name']}: {side_in_words(side)}; {side.get('versions', '')}")
    if one["floor"]:
        lines.append(f"  floor: {floor_in_words(one['floor'])}")
    return "\n".join([*lines, f"  {one['machine']}; {one['command']}"])


def side_in_words(side: Mapping[str, Any]) -> str:
    """Time and memory of one side."""
    told = [f"{side['seconds'] * 1e3:.4g} ms a step", f"fastest {side['fastest'] * 1e3:.4g}"]
    for field in ("peak", "peak of steps", "before", "temporaries", "device peak"):
        if side.get(field) is not None:
            told.append(f"{field} {side[field] / MEGABYTE:.0f} MB")
    if "tokens" in side:
        told.append(f"{side['tokens'] / side['seconds']:.0f} tokens/s")
    if "utilisation" in side:
        told.append(f"utilisation {side['utilisation']:.1%}")
    return ", ".join(told)


def floor_in_words(floor: Mapping[str, Any]) -> str:
    """'412 ms: 61.2 GFLOP at 148 GFLOP/s; 1.2 GB at 20 GB/s'."""
    return (
        f"{floor['seconds'] * 1e3:.3g} ms ({floor['flops'] / 1e9:.4g} GFLOP at"
        f" {floor['flops a second'] / 1e9:.4g} G/s; {floor['bytes'] / 1e9:.3g} GB at"
        f" {floor['bytes a second'] / 1e9:.3g} GB/s)"
    )
