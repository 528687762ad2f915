"""Tests inside T5X: skipped, with a reason, where it is absent; `make test-t5x` runs them."""

import importlib.util
import pathlib

import pytest

_found = importlib.util.find_spec("t5x")
ABSENT = _found is None or _found.origin is None  # this folder has its name, and is no package
HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in item.path.parents or item.path.name == "test_check.py":
            continue
        item.add_marker(pytest.mark.slow)
        if ABSENT:
            item.add_marker(pytest.mark.skip(reason="T5X is not installed: make t5x"))
