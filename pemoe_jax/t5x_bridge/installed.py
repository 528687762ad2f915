"""Whether T5X is here and works; said in plain words. Imports nothing that could be missing."""

import importlib
import importlib.metadata
import importlib.util
import json

from pemoe_jax.data import seqio_import

# What T5X imports beside what we require ourselves: the extra `t5x` of setup.py.
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

# On GitHub alone, or there in another state than on PyPI: what was tested, by commit. Their own
# lists of requirements ask for several versions of a package at once, so pip takes them without.
COMMITS = {
    "t5x": ("google-research/t5x", "cc342d419ec3e3e9c4bf1df33c82330cafdc1e16"),
    "airio": ("google/airio", "69897df7d9a427b947a9f7bb4164c7782b43e601"),
    "jestimator": ("google-research/jestimator", "326824a477feef6d92e6f44175000907a72899ca"),
}

_INSTALL = "make t5x installs all of it"


def requirements() -> list[str]:
    """What `pip install --no-deps` takes, at the commits that were tested."""
    return [
        f"{name} @ git+https://github.com/{repository}@{commit}"
        for name, (repository, commit) in COMMITS.items()
    ]


def _is_missing(package: str) -> bool:
    # airio has no file of its own name; a folder called t5x is found as a package without one
    module = {"airio": "airio.pygrain"}.get(package, package)
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return True
    return found is None or found.origin is None


def problems() -> list[str]:
    """What is missing or does not work, a line each; empty where T5X can be used."""
    missing = [name for name in EXTRA if _is_missing(name)]
    found = []
    if missing:
        found.append(
            f"missing: {', '.join(missing)}: pip install -c constraints.txt -e '.[t5x]'"
            f" ({_INSTALL})"
        )
    absent = [name for name in COMMITS if _is_missing(name)]
    for requirement in requirements():
        name = requirement.split(" ")[0]
        if name in absent:
            found.append(f"missing: {name}: pip install --no-deps '{requirement}' ({_INSTALL})")
    return found or _not_importing()


def _import(module: str) -> None:
    seqio_import.import_seqio()  # which keeps from the terminal what TensorFlow has to say
    importlib.import_module(module)


def _not_importing() -> list[str]:
    for name in ("jestimator.amos", "airio.pygrain", "t5x.train", "t5x.eval", "t5x.infer"):
        try:
            _import(name)
        except Exception as error:  # of whatever kind the packages below raise
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            package = name.split(".")[0]
            hint = f"try pip install --no-deps --force-reinstall '{_requirement(package)}'"
            if package == "jestimator":
                hint = f"PyPI's does not work with this jax: {hint}"
            return [f"{name} does not import ({type(error).__name__}: {said}): {hint}"]
    return []


def _requirement(package: str) -> str:
    return next(line for line in requirements() if line.startswith(f"{package} "))


def notes() -> list[str]:
    """What differs from what was tested, and may do no harm."""
    found = []
    for name, (_, tested) in COMMITS.items():
        commit = _commit(name)
        if commit not in (None, tested):
            found.append(f"{name} is at commit {commit}; tested with {tested}")
    if _version("seqio-nightly"):
        found.append(
            "seqio-nightly is installed (the package t5 brings it): it overwrites files of seqio;"
            " if tasks fail: pip uninstall seqio-nightly, then reinstall seqio"
        )
    return found


def versions() -> str:
    """T5X's commit where pip knows it, and the versions of what it stands on."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow")
    parts = [f"t5x {_commit('t5x') or 'of an unknown commit'}"]
    return ", ".join(parts + [f"{name} {_version(name)}" for name in packages])


def _commit(package: str) -> str | None:
    """That pip installed a package at; None where it did not, or not from git."""
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
