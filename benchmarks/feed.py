"""Cost of the training feed: batches per second, the first batch, and resuming far into the data.

    python benchmarks/feed.py --jsonl_dir=… --vocab_path=… [--start 100000000]
        [--inputs 1024] [--targets 256] [--batch_size 8] [--seconds 15]

Reads the training mixture of a folder of JSON lines from example `--start`, packed, as
`pemoe_jax.train` does, and prints one figure per line. The memory is the increase of the process's
anonymous memory, from just before the first batch to its peak.
"""

import argparse
import time

import machine


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jsonl_dir", required=True)
    parser.add_argument("--vocab_path", required=True)
    parser.add_argument("--start", type=int, default=0, help="number of the first example")
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--targets", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15)
    args = parser.parse_args()
    from pemoe_jax.data import feed, seqio_import
    from pemoe_jax.tasks import jsonl

    clock = time.monotonic()
    # seqio is imported first, so that this does not count as time to the first batch.
    seqio_import.import_seqio()
    jsonl.register(args.jsonl_dir, args.vocab_path, use=("train",))
    print(f"imports and checking the files: {time.monotonic() - clock:.2f} s")
    lengths = {"inputs": args.inputs, "targets": args.targets}
    filled = num_batches = 0
    with machine.PeakMemory() as peak:
        clock = time.monotonic()
        start = {"examples": args.start}
        batches = feed.train_batches("jsonl_train", lengths, args.batch_size, start=start)
        next(batches)
        print(f"first batch: {time.monotonic() - clock:.2f} s")
        before = batches.position["examples"]
        clock = time.monotonic()
        while (seconds := time.monotonic() - clock) < args.seconds:
            batch = next(batches)
            num_batches += 1
            filled += int((batch["encoder_input_tokens"] > 0).sum())
    examples, rows = batches.position["examples"] - before, num_batches * args.batch_size
    print(f"batches/s: {num_batches / seconds:.2f}, examples/s: {examples / seconds:.2f}")
    print(f"examples per row: {examples / rows:.2f}")
    print(f"input positions filled: {filled / rows / args.inputs:.1%}")
    print(f"memory added: {peak.added / machine.MEGABYTE:.0f} MB")


if __name__ == "__main__":
    main()
