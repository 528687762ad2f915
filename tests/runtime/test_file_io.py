"""Paths, files that are written whole or not at all, and JSON."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorstore as ts

from pemoe_jax.analysis import plots
from pemoe_jax.analysis.zero_shot import results
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import row_checks, sentence_table
from pemoe_jax.runtime import atomic_write, checksums, file_io, step_times, threads


def test_failed_writes_leave_nothing_behind(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_write.temporary_path(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_write.temporary_path(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(InputError, match="expected a new path"), atomic_write.temporary_path(path):
        raise AssertionError
    with atomic_write.temporary_path(path, overwrite=True) as temporary:
        temporary.mkdir()
    assert path.is_dir() and list(tmp_path.iterdir()) == [path]
    with (
        pytest.raises(InputError, match="must be a local path or gs://BUCKET"),
        atomic_write.temporary_path("s3://b/x"),
    ):
        raise AssertionError


def test_files_are_utf8_in_any_locale(tmp_path):
    program = """
import locale, sys
from pemoe_jax.runtime import atomic_write, file_io, gin_help, progress
assert locale.getpreferredencoding(False) != "utf-8", locale.getpreferredencoding(False)
atomic_write.write_text(sys.argv[1], '{"a": "\\u2013"}')
assert file_io.read_json(sys.argv[1]) == {"a": "\\u2013"}
gin_help.describe_macros(["runs/embed.gin", "methods/mov.gin"])
"""
    # ASCII: without these variables, Python takes UTF-8 instead of the encoding of the locale "C".
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program, tmp_path / "a.json"]
    done = subprocess.run(command, env=os.environ | ascii_locale, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.json").read_bytes() == '{"a": "–"}'.encode()


def test_errors_of_a_full_disk_name_the_file(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(OSError) as error, atomic_write.temporary_path(path):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0", 3])
def test_names_outside_a_folder(tmp_path, name):
    with pytest.raises(InputError, match="expected names of files in its own folder"):
        file_io.child_path(file_io.resolve(tmp_path), name, "index.json")


@pytest.mark.parametrize("name", ["run[1]", "a]", "a*", "b?", "c\\d"])
def test_characters_of_patterns_are_refused(name):
    with pytest.raises(InputError, match="MODEL_DIR must be a path without"):
        file_io.check_no_pattern(f"/tmp/{name}/run", "MODEL_DIR")
    file_io.check_no_pattern("/tmp/$a {b} %d #1 ü:'\"", "MODEL_DIR")


def test_urls_for_tensorstore():
    url = file_io.url(file_io.resolve("gs://bucket/a/checkpoint_1"))
    assert url == "gs://bucket/a/checkpoint_1/"
    spec = ts.KvStore.Spec(url).to_json()
    assert spec == {"driver": "gcs", "bucket": "bucket", "path": "a/checkpoint_1/"}
    assert file_io.url(file_io.resolve("/tmp/a b")) == "file:///tmp/a%20b/"
    with pytest.raises(InputError, match="expected a path without a backslash"):
        file_io.url(file_io.resolve("/tmp/a\\b"))


def test_output_folders(tmp_path):
    for name in ("new/folder $X {é} ", "here/../there", "."):
        assert file_io.resolve_output_folder(tmp_path / name, "OUT") == tmp_path / name
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/a/b", "link"):
        with pytest.raises(InputError, match=r"OUT must be a folder, got .*(file|link) is a file"):
            file_io.resolve_output_folder(tmp_path / name, "OUT")
    with pytest.raises(InputError, match="OUT must be a folder, got .*: File name too long"):
        file_io.resolve_output_folder(tmp_path / ("n" * 256), "OUT")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' * 5000, "9" * 5000, "", "\0", '{"a": 1', b"\xff\xfe", b"\x80", "{,}"],
)
def test_json_that_cannot_be_read(tmp_path, text):
    """`parse_json` raises ValueError only, and readers of files an InputError of one short line."""
    with pytest.raises(ValueError):
        file_io.parse_json(text)
    data = text if isinstance(text, bytes) else text.encode()
    files = {name: tmp_path / name for name in ("results.json", "metrics.jsonl", "about.json")}
    for file in files.values():
        file.write_bytes(data + b"\n")
    readers = [
        lambda: file_io.read_json(files["results.json"]),
        lambda: row_checks.read_object(files["results.json"]),
        lambda: row_checks.parse_object(data, "rows.jsonl: row 1"),
        lambda: results.load_results(str(tmp_path)),
        lambda: results.check_overwrites(tmp_path, ["base"]),
        lambda: plots.loss_curve(files["metrics.jsonl"], tmp_path / "loss.png"),
        lambda: sentence_table.SentenceTable(tmp_path),
    ]
    for read in readers:
        with pytest.raises(InputError) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert step_times.read_step_times(files["metrics.jsonl"], 5) == []


@pytest.mark.parametrize("value", [{"a": "\ud800"}, {"\udfff": 1}, {"a": [{"b": ["x", "\udc00"]}]}])
def test_json_with_half_a_surrogate_pair(tmp_path, value):
    """Such a text can be escaped in JSON, but neither be written nor printed."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps(value))
    for read in (file_io.read_json, results.load_results):
        with pytest.raises(InputError, match=r"expected JSON, .*unpaired surrogate \\ud"):
            read(str(file))
    file.write_text(json.dumps({"a": "\U0001f600"}))  # a whole pair
    assert file_io.read_json(file) == {"a": "\U0001f600"}


def test_spans_of_a_file_are_read_in_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "SPAN_BYTES", 40)
    monkeypatch.setattr(file_io, "READ_BLOCK", 20)
    content = bytes(range(256))
    (tmp_path / "a").write_bytes(content)
    path = file_io.resolve(tmp_path / "a")
    for size in (0, 1, 20, 40, 45, 190):
        blocks: dict[int, bytes] = {}
        visited: dict[str, list[int]] = {}

        def visit(start, block, blocks=blocks, visited=visited):
            blocks[start] = block.tobytes()
            visited.setdefault(threading.current_thread().name, []).append(start)

        data = file_io.read_range(path, 7, size, visit)
        assert data.tobytes() == content[7 : 7 + size]
        assert file_io.read_range(path, 7, size).tobytes() == data.tobytes()
        assert b"".join(blocks[start] for start in sorted(blocks)) == data.tobytes()
        # the blocks of a span are visited one after another, by one thread
        order = [start for starts in visited.values() for start in starts]
        for start in range(0, size - 20, 40):
            assert order.index(start + 20) == order.index(start) + 1
    with pytest.raises(InputError, match="truncated: expected 250 bytes at 7, got 249"):
        file_io.read_range(path, 7, 250)


def test_checksums_of_values_do_not_depend_on_spans(monkeypatch):
    values = np.arange(50_003, dtype=np.float32)
    parts: list[np.ndarray] = []
    expected = checksums.checksum_of_values(values, parts.append)
    assert np.array_equal(np.concatenate(parts), values)
    for module, name, size in (
        (threads, "SPAN_BYTES", 1 << 16),
        (checksums, "_PART_BYTES", 1 << 15),
    ):
        monkeypatch.setattr(module, name, size)
        parts.clear()
        assert checksums.checksum_of_values(values, parts.append) == expected
        assert sum(map(len, parts)) == len(values)
