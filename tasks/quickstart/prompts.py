"""The sample's data sets and their prompts.

A data set draws a row: the fields of its templates, the options and the right one. A prompt renders
it: a template, and the words in which its answers are given where they are not the options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pemoe_jax.tasks.quickstart.world import (
    FEELINGS,
    FEMALE,
    MALE,
    NAMES,
    NEEDS,
    SENSES,
    STATES,
    TOPIC,
    TOPIC_NAMES,
    TOPICS,
    Dice,
    a,
    capital,
    detail,
    feeling_shown,
    future,
    opinion,
    past,
    pronoun,
    sense,
    story,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Fields of the templates, the right option, and all options."""

    fields: Mapping[str, str]
    answer: str
    options: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A way of asking."""

    name: str
    template: str
    labels: Mapping[str, str] | None = (
        None  # option -> what the answer says; None: the option itself
    )
    original: bool = True  # asks the data set's own question (P3's original-task flag)

    def render(self, row: Row) -> dict[str, Any]:
        """The row as a line of the sample."""
        fields = dict(row.fields)
        for n, option in enumerate(row.options, 1):
            fields[f"option{n}"] = option
        fields["options"] = ", ".join(row.options)
        labels = self.labels or {option: option for option in row.options}
        return {
            "inputs": capital(self.template.format(**fields)),
            "targets": labels[row.answer],
            "answer_choices": [labels[option] for option in row.options],
        }


@dataclasses.dataclass(frozen=True)
class DataSet:
    """How rows are drawn, and the prompts that ask about them."""

    name: str
    task_type: str
    held_out: bool
    draw: Callable[[Dice], Row]
    prompts: tuple[Prompt, ...]


def _options(dice: Dice, answer: str, others: Sequence[str], n: int) -> list[str]:
    return dice.shuffled(
        [answer, *dice.several([other for other in others if other != answer], n - 1)]
    )


def _topics(dice: Dice) -> Row:
    topic = dice.pick(TOPICS)
    return Row({"text": story(dice, topic)}, topic.name, _options(dice, topic.name, TOPIC_NAMES, 4))


def _reviews(dice: Dice) -> Row:
    good = dice.chance(0.5)
    return Row(
        {"text": opinion(dice, dice.pick(TOPICS), good)}, "good" if good else "bad", ("good", "bad")
    )


def _feelings(dice: Dice) -> Row:
    name, felt = dice.pick(NAMES), dice.pick(tuple(FEELINGS))
    text = feeling_shown(dice, name, felt)
    if dice.chance(0.5):
        first = past(dice, dice.pick(TOPICS), name)
        text = f"{first} {capital(feeling_shown(dice, pronoun(name), felt))}"
    return Row({"text": text, "name": name}, felt, tuple(FEELINGS))


def _places(dice: Dice) -> Row:
    topic = dice.pick(TOPICS)
    place = dice.pick(topic.places)
    others = [dice.pick(other.places) for other in TOPICS if other is not topic]
    fields = {"text": past(dice, topic, place=0.0), "thing": dice.pick(topic.things)}
    return Row(fields, place, _options(dice, place, others, 4))


def _jobs(dice: Dice) -> Row:
    topic = dice.pick(TOPICS)
    job = dice.pick(topic.jobs)
    others = [dice.pick(other.jobs) for other in TOPICS if other is not topic]
    thing, more = dice.several(topic.things, 2)
    fields = {"place": dice.pick(topic.places), "thing": thing, "other": more, "a_thing": a(thing)}
    return Row(fields, job, _options(dice, job, others, 4))


def _kinds(dice: Dice) -> Row:
    topic = dice.pick(TOPICS)
    thing, more = dice.several(topic.things, 2)
    return Row(
        {"thing": thing, "other": more, "a_thing": a(thing)},
        topic.name,
        _options(dice, topic.name, TOPIC_NAMES, 4),
    )


def _topic_check(dice: Dice) -> Row:
    topic = dice.pick(TOPICS)
    true = dice.chance(0.5)
    told = topic.name if true else dice.pick([name for name in TOPIC_NAMES if name != topic.name])
    return Row({"text": story(dice, topic), "topic": told}, "yes" if true else "no", ("yes", "no"))


def _times(dice: Dice) -> Row:
    later = dice.chance(0.5)
    topic = dice.pick(TOPICS)
    text = future(dice, topic) if later else past(dice, topic)
    return Row({"text": text}, "future" if later else "past", ("past", "future"))


def _titles(dice: Dice) -> Row:
    topic = dice.pick(TOPICS)
    title = dice.pick(topic.titles)
    others = [dice.pick(other.titles) for other in TOPICS if other is not topic]
    return Row({"text": story(dice, topic)}, title, _options(dice, title, others, 4))


def _needs(dice: Dice) -> Row:
    name, state = dice.pick(NAMES), dice.pick(STATES)
    thing = NEEDS[state][0]
    fields = {
        "name": name,
        "state": state,
        "pronoun": pronoun(name),
        "place": dice.pick(dice.pick(TOPICS).places),
    }
    return Row(fields, thing, _options(dice, thing, [NEEDS[other][0] for other in STATES], 4))


def _same(dice: Dice) -> Row:
    topic = dice.pick(TOPICS)
    same = dice.chance(0.5)
    other = topic if same else dice.pick([t for t in TOPICS if t is not topic])
    return Row(
        {"first": past(dice, topic), "second": past(dice, other)},
        "yes" if same else "no",
        ("yes", "no"),
    )


def _endings(dice: Dice) -> Row:
    name = dice.pick(NAMES)
    topic = dice.pick(TOPICS)
    text = f"{name} went to the {dice.pick(topic.places)} with the {dice.pick(topic.jobs)}."
    if dice.chance(0.5):
        text += f" {detail(dice, topic)}"
    word = capital(pronoun(name))
    right = past(dice, topic, word, place=0.0, time=0.0)
    wrong = past(dice, dice.pick([t for t in TOPICS if t is not topic]), word, place=0.0, time=0.0)
    return Row({"text": text}, right, dice.shuffled((right, wrong)))


def _entailment(dice: Dice) -> Row:
    """Does the hypothesis follow from the premise? About what happened, how it was, or when."""
    topic = dice.pick(TOPICS)
    true = dice.chance(0.5)
    kind = dice.below(3)
    if kind == 0:
        other = topic if true else dice.pick([t for t in TOPICS if t is not topic])
        premise, hypothesis = story(dice, topic), f"This has to do with {other.name}."
    elif kind == 1:
        good = dice.chance(0.5)
        premise, hypothesis = (
            opinion(dice, topic, good),
            f"It was {'good' if good == true else 'bad'}.",
        )
    else:
        later = dice.chance(0.5)
        premise = future(dice, topic) if later else past(dice, topic)
        hypothesis = f"This is in the {'future' if later == true else 'past'}."
    claim = hypothesis.removesuffix(".")
    fields = {"premise": premise, "hypothesis": hypothesis, "claim": claim[0].lower() + claim[1:]}
    return Row(fields, "yes" if true else "no", ("yes", "no"))


def _pronouns(dice: Dice) -> Row:
    one, two = dice.shuffled((dice.pick(FEMALE), dice.pick(MALE)))
    name = dice.pick((one, two))
    topic = dice.pick(TOPICS)
    word = pronoun(name)
    verb = past(dice, topic, capital(word), time=0.0)
    meeting = dice.pick(
        (
            f"{one} met {two} in the {dice.pick(topic.places)}.",
            f"{one} and {two} went to the {dice.pick(topic.places)}.",
        )
    )
    fields = {
        "text": f"{meeting} {verb}",
        "pronoun": word,
        "did": verb.removeprefix(capital(word) + " ").removesuffix("."),
    }
    return Row(fields, name, (one, two))


def _word_senses(dice: Dice) -> Row:
    word = dice.pick(tuple(SENSES))
    meant = dice.pick(SENSES[word])
    return Row(
        {"text": sense(dice, word, TOPIC[meant]), "word": word}, meant, dice.shuffled(SENSES[word])
    )


LIKED = {"good": "yes", "bad": "no"}
HATED = {"good": "no", "bad": "yes"}

DATA_SETS = (
    DataSet(
        "town_news",
        "topic_classification",
        False,
        _topics,
        (
            Prompt("which_topic", "{text} Which topic is this text about? {options}?"),
            Prompt(
                "choose_label",
                "Choose the best label for the following text: {options}. Text: {text} Label:",
            ),
            Prompt("subject_first", "What is the subject of this text? {text}"),
            Prompt("category", "Pick one category for the news: {text} Options: {options}."),
        ),
    ),
    DataSet(
        "guest_reviews",
        "sentiment",
        False,
        _reviews,
        (
            Prompt(
                "positive_or_negative",
                "Review: {text} Is this review positive or negative?",
                {"good": "positive", "bad": "negative"},
            ),
            Prompt("good_or_bad", "Does the writer of this review mean good or bad? {text}"),
            Prompt("recommend", "{text} Would the guest recommend it? Answer yes or no.", LIKED),
            Prompt("liked", "Question: does the writer like it? Review: {text} Answer:", LIKED),
            Prompt("hated", "Read the review and decide: is the writer negative? {text}", HATED),
        ),
    ),
    DataSet(
        "diary_pages",
        "emotion",
        False,
        _feelings,
        (
            Prompt("how_felt", "Read the text and choose how {name} felt: {options}. {text}"),
            Prompt("feeling_label", "{text} Which of these is the best label? {options}."),
            Prompt("question_first", "Question: how does {name} feel? Text: {text} Answer:"),
        ),
    ),
    DataSet(
        "town_map",
        "multiple_choice_qa",
        False,
        _places,
        (
            Prompt("which_place", "{text} Which place is the text about? Choose one: {options}."),
            Prompt(
                "find_thing",
                "Question: which is the best place to find the {thing}? Options: {options}. "
                "Answer:",
            ),
            Prompt("where_to_go", "Please choose where to go for the {thing}: {options}?"),
        ),
    ),
    DataSet(
        "job_board",
        "closed_book_qa",
        False,
        _jobs,
        (
            Prompt("who_works", "Question: who is at work in the {place}? Answer:"),
            Prompt("needs_thing", "Choose who would need {a_thing} at work: {options}."),
            Prompt(
                "knows_all",
                "Pick one: {options}. Who would know the most about the {thing} and the {other}?",
            ),
        ),
    ),
    DataSet(
        "word_list",
        "word_classification",
        False,
        _kinds,
        (
            Prompt("which_category", "Which category does the word {thing} belong to: {options}?"),
            Prompt("question_answer", "Question: which subject has {a_thing} in it? Answer:"),
            Prompt(
                "two_words",
                "Label the words {thing} and {other}. Choose one of the following: {options}. "
                "Label:",
            ),
        ),
    ),
    DataSet(
        "topic_check",
        "topic_verification",
        False,
        _topic_check,
        (
            Prompt("yes_or_no", "{text} Is the topic of this text {topic}? Answer yes or no."),
            Prompt(
                "question_first",
                "Question: is the following text about {topic}? Text: {text} Answer:",
            ),
            Prompt("editor", "Would you choose the label {topic} for this text? {text} Yes or no?"),
        ),
    ),
    DataSet(
        "town_calendar",
        "time_classification",
        False,
        _times,
        (
            Prompt("past_or_future", "{text} Which is it, past or future?"),
            Prompt(
                "already",
                "Question: did this happen already? Text: {text} Answer:",
                {"past": "yes", "future": "no"},
            ),
            Prompt(
                "yet_to_come",
                "{text} Is this still to come? Yes or no?",
                {"past": "no", "future": "yes"},
            ),
        ),
    ),
    DataSet(
        "story_titles",
        "title_choice",
        False,
        _titles,
        (
            Prompt("best_title", "{text} Which is the best title for this text?"),
            Prompt("choose_title", "Choose a title for the following story. {text} Title:"),
            Prompt("summary", "Which of these is a short summary of the text? {text} Summary:"),
        ),
    ),
    DataSet(
        "daily_needs",
        "commonsense_qa",
        False,
        _needs,
        (
            Prompt("what_needed", "{name} was {state}. Choose what {pronoun} needed: {options}."),
            Prompt(
                "best_option",
                "Question: which is the best thing for {name}, now that {pronoun} is {state}? "
                "Answer:",
            ),
            Prompt(
                "gift",
                "In the {place}, {name} was {state}. Which gift would be right? Options: "
                "{options}.",
            ),
        ),
    ),
    DataSet(
        "twin_sentences",
        "sentence_comparison",
        False,
        _same,
        (
            Prompt(
                "same_subject",
                "Do these sentences have the same subject? {first} {second} Answer yes or no.",
            ),
            Prompt(
                "one_story",
                "Sentence one: {first} Sentence two: {second} Question: would both be in the "
                "same story? Answer:",
            ),
            Prompt("same_label", "{first} {second} Would you label both the same? Yes or no?"),
        ),
    ),
    # Held out: none of these task types is trained on.
    DataSet(
        "next_lines",
        "sentence_completion",
        True,
        _endings,
        (
            Prompt("what_next", "{text} Which sentence follows: {option1} Or: {option2}"),
            Prompt("best_ending", "Choose the best ending for the story. {text}"),
            Prompt("question_first", "Question: what would happen next? Text: {text} Answer:"),
        ),
    ),
    DataSet(
        "sound_claims",
        "natural_language_inference",
        True,
        _entailment,
        (
            Prompt(
                "does_it_follow",
                "Premise: {premise} Hypothesis: {hypothesis} Does the hypothesis follow from "
                "the premise? Yes or no?",
            ),
            Prompt("can_we_say", "{premise} Question: would you say that {claim}? Answer:"),
            Prompt("decide", "Read the text and decide, yes or no: {claim}. Text: {premise}"),
        ),
    ),
    DataSet(
        "who_is_meant",
        "coreference",
        True,
        _pronouns,
        (
            Prompt("who_did", "{text} Question: who {did}? Answer:"),
            Prompt(
                "which_of_the_two",
                "{text} Which of the two does the word {pronoun} mean, {option1} or {option2}?",
            ),
            Prompt("read_and_choose", "Read the text and choose who {did}. {text}"),
        ),
    ),
    DataSet(
        "two_meanings",
        "word_sense",
        True,
        _word_senses,
        (
            Prompt(
                "which_sense",
                "{text} Which does the word {word} mean here: {option1} or {option2}?",
            ),
            Prompt(
                "question_answer",
                "Question: which subject does {word} belong to in the following text? {text} "
                "Answer:",
            ),
            Prompt("decide", "Decide what {word} has to do with in this sentence. {text}"),
        ),
    ),
)
