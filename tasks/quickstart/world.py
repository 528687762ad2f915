"""A small invented world: the words of `world.json`, and short English texts about them.

The world's facts are co-occurrences: eight topics with their things, places and jobs; positive and
negative adjectives; feelings and how people show them; needs and what satisfies them; names; past
and future. Both the pretraining text and the sample are generated from them.

The order of random draws in a function decides every later text: a change anywhere changes the
committed sample, which a test regenerates.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Topic:
    """A topic with the words that belong to it."""

    name: str
    places: list[str]
    jobs: list[str]
    things: list[str]
    verbs: list[list[str]]  # [present, past]; each verb fits every thing of its topic
    titles: list[str]


_words = json.loads(pathlib.Path(__file__).with_name("world.json").read_text())
TOPICS = [Topic(**topic) for topic in _words["topics"]]
TOPIC = {topic.name: topic for topic in TOPICS}
TOPIC_NAMES = list(TOPIC)
# ambiguous word: the topics of its two senses
SENSES: dict[str, list[str]] = _words["senses"]
GOOD: list[str] = _words["good"]
BAD: list[str] = _words["bad"]
FEMALE: list[str] = _words["female"]
MALE: list[str] = _words["male"]
NAMES = FEMALE + MALE
# feeling: verbs that show it
FEELINGS: dict[str, list[str]] = _words["feelings"]
# state: [need, action in the present, action in the past]
NEEDS: dict[str, list[str]] = _words["needs"]


def a(word: str) -> str:
    """Returns the word with its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def pronoun(name: str) -> str:
    """Returns he or she."""
    return "she" if name in FEMALE else "he"


def capital(text: str) -> str:
    """Returns the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


class TextRng:
    """Random words and sentences, the same for a seed in every Python version."""

    def __init__(self, seed: str):
        # Python guarantees a stable sequence for `random()` only, not for `choice` or `shuffle`.
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def below(self, n: int) -> int:
        return int(self._random.random() * n)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def choose(self, *options: T) -> T:
        return self.pick(options)

    def several(self, options: Sequence[T], n: int) -> list[T]:
        """Returns `n` different options in random order."""
        remaining = list(options)
        return [remaining.pop(self.below(len(remaining))) for _ in range(n)]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return self.several(options, len(options))

    def other_topic(self, topic: Topic) -> Topic:
        return self.pick([other for other in TOPICS if other is not topic])

    def past(
        self, topic: Topic, subject: str | None = None, place: float = 0.6, time: float = 0.3
    ) -> str:
        """Returns a sentence in the past tense, with a place and a time with these probabilities.

        Without `subject` it is about a random person or one of the topic's jobs.
        """
        subject = subject or self._subject(topic)
        thing, other = self.several(topic.things, 2)
        text = f"{subject} {self.pick(topic.verbs)[1]} the {thing}"
        if self.chance(0.25):
            text += f" and the {other}"
        return self._sentence(text, topic, place, _words["past_times"], time)

    def future(self, topic: Topic) -> str:
        """Returns a sentence in the future tense."""
        text = f"{self._subject(topic)} will {self.pick(topic.verbs)[0]}"
        text += f" the {self.pick(topic.things)}"
        return self._sentence(text, topic, 0.6, _words["future_times"], 0.7)

    def _subject(self, topic: Topic) -> str:
        return self.pick(NAMES) if self.chance(0.5) else f"the {self.pick(topic.jobs)}"

    def _sentence(
        self, text: str, topic: Topic, place: float, times: Sequence[str], time: float
    ) -> str:
        if self.chance(place):
            text += f" in the {self.pick(topic.places)}"
        return f"{self.pick(times)}, {text}." if self.chance(time) else capital(f"{text}.")

    def detail(self, topic: Topic) -> str:
        """Returns a neutral sentence on the topic, without an opinion or a time."""
        thing, other = self.several(topic.things, 2)
        place, job = self.pick(topic.places), self.pick(topic.jobs)
        return self.choose(
            f"The {thing} was near the {other}.",
            f"There was {a(thing)} in the {place}.",
            f"The {job} came to the {place} with the {thing}.",
            f"In the {place}, the {job} talked about the {thing}.",
            f"The {job} looked at the {thing} and the {other}.",
            f"Everybody in the {place} knew the {thing}.",
        )

    def story(self, topic: Topic) -> str:
        """Returns two sentences on the topic."""
        return f"{self.past(topic)} {self.detail(topic)}"

    def opinion(self, topic: Topic, good: bool) -> str:
        """Returns one or two sentences with a positive or negative opinion."""
        word, more = self.several(GOOD if good else BAD, 2)
        thing, place = self.pick(topic.things), self.pick(topic.places)
        first = self.choose(
            f"The {thing} in the {place} was {word}.",
            f"I saw the {thing} and it was {word}.",
            f"What {a(word)} {thing} they had in the {place}!",
            f"We found the {thing} {word}.",
        )
        second = self.choose(
            f"It was {a(more)} day.",
            f"The {place} was {more} too.",
            f"The {self.pick(topic.jobs)} was {more}.",
        )
        return f"{first} {second}" if self.chance(0.6) else first

    def feeling_shown(self, name: str, feeling: str) -> str:
        """Returns a sentence that shows a feeling without naming it."""
        sign, other = self.several(FEELINGS[feeling], 2)
        return self.choose(
            f"{name} {sign} and {other}.",
            f"{name} {sign} in the street.",
            f"All day, {name} {sign}.",
            f"{name} {sign}.",
        )

    def sense(self, word: str, topic: Topic) -> str:
        """Returns a sentence that uses an ambiguous word in the topic's sense."""
        place, job, thing = self.pick(topic.places), self.pick(topic.jobs), self.pick(topic.things)
        return self.choose(
            f"The {job} saw the {word} in the {place}.",
            f"In the {place}, the {job} talked about the {word} and the {thing}.",
            f"The {job} needed the {word} for the {thing}.",
            f"There was {a(word)} near the {thing} in the {place}.",
        )
