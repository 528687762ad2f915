"""Checks the import rules of docs/architecture.md by reading the source; imports nothing itself."""

import ast
import importlib.util
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pemoe_jax"

# Each part of the package, and the parts that it may import. `pemoe_jax.tasks` is the link to the
# top-level folder `tasks/`. Only `__main__` may import everything.
PARTS = {
    "core": set(),
    "runtime": {"core"},
    "data": {"core", "runtime"},
    "checkpoints": {"core", "runtime", "data"},
    "tasks": {"core", "runtime", "data"},
    "analysis": {"core", "runtime", "data", "checkpoints", "tasks"},
    "train": {"core", "runtime", "data", "checkpoints", "tasks", "analysis"},
    "evaluate": {"core", "runtime", "data", "checkpoints", "tasks", "analysis"},
    "infer": {"core", "runtime", "data", "checkpoints", "tasks", "analysis"},
    "tools": {
        *("core", "runtime", "data", "checkpoints", "tasks", "analysis"),
        *("train", "evaluate", "infer", "api"),
    },
    "api": {
        *("core", "runtime", "data", "checkpoints", "tasks", "analysis"),
        *("train", "evaluate", "infer"),
    },
    "t5x_bridge": {"core", "runtime", "data", "checkpoints", "tasks"},
    "torch": {"core", "runtime", "checkpoints"},
}

# Each module of the core, and the modules of the core that it may import; all may import `errors`.
# `params` creates every parameter.
CORE = {
    "errors": set(),
    "freezing": {"errors"},
    "kernels": set(),
    "kernels.thin_matmul": set(),
    "kernels.tiling": set(),
    "kernels.mov": {"kernels.tiling"},
    "kernels.attention": {"kernels.tiling", "partitioning"},
    "kernels.cpu_attention": set(),
    "kernels.cpu_schedule": set(),
    "settings": set(),
    "routing": {"params", "settings", "kernels.thin_matmul"},
    "adapters": {"routing", "params", "settings", "kernels.thin_matmul", "kernels.mov"},
    "kernels.block_matmul": {"partitioning", "quantized"},
    "dispatch": set(),
    "sparse": {"dispatch"},
    "expert_mlp": {
        *("dispatch", "kernels.block_matmul", "layers", "params", "partitioning", "quantized"),
    },
    "experts": {
        "dispatch",
        "expert_mlp",
        "layers",
        "params",
        "partitioning",
        "quantized",
        "routing",
        "sparse",
    },
    "layers": {"attention", "adapters", "params", "quantized", "routing"},
    "merging": set(),
    "nonfinite": {"steps", "params"},
    "network": {
        "adapters",
        "attention",
        "experts",
        "layers",
        "params",
        "routing",
        "sparse",
        "stacks",
    },
    "attention": {"kernels.attention", "kernels.cpu_attention"},
    "stacks": {"params", "quantized"},
    "decoding": {"network", "params"},
    "adapter_rows": {"network", "params"},
    "sampling": {"decoding", "network", "params"},
    "beam_search": {"decoding", "network", "params"},
    "params": {"fingerprints", "freezing", "partitioning"},
    "fingerprints": set(),
    "quantized": set(),
    "optim": {"params", "partitioning"},
    "steps": {
        *("cross_entropy", "experts", "kernels.cpu_schedule", "network", "optim", "params"),
        "routing",
    },
    "cross_entropy": set(),
    "partitioning": set(),
}
STDLIB = set(sys.stdlib_module_names)
NUMERICS = {"jax", "jaxlib", "flax", "optax", "numpy"}
STORAGE = {"orbax", "tensorstore", "safetensors", "etils", "msgpack", "ml_dtypes"}
HEAVY = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "t5", "t5x"}
DATA = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "sentencepiece", "numpy"}
DATA |= {"pyarrow", "google_crc32c", "jinja2", "yaml", "rouge_score", "sacrebleu"}
DRAWING = {"matplotlib", "rich", "scipy", "jinja2"}
# Import name to distribution name, where they differ; None: comes with another that is listed.
DISTRIBUTIONS = {
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "absl": "absl-py",
    "google_crc32c": "google-crc32c",
    "jaxlib": None,  # jax
    "rouge_score": "rouge-score",
    "yaml": "pyyaml",
    "tensorflow": None,  # seqio, through tensorflow-text
    "tensorflow_text": None,  # seqio
    "tensorflow_datasets": None,  # seqio
    "sentencepiece": None,  # seqio
    "tensorstore": None,  # orbax-checkpoint
    "msgpack": None,  # flax
    "ml_dtypes": None,  # jax
    "scipy": None,  # jax
    "lm_eval": None,  # an extra; the command says that it is missing
    "t5x": None,  # not on PyPI; t5x_bridge can say that it is missing
    "torch": None,  # the extra `torch`
    "transformers": None,  # the extra `torch`
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("pemoe_jax", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def sources() -> dict[str, Path]:
    # glob does not follow links on every Python version: `tasks` is walked by itself
    paths = [p for p in PACKAGE.glob("**/*.py") if "tasks" not in p.relative_to(PACKAGE).parts]
    return {module_name(p): p for p in [*paths, *(PACKAGE / "tasks").glob("**/*.py")]}


MODULES = sources()


# Receivers of `open`, `read_text` and `write_text` that need no encoding.
UTF8_FUNCTIONS = {"file_io", "atomic_write", "ts", "ts.KvStore"}


@pytest.mark.parametrize("module", MODULES)
def test_text_files_are_opened_in_utf8(module):
    for call in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        receiver, _, name = ast.unparse(call.func).rpartition(".")
        is_binary = any(re.fullmatch("'[rwax]b'", ast.unparse(arg)) for arg in call.args)
        opens = name == "open" or (name in {"read_text", "write_text"} and receiver)
        is_other = receiver in UTF8_FUNCTIONS or "importlib" in receiver
        if opens and not is_binary and not is_other:
            encodings = [word for word in call.keywords if word.arg == "encoding"]
            assert encodings, f"{module}:{call.lineno}: {ast.unparse(call)}"


def imports(module: str, top_only: bool = False) -> set[str]:
    """Returns the dotted names that a module imports, `from a import b` as `a.b` for a module b.

    With `top_only`, only what importing the module imports: nothing inside functions, nothing under
    TYPE_CHECKING.
    """
    names: set[str] = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(up if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                names.add(name if name in MODULES else base)
        elif top_only and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text()))
    return names


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "pemoe_jax"}


