"""The gin files of the package: sizes, methods, and flags that override them."""

import os
import pathlib
import re
import shlex

import gin
import pytest

from pemoe_jax import evaluate, tasks, train
from pemoe_jax.core import freezing, network, params, sparse
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

GIN = pathlib.Path(gin_flags.GIN_DIR)
RUN = ["--gin.MODEL_DIR=x", "--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.TRAIN_STEPS=1"]


EXPERT_METHODS = "methods/flan_*.gin, methods/molora.gin and methods/mov.gin"
DATA_MACROS = ("jsonl_dir", "vocab_path", "eval_tasks")


def configure(*flags: str) -> None:
    rest, bindings = gin_flags.split_bindings([*flags, *RUN])
    gin_flags.load_config(train.FLAGS.parse_args(rest), bindings)


def configured_model(size: str, method: str, *flags: str) -> network.Transformer:
    files = (f"models/{size}.gin", f"methods/{method}.gin", "runs/finetune.gin")
    configure(*(f"--gin_file={file}" for file in files), *flags)
    return gin.get_configurable(network.Transformer)()


def count(model: network.Transformer, keep=lambda _: True) -> int:
    return params.count(network.param_shapes(model, keep))


# The published sizes. Of one model, with D, H·K, F, V and N layers a side: attention 4·D·H·K, three
# of them a pair of layers; MLP 3·D·F, two; norms 2·D and 3·D and one D a stack; 2·V·D; 2·32·H.
# XL: D = HK = 2048, F 5120, N 24: 24·(3·4·2048² + 2·3·2048·5120 + 5·2048) + 2·2048
# + 2·32128·2048 + 64·32 = 2,849,757,184.
@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("t5_1_1_small", 76_961_152),
        ("t5_1_1_base", 247_577_856),
        ("t5_1_1_large", 783_150_080),
        ("t5_1_1_xl", 2_849_757_184),
        ("t5_1_1_xxl", 11_135_332_352),
    ],
)
def test_sizes_equal_the_published_ones(size, parameters):
    assert count(configured_model(size, "full")) == parameters


# UL2: D = H·K = 4096, F 16384, N 32: 32·(3·4·4096² + 2·3·4096·16384 + 5·4096) + 2·4096
# + 2·32128·4096 + 64·16 = 19,591,209,984.
# T5 1.0 has no matrix of logits, and an MLP of 2·D·F without a gate. Half the layers of a Switch,
# and all of C, have E of them and a router D·E.
# Switch-Base-8: 36·4·768² + (12 + 8·12)·2·768·3072 + 12·768·8 + 12·5·768 + 2·768
# + 32128·768 + 64·12 = 619,339,008.
@pytest.mark.parametrize(
    ("size", "method", "num_experts", "parameters"),
    [
        ("t5_1_0", "full", 0, 60_506_624),
        ("mt5", "full", 0, 300_176_768),
        ("byt5", "full", 0, 299_637_760),
        ("ul2", "full", 0, 19_591_209_984),
        ("switch_base", "flan_switch", 8, 619_339_008),
        ("switch_large", "flan_switch", 128, 26_309_291_008),
        ("switch_xxl", "flan_switch", 128, 394_675_073_024),
        ("switch_c", "flan_switch", 2048, 1_571_327_875_360),
    ],
)
def test_sizes_of_other_families(size, method, num_experts, parameters):
    flags = [f"--gin.NUM_EXPERTS={num_experts}"] if num_experts else []
    assert count(configured_model(size, method, *flags)) == parameters


# At XL, 72 attentions and 48 MLPs:
# (IA)³: 72·2·2048 + 48·5120.
# MoV-10: 72·2·(10·2048 + 64·10) + 48·(10·5120 + 5120·10).
# LoRA: 72·4·4·(2048 + 2048) + 48·2·4·(2048 + 5120).
# MoLORA-10: ten times LoRA, and routers 72·4·2048·10 + 48·(2048 + 5120)·10.
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ia3", 540_672),
        ("mov", 7_956_480),
        ("lora", 7_471_104),
        ("molora", 84_049_920),
    ],
)
def test_adapters_at_xl(method, parameters):
    assert count(configured_model("t5_1_1_xl", method), params.is_adapter) == parameters


