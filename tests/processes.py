"""Importing seqio in a new process."""

import os
import pathlib
import subprocess
import sys

from pemoe_jax.data import seqio_import


def import_seqio(folder=None, then="", timeout=None, **variables):
    """Calls import_seqio() and runs `then` in a new process, with `folder` first on its path."""
    path = [pathlib.Path(seqio_import.__file__).parents[2]]
    if folder:
        path.insert(0, folder)
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables
    command = f"from pemoe_jax.data import seqio_import; seqio_import.import_seqio(); {then}"
    return subprocess.run(
        [sys.executable, "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
