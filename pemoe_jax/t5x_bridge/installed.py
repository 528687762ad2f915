"""Finds what is missing from an installation of T5X; can be imported without T5X."""

import importlib
import importlib.metadata
import importlib.util
import json

from pemoe_jax.core.errors import first_line
from pemoe_jax.data import seqio_import

# Packages that T5X imports and this package does not require: the extra `t5x` of setup.py.
EXTRA = (
    "array_record",
    "cached_property",
    "chex",
    "cloudpickle",
    "fiddle",
    "grain",
    "jaxtyping",
    "more_itertools",
    "portpicker",
)

# Package -> (repository, tested commit), of packages that are only on GitHub, or that differ from
# those of the same name on PyPI. pip must install them without their dependencies, which require
# different versions of one package.
COMMITS = {
    "t5x": ("google-research/t5x", "cc342d419ec3e3e9c4bf1df33c82330cafdc1e16"),
    "airio": ("google/airio", "69897df7d9a427b947a9f7bb4164c7782b43e601"),
    "jestimator": ("google-research/jestimator", "326824a477feef6d92e6f44175000907a72899ca"),
}

_INSTALL = "make t5x installs all of it"


def requirements() -> list[str]:
    """Returns the requirements of the packages on GitHub, for `pip install --no-deps`."""
    return [*map(_requirement, COMMITS)]


def _requirement(package: str) -> str:
    repository, commit = COMMITS[package]
    return f"{package} @ git+https://github.com/{repository}@{commit}"


def _is_missing(package: str) -> bool:
    # A spec without a file is a namespace package, such as any folder named t5x in the working
    # folder. airio is a namespace package itself, so a package in it is looked up.
    module = {"airio": "airio.pygrain"}.get(package, package)
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return True
    return spec is None or spec.origin is None


def problems() -> list[str]:
    """Returns a line for each package that is missing or does not import; empty if T5X works."""
    missing = [name for name in EXTRA if _is_missing(name)]
    lines = []
    if missing:
        lines.append(
            f"missing: {', '.join(missing)}: pip install -c constraints.txt -e '.[t5x]'"
            f" ({_INSTALL})"
        )
    lines += [
        f"missing: {name}: pip install --no-deps '{_requirement(name)}' ({_INSTALL})"
        for name in filter(_is_missing, COMMITS)
    ]
    # Imports are tried only if nothing is missing: they would report the same packages again.
    return lines or _import_problems()


def _import(module: str) -> None:
    seqio_import.import_seqio()  # first, because it silences TensorFlow's start-up messages
    importlib.import_module(module)


def _import_problems() -> list[str]:
    """Returns a line for the first module that does not import; dependencies come first."""
    for name in ("jestimator.amos", "airio.pygrain", "t5x.train", "t5x.eval", "t5x.infer"):
        try:
            _import(name)
        except Exception as error:  # the imported packages raise errors of all kinds
            message = first_line(error)
            package = name.split(".")[0]
            hint = f"try pip install --no-deps --force-reinstall '{_requirement(package)}'"
            if package == "jestimator":
                hint = f"PyPI's version does not work with this jax: {hint}"
            return [f"{name} does not import ({type(error).__name__}: {message}): {hint}"]
    return []


def notes() -> list[str]:
    """Returns a line for each known, possibly harmless difference from the tested installation."""
    lines = []
    for name, (_, tested) in COMMITS.items():
        commit = _commit(name)
        if commit not in (None, tested):
            lines.append(f"{name} is at commit {commit}; tested with {tested}")
    if _version("seqio-nightly"):
        lines.append(
            "seqio-nightly is installed (t5 requires it) and overwrites files of seqio; if tasks"
            " fail: pip uninstall seqio-nightly, then reinstall seqio"
        )
    return lines


def versions() -> str:
    """Returns T5X's commit, if pip recorded it, and the versions of its main dependencies."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow")
    parts = [f"t5x {_commit('t5x') or 'at an unknown commit'}"]
    return ", ".join(parts + [f"{name} {_version(name)}" for name in packages])


def _commit(package: str) -> str | None:
    """Returns the commit of a package that pip installed from git, else None."""
    try:
        text = importlib.metadata.distribution(package).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(text or "{}").get("vcs_info", {}).get("commit_id")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
