"""Cost of the training feed: batches per second, the first batch, and resuming far into the data.

    python benchmarks/feed.py --jsonl_dir=… --vocab_path=… [--inputs 1024] [--targets 256]
        [--batch_size 8] [--seconds 15] [--far 100000000]

Reads the training mixture of a folder of JSON lines, packed, as `pemoe_jax.train` does, and prints
one table with a column from the first example and one from example `--far`, each in a separate
process. Importing the libraries and checking the folder's files is a row of its own that the other
rows exclude. Memory is the peak of the process's anonymous memory above that before the batches.
"""

import argparse
import json
import subprocess
import sys
import time

import machine


def measure(args: argparse.Namespace, start: int) -> dict[str, float]:
    """Returns one column of the table."""
    from pemoe_jax.data import feed, seqio_import
    from pemoe_jax.tasks import jsonl

    clock = time.monotonic()
    seqio_import.import_seqio()
    jsonl.register(args.jsonl_dir, args.vocab_path, use=("train",))
    ready = time.monotonic() - clock
    lengths = {"inputs": args.inputs, "targets": args.targets}
    filled = num_batches = 0
    with machine.PeakMemory() as peak:
        clock = time.monotonic()
        batches = feed.train_batches(
            "jsonl_train", lengths, args.batch_size, start={"examples": start}
        )
        next(batches)
        first = time.monotonic() - clock
        before = batches.position["examples"]
        clock = time.monotonic()
        while (seconds := time.monotonic() - clock) < args.seconds:
            batch = next(batches)
            num_batches += 1
            filled += int((batch["encoder_input_tokens"] > 0).sum())
    examples = batches.position["examples"] - before
    rows = num_batches * args.batch_size
    return {
        "imports and checking the files, s": ready,
        "first batch, s": first,
        "batches/s": num_batches / seconds,
        "rows/s": rows / seconds,
        "examples/s": examples / seconds,
        "input tokens/s": filled / seconds,
        "examples per row": examples / rows,
        "input positions filled, %": 100 * filled / rows / args.inputs,
        "memory added, MB": peak.added / machine.MEGABYTE,
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
    parser.add_argument(
        "--only", type=int, help=argparse.SUPPRESS
    )  # in the processes of the columns
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(measure(args, args.only)))
        return
    columns = {}
    for start in (0, args.far):
        command = [sys.executable, __file__, *sys.argv[1:], f"--only={start}"]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        columns[start] = json.loads(process.stdout.splitlines()[-1])
    print("| from example |", " | ".join(f"{start:,}" for start in columns), "|")
    print("| --- |" + " ---: |" * len(columns))
    for name in columns[0]:
        print(f"| {name} |", " | ".join(f"{column[name]:,.2f}" for column in columns.values()), "|")


if __name__ == "__main__":
    main()
