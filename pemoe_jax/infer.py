"""Decodes tasks greedily and computes their metrics: `pemoe infer --help`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    from pemoe_jax.core import partitioning

FLAGS = gin_flags.make_parser(
    "infer",
    "Decodes the evaluation splits of tasks greedily and writes predictions, results.json and\n"
    "results.md to EVAL_OUTPUT_DIR. A task's metrics are those that it is registered with, else\n"
    "those of P3 or of INDEX.json in JSONL_DIR (Accuracy, BLEU, ROUGE, Squad, Spearman\n"
    "Correlation), else accuracy: the share of predictions that equal their target exactly.",
    example="""\
  pemoe infer --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=/tmp/mov \\
    --gin.EVAL_OUTPUT_DIR=/tmp/decoded --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model
""",
    macros=["runs/infer.gin"],
)


def infer(
    models: options.Models, data: options.Data, output_dir: str, mesh: "partitioning.MeshConfig"
) -> dict[str, Any]:
    """Decodes every task with every model and computes its metrics, with seqio's Evaluator.

    Args:
      models: the models to decode with.
      data: tasks, or a mixture of them; those without an evaluation split are skipped. The length
        of 'targets' is the maximum number of decoded tokens.
      output_dir: folder for results.json, results.md and predictions/<run>/<task>.jsonl.
      mesh: how each model is spread over the devices.

    Returns:
      The contents of results.json; metrics in percent.

    Raises:
      InputError: a setting or a file is wrong.
    """
    from pemoe_jax.analysis import evaluation, generation, tables
    from pemoe_jax.analysis.zero_shot import result_tables
    from pemoe_jax.core import partitioning
    from pemoe_jax.runtime import atomic_write

    setup = evaluation.open_evaluation(models, data, output_dir, mesh, generation.decoded_names)
    tasks = generation.read_tasks(data, setup.lengths, setup.task_info)
    if setup.sentences is not None and setup.sentences.table is not None:
        for task in tasks:
            task.sentences = setup.sentences.vectors(task.inputs, task.name)
    results: dict[str, Any] = {"runs": []}
    for opened in setup.models:
        params = opened.load(opened.shardings(setup.mesh, setup.rules))
        with partitioning.use_mesh(setup.mesh, setup.rules):
            tokens = generation.decode(
                opened, params, tasks, data.batch_size, setup.lengths["targets"], setup.mesh
            )
        del params  # before the next model is loaded
        task_results = {}
        for task in tasks:
            rows = [tokens.popleft() for _ in task.inputs]
            task_results[task.name] = generation.compute_metrics(task, rows, opened.step)
            file = setup.folder / "predictions" / opened.name / f"{task.name}.jsonl"
            atomic_write.write_text(file, generation.prediction_lines(task, rows))
        results["runs"].append({**opened.summary(), "tasks": task_results})
        by_dataset = [generation.dataset_table(run) for run in results["runs"]]
        by_prompt = [generation.prompt_table(run) for run in results["runs"]]
        checkpoints = result_tables.checkpoint_table(results["runs"])
        # Written after each run, so that a later run that fails leaves the results so far.
        setup.write(results, tables.to_markdown([*by_dataset, *by_prompt, checkpoints]))
    tables.print_tables(by_dataset)
    print(f"results in {setup.folder}/results.md, predictions in {setup.folder}/predictions")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return gin_flags.run_configured(FLAGS, infer, argv)


if __name__ == "__main__":
    # Imported by name, so that gin configures this very module and not a second copy of it.
    from pemoe_jax import infer as imported

    sys.exit(imported.main())
