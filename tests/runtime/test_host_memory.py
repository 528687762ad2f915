"""Memory of programs on the CPU, in processes of their own: settings of a C library stay."""

import os
import subprocess
import sys

import pytest

from pemoe_jax.runtime import host_memory

# 64 MB of temporaries a run, 16,384 pages
RUNS = 40
FAULTS = """
import resource
from pemoe_jax.runtime import host_memory
{before}
import jax, jax.numpy as jnp
run = jax.jit(lambda x: jnp.sum(jnp.sin(x @ x.T) @ x))
x = jnp.ones((4096, 4))
run(x).block_until_ready(), run(x).block_until_ready()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
for _ in range({runs}):
    start = faults()
    run(x).block_until_ready()
    found.append(faults() - start)
print(*found)
"""


def faults(before: str) -> list[int]:
    """Page faults of each of `RUNS` runs."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(before=before, runs=RUNS)],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(bool(host_memory.accelerators()), reason="nothing is done on a GPU machine")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_pages_are_kept_between_runs():
    """All but a few runs take no new pages, where each does without the settings.

    An aligned block that was freed may be a few bytes short for the next one, when the piece cut
    off at its end has gone to something small: up to 4 of 60 runs took new pages in a process that
    does little else, and of a training none.
    """
    start = "assert host_memory.configure(); host_memory.disable_async_dispatch()"
    assert sum(count > 1000 for count in faults(start)) <= 8
    assert min(faults("")) > 10_000


def test_flags_of_the_user_stay(monkeypatch):
    monkeypatch.setattr(host_memory, "accelerators", lambda: ["/dev/nvidia0"])
    environment = {"XLA_FLAGS": "--a=1"}
    assert not host_memory.configure(environment)
    assert environment == {"XLA_FLAGS": "--a=1"}
    monkeypatch.setattr(host_memory, "accelerators", lambda: [])
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())  # as musl: no mallopt
    monkeypatch.setattr(host_memory.sys, "platform", "linux")
    monkeypatch.setattr(host_memory.os, "sched_getaffinity", lambda _: {0, 1, 2})
    name = "--xla_cpu_parallel_codegen_split_count"
    for given, expected in (
        ("--a=1", f"--a=1 {name}=3"),
        ("", f"{name}=3"),
        (f"{name}=9", f"{name}=9"),
    ):
        environment = {"XLA_FLAGS": given}
        assert not host_memory.configure(environment)
        assert environment == {"XLA_FLAGS": expected}
    host_memory.trim_heap()  # does nothing there
