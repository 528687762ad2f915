"""Generates the quickstart's sample, vocabulary and pretraining text.

    python -m pemoe_jax.tasks.quickstart.generate OUT_DIR

Writes `OUT_DIR/sample/<task>/<split>.jsonl` with an `INDEX.json`, `OUT_DIR/corpus.txt`, and
`OUT_DIR/vocab.model` if it does not exist or with `--vocab`. The files depend only on the seed.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import math
import pathlib
import re
import string
from typing import Any

from pemoe_jax.tasks.quickstart import corpus, world
from pemoe_jax.tasks.quickstart.prompts import Dataset, datasets
from pemoe_jax.tasks.quickstart.world import TextRng

CORPUS_LINES = 150_000
# {whether the dataset is held out: {split: examples per prompt}}
SIZES = {False: {"train": 100, "validation": 20}, True: {"validation": 100}}

Line = dict[str, Any]


def _rows(
    dataset: Dataset, prompt: str, split: str, n: int, taken: set[str], seed: int
) -> list[Line]:
    """Draws up to `n` examples with balanced answers.

    Args:
      dataset: draws and renders rows.
      prompt: name of the prompt.
      split: name of the split, which is part of the seed.
      n: number of examples; fewer if the draws repeat.
      taken: examples of other splits, as JSON, which are not drawn again. The new ones are added.
      seed: seed of the sample.
    """
    rng = TextRng(f"sample {seed} {dataset.name} {prompt} {split}")
    lines: list[Line] = []
    answers: collections.Counter[str] = collections.Counter()
    # More draws than rows, because some are rejected: those that repeat a row, and those whose
    # answer has its share of rows already.
    for _ in range(100 * n):
        if len(lines) == n:
            break
        line = dataset.render(prompt, dataset.draw(rng))
        key = json.dumps(line, sort_keys=True)
        max_count = math.ceil(n / len(line["answer_choices"]))
        # With balanced answers, a model that always prefers one label scores at chance.
        if key not in taken and answers[line["targets"]] < max_count:
            taken.add(key)
            answers[line["targets"]] += 1
            lines.append(line)
    return lines


def _line(inputs: str, targets: str, choices: list[str]) -> Line:
    return {"inputs": inputs, "targets": targets, "answer_choices": choices}


def odd_rows(seed: int) -> dict[str, list[Line]]:
    """Returns {<task>/<split>: odd rows}, which show how readers report oddities of real data."""
    rng = TextRng(f"odd {seed}")
    food = world.TOPICS[0]
    long_text = " ".join(rng.detail(food) for _ in range(300)).split()
    # 2,000 words with the question, which has seven.
    long_story = _line(
        f"What is the subject of this text? {' '.join(long_text[:1993])}", "food", ["food", "music"]
    )
    fifty = [f"{name} and the {thing}" for name in world.NAMES for thing in food.things][:50]
    review = "Does the writer of this review mean good or bad?"
    sense = "Which does the word plate mean here: food or health?"
    not_a_choice = f"{rng.story(food)} Which topic is this text about?"
    return {
        # In training tasks: a target that is not among its choices, duplicate choices, an empty
        # input, and an input of 2,000 words.
        "town_news_which_topic/train": [_line(not_a_choice, "cooking", world.TOPIC_NAMES[:4])],
        "guest_reviews_good_or_bad/train": [
            _line(f"{review} {rng.opinion(food, True)}", "good", ["good", "bad", "good"])
        ],
        "town_calendar_past_or_future/train": [_line("", "past", ["past", "future"])],
        "town_news_subject_first/train": [long_story],
        # In held-out tasks: the same, and 50 choices.
        "two_meanings_which_sense/validation": [
            _line(f"{rng.detail(food)} {sense}", "kitchen", ["food", "health"])
        ],
        "two_meanings_question_answer/validation": [
            _line(f"{rng.detail(food)} {sense}", "food", ["food", "health", "food"])
        ],
        "two_meanings_decide/validation": [long_story],
        "next_lines_best_ending/validation": [
            _line("", "The end.", ["The end.", "The story was long."])
        ],
        "who_is_meant_who_did/validation": [
            _line("Question: who came with what? Answer:", fifty[7], fifty)
        ],
    }


def sample(seed: int = 0) -> tuple[dict[str, list[Line]], dict[str, Line]]:
    """Returns the files {<task>/<split>: lines} and the index {task: entry}."""
    files: dict[str, list[Line]] = {}
    index: dict[str, Line] = {}
    odd = odd_rows(seed)
    for dataset in datasets():
        for prompt, template in dataset.prompts.items():
            task, taken = f"{dataset.name}_{prompt}", set[str]()
            # The smaller split is drawn first, because a dataset of few words may run out of
            # distinct rows.
            for split, n in reversed(SIZES[dataset.held_out].items()):
                rows = _rows(dataset, prompt, split, n, taken, seed)
                files[f"{task}/{split}"] = rows + odd.get(f"{task}/{split}", [])
            splits = {split: files[f"{task}/{split}"] for split in SIZES[dataset.held_out]}
            lines = [line for rows in splits.values() for line in rows]
            # Odd rows of train splits do not count: a prompt's choices are fixed in spite of them.
            choices = {
                tuple(line["answer_choices"])
                for rows in splits.values()
                for line in rows
                if line not in odd.get(f"{task}/train", [])
            }
            index[task] = {
                "choices_in_prompt": "{option" in template,
                "dataset": dataset.name,
                "fixed_answer_choices": list(choices.pop()) if len(choices) == 1 else None,
                "has_answer_choices": True,
                "metrics": ["Accuracy"],
                "n": {split: len(rows) for split, rows in splits.items()},
                "original_task": True,
                "subset": None,
                "t0_do_eval": "BASE" if dataset.held_out else "",
                "t0_do_train": "" if dataset.held_out else "BASE",
                "targets_not_in_choices": sum(
                    line["targets"] not in line["answer_choices"] for line in lines
                ),
                "task_type": dataset.task_type,
                "template": prompt,
            }
    return files, index


def write_sample(folder: pathlib.Path, seed: int = 0) -> None:
    """Writes the sample and its index."""
    files, index = sample(seed)
    for name, lines in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "INDEX.json").write_text(
        json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def write_corpus(path: pathlib.Path, seed: int = 0, n: int = CORPUS_LINES) -> None:
    """Writes the pretraining text, one text per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in corpus.lines(seed, n))


