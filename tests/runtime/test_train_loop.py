"""The training loop: what it says about a loss that is not finite."""

import math
import types

import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.train_loop import TrainLoop


@pytest.mark.parametrize(
    ("is_first", "advice"), [(True, "starts from damaged parameters"), (False, "lower LEARNING_RA")]
)
def test_the_loss_before_any_update_does_not_depend_on_the_learning_rate(is_first, advice):
    loop = TrainLoop.__new__(TrainLoop)
    loop.schedule = lambda step: 0.1
    scalars = {"loss": math.nan, "accuracy": 0.0, "wait_share": 0.0, "tokens_per_second": 1.0}
    window = types.SimpleNamespace(summarize=lambda: (dict(scalars), None))
    writer = types.SimpleNamespace(write=lambda *_: None)
    bar = types.SimpleNamespace(report=lambda *_: None)
    with pytest.raises(InputError, match=rf"the loss is nan at step 5 .*{advice}"):
        loop._report(5, window, writer, bar, is_first)
