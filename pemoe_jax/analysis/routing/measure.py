"""Tasks' examples through a model's routers: which are read, and what the routers did with them."""

import collections
import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError

if TYPE_CHECKING:
    from pemoe_jax.analysis.routing import probe as probe_lib
    from pemoe_jax.runtime import progress

DEFAULT_EXAMPLES = 32  # of a task, enough for a mean over some hundred tokens
_TWIN = "_score_eval"


# --- which tasks


def select_tasks(
    patterns: Sequence[str] | None, registered: Any, use_cached: bool = False
) -> list[str]:
    """Names of tasks by patterns, in their order; a twin stands for the task that it is of.

    Args:
      patterns: names of tasks or mixtures, or shell-style patterns of tasks' names; None: by their
        roles, a prompt of each data set, those trained on first.
      registered: what `tasks.register` gave.
      use_cached: whether seqio's offline caches are read, and so only those tasks are there.

    Raises:
      InputError: one matches nothing, or there are no roles to go by.
    """
    if patterns is None:
        return _by_role(registered, use_cached)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise InputError(f"ROUTES_TASKS must be a list of name patterns, found {patterns!r}")
    pool = _pool(registered)
    found: dict[str, None] = {}
    for pattern in patterns:
        found |= dict.fromkeys(_matching(pattern, pool, use_cached))
    if not found:
        raise InputError("ROUTES_TASKS names no task: expected at least one")
    return list(found)


def _matching(pattern: str, pool: Sequence[str], use_cached: bool) -> list[str]:
    from pemoe_jax.data import seqio_tasks

    if pattern in seqio_tasks.import_seqio().MixtureRegistry.names():
        names = seqio_tasks.subtasks(pattern)
    else:
        wanted = pattern if pattern in pool else pattern.removesuffix(_TWIN)
        names = [name for name in pool if fnmatch.fnmatchcase(name, wanted)]
    if not names:
        close = difflib.get_close_matches(pattern.strip("*"), pool, n=2)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise InputError(f"ROUTES_TASKS {pattern!r} matched none of {len(pool)} tasks{hint}")
    there = _there(names, use_cached)
    if not there:
        where = "seqio's caches have" if use_cached else "P3_DIR has"
        raise InputError(f"ROUTES_TASKS {pattern!r}: {where} none of the {len(names)} tasks")
    return there


def _pool(registered: Any) -> list[str]:
    """All tasks that could be looked at, less the twins of others among them."""
    from pemoe_jax.data import seqio_tasks

    names = set(seqio_tasks.import_seqio().TaskRegistry.names())
    known = sorted(names) if registered is None else [n for n in registered.datasets if n in names]
    return [n for n in known if not (n.endswith(_TWIN) and n.removesuffix(_TWIN) in names)]


def _there(names: Sequence[str], use_cached: bool) -> list[str]:
    """Those that there is data of; for a twin the task that it is of, whose target is the answer.

    A twin stays where its task is not there.
    """
    from pemoe_jax.data import seqio_tasks

    registered = seqio_tasks.import_seqio().TaskRegistry.names()
    found: dict[str, None] = {}
    for name in names:
        for one in (name.removesuffix(_TWIN), name):
            if one in registered and seqio_tasks.is_there(one, use_cached):
                found[one] = None
                break
    return list(found)


def _by_role(registered: Any, use_cached: bool) -> list[str]:
    if registered is None:
        raise InputError(
            "ROUTES_TASKS is not set: expected names of tasks or mixtures (MIXTURE_OR_TASK_MODULE's"
            " have no roles to choose by)"
        )
    trained, scored = _roles(registered)
    names: dict[str, None] = {}
    for role in (trained, scored):
        of = {name: registered.datasets[name] for name in _there(role, use_cached)}
        names |= dict.fromkeys(first_task_per_dataset(of))
    if not names:
        raise InputError("no task to train on or to score: expected ROUTES_TASKS to name some")
    return list(names)