def write_vocabulary(path: pathlib.Path, corpus_path: pathlib.Path) -> None:
    """Writes a case-folding SentencePiece model with a piece per word of the text, and characters.

    Args:
      path: output file.
      corpus_path: the text.
    """
    import sentencepiece

    # A piece per word keeps the tiny model's sequences short. Characters cover unknown words.
    words = set(re.findall("[a-z]+", corpus_path.read_text(encoding="utf-8").lower()))
    # Written to memory first: SentencePiece would write the name of an output file into the model.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(string.ascii_lowercase + string.digits + ".,:;?!'-()"),
        model_writer=model,
        model_type="char",
        user_defined_symbols=[f"\u2581{word}" for word in sorted(words)],
        use_all_vocab=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description="Write the quickstart's sample, vocabulary and pretraining text."
    )
    parser.add_argument("out_dir", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, default=CORPUS_LINES, help="lines of pretraining text")
    parser.add_argument(
        "--vocab", action="store_true", help="train the vocabulary even if it exists"
    )
    args = parser.parse_args()
    write_sample(args.out_dir / "sample", args.seed)
    write_corpus(args.out_dir / "corpus.txt", args.seed, args.lines)
    vocabulary = args.out_dir / "vocab.model"
    if args.vocab or not vocabulary.exists():
        write_vocabulary(vocabulary, args.out_dir / "corpus.txt")
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    main()
