"""Memory of programs on the CPU; in subprocesses, as settings of the C library are permanent."""

import os
import subprocess
import sys

import pytest

from pemoe_jax.runtime import host_memory

# Each run has 64 MB of temporaries, 16,384 pages.
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
counts = []
for _ in range({runs}):
    start = faults()
    run(x).block_until_ready()
    counts.append(faults() - start)
print(*counts)
"""


def faults(before: str) -> list[int]:
    """Returns the page faults of each of `RUNS` runs."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(before=before, runs=RUNS)],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(
    bool(host_memory.accelerators()), reason="a no-op on machines with accelerators"
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_pages_are_reused_between_runs():
    """Almost no run takes new pages; without the settings every run does.

    A freed block may be a few bytes short for the next one when a small allocation took the end of
    it: up to 4 of 60 runs took new pages in a process that does little else, none of a training.
    """
    settings = "assert host_memory.configure(); host_memory.disable_async_dispatch()"
    assert sum(count > 1000 for count in faults(settings)) <= 8
    assert min(faults("")) > 10_000


def test_xla_flags_of_the_user_are_not_replaced(monkeypatch):
    monkeypatch.setattr(host_memory, "accelerators", lambda: ["/dev/nvidia0"])
    environment = {"XLA_FLAGS": "--a=1"}
    assert not host_memory.configure(environment)
    assert environment == {"XLA_FLAGS": "--a=1"}
    monkeypatch.setattr(host_memory, "accelerators", lambda: [])
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())  # musl has no mallopt
    monkeypatch.setattr(host_memory.sys, "platform", "linux")
    monkeypatch.setattr(host_memory.os, "sched_getaffinity", lambda _: {0, 1, 2})
    name = "--xla_cpu_parallel_codegen_split_count"
    for flags, expected in (
        ("--a=1", f"--a=1 {name}=3"),
        ("", f"{name}=3"),
        (f"{name}=9", f"{name}=9"),
    ):
        environment = {"XLA_FLAGS": flags}
        assert not host_memory.configure(environment)
        assert environment == {"XLA_FLAGS": expected}
    host_memory.trim_heap()  # a no-op without glibc