def test_flags_reach_the_model():
    model = configured_model(
        "t5_1_1_tiny",
        "molora",
        "--gin.NUM_EXPERTS=3",
        "--gin.RANK=2",
        "--gin.DTYPE=bfloat16",
        "--gin.adapters.Adapters.wi_1=@adapters.LoRAExperts",
    )
    shapes = params.flatten(network.param_shapes(model))
    assert shapes["encoder/layers_0/mlp/wi_1_adapter/lora_a"].shape == (64, 3, 2)
    assert model.config.dtype == "bfloat16"


# What differs from the method before it: docs/flan_moe.md has the public settings.
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("switch", {"combine": "straight", "balance_loss": 1e-2}),
        (
            "gshard",
            {"combine": "normalized", "balance_loss": 1e-2, "top_k": 2}
            | {"second_expert": "random", "priority": "probability"},
        ),
        (
            "st",
            {"combine": "normalized", "balance_loss": 1e-2, "top_k": 2}
            | {"router_z_loss": 1e-3, "extra_mlp": True},
        ),
        (
            "ec",
            {"combine": "normalized", "balance_loss": 1e-2, "top_k": 2}
            | {"routing": "experts", "capacity_factor": 2.0},
        ),
    ],
)
def test_methods_of_whole_experts(method, settings):
    """All others are the defaults of `Sparse`: E 8, every second layer, factor 1.25, by row."""
    model = configured_model("t5_1_1_tiny", f"flan_{method}")
    assert model.sparse == sparse.Sparse(**settings)
    assert gin.query_parameter("METHOD/macro.value") == f"flan_{method}"
    model = configured_model(
        *("t5_1_1_tiny", f"flan_{method}", "--gin.NUM_EXPERTS=4", "--gin.CAPACITY=6"),
        *("--gin.GROUP=64", "--gin.JITTER=0.01", "--gin.COUNT_PADDING=True", "--gin.FREEZE=moe"),
    )
    changed = {"num_experts": 4, "capacity": 6, "group": 64, "jitter": 0.01, "count_padding": True}
    assert model.sparse == sparse.Sparse(**settings | changed)
    patterns = gin.get_configurable(freezing.trainable_patterns)()
    assert patterns == [".*", "!.*/mlp/(?:router|expert)/.*"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin.NUM_EXPERTS=1"], r"NUM_EXPERTS must be an integer in \[2, 16777216\], got 1"),
        (["--gin.NUM_EXPERTS=2.5"], "NUM_EXPERTS must be an integer, got 2.5"),
        (["--gin.TOP_K=0"], "TOP_K must be a positive integer, got 0"),
        (["--gin.TOP_K=9"], r"TOP_K must be at most NUM_EXPERTS \(8\), got 9"),
        (["--gin.SPARSE_STEP=3"], "SPARSE_STEP must divide the 2 layers of the encoder, got 3"),
        (["--gin.CAPACITY_FACTOR=0"], "CAPACITY_FACTOR must be a positive number, got 0"),
        (["--gin.CAPACITY_FACTOR=-1e0"], "CAPACITY_FACTOR must be a positive number, got -1"),
        (["--gin.CAPACITY_FACTOR=1e999"], "CAPACITY_FACTOR must be a positive number, got inf"),
        (["--gin.CAPACITY_FACTOR=nan"], "CAPACITY_FACTOR must be a number or None, got 'nan'"),
        (["--gin.EVAL_CAPACITY_FACTOR=-2"], "EVAL_CAPACITY_FACTOR must be a positive number"),
        (["--gin.CAPACITY=0"], "CAPACITY must be a positive integer, got 0"),
        (["--gin.GROUP=rows"], "GROUP must be 'row' or a positive integer, got 'rows'"),
        (["--gin.GROUP=0"], "GROUP must be a positive integer, got 0"),
        (["--gin.ROUTING=expert"], "ROUTING must be one of "),
        (["--gin.PRIORITY=none"], "PRIORITY must be one of "),
        (["--gin.COMBINE=normalized"], "COMBINE='normalized' with TOP_K=1 gives routers no"),
        (["--gin.JITTER=1"], r"JITTER must be a number in \[0, 1\), got 1"),
        (["--gin.COUNT_PADDING=1"], "COUNT_PADDING must be True or False, got 1"),
        (["--gin.UPCYCLE_NOISE=-1"], "UPCYCLE_NOISE must be a number of at least 0, got -1"),
        (["--gin.FREEZE=routers"], "FREEZE must be one of None, 'router', 'experts', 'moe', "),
        (
            ["--gin.FREEZE=moe", "--gin.TRAINABLE=['.*/mlp/router/.*']"],
            "TRAINABLE and FREEZE leave nothing to train, got ",
        ),
    ],
)
def test_wrong_settings_of_whole_experts(flags, message):
    with pytest.raises(InputError, match=message):
        model = configured_model("t5_1_1_tiny", "flan_switch", *flags)
        patterns = gin.get_configurable(freezing.trainable_patterns)()
        params.trainable_paths(params.flatten(network.param_shapes(model)), patterns)


