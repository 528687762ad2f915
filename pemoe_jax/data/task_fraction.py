"""Draws a fraction of a mixture's tasks by seed, and registers it as a mixture of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.data import seqio_import, seqio_tasks


def draw_tasks(tasks: Collection[str], fraction: float, seed: int) -> list[str]:
    """Returns the sorted names of round(fraction · len(tasks)) tasks.

    Tasks are drawn in the order of hashes that depend on their names and the seed alone. So the
    tasks of a smaller fraction are among those of a larger one with the same seed.
    """

    # Not `hash`, which differs between processes.
    def hash_task(task: str) -> bytes:
        return hashlib.sha256(f"{seed} {task}".encode()).digest()

    return sorted(sorted(tasks, key=hash_task)[: round(fraction * len(tasks))])


def register_fraction(name: str, fraction: float, seed: int, use_cached: bool = False) -> str:
    """Registers a mixture of a random fraction of a mixture's tasks, at their rates in it.

    Only tasks with training data count.

    Args:
      name: name of a seqio mixture, or of a task.
      fraction: the fraction, in (0, 1].
      seed: seed of the draw.
      use_cached: whether tasks are read from seqio's offline caches.

    Returns:
      The name of the new mixture; `name` itself if the fraction is 1, or if `name` is a task and
      the fraction rounds to 1.

    Raises:
      InputError: the fraction is out of range or rounds to no task, or `name` is not registered.
    """
    provider = seqio_tasks.get_mixture_or_task(name)
    if not 0 < fraction <= 1:
        raise InputError(f"TASK_FRACTION must be a number in (0, 1], got {fraction!r}")
    if fraction == 1:
        return name
    # P3's mixtures have hundreds of tasks, but a folder may have the data of only a few.
    tasks = {
        task.name: task
        for task in map(seqio_tasks.get_mixture_or_task, seqio_tasks.subtask_names(name))
        if "train" in task.splits and seqio_tasks.has_data(task.name, use_cached)
    }
    drawn = draw_tasks(tasks, fraction, seed)
    if not drawn:
        raise InputError(
            f"TASK_FRACTION must leave a task of {name!r}, which has {plural(len(tasks), 'task')}"
            f" to train on, got {fraction}"
        )
    if drawn == [name]:  # `name` is a task
        return name
    seqio = seqio_import.import_seqio()
    fraction_name = f"{name}_fraction_{fraction:g}_seed_{seed}"
    # The new mixture has the sampling function and the class of the old one. The class may be a
    # `SeekableMixture`, which reads all tasks in one pipeline.
    mixture = type(provider)(
        fraction_name,
        [(tasks[task], provider.get_rate) for task in drawn],
        sample_fn=provider._sample_fn,
    )
    # An earlier run of this process may have registered it, with data of another folder.
    seqio.MixtureRegistry.remove(fraction_name)
    seqio.MixtureRegistry.add_provider(fraction_name, mixture)
    return fraction_name