def other_imports(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)} - STDLIB - {"pemoe_jax"}


def other_imports_at_once(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module, top_only=True)}


def imported_at_once(module: str) -> set[str]:
    """Returns the package's modules that importing a module imports, itself included."""
    seen, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        seen.add(current)
        names = imports(current, top_only=True)
        waiting += [name for name in names if name in MODULES and name not in seen]
    return seen


def in_part(name: str) -> list[str]:
    prefix = f"pemoe_jax.{name}"
    return [m for m in MODULES if m == prefix or m.startswith(prefix + ".")]


def test_the_reader_sees_imports():
    # The test of the test: a reader that finds nothing would let everything pass.
    plots = "pemoe_jax.analysis.plots"
    assert "numpy" in imports(plots)
    assert "matplotlib" in imports(plots)
    assert "matplotlib" not in imports(plots, top_only=True)
    assert "pemoe_jax.core.errors" in own_imports(plots)
    assert "pemoe_jax.tasks" in MODULES


def test_the_package_imports_only_the_standard_library():
    """At once; the names of the Python API are imported when they are used."""
    at_once = imports("pemoe_jax", top_only=True)
    assert not {name.split(".")[0] for name in at_once} - STDLIB
    assert not other_imports("pemoe_jax")
    assert own_imports("pemoe_jax") <= {"pemoe_jax.api", "pemoe_jax.core.errors"}


def part(module: str) -> str:
    """'pemoe_jax.core.kernels.mov' -> 'core'; '' for the package itself."""
    return module.removeprefix("pemoe_jax").lstrip(".").partition(".")[0]


