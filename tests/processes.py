"""Importing seqio in a new process."""

import os
import pathlib
import subprocess
import sys

from pemoe_jax.data import seqio_import


def import_seqio(folder=None, then="", timeout=None, **variables):
    """Calls import_seqio() and runs `then` in a new process, where modules in `folder` win."""
    path = [
        str(pathlib.Path(seqio_import.__file__).parents[2]),
        *([str(folder)] if folder else []),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"PYTHONPATH": os.pathsep.join(reversed(path))} | variables
    command = f"from pemoe_jax.data import seqio_import; seqio_import.import_seqio(); {then}"
    return subprocess.run(
        [sys.executable, "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
