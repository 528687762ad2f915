"""How XLA orders the operations of a program on CPUs."""

import jax


def rematerialization_options(remat_policy: str) -> dict[str, str]:
    """Returns XLA's compiler options for a step with this `stacks` policy, to pass to `jax.jit`.

    The default schedule on CPUs runs independent operations side by side and is 4 to 10 % faster.
    With rematerialization it would compute all that is to be recomputed at once, and so hold it in
    memory; then the schedule that needs the least memory is chosen.
    """
    if remat_policy == "none" or jax.default_backend() != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
