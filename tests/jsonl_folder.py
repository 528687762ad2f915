"""A small folder of prompted tasks and its vocabulary, for end-to-end tests."""

import json
import pathlib

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red"}
WORDS = [*COLOURS, *COLOURS.values(), "the", "colour", "of", "is", "what", "say", "yes", "no", "or"]


def write_folder(folder: pathlib.Path) -> None:
    """Two prompts of a training dataset, one without choices, and two of a held-out dataset."""
    index = {}

    def task(name: str, rows: list[dict], dataset: str, do_train: str, do_eval: str) -> None:
        (folder / name).mkdir(parents=True)
        for split, part in (("train", rows), ("validation", rows[:6])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / name / f"{split}.jsonl").write_text(lines)
        index[name] = {
            "dataset": dataset,
            "original_task": True,
            "t0_do_train": do_train,
            "t0_do_eval": do_eval,
        }

    things = list(COLOURS.items()) * 4
    choices = sorted(COLOURS.values())
    for number, prompt in enumerate(("what colour is {}", "the colour of the {} is"), 1):
        rows = [
            {"inputs": prompt.format(thing), "targets": colour, "answer_choices": choices}
            for thing, colour in things
        ]
        task(f"colour_{number}", rows, "colour", "BASE", "")
    task("free_1", [{"inputs": f"say {t}", "targets": c} for t, c in things], "free", "BASE", "")
    for number, prompt in enumerate(("is the {} {} yes or no", "say yes or no the {} is {}"), 1):
        rows = [
            {
                "inputs": prompt.format(thing, choices[i % 4]),
                "targets": "yes" if colour == choices[i % 4] else "no",
                "answer_choices": ["yes", "no"],
            }
            for i, (thing, colour) in enumerate(things)
        ]
        task(f"check_{number}", rows, "check", "", "BASE")
    (folder / "INDEX.json").write_text(json.dumps(index))


def write_vocabulary(path: pathlib.Path) -> None:
    """A SentencePiece file with pad 0, eos 1, unk 2."""
    import sentencepiece

    sentences = iter([" ".join(WORDS)] * 50)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=file,
            vocab_size=80,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