def _roles(registered: Any) -> tuple[list[str], list[str]]:
    """The tasks that the data say are trained on, and those to be scored."""
    if hasattr(registered, "train_tasks"):
        return registered.train_tasks, registered.eval_tasks
    from pemoe_jax.data import seqio_tasks
    from pemoe_jax.tasks.p3 import published

    return seqio_tasks.subtasks("t0_train"), seqio_tasks.subtasks(published.EVAL_MIXTURE)


def first_task_per_dataset(datasets: Mapping[str, str]) -> list[str]:
    """Of {task: its data set} the first task of each."""
    first: dict[str, str] = {}
    for name, dataset in datasets.items():
        first.setdefault(dataset, name)
    return list(first.values())


def trained_datasets(opened: Any, registered: Any) -> set[str] | None:
    """The data sets that a run was trained on: by its record, else by roles; None: not known."""
    recorded = getattr(opened.record, "trained_datasets", None)
    if recorded is not None:
        return set(recorded)
    if registered is None:
        return None
    return {registered.datasets[name] for name in _roles(registered)[0]}


# --- their examples


def task_split(name: str) -> str:
    """The split of a task that is looked at: its evaluation split, or else `train`.

    Raises:
      InputError: it has neither.
    """
    from pemoe_jax.data import seqio_tasks

    split = seqio_tasks.eval_split(name)
    splits = seqio_tasks.check_task(name).splits
    if split is None and "train" not in splits:
        raise InputError(f"{name!r} has no evaluation split and no train split, but {splits}")
    return split or "train"


def read_examples(
    name: str, task_feature_lengths: Mapping[str, int], most: int, use_cached: bool = False
) -> list[Any]:
    """The first examples of a task as `data.ChoiceGroup`s that have the right answer alone.

    Args:
      name: of a task; a twin's rows are grouped.
      task_feature_lengths: tokens of inputs and targets; longer ones are cut.
      most: at most so many.
      use_cached: seqio's offline caches.

    Raises:
      InputError: it cannot be read, or has no example.
    """
    from pemoe_jax.data import seqio_tasks

    split, task = task_split(name), seqio_tasks.check_task(name)
    if use_cached:
        seqio_tasks.cached_subtasks(name)  # there is a cache, or one clear line
    else:
        seqio_tasks.check_files([name], split)
    lengths = seqio_tasks.checked_lengths(task_feature_lengths)
    longer = {key: length + 1 for key, length in lengths.items()}
    with seqio_tasks.reading(name, split, use_cached):
        ds = task.get_dataset(
            longer, split=split, use_cached=use_cached, shuffle=False, seed=0, num_epochs=1
        )
    if "is_correct" in ds.element_spec:
        found = seqio_tasks.choice_groups(
            name, lengths, split=split, max_examples=most, use_cached=use_cached
        )
        groups = [keep_correct_choice(group) for group in found]
    else:
        rows = seqio_tasks.arrays(ds.take(most), name, split, use_cached)
        groups = [_group(task, number, row, lengths) for number, row in enumerate(rows)]
    if not groups:
        raise InputError(f"{name!r} has no example in its split {split!r}")
    return groups


def _group(task: Any, number: int, row: Mapping[str, Any], lengths: Mapping[str, int]) -> Any:
    from pemoe_jax.data import seqio_tasks

    ids, was_cut = {}, {}
    for key, length in lengths.items():
        eos_id = task.output_features[key].vocabulary.eos_id
        ids[key], was_cut[key] = seqio_tasks.cut(row[key], length, eos_id)
    return seqio_tasks.ChoiceGroup(
        task=task.name,
        idx=number,
        inputs=ids["inputs"],
        choices=(ids["targets"],),
        is_correct=(True,),
        input_text=seqio_tasks.text_of(task.output_features, row, "inputs"),
        choice_texts=(seqio_tasks.text_of(task.output_features, row, "targets"),),
        cut_input=was_cut["inputs"],
        cut_target=was_cut["targets"],
        sentence=row.get(seqio_tasks.SENTENCE),
    )


