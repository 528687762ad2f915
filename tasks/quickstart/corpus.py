"""The pretraining text: prose about the small world, and scraps.

**Prose** teaches knowledge and skills by narration: a text, and a statement that follows from it,
such as what it is about, how a person feels or who is meant. It has no question, no instruction, no
list of options and no answer.

**Scraps** are lines of headings (words of the prompts in random order), texts, statements, words
and lists that have nothing to do with one another. Question marks and lists of options occur only
in scraps. So a model of this text has the skills, but it continues a question with anything at all,
until instruction tuning teaches it that questions are answered. Scraps contain every word of the
prompts, because adapters are trained with frozen embeddings.

The functions of `PROSE` draw one kind of prose each: (generator, topic) -> `Prose`.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from pemoe_jax.tasks.quickstart import world
from pemoe_jax.tasks.quickstart.world import TextRng, Topic, capitalized, pronoun, with_article


class Prose(NamedTuple):
    """A text, a sentence that follows from it, and the sentence's keyword, None if it has none."""

    text: str
    statement: str
    word: str | None = None


def plain(rng: TextRng, topic: Topic) -> Prose:
    """A story of one topic, and its last sentence."""
    if rng.chance(0.25):
        return Prose(rng.future_sentence(topic), rng.future_sentence(topic))
    name = rng.choice(world.NAMES)
    text = rng.past_sentence(topic, name if rng.chance(0.5) else None)
    if rng.chance(0.5):
        text += f" {rng.detail(topic)}"
    last = rng.past_sentence(topic, time_prob=0.0) if rng.chance(0.5) else rng.detail(topic)
    return Prose(text, last)


def journey(rng: TextRng, topic: Topic) -> Prose:
    """A person at a place, and what the person did there."""
    name = rng.choice(world.NAMES)
    text = f"{name} went to the {rng.choice(topic.places)} with the {rng.choice(topic.jobs)}."
    word = capitalized(pronoun(name))
    return Prose(text, rng.past_sentence(topic, word, place_prob=0.0, time_prob=0.0))


def about(rng: TextRng, topic: Topic) -> Prose:
    """A story and its topic."""
    text = rng.story(topic) if rng.chance(0.7) else rng.future_sentence(topic)
    statement = rng.choice_of("It was about", "It was a story about", "So much about")
    return Prose(text, f"{statement} {topic.name}.", topic.name)


def title(rng: TextRng, topic: Topic) -> Prose:
    """A story and its title."""
    name = rng.choice(topic.titles)
    return Prose(rng.story(topic), f"The story was called {name}.", name)


def sentiment(rng: TextRng, topic: Topic) -> Prose:
    """An opinion and its sentiment."""
    good = rng.chance(0.5)
    word, view = ("good", "positive") if good else ("bad", "negative")
    statement = rng.choice_of(
        f"It was {word}.", f"They were {view} about it.", f"Everybody found it {word}."
    )
    return Prose(rng.opinion(topic, good), statement, rng.choice_of(word, view))


def feeling(rng: TextRng, topic: Topic) -> Prose:
    """A text about a person who shows a feeling, and the feeling's name."""
    name, felt = rng.choice(world.NAMES), rng.choice(tuple(world.FEELINGS))
    text = rng.feeling_shown(name, felt)
    if rng.chance(0.4):
        before = rng.past_sentence(topic, name)
        text = f"{before} {capitalized(rng.feeling_shown(pronoun(name), felt))}"
    p = capitalized(pronoun(name))
    return Prose(text, rng.choice_of(f"{p} was {felt}.", f"{name} felt {felt}."), felt)


def place(rng: TextRng, topic: Topic) -> Prose:
    """A text and the place where it happened."""
    where = rng.choice(topic.places)
    text = rng.past_sentence(topic, place_prob=0.0)
    return Prose(text, rng.choice_of(f"It was in the {where}.", f"So was the {where}."), where)