@pytest.mark.parametrize("method", ["flan_switch", "mov", "full"])
def test_commands_that_open_checkpoints_take_files_of_methods(method):
    """Their model is that of the checkpoint."""
    flags = [f"--gin_file=methods/{method}.gin", "--gin_file=runs/evaluate.gin"]
    bindings = ["CHECKPOINT_PATH = 'a'", "EVAL_OUTPUT_DIR = 'b'"]
    gin_flags.load_config(evaluate.FLAGS.parse_args(flags), bindings)
    with pytest.raises(InputError, match="SPARSE_STEP belongs to a file of models/"):
        gin_flags.load_config(evaluate.FLAGS.parse_args(flags), [*bindings, "SPARSE_STEP = 4"])


@pytest.mark.parametrize(
    ("method", "routing", "message"),
    [
        (
            "flan_ec",
            "top_2_balanced",
            "top_k has no effect: .* sparse layers have TOP_K and BALANCE_LOSS",
        ),
        ("flan_st", "jitter", "jitter_noise has no effect: .* sparse layers have JITTER"),
        ("flan_switch", "sentence", "reads has no effect: .* sparse layers have no such setting"),
        (
            "lora",
            "z_loss",
            "z_loss has no effect: .* lora has a router, which files of routing/ configure$",
        ),
    ],
)
def test_files_for_routers_of_adapters(method, routing, message):
    files = ("models/t5_1_1_tiny.gin", f"methods/{method}.gin", f"routing/{routing}.gin")
    with pytest.raises(InputError, match=message):
        configure(*(f"--gin_file={file}" for file in (*files, "runs/finetune.gin")))


@pytest.mark.parametrize("part", [*freezing.FREEZE])
def test_freezing_needs_a_sparse_model(part):
    model = configured_model("t5_1_1_tiny", "full", f"--gin.FREEZE={part}")
    patterns = gin.get_configurable(freezing.trainable_patterns)()
    with pytest.raises(InputError, match=f"FREEZE must be None unless the model .* got '{part}'$"):
        params.trainable_paths(params.flatten(network.param_shapes(model)), patterns)


