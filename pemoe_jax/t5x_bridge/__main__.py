"""Whether T5X is installed as it should be: `python -m pemoe_jax.t5x_bridge --check`."""

import argparse
import sys
from collections.abc import Sequence

from pemoe_jax.t5x_bridge import installed


def flags() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m pemoe_jax.t5x_bridge",
        description="T5X is on no package registry; make t5x installs it, docs/t5x.md says more.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--check", action="store_true", help="says what is missing, if anything; exit code 0 or 1"
    )
    what.add_argument(
        "--requirements", action="store_true", help="prints what pip install --no-deps takes"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = flags().parse_args(argv)
    if args.requirements:
        print("\n".join(installed.requirements()))
        return 0
    found = installed.problems()
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if found:
        return 1
    for line in installed.notes():
        print(f"note: {line}")
    print(f"T5X works: {installed.versions()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
