"""`pemoe routes`: shows which experts tasks and tokens use, as a page of tables and pictures."""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.analysis.routing import measure
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, options

if TYPE_CHECKING:
    import jax

    from pemoe_jax.analysis.routing.metrics import ProbeResult
    from pemoe_jax.analysis.routing.probe import ProbeTotals
    from pemoe_jax.checkpoints import models
    from pemoe_jax.data.choices import ChoiceGroup
    from pemoe_jax.tasks import TaskRoles

FLAGS = gin_flags.make_parser(
    "routes",
    "Shows which experts a run uses for tasks that it was trained on and for held-out ones:\n"
    "each task's mean probabilities over experts (a map), the entropy of the routers by layer,\n"
    "which tasks are routed alike (a dendrogram), and which tokens each expert gets; for sparse\n"
    "models also the load of the experts and the tokens that training drops. Writes routes.html\n"
    "(a self-contained page), routes.md, routes.json, CSV and PNG files to the output folder.",
    example="""\
  pemoe routes /tmp/mov --tasks 'super_glue_*' ag_news_classify --output /tmp/page \\
    --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model
  pemoe routes --gin_file=runs/quickstart_routes.gin
""",
    macros=["runs/routes.gin"],
)
# Flag -> the macro that it sets, so that gin files, --gin.NAME and flags set the same things.
_FLAG_MACROS = {
    "checkpoints": "CHECKPOINT_PATH",
    "tasks": "ROUTES_TASKS",
    "sites": "ROUTES_SITES",
    "examples": "ROUTES_EXAMPLES",
    "output": "ROUTES_OUTPUT_DIR",
}
FLAGS.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="short for CHECKPOINT_PATH")
for _flag in ("tasks", "sites"):
    FLAGS.add_argument(
        f"--{_flag}",
        nargs="+",
        action="extend",
        metavar=_flag[:-1].upper(),
        help=f"short for {_FLAG_MACROS[_flag]}",
    )
FLAGS.add_argument("--examples", type=int, metavar="N", help="short for ROUTES_EXAMPLES")
FLAGS.add_argument("--output", metavar="DIR", help="short for ROUTES_OUTPUT_DIR")


def routes(
    models: options.Models,
    data: options.Data,
    output_dir: str,
    tasks: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    examples: int = measure.DEFAULT_EXAMPLES,
    min_count: int = 5,
) -> None:
    """Runs examples through models with routers and writes which experts they used.

    Args:
      models: runs, checkpoints or adapters, each a section of the page.
      data: source of the tasks, their lengths and the batch size.
      output_dir: folder for the page, tables and plots.
      tasks: names or patterns (*) of tasks, or mixtures; None: one prompt of each dataset,
        whether trained on or held out.
      sites: patterns of sites to show in detail, e.g. ['*/mlp/gate']; None: all sites of the last
        decoder layer, or in a sparse model the last sparse layers of encoder and decoder.
      examples: maximum number of examples of each task, from the start of its evaluation split, or
        else of `train`.
      min_count: number of times that a token must occur to be among an expert's top tokens.

    Raises:
      InputError: a model has no routers, or a setting or file is invalid.
    """
    from pemoe_jax.analysis import evaluation
    from pemoe_jax.analysis.routing import page
    from pemoe_jax.checkpoints import models as models_lib
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import sentences, seqio_tasks
    from pemoe_jax.runtime import atomic_write, file_io, progress
    from pemoe_jax.tasks.task_roles import run_register

    lengths = seqio_tasks.validate_lengths(data.task_feature_lengths)
    mesh = partitioning.make_mesh()
    partitioning.check_batch_size(data.batch_size, mesh)
    folder = file_io.resolve_output_folder(output_dir, "ROUTES_OUTPUT_DIR")
    opened_models = models_lib.open_selected(models)
    # The sites are selected first, so that a mistake in ROUTES_SITES shows before data are read.
    sites_by_model = [_select_sites(opened, sites) for opened in opened_models]
    evaluation.warn_of_other_eos([opened.path for opened in opened_models])
    task_roles = run_register(data.register)
    task_roles.print_summary()
    use_cached, embeddings = data.use_cached_tasks, data.sentence_embeddings
    names = measure.select_tasks(tasks, task_roles, use_cached)
    sentence_source = sentences.open_for_models(
        opened_models, embeddings, names[0], lengths["inputs"], use_cached
    )
    groups = {}
    with contextlib.closing(progress.Progress("reading", len(names), note="tasks")) as bar:
        for name in names:
            groups[name] = measure.read_examples(name, lengths, examples, use_cached)
            bar.report_if_slow(len(groups), "tasks")
    if sentence_source is not None:
        groups = {name: sentence_source.attach_to(members) for name, members in groups.items()}
    evaluation.begin_run_file(folder, opened_models, mesh, data, {})
    results: list[ProbeResult] = []
    for opened, model_sites in zip(opened_models, sites_by_model, strict=True):
        results.append(
            _probe_run(
                opened,
                model_sites,
                groups,
                task_roles,
                lengths=lengths,
                batch_size=data.batch_size,
                mesh=mesh,
                min_count=min_count,
            )
        )
        page.draw_plots(results[-1], folder)
        # Written after each run, so that a later run that fails leaves the page so far.
        for name, text in page.render_files(results, folder).items():
            atomic_write.write_text(folder / name, text)
    print(page.summary(results))
    print(f"page in {folder}/routes.html")


