"""gin/paper: the configuration of each documented command; gin/sweeps: the runs of each sweep."""

import json
import pathlib
import re
import shlex

import gin
import pytest
from p3_runs import VOCAB

from pemoe_jax import evaluate, train
from pemoe_jax.analysis.zero_shot import claims
from pemoe_jax.core import adapters, network, params
from pemoe_jax.data import seqio_tasks
from pemoe_jax.runtime import gin_flags, options
from pemoe_jax.tools import sweep, sweep_plan

ROOT = pathlib.Path(__file__).parents[1]
PAPER = pathlib.Path(gin_flags.GIN_DIR) / "paper"

# At XL, see test_gin.py for the arithmetic: (IA)³ 540,672, LoRA of rank 4 7,471,104. Routers:
# MoV 72·2·64 + 48·5120 = 254,976 an expert, MoLORA 72·4·2048 + 48·(2048 + 5120) = 933,888.
MOV = 540_672 + 254_976
MOLORA = 7_471_104 + 933_888
# With routers that read an embedding of 2048 at all 72·2 + 48 sites: 10·(540,672 + 192·2048).
SENTENCE = 9_338_880
SOFT = {"top_k": None, "balance_loss": 0.0, "reads": None}

# configs/t0.gin, scripts/t0_train.sh
FULL = {
    **{"BATCH_SIZE": 256, "TRAIN_STEPS": 10_000},
    **{"LEARNING_RATE": 1e-3, "CHECKPOINT_PERIOD": 1000},
}
# configs/ia3.gin, configs/lora.gin
RARE = {"CHECKPOINT_PERIOD": 50_000}

