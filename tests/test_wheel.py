"""The wheel contains everything that a run needs, as real files, and works outside the clone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {".csv", ".gin", ".json", ".jsonl", ".model", ".safetensors", ".txt"}

pytestmark = pytest.mark.slow


def run(*command, cwd):
    """Runs a command as a user does, but with the tests' XLA settings, which compile fast."""
    removed = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in removed}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the clone: a build leaves files in its tree."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "clone", symlinks=True, ignore=unwanted)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder))
    run(*pip, ".", cwd=folder / "clone")
    (built,) = folder.glob("pemoe_jax-*.whl")
    return built


def environment(folder):
    """Creates a virtual environment with the dependencies of the tests' environment."""
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # named by a .pth, so that .pth files there (an editable install of the clone) do not count
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel installed."""
    folder = tmp_path_factory.mktemp("env")
    python = environment(folder)
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q")
    run(*pip, str(wheel), cwd=folder)
    return python


def test_content(wheel):
    """The files of the clone's package: no tests, no links, no top-level `gin` or `tasks`."""
    expected = {  # glob does not follow links
        str(path.relative_to(ROOT)) for path in (ROOT / "pemoe_jax").glob("**/*.py")
    }
    expected |= {"pemoe_jax/py.typed", "pemoe_jax/analysis/routing/page.html"}
    for folder in ("gin", "tasks"):
        for path in (ROOT / folder).glob("**/*"):
            if path.suffix in DATA or (path.suffix == ".py" and folder == "tasks"):
                expected.add(f"pemoe_jax/{path.relative_to(ROOT)}")
    with zipfile.ZipFile(wheel) as archive:
        infos = [info for info in archive.infolist() if ".dist-info/" not in info.filename]
        licence = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert {info.filename for info in infos} == expected
    assert all((info.external_attr >> 28) != 0o12 for info in infos)  # no symbolic links
    assert licence


def test_installed(python, tmp_path):
    output = run(
        str(python),
        "-c",
        "import gin, pemoe_jax.tasks.quickstart as q; print(gin.__file__, q.__file__, sep='\\n')",
        cwd=tmp_path,
    )
    gin_config, quickstart = map(Path, output.split())
    assert gin_config.parent.parent == Path(sysconfig.get_path("purelib"))
    assert python.parent.parent in quickstart.parents
    package = quickstart.parent.parent.parent
    assert (package / "gin" / "methods" / "mov.gin").is_file()
    assert not list(package.glob("gin/**/*.py"))
    assert not any(path.is_symlink() for path in package.glob("**/*"))
    assert list(quickstart.parent.glob("**/*.jsonl"))


def test_runs_the_quickstart(python, tmp_path):
    """The commands of `make quickstart`, with fewer steps and examples."""
    recipe = re.search(r"^quickstart:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    commands = [line.replace("$(METHOD)", "mov").split() for line in recipe[1].splitlines()]
    assert [command[:2] for command in commands] == [
        ["$(BIN)/pemoe", "train"],
        ["$(BIN)/pemoe", "evaluate"],
    ]
    short = ["--gin.TRAIN_STEPS=2"], ["--gin.EVAL_EXAMPLES=2"]
    for command, flags in zip(commands, short, strict=True):
        run(str(python.with_name("pemoe")), *command[1:], *flags, cwd=tmp_path)
    assert len(list(tmp_path.glob("**/results.md"))) == 1
    assert len(list(tmp_path.glob("**/*.png"))) >= 2  # a loss curve and a routing map


def test_clone_without_an_install(tmp_path):
    python = environment(tmp_path)
    code = "import gin, pemoe_jax.tasks as t; print(gin.__file__, t.__file__, sep='\\n')"
    gin_config, tasks = map(Path, run(str(python), "-c", code, cwd=ROOT).split())
    assert gin_config.parent.parent == Path(sysconfig.get_path("purelib"))
    assert tasks.parent == ROOT / "pemoe_jax" / "tasks"
    assert "--gin_file" in run(str(python), "-m", "pemoe_jax.evaluate", "--help", cwd=ROOT)