def keep_correct_choice(group: Any) -> Any:
    """A group of choices with the right one alone, the first where none is."""
    best = group.is_correct.index(True) if any(group.is_correct) else 0
    return dataclasses.replace(
        group,
        choices=(group.choices[best],),
        is_correct=(group.is_correct[best],),
        choice_texts=(group.choice_texts[best],),
    )


# --- what the routers do with them


def measure_routing(
    model: Any,
    params: Any,
    groups: Mapping[str, Sequence[Any]],
    batch_size: int,
    mesh: Any,
    token_sites: Collection[str] = (),
    bar: "progress.Progress | None" = None,
) -> "probe_lib.ProbeTotals":
    """Sums over the examples of tasks with their right answers, as numpy arrays.

    Args:
      model: with routers.
      params: its parameters, whole on every device.
      groups: {task: its `data.ChoiceGroup`s}; rows of the totals are in this order.
      batch_size: examples at a time over all devices.
      mesh: the devices.
      token_sites: where totals by token are wanted.
      bar: told how many examples are done.
    """
    import jax
    import numpy as np

    from pemoe_jax.analysis.routing import probe as probe_lib
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import batching, feed

    rows = [
        (n, keep_correct_choice(group))
        for n, members in enumerate(groups.values())
        for group in members
    ]
    number_of = {id(group): number for number, group in rows}
    probe = probe_lib.make_probe(model)
    totals = probe_lib.init_totals(model, len(groups), token_sites)
    totals = partitioning.replicate(totals, mesh)
    batches = batching.score_batches(
        [group for _, group in rows], batch_size, multiple_of=mesh.shape["data"]
    )
    done = 0
    for batch, members in feed.prefetch(batches):
        # one choice a row: [B, 1, Lt] -> [B, Lt]
        flat = {name: array[:, 0] if array.ndim == 3 else array for name, array in batch.items()}
        flat["tasks"] = np.zeros(len(flat["encoder_input_tokens"]), np.int32)
        flat["tasks"][: len(members)] = [number_of[id(group)] for group in members]
        sharded = partitioning.shard_batch(flat, mesh)
        totals = probe(params, sharded, sharded.pop("tasks"), totals)
        done += len(members)
        if bar is not None:
            bar.report_if_due(done, "examples")
    return jax.device_get(totals)


def mean_probs(totals: "probe_lib.ProbeTotals", tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{site: {task: [E]}}: each task's mean distribution over experts at every router."""
    from pemoe_jax.analysis.routing import metrics

    return {
        site: dict(zip(tasks, metrics.mean_distributions(totals, site), strict=True))
        for site in totals.probs
    }


def select_sites(patterns: Sequence[str] | None, experts: Mapping[str, int]) -> list[str]:
    """Sites by patterns, in the order of layers.

    Args:
      patterns: shell-style, of names such as 'decoder/layers_3/mlp/gate'; None: all of the last
        block that has routers (of the decoder, as arXiv 2309.05444 looks at).
      experts: {site: E} of every router.

    Raises:
      InputError: one matches nothing, or the sites differ in E.
    """
    if patterns is None:
        last = list(experts)[-1].split("/")[:2]
        return [site for site in experts if site.split("/")[:2] == last]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise InputError(f"ROUTES_SITES must be a list of patterns of sites, found {patterns!r}")
    found = set()
    for pattern in patterns:
        sites = [site for site in experts if fnmatch.fnmatchcase(site, pattern)]
        if not sites:
            close = difflib.get_close_matches(pattern.strip("*"), experts, n=1, cutoff=0.0)
            raise InputError(
                f"ROUTES_SITES {pattern!r} matched none of {len(experts)} sites with routers;"
                f" they have names such as {close[0]!r}"
            )
        found.update(sites)
    sizes = collections.Counter(experts[site] for site in found)
    if len(sizes) != 1:
        raise InputError(
            "ROUTES_SITES: expected sites of one number of experts, or at least one site, found"
            f" sites of {sorted(sizes)} experts"
        )
    return [site for site in experts if site in found]