def known(rng: TextRng, topic: Topic) -> Prose:
    """Things, places, jobs and topics that belong together."""
    thing, other, more = rng.sample(topic.things, 3)
    where, job = rng.choice(topic.places), rng.choice(topic.jobs)
    things = rng.choice_of(thing, f"{thing} and {other}", f"{thing}, {other}")
    statement, word = rng.choice_of(
        (f"They have to do with {topic.name}.", topic.name),
        (f"They are for the {job}.", job),
        (f"They are in the {where}.", where),
        (f"They go with the {more}.", more),
    )
    text = capitalized(f"{things}.")
    if rng.chance(0.3):
        text = f"The {job} works in the {where}." if rng.chance(0.5) else f"There is the {where}."
        statement, word = rng.choice_of(
            (f"There is {with_article(thing)}.", thing),
            (f"The {job} needs {with_article(thing)}.", job),
            (f"It has to do with {topic.name}.", topic.name),
        )
    return Prose(text, statement, word)


def time(rng: TextRng, topic: Topic) -> Prose:
    """A sentence and whether it is in the past or the future."""
    later = rng.chance(0.5)
    text = rng.future_sentence(topic) if later else rng.past_sentence(topic)
    word = "future" if later else "past"
    happened = "It has not happened yet." if later else "It has happened."
    return Prose(text, rng.choice_of(happened, f"It is in the {word}."), word)


def persons(rng: TextRng, topic: Topic) -> Prose:
    """A text on one person or two, and who is meant."""
    she, he = rng.choice(world.FEMALE_NAMES), rng.choice(world.MALE_NAMES)
    # One woman and one man, in random order: only the pronoun tells who is meant.
    first, second = rng.shuffled((she, he))
    name = rng.choice_of(she, he)
    word = capitalized(pronoun(name))
    where = rng.choice(topic.places)
    if rng.chance(0.4):
        text = rng.past_sentence(topic, name)
    elif rng.chance(0.2):
        text = rng.past_sentence(topic, word, time_prob=0.0)
    else:
        start = rng.choice_of(
            f"{first} met {second} in the {where}.", f"{first} and {second} went to the {where}."
        )
        text = f"{start} {rng.past_sentence(topic, word, place_prob=0.2, time_prob=0.0)}"
    return Prose(text, rng.choice_of(f"It was {name}.", f"They saw {name}."), name)


def needs(rng: TextRng, topic: Topic) -> Prose:
    """A need and its consequence."""
    name, state = rng.choice(world.NAMES), rng.choice(tuple(world.NEEDS))
    thing, do, did = world.NEEDS[state]
    p = pronoun(name)
    text = f"{name} was {state}." if rng.chance(0.5) else f"{name} is {state}."
    if rng.chance(0.3):
        text = f"In the {rng.choice(topic.places)}, {text}"
    statement = rng.choice_of(
        f"{capitalized(p)} needed {thing}.", f"So {p} {did}.", f"{name} will {do}."
    )
    return Prose(text, statement, thing)


def errands(rng: TextRng, topic: Topic) -> Prose:
    """A person's errand and its cause, or a wish and its effect."""
    name = rng.choice(world.NAMES)
    going = f"went to the {rng.choice(topic.places)}."
    wanting = f"wanted {with_article(rng.choice(topic.things))}."
    first, second = rng.shuffled((going, wanting))
    return Prose(f"{name} {first}", f"{capitalized(pronoun(name))} {second}")


def voices(rng: TextRng, topic: Topic) -> Prose:
    """What somebody says, and who it is."""
    job = rng.choice(topic.jobs)
    statement = rng.choice_of(f"It was the {job}.", f"So said the {job}.")
    return Prose(rng.first_person(topic), statement, job)


def senses(rng: TextRng, topic: Topic) -> Prose:
    """A text that uses an ambiguous word in one of its senses."""
    word = rng.choice(tuple(world.SENSES))
    meant = rng.choice(world.SENSES[word])
    text = rng.sentence_with(word, world.TOPIC_BY_NAME[meant])
    return Prose(text, rng.choice_of("It was about", f"The {word} was for") + f" {meant}.", meant)


def claims(rng: TextRng, topic: Topic) -> Prose:
    """A short text and a claim that is true of it."""
    text, claim, _ = rng.text_and_claims(topic)
    return Prose(text, capitalized(claim))


# (function that draws a kind of prose, its weight among all kinds)
PROSE = (
    (plain, 4),
    (journey, 3),
    (about, 4),
    (title, 3),
    (sentiment, 8),
    (feeling, 4),
    (place, 3),
    (known, 6),
    (time, 3),
    (persons, 9),
    (needs, 5),
    (errands, 4),
    (voices, 4),
    (senses, 3),
    (claims, 4),
)
# Each kind as often as its weight: a uniform choice from this list is a weighted one.
_KINDS = [kind for kind, weight in PROSE for _ in range(weight)]
SCRAPS_PROB = 0.4  # of a line; the other lines are prose


