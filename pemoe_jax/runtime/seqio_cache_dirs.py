"""Registers the folders of seqio's offline caches without importing seqio."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from pemoe_jax.core.errors import InputError

# `data.seqio_import` passes these to seqio when it imports it.
additional_cache_dirs: list[str] = []


def add_cache_dirs(folders: Iterable[str]) -> None:
    """Registers folders of offline caches (--seqio_additional_cache_dirs).

    Args:
      folders: local paths or URLs.

    Raises:
      InputError: a local folder does not exist.
    """
    added: list[str] = []
    for folder in folders:
        if "://" not in folder:
            folder = os.path.abspath(os.path.expanduser(folder))
            if not os.path.isdir(folder):
                kind = "a file" if os.path.exists(folder) else "no such folder"
                raise InputError(
                    f"--seqio_additional_cache_dirs: {folder} must be a folder, got {kind}"
                )
        added.append(folder)
    # Added after the loop, so that no folder is added if one of them is wrong.
    additional_cache_dirs.extend(f for f in added if f not in additional_cache_dirs)
    # If seqio is imported already, the folders are passed to it here. Its import takes about 5 s.
    if "seqio" in sys.modules:
        sys.modules["seqio"].add_global_cache_dirs(additional_cache_dirs)
