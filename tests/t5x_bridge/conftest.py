"""Tests inside T5X, skipped if it is not installed; `make test-t5x` runs them."""

import importlib.util
import pathlib

import pytest

_spec = importlib.util.find_spec("t5x")
# Without an origin it is a namespace package: any folder called t5x.
ABSENT = _spec is None or _spec.origin is None
WITHOUT_T5X = {"test_batches.py", "test_check.py"}
HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in item.path.parents or item.path.name in WITHOUT_T5X:
            continue
        item.add_marker(pytest.mark.slow)
        if ABSENT:
            item.add_marker(pytest.mark.skip(reason="T5X is not installed: make t5x"))
