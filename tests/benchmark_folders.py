"""Small folders in the formats of MMLU and BIG-Bench Hard, with questions of our own."""

import csv
import json
import pathlib

# Subject -> things and what they are, of which the options are drawn.
SUBJECTS = {
    "astronomy": {"the sun": "a star", "the moon": "a moon", "mars": "a planet", "a comet": "ice"},
    "philosophy": {"plato": "a man", "a claim": "a thought", "a proof": "a text", "yes": "a word"},
    "sociology": {"a town": "a place", "a baker": "a job", "a fair": "a feast", "tax": "money"},
    "college_biology": {
        "a fox": "a beast",
        "an owl": "a bird",
        "grass": "a plant",
        "mould": "a rot",
    },
    "nutrition": {"bread": "food", "tea": "a drink", "salt": "a spice", "a plate": "a dish"},
}
LETTERS = "ABCD"
# Questions of test: their numbers differ, as subjects have equal weights all the same.
TEST_SIZES = dict(zip(SUBJECTS, (6, 5, 4, 7, 3), strict=True))


def questions(subject: str, count: int) -> list[list[str]]:
    """Returns rows of a file; the answers are A, B, C, D in turn."""
    things = list(SUBJECTS[subject].items())
    rows = []
    for number in range(count):
        thing, answer = things[number % 4]
        options = [kind for _, kind in things if kind != answer]
        options.insert(number % 4, answer)
        question = f"What is {thing}, in the words of guest {number + 1}?"
        rows.append([question, *options, LETTERS[number % 4]])
    return rows


def write_csv(path: pathlib.Path, rows: list[list[str]]) -> pathlib.Path:
    """Writes rows without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_mmlu(folder: pathlib.Path) -> pathlib.Path:
    """Writes five subjects of all areas, with 5 questions of dev and 4 of val each."""
    for subject, size in TEST_SIZES.items():
        rows = questions(subject, 9 + size)
        for split, part in (("dev", rows[:5]), ("val", rows[5:9]), ("test", rows[9:])):
            write_csv(folder / split / f"{subject}_{split}.csv", part)
    return folder


def solved(number: int) -> tuple[str, str, str]:
    """Returns question, reasoning and answer of an example about steps."""
    steps = number + 1
    question = f"If I take {steps} steps to the left and {steps} to the right, am I back?"
    wrong = number % 3 == 1
    if wrong:
        question = question.replace(f"{steps} to the right", f"{steps + 1} to the right")
    answer = "no" if wrong else "yes"
    reasoning = f"I took {steps} steps.\nI took as many back: {answer}."
    return question, reasoning, answer


BBH_TASKS = ("navigate", "logical_deduction_three_objects", "logical_deduction_five_objects")


def write_bbh(folder: pathlib.Path) -> pathlib.Path:
    """Writes three tasks, of which two are one in the mean, with 5 examples and 3 shots each."""
    for path in ("bbh", "cot-prompts"):
        (folder / path).mkdir(parents=True)
    for start, task in enumerate(BBH_TASKS):
        lines = ["This line says that the file is not to be trained on.", "-----"]
        lines += [f"Say whether I am back ({task}).", ""]
        for number in range(3):
            question, reasoning, answer = solved(start + number)
            lines += [f"Q: {question}", "A: Let's think step by step."]
            lines += [f"{reasoning} So the answer is {answer}.", ""]
        (folder / "cot-prompts" / f"{task}.txt").write_text("\n".join(lines))
        examples = [solved(start + number) for number in range(3, 8)]
        content = {
            "canary": "none",
            "examples": [{"input": text, "target": answer} for text, _, answer in examples],
        }
        (folder / "bbh" / f"{task}.json").write_text(json.dumps(content))
    return folder
