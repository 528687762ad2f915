"""Speed of lm-evaluation-harness's multiple-choice requests, with our model and with its own.

    python benchmarks/lm_eval_choices.py [--requests 200] [--choices 4] [--length 128] [--rounds 3]
        [--size small] [--json FILE]

`LM.loglikelihood` of contexts of up to `length` tokens with choices of 8, in the quickstart's
vocabulary, T5 v1.1 Small with random weights in float32, on two CPU threads. The peer is lm_eval's
`HFLM` (transformers, backend seq2seq) on the same folder, which runs the model for each choice. Our
model ends every choice in EOS and the peer does not, so its choices end in the text `</s>`, and
both score the same tokens. Needs the extras lm-eval and test.
"""

import os
import pathlib
import random
import shutil
import tempfile
import types
from typing import Any

import common
import machine
import workers

VOCABULARY = workers.REPO / "tasks/quickstart/vocab.model"
WORDS = ["film", "match", "coach", "river", "winter", "school", "bread", "garden"]
BATCH = 16  # contexts per batch; the peer's batches have a row for each choice of as many contexts


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=3, size="small")
    parser.add_argument("--requests", default=200, type=int, help="number of contexts")
    parser.add_argument("--choices", default=4, type=int)
    parser.add_argument("--length", default=128, type=int, help="tokens of a context")
    args = parser.parse_args()
    machine.pin()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        write_model(pathlib.Path(folder), args.size)
        functions, scores = make_sides(folder, args)
        # Compiles the programs and allocates memory.
        ours, peer = (function() for function in functions.values())
        error = max(abs(a - b) / abs(b) for a, b in zip(scores(ours), scores(peer), strict=True))
        if error > 1e-4:
            raise SystemExit(f"scores must agree, but differ by {error:.1e}")
        sides, other_load = workers.alternate_functions(functions, args.rounds)
        for side in sides:
            side.info["versions"] = machine.versions("jax", "torch", "transformers", "lm_eval")
    common.write_rows([common.make_row("lm_eval_choices/cpu", *sides, other_load)], args.json)


def write_model(folder: pathlib.Path, size: str) -> None:
    """Writes a model with random weights as a folder of Hugging Face."""
    import numpy as np
    import ours

    from pemoe_jax.checkpoints import huggingface, lazy_array

    network = ours.make_model({"dimensions": common.dimensions(size)})
    weights = ours.random_params(network, ())
    arrays = {path: lazy_array.from_numpy(np.asarray(array)) for path, array in weights.items()}
    huggingface.save_checkpoint(folder / "model", arrays)
    shutil.copy(VOCABULARY, folder / "model" / "spiece.model")


def make_sides(folder: str, args: Any) -> tuple[dict[str, Any], Any]:
    """Returns each side's function that answers all requests, and one from answers to scores."""
    import safetensors.torch
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from pemoe_jax.tools import lm_eval_model

    torch.set_num_threads(2)
    model = f"{folder}/model"
    tokenizer = transformers.T5Tokenizer.from_pretrained(model)
    ours = lm_eval_model.PemoeLM(base=model, batch_size=BATCH)
    peer = HFLM(
        pretrained=model,
        backend="seq2seq",
        tokenizer=tokenizer,
        device="cpu",
        dtype="float32",
        batch_size=BATCH * args.choices,
        max_length=2 * args.length,
    )
    # lm_eval 0.4.13 with transformers 5 ties the head of every T5 to the embedding, so the file's
    # own head is set again.
    arrays = safetensors.torch.load_file(f"{model}/model.safetensors")
    peer.model.lm_head.weight = torch.nn.Parameter(arrays["lm_head.weight"])
    generator = random.Random(0)

    def make_text(length: int) -> str:
        words = [generator.choice(WORDS)]
        while len(ours.model.tokenizer.encode(" ".join(words))) < length - 4:
            words.append(generator.choice(WORDS))
        return " ".join(words)

    contexts = [make_text(args.length) for _ in range(args.requests)]
    pairs = [(text, make_text(8)) for text in contexts for _ in range(args.choices)]

    def ask(model: Any, end: str) -> list[tuple[float, bool]]:
        requests = [types.SimpleNamespace(args=(text, choice + end)) for text, choice in pairs]
        return model.loglikelihood(requests, disable_tqdm=True)

    functions = {
        "pemoe, contexts encoded once": lambda: ask(ours, ""),
        "lm_eval's hf, one pass per choice": lambda: ask(peer, "</s>"),
    }
    return functions, lambda answers: [log_prob for log_prob, _ in answers]


if __name__ == "__main__":
    main()
