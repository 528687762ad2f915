"""A small invented world: its vocabulary, and templates of short English texts about it.

The world's facts are co-occurrences: eight topics with their things, places and jobs; positive and
negative adjectives; feelings and how people show them; needs and what satisfies them; names; past
and future. Both the pretraining text and the sample are generated from them.

The order of random draws in a function decides every later text: a change anywhere changes the
committed sample, which a test regenerates.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Rng:
    """Random draws that are the same in every Python version."""

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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclasses.dataclass(frozen=True)
class Topic:
    """A topic with the words that belong to it."""

    name: str
    places: tuple[str, ...]
    jobs: tuple[str, ...]
    things: tuple[str, ...]
    # (present, past); each verb fits every thing of its topic
    verbs: tuple[tuple[str, str], ...]
    titles: tuple[str, ...]


TOPICS = (
    Topic(
        "food",
        ("kitchen", "bakery"),
        ("cook", "baker"),
        _words("soup pie carrot onion cake cheese salad potato sausage pepper"),
        (("taste", "tasted"), ("serve", "served"), ("prepare", "prepared")),
        ("A day in the kitchen", "The best meal"),
    ),
    Topic(
        "music",
        ("theater", "studio"),
        ("singer", "drummer"),
        _words("guitar drum piano song violin melody trumpet waltz flute ballad"),
        (("play", "played"), ("practice", "practiced"), ("record", "recorded")),
        ("A night at the theater", "The new melody"),
    ),
    Topic(
        "sport",
        ("stadium", "gym"),
        ("player", "coach"),
        _words("ball goal race team match medal racket trophy referee score"),
        (("watch", "watched"), ("win", "won"), ("defend", "defended")),
        ("The big match", "Winners in the stadium"),
    ),
    Topic(
        "farming",
        ("field", "barn"),
        ("farmer", "shepherd"),
        _words("cow sheep horse donkey duck lamb goat hen pig rooster"),
        (("feed", "fed"), ("guard", "guarded"), ("raise", "raised")),
        ("Life in the field", "Animals in the barn"),
    ),
    Topic(
        "sailing",
        ("harbor", "bay"),
        ("sailor", "captain"),
        _words("boat wave anchor fish shell crab island ship rope whale"),
        (("spot", "spotted"), ("reach", "reached"), ("follow", "followed")),
        ("A trip by boat", "Storm over the harbor"),
    ),
    Topic(
        "school",
        ("classroom", "library"),
        ("teacher", "student"),
        _words("book chapter lesson exam essay quiz page notebook poem lecture"),
        (("study", "studied"), ("copy", "copied"), ("explain", "explained")),
        ("The hard exam", "Back in the classroom"),
    ),
    Topic(
        "health",
        ("hospital", "clinic"),
        ("doctor", "nurse"),
        _words("medicine fever bandage pill patient needle cough wound bone vaccine"),
        (("examine", "examined"), ("check", "checked"), ("describe", "described")),
        ("News from the hospital", "A cure for the fever"),
    ),
    Topic(
        "space",
        ("observatory", "station"),
        ("astronaut", "pilot"),
        _words("rocket planet moon comet telescope orbit satellite galaxy meteor crater"),
        (("observe", "observed"), ("explore", "explored"), ("photograph", "photographed")),
        ("A journey to the moon", "Lights over the observatory"),
    ),
)
TOPIC = {topic.name: topic for topic in TOPICS}
TOPIC_NAMES = tuple(topic.name for topic in TOPICS)

# ambiguous word: the topics of its two senses
SENSES = {
    "star": ("music", "space"),
    "net": ("sport", "sailing"),
    "note": ("music", "school"),
    "bow": ("music", "sailing"),
    "shot": ("sport", "health"),
    "pitch": ("music", "sport"),
    "crew": ("sailing", "space"),
    "plate": ("food", "health"),
    "roll": ("food", "school"),
    "stall": ("farming", "food"),
}

GOOD = _words(
    "great wonderful lovely excellent delightful perfect pleasant superb amazing fantastic"
)
BAD = _words("awful terrible horrible dreadful poor ugly boring nasty dull disappointing")

FEMALE = ("Anna", "Mary", "Lucy", "Emma", "Sarah", "Julia", "Clara", "Nina")
MALE = ("Paul", "Peter", "Tom", "David", "Jack", "Henry", "Oscar", "Victor")
NAMES = FEMALE + MALE

# feeling: verbs that show it
FEELINGS = {
    "happy": ("smiled", "laughed", "cheered", "danced"),
    "sad": ("cried", "wept", "sighed", "mourned"),
    "angry": ("shouted", "frowned", "growled", "cursed"),
    "afraid": ("trembled", "hid", "screamed", "shivered"),
}

# state: (need, action in the present, action in the past)
NEEDS = {
    "hungry": ("a sandwich", "eat a sandwich", "ate a sandwich"),
    "thirsty": ("some water", "drink some water", "drank some water"),
    "tired": ("a bed", "sleep in a bed", "slept in a bed"),
    "cold": ("a warm coat", "wear a warm coat", "wore a warm coat"),
    "dirty": ("some soap", "wash with soap", "washed with soap"),
    "lost": ("a map", "look at a map", "looked at a map"),
    "wet": ("a dry towel", "use a dry towel", "used a dry towel"),
    "late": ("a fast taxi", "call a fast taxi", "called a fast taxi"),
    "lonely": ("a friend", "visit a friend", "visited a friend"),
}
STATES = tuple(NEEDS)

PAST_TIMES = ("Yesterday", "Last week", "Last year", "Long ago", "An hour ago")
FUTURE_TIMES = ("Tomorrow", "Next week", "Next year", "Soon", "In an hour")


def a(word: str) -> str:
    """Returns the word with its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def pronoun(name: str) -> str:
    """Returns he or she."""
    return "she" if name in FEMALE else "he"


