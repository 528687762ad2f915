"""Checks that a resumed run has the settings that its checkpoint records."""

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import freezing
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import checksums


def check_same_run(
    folder: str | os.PathLike[str], saved: Record, current: Record, allow_changes: bool = False
) -> list[str]:
    """Raises InputError, with every difference, if a run cannot resume from a checkpoint.

    Unknown fields are not compared: those that are None (in records of earlier versions) and an
    empty `base`. So the settings can be compared before the base is read.

    Args:
      folder: the MODEL_DIR, for the message.
      saved: the checkpoint's record.
      current: the record of the resumed run.
      allow_changes: whether other data, another seed and other batches are accepted.

    Returns:
      The accepted differences.
    """
    state_changes = [*_differences(saved, current)]
    data_changes = [*_data_differences(saved, current)]
    if state_changes or (data_changes and not allow_changes):
        advice = "change them back" + ("" if state_changes else ", pass --allow_changes")
        raise InputError(
            f"{folder}: expected the settings of its checkpoint to resume, got"
            f" {'; '.join(state_changes + data_changes)}: {advice}, or choose another MODEL_DIR"
        )
    return data_changes


def _draws_frozen_parameters(record: Record) -> bool:
    """Whether the seed initializes frozen parameters, which the checkpoint does not hold."""
    has_freeze = freezing.parse_patterns(record.trainable)[1] is not None
    is_drawn = record.base["path"] is None or "upcycled" in record.base
    return has_freeze or (record.base["needed"] and is_drawn)


def _data_differences(saved: Record, current: Record) -> Iterator[str]:
    """Yields differences of seed, tasks and batches, which `allow_changes` accepts."""
    if saved.seed != current.seed and not _draws_frozen_parameters(saved):
        yield f"SEED {saved.seed} -> {current.seed}"
    yield from _changed_names("training tasks", saved.trained_tasks, current.trained_tasks)
    yield from _changed_names("held-out datasets", saved.held_out, current.held_out)
    before, after = saved.batches or {}, current.batches or {}
    for name in before:
        if name in after and before[name] != after[name]:
            yield f"{name} {before[name]!s:.60} -> {after[name]!s:.60}"


def _differences(saved: Record, current: Record) -> Iterator[str]:
    """Yields differences that make the checkpoint's state unusable."""
    before, after = _settings(saved, saved), _settings(current, saved)
    if saved.method == current.method:  # otherwise everything differs
        for settings, record in ((before, saved), (after, current)):
            patterns, freeze = freezing.parse_patterns(record.trainable)
            settings |= {"TRAINABLE": patterns, "FREEZE": freeze}
        yield from adapter_differences(saved.adapters, current.adapters)
        yield from sparse_differences(saved.sparse, current.sparse)
    for name, value in before.items():
        if name in after and after[name] != value:
            yield f"{name} {value!s:.60} -> {after[name]!s:.60}"
    # The fingerprint hashes a sample of the values. If it differs, the loop above has said so.
    is_same = before.get("base fingerprint") == after.get("base fingerprint")
    first, second = (record.base.get("checksum") for record in (saved, current))
    if saved.base["needed"] and is_same and checksums.is_other(first, second):
        yield f"base checksum {first} -> {second}"
    yield from _initial_differences(saved, current)


def _settings(record: Record, saved: Record) -> dict[str, Any]:
    """Returns the settings that must not change on resuming, by their user-facing names.

    Args:
      record: the record of the settings; unknown ones are left out.
      saved: the checkpoint's record, which determines whether the base and SEED count.
    """
    base = record.base if saved.base["needed"] else {}
    settings = {
        "method": record.method,
        "SEED": record.seed if _draws_frozen_parameters(saved) else None,
        "OPTIMIZER": record.optimizer,
        "fingerprint of VOCAB_PATH": record.vocabulary,
        # Dropout may change; the sentence encoder and its size are compared separately
        # (`sentence_table.check_same_encoder`).
        **{
            f"T5Config.{name}": value
            for name, value in record.config.items()
            if name not in ("dropout_rate", "sentence_dim")
        },
        "base fingerprint": base.get("fingerprint"),
        # Runs from before quantization recorded none.
        "FROZEN_DTYPE": base.get("frozen_dtype", "activations") if base else None,
        "UPCYCLE_NOISE": base.get("upcycled", {}).get("noise"),
    }
    known = {name: value for name, value in settings.items() if value is not None}
    # None is a value of these, not an unknown one.
    return known | {name: value for name, value in settings.items() if name.startswith("T5Config.")}


def _initial_differences(saved: Record, current: Record) -> Iterator[str]:
    """Yields a line if the two runs continue from different runs."""
    if not current.base:  # `initial` is known only once the base is read
        return
    before, after = (
        "none" if record.initial is None else record.initial["fingerprint"]
        for record in (saved, current)
    )
    # Earlier versions recorded a fully fine-tuned initial run only as the base.
    if saved.initial is None and after == saved.base.get("fingerprint"):
        return
    if before != after:
        yield f"INITIAL_CHECKPOINT_PATH, a run with fingerprint {before} -> {after}"


def adapter_differences(
    saved: Mapping[str, Mapping[str, Any]], current: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yields lines such as 'num_experts 10 -> 5 at key, value, gate'."""
    if saved.keys() != current.keys():
        before, after = (", ".join(sites) or "none" for sites in (saved, current))
        yield f"adapters at {before} -> {after}"
        return
    changes: dict[str, list[str]] = {}
    for site in saved:
        old, new = _flatten(saved[site]), _flatten(current[site])
        for name in old | new:
            if old.get(name) != new.get(name):
                change = f"{name} {old.get(name)} -> {new.get(name)}"
                changes.setdefault(change, []).append(site)
    yield from (f"{change} at {', '.join(names)}" for change, names in changes.items())


def sparse_differences(
    saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None
) -> Iterator[str]:
    """Yields lines such as 'NUM_EXPERTS 8 -> 4'."""
    if saved is None or current is None:
        if saved is not current:
            yield f"sparse layers {_describe(saved)} -> {_describe(current)}"
        return
    for name in dict(saved) | dict(current):
        # Dropout may change.
        if name != "expert_dropout_rate" and saved.get(name) != current.get(name):
            yield f"{name.upper()} {saved.get(name)} -> {current.get(name)}"


def _describe(sparse: Mapping[str, Any] | None) -> str:
    return "none" if sparse is None else f"with {sparse['num_experts']} experts"


def _flatten(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an adapter, those of its router as 'router.<field>'."""
    router = description.get("router")
    fields = {name: value for name, value in description.items() if name != "router"}
    if isinstance(router, Mapping):
        return fields | {f"router.{name}": value for name, value in router.items()}
    return fields | ({} if router is None else {"router": router})


def _changed_names(
    title: str, saved: Collection[str] | None, current: Collection[str] | None
) -> Iterator[str]:
    """Yields a line such as 'training tasks without a, b, with c'."""
    if saved is None or current is None or set(saved) == set(current):
        return
    changes = []
    for word, names in (
        ("without", set(saved) - set(current)),
        ("with", set(current) - set(saved)),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            changes.append(f"{word} {', '.join(sorted(names)[:3])}{more}")
    yield f"{title} {', '.join(changes)}"
