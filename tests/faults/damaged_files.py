"""Damages files and reads them: each reader must read a file, or refuse it in one line.

    python tests/faults/damaged_files.py [--cases 2000] [--seed 0] [--reader NAME] [--record]

Each reader runs in a process of its own, with a limit of memory, and a limit of seconds for each
file. The damage is drawn with the seed: changed bytes, replaced values of JSON and msgpack, and
replaced lines of YAML. Values that are read are compared with those of the undamaged file.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import pathlib
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import summary

ROOT = pathlib.Path(__file__).resolve().parents[2]
# For the package, and for the tests' helper modules, such as `archives`.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CPU_SECONDS = 20  # for one file; reading an intact one takes about a thousandth of this
SECONDS = 600  # for one file on the clock, since the machine may be busy
MEMORY = 6 << 30  # bytes of a process's data (RLIMIT_DATA), mapped files excluded
# Refused in one line, read with the same values, read with other values; or a failure: any other
# exception, or too long.
OUTCOMES = ("clear", "same", "changed", "traceback", "hang")


class Reader(NamedTuple):
    """A reader and the files that it reads.

    Attributes:
      read: reads all of the files; the `repr` of its result shows all values.
      files: the files to damage.
      checksum: the checksum that detects changed values; None: the format has none.
    """

    read: Callable[[], object]
    files: list[pathlib.Path]
    checksum: str | None = None


# --- damage ---

# Integers at which fields of 8, 16, 32 or 64 bits overflow.
_INTEGERS = (0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns a file with one to three places damaged."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(data)
        at, length = rng.randrange(size + 1), min(rng.choice((1, 1, 2, 4, 8, 64)), size)
        kind = rng.randrange(8)
        if kind == 0 and at < size:  # flips a bit
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:  # overwrites some bytes
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif kind == 2:  # truncates
            del data[at:]
        elif kind == 3:  # removes some bytes
            del data[at : at + length]
        elif kind == 4:  # inserts some bytes
            data[at:at] = rng.randbytes(length)
        elif kind == 5:  # repeats a part of the file
            start = rng.randrange(size + 1)
            data[at:at] = data[start : start + 16 * length]
        elif kind == 6:  # overwrites an integer
            width = rng.choice((4, 8))
            number = rng.choice(_INTEGERS) % 256**width
            data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        else:  # overwrites a character by one that has a meaning in a text format
            data[at : at + 1] = rng.choice(
                (b"-", b'"', b"{", b"]", b"\0", b"\xff", b"\n", b"9" * 40)
            )
    return bytes(data)


# Values of every JSON type, most of them unexpected anywhere.
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**30, "", "x", "\ud800", "../x"),
    *([], {}, [[]], [None], {"x": None}, ["x"], [-1], [2**63], "x" * 10_000),
)


def damage_json(value: Any) -> Iterator[Any]:
    """Yields other JSON values, then copies of `value` with one value or key replaced.

    Of large values, only some places are damaged: those in the first 40 items of each object or
    list, and at most 60 of these.
    """
    yield from _VALUES

    def places(node: Any, path: tuple) -> Iterator[tuple]:
        """Yields the path of each value inside a node: keys and indices from the root."""
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in [*items][:40]:
            yield (*path, key)
            if isinstance(child, (dict, list)):
                yield from places(child, (*path, key))

    paths = [*places(value, ())] if isinstance(value, (dict, list)) else []
    for path in paths[:: len(paths) // 60 + 1]:
        for new in (*_VALUES, None):
            changed = copy.deepcopy(value)
            node = changed
            for key in path[:-1]:
                node = node[key]
            # In an object, None stands for another key.
            if new is None and isinstance(node, dict):
                node["unknown" if path[-1] in node else ""] = node.pop(path[-1])
            else:
                node[path[-1]] = new
            yield changed


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def structural_cases(path: pathlib.Path, content: bytes) -> Iterator[bytes]:
    """Yields the file with each kind of damage that fits its format."""
    yield from (b"", b"\0", b"\n", b"[]", b"\xef\xbb\xbf" + content, content * 2, content[:-1])
    # Deep nesting overflows the stack of a recursive parser.
    yield from (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe", b"null", b"&a [*a]")
    # A file that git-lfs has not downloaded.
    yield b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        for changed in damage_json(json.loads(lines[0])):
            yield b"\n".join([_json_bytes(changed), *lines[1:]]) + b"\n"
    elif path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", content[:8])
        for changed in damage_json(json.loads(content[8 : 8 + size])):
            header = _json_bytes(changed)
            yield struct.pack("<Q", len(header)) + header + content[8 + size :]
    elif path.suffix == ".json" or path.name == "metadata":
        for changed in damage_json(json.loads(content)):
            yield _json_bytes(changed)
    elif path.suffix == ".yaml":
        text = content.decode()
        for line in {*text.splitlines()}:
            for new in ("", "  - x", f"{line}\n{line}", line.replace(":", ": !!python/none"), "\t"):
                yield text.replace(line, new).encode()
    elif path.name == "checkpoint":
        from flax import serialization

        for changed in damage_json(serialization.msgpack_restore(content)):
            with contextlib.suppress(Exception):  # what msgpack cannot write
                yield serialization.msgpack_serialize(changed)


# --- readers ---
# Each function writes intact files to a folder and returns their reader. Packages are imported
# inside, so that a reader's process imports only what it needs.


def _make_record() -> Any:
    from pemoe_jax.checkpoints.records import Record

    base = {"path": None, "seed": 0, "fingerprint": "", "needed": False}
    return Record("mov", [".*"], {"emb_dim": 8}, {}, base, {"trainable": 1}, {})


def _read_arrays(arrays: dict) -> list:
    values = [(path, array.read()) for path, array in arrays.items()]
    return sorted((path, array.dtype, array.shape, array.tobytes()) for path, array in values)


def _safetensors(folder: pathlib.Path) -> Reader:
    import numpy as np
    from etils import epath

    from pemoe_jax.checkpoints import safetensors_file

    path = folder / "x.safetensors"
    header, arrays = {}, {"a": np.arange(12, dtype="f4"), "b": np.ones((3, 2), "f4")}
    offset = 0
    for name, array in arrays.items():
        offsets = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": "F32", "shape": [*array.shape], "data_offsets": offsets}
    text = json.dumps(header).encode()
    content = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return Reader(lambda: _read_arrays(safetensors_file.open_file(epath.Path(path))[0]), [path])


def _torch(folder: pathlib.Path) -> Reader:
    import archives
    from etils import epath

    from pemoe_jax.checkpoints import torch_pickle

    path = archives.unpack("hf_files", folder) / "tensors.bin"
    return Reader(
        lambda: _read_arrays(torch_pickle.open_file(epath.Path(path))), [path], "the zip's CRC-32"
    )


def _t5x(folder: pathlib.Path) -> Reader:
    import archives
    from etils import epath

    from pemoe_jax.checkpoints import t5x

    step = archives.unpack("t5x_legacy", folder) / "checkpoint_7"
    files = [step / "checkpoint", *sorted(step.glob("target.*/.zarray"))[:3]]
    files += sorted(step.glob("target.*/0*"))[:3]
    return Reader(lambda: _read_arrays(t5x.open_checkpoint(epath.Path(step))), files)


def _t5x_orbax(folder: pathlib.Path) -> Reader:
    import archives
    from etils import epath

    from pemoe_jax.checkpoints import t5x

    step = archives.unpack("t5x_orbax", folder) / "checkpoint_7"
    files = [path for path in sorted((step / "state").rglob("*")) if path.is_file()]
    return Reader(lambda: _read_arrays(t5x.open_checkpoint(epath.Path(step))), files)


def _checkpoint(folder: pathlib.Path) -> Reader:
    import jax.numpy as jnp
    import optax

    from pemoe_jax.checkpoints import runs
    from pemoe_jax.core import steps

    state = steps.TrainState.create({"a": jnp.arange(6.0), "b": jnp.ones((2, 3))}, optax.adamw(0.1))
    checkpoints = runs.RunCheckpoints(str(folder / "run"))
    checkpoints.save(state, _make_record(), {"examples": [5]})
    checkpoints.close()
    step = folder / "run" / "checkpoint_0"
    files = [path for path in sorted(step.rglob("*")) if path.is_file()]
    return Reader(
        lambda: _read_arrays(runs.open_trained(str(step))[0]), files, "a CRC-32C of each file"
    )


def _adapter(folder: pathlib.Path) -> Reader:
    reader = _adapter_files(folder)
    return reader._replace(files=reader.files[:1], checksum="a CRC-32C of each block")


def _adapter_config(folder: pathlib.Path) -> Reader:
    reader = _adapter_files(folder)
    return reader._replace(files=reader.files[1:])


def _adapter_files(folder: pathlib.Path) -> Reader:
    import numpy as np

    from pemoe_jax.checkpoints import adapter_file

    arrays = {"a/kernel": np.arange(12, dtype="f4"), "b/kernel": np.ones((3, 2), "f4")}
    adapter_file.save_adapter(folder / "adapter", arrays, _make_record(), 5)
    files = [folder / "adapter" / name for name in (adapter_file.WEIGHTS, adapter_file.CONFIG)]

    def read() -> object:
        arrays, *rest = adapter_file.open_adapter(folder / "adapter")
        return _read_arrays(arrays), rest

    return Reader(read, files)


def _record(folder: pathlib.Path) -> Reader:
    import dataclasses

    from pemoe_jax.checkpoints import runs

    step = folder / "run" / "checkpoint_3"
    files = [step / "record" / "metadata", step / "feed" / "metadata"]
    for file, content in zip(
        files, (dataclasses.asdict(_make_record()), {"examples": [5, 6]}), strict=True
    ):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    return Reader(
        lambda: (runs.read_record(str(step)), runs.read_data_position(str(step), 3)), files
    )


def _index(folder: pathlib.Path) -> Reader:
    import jsonl_folder

    from pemoe_jax.tasks.jsonl import files as jsonl_files

    jsonl_folder.write_folder(folder / "tasks")
    path = folder / "tasks" / "INDEX.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(dict([*index.items()][:2])))
    return Reader(lambda: jsonl_files.read_index(path), [path])


def _json_lines(folder: pathlib.Path) -> Reader:
    from pemoe_jax.tasks.jsonl import files as jsonl_files

    path = folder / "train.jsonl"
    row = {"inputs": "what is snow", "targets": "white", "answer_choices": ["white", "red"]}
    path.write_text("".join(json.dumps(row | {"inputs": f"what {n}"}) + "\n" for n in range(4)))

    def read() -> object:
        jsonl_files.scan_file(str(path))
        lines = enumerate(path.read_bytes().split(b"\n"))
        return [jsonl_files.parse_line(line, f"{path}, {n}") for n, line in lines if line.strip()]

    return Reader(read, [path])


def _tfrecords(folder: pathlib.Path) -> Reader:
    reader = _tfrecord_files(folder)
    return reader._replace(files=reader.files[:1], checksum="a CRC-32C of each row")


def _tfrecord_info(folder: pathlib.Path) -> Reader:
    reader = _tfrecord_files(folder)
    return reader._replace(files=reader.files[1:])


def _tfrecord_files(folder: pathlib.Path) -> Reader:
    import p3_forms

    from pemoe_jax.data import tfrecords

    row = {"inputs_pretokenized": "a b", "targets_pretokenized": "c", "inputs": [3, 4, 1]}
    row |= {"targets": [5, 1], "answer_choices": ["c", "d"]}
    p3_forms.write_cache_split(folder / "task", "train", [row] * 5)

    def read() -> object:
        reader = tfrecords.TFRecordReader(folder / "task", "train", lambda: 100)
        return reader.read_rows(range(reader.num_rows))

    (records,) = (folder / "task").glob("*.tfrecord-*")
    files = [records, folder / "task" / "info.train.json", folder / "task" / "stats.train.json"]
    return Reader(read, files)


def _parquet(folder: pathlib.Path) -> Reader:
    import pyarrow
    from pyarrow import parquet

    from pemoe_jax.tasks.p3 import tables

    path = folder / "train.parquet"
    columns = {"inputs": ["a b"] * 20, "label": [*range(20)], "choices": [["x", "y"]] * 20}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=8)

    def read() -> object:
        table = tables.open_table([path])
        return table.take([*range(table.num_rows)][:100])

    return Reader(read, [path])


def _templates(folder: pathlib.Path) -> Reader:
    import p3_forms

    from pemoe_jax.tasks.p3 import template_files, template_limits

    path = folder / "templates.yaml"
    path.write_text(p3_forms.YAML["super_glue", "rte"])
    example = {"premise": "a", "hypothesis": "b", "label": 1}

    def read() -> object:
        texts = []
        for name, template in template_files.read_templates(path).items():
            # An example that a template cannot render is left out and counted.
            with contextlib.suppress(template_limits.TemplateError):
                texts.append((name, template.apply(example)))
        return texts

    return Reader(read, [path])


def _sentences(folder: pathlib.Path) -> Reader:
    import numpy as np

    from pemoe_jax.data import sentence_table

    table = folder / "table"
    encoder = {"name": "e", "dim": 3, "fingerprint": "f"}
    writer = sentence_table.TableWriter(table, encoder, "float32", "v", 8)
    inputs = [np.arange(n + 1) for n in range(4)]
    writer.add([sentence_table.input_key(ids) for ids in inputs], np.ones((4, 3), "f4"))
    writer.finish()

    def read() -> object:
        opened = sentence_table.SentenceTable(table)
        rows = opened.rows(inputs)
        return rows.tolist(), [row.tolist() for row in opened.vectors(rows[rows >= 0])]

    files = [path for path in table.rglob("*") if path.suffix in (".json", ".npy")]
    return Reader(read, sorted(files), "a CRC-32C of each file")


def _results(folder: pathlib.Path) -> Reader:
    from pemoe_jax.analysis.zero_shot import paper_table
    from pemoe_jax.analysis.zero_shot import results as results_lib

    task = results_lib.task_result([True, False], [0.5, 0.5], "cb", "test", [])
    run = {"name": "r", "method": "mov", "variant": "mov-10", "checkpoint": "r", "step": 5}
    run |= {"trainable": 32, "total": 100, **results_lib.summarize({"cb_a": task})}
    path = folder / "results.json"
    path.write_text(json.dumps({"runs": [{**run, "tasks": {"cb_a": task}}]}))
    lines = folder / "predictions" / "r" / "cb_a.jsonl"
    lines.parent.mkdir(parents=True)
    lines.write_text('{"idx": 0, "correct": true}\n{"idx": 1, "correct": false}\n')

    def read() -> object:
        runs = results_lib.merge_runs([results_lib.load_results(str(path))])
        return runs, paper_table.build_paper_table(runs, 2, 0, [], False)

    return Reader(read, [path, lines])


def _metrics(folder: pathlib.Path) -> Reader:
    from pemoe_jax.analysis import plots
    from pemoe_jax.runtime import progress, step_times

    path = folder / "metrics.jsonl"
    rows = [{"step": n, "train/loss": 2.0, "train/step_seconds": 0.1} for n in (1, 4, 8)]
    rows = [{**row, step_times.DEVICE: "cpu", step_times.BATCH: "8"} for row in rows]
    path.write_text("".join(json.dumps(row | {"eval/loss": 1.5}) + "\n" for row in rows))

    def read() -> object:
        best = progress.best_step(path, "eval/loss", {4, 8})
        times = step_times.read_step_times(path, 8)
        return best, times, plots._read_metrics(path), progress.truncate_metrics(path, 8)

    return Reader(read, [path])


READERS: dict[str, Callable[[pathlib.Path], Reader]] = {
    "checkpoints of `pemoe train`": _checkpoint,
    "their record and position": _record,
    "adapters": _adapter,
    "`adapter_config.json`": _adapter_config,
    "safetensors of other programs": _safetensors,
    "`pytorch_model.bin`": _torch,
    "T5X's checkpoints, zarr": _t5x,
    "T5X's checkpoints, OCDBT": _t5x_orbax,
    "`INDEX.json`": _index,
    "JSON lines": _json_lines,
    "tfrecords": _tfrecords,
    "`info` and `stats` of tfrecords": _tfrecord_info,
    "Parquet": _parquet,
    "`templates.yaml`": _templates,
    "sentence tables": _sentences,
    "results and predictions": _results,
    "`metrics.jsonl`": _metrics,
}


# --- running ---


class _TooLong(BaseException):
    """A reader took too long. Not an Exception, so that no reader catches it."""


def _raise_too_long(*_: object) -> None:
    raise _TooLong


def run_reader(name: str, num_cases: int, seed: int = 0) -> dict[str, Any]:
    """Reads damaged files in this process.

    At most half of the cases, drawn at random, are `structural_cases`; the others are files with
    randomly damaged bytes.

    Args:
      name: the reader, a key of `READERS`.
      num_cases: number of damaged files.
      seed: seed of the damage.

    Returns:
      The number of cases with each outcome, 'cases', 'checksum', and 'errors', a line for each kind
      of traceback.
    """
    from pemoe_jax.core.errors import InputError

    rng = random.Random(f"{seed} {name}")
    counts: collections.Counter[str] = collections.Counter()
    errors: dict[str, str] = {}
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _raise_too_long)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[name](pathlib.Path(folder))
        good = {path: path.read_bytes() for path in reader.files}
        expected = repr(reader.read())
        cases = [(path, case) for path in good for case in structural_cases(path, good[path])]
        rng.shuffle(cases)
        cases = cases[: num_cases // 2]
        while len(cases) < num_cases:
            path = rng.choice(reader.files)
            cases.append((path, damage_bytes(good[path], rng)))
        for number, (path, case) in enumerate(cases):
            path.write_bytes(case)
            signal.alarm(SECONDS)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    outcome = "same" if repr(reader.read()) == expected else "changed"
            except InputError as error:
                outcome = "clear" if "\n" not in str(error).strip() else "traceback"
            except _TooLong:
                outcome = "hang"
            except Exception as error:
                outcome = "traceback"
                # Reported once for each type and line of the code that raised it.
                frame = error.__traceback__
                while frame is not None and frame.tb_next is not None:
                    frame = frame.tb_next
                line = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
                key = f"{type(error).__name__}: {str(error)[:100]!r} at {line}"
                errors.setdefault(key.split(": ")[0] + line, f"{path.name}, case {number}: {key}")
            finally:
                signal.alarm(0)
                signal.setitimer(signal.ITIMER_PROF, 0)
            counts[outcome] += 1
            # Readers of .jsonl may have rewritten the file, as `truncate_metrics` does.
            for file, content in good.items():
                if file == path or file.suffix == ".jsonl":
                    file.write_bytes(content)
    return {
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        **{"cases": len(cases), "checksum": reader.checksum, "errors": [*errors.values()]},
    }


def run_all(num_cases: int, names: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """Runs each reader in a process; if the process dies or hangs, all its cases count as hangs."""
    results = {}
    for name in names:
        flags = [f"--cases={num_cases}", f"--seed={seed}", f"--reader={name}"]
        command = [sys.executable, __file__, *flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
            results[name] = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            last = "" if isinstance(error, subprocess.TimeoutExpired) else done.stderr[-500:]
            empty = dict.fromkeys(OUTCOMES, 0)
            errors = [f"{type(error).__name__}: {last}"]
            results[name] = {**empty, "hang": num_cases, "cases": num_cases}
            results[name] |= {"checksum": None, "errors": errors}
        print(name, results[name], flush=True)
    return results


def is_bad(result: dict[str, Any]) -> bool:
    """Returns whether a reader failed, or read other values although its format has a checksum."""
    return bool(result["traceback"] or result["hang"] or (result["checksum"] and result["changed"]))


def main() -> int:
    """Runs the command; returns 1 if a reader is bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument("--record", action="store_true", help="into docs/reliability.json")
    parser.add_argument("--reader", choices=[*READERS])
    args = parser.parse_args()
    if args.reader:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        print(json.dumps(run_reader(args.reader, args.cases, args.seed)))
        return 0
    results = run_all(args.cases, [*READERS], args.seed)
    for name, result in results.items():
        for error in result.pop("errors"):
            print(f"{name}: {error}")
    if args.record:
        summary.record("damaged files", {"readers": results})
    return int(any(map(is_bad, results.values())))


if __name__ == "__main__":
    sys.exit(main())
