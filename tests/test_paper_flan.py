"""gin/paper_flan: the configuration of each documented command, and two steps of a tiny model."""

import pathlib
import re

import gin
import pytest
from test_paper import header, load, macro
from test_train import data_flags
from test_train import folder as folder  # a fixture

from pemoe_jax import train
from pemoe_jax.checkpoints import runs
from pemoe_jax.core import freezing, network, params, sparse
from pemoe_jax.runtime import gin_flags

PAPER = pathlib.Path(gin_flags.GIN_DIR) / "paper_flan"
BALANCED = {"balance_loss": 1e-2}
PAIR = BALANCED | {"combine": "normalized", "top_k": 2}
EC = PAIR | {"routing": "experts", "capacity_factor": 2.0}
ST = PAIR | {"router_z_loss": 1e-3, "extra_mlp": True}
GSHARD = PAIR | {"second_expert": "random", "priority": "probability"}
SHARED = {
    **{"MIXTURE_OR_TASK_NAME": "t0_train", "BATCH_SIZE": 32, "TRAIN_STEPS": 10_000},
    **{"LEARNING_RATE": 1e-3, "SCHEDULE": "constant", "DROPOUT_RATE": 0.1, "DTYPE": "bfloat16"},
    **{"TASK_FRACTION": 1.0, "FREEZE": None},
}
# file -> (settings of its sparse layers, macros that are not those of SHARED)
TABLE: dict[str, tuple[dict | None, dict]] = {
    "dense": (None, {}),
    "switch": (BALANCED | {"combine": "straight"}, {}),
    "gshard": (GSHARD, {}),
    "ec": (EC, {}),
    "st": (ST, {}),
    "experts": (EC | {"num_experts": 16}, {}),
    "losses_ec": (EC | {"balance_loss": 0.0}, {}),
    "losses_st": (ST | {"balance_loss": 0.0, "router_z_loss": 0.0}, {}),
    "freezing": (EC, {"FREEZE": "router"}),
    "batch_size": (EC, {"BATCH_SIZE": 256}),
    "learning_rate": (EC, {"LEARNING_RATE": 1e-4}),
    "expert_dropout": (EC | {"expert_dropout_rate": 0.4}, {}),
    "task_fraction": (EC, {"TASK_FRACTION": 0.25}),
    "one_task": (
        EC,
        {"MIXTURE_OR_TASK_NAME": "super_glue_rte_GPT_3_style", "TRAIN_STEPS": 1000},
    ),
}
OTHER_FILES = {"settings", "evaluate", "quickstart_one_task"}
TINY = {
    **{"emb_dim": 16, "num_heads": 2, "head_dim": 6, "mlp_dim": 20},
    **{"num_encoder_layers": 1, "num_decoder_layers": 1, "dtype": "float32"},
}


def test_every_file_is_in_the_table():
    assert {file.stem for file in PAPER.glob("*")} == set(TABLE) | OTHER_FILES


@pytest.mark.parametrize("name", TABLE)
def test_experiment(name):
    layers, macros = TABLE[name]
    about = header(PAPER / f"{name}.gin")
    entries = ["Question", "Paper", "Command", "Sweep", "Cost"]
    assert [*about] == entries and "?" in about["Question"]
    sweep = PAPER.parent.parent / about["Sweep"]
    assert f"paper_flan/{name}.gin" in sweep.read_text()
    # Findings are those of the abstract: no figure is quoted.
    assert not re.search(r"\d", about["Paper"])
    load(about["Command"])
    assert macro("MODEL_DIR") == f"runs/{name}"
    for setting, value in (SHARED | macros).items():
        assert macro(setting) == value, setting
    assert macro("OPTIMIZER").selector.endswith("optim.adafactor")
    transformer = gin.get_configurable(network.Transformer)()
    assert transformer.sparse == (None if layers is None else sparse.Sparse(**layers))
    config = transformer.config
    assert (config.emb_dim, config.mlp_dim, config.num_encoder_layers) == (768, 2048, 12)


# One file for each number of parameters.
@pytest.mark.parametrize("name", ["dense", "ec", "st", "experts"])
def test_header_states_the_parameters(name):
    about = header(PAPER / f"{name}.gin")
    load(about["Command"])
    shapes = network.param_shapes(gin.get_configurable(network.Transformer)())
    assert about["Cost"].startswith(f"{params.count(shapes):,} parameters")


def test_header_states_what_trains():
    about = header(PAPER / "freezing.gin")
    load(about["Command"])
    shapes = params.flatten(network.param_shapes(gin.get_configurable(network.Transformer)()))
    for freeze in freezing.FREEZE:
        patterns = freezing.trainable_patterns([".*"], freeze)
        paths = params.trainable_paths(shapes, patterns)
        count = params.count({path: shapes[path] for path in paths})
        stated = f"{count:,} train" if freeze == "router" else f"{freeze}: {count:,}"
        assert stated in about["Cost"]


@pytest.mark.parametrize(
    "name",
    [name if name == "freezing" else pytest.param(name, marks=pytest.mark.slow) for name in TABLE],
)
def test_two_steps_of_a_tiny_model(folder, tmp_path, name):
    _, *flags = re.split(r"[ \\]+", header(PAPER / f"{name}.gin")["Command"])
    flags = [flag for flag in flags[1:] if "P3_DIR" not in flag]
    task = "check_1" if name == "one_task" else "jsonl_train"
    settings = {
        **{"MODEL_DIR": tmp_path, "INITIAL_CHECKPOINT_PATH": None, "TRAIN_STEPS": 2},
        **{"VOCAB_SIZE": 256, "SPARSE_STEP": 1, "LOG_PERIOD": 2, "MIXTURE_OR_TASK_NAME": task},
    }
    settings["ROUTER_METRICS"] = None  # a smaller program
    if name not in ("dense", "experts"):
        settings["NUM_EXPERTS"] = 4
    if name == "task_fraction":
        settings["TASK_FRACTION"] = 0.4  # of three tasks
    data = [flag for flag in data_flags(folder) if "BATCH_SIZE" not in flag]
    batch = [] if name == "batch_size" else ["--gin.BATCH_SIZE=8"]
    tiny = [f"--gin.network.T5Config.{field}={value}" for field, value in TINY.items()]
    changes = [f"--gin.{key}={value}" for key, value in settings.items()]
    assert train.main([*flags, *data, *batch, *tiny, *changes]) == 0
    assert runs.saved_steps(tmp_path) == [2]
