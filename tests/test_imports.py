"""Who may import whom: read off the source, so that nothing needs to be installed for it."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pemoe_jax"

# Every module of the core, and the modules of the core that it may import (errors: all may).
# `params` makes every parameter; the layers hold a record of the adapters at their sites.
CORE = {
    "errors": set(),
    "products": set(),
    "fused_mov": set(),
    "fused_attention": set(),
    "routing": {"params", "products"},
    "adapters": {"routing", "params", "products", "fused_mov"},
    "layers": {"attention", "adapters", "params", "quantized", "routing"},
    "merging": set(),
    "network": {"attention", "layers", "stacks", "adapters", "params", "routing"},
    "attention": {"fused_attention"},
    "stacks": {"params", "quantized"},
    "decoding": set(),
    "params": {"partitioning"},
    "quantized": set(),
    "optim": {"params"},
    "steps": {"cross_entropy", "optim", "params", "network", "routing"},
    "cross_entropy": set(),
    "routing_probe": {"adapters", "params", "network", "steps"},
    "partitioning": set(),
}
STDLIB = set(sys.stdlib_module_names)
MATHS = {"jax", "jaxlib", "flax", "optax", "numpy"}
STORAGE = {"orbax", "tensorstore", "safetensors", "etils", "msgpack", "ml_dtypes"}
HEAVY = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "t5", "t5x"}
DATA = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "sentencepiece", "numpy"}
DATA |= {"pyarrow", "jinja2", "yaml", "rouge_score", "sacrebleu"}
DRAWING = {"matplotlib", "rich", "scipy", "jinja2"}
# Import name to distribution name, where they differ; None: comes with another that is listed.
DISTRIBUTIONS = {
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "absl": "absl-py",
    "jaxlib": None,  # jax
    "rouge_score": "rouge-score",
    "yaml": "pyyaml",
    "tensorflow": None,  # seqio, through tensorflow-text
    "tensorflow_text": None,  # seqio
    "tensorflow_datasets": None,  # seqio
    "sentencepiece": None,  # seqio
    "tensorstore": None,  # orbax-checkpoint
    "etils": None,  # orbax-checkpoint
    "msgpack": None,  # flax
    "ml_dtypes": None,  # jax
    "scipy": None,  # jax
    "t5x": None,  # not on PyPI; t5x_bridge can say that it is missing
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("pemoe_jax", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def sources() -> dict[str, Path]:
    # glob does not follow links on every Python version: `tasks` is walked by itself
    paths = [p for p in PACKAGE.glob("**/*.py") if "tasks" not in p.relative_to(PACKAGE).parts]
    return {module_name(p): p for p in [*paths, *(PACKAGE / "tasks").glob("**/*.py")]}


MODULES = sources()


def imports(module: str, top_only: bool = False) -> set[str]:
    """Dotted names that a module imports, `from a import b` as `a.b` where that is a module.

    With `top_only` those that importing it imports: not in functions, not for type checkers alone.
    """
    found = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(up if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in MODULES else base)
        elif top_only and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text()))
    return found


def of_ours(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "pemoe_jax"}


def of_others(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)} - STDLIB - {"pemoe_jax"}


def in_folder(name: str) -> list[str]:
    prefix = f"pemoe_jax.{name}"
    return [m for m in MODULES if m == prefix or m.startswith(prefix + ".")]


def test_the_reader_sees_imports():
    # the test of the test: a reader that finds nothing would let everything pass
    assert "numpy" in imports("pemoe_jax.reports.plots")
    assert "matplotlib" in imports("pemoe_jax.reports.plots")
    assert "matplotlib" not in imports("pemoe_jax.reports.plots", top_only=True)
    assert "pemoe_jax.core.errors" in of_ours("pemoe_jax.reports.plots")
    assert "pemoe_jax.tasks" in MODULES


def test_package_itself_imports_nothing_but_the_standard_library():
    assert not of_ours("pemoe_jax") and not of_others("pemoe_jax")


@pytest.mark.parametrize("module", in_folder("core"))
def test_core(module):
    assert of_others(module) <= MATHS
    name = module.removeprefix("pemoe_jax.core").lstrip(".")
    if not name:  # core/__init__.py: importing one module must not import the others
        assert not of_ours(module)
        return
    assert name in CORE, f"{module}: not in the table; add its line to CORE"
    allowed = {f"pemoe_jax.core.{other}" for other in CORE[name] | {"errors"}}
    assert of_ours(module) <= allowed


@pytest.mark.parametrize("module", in_folder("checkpoints"))
def test_checkpoints(module):
    assert of_others(module) <= MATHS | STORAGE
    assert of_ours(module) - set(in_folder("checkpoints")) <= {
        "pemoe_jax",
        "pemoe_jax.core.params",
        "pemoe_jax.core.errors",
    }


SENTENCES = [*in_folder("sentences"), *in_folder("sentence_table")]
READERS = [*in_folder("data"), *in_folder("feed"), *in_folder("buckets"), *SENTENCES]
READERS += in_folder("tasks")


@pytest.mark.parametrize("module", READERS)
def test_data_feed_and_tasks(module):
    assert of_others(module) <= DATA
    allowed = {"pemoe_jax.core.errors", *in_folder("data"), *SENTENCES, *in_folder("tasks")}
    assert of_ours(module) <= allowed  # nobody but the entry points builds on batches
    if module in in_folder("sentence_table"):
        assert of_ours(module) == {"pemoe_jax.core.errors"}


@pytest.mark.parametrize("module", in_folder("reports"))
def test_reports(module):
    assert of_others(module) <= {"numpy", *DRAWING}
    assert of_ours(module) <= {*in_folder("core"), *in_folder("reports")}
    assert not {name.split(".")[0] for name in imports(module, top_only=True)} & DRAWING


@pytest.mark.parametrize("module", in_folder("t5x_bridge"))
def test_t5x_bridge(module):
    """Its package and its command answer where T5X is not installed."""
    assert of_others(module) <= MATHS | {"t5x", "clu", "etils"}
    if module.rpartition(".")[2] in ("t5x_bridge", "__main__", "installed"):
        assert "t5x" not in of_others(module)


def entry_points() -> list[str]:
    rooms = [*in_folder("core"), *in_folder("checkpoints"), *in_folder("reports")]
    others = {"pemoe_jax", *rooms, *READERS, *in_folder("t5x_bridge")}
    return [module for module in MODULES if module not in others]


@pytest.mark.parametrize("module", entry_points())
def test_entry_points_load_seqio_inside_functions_only(module):
    """Neither they nor what they import at once: `import seqio` takes 7 to 8 s."""
    seen, waiting = set(), [module]
    while waiting:
        at = waiting.pop()
        seen.add(at)
        names = imports(at, top_only=True)
        assert not {name.split(".")[0] for name in names} & HEAVY, f"{module} loads {at}"
        waiting += [name for name in names if name in MODULES and name not in seen]
    assert "t5x" not in of_others(module)
    assert not of_ours(module) & set(in_folder("t5x_bridge"))


def test_what_is_imported_is_required_by_setup():
    required = (ROOT / "setup.py").read_text().split("install_requires")[1].split("]")[0]
    listed = set(re.findall(r'"([\w-]+)', required))
    imported = set().union(*map(of_others, MODULES))
    needed = {DISTRIBUTIONS.get(name, name) for name in imported} - {None}
    assert needed <= listed
    assert not any(name.startswith("tensorflow") for name in listed)  # a second copy over the first


def test_packages_of_setup_are_those_of_the_tree():
    text = (ROOT / "setup.py").read_text().split("packages=[")[1].split("]")[0]
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(re.findall(r'"([\w.]+)"', text)) == packages


def test_gin_holds_no_python():
    """A package `gin` in the working folder would shadow gin-config."""
    assert list((ROOT / "gin").glob("**/*.gin"))
    assert not list((ROOT / "gin").glob("**/*.py"))
    command = "import gin; print(gin.__file__)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("gin/__init__.py"), done.stderr
    assert not done.stdout.startswith(str(ROOT / "gin"))


def test_help_answers_at_once():
    """Within 2 s: the best of three, for the machine may be busy with other tests."""
    command = [sys.executable, "-m", "pemoe_jax.train", "--help"]
    # xdist's workers share the cores with it
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        times.append(time.perf_counter() - start)
        assert "--gin_file" in done.stdout + done.stderr
        if min(times) <= 2:
            return
    raise AssertionError(f"--help took {min(times):.1f} s at best")