def test_the_package_has_these_parts():
    assert {part(module) for module in MODULES} == {*PARTS, "__main__", ""}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_upward_import(module):
    if part(module) in ("", "__main__"):
        return
    imported = {name: part(name) for name in own_imports(module)}
    allowed = {part(module), "", *PARTS[part(module)]}
    assert not {name for name, target in imported.items() if target not in allowed}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_private_name_of_another_module(module):
    """Neither `from a import _b` nor `a._b` for an imported module a."""
    tree = ast.parse(MODULES[module].read_text())
    aliases = set()
    private = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pemoe_jax"):
            aliases |= {
                alias.asname or alias.name
                for alias in node.names
                if f"{node.module}.{alias.name}" in MODULES
            }
            private |= {a.name for a in node.names if re.match("_(?!_)", a.name)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ):
            private.add(f"{node.value.id}.{node.attr}")
    assert not private


@pytest.mark.parametrize("module", in_part("core"))
def test_core(module):
    assert other_imports(module) <= NUMERICS
    name = module.removeprefix("pemoe_jax.core").lstrip(".")
    if not name:  # core/__init__.py: importing one module must not import the others
        assert not own_imports(module)
        return
    assert name in CORE, f"{module}: not in the table; add its line to CORE"
    allowed = {f"pemoe_jax.core.{other}" for other in CORE[name] | {"errors"}}
    assert own_imports(module) <= allowed


@pytest.mark.parametrize("module", in_part("checkpoints"))
def test_checkpoints(module):
    assert other_imports(module) <= NUMERICS | STORAGE


@pytest.mark.parametrize("module", [*in_part("data"), *in_part("tasks")])
def test_data_and_tasks(module):
    assert other_imports(module) <= DATA


@pytest.mark.parametrize("module", in_part("analysis"))
def test_analysis(module):
    assert other_imports(module) <= NUMERICS | DRAWING
    assert not {name.split(".")[0] for name in imports(module, top_only=True)} & DRAWING


@pytest.mark.parametrize("module", in_part("t5x_bridge"))
def test_t5x_bridge(module):
    """Its package and its command answer where T5X is not installed."""
    assert other_imports(module) <= NUMERICS | {"t5x", "clu", "etils", "seqio"}
    if module.rpartition(".")[2] in ("t5x_bridge", "__main__", "installed"):
        assert "t5x" not in other_imports(module)


@pytest.mark.parametrize("module", in_part("torch"))
def test_torch(module):
    """Neither it nor what it imports at once imports jax; tests/torch/ looks at a process."""
    assert other_imports(module) <= {"torch", "transformers", "numpy", "etils"}
    for name in imported_at_once(module):
        assert not other_imports_at_once(name) & (HEAVY | {"jax", "jaxlib", "flax", "optax"}), name


COMMANDS = ["pemoe_jax.__main__", "pemoe_jax.train", "pemoe_jax.evaluate", "pemoe_jax.infer"]
COMMANDS += in_part("api")


@pytest.mark.parametrize("module", [*COMMANDS, *in_part("tools"), *in_part("runtime")])
def test_commands_import_seqio_inside_functions_only(module):
    """Neither they nor what they import at once: `import seqio` takes 7 to 8 s."""
    for name in imported_at_once(module):
        assert not other_imports_at_once(name) & HEAVY, f"{module} loads {name}"
    assert "t5x" not in other_imports(module)
    assert not own_imports(module) & set(in_part("t5x_bridge"))


def test_what_is_imported_is_required_by_setup():
    required = (ROOT / "setup.py").read_text().split("install_requires")[1].split("\n    ]")[0]
    listed = set(re.findall(r'"([\w-]+)', required))
    imported = set().union(*map(other_imports, MODULES))
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
    """Takes less than 1 s of CPU time, which does not depend on what else the machine does."""
    command = [sys.executable, "-m", "pemoe_jax.train", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--gin_file" in done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_picture_of_the_parts_shows_this_table():
    """docs/architecture.svg is what `python docs/draw_architecture.py` writes."""
    specification = importlib.util.spec_from_file_location(
        "draw_architecture", ROOT / "docs/draw_architecture.py"
    )
    drawing = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(drawing)
    assert (ROOT / "docs/architecture.svg").read_text() == drawing.draw(PARTS)
