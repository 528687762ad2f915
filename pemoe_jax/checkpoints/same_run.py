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

    Settings that either record leaves unknown are not compared: records of earlier versions lack
    some fields, and `base` may be empty. So the settings can be compared before the base is read,
    which may take minutes.

    Args:
      folder: the MODEL_DIR, for the message.
      saved: the checkpoint's record.
      current: the record of the resumed run.
      allow_changes: whether changes of the data, the seed and the batches are accepted.

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
    """Whether a run may have frozen parameters that are drawn from its seed, and are not saved."""
    # FREEZE may match adapters too ('all_but_router'), and adapters are always drawn.
    has_freeze = freezing.parse_patterns(record.trainable)[1] is not None
    is_base_drawn = record.base["path"] is None or "upcycled" in record.base
    return has_freeze or (record.base["needed"] and is_base_drawn)


def _data_differences(saved: Record, current: Record) -> Iterator[str]:
    """Yields the differences that `allow_changes` accepts, in seed, tasks and batches."""
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
    # With another method, all of these differ. The names of the methods, which are compared below,
    # say enough.
    if saved.method == current.method:
        for settings, record in ((before, saved), (after, current)):
            patterns, freeze = freezing.parse_patterns(record.trainable)
            settings |= {"TRAINABLE": patterns, "FREEZE": freeze}
        yield from adapter_differences(saved.adapters, current.adapters)
        yield from sparse_differences(saved.sparse, current.sparse)
    for name, value in before.items():
        if name in after and after[name] != value:
            yield f"{name} {value!s:.60} -> {after[name]!s:.60}"
    # A fingerprint covers a sample of the values, a checksum all of them. If the fingerprints
    # differ, the loop above has yielded that already.
    has_same_sample = before.get("base fingerprint") == after.get("base fingerprint")
    first, second = (record.base.get("checksum") for record in (saved, current))
    if saved.base["needed"] and has_same_sample and checksums.is_other(first, second):
        yield f"base checksum {first} -> {second}"
    yield from _initial_differences(saved, current)


def _settings(record: Record, saved: Record) -> dict[str, Any]:
    """Returns name -> value of the settings that must not change when a run resumes.

    Args:
      record: the record to read the settings from. Unknown settings are left out.
      saved: the checkpoint's record, which determines whether the base and SEED are included.
    """
    base = record.base if saved.base["needed"] else {}
    settings = {
        "method": record.method,
        "SEED": record.seed if _draws_frozen_parameters(saved) else None,
        "OPTIMIZER": record.optimizer,
        "fingerprint of VOCAB_PATH": record.vocabulary,
        # Dropout may change. `sentence_table.check_same_encoder` compares the sentence encoder and
        # its size.
        **{
            f"T5Config.{name}": value
            for name, value in record.config.items()
            if name not in ("dropout_rate", "sentence_dim")
        },
        "base fingerprint": base.get("fingerprint"),
        # Records from before quantization lack the field.
        "FROZEN_DTYPE": base.get("frozen_dtype", "activations") if base else None,
        "UPCYCLE_NOISE": base.get("upcycled", {}).get("noise"),
    }
    known = {name: value for name, value in settings.items() if value is not None}
    # None is a legitimate value of a T5Config field; elsewhere it means "unknown".
    return known | {name: value for name, value in settings.items() if name.startswith("T5Config.")}


def _initial_differences(saved: Record, current: Record) -> Iterator[str]:
    """Yields a line if the runs started from different initial runs (see `initial_run`)."""
    if not current.base:  # `initial` is known only once the base is read
        return
    before, after = (
        "none" if record.initial is None else record.initial["fingerprint"]
        for record in (saved, current)
    )
    # Earlier versions recorded an initial run that trained the whole model only as the base.
    if saved.initial is None and after == saved.base.get("fingerprint"):
        return
    if before != after:
        yield f"INITIAL_CHECKPOINT_PATH, a run with fingerprint {before} -> {after}"


def adapter_differences(
    saved: Mapping[str, Mapping[str, Any]], current: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yields differences of adapters, such as 'num_experts 10 -> 5 at key, value, gate'."""
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
    """Yields differences of sparse layers, such as 'NUM_EXPERTS 8 -> 4'."""
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
    """Returns the fields of an adapter's description, with the router's as 'router.<field>'."""
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
