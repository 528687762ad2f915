"""A small invented world: the words of `world.json`, and short English texts about them.

The world's facts are co-occurrences: eight topics with their things, places and jobs; positive and
negative adjectives; feelings and how people show them; needs and what satisfies them; names; past
and future. From these facts, `corpus` generates the pretraining text and `prompts` the tasks.

Any change to the number or the order of random draws changes all texts that are drawn afterwards,
and so the committed tasks in `sample/`, which a test regenerates and compares.
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


_words = json.loads(pathlib.Path(__file__).with_name("world.json").read_text(encoding="utf-8"))
TOPICS = [Topic(**topic) for topic in _words["topics"]]
TOPIC_BY_NAME = {topic.name: topic for topic in TOPICS}
TOPIC_NAMES = list(TOPIC_BY_NAME)
# ambiguous word -> the topics of its two senses
SENSES: dict[str, list[str]] = _words["senses"]
POSITIVE: list[str] = _words["good"]
NEGATIVE: list[str] = _words["bad"]
FEMALE_NAMES: list[str] = _words["female"]
MALE_NAMES: list[str] = _words["male"]
NAMES = FEMALE_NAMES + MALE_NAMES
# feeling -> verbs that show it
FEELINGS: dict[str, list[str]] = _words["feelings"]
# state, such as 'hungry' -> [need, action in the present, action in the past]
NEEDS: dict[str, list[str]] = _words["needs"]


def with_article(word: str) -> str:
    """Returns the word with its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def pronoun(name: str) -> str:
    """Returns 'he' or 'she'."""
    return "she" if name in FEMALE_NAMES else "he"


