"""Decodes tasks or texts greedily, and computes the tasks' metrics: `pemoe infer --help`."""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    from pemoe_jax.core import partitioning

FLAGS = gin_flags.make_parser(
    "infer",
    "Decodes the evaluation splits of tasks greedily (EVAL_TASKS, or else the training tasks) and\n"
    "writes predictions, results.json and results.md to EVAL_OUTPUT_DIR. Rows need no target;\n"
    "metrics leave out those without one. A task's metrics are those that it is registered with,\n"
    "else those of P3 or of INDEX.json in JSONL_DIR (Accuracy, BLEU, ROUGE, Squad, Spearman\n"
    "Correlation), else accuracy: the share of predictions that equal the target exactly. With\n"
    "--text, texts are decoded instead, answers are printed, and nothing is written.",
    example="""\
  pemoe infer --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=/tmp/mov \\
    --gin.EVAL_OUTPUT_DIR=/tmp/decoded --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model
  pemoe infer --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=/tmp/mov \\
    --gin.VOCAB_PATH=spiece.model --text "Is the sky blue?"
""",
    macros=["runs/infer.gin"],
)
FLAGS.add_argument(
    "--text",
    action="append",
    metavar="TEXT",
    help="an input to decode instead of tasks, whose answer is printed; may be repeated; '-' reads"
    " the lines of standard input",
)

# Settings that a user may have set but that --text ignores, with a warning.
_TASK_MACROS = (
    "EVAL_OUTPUT_DIR",
    "EVAL_TASKS",
    "TRAIN_TASKS",
    "EVAL_EXAMPLES",
    "JSONL_DIR",
    "P3_DIR",
    "MMLU_DIR",
    "BBH_DIR",
    "MIXTURE_OR_TASK_MODULE",
    "USE_CACHED_TASKS",
    "SENTENCE_EMBEDDINGS",
)


def infer(
    models: options.Models,
    data: options.Data,
    output_dir: str,
    mesh: "partitioning.MeshConfig",
    few_shot: options.FewShot = options.ZERO_SHOT,
) -> dict[str, Any]:
    """Decodes every task with every model, and computes the tasks' metrics by seqio's Evaluator.

    Args:
      models: the models to decode with.
      data: tasks, or a mixture of them; those without an evaluation split are skipped. The length
        of 'targets' is the maximum number of decoded tokens.
      output_dir: folder for results.json, results.md, predictions/<run>/<task>.jsonl and
        shots/<task>.jsonl.
      mesh: the shape of the device mesh, and how parameters are sharded over it.
      few_shot: the solved examples in front of each input.

    Returns:
      The contents of results.json. This package's own metrics are in percent.

    Raises:
      InputError: a setting or a file is wrong.
    """
    from pemoe_jax.analysis import benchmark_table, evaluation, generation, tables
    from pemoe_jax.analysis.zero_shot import result_tables
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import shots
    from pemoe_jax.runtime import atomic_write

    setup = evaluation.open_evaluation(
        models, data, output_dir, mesh, generation.decoded_names, few_shot
    )
    tasks = generation.read_tasks(data, setup.lengths, setup.task_roles)
    if setup.sentences is not None and setup.sentences.table is not None:
        for task in tasks:
            task.sentences = setup.sentences.vectors(task.inputs, task.name)
    if few_shot.shots:
        length = setup.lengths["inputs"]
        names = [task.name for task in tasks]
        task_shots = shots.load_shots(names, few_shot, length, data.use_cached_tasks)
        for task in tasks:
            task.add_shots(task_shots[task.name], length)
        num_shots = [number for task in tasks for number in task.num_shots]
        evaluation.report_shots(setup.folder, task_shots, num_shots, length)
    results: dict[str, Any] = {"runs": []}
    for opened in setup.models:
        params = opened.load(opened.shardings(setup.mesh, setup.rules))
        with partitioning.use_mesh(setup.mesh, setup.rules):
            tokens = generation.decode(
                opened, params, tasks, data.batch_size, setup.lengths["targets"], setup.mesh
            )
        # Otherwise two models would be in memory while the next one is loaded.
        del params
        task_results = {}
        for task in tasks:
            # `tokens` is a queue with the examples of all tasks, in the order of the tasks.
            rows = [tokens.popleft() for _ in task.inputs]
            task_results[task.name] = generation.compute_metrics(
                task, rows, opened.step, few_shot.shots
            )
            file = setup.folder / "predictions" / opened.name / f"{task.name}.jsonl"
            atomic_write.write_text(file, generation.prediction_lines(task, rows))
        benchmarks = benchmark_table.summarize_benchmarks(setup.task_roles.benchmarks, task_results)
        results["runs"].append(
            {
                **opened.summary(),
                **few_shot.record,
                **({"benchmarks": benchmarks} if benchmarks else {}),
                "tasks": task_results,
            }
        )
        labels = result_tables.run_labels(results["runs"])
        # A scale of 1, because these metrics are in percent already.
        by_benchmark = benchmark_table.benchmark_tables(results["runs"], labels, scale=1)
        by_dataset = [generation.dataset_table(run) for run in results["runs"]]
        by_prompt = [generation.prompt_table(run) for run in results["runs"]]
        checkpoints = result_tables.checkpoint_table(results["runs"])
        # Written after each run, so that a later run that fails leaves the results so far.
        setup.write(
            results, tables.to_markdown([*by_benchmark, *by_dataset, *by_prompt, checkpoints])
        )
    tables.print_tables([*by_benchmark, *by_dataset])
    print(f"results in {setup.folder}/results.md, predictions in {setup.folder}/predictions")
    return results