def capital(text: str) -> str:
    """Returns the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def other_topic(rng: Rng, topic: Topic) -> Topic:
    """Returns a random topic other than `topic`."""
    return rng.pick([other for other in TOPICS if other is not topic])


def who(rng: Rng, topic: Topic) -> str:
    """Returns a subject: a name or one of the topic's jobs."""
    return rng.pick(NAMES) if rng.chance(0.5) else f"the {rng.pick(topic.jobs)}"


def past(
    rng: Rng, topic: Topic, subject: str | None = None, place: float = 0.6, time: float = 0.3
) -> str:
    """Returns a sentence on the topic in the past tense.

    Args:
      rng: random draws.
      topic: topic of the sentence.
      subject: its subject; None: a random one.
      place: probability of a place.
      time: probability of an adverb of time.
    """
    subject = subject or who(rng, topic)
    thing, other = rng.several(topic.things, 2)
    middle = f"{rng.pick(topic.verbs)[1]} the {thing}"
    if rng.chance(0.25):
        middle += f" and the {other}"
    if rng.chance(place):
        middle += f" in the {rng.pick(topic.places)}"
    if rng.chance(time):
        return f"{rng.pick(PAST_TIMES)}, {subject} {middle}."
    return capital(f"{subject} {middle}.")


def future(
    rng: Rng, topic: Topic, subject: str | None = None, place: float = 0.6, time: float = 0.7
) -> str:
    """Returns a sentence on the topic in the future tense; arguments as for `past`."""
    subject = subject or who(rng, topic)
    middle = f"will {rng.pick(topic.verbs)[0]} the {rng.pick(topic.things)}"
    if rng.chance(place):
        middle += f" in the {rng.pick(topic.places)}"
    if rng.chance(time):
        return f"{rng.pick(FUTURE_TIMES)}, {subject} {middle}."
    return capital(f"{subject} {middle}.")


def detail(rng: Rng, topic: Topic) -> str:
    """Returns a neutral sentence on the topic, without an opinion or a time."""
    thing, other = rng.several(topic.things, 2)
    place, job = rng.pick(topic.places), rng.pick(topic.jobs)
    return rng.choose(
        f"The {thing} was near the {other}.",
        f"There was {a(thing)} in the {place}.",
        f"The {job} came to the {place} with the {thing}.",
        f"In the {place}, the {job} talked about the {thing}.",
        f"The {job} looked at the {thing} and the {other}.",
        f"Everybody in the {place} knew the {thing}.",
    )


def story(rng: Rng, topic: Topic) -> str:
    """Returns two sentences on the topic."""
    return f"{past(rng, topic)} {detail(rng, topic)}"


def opinion(rng: Rng, topic: Topic, good: bool) -> str:
    """Returns one or two sentences with a positive or negative opinion."""
    word, more = rng.several(GOOD if good else BAD, 2)
    thing, place = rng.pick(topic.things), rng.pick(topic.places)
    first = rng.choose(
        f"The {thing} in the {place} was {word}.",
        f"I saw the {thing} and it was {word}.",
        f"What {a(word)} {thing} they had in the {place}!",
        f"We found the {thing} {word}.",
    )
    second = rng.choose(
        f"It was {a(more)} day.",
        f"The {place} was {more} too.",
        f"The {rng.pick(topic.jobs)} was {more}.",
    )
    return f"{first} {second}" if rng.chance(0.6) else first


def feeling_shown(rng: Rng, name: str, feeling: str) -> str:
    """Returns a sentence that shows a feeling without naming it."""
    sign, other = rng.several(FEELINGS[feeling], 2)
    return rng.choose(
        f"{name} {sign} and {other}.",
        f"{name} {sign} in the street.",
        f"All day, {name} {sign}.",
        f"{name} {sign}.",
    )


def sense(rng: Rng, word: str, topic: Topic) -> str:
    """Returns a sentence that uses an ambiguous word in the topic's sense."""
    place, job, thing = rng.pick(topic.places), rng.pick(topic.jobs), rng.pick(topic.things)
    return rng.choose(
        f"The {job} saw the {word} in the {place}.",
        f"In the {place}, the {job} talked about the {word} and the {thing}.",
        f"The {job} needed the {word} for the {thing}.",
        f"There was {a(word)} near the {thing} in the {place}.",
    )