def capitalized(text: str) -> str:
    """Returns the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


class TextRng:
    """Generates random words and sentences, reproducible from a seed in every Python version."""

    def __init__(self, seed: str):
        # Of all methods, Python guarantees only `random()` to return the same numbers in every
        # version. All draws below use it.
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def randrange(self, n: int) -> int:
        return int(self._random.random() * n)

    def choice(self, options: Sequence[T]) -> T:
        return options[self.randrange(len(options))]

    def choice_of(self, *options: T) -> T:
        return self.choice(options)

    def sample(self, options: Sequence[T], n: int) -> list[T]:
        """Returns `n` different options in random order."""
        remaining = list(options)
        return [remaining.pop(self.randrange(len(remaining))) for _ in range(n)]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return self.sample(options, len(options))

    def other_topic(self, topic: Topic) -> Topic:
        return self.choice([other for other in TOPICS if other is not topic])

    def past_sentence(
        self,
        topic: Topic,
        subject: str | None = None,
        place_prob: float = 0.6,
        time_prob: float = 0.3,
    ) -> str:
        """Returns a sentence in the past tense.

        It names a place and a time with the given probabilities. Without `subject` its subject is a
        random person or one of the topic's jobs.
        """
        subject = subject or self._subject(topic)
        thing, other = self.sample(topic.things, 2)
        text = f"{subject} {self.choice(topic.verbs)[1]} the {thing}"
        if self.chance(0.25):
            text += f" and the {other}"
        return self._sentence(text, topic, place_prob, _words["past_times"], time_prob)

    def future_sentence(self, topic: Topic) -> str:
        """Returns a sentence in the future tense."""
        text = f"{self._subject(topic)} will {self.choice(topic.verbs)[0]}"
        text += f" the {self.choice(topic.things)}"
        return self._sentence(text, topic, 0.6, _words["future_times"], 0.7)

    def _subject(self, topic: Topic) -> str:
        return self.choice(NAMES) if self.chance(0.5) else f"the {self.choice(topic.jobs)}"

    def _sentence(
        self, text: str, topic: Topic, place_prob: float, times: Sequence[str], time_prob: float
    ) -> str:
        if self.chance(place_prob):
            text += f" in the {self.choice(topic.places)}"
        return (
            f"{self.choice(times)}, {text}." if self.chance(time_prob) else capitalized(f"{text}.")
        )

    def detail(self, topic: Topic) -> str:
        """Returns a neutral sentence on the topic, without an opinion or a time."""
        thing, other = self.sample(topic.things, 2)
        place, job = self.choice(topic.places), self.choice(topic.jobs)
        return self.choice_of(
            f"The {thing} was near the {other}.",
            f"There was {with_article(thing)} in the {place}.",
            f"The {job} came to the {place} with the {thing}.",
            f"In the {place}, the {job} talked about the {thing}.",
            f"The {job} looked at the {thing} and the {other}.",
            f"Everybody in the {place} knew the {thing}.",
        )

    def story(self, topic: Topic) -> str:
        """Returns two sentences on the topic."""
        return f"{self.past_sentence(topic)} {self.detail(topic)}"

    def opinion(self, topic: Topic, good: bool) -> str:
        """Returns one or two sentences with a positive or negative opinion."""
        adjective, other_adjective = self.sample(POSITIVE if good else NEGATIVE, 2)
        thing, place = self.choice(topic.things), self.choice(topic.places)
        first = self.choice_of(
            f"The {thing} in the {place} was {adjective}.",
            f"I saw the {thing} and it was {adjective}.",
            f"What {with_article(adjective)} {thing} they had in the {place}!",
            f"We found the {thing} {adjective}.",
        )
        second = self.choice_of(
            f"It was {with_article(other_adjective)} day.",
            f"The {place} was {other_adjective} too.",
            f"The {self.choice(topic.jobs)} was {other_adjective}.",
        )
        return f"{first} {second}" if self.chance(0.6) else first

    def feeling_shown(self, name: str, feeling: str) -> str:
        """Returns a sentence that shows a feeling without naming it."""
        sign, other = self.sample(FEELINGS[feeling], 2)
        return self.choice_of(
            f"{name} {sign} and {other}.",
            f"{name} {sign} in the street.",
            f"All day, {name} {sign}.",
            f"{name} {sign}.",
        )

    def sentence_with(self, word: str, topic: Topic) -> str:
        """Returns a sentence that uses an ambiguous word in the topic's sense."""
        place, job, thing = (
            self.choice(topic.places),
            self.choice(topic.jobs),
            self.choice(topic.things),
        )
        return self.choice_of(
            f"The {job} saw the {word} in the {place}.",
            f"In the {place}, the {job} talked about the {word} and the {thing}.",
            f"The {job} needed the {word} for the {thing}.",
            f"There was {with_article(word)} near the {thing} in the {place}.",
        )

    def first_person(self, topic: Topic) -> str:
        """Returns what a person of one of the topic's jobs says."""
        thing, other = self.sample(topic.things, 2)
        did = self.choice(topic.verbs)[1]
        return self.choice_of(
            f"I {did} the {thing}.",
            f"I {did} the {thing} and the {other}.",
            f"I was in the {self.choice(topic.places)} and {did} the {thing}.",
        )

    def text_and_claims(self, topic: Topic) -> tuple[str, str, str]:
        """Returns a text, a claim about it that is true, and one that is false."""
        kind = self.randrange(4)
        if kind == 0:
            other = self.other_topic(topic)
            text = self.past_sentence(topic)
            return text, f"it was about {topic.name}.", f"it was about {other.name}."
        if kind == 1:
            words = self.sample(("good", "bad"), 2)
            text = self.opinion(topic, words[0] == "good")
            return text, f"it was {words[0]}.", f"it was {words[1]}."
        if kind == 2:
            name, (felt, other_feeling) = self.choice(NAMES), self.sample(tuple(FEELINGS), 2)
            text, p = self.feeling_shown(name, felt), pronoun(name)
            return text, f"{p} was {felt}.", f"{p} was {other_feeling}."
        times = [f"it is in the {word}." for word in ("past", "future")]
        if self.chance(0.5):
            return self.past_sentence(topic), times[0], times[1]
        return self.future_sentence(topic), times[1], times[0]
