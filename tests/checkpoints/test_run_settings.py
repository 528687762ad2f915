"""The settings of a run from its config.gin."""

import gin
import pytest

from pemoe_jax.analysis import evaluation
from pemoe_jax.checkpoints import run_settings
from pemoe_jax.data import seqio_tasks


@pytest.mark.parametrize(("current", "warned"), [(True, ["no_eos"]), (False, ["eos"])])
def test_another_eos_than_in_training_is_a_warning(tmp_path, capsys, current, warned):
    paths = {}
    for name, config in (("no_eos", "P3_INPUTS_EOS = False"), ("eos", "P3_INPUTS_EOS = True")):
        paths[name] = tmp_path / name
        (paths[name] / "checkpoint_1" / "record").mkdir(parents=True)
        (paths[name] / "config.gin").write_text(f"{config}\n")
    gin.clear_config()
    evaluation.warn_of_other_eos([*map(str, paths.values())])  # without gin files
    gin.parse_config(f"P3_INPUTS_EOS = {current}")
    seqio_tasks.warn_once.cache_clear()
    evaluation.warn_of_other_eos([*map(str, paths.values())])
    expected = [
        f"{paths[name]} was trained with P3_INPUTS_EOS={not current}, and P3_INPUTS_EOS is"
        f" {current}: pass --gin.P3_INPUTS_EOS={not current} for equal inputs"
        for name in warned
    ]
    assert capsys.readouterr().err.splitlines() == expected
    gin.clear_config()


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


def test_changed_settings_are_described():
    before = {"VOCAB_PATH": "'a.model'", "PACK": "True", "OLD": "1"}
    after = {"VOCAB_PATH": "'b.model'", "PACK": "True", "NEW": "2"}
    assert run_settings.describe_changes(before, after) == (
        "VOCAB_PATH 'a.model' -> 'b.model'; OLD 1 -> (not set); NEW (not set) -> 2"
    )
    assert run_settings.describe_changes(before, before) == ""
