"""`pemoe sweep`: experiments, seeds and settings, and the mistakes in them."""

import re

import pytest
from sweep_flags import FLAGS, TINY

from pemoe_jax.runtime import gin_flags
from pemoe_jax.tools import sweep, sweep_plan


def plan(*flags: str) -> list[sweep_plan.Run]:
    rest, bindings = gin_flags.split_bindings(sweep_plan.expand_argument_files(flags))
    return sweep_plan.plan_runs(sweep.FLAGS.parse_args(rest), bindings)


def test_plan_is_experiments_times_seeds_and_their_bases():
    runs = plan("methods/mov.gin", "methods/ia3.gin", *FLAGS, "--output=out", "--seeds=0,7")
    assert [str(run.folder) for run in runs] == [
        *("out/base", "out/mov-seed0", "out/mov-seed7", "out/ia3-seed0", "out/ia3-seed7")
    ]
    base, first, *_ = runs
    assert base.train_flags == [] and [name for name, _ in base.commands()] == ["evaluate"]
    assert "--gin.CHECKPOINT_PATH=base.safetensors" in base.evaluate_flags
    assert "--gin.CHECKPOINT_PATH=out/mov-seed0" in first.evaluate_flags
    assert {"--gin.SEED=0", "--gin.MODEL_DIR=out/mov-seed0"} <= set(first.train_flags)
    assert first.train_settings["SEED"] == "0" and first.train_settings["TRAIN_STEPS"] == "9"
    assert plan("methods/mov.gin", *FLAGS, "--output=out", "--no_base")[0].train_flags


def test_order_of_files_and_settings():
    """Files of an experiment come before --gin_file; its settings override all others."""
    experiment = "methods/mov.gin+routing/top_2.gin+NUM_EXPERTS=3+LEARNING_RATE=1e+3"
    (_, run) = plan(experiment, *FLAGS, "--output=out", "--gin.NUM_EXPERTS=5")
    assert run.folder.name == "mov_top_2_NUM_EXPERTS=3_LEARNING_RATE=1e_3-seed0"
    files = [flag.removeprefix("--gin_file=") for flag in run.train_flags if "gin_file" in flag]
    assert files == ["methods/mov.gin", "routing/top_2.gin", TINY[0][11:], TINY[1][11:]]
    assert (
        run.train_settings["NUM_EXPERTS"] == "3" and run.train_settings["LEARNING_RATE"] == "1000.0"
    )
    assert run.train_settings["routing.Router.top_k"] == "2"


def test_experiments_that_start_from_others():
    tuned = "methods/mov.gin+NUM_EXPERTS=3"
    experiments = ("methods/mov.gin", tuned, f"{tuned}+FROM=mov", "methods/ia3.gin+FROM=mov")
    base, *runs = plan(*experiments, *FLAGS, "--output=out", "--seeds=0,7")
    assert base.folder.name == "base"
    assert [run.folder.name for run in runs[1::2]] == [
        *("mov-seed7", "mov_NUM_EXPERTS=3-seed7", "mov_NUM_EXPERTS=3_FROM=mov-seed7"),
        "ia3_FROM=mov-seed7",
    ]
    assert [run.train_flags[-1] for run in runs[5::2]] == [
        "--gin.INITIAL_CHECKPOINT_PATH=out/mov-seed7"
    ] * 2
    assert "--gin.INITIAL_CHECKPOINT_PATH=base.safetensors" in runs[3].train_flags
    settings = runs[5].train_settings
    initial = settings["INITIAL_CHECKPOINT_PATH"]
    assert settings == {**runs[3].train_settings, "INITIAL_CHECKPOINT_PATH": initial}
    assert initial.startswith("the run of mov with settings ")
    # A run that started from a run with other settings is another one, as is one further behind.
    *_, other = plan(*experiments, *FLAGS, "--gin.BATCH_SIZE=3", "--output=out")
    assert initial != other.train_settings["INITIAL_CHECKPOINT_PATH"]
    assert [run.initial for run in runs[1::2]] == [None, None, runs[1].folder, runs[1].folder]
    # The same experiment without FROM, if the sweep has it.
    assert runs[5].direct == runs[3].folder and runs[3].direct is runs[7].direct is None