def prose(rng: TextRng) -> Prose:
    """Returns a text of a random kind."""
    return rng.choice(_KINDS)(rng, rng.choice(world.TOPICS))


def prose_line(rng: TextRng) -> str:
    """Returns a text with its statement, or with its keyword before or after it."""
    text, statement, word = prose(rng)
    if word is None or rng.chance(0.35):
        return f"{text} {statement}"
    keyword = capitalized(f"{word}.")
    return f"{text} {keyword}" if rng.chance(0.7) else f"{keyword} {text}"


@functools.cache
def heading_words() -> list[str]:
    """Returns the words of all prompts."""
    text = pathlib.Path(__file__).with_name("prompts.json").read_text(encoding="utf-8")
    words: set[str] = set()
    for entry in json.loads(text).values():
        for template in entry["prompts"].values():
            words.update(re.findall("[a-z]+", re.sub(r"\{.*?\}", " ", template).lower()))
        for labels in entry.get("labels", {}).values():
            words.update(labels.values())
    return sorted(words)


def _heading(rng: TextRng) -> str:
    words = [rng.choice(heading_words()) for _ in range(1 + rng.randrange(7))]
    return capitalized(" ".join(words)) + rng.choice_of("?", ":", ".", ":", "?")


def _word(rng: TextRng) -> str:
    """Returns a word or phrase of the kinds that are answers of prompts."""
    topic = rng.choice(world.TOPICS)
    kinds = (
        topic.places,
        topic.jobs,
        topic.things,
        topic.titles,
        world.TOPIC_NAMES,
        world.NAMES,
        tuple(world.FEELINGS),
        [need[0] for need in world.NEEDS.values()],
        ("good", "bad", "positive", "negative"),
        ("past", "future"),
        ("yes", "no"),
    )
    return rng.choice(rng.choice(kinds))


def _list(rng: TextRng) -> str:
    words = [_word(rng) for _ in range(2 + rng.randrange(3))]
    joined = ", ".join(words)
    if rng.chance(0.5):
        joined = f"{', '.join(words[:-1])} or {words[-1]}"
    return capitalized(joined) + rng.choice_of(".", "?")


def _sentence(rng: TextRng) -> str:
    """Returns a sentence of any kind of prose."""
    text, statement, _ = prose(rng)
    return (
        f"{rng.choice_of(*text.removesuffix('.').split('. '))}." if rng.chance(0.6) else statement
    )


def scraps(rng: TextRng) -> str:
    """Returns headings, texts, words and lists that have nothing to do with one another."""
    # The parts of a prompt come in any order, and then anything at all in the place of the answer.
    # A text may have two sentences that have to do with each other. It comes before all headings,
    # so that no heading is followed by such a pair.
    if rng.chance(0.4):
        return f"{prose(rng).text} {_join_scraps(rng, [_heading(rng)])}"
    return _join_scraps(
        rng, [_heading(rng), *(_sentence(rng) for _ in range(1 + rng.randrange(2)))]
    )


def _join_scraps(rng: TextRng, parts: list[str]) -> str:
    """Returns the parts and a few more in random order, then an ending."""
    if rng.chance(0.4):
        parts.append(_heading(rng))
    if rng.chance(0.3):
        parts.append(_list(rng))
    elif rng.chance(0.2):
        parts += [_sentence(rng), _sentence(rng)]
    parts = rng.shuffled(parts)
    # The ending is a sentence or a word (2 of 5 each), or a statement about another text.
    last = rng.randrange(5)
    if last < 2:
        parts.append(_sentence(rng))
    elif last == 2:
        parts.append(prose(rng).statement)
    else:
        parts.append(capitalized(f"{_word(rng)}."))
    return " ".join(parts)


def lines(seed: int, n: int) -> Iterator[str]:
    """Yields `n` lines of pretraining text, one text per line."""
    rng = TextRng(f"corpus {seed}")
    for _ in range(n):
        yield scraps(rng) if rng.chance(SCRAPS_PROB) else prose_line(rng)
