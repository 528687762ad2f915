"""The Python API's `rank` against its compiled program, and the time to its first answer.

    python benchmarks/api_rank.py [--inputs 16] [--choices 4] [--rounds 10] [--size small]
        [--json FILE]

Texts of 256 tokens in the quickstart's vocabulary with choices of 8, T5 v1.1 Small with random
weights in float32, on two CPU threads. The peer is `steps.score_choices` on a batch that is on the
device already, so that the ratio shows what tokenizing, padding and sorting cost. The time to the
first answer is that from the start of `import pemoe_jax` to the end of `rank` of one text by the
quickstart's base. A run that does not count fills the cache of compiled programs before.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

import common
import machine
import workers

QUICKSTART = workers.REPO / "tasks/quickstart"
LENGTHS = 256, 8  # tokens of an input and of a choice
FIRST_ANSWER = f"""
import json, time
wall, cpu = time.perf_counter(), time.process_time()
import pemoe_jax
model = pemoe_jax.load_model(
    {str(QUICKSTART / "base.safetensors")!r}, vocabulary={str(QUICKSTART / "vocab.model")!r}
)
model.rank("Did they like it?", ["yes", "no"])
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=10, size="small")
    parser.add_argument("--inputs", default=16, type=int)
    parser.add_argument("--choices", default=4, type=int)
    args = parser.parse_args()
    machine.pin()
    with tempfile.TemporaryDirectory() as folder:
        # By default jax caches no program that compiles in less than a second.
        os.environ |= {
            "PYTHONPATH": str(workers.REPO),
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        first_answer()
        first, load = workers.Side("first answer, programs cached"), machine.OtherLoad()
        for _ in range(args.rounds):
            first.times.append(first_answer())
        first_load = load.share(sum(cpu for _, cpu in first.times))
        rank_row = compare_rank(args, pathlib.Path(folder))
    first.info["versions"] = rank_row["ours"]["versions"]
    rows = [rank_row, common.make_row("api_rank/cpu first answer", first, None, first_load)]
    common.write_rows(rows, args.json)


def first_answer() -> tuple[float, float]:
    """Returns the seconds and the CPU seconds of `FIRST_ANSWER` in a new process."""
    command = [sys.executable, "-c", FIRST_ANSWER]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    seconds, cpu = json.loads(done.stdout)
    return seconds, cpu


def compare_rank(args: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Returns the row that compares `rank` with the program that it runs."""
    import functools

    import jax
    import numpy as np
    import ours

    import pemoe_jax
    from pemoe_jax.checkpoints import base_model
    from pemoe_jax.core import params as params_lib
    from pemoe_jax.core import steps
    from pemoe_jax.tasks import tokenizer

    network = ours.make_model({"dimensions": common.dimensions(args.size)})
    weights = params_lib.unflatten(ours.random_params(network, ()))
    base_model.save_base(folder / "base.safetensors", weights, network.config.as_dict())
    vocabulary = tokenizer.open_tokenizer(QUICKSTART / "vocab.model")
    model = pemoe_jax.load_model(folder / "base.safetensors", vocabulary=QUICKSTART / "vocab.model")
    words = ["film", "match", "coach", "river", "winter", "school", "bread", "garden"]
    generator = random.Random(0)

    def make_text(length: int) -> str:
        """Returns words of at most `length` tokens, EOS included, and at least `length` - 8."""
        text = ""
        while len(vocabulary.encode(longer := f"{text} {generator.choice(words)}")) < length:
            text = longer
        return text

    texts = [make_text(LENGTHS[0]) for _ in range(args.inputs)]
    choices = [[make_text(LENGTHS[1]) for _ in range(args.choices)] for _ in texts]

    # The peer's batch: ids with EOS, padded to one length.
    def encode(text: str, length: int) -> np.ndarray:
        ids = [*vocabulary.encode(text), 1]
        return np.pad(np.array(ids, np.int32), (0, length - len(ids)))

    targets = np.array([[encode(choice, LENGTHS[1]) for choice in row] for row in choices])
    batch = {
        "encoder_input_tokens": np.array([encode(text, LENGTHS[0]) for text in texts]),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1],
    }
    batch = jax.device_put(batch)
    program = jax.jit(functools.partial(steps.score_choices, network)).lower(weights, batch)
    compiled = program.compile()
    # Both sides must do the same work: the best choices' scores are compared.
    scores = np.asarray(compiled(weights, batch))
    ranked = model.rank(texts, choices)
    if not np.allclose([row[0].log_prob for row in ranked], scores.max(axis=1), rtol=1e-4):
        raise SystemExit("scores must agree, but those of the API differ")
    functions = {
        "rank": lambda: model.rank(texts, choices),
        "its program": lambda: np.asarray(compiled(weights, batch)),
    }
    (api, direct), other_load = workers.alternate_functions(functions, args.rounds)
    for side in (api, direct):
        side.info |= workers.jax_info(gpu=False)
    return common.make_row("api_rank/cpu", api, direct, other_load)


if __name__ == "__main__":
    main()
