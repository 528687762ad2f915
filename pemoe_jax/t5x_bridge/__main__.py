"""`python -m pemoe_jax.t5x_bridge`: checks that T5X can be imported, or lists what to install."""

import argparse
import sys
from collections.abc import Sequence

from pemoe_jax.t5x_bridge import installed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pemoe_jax.t5x_bridge",
        description="T5X is not on any package registry; `make t5x` installs it. See docs/t5x.md.",
        allow_abbrev=False,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--check", action="store_true", help="report what is missing; exit code 1 if anything is"
    )
    help_text = "print the packages for `pip install --no-deps`, at the tested commits"
    action.add_argument("--requirements", action="store_true", help=help_text)
    args = parser.parse_args(argv)
    if args.requirements:
        print("\n".join(installed.requirements()))
        return 0
    problems = installed.problems()
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    if problems:
        return 1
    for line in installed.notes():
        print(f"note: {line}")
    print(f"T5X works: {installed.versions()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
