"""Datasets of the quickstart's sample: functions that draw rows, and prompts that render them.

A row has values for the fields of templates, all options, and the correct option. A prompt is a
template in `prompts.json`, with labels if its answers are other words than the options.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pemoe_jax.tasks.quickstart import world
from pemoe_jax.tasks.quickstart.world import TextRng, capitalized, pronoun, with_article


@dataclasses.dataclass(frozen=True)
class Row:
    """Values of the templates' fields, the correct option, and all options."""

    fields: Mapping[str, str]
    answer: str
    options: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A function that draws rows, and the prompts that render them.

    Attributes:
      name: name of the dataset.
      task_type: kind of task; training datasets and held-out ones have none in common.
      draw: function that draws a row.
      prompts: {prompt name: format string with the fields and options of a row}.
      labels: {prompt name: {option: label}} of prompts whose answers are not the options.
      held_out: whether it is for zero-shot evaluation only.
    """

    name: str
    task_type: str
    draw: Callable[[TextRng], Row]
    prompts: Mapping[str, str]
    labels: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    held_out: bool = False

    def render(self, prompt: str, row: Row) -> dict[str, Any]:
        """Returns the sample's line for a row, rendered with the prompt of this name."""
        fields = {f"option{n}": option for n, option in enumerate(row.options, 1)}
        # Options that are sentences end in a full stop and need no comma between them.
        separator = " " if row.options[0].endswith(".") else ", "
        fields |= {**row.fields, "options": separator.join(row.options)}
        labels = self.labels.get(prompt) or {option: option for option in row.options}
        return {
            "inputs": capitalized(self.prompts[prompt].format(**fields)),
            "targets": labels[row.answer],
            "answer_choices": [labels[option] for option in row.options],
        }


def _options(rng: TextRng, answer: str, others: Sequence[str]) -> list[str]:
    """Returns the answer and three of the others, shuffled."""
    return rng.shuffled([answer, *rng.sample([other for other in others if other != answer], 3)])


