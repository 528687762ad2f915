"""Compiler options for the order of a program's operations on CPUs."""

import jax


def rematerialization_options(remat_policy: str) -> dict[str, str]:
    """Returns the compiler options of `jax.jit` for a step with one of `stacks.REMAT_POLICIES`.

    XLA's default schedule on CPUs runs independent operations in parallel, and is 4 to 10 % faster.
    With rematerialization, this schedule would recompute all layers at once and hold their
    activations in memory. So a policy that recomputes gets the schedule with the lowest memory use.
    """
    if remat_policy == "none" or jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
