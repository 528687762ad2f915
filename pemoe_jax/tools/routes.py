"""What the experts do: a page of tables and pictures: `pemoe routes --help`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.analysis.routing import measure
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.analysis.routing.metrics import ProbeResult

FLAGS = gin_flags.make_parser(
    "routes",
    "Shows what the experts of a run do with tasks that it was trained on and with others: each\n"
    "task's mean probabilities over experts (a map), how decided the routers are by layer, which\n"
    "tasks are routed alike (a tree), and which tokens an expert gets. Writes routes.html (one\n"
    "page that holds all of it), routes.md, routes.json, routes.csv, distances.csv and PNG files\n"
    "to the output folder.",
    example="""\
  pemoe routes /tmp/mov --tasks 'super_glue_*' ag_news_classify --output /tmp/page \\
    --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model
  pemoe routes --gin_file=runs/quickstart_routes.gin
""",
    macros=["runs/routes.gin"],
)
_SHORT = {  # flag -> macro
    "checkpoints": "CHECKPOINT_PATH",
    "tasks": "ROUTES_TASKS",
    "sites": "ROUTES_SITES",
    "examples": "ROUTES_EXAMPLES",
    "output": "ROUTES_OUTPUT_DIR",
}
FLAGS.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="short for CHECKPOINT_PATH")
FLAGS.add_argument(
    "--tasks", nargs="+", action="extend", metavar="TASK", help="short for ROUTES_TASKS"
)
FLAGS.add_argument(
    "--sites", nargs="+", action="extend", metavar="SITE", help="short for ROUTES_SITES"
)
FLAGS.add_argument("--examples", type=int, metavar="N", help="short for ROUTES_EXAMPLES")
FLAGS.add_argument("--output", metavar="DIR", help="short for ROUTES_OUTPUT_DIR")


def routes(
    checkpoint_path: str | Sequence[str],
    output_dir: str,
    task_feature_lengths: Mapping[str, int],
    tasks: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    examples: int = measure.DEFAULT_EXAMPLES,
    batch_size: int = 32,
    register: Callable[[], Any] | None = None,
    initial_checkpoint_path: str | None = None,
    dtype: str | None = None,
    use_cached_tasks: bool = False,
    sentence_embeddings: str | None = None,
    min_count: int = 5,
) -> None:
    """Runs some examples of tasks, inputs with their right answers, and writes what routers did.

    Args:
      checkpoint_path: runs, checkpoints or adapters; a part of the page each.
      output_dir: gets the page, tables and pictures.
      task_feature_lengths: tokens of 'inputs' and 'targets'; longer ones are cut.
      tasks: names, patterns or mixtures, see `measure.select_tasks`.
      sites: patterns of sites, see `measure.select_sites`.
      examples: most of a task, the first of its evaluation split (or else of `train`).
      batch_size: examples at a time over all devices.
      register: registers the tasks.
      initial_checkpoint_path: in place of the base that a checkpoint names.
      dtype: of activations, in place of what checkpoints say.
      use_cached_tasks: seqio's offline caches.
      sentence_embeddings: table for routers that read them; None: the tasks' own feature.
      min_count: a token met less often is no top token.

    Raises:
      InputError: a method has no routers, or anything else that the user can mend.
    """
    from pemoe_jax.analysis.routing import page
    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import sentences, seqio_tasks
    from pemoe_jax.runtime import atomic_write, file_io

    seqio_tasks.check_count("ROUTES_EXAMPLES", examples, 1)
    lengths = seqio_tasks.checked_lengths(task_feature_lengths)
    mesh = partitioning.make_mesh()
    partitioning.check_batch_size(batch_size, mesh)
    folder = file_io.resolve_local(output_dir, "ROUTES_OUTPUT_DIR")
    opened = models.open_models(checkpoint_path, None, initial_checkpoint_path, dtype)
    chosen = [_sites(one, sites) for one in opened]
    registered = register() if register is not None else None
    if registered is not None:
        print("\n".join(registered.lines()), flush=True)
    names = measure.select_tasks(tasks, registered, use_cached_tasks)
    embedded = sentences.for_models(
        opened, sentence_embeddings, names[0], lengths["inputs"], use_cached_tasks
    )
    groups = _read(names, lengths, examples, use_cached_tasks)
    if embedded is not None:
        groups = {name: embedded.given_to(members) for name, members in groups.items()}
    found: list[ProbeResult] = []
    for one, its_sites in zip(opened, chosen, strict=True):
        found.append(_routing(one, its_sites, groups, registered, batch_size, mesh, min_count))
        page.draw_plots(found[-1], folder)
        # after each run, so that what is there stays if a later one fails
        for name, text in page.render_files(found, folder).items():
            atomic_write.write_text(folder / name, text)
    print(page.summary(found))
    print(f"page in {folder}/routes.html")


def _sites(opened: Any, patterns: Sequence[str] | None) -> list[str]:
    """The sites of a model that are looked at closely."""
    from pemoe_jax.analysis.routing import probe

    experts = probe.expert_counts(opened.model)
    if not experts:
        method = opened.about()["method"]
        raise InputError(
            f"{opened.path}: its method ({method}) has no routers: expected a run of mov, molora"
            " or another method with routers"
        )
    return measure.select_sites(patterns, experts)


def _read(
    names: Sequence[str], lengths: Mapping[str, int], examples: int, use_cached: bool
) -> dict[str, list[Any]]:
    from pemoe_jax.runtime import progress

    bar = progress.Progress("reading", len(names), note="tasks")
    groups = {}
    try:
        for name in names:
            groups[name] = measure.read_examples(name, lengths, examples, use_cached)
            bar.report_if_slow(len(groups), "tasks")
    finally:
        bar.close()
    return groups


def _routing(
    opened: Any,
    sites: list[str],
    groups: Mapping[str, Sequence[Any]],
    registered: Any,
    batch_size: int,
    mesh: Any,
    min_count: int,
) -> "ProbeResult":
    """What one run's routers do with the examples."""
    from pemoe_jax.analysis.routing import metrics, probe
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import seqio_tasks
    from pemoe_jax.runtime import progress

    for name in groups:
        seqio_tasks.check_vocabulary(name, opened.model.config.vocab_size)
    params = opened.load(partitioning.replicated_sharding(mesh))
    bar = progress.Progress(f"routing {opened.name}", sum(map(len, groups.values())))
    try:
        totals = measure.measure_routing(opened.model, params, groups, batch_size, mesh, sites, bar)
    finally:
        bar.close()
    trained = measure.trained_datasets(opened, registered)
    labels = registered.datasets if registered is not None else {}
    tasks = [
        metrics.ProbedTask(
            name=name,
            dataset=labels.get(name, name),
            seen=None if trained is None else labels.get(name, name) in trained,
            split=_split(name, registered),
            examples=len(members),
        )
        for name, members in groups.items()
    ]
    return metrics.ProbeResult(
        about=opened.about(),
        tasks=tasks,
        totals=totals,
        experts=probe.expert_counts(opened.model),
        sites=sites,
        pieces=_pieces(next(iter(groups)), totals),
        min_count=min_count,
    )


