"""The command `pemoe`, also `python -m pemoe_jax`: lists the commands and runs them."""

import importlib
import sys
from collections.abc import Sequence

# Command -> (its module, what it does). A module is imported when its command runs, so that the
# list of commands prints at once.
COMMANDS = {
    "train": ("pemoe_jax.train", "train adapters, or all parameters, on a base model"),
    "evaluate": ("pemoe_jax.evaluate", "score held-out tasks by rank classification"),
    "infer": ("pemoe_jax.infer", "generate answers and compute each task's metrics"),
    "report": ("pemoe_jax.tools.report", "print the zero-shot table of several evaluations"),
    "routes": ("pemoe_jax.tools.routes", "show which experts tasks and tokens use"),
    "count": ("pemoe_jax.tools.count", "count trainable and total parameters"),
    "plan": ("pemoe_jax.tools.plan", "estimate memory and communication on many devices"),
    "sweep": ("pemoe_jax.tools.sweep", "run and resume a list of trainings and evaluations"),
    "convert": ("pemoe_jax.tools.convert", "export adapters and models, also to PEFT and HF"),
    "verify": ("pemoe_jax.tools.verify", "read files and report which are damaged"),
    "embed": ("pemoe_jax.tools.embed", "write sentence embeddings for sentence routing"),
    "lm_eval": ("pemoe_jax.tools.lm_eval", "run lm-evaluation-harness with a model and adapter"),
    "export_tasks": ("pemoe_jax.tools.export_tasks", "write tasks for lm-evaluation-harness"),
    "cache_tasks": ("pemoe_jax.tools.cache_tasks", "cache P3 tasks offline"),
}

USAGE = """\
usage: pemoe COMMAND [options]

Instruction tuning of T5 with mixtures of parameter-efficient experts.

commands:
{}

pemoe COMMAND --help describes a command; pemoe --version prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the named command and returns its exit code; 2 for an unknown command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format("\n".join(f"  {name:<12}  {COMMANDS[name][1]}" for name in COMMANDS)))
        return 0
    command, *rest = arguments
    if command == "--version":
        from pemoe_jax import __version__

        print(f"pemoe_jax {__version__}")
        return 0
    if command not in COMMANDS:
        expected = ", ".join(COMMANDS)
        print(f"error: unknown command {command!r}: expected one of {expected}", file=sys.stderr)
        return 2
    # Imported, and not run as `__main__`, because gin configures the imported module's functions.
    return importlib.import_module(COMMANDS[command][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
