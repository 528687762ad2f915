"""The settings of a run from its config.gin."""

from pemoe_jax.analysis.zero_shot import run_settings


def test_parse_settings():
    """Location and logging of a run are left out, since they do not change its result."""
    text = """\
from __gin__ import dynamic_registration
# Macros:
BATCH_SIZE = 8
LOG_PERIOD = 25
MODEL_DIR = \\
    '/a/b'
SEED = 3
TASK_FEATURE_LENGTHS = \\
    {'inputs': 128,
     'targets': 32}

routing.Router.top_k = 2
adapters.VectorExperts.router = @routing.Router
train.train.loss = @steps.Loss()
train.train.batch_size = %BATCH_SIZE
options.Data.register = @tasks.register
"""
    parsed = run_settings.parse_settings(text)
    assert parsed == {
        "BATCH_SIZE": "8",
        "SEED": "3",
        "TASK_FEATURE_LENGTHS": "{'inputs': 128, 'targets': 32}",
        "routing.Router.top_k": "2",
        "adapters.VectorExperts.router": "@routing.Router",
    }
    other_seed = run_settings.parse_settings(
        text.replace("SEED = 3", "SEED = 4").replace("/a/b", "/c")
    )
    assert run_settings.fingerprint(parsed) == run_settings.fingerprint(other_seed)
    other_top_k = run_settings.parse_settings(text.replace("top_k = 2", "top_k = 1"))
    assert run_settings.fingerprint(parsed) != run_settings.fingerprint(other_top_k)
