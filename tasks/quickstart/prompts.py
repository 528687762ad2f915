"""The sample's datasets and their prompts.

A dataset draws rows: the fields of its templates, the answer and all options. A prompt renders a
row: a template, and labels if the prompt expects other words than the options as answers.
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
    Rng,
    a,
    capital,
    detail,
    feeling_shown,
    future,
    opinion,
    other_topic,
    past,
    pronoun,
    sense,
    story,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """The fields of the templates, the correct option, and all options."""

    fields: Mapping[str, str]
    answer: str
    options: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A function that draws rows, and the prompts that render them.

    Attributes:
      name: name of the dataset.
      task_type: P3's kind of task.
      draw: draws a row.
      prompts: {prompt name: format string over the fields and options of a row}.
      labels: {prompt name: {option: answer}} of prompts whose answers are not the options.
      held_out: whether it is for zero-shot evaluation only.
    """

    name: str
    task_type: str
    draw: Callable[[Rng], Row]
    prompts: Mapping[str, str]
    labels: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    held_out: bool = False

    def render(self, prompt: str, row: Row) -> dict[str, Any]:
        """Returns a row as a line of the sample."""
        fields = {f"option{n}": option for n, option in enumerate(row.options, 1)}
        fields |= {**row.fields, "options": ", ".join(row.options)}
        labels = self.labels.get(prompt) or {option: option for option in row.options}
        return {
            "inputs": capital(self.prompts[prompt].format(**fields)),
            "targets": labels[row.answer],
            "answer_choices": [labels[option] for option in row.options],
        }


def _options(rng: Rng, answer: str, others: Sequence[str], n: int) -> list[str]:
    return rng.shuffled(
        [answer, *rng.several([other for other in others if other != answer], n - 1)]
    )


def _topics(rng: Rng) -> Row:
    topic = rng.pick(TOPICS)
    return Row({"text": story(rng, topic)}, topic.name, _options(rng, topic.name, TOPIC_NAMES, 4))


def _reviews(rng: Rng) -> Row:
    good = rng.chance(0.5)
    return Row(
        {"text": opinion(rng, rng.pick(TOPICS), good)}, "good" if good else "bad", ("good", "bad")
    )


def _feelings(rng: Rng) -> Row:
    name, felt = rng.pick(NAMES), rng.pick(tuple(FEELINGS))
    text = feeling_shown(rng, name, felt)
    if rng.chance(0.5):
        first = past(rng, rng.pick(TOPICS), name)
        text = f"{first} {capital(feeling_shown(rng, pronoun(name), felt))}"
    return Row({"text": text, "name": name}, felt, tuple(FEELINGS))


def _places(rng: Rng) -> Row:
    topic = rng.pick(TOPICS)
    place = rng.pick(topic.places)
    others = [rng.pick(other.places) for other in TOPICS if other is not topic]
    fields = {"text": past(rng, topic, place=0.0), "thing": rng.pick(topic.things)}
    return Row(fields, place, _options(rng, place, others, 4))


def _jobs(rng: Rng) -> Row:
    topic = rng.pick(TOPICS)
    job = rng.pick(topic.jobs)
    others = [rng.pick(other.jobs) for other in TOPICS if other is not topic]
    thing, more = rng.several(topic.things, 2)
    fields = {"place": rng.pick(topic.places), "thing": thing, "other": more, "a_thing": a(thing)}
    return Row(fields, job, _options(rng, job, others, 4))


def _kinds(rng: Rng) -> Row:
    topic = rng.pick(TOPICS)
    thing, more = rng.several(topic.things, 2)
    return Row(
        {"thing": thing, "other": more, "a_thing": a(thing)},
        topic.name,
        _options(rng, topic.name, TOPIC_NAMES, 4),
    )


def _topic_check(rng: Rng) -> Row:
    topic = rng.pick(TOPICS)
    true = rng.chance(0.5)
    claimed = topic.name if true else rng.pick([name for name in TOPIC_NAMES if name != topic.name])
    return Row(
        {"text": story(rng, topic), "topic": claimed}, "yes" if true else "no", ("yes", "no")
    )


def _times(rng: Rng) -> Row:
    later = rng.chance(0.5)
    topic = rng.pick(TOPICS)
    text = future(rng, topic) if later else past(rng, topic)
    return Row({"text": text}, "future" if later else "past", ("past", "future"))


def _titles(rng: Rng) -> Row:
    topic = rng.pick(TOPICS)
    title = rng.pick(topic.titles)
    others = [rng.pick(other.titles) for other in TOPICS if other is not topic]
    return Row({"text": story(rng, topic)}, title, _options(rng, title, others, 4))


