"""Outputs in buckets, through the real clients of tensorstore and TensorFlow, and faults."""

import subprocess
import sys
import threading
import time

import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, bucket_lock, file_io, folder_lock

RUN = file_io.to_path("gs://bucket/run")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEWAL", 0.05)
    monkeypatch.setattr(bucket_lock, "LEASE", 0.5)


def every(kinds):
    """Faults of the first requests, in turn."""
    rest = iter(kinds)
    return lambda method, name: next(rest, None)


@pytest.mark.parametrize("fault", ["lose", "answer", "busy", "delay"])
def test_files_are_whole_and_written_once(gcs, fault):
    """Whatever request is lost, delayed, or answered in vain and thus sent again."""
    atomic_write.write_text(RUN / "a.txt", "old")
    text = "new é\n" * 1000
    for position in range(3):
        gcs.fault = every([None] * position + [fault])
        atomic_write.write_text(RUN / "a.txt", text)
        assert gcs.names("gs://bucket") == ["run/a.txt"]
        assert file_io.read_text(RUN / "a.txt") == text


def test_a_file_that_cannot_be_written_stays(gcs):
    text = "new"
    atomic_write.write_text(RUN / "a.txt", text)
    gcs.fault = lambda method, name: "busy" if method == "PUT" else None
    with pytest.raises(InputError, match=r"^gs://bucket/run/a.txt: cannot be reached: "):
        atomic_write.write_text(RUN / "a.txt", "later")
    gcs.fault = lambda method, name: None
    assert gcs.read(RUN / "a.txt").decode() == text


def test_folders_have_their_description_last(gcs):
    gcs.objects["bucket/run/old.json"] = b"{}", 1
    with pytest.raises(InputError, match="expected a new path"), atomic_write.temporary_path(RUN):
        raise AssertionError
    with atomic_write.temporary_path(RUN, overwrite=True) as folder:
        folder.mkdir()
        for name in ("config.json", "weights"):
            (folder / name).write_text(name)
        assert gcs.names(RUN) == ["old.json"]
    assert gcs.names(RUN) == ["config.json", "weights"]
    written = [name for method, name in gcs.log if method == "POST" and name.startswith("bucket")]
    assert written[-2:] == ["bucket/run/weights", "bucket/run/config.json"]
    with pytest.raises(RuntimeError), atomic_write.temporary_path(RUN / "new") as path:
        path.write_text("x")
        raise RuntimeError
    assert "new" not in gcs.names(RUN)


def test_paths(gcs):
    gcs.objects["bucket/file"] = b"", 1
    assert file_io.resolve_output_folder("gs://bucket/a/", "OUT") == file_io.to_path(
        "gs://bucket/a"
    )
    for path, message in (
        ("s3://bucket/x", r"OUT must be a local path or gs://BUCKET/…, got s3://bucket/x"),
        ("gs:///x", r"OUT must be a local path or gs://BUCKET/…, got gs:///x"),
        ("gs://bucket/file", "OUT must be a folder, got gs://bucket/file, which is an object"),
    ):
        with pytest.raises(InputError, match=message):
            file_io.resolve_output_folder(path, "OUT")


HOLD = """
import sys, time
from pemoe_jax.runtime import bucket_lock, file_io, folder_lock
bucket_lock.RENEWAL, bucket_lock.LEASE = 0.05, 0.5
folder_lock.hold(file_io.to_path("gs://bucket/run"), "MODEL_DIR")
print(flush=True)
time.sleep(600)
"""


def test_a_lock_is_renewed_and_expires_with_its_owner(gcs, quick):
    command = [sys.executable, "-c", HOLD]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    owner.stdout.readline()
    with pytest.raises(InputError, match=rf"^MODEL_DIR must .* by process {owner.pid} on \w"):
        folder_lock.hold(RUN, "MODEL_DIR")
    owner.kill()
    owner.communicate()
    folder_lock.hold(RUN, "MODEL_DIR")
    folder_lock.hold(RUN, "MODEL_DIR")
    folder_lock.release_all()
    assert not gcs.objects


@pytest.mark.parametrize("fault", ["lose", "answer", "busy"])
def test_one_of_several_gets_a_lock(gcs, quick, fault):
    """Also if the answer to its write is lost."""
    gcs.fault = every([None, fault, None, fault, fault])
    results = []

    def acquire():
        try:
            results.append(bucket_lock.BucketLock(RUN, "MODEL_DIR", "x"))
        except InputError as error:
            results.append(error)

    threads = [threading.Thread(target=acquire) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lock,) = [result for result in results if isinstance(result, bucket_lock.BucketLock)]
    time.sleep(3 * bucket_lock.RENEWAL)
    lock.release()
    assert not gcs.objects


def test_a_process_whose_lock_was_taken_ends(gcs):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    owner.stdout.readline()
    with gcs.lock:
        gcs.objects["bucket/run/.lock"] = b"process 1 on other\n", 10**6
    _, errors = owner.communicate(timeout=60)
    assert owner.returncode == 1
    assert errors.splitlines()[-1].endswith("and process 1 on other has taken the folder over")