def _split(name: str, registered: Any) -> str:
    """The file's split, where seqio knows it by another name."""
    split = measure.task_split(name)
    behind = registered.eval_splits if registered is not None else {}
    return split if split == "train" else behind.get(name) or split


def _pieces(task: str, totals: Any) -> dict[int, str]:
    """The vocabulary's text of every token id that was met."""
    import numpy as np

    from pemoe_jax.data import seqio_tasks

    vocabulary = seqio_tasks.check_task(task).output_features["inputs"].vocabulary
    tokenizer: Any = getattr(vocabulary, "tokenizer", None)
    met = np.flatnonzero(sum(np.asarray(counts) for counts in totals.token_counts.values()))
    pieces = {}
    for token in met.tolist():
        if hasattr(tokenizer, "id_to_piece") and token < vocabulary.vocab_size:
            pieces[token] = tokenizer.id_to_piece(token)
        else:
            pieces[token] = vocabulary.decode([token])
    return pieces | {0: "<start>"}  # what a decoder reads first


def _bindings(args: argparse.Namespace) -> list[str]:
    """The short flags that were given, as macros."""
    given = {macro: getattr(args, flag) for flag, macro in _SHORT.items()}
    return [
        f"{macro} = {value!r}"
        for macro, value in given.items()
        if value is not None and value != []
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def work(args: argparse.Namespace, bindings: Sequence[str]) -> None:
        args.gin_file = args.gin_file or ["runs/routes.gin"]
        gin_flags.load_config(args, [*_bindings(args), *bindings])
        gin_flags.call_configured(routes)

    return gin_flags.run_command(FLAGS, work, argv)
