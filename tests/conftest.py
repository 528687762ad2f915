"""Shared fixtures, and JAX's settings for tests: two virtual CPU devices, set before its import."""

import gc
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator

# A shell starts background jobs with SIGINT ignored, and programs inherit that: tests that
# interrupt a program would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Of TensorFlow's client for buckets, read at its import; `gin_flags` sets the last one too.
os.environ["GCS_RETRY_CONFIG_INIT_DELAY_TIME_US"] = "0"
os.environ["GCS_RETRY_CONFIG_MAX_RETRIES"] = "4"
os.environ["GCS_STAT_CACHE_MAX_AGE"] = "0"
# Of libraries of Hugging Face, read at their import: no test needs the Hub.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# No programs from an earlier session: each session compiles all that it runs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
# Two devices, and fast compilation: most programs run once, on small arrays. With all of XLA's
# optimizations, compilation took three quarters of the tests' time.
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=2",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
_USER_FLAGS = os.environ.get("XLA_FLAGS", "").split()
# Last, as XLA uses the last of several values of a flag.
os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*_USER_FLAGS, *_XLA_FLAGS]))
# Many tests train the same model, so they and their subprocesses share a compilation cache, a new
# folder in each session. The workers of xdist inherit it from the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="pemoe_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Tracing allocates millions of small objects, few of them in cycles. With Python's thresholds, the
# collector takes 8 % of the tests' CPU time.
gc.set_threshold(100_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402

REPO = pathlib.Path(__file__).resolve().parent.parent


def _existing(variable: str, default: pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(os.environ.get(variable, default))
    if not path.exists():
        pytest.skip(f"{path} is absent (set {variable})")
    return path


# The slowest files start first, so that two workers end at about the same time.
LONGEST = (
    *("test_train", "test_sweep", "test_stacks", "test_pod", "test_p3", "test_benchmarks"),
    *("test_routers", "test_quantized", "test_compiled_step", "test_plan", "test_embed"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


_modules_when_frozen = 0


def _freeze_imports() -> None:
    """Lets the garbage collector ignore what stays, mostly a million objects of imports.

    To traverse them takes 0.6 s, which each training in a test does (`host_memory.trim_heap`).
    """
    global _modules_when_frozen
    gc.collect()
    gc.freeze()
    _modules_when_frozen = len(sys.modules)


def pytest_runtest_teardown() -> None:
    if len(sys.modules) > _modules_when_frozen + 300:  # the test imported TensorFlow, for example
        _freeze_imports()


@pytest.fixture(scope="session")
def p3_sample() -> pathlib.Path:
    """A folder of `<task>/<split>.jsonl`, a sample of P3; skips the test if it is absent."""
    return _existing("PEMOE_P3_SAMPLE", REPO.parent / "shared" / "p3_sample")


@pytest.fixture(scope="session")
def t5_vocab() -> pathlib.Path:
    """T5's SentencePiece file; skips the test if it is absent."""
    return _existing("PEMOE_VOCAB_PATH", REPO.parent / "shared" / "t5_vocab" / "spiece.model")


@pytest.fixture(scope="session")
def encode() -> Callable[[str], list[int]]:
    """Returns the quickstart's tokenizer: text to token ids, without EOS."""
    import sentencepiece

    model = REPO / "tasks" / "quickstart" / "vocab.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).encode


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs() -> Iterator[None]:
    """Frees compiled programs after each module: thousands of them take several GB."""
    yield
    jax.clear_caches()
    _freeze_imports()


@pytest.fixture(scope="module", autouse=True)
def unregister_tasks() -> Iterator[None]:
    """Unregisters tasks after each module: modules register different tasks under P3's names."""
    yield
    jsonl = sys.modules.get("pemoe_jax.tasks.jsonl")
    if jsonl is not None:
        jsonl.remove()
    benchmark_tasks = sys.modules.get("pemoe_jax.tasks.benchmark_tasks")
    if benchmark_tasks is not None:
        benchmark_tasks.remove()
    data_tasks = sys.modules.get("data_tasks")
    if data_tasks is not None:
        data_tasks.remove_rows()
    p3 = sys.modules.pop("pemoe_jax.tasks.p3", None)  # importing it registers its tasks
    if p3 is not None:
        p3.remove()
        del sys.modules["pemoe_jax.tasks"].p3
    # A cache folder that one module added would be data to the next.
    seqio_cache_dirs = sys.modules.get("pemoe_jax.runtime.seqio_cache_dirs")
    if seqio_cache_dirs is not None:
        seqio_cache_dirs.additional_cache_dirs.clear()


@pytest.fixture(scope="session")
def _gcs_server(tmp_path_factory) -> Iterator[tuple]:
    import fake_gcs

    with fake_gcs.serve(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def gcs(_gcs_server, monkeypatch) -> Iterator:
    """A `fake_gcs.FakeGcs` without objects, for the clients in this process and its children."""
    from pemoe_jax.runtime import folder_lock

    fake, environment = _gcs_server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield fake
    fake.fault = lambda method, name: None
    folder_lock.release_all()
    fake.objects.clear()
    fake.log.clear()