def test_values_that_are_chosen():
    """Names do not have the value; another experiment can take it."""
    experiments = ["methods/mov.gin+LEARNING_RATE=best(1e-2, 3e-2)"]
    experiments += ["methods/mov.gin+NUM_EXPERTS=3+LEARNING_RATE=best_of(mov)"]
    flags = [*experiments, *FLAGS, "--output=out", "--seeds=4,5"]
    _, *runs = plan(*flags)
    assert [run.folder.name for run in runs[::2]] == ["mov-seed4", "mov_NUM_EXPERTS=3-seed4"]
    rest, bindings = gin_flags.split_bindings(flags)
    args = sweep.FLAGS.parse_args(rest)
    runs = sweep_plan.plan_runs(args, bindings, {"mov": "3e-2"})
    assert {run.train_settings["LEARNING_RATE"] for run in runs[1:]} == {"0.03"}
    (((name, choice), by_value),) = sweep_plan.plan_trials(args, bindings).items()
    assert (name, choice.setting, list(by_value)) == ("mov", "LEARNING_RATE", ["1e-2", "3e-2"])
    trial = by_value["3e-2"]
    assert str(trial.folder) == "out/choices/mov_LEARNING_RATE=3e-2-seed4"
    assert trial.train_settings["LEARNING_RATE"] == "0.03"
    assert trial.evaluate_settings["MIXTURE_OR_TASK_NAME"] == "'jsonl_train_score_eval'"
    assert runs[1].evaluate_settings["MIXTURE_OR_TASK_NAME"] == "'jsonl_score_eval'"


def test_names_of_experiments():
    """FROM and best_of() take them, and the same experiment without FROM is found."""
    tuned = "methods/mov.gin+NUM_EXPERTS=3+RANK=best_of(five)"
    experiments = ["methods/lora.gin+RANK=best(4,5)+NAME=five"]
    experiments += [tuned.replace("mov.gin", "molora.gin") + "+NAME=direct"]
    experiments += [tuned.replace("mov.gin", "molora.gin") + "+FROM=five+NAME=continued"]
    flags = [*experiments, *FLAGS, "--output=out", "--seeds=0"]
    _, five, direct, continued = plan(*flags)
    names = [run.folder.name for run in (five, direct, continued)]
    assert names == ["five-seed0", "direct-seed0", "continued-seed0"]
    assert (continued.initial, continued.direct) == (five.folder, direct.folder)
    rest, bindings = gin_flags.split_bindings(flags)
    trials = sweep_plan.plan_trials(sweep.FLAGS.parse_args(rest), bindings)
    (((name, _), by_value),) = trials.items()
    assert name == "five" and str(by_value["5"].folder) == "out/choices/lora_RANK=5-seed0"