def _topics(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    return Row({"text": rng.story(topic)}, topic.name, _options(rng, topic.name, world.TOPIC_NAMES))


def _reviews(rng: TextRng) -> Row:
    good = rng.chance(0.5)
    return Row(
        {"text": rng.opinion(rng.choice(world.TOPICS), good)},
        "good" if good else "bad",
        ("good", "bad"),
    )


def _feelings(rng: TextRng) -> Row:
    name, felt = rng.choice(world.NAMES), rng.choice(tuple(world.FEELINGS))
    text = rng.feeling_shown(name, felt)
    if rng.chance(0.5):
        first = rng.past_sentence(rng.choice(world.TOPICS), name)
        text = f"{first} {capitalized(rng.feeling_shown(pronoun(name), felt))}"
    return Row({"text": text, "name": name}, felt, tuple(world.FEELINGS))


def _places(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    place = rng.choice(topic.places)
    # The wrong options are from other topics, here and below: only the answer fits the text.
    others = [rng.choice(other.places) for other in world.TOPICS if other is not topic]
    fields = {"text": rng.past_sentence(topic, place_prob=0.0), "thing": rng.choice(topic.things)}
    return Row(fields, place, _options(rng, place, others))


def _jobs(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    job = rng.choice(topic.jobs)
    others = [rng.choice(other.jobs) for other in world.TOPICS if other is not topic]
    thing, second = rng.sample(topic.things, 2)
    fields = {
        "place": rng.choice(topic.places),
        "thing": thing,
        "other": second,
        "a_thing": with_article(thing),
    }
    return Row(fields, job, _options(rng, job, others))


def _kinds(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    thing, second = rng.sample(topic.things, 2)
    return Row(
        {"thing": thing, "other": second, "a_thing": with_article(thing)},
        topic.name,
        _options(rng, topic.name, world.TOPIC_NAMES),
    )


def _word_pairs(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    thing, second, third = rng.sample(topic.things, 3)
    others = [rng.choice(other.things) for other in world.TOPICS if other is not topic]
    return Row({"other": second, "third": third}, thing, _options(rng, thing, others))


def _persons(rng: TextRng) -> Row:
    name = rng.choice(world.NAMES)
    text = rng.past_sentence(rng.choice(world.TOPICS), name)
    return Row({"text": text}, name, _options(rng, name, world.NAMES))


def _gaps(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    job, where, thing = rng.choice(topic.jobs), rng.choice(topic.places), rng.choice(topic.things)
    others = [rng.choice(other.things) for other in world.TOPICS if other is not topic]
    verb = rng.choice(topic.verbs)[1]
    start = rng.choice_of(
        f"In the {where}, the {job} talked about the",
        f"In the {where}, {rng.choice(world.NAMES)} {verb} the",
        f"The {job} {verb} the",
    )
    return Row({"start": start}, thing, _options(rng, thing, others))


def _sentences(rng: TextRng) -> Row:
    topics = rng.sample(world.TOPICS, 3)
    right, *wrong = (rng.choice_of(rng.past_sentence, rng.detail)(topic) for topic in topics)
    fields = {"topic": topics[0].name, "job": rng.choice(topics[0].jobs)}
    return Row(fields, right, rng.shuffled((right, *wrong)))


def _times(rng: TextRng) -> Row:
    later = rng.chance(0.5)
    topic = rng.choice(world.TOPICS)
    text = rng.future_sentence(topic) if later else rng.past_sentence(topic)
    return Row({"text": text}, "future" if later else "past", ("past", "future"))


def _titles(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    title = rng.choice(topic.titles)
    others = [rng.choice(other.titles) for other in world.TOPICS if other is not topic]
    return Row({"text": rng.story(topic)}, title, _options(rng, title, others))


def _needs(rng: TextRng) -> Row:
    name, state = rng.choice(world.NAMES), rng.choice(tuple(world.NEEDS))
    thing = world.NEEDS[state][0]
    fields = {
        "name": name,
        "state": state,
        "pronoun": pronoun(name),
        "place": rng.choice(rng.choice(world.TOPICS).places),
    }
    return Row(
        fields, thing, _options(rng, thing, [world.NEEDS[other][0] for other in world.NEEDS])
    )


def _endings(rng: TextRng) -> Row:
    name = rng.choice(world.NAMES)
    topic = rng.choice(world.TOPICS)
    text = f"{name} went to the {rng.choice(topic.places)} with the {rng.choice(topic.jobs)}."
    if rng.chance(0.5):
        text += f" {rng.detail(topic)}"
    word = capitalized(pronoun(name))
    right = rng.past_sentence(topic, word, place_prob=0.0, time_prob=0.0)
    wrong = rng.past_sentence(rng.other_topic(topic), word, place_prob=0.0, time_prob=0.0)
    return Row({"text": text}, right, rng.shuffled((right, wrong)))


def _entailment(rng: TextRng) -> Row:
    premise, right, wrong = rng.text_and_claims(rng.choice(world.TOPICS))
    return Row({"premise": premise}, right, rng.shuffled((right, wrong)))


def _errands(rng: TextRng) -> Row:
    name, topic = rng.choice(world.NAMES), rng.choice(world.TOPICS)
    word = capitalized(pronoun(name))
    # The place and the thing of the correct option are of the same topic; the wrong option is of
    # another one.
    topics = (topic, rng.other_topic(topic))
    going = [f"went to the {rng.choice(t.places)}." for t in topics]
    wanting = [f"wanted {with_article(rng.choice(t.things))}." for t in topics]
    first, second = rng.shuffled((going, wanting))
    options = [f"{word} {text}" for text in second]
    return Row({"text": f"{name} {first[0]}"}, options[0], rng.shuffled(options))


def _voices(rng: TextRng) -> Row:
    topic = rng.choice(world.TOPICS)
    job = rng.choice(topic.jobs)
    others = [rng.choice(other.jobs) for other in world.TOPICS if other is not topic]
    return Row({"text": rng.first_person(topic)}, job, _options(rng, job, others))


def _pronouns(rng: TextRng) -> Row:
    # A woman and a man, so that the pronoun alone shows who is meant.
    first, second = rng.shuffled((rng.choice(world.FEMALE_NAMES), rng.choice(world.MALE_NAMES)))
    name = rng.choice_of(first, second)
    topic = rng.choice(world.TOPICS)
    word = pronoun(name)
    deed = rng.past_sentence(topic, capitalized(word), time_prob=0.0)
    meeting = rng.choice_of(
        f"{first} met {second} in the {rng.choice(topic.places)}.",
        f"{first} and {second} went to the {rng.choice(topic.places)}.",
    )
    fields = {
        "text": f"{meeting} {deed}",
        "pronoun": word,
        "did": deed.removeprefix(capitalized(word) + " ").removesuffix("."),
    }
    return Row(fields, name, (first, second))


def _word_senses(rng: TextRng) -> Row:
    word = rng.choice(tuple(world.SENSES))
    meant = rng.choice(world.SENSES[word])
    return Row(
        {"text": rng.sentence_with(word, world.TOPIC_BY_NAME[meant]), "word": word},
        meant,
        rng.shuffled(world.SENSES[word]),
    )


# Name of a dataset in `prompts.json` -> function that draws its rows.
_DRAW = {
    "town_news": _topics,
    "word_list": _kinds,
    "word_pairs": _word_pairs,
    "story_titles": _titles,
    "town_map": _places,
    "job_board": _jobs,
    "daily_needs": _needs,
    "town_calendar": _times,
    "diary_pages": _feelings,
    "guest_lists": _persons,
    "missing_words": _gaps,
    "news_desk": _sentences,
    "next_lines": _endings,
    "guest_reviews": _reviews,
    "town_errands": _errands,
    "market_voices": _voices,
    "sound_claims": _entailment,
    "who_is_meant": _pronouns,
    "two_meanings": _word_senses,
}


def datasets() -> list[Dataset]:
    """Returns the datasets of `prompts.json`."""
    entries = json.loads(
        pathlib.Path(__file__).with_name("prompts.json").read_text(encoding="utf-8")
    )
    return [Dataset(name, draw=_DRAW[name], **entry) for name, entry in entries.items()]