def _needs(rng: Rng) -> Row:
    name, state = rng.pick(NAMES), rng.pick(STATES)
    thing = NEEDS[state][0]
    fields = {
        "name": name,
        "state": state,
        "pronoun": pronoun(name),
        "place": rng.pick(rng.pick(TOPICS).places),
    }
    return Row(fields, thing, _options(rng, thing, [NEEDS[other][0] for other in STATES], 4))


def _same(rng: Rng) -> Row:
    topic = rng.pick(TOPICS)
    same = rng.chance(0.5)
    other = topic if same else other_topic(rng, topic)
    return Row(
        {"first": past(rng, topic), "second": past(rng, other)},
        "yes" if same else "no",
        ("yes", "no"),
    )


def _endings(rng: Rng) -> Row:
    name = rng.pick(NAMES)
    topic = rng.pick(TOPICS)
    text = f"{name} went to the {rng.pick(topic.places)} with the {rng.pick(topic.jobs)}."
    if rng.chance(0.5):
        text += f" {detail(rng, topic)}"
    word = capital(pronoun(name))
    right = past(rng, topic, word, place=0.0, time=0.0)
    wrong = past(rng, other_topic(rng, topic), word, place=0.0, time=0.0)
    return Row({"text": text}, right, rng.shuffled((right, wrong)))


def _entailment(rng: Rng) -> Row:
    """Draws a premise and a hypothesis about its topic, sentiment or time."""
    topic = rng.pick(TOPICS)
    true = rng.chance(0.5)
    kind = rng.below(3)
    if kind == 0:
        other = topic if true else other_topic(rng, topic)
        premise, hypothesis = story(rng, topic), f"This has to do with {other.name}."
    elif kind == 1:
        good = rng.chance(0.5)
        premise, hypothesis = (
            opinion(rng, topic, good),
            f"It was {'good' if good == true else 'bad'}.",
        )
    else:
        later = rng.chance(0.5)
        premise = future(rng, topic) if later else past(rng, topic)
        hypothesis = f"This is in the {'future' if later == true else 'past'}."
    # The hypothesis also as a clause, for prompts that embed it in a sentence.
    claim = hypothesis.removesuffix(".")
    fields = {"premise": premise, "hypothesis": hypothesis, "claim": claim[0].lower() + claim[1:]}
    return Row(fields, "yes" if true else "no", ("yes", "no"))


def _pronouns(rng: Rng) -> Row:
    # A woman and a man, so that the pronoun alone decides.
    first, second = rng.shuffled((rng.pick(FEMALE), rng.pick(MALE)))
    name = rng.choose(first, second)
    topic = rng.pick(TOPICS)
    word = pronoun(name)
    verb = past(rng, topic, capital(word), time=0.0)
    meeting = rng.choose(
        f"{first} met {second} in the {rng.pick(topic.places)}.",
        f"{first} and {second} went to the {rng.pick(topic.places)}.",
    )
    fields = {
        "text": f"{meeting} {verb}",
        "pronoun": word,
        "did": verb.removeprefix(capital(word) + " ").removesuffix("."),
    }
    return Row(fields, name, (first, second))


def _word_senses(rng: Rng) -> Row:
    word = rng.pick(tuple(SENSES))
    meant = rng.pick(SENSES[word])
    return Row(
        {"text": sense(rng, word, TOPIC[meant]), "word": word}, meant, rng.shuffled(SENSES[word])
    )


LIKED = {"good": "yes", "bad": "no"}
HATED = {"good": "no", "bad": "yes"}