# file -> (method, experts, rank, trainable at 3B, routing that is not soft, macros not in SHARED)
TABLE: dict[str, tuple[str, int, int | None, int, dict, dict]] = {
    "full": ("full", 1, None, 2_849_757_184, {}, FULL),
    "ia3": ("ia3", 1, None, 540_672, {}, RARE),
    **{f"lora_{r}": ("lora", 1, r, 7_471_104 * r // 4, {}, RARE) for r in (4, 8, 16)},
    **{f"mov_{e}": ("mov", e, None, MOV * e, {}, {}) for e in (1, 2, 5, 10, 20, 30, 60)},
    **{f"molora_{e}": ("molora", e, 4, MOLORA * e, {}, {}) for e in (2, 5, 10, 15)},
    "mov_10_top_1": ("mov", 10, None, MOV * 10, {"top_k": 1}, {}),
    "mov_10_top_2": ("mov", 10, None, MOV * 10, {"top_k": 2}, {}),
    "mov_10_top_2_balanced": (
        *("mov", 10, None, MOV * 10),
        {"top_k": 2, "balance_loss": 1e-2},
        {},
    ),
    "mov_10_sentence": ("mov", 10, None, SENTENCE, {"reads": "sentence"}, {"PACK": False}),
    "mov_10_batch_256": ("mov", 10, None, MOV * 10, {}, {"BATCH_SIZE": 256}),
    "mov_10_batch_2048": ("mov", 10, None, MOV * 10, {}, {"BATCH_SIZE": 2048}),
    "mov_10_rate_1e-4": ("mov", 10, None, MOV * 10, {}, {"LEARNING_RATE": 1e-4}),
    "mov_10_rate_1e-3": ("mov", 10, None, MOV * 10, {}, {"LEARNING_RATE": 1e-3}),
    "mov_10_steps": ("mov", 10, None, MOV * 10, {}, {"KEEP_CHECKPOINTS": None}),
}
OTHER_FILES = {"settings", "tasks", "evaluate", "size_770m", "size_3b", "size_11b"}
# The settings of the paper's code (gin/paper/settings.gin names the repositories), by source file.
SETTINGS = {
    "scripts/*_train.sh": {
        "MIXTURE_OR_TASK_NAME": "t0_train",
        "BATCH_SIZE": 32,
        "PACK": True,
        "TRAIN_STEPS": 500_000,
        "LOSS_NORMALIZING_FACTOR": "AVERAGE_PER_SEQUENCE",
    },
    "scripts/*_train.sh, scripts/*_eval.sh": {
        "TASK_FEATURE_LENGTHS": {"inputs": 1024, "targets": 256}
    },
    "t0_data/tasks.py": {"P3_INPUTS_EOS": False},
    "configs/t5/models/t5_1_1_base.gin": {"Z_LOSS": 1e-4, "LABEL_SMOOTHING": 0.0},
    "configs/t5/architectures/t5_1_1_flaxformer.gin": {
        "DTYPE": "bfloat16",
        "network.T5Config.broadcast_encoder_dropout": True,
    },
    "t5x/configs/runs/finetune_no_eval.gin": {
        "DROPOUT_RATE": 0.1,
        "MICROBATCHES": 1,
        "EVAL_PERIOD": 0,
        "WARMUP_STEPS": 1000,
    },
    "configs/{ia3,lora,mov,molora}.gin": {
        "SCHEDULE": "constant",
        "LEARNING_RATE": 3e-4,
        "CHECKPOINT_PERIOD": 10_000,
        "KEEP_CHECKPOINTS": 60,
        "optim.adafactor.decay_rate": 0.8,
        "optim.adafactor.step_offset": -1_100_000,
    },
    "src/adafactor_custom.py": {"optim.adafactor.per_expert": False},
    "t5x/adafactor.py": {
        "optim.adafactor.clipping_threshold": 1.0,
        "optim.adafactor.multiply_by_parameter_scale": True,
        "optim.adafactor.min_dim_size_to_factor": 128,
        "optim.adafactor.weight_decay_rate": None,
    },
}
SHARED = {name: value for settings in SETTINGS.values() for name, value in settings.items()}


def header(file: pathlib.Path) -> dict[str, str]:
    """Returns the entries What, Command, Cost, Paper … of a file's header, each as one line."""
    entries: dict[str, str] = {}
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        opening = re.match(r"# (\w+): (.*)", line)
        if opening:
            name = opening[1]
            entries[name] = opening[2]
        else:
            entries[name] += f" {line[1:].strip()}"
    return entries


def load(command: str, *flags: str) -> None:
    """Loads the configuration of a header's command with more flags."""
    program, name, *arguments = shlex.split(command.replace(" \\ ", " "))
    assert program == "pemoe"
    rest, bindings = gin_flags.split_bindings([*arguments, *flags])
    known = {"train": train.FLAGS, "evaluate": evaluate.FLAGS}[name]
    gin_flags.load_config(known.parse_args(rest), bindings)


def macro(name: str):
    """Returns the value of a macro, or of a parameter such as optim.adafactor.decay_rate."""
    return gin.query_parameter(name if "." in name else f"{name}/macro.value")


def test_every_experiment_is_in_the_table():
    assert {file.stem for file in PAPER.glob("*")} == set(TABLE) | OTHER_FILES


@pytest.mark.parametrize("name", TABLE)
def test_experiment(name):
    method, experts, rank, trainable, routing, macros = TABLE[name]
    about = header(PAPER / f"{name}.gin")
    assert list(about)[:3] == ["What", "Command", "Cost"] and "Paper" in about
    load(about["Command"])
    assert f"{trainable:,} trainable parameters at 3B" in about["Cost"]
    assert macro("METHOD") == method and macro("MODEL_DIR") == f"runs/{name}"
    for setting, value in {**SHARED, **macros}.items():
        assert macro(setting) == value, setting
    assert macro("OPTIMIZER").selector.endswith("optim.adafactor")
    transformer = gin.get_configurable(network.Transformer)()
    config_ = transformer.config
    assert (config_.emb_dim, config_.num_heads, config_.mlp_dim) == (2048, 32, 5120)
    assert (config_.dropout_rate, config_.broadcast_encoder_dropout) == (0.1, True)
    described = adapters.describe(transformer.adapters)
    assert bool(described) == (method != "full")
    for site in described.values():
        assert site["num_experts"] == experts
        assert site.get("rank") == rank
        assert (site["router"] is not None) == method.startswith("mo")
        if site["router"]:
            settings = {key: site["router"][key] for key in SOFT}
            assert settings == {**SOFT, **routing}


@pytest.mark.parametrize("name", ["mov_30", "molora_2", "mov_10_sentence"])
def test_header_states_the_trainable_parameters(name):
    """One file for each formula; the others are multiples of it."""
    load(header(PAPER / f"{name}.gin")["Command"])
    transformer = gin.get_configurable(network.Transformer)()
    counted = params.count(network.param_shapes(transformer, params.is_adapter))
    assert counted == TABLE[name][3]


@pytest.mark.parametrize(("size", "width"), [("770m", 1024), ("11b", 4096)])
def test_another_size(size, width):
    load(header(PAPER / "mov_10.gin")["Command"], f"--gin_file=paper/size_{size}.gin")
    transformer = gin.get_configurable(network.Transformer)()
    assert transformer.config.emb_dim == width and transformer.config.dtype == "bfloat16"
    assert macro("BATCH_SIZE") == 32


def test_settings_name_their_sources():
    """Each setting stands below or beside its source; the gin files set nothing else."""
    found: dict[str, str] = {}
    for name in ("settings", "tasks", "size_3b"):
        source, block = "", ""
        for line in (PAPER / f"{name}.gin").read_text().splitlines():
            comment = re.fullmatch(r"# ([\w./{},*]+\.(?:gin|sh|py))\b.*", line)
            setting = re.match(r"( *)([\w.]+) = [^#]*(?:# (.*))?", line)
            if comment:
                source = comment[1]
            elif line.endswith(":"):
                block = line[:-1]
            elif setting:
                full_name = f"{block}.{setting[2]}" if setting[1] else setting[2]
                found[full_name] = f"{source} {setting[3] or ''}"
    assert found.keys() == SHARED.keys() | {"OPTIMIZER"}
    for source, settings in SETTINGS.items():
        for name in settings:
            assert name == "DTYPE" or source in found[name], name


@pytest.mark.parametrize("name", ["mov_10", "evaluate"])
def test_p3_is_read_without_eos_on_inputs(name, tmp_path):
    """The tasks that training and evaluation register; the base's dropout is that of T5Config."""
    task = "super_glue_rte_can_we_infer"
    (tmp_path / task).mkdir()
    row = {"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": ["b", "c"]}
    (tmp_path / task / "validation.jsonl").write_text(json.dumps(row))
    flags = [f"--gin.P3_DIR={tmp_path}", f"--gin.VOCAB_PATH={VOCAB}"]
    load(header(PAPER / f"{name}.gin")["Command"], *flags)
    gin.get_configurable(options.Data)().register()
    for name in (task, f"{task}_score_eval"):
        features = seqio_tasks.get_mixture_or_task(name).output_features
        assert (features["inputs"].add_eos, features["targets"].add_eos) == (False, True)


def test_evaluation():
    load(header(PAPER / "evaluate.gin")["Command"])
    settings = ("MIXTURE_OR_TASK_NAME", "BATCH_SIZE", "DTYPE", "TASK_FEATURE_LENGTHS")
    assert [*map(macro, settings)] == [
        *("t0_eval_score_eval", 32, "bfloat16", {"inputs": 1024, "targets": 256})
    ]


def test_figures_have_a_source():
    for name in TABLE:
        text = header(PAPER / f"{name}.gin")["Paper"]
        figures = re.findall(r"\d+\.\d+", re.sub(r"arXiv \d+\.\d+", "", text))
        sourced = "pemoe_jax/analysis/published_numbers.py" in text or "openreview.net" in text
        assert sourced or not figures, name


@pytest.mark.parametrize(
    ("name", "experiments", "seeds"),
    [
        ("claims", 29, 5),
        ("paper_experts", 11, 1),
        ("paper_routing", 4, 1),
        ("paper_sensitivity", 5, 1),
        ("quickstart_flan", 9, 3),
        ("quickstart_flan_settings", 6, 3),
        ("paper_flan_routing", 5, 1),
        ("paper_flan_experts", 6, 1),
        ("paper_flan_losses", 8, 1),
        ("paper_flan_freezing", 7, 1),
        ("paper_flan_sensitivity", 8, 1),
        ("paper_flan_tasks", 8, 1),
        ("paper_flan_settings", 6, 1),
    ],
)
def test_sweeps(name, experiments, seeds, tmp_path):
    more = [] if name.startswith(("quickstart", "claims")) else ["--gin.INITIAL_CHECKPOINT_PATH=x"]
    arguments = sweep_plan.expand_argument_files(
        [f"@sweeps/{name}.txt", f"--output={tmp_path}", *more]
    )
    rest, bindings = gin_flags.split_bindings(arguments)
    args = sweep.FLAGS.parse_args(rest)
    assert len(args.seeds.split(",")) == seeds
    args.seeds = "0"  # the other seeds repeat the plan
    base, *planned = sweep_plan.plan_runs(args, bindings)
    assert base.folder.name == "base" and len(planned) == experiments
    text = (PAPER.parent / "sweeps" / f"{name}.txt").read_text()
    assert f"@sweeps/{name}.txt" in text
    names = {run.folder.name.rpartition("-seed")[0] for run in planned}
    if name.startswith("claims"):
        assert f"then {1 + experiments * seeds}," in text
        for claim in claims.load_claims(PAPER.parent / "sweeps" / f"{name}.json"):
            assert {*claim.plus, *claim.minus} <= names, claim.id
            source = (ROOT / claim.source).read_text()
            # 60.06, but neither the 10 of MoV-10 nor the 3 of 3B
            for figure in re.findall(r"(?<![-\w.])\d+\.\d+|\d,\d+|\d+e-\d", claim.paper):
                assert figure in source, (claim.id, figure)


def test_every_sweep_is_tested():
    (marks,) = test_sweeps.pytestmark
    names = {name for name, *_ in marks.args[1]}
    assert {file.stem for file in (PAPER.parent / "sweeps").glob("*")} == names
