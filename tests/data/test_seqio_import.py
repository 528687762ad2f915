"""Importing seqio: silent, and without hanging when Python ends."""

from processes import import_seqio


def test_import_is_silent_and_python_ends_with_open_pipelines():
    """TensorFlow would wait forever for Python functions that are running when Python ends."""
    then = """
import os, time
import tensorflow as tf, tensorflow_text
from pemoe_jax.data import prefetch, seqio_tasks
def slow(number):
    time.sleep(0.05)
    return number
ds = tf.data.Dataset.range(10**6).map(lambda n: tf.numpy_function(slow, [n], tf.int64))
plain = seqio_tasks.numpy_iterator(ds.prefetch(9), "numbers")
ahead = prefetch.prefetch(seqio_tasks.numpy_iterator(ds.prefetch(9), "numbers"))
print(next(plain), next(plain), next(ahead), next(ahead))
os.write(2, b"after")
"""
    process = import_seqio(then=f"exec({then!r})", timeout=300)
    assert (process.returncode, process.stdout, process.stderr) == (0, "0 1 0 1\n", "after")


def test_keras_is_imported_at_its_first_use():
    then = """
import sys
import tensorflow as tf, tensorflow_text
# As `inspect` and tf.data's AutoGraph do.
files = [getattr(module, "__file__", None) for module in [*sys.modules.values()]]
assert not {"keras", "sklearn", "matplotlib"} & set(sys.modules)
layer = tensorflow_text.keras.layers.WhitespaceTokenizer
assert issubclass(layer, tf.keras.layers.Layer) and "keras" in sys.modules
from tensorflow.keras.layers import Dense
print(Dense is tf.keras.layers.Dense)
"""
    process = import_seqio(then=f"exec({then!r})", timeout=300)
    assert (process.returncode, process.stdout, process.stderr) == (0, "True\n", "")


NOISE = "I0000 00:00:1795314241.148746   29132 port.cc:153] oneDNN custom operations are on."
FAKE = f"""
import os, types
os.write(2, b"{NOISE}\\n")
os.write(2, b"from another thread\\n")
config = types.SimpleNamespace(set_visible_devices=lambda *_: None)
"""


def test_only_import_noise_is_removed_from_stderr(tmp_path):
    (tmp_path / "tensorflow.py").write_text(FAKE)
    (tmp_path / "seqio.py").write_text("")
    process = import_seqio(tmp_path)
    assert (process.returncode, process.stderr) == (0, "from another thread\n")
    assert NOISE in import_seqio(tmp_path, TF_CPP_MIN_LOG_LEVEL="0").stderr


def test_failed_import_writes_everything(tmp_path):
    (tmp_path / "tensorflow.py").write_text(FAKE)
    (tmp_path / "seqio.py").write_text("raise ImportError('a library is missing')")
    process = import_seqio(tmp_path)
    assert process.returncode == 1
    lines = process.stderr.splitlines()
    assert lines[:2] == [NOISE, "from another thread"]
    assert lines[-1] == "ImportError: a library is missing"


def test_threads_may_import_seqio_at_once(tmp_path):
    (tmp_path / "tensorflow.py").write_text(FAKE + "import time; time.sleep(0.2)")
    (tmp_path / "seqio.py").write_text("")
    then = """
import os, threading
seqio_import.import_seqio.cache_clear()
threads = [threading.Thread(target=seqio_import.import_seqio.__wrapped__) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
os.write(2, b"after")"""
    assert import_seqio(tmp_path, then=then).stderr == "from another thread\nafter"