DATASETS = (
    Dataset(
        "town_news",
        "topic_classification",
        _topics,
        {
            "which_topic": "{text} Which topic is this text about? {options}?",
            "choose_label": (
                "Choose the best label for the following text: {options}. Text: {text} Label:"
            ),
            "subject_first": "What is the subject of this text? {text}",
            "category": "Pick one category for the news: {text} Options: {options}.",
        },
    ),
    Dataset(
        "guest_reviews",
        "sentiment",
        _reviews,
        {
            "positive_or_negative": "Review: {text} Is this review positive or negative?",
            "good_or_bad": "Does the writer of this review mean good or bad? {text}",
            "recommend": "{text} Would the guest recommend it? Answer yes or no.",
            "liked": "Question: does the writer like it? Review: {text} Answer:",
            "hated": "Read the review and decide: is the writer negative? {text}",
        },
        labels={
            "positive_or_negative": {"good": "positive", "bad": "negative"},
            "recommend": LIKED,
            "liked": LIKED,
            "hated": HATED,
        },
    ),
    Dataset(
        "diary_pages",
        "emotion",
        _feelings,
        {
            "how_felt": "Read the text and choose how {name} felt: {options}. {text}",
            "feeling_label": "{text} Which of these is the best label? {options}.",
            "question_first": "Question: how does {name} feel? Text: {text} Answer:",
        },
    ),
    Dataset(
        "town_map",
        "multiple_choice_qa",
        _places,
        {
            "which_place": "{text} Which place is the text about? Choose one: {options}.",
            "find_thing": (
                "Question: which is the best place to find the {thing}? Options: {options}. Answer:"
            ),
            "where_to_go": "Please choose where to go for the {thing}: {options}?",
        },
    ),
    Dataset(
        "job_board",
        "closed_book_qa",
        _jobs,
        {
            "who_works": "Question: who is at work in the {place}? Answer:",
            "needs_thing": "Choose who would need {a_thing} at work: {options}.",
            "knows_all": (
                "Pick one: {options}. Who would know the most about the {thing} and the {other}?"
            ),
        },
    ),
    Dataset(
        "word_list",
        "word_classification",
        _kinds,
        {
            "which_category": "Which category does the word {thing} belong to: {options}?",
            "question_answer": "Question: which subject has {a_thing} in it? Answer:",
            "two_words": (
                "Label the words {thing} and {other}. Choose one of the following: {options}. "
                "Label:"
            ),
        },
    ),
    Dataset(
        "topic_check",
        "topic_verification",
        _topic_check,
        {
            "yes_or_no": "{text} Is the topic of this text {topic}? Answer yes or no.",
            "question_first": "Question: is the following text about {topic}? Text: {text} Answer:",
            "editor": "Would you choose the label {topic} for this text? {text} Yes or no?",
        },
    ),
    Dataset(
        "town_calendar",
        "time_classification",
        _times,
        {
            "past_or_future": "{text} Which is it, past or future?",
            "already": "Question: did this happen already? Text: {text} Answer:",
            "yet_to_come": "{text} Is this still to come? Yes or no?",
        },
        labels={
            "already": {"past": "yes", "future": "no"},
            "yet_to_come": {"past": "no", "future": "yes"},
        },
    ),
    Dataset(
        "story_titles",
        "title_choice",
        _titles,
        {
            "best_title": "{text} Which is the best title for this text?",
            "choose_title": "Choose a title for the following story. {text} Title:",
            "summary": "Which of these is a short summary of the text? {text} Summary:",
        },
    ),
    Dataset(
        "daily_needs",
        "commonsense_qa",
        _needs,
        {
            "what_needed": "{name} was {state}. Choose what {pronoun} needed: {options}.",
            "best_option": (
                "Question: which is the best thing for {name}, now that {pronoun} is {state}? "
                "Answer:"
            ),
            "gift": (
                "In the {place}, {name} was {state}. Which gift would be right? Options: {options}."
            ),
        },
    ),
    Dataset(
        "twin_sentences",
        "sentence_comparison",
        _same,
        {
            "same_subject": (
                "Do these sentences have the same subject? {first} {second} Answer yes or no."
            ),
            "one_story": (
                "Sentence one: {first} Sentence two: {second} Question: would both be in the "
                "same story? Answer:"
            ),
            "same_label": "{first} {second} Would you label both the same? Yes or no?",
        },
    ),
    # Held out: no dataset above has one of these task types.
    Dataset(
        "next_lines",
        "sentence_completion",
        _endings,
        {
            "what_next": "{text} Which sentence follows: {option1} Or: {option2}",
            "best_ending": "Choose the best ending for the story. {text}",
            "question_first": "Question: what would happen next? Text: {text} Answer:",
        },
        held_out=True,
    ),
    Dataset(
        "sound_claims",
        "natural_language_inference",
        _entailment,
        {
            "does_it_follow": (
                "Premise: {premise} Hypothesis: {hypothesis} Does the hypothesis follow from the "
                "premise? Yes or no?"
            ),
            "can_we_say": "{premise} Question: would you say that {claim}? Answer:",
            "decide": "Read the text and decide, yes or no: {claim}. Text: {premise}",
        },
        held_out=True,
    ),
    Dataset(
        "who_is_meant",
        "coreference",
        _pronouns,
        {
            "who_did": "{text} Question: who {did}? Answer:",
            "which_of_the_two": (
                "{text} Which of the two does the word {pronoun} mean, {option1} or {option2}?"
            ),
            "read_and_choose": "Read the text and choose who {did}. {text}",
        },
        held_out=True,
    ),
    Dataset(
        "two_meanings",
        "word_sense",
        _word_senses,
        {
            "which_sense": "{text} Which does the word {word} mean here: {option1} or {option2}?",
            "question_answer": (
                "Question: which subject does {word} belong to in the following text? {text} "
                "Answer:"
            ),
            "decide": "Decide what {word} has to do with in this sentence. {text}",
        },
        held_out=True,
    ),
)
