"""Start-up of processes by the environment, and errors that other processes cause."""

import jax
import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import distributed


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"PEMOE_DISTRIBUTED": "1"}, {}),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "SLURM_STEP_NUM_TASKS": "4",
            },
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_arguments_of_jax_initialize(environment, expected):
    assert distributed._jax_arguments(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set, but JAX_PROCESS_ID is"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES must be at least 1, got 0",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID must be between 0 and 1, got 2",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES must be a non-negative integer, got 'x'",
        ),
    ],
)
def test_incomplete_environments(environment, message):
    with pytest.raises(InputError, match=message):
        distributed._jax_arguments(environment)


@pytest.mark.parametrize(
    ("error", "is_reported"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: reset by peer\nIn call to train"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 heartbeat timeout."), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("Unknown: a word"), False),
    ],
)
def test_errors_that_report_other_processes(error, is_reported):
    """Alone, and as the cause of Orbax's error."""
    wrapped = TimeoutError("Timed out while waiting for a barrier.")
    wrapped.__cause__ = error
    expected = str(error).splitlines()[0] if is_reported else None
    assert (
        distributed.peer_error_message(error) == distributed.peer_error_message(wrapped) == expected
    )