def decode_texts(
    texts: Sequence[str],
    models: options.Models,
    vocab_path: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    mesh: "partitioning.MeshConfig",
) -> list[list[str]]:
    """Decodes texts with every model and prints the answers.

    Args:
      texts: the inputs.
      models: the models to decode with.
      vocab_path: vocabulary of all models, see `tasks.register`.
      task_feature_lengths: maximum number of tokens of 'inputs' and of answers ('targets').
      batch_size: number of texts of a batch, over all devices.
      mesh: the shape of the device mesh, and how parameters are sharded over it.

    Returns:
      For each model, its answer to each text.

    Raises:
      InputError: a setting or a file is wrong.
    """
    from pemoe_jax.analysis import generation
    from pemoe_jax.checkpoints import models as models_lib
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import seqio_tasks
    from pemoe_jax.runtime import distributed
    from pemoe_jax.tasks.vocabulary import load_vocabulary

    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    device_mesh, rules = distributed.start(mesh, batch_size)
    opened_models = models_lib.open_selected(models)
    task = generation.text_task(texts, load_vocabulary(vocab_path), lengths["inputs"])
    answers = []
    for opened in opened_models:
        generation.check_decodes_texts(opened, task.vocabulary)
        # Progress goes to stderr, so that a program that reads stdout gets the answers alone.
        with (
            contextlib.redirect_stdout(sys.stderr),
            partitioning.use_mesh(device_mesh, rules),
        ):
            params = opened.load(opened.shardings(device_mesh, rules))
            rows = generation.decode(
                opened, params, [task], batch_size, lengths["targets"], device_mesh
            )
        del params
        answers.append([task.vocabulary.decode(tokens.tolist()) for tokens in rows])
        prefix = f"{opened.name}: " if len(opened_models) > 1 else ""
        for answer in answers[-1]:
            print(f"{prefix}{answer}", flush=True)
    return answers


def _read_texts(values: Sequence[str]) -> list[str]:
    """Returns the texts of `--text`; '-' stands for the lines of standard input."""
    texts: list[str] = []
    try:
        for value in values:
            if value == "-":
                content = "" if sys.stdin is None else sys.stdin.read()
                # Each line gets one answer. `splitlines` would also split at characters such as a
                # form feed. Files of Windows have CRLF, and may have a byte order mark.
                lines = content.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
                texts += lines[:-1] if not lines[-1] else lines
            else:
                texts.append(value)
        # Python decodes arguments that are not UTF-8 to surrogates, which `encode` refuses.
        for text in texts:
            text.encode()
    except UnicodeError:
        raise InputError("--text must be UTF-8, got other bytes") from None
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""

    def run(args: argparse.Namespace, bindings: Sequence[str]) -> None:
        if args.text is None:
            gin_flags.load_config(args, bindings)
            gin_flags.call_configured(infer)
            return
        # The run file requires EVAL_OUTPUT_DIR, which only tasks need.
        gin_flags.load_config(args, ["EVAL_OUTPUT_DIR = ''", *bindings])
        if shots := gin_flags.macro_value("SHOTS"):
            raise InputError(
                f"SHOTS must be 0 with --text, which has no train split, got {shots!r}"
            )
        if ignored := [name for name in _TASK_MACROS if gin_flags.macro_value(name)]:
            print(f"warning: --text has no use for {', '.join(ignored)}", file=sys.stderr)
        texts = _read_texts(args.text)
        if not any(map(str.strip, texts)):
            raise InputError(
                "--text must be a text that is not blank, or '-' for lines of standard input,"
                f" got {args.text!r:.80}"
            )
        gin_flags.call_configured(decode_texts, texts)

    return gin_flags.run_command(FLAGS, run, argv)


if __name__ == "__main__":
    # `python -m` runs this file as the module `__main__`, but gin configures the functions of
    # `pemoe_jax.infer`, a second copy: call that one.
    from pemoe_jax import infer as imported

    sys.exit(imported.main())
