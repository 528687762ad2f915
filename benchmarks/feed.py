"""What the training feed costs: batches a second, the first batch, and going on from far away.

    python benchmarks/feed.py --jsonl_dir=… --vocab_path=… [--inputs 1024] [--targets 256]
        [--batch_size 8] [--seconds 15] [--far 100000000]

Reads the training mixture of a folder of JSON lines, packed, as `pemoe_jax.train` does, and prints
one table: from the beginning and from example `--far`, each in a process of its own. Importing the
libraries and checking the folder's files is a row of its own, and in no other. Memory is the peak
of the process's anonymous memory while batches were made, less what it had before.
"""

import argparse
import json
import subprocess
import sys
import time

import common


def measure(args: argparse.Namespace, start: int) -> dict[str, float]:
    """One column of the table."""
    from pemoe_jax.data import feed, seqio_import
    from pemoe_jax.tasks import jsonl

    clock = time.monotonic()
    seqio_import.import_seqio()
    jsonl.register(args.jsonl_dir, args.vocab_path, use=("train",))
    ready = time.monotonic() - clock
    lengths = {"inputs": args.inputs, "targets": args.targets}
    filled = batches = 0
    with common.Peak() as peak:
        clock = time.monotonic()
        made = feed.train_batches(
            "jsonl_train", lengths, args.batch_size, start={"examples": start}
        )
        next(made)
        first = time.monotonic() - clock
        before = made.position["examples"]
        clock = time.monotonic()
        while (seconds := time.monotonic() - clock) < args.seconds:
            batch = next(made)
            batches += 1
            filled += int((batch["encoder_input_tokens"] > 0).sum())
    examples = made.position["examples"] - before
    rows = batches * args.batch_size
    return {
        "imports and reading the files through, s": ready,
        "first batch, s": first,
        "batches/s": batches / seconds,
        "rows/s": rows / seconds,
        "examples/s": examples / seconds,
        "input tokens/s": filled / seconds,
        "examples in a row": examples / rows,
        "input places filled, %": 100 * filled / rows / args.inputs,
        "memory added, MB": peak.added / common.MEGABYTE,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jsonl_dir", required=True)
    parser.add_argument("--vocab_path", required=True)
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--targets", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--far", type=int, default=100_000_000)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # what the processes are given
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(measure(args, args.only)))
        return
    columns = {}
    for start in (0, args.far):
        command = [sys.executable, __file__, *sys.argv[1:], f"--only={start}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        columns[start] = json.loads(done.stdout.splitlines()[-1])
    print("| from example |", " | ".join(f"{start:,}" for start in columns), "|")
    print("| --- |" + " ---: |" * len(columns))
    for name in columns[0]:
        print(f"| {name} |", " | ".join(f"{column[name]:,.2f}" for column in columns.values()), "|")


if __name__ == "__main__":
    main()