def _select_sites(opened: "models.OpenedModel", patterns: Sequence[str] | None) -> list[str]:
    """Returns the sites to show in detail; InputError if the model has no routers."""
    from pemoe_jax.analysis.routing import probe

    experts = probe.expert_counts(opened.model)
    if not experts:
        raise InputError(
            f"{opened.path}: expected mov, molora, flan_switch or another method with routers, got"
            f" {opened.summary()['method']}"
        )
    return measure.select_sites(patterns, experts)


def _probe_run(
    opened: "models.OpenedModel",
    sites: list[str],
    groups: "Mapping[str, Sequence[ChoiceGroup]]",
    task_roles: "TaskRoles",
    *,
    lengths: Mapping[str, int],
    batch_size: int,
    mesh: "jax.sharding.Mesh",
    min_count: int,
) -> "ProbeResult":
    """Probes a model: loads it, runs the examples through it, and returns which experts they used.

    Args:
      opened: the model.
      sites: sites to show in detail.
      groups: {task: its examples}.
      task_roles: the registered tasks.
      lengths, batch_size, mesh, min_count: see `routes`.
    """
    import numpy as np

    from pemoe_jax.analysis.routing import dispatch_probe, metrics, probe
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import seqio_tasks
    from pemoe_jax.runtime import progress

    for name in groups:
        seqio_tasks.check_vocab_size(name, opened.model.config.vocab_size)
        if opened.record is not None:
            seqio_tasks.check_vocabulary(opened.path, opened.record.vocabulary, name)
    # Replicated, because sharding gains little for a forward pass over few examples.
    params = opened.load(partitioning.replicated_sharding(mesh))
    num_examples = sum(map(len, groups.values()))
    with contextlib.closing(progress.Progress(f"routing {opened.name}", num_examples)) as bar:
        example_totals = measure.measure_examples(
            opened.model, params, groups, batch_size, mesh, sites, bar
        )
    example_tasks = measure.example_tasks(groups)
    totals = measure.sum_by_task(example_totals, list(groups), example_tasks)
    # Which tokens are dropped depends on how examples are laid out in rows. The layout is that of
    # the run's training, if it is known.
    training_rows = dispatch_probe.read_training_rows(
        opened.path, default=dispatch_probe.TrainingRows(lengths)
    )
    trained_datasets = measure.trained_datasets(opened, task_roles)
    tasks = []
    for name, members in groups.items():
        dataset = task_roles.datasets.get(name, name)
        is_trained = None if trained_datasets is None else dataset in trained_datasets
        split = measure.task_split(name)
        # seqio may know a file `test` as the split `validation`: the page has the file's name.
        if split != "train":
            split = task_roles.eval_splits.get(name) or split
        tasks.append(metrics.ProbedTask(name, dataset, is_trained, split, len(members)))
    sparse = opened.model.sparse
    return metrics.ProbeResult(
        run=opened.summary(),
        tasks=tasks,
        totals=totals,
        experts=probe.expert_counts(opened.model),
        sites=sites,
        pieces=_token_texts(tasks[0].name, totals),
        min_count=min_count,
        dispatch=dispatch_probe.measure_dispatch(
            opened.model, params, groups, training_rows, batch_size, mesh
        ),
        experts_choose=sparse is not None and sparse.routing == "experts",
        rows=str(training_rows),
        example_probs={site: np.asarray(probs) for site, probs in example_totals.probs.items()},
        example_tasks=example_tasks,
    )


def _token_texts(task: str, totals: "ProbeTotals") -> dict[int, str]:
    """Returns {token id: its text in the task's vocabulary} for the ids that the examples have."""
    import numpy as np

    from pemoe_jax.data import seqio_tasks

    vocabulary = seqio_tasks.get_mixture_or_task(task).output_features["inputs"].vocabulary
    tokenizer: Any = getattr(vocabulary, "tokenizer", None)
    counts = sum(np.asarray(counts) for counts in totals.token_counts.values())
    texts = {}
    for token in np.flatnonzero(counts).tolist():
        # Pieces keep the mark of a word's beginning, which `decode` drops. Sentinels have no piece.
        if hasattr(tokenizer, "id_to_piece") and token < vocabulary.vocab_size:
            texts[token] = tokenizer.id_to_piece(token)
        else:
            texts[token] = vocabulary.decode([token])
    # The id 0 is that of padding, which is not counted, and of the first input of the decoder.
    return texts | {0: "<start>"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def work(args: argparse.Namespace, bindings: Sequence[str]) -> None:
        args.gin_file = args.gin_file or ["runs/routes.gin"]
        values = {macro: getattr(args, flag) for flag, macro in _FLAG_MACROS.items()}
        # Without the flags that were not passed, so that they do not override gin files.
        flag_bindings = [
            f"{name} = {value!r}" for name, value in values.items() if value not in (None, [])
        ]
        gin_flags.load_config(args, [*flag_bindings, *bindings])
        gin_flags.call_configured(routes)

    return gin_flags.run_command(FLAGS, work, argv)