@pytest.mark.parametrize(
    ("method", "rate"),
    [("full", 3e-4), ("ia3", 3e-2), ("mov", 3e-2), ("lora", 1e-3), ("molora", 1e-3)],
)
def test_short_runs_by_default(method, rate):
    """A method's file has its rate, a run's file AdamW with a warm-up; T5X's runs include it."""
    configured_model("t5_1_1_tiny", method)
    assert str(gin.query_parameter("train.train.optimizer")) == "%OPTIMIZER"
    expected = {"OPTIMIZER": "@optim.adamw", "SCHEDULE": "constant * linear_warmup"}
    expected |= {"WARMUP_STEPS": 20, "LEARNING_RATE": rate}
    actual = {name: gin.query_parameter(f"{name}/macro.value") for name in expected}
    assert actual | {"OPTIMIZER": str(actual["OPTIMIZER"])} == expected
    t5x = (GIN / "runs_t5x/finetune.gin").read_text()
    assert "\ninclude 'runs/optimizer.gin'\n" in t5x and "OPTIMIZER = " not in t5x


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/tmp/a b", "'/tmp/a b'"),
        ("12", "12"),
        ("None", "None"),
        ("'quoted'", "'quoted'"),
        ("['a', 'b']", "['a', 'b']"),
        ("@optim.adamw", "@optim.adamw"),
        ("%MACRO", "%MACRO"),
        ("1e-3", "1e-3"),
    ],
)
def test_values_of_flags(value, expected):
    assert gin_flags.split_bindings([f"--gin.A={value}", "--other"]) == (
        ["--other"],
        [f"A = {expected}"],
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin_file=models/no_such.gin"], "no_such.gin"),
        (["--gin_file=runs/finetune.gin", "--gin.TRAIN_STEP=1"], "close: TRAIN_STEPS"),
        (["--gin_file=runs/finetune.gin", "--gin.train.train.speed=1"], "'speed'"),
        (["--gin_file=runs/finetune.gin", "--gin.NUM_EXPERT=1"], "NUM_EXPERT: no gin file has"),
        ([], "no gin file"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(InputError, match=message):
        configure(*flags)


@pytest.mark.parametrize(
    ("gin_file", "flag", "owners"),
    [
        ("methods/lora.gin", "--gin.NUM_EXPERTS=5", f"{EXPERT_METHODS}, got --gin_file=methods/l"),
        ("methods/lora.gin", "--gin_bindings=NUM_EXPERTS = 5", EXPERT_METHODS),
        ("paper/ia3.gin", "--gin.NUM_EXPERTS=5", EXPERT_METHODS),
        ("methods/mov.gin", "--gin.CAPACITY=5", "methods/flan_*.gin, got"),
        ("methods/mov.gin", "--gin.RANK=8", "methods/lora.gin and methods/molora.gin"),
        ("methods/full.gin", "--gin.ALPHA=8", "methods/lora.gin and methods/molora.gin"),
        ("methods/molora.gin", "--gin.FUSED_MOV=True", "methods/mov.gin"),
        ("runs/finetune.gin", "--gin.ROUTING_PICTURE=True", "runs/evaluate.gin"),
        ("runs/finetune.gin", "--gin.VOCAB_SIZE=64", "a file of models/, runs/"),
        ("models/quickstart.gin", "--gin.BATCH_SIZE=8", "a file of runs/"),
        ("runs/finetune.gin", "--gin.DECODE_FN=None", "a file of runs_t5x/"),
        ("runs/evaluate.gin", "--gin.SEED=1", "runs/finetune.gin, runs/pretrain.gin and"),
    ],
)
def test_macros_of_another_method_or_run_are_refused(gin_file, flag, owners):
    rest, bindings = gin_flags.split_bindings([f"--gin_file={gin_file}", flag])
    name = flag.replace("gin_bindings=", "gin.")[6:].partition("=")[0].strip()
    with pytest.raises(InputError) as error:
        gin_flags.load_config(train.FLAGS.parse_args(rest), bindings)
    assert str(error.value).startswith(f"{name} belongs to {owners}")
    assert str(error.value).endswith(f", got --gin_file={gin_file}")


@pytest.mark.parametrize(
    ("flag", "function"),
    [
        ("--gin.optim.adafactor.decay_rate=0.9", "optim.adafactor"),
        ("--gin.adapters.LoRAExperts.rank=8", "adapters.LoRAExperts"),
        ("--gin_bindings=options.Models.dtype = 'bfloat16'", "options.Models"),
        ("--gin.evaluate.evaluate.routing_picture=True", "evaluate.evaluate"),
    ],
)
def test_parameters_that_nothing_reads_are_refused(flag, function):
    files = [f"--gin_file={file}" for file in ("methods/mov.gin", "runs/finetune.gin")]
    with pytest.raises(InputError, match=f"has no effect: nothing in this run uses {function} "):
        configure(*files, flag)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gin.optim.adamw.b1=0.8", "--gin.train.train.seed=4", "--gin.routing.Router.top_k=1"],
        ["--gin.OPTIMIZER=@optim.adafactor", "--gin.optim.adafactor.decay_rate=0.9"],
    ],
)
def test_parameters_of_functions_of_the_run_are_kept(flags):
    configure("--gin_file=methods/mov.gin", "--gin_file=runs/finetune.gin", *flags)
    for flag in flags:
        name, _, value = flag.removeprefix("--gin.").partition("=")
        if "." in name:
            assert str(gin.query_parameter(name)) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin.OPTIMIZER=@optim.adamw()"], "OPTIMIZER must be a function or class (@… without "),
        (["--gin.OPTIMIZER=@network.T5Config"], "OPTIMIZER must be a function or class "),
        (["--gin.OPTIMIZER=None"], "OPTIMIZER must be a function or class "),
        (
            ["--gin_file=own.gin"],
            "OPTIMIZER must be a function of (schedule, param_axes), such as ",
        ),
        (["--gin.MODEL=@network.Transformer"], "MODEL must be @network.Transformer() "),
        (["--gin.LEARNING_RATE=None"], "LEARNING_RATE is not set: "),
    ],
)
def test_references_of_another_kind(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imports = "from __gin__ import dynamic_registration\nfrom os import path\n"
    (tmp_path / "own.gin").write_text(f"{imports}OPTIMIZER = @path.exists\n")  # no annotations
    files = ("models/t5_1_1_tiny.gin", "methods/mov.gin", "runs/finetune.gin")
    run = [*(f"--gin_file={file}" for file in files), *RUN, f"--gin.MODEL_DIR={tmp_path / 'run'}"]
    assert train.main([*run, *flags]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("module", "run"), [(train, "finetune"), (evaluate, "evaluate")])
def test_a_run_file_is_missing(module, run, capsys):
    assert module.main(["--gin_file=models/t5_1_1_tiny.gin"]) == 1
    assert f"pass a run file, e.g. --gin_file=runs/{run}.gin" in capsys.readouterr().err


def test_the_readmes_commands_on_own_data_run_in_a_clone(monkeypatch):
    """They name shipped files alone; the model has the dimensions of the shipped base."""
    root = pathlib.Path(__file__).parent.parent
    monkeypatch.chdir(root)
    section = (root / "README.md").read_text().split("## Your own data")[1]
    block = next(part for part in section.split("```") if "pemoe train" in part)
    commands = block.replace("\\\n", " ").strip().splitlines()
    assert [command.split()[1] for command in commands] == ["train", "evaluate"]
    for command, flags in zip(commands, (train.FLAGS, evaluate.FLAGS), strict=True):
        rest, bindings = gin_flags.split_bindings(shlex.split(command)[2:])
        gin_flags.load_config(flags.parse_args(rest), bindings)
        paths = re.findall(r"(?:docs|tasks)/\S+", command)
        assert len(paths) >= 2 and all(map(os.path.exists, paths))
        task_roles = tasks.register(
            **{key: gin.query_parameter(f"{key.upper()}/macro.value") for key in DATA_MACROS}
        )
        assert task_roles.held_out == ["reviews"] and len(task_roles.train_tasks) == 4
    sizes = [path.stat().st_size for path in (root / "docs/my_prompts").glob("*/*")]
    assert len(sizes) == 12 and sum(sizes) < 100_000


def test_lines_of_gin_may_define_macros():
    flags = ["--gin_file=runs/finetune.gin", "--gin_bindings=MINE = 7", "--gin.SEED=%MINE"]
    configure(*flags)
    assert gin.query_parameter("MINE/macro.value") == 7


def test_folders_of_the_working_folder_do_not_hide_gin_files(tmp_path, monkeypatch):
    """`python -m` puts the working folder on Python's path, where gin would search packages."""
    for folder in ("runs", "methods"):
        (tmp_path / folder).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    configure("--gin_file=methods/mov.gin", "--gin_file=runs/finetune.gin")
    assert gin.query_parameter("METHOD/macro.value") == "mov"


def test_every_file_starts_with_a_comment_and_none_is_python():
    files = sorted(GIN.rglob("*.gin"))
    assert len(files) > 15
    for file in files:
        assert file.read_text().startswith("# "), file
    assert not list(GIN.rglob("*.py"))


@pytest.mark.parametrize("flags", [[], ["--gin.VOCAB_PATH=/given/spiece.model"]])
def test_vocabulary_macro(monkeypatch, flags):
    """VOCAB_PATH defaults to the environment variable; a flag overrides it."""
    monkeypatch.setenv("PEMOE_VOCAB_PATH", "/environment/spiece.model")
    configure("--gin_file=runs/finetune.gin", *flags)
    path = gin.query_parameter("tasks.register.vocab_path")
    value = gin.query_parameter("VOCAB_PATH/macro.value")
    assert str(path) == "%VOCAB_PATH"
    assert str(value) == (flags[0].partition("=")[2] if flags else "@tasks.default_vocab_path()")
