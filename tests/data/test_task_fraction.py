"""A fraction of a mixture's tasks: which tasks are drawn, and the mixture of them."""

import itertools

import data_tasks
import numpy as np
import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import feed, seqio_tasks, task_fraction

TASKS = [f"task_{number}" for number in range(40)]
FRACTIONS = (0.025, 0.1, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return data_tasks.register(tmp_path_factory.mktemp("data"))


def test_a_smaller_fraction_is_part_of_a_larger_one():
    for seed in range(5):
        draws = [task_fraction.draw_tasks(TASKS, fraction, seed) for fraction in FRACTIONS]
        assert [len(draw) for draw in draws] == [1, 4, 10, 20, 30, 40]
        assert all(set(small) < set(large) for small, large in itertools.pairwise(draws))


def test_a_draw_depends_on_the_seed_and_not_on_the_order_of_tasks():
    draws = {tuple(task_fraction.draw_tasks(TASKS, 0.25, seed)) for seed in range(20)}
    assert len(draws) == 20
    assert set(itertools.chain(*draws)) == set(TASKS)
    assert task_fraction.draw_tasks(TASKS[::-1], 0.25, 3) == task_fraction.draw_tasks(
        TASKS, 0.25, 3
    )


def test_a_mixture_of_a_fraction_has_its_tasks_at_their_rates(registered):
    assert task_fraction.register_fraction("jsonl_train", 1.0, 0) == "jsonl_train"
    names = {}
    for seed in range(8):
        name = task_fraction.register_fraction("jsonl_train", 0.5, seed)
        (task,) = seqio_tasks.subtask_names(name)
        names[task] = name
    assert names.keys() == {"a", "b"}
    whole = seqio_tasks.get_mixture_or_task("jsonl_train")
    for task, name in names.items():
        mixture = seqio_tasks.get_mixture_or_task(name)
        assert type(mixture) is type(whole)
        assert mixture.get_rate(mixture.tasks[0]) == whole.get_rate(mixture.tasks[0]) > 1
        batches = [
            next(feed.train_batches(source, data_tasks.LENGTHS, 4)) for source in (name, task)
        ]
        assert np.array_equal(*(batch["encoder_input_tokens"] for batch in batches))


def test_a_fraction_of_a_users_mixture_keeps_its_sampling(registered):
    import seqio

    def sample(datasets, **settings):
        return datasets[0]

    seqio.MixtureRegistry.remove("users_mixture")
    seqio.MixtureRegistry.add("users_mixture", [("a", 2.0), ("b", 5.0)], sample_fn=sample)
    try:
        name = task_fraction.register_fraction("users_mixture", 0.5, 0)
        mixture = seqio_tasks.get_mixture_or_task(name)
        assert mixture._sample_fn is sample
        assert mixture.total_rate == {"a": 2.0, "b": 5.0}[mixture.tasks[0].name]
    finally:
        seqio.MixtureRegistry.remove("users_mixture")


def test_t5x_reads_the_same_mixture(registered):
    from pemoe_jax.t5x_bridge import data

    name = data.mixture_or_task("jsonl_train", lambda: None, 0.5, 3)
    assert name == task_fraction.register_fraction("jsonl_train", 0.5, 3)
    assert data.training_record(name)["trained_tasks"] == seqio_tasks.subtask_names(name)
    assert len(seqio_tasks.subtask_names(name)) == 1


@pytest.mark.parametrize(
    ("name", "fraction", "message"),
    [
        ("jsonl_train", 1.5, r"TASK_FRACTION must be a number in \(0, 1\], got 1.5"),
        ("jsonl_train", 0.1, "TASK_FRACTION must leave a task of 'jsonl_train', which has 2 tasks"),
        ("a", 0.5, "TASK_FRACTION must leave a task of 'a', which has 1 task to train on, got 0.5"),
        ("plain", 0.9, "TASK_FRACTION must leave a task of 'plain', which has 0 tasks to train on"),
    ],
)
def test_a_fraction_that_leaves_no_task(registered, name, fraction, message):
    with pytest.raises(InputError, match=message):
        task_fraction.register_fraction(name, fraction, 0)