def test_seeds_of_an_experiment():
    experiments = ("methods/mov.gin", "methods/ia3.gin+SEEDS=1,8")
    _, *runs = plan(*experiments, *FLAGS, "--output=out", "--seeds=0,1,2")
    assert [run.folder.name for run in runs] == [
        *("mov-seed0", "mov-seed1", "mov-seed2", "ia3-seed1", "ia3-seed8")
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe", b'methods/mov.gin "'])
def test_files_that_hold_no_arguments(tmp_path, capsys, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert sweep.main([f"@{tmp_path / 'list.txt'}", *FLAGS, "--output=out"]) == 1
    assert "list.txt: expected arguments, got " in capsys.readouterr().err


def test_data_macros_are_passed_to_evaluation():
    evaluate = "--evaluate=runs/evaluate.gin+BATCH_SIZE=2"
    (_, run) = plan(
        *("methods/mov.gin", *FLAGS, evaluate, "--output=out", "--gin.BATCH_SIZE=4"),
        *("--gin.EVAL_TASKS=['a']", "--gin_search_paths=mine"),
    )
    for flag in ("--gin.JSONL_DIR=tasks", "--gin.EVAL_TASKS=['a']", "--gin_search_paths=mine"):
        assert flag in run.train_flags and flag in run.evaluate_flags
    assert "--gin.BATCH_SIZE=4" in run.train_flags
    assert "--gin.BATCH_SIZE=4" not in run.evaluate_flags
    assert run.evaluate_settings["BATCH_SIZE"] == "2"
    assert "--gin.TRAIN_STEPS=9" not in run.evaluate_flags
    own = "methods/mov.gin+routing/sentence.gin+PACK=False+SENTENCE_EMBEDDINGS=table"
    base, run = plan(own, *FLAGS, "--output=out")
    assert "--gin.SENTENCE_EMBEDDINGS=table" in run.train_flags
    assert "--gin.SENTENCE_EMBEDDINGS=table" in run.evaluate_flags
    assert "--gin.SENTENCE_EMBEDDINGS=table" not in base.evaluate_flags


def test_arguments_from_a_file(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("# a comment\nmethods/mov.gin 'methods/ia3.gin'  # another\n--seeds=1,2\n")
    assert sweep_plan.expand_argument_files(["a", f"@{file}", "b"]) == [
        *("a", "methods/mov.gin", "methods/ia3.gin", "--seeds=1,2", "b")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["methods/none.gin"], "methods/none.gin: methods/none.gin: no such file in"),
        (["methods/mov.gin+top_1"], "expected gin files and SETTING=value"),
        (
            ["methods/mov.gin+NUM_EXPERT=2"],
            "NUM_EXPERT: no gin file has .* close: NUM_EXPERTS",
        ),
        (["methods/mov.gin", "./methods/mov.gin"], "another experiment has the name mov"),
        (["routing/soft.gin"], "expected files of a model and of a method, got no method file$"),
        (["methods/mov.gin+SEEDS=a"], "SEEDS must be integers joined by commas, got 'a'"),
        (
            ["methods/mov.gin", "--seeds=0;1"],
            "--seeds must be integers joined by commas, got '0;1'",
        ),
        (["methods/mov.gin+NAME=a/b"], r"NAME must be letters, digits and '_\.=-', got 'a/b'"),
        (["methods/mov.gin+RANK=best(1)"], r"best\(\) must have two or more different values, got"),
        (["methods/mov.gin+A=best(1,2)+B=best_of(x)"], r"expected a single best\(\), got 2"),
        (["methods/mov.gin+A=best(1,2)+FROM=x"], "must not be in an experiment with FROM"),
        (
            ["methods/mov.gin+NUM_EXPERTS=best_of(ia3)"],
            r"must name an experiment with best\(\) before this one \(none\), got 'ia3'",
        ),
        (["methods/mov.gin", "--jobs=0"], "--jobs must be at least 1, got 0"),
        (["methods/mov.gin", "--gin.SEED=3"], r"the sweep sets it from --seeds"),
        (["methods/mov.gin", "--gin.MODEL_DIR=x"], "MODEL_DIR: the sweep sets it$"),
        (["methods/mov.gin", "--evaluate=runs/infer.gin"], "expected a run file of evaluate"),
        (
            ["methods/mov.gin+FROM=ia3", "methods/ia3.gin"],
            r"mov.gin\+FROM=ia3: FROM must name an experiment before this one \(none\), got 'ia3'",
        ),
        (["methods/mov.gin", "methods/mov.gin+FROM="], r"before this one \(mov\), got ''"),
        (["methods/mov.gin", "methods/ia3.gin+FROM=mov+FROM=mov"], "expected a single FROM, got 2"),
        (
            ["methods/mov.gin", "methods/ia3.gin+FROM=mov+INITIAL_CHECKPOINT_PATH=x"],
            "INITIAL_CHECKPOINT_PATH must not be set with FROM, which sets it",
        ),
        (
            ["methods/mov.gin+SEED=3"],
            r"mov.gin\+SEED=3: --gin.SEED: the sweep sets it from",
        ),
        (
            ["methods/mov.gin", "--evaluate=runs/evaluate.gin+CHECKPOINT_PATH=x"],
            "the sweep sets it",
        ),
        (["@no.txt"], "@no.txt: expected a file of arguments"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(tmp_path, capsys, flags, message):
    assert sweep.main([*FLAGS, *flags, f"--output={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert re.search(f"{message}\n?", error) and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_an_output_with_characters_of_patterns_is_refused(capsys):
    assert sweep.main([*FLAGS, "methods/mov.gin", "--output=/tmp/sweep[1]"]) == 1
    assert "--output must be a path without any of" in capsys.readouterr().err


def test_dry_run_prints_the_commands(tmp_path, capsys):
    assert sweep.main(["methods/mov.gin", *FLAGS, f"--output={tmp_path}/out", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["pemoe", command] for command in ("evaluate", "train", "evaluate")
    ]
    assert not (tmp_path / "out").exists()
