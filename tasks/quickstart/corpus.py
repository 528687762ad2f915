"""The pretraining text: stories of the small world, facts, questions and answers.

No line uses a prompt of the sample. Questions here are mostly answered in whole sentences ("What is
it about? It is about music."), while the sample's prompts give instructions, list their choices and
expect a bare label. Every word of the prompts occurs here, because adapters are trained with frozen
embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator

from pemoe_jax.tasks.quickstart.world import (
    BAD,
    FEELINGS,
    FEMALE,
    GOOD,
    MALE,
    NAMES,
    NEEDS,
    SENSES,
    STATES,
    TOPIC,
    TOPIC_NAMES,
    TOPICS,
    Rng,
    Topic,
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


def _truth(rng: Rng, true: bool) -> str:
    if true:
        return rng.choose("That is true.", "That is right.", "It is true.", "Yes, that is true.")
    return rng.choose("That is false.", "That is wrong.", "It is false.", "No, that is false.")


def _claim(rng: Rng, statement: str) -> str:
    """Returns a claim or question about a statement (lower case, without a full stop)."""
    return rng.choose(
        f"Is it true that {statement}?",
        f"Somebody says that {statement}.",
        f"Is it right to say that {statement}?",
        f"They said: {statement}.",
    )


def _answer(rng: Rng, sentence: str, word: str) -> str:
    """Returns an answer: a sentence, or with probability 0.3 the bare word introduced."""
    return sentence if rng.chance(0.7) else rng.choose(f"The answer is {word}.", f"Answer: {word}.")


def plain(rng: Rng, topic: Topic) -> str:
    """Returns a story."""
    if rng.chance(0.3):
        first = future(rng, topic)
        return f"{first} {future(rng, topic)}" if rng.chance(0.5) else first
    name = rng.pick(NAMES)
    parts = [
        past(rng, topic, name) if rng.chance(0.5) else past(rng, topic),
        detail(rng, topic),
    ]
    if rng.chance(0.5):
        parts.append(detail(rng, topic))
    if rng.chance(0.4):
        parts.append(opinion(rng, topic, rng.chance(0.5)))
    if rng.chance(0.4):
        parts.append(
            capital(past(rng, topic, pronoun(name), time=0.0))
            if name in parts[0]
            else past(rng, topic)
        )
    return " ".join(parts)


def known(rng: Rng, topic: Topic) -> str:
    """Returns a fact about things, places and jobs."""
    thing, other, more = rng.several(topic.things, 3)
    place, job = rng.pick(topic.places), rng.pick(topic.jobs)
    return rng.choose(
        f"{capital(a(thing))} has to do with {topic.name}. You find it in the {place}.",
        f"The word {thing} belongs to {topic.name}, and so does the word {other}.",
        f"You find {a(thing)} and {a(other)} in the {place}.",
        f"The {job} works in the {place}. The {job} knows all about {topic.name}.",
        f"{capital(topic.name)}: the {thing}, the {other} and the {more}.",
        f"In the {place} there is {topic.name}. The {job} is there with the {thing}.",
        f"{capital(a(job))} has {a(thing)} and works with it in the {place}.",
        f"The {place} is a place for {topic.name}. The {job} works there.",
    )


def about(rng: Rng, topic: Topic) -> str:
    """Returns a story and its topic."""
    text = story(rng, topic) if rng.chance(0.7) else future(rng, topic)
    if rng.chance(0.4):
        claimed = topic.name if rng.chance(0.5) else rng.pick(TOPIC_NAMES)
        claim = _claim(rng, f"it is about {claimed}")
        return f"{text} {claim} {_truth(rng, claimed == topic.name)}"
    return rng.choose(
        f"{text} What is it about? {_answer(rng, f'It is about {topic.name}.', topic.name)}",
        f"A story about {topic.name}: {text}",
        f"{text} It was a story about {topic.name}.",
        f"{text} What kind of story is it? "
        f"{_answer(rng, f'It is a story about {topic.name}.', topic.name)}",
    )


def title(rng: Rng, topic: Topic) -> str:
    """Returns a story with its title."""
    name, text = rng.pick(topic.titles), story(rng, topic)
    return rng.choose(
        f"{name}. {text}",
        f"{text} What is the story called? It is called: {name}.",
        f"{text} The name of the story is: {name}.",
    )


def sentiment(rng: Rng, topic: Topic) -> str:
    """Returns an opinion and its sentiment."""
    good = rng.chance(0.5)
    text = opinion(rng, topic, good)
    word = "good" if good else "bad"
    like = "liked" if good else "hated"
    if rng.chance(0.3):
        says = rng.chance(0.5)
        return (
            f"{text} {_claim(rng, 'it was ' + ('good' if says else 'bad'))} "
            f"{_truth(rng, says == good)}"
        )
    return rng.choose(
        f"{text} How was it? {_answer(rng, f'It was {word}.', word)}",
        f"{text} Everybody {like} it.",
        f"{text} {capital(rng.pick(NAMES))} {like} the {rng.pick(topic.things)}.",
        f"{text} These are {'positive' if good else 'negative'} words.",
        f"{text} The guests {'will come back' if good else 'will not come back'}.",
        f"The words {' and '.join(rng.several(GOOD if good else BAD, 2))} are "
        f"{'positive' if good else 'negative'} and mean {word}.",
    )


def feeling(rng: Rng, topic: Topic) -> str:
    """Returns a person who shows a feeling, and its name."""
    name, felt = rng.pick(NAMES), rng.pick(tuple(FEELINGS))
    text = feeling_shown(rng, name, felt)
    if rng.chance(0.4):
        text = f"{past(rng, topic, name)} {capital(feeling_shown(rng, pronoun(name), felt))}"
    return rng.choose(
        f"{text} {capital(pronoun(name))} was {felt}.",
        f"{name} was {felt}. {text}",
        f"{text} How did {name} feel? "
        f"{_answer(rng, f'{capital(pronoun(name))} felt {felt}.', felt)}",
        f"{name} {rng.pick(FEELINGS[felt])} because {pronoun(name)} was {felt}.",
    )


def place(rng: Rng, topic: Topic) -> str:
    """Returns a question or fact about a place."""
    where, thing, job = rng.pick(topic.places), rng.pick(topic.things), rng.pick(topic.jobs)
    return rng.choose(
        f"{past(rng, topic, place=0.0)} Where was it? "
        f"{_answer(rng, f'It was in the {where}.', where)}",
        f"Where is the {thing}? {_answer(rng, f'It is in the {where}.', where)}",
        f"Where is the {job}? {_answer(rng, f'The {job} works in the {where}.', where)}",
        f"Somebody works in the {where} with {a(thing)}. Who is it? "
        f"{_answer(rng, f'It is the {job}.', job)}",
        f"What is there in the {where}? {_answer(rng, f'There is {a(thing)}.', thing)}",
    )


def belongs(rng: Rng, topic: Topic) -> str:
    """Returns the topic that a thing belongs to."""
    thing = rng.pick(topic.things)
    if rng.chance(0.4):
        claimed = topic.name if rng.chance(0.5) else rng.pick(TOPIC_NAMES)
        claim = _claim(rng, f"{a(thing)} has to do with {claimed}")
        return f"{claim} {_truth(rng, claimed == topic.name)}"
    return (
        f"What does {a(thing)} belong to? "
        f"{_answer(rng, f'It belongs to {topic.name}.', topic.name)}"
    )


def time(rng: Rng, topic: Topic) -> str:
    """Returns a sentence and whether it is in the past or the future."""
    later = rng.chance(0.5)
    text = future(rng, topic) if later else past(rng, topic)
    word = "future" if later else "past"
    if rng.chance(0.3):
        claims_future = rng.chance(0.5)
        return (
            f"{text} {_claim(rng, 'this is in the ' + ('future' if claims_future else 'past'))} "
            f"{_truth(rng, claims_future == later)}"
        )
    return rng.choose(
        f"{text} When is it? {_answer(rng, f'It is in the {word}.', f'the {word}')}",
        f"{text} This is a story of the {word}.",
        f"{text} {'It did not happen yet.' if later else 'It happened already.'}",
        "Yesterday and last week are in the past. Tomorrow and next week are in the future.",
    )


def persons(rng: Rng, topic: Topic) -> str:
    """Returns a text on who did what, or on the referent of a pronoun."""
    she, he = rng.pick(FEMALE), rng.pick(MALE)
    # One woman and one man, in random order: only the pronoun tells who is meant.
    first, second = rng.shuffled((she, he))
    name = rng.choose(she, he)
    word = capital(pronoun(name))
    doing = past(rng, topic, word, time=0.0)
    did = doing.removeprefix(word + " ").removesuffix(".")
    return rng.choose(
        f"{first} and {second} went to the {rng.pick(topic.places)}. {doing} It was {name} who "
        f"{did}.",
        f"{first} met {second} in the {rng.pick(topic.places)}. {doing} Who {did}? "
        f"{_answer(rng, f'It was {name}.', name)}",
        f"{name} was in the {rng.pick(topic.places)}. {doing}",
        f"{past(rng, topic, name)} {past(rng, topic, word)} Who was it? "
        f"{_answer(rng, f'It was {name}.', name)}",
        f"{doing.replace(word, name, 1)} Who {did}? {_answer(rng, f'{name} {did}.', name)}",
        f"{she} is a woman and {he} is a man.",
    )


def needs(rng: Rng, topic: Topic) -> str:
    """Returns a need and its consequence."""
    # Both directions: the sample asks for the need, the text also for the reason.
    name, state = rng.pick(NAMES), rng.pick(STATES)
    thing, do, did = NEEDS[state]
    p = pronoun(name)
    return rng.choose(
        f"{name} was {state}, so {p} {did}.",
        f"{name} was {state} in the {rng.pick(topic.places)}. Then {p} {did}.",
        f"{name} {did} because {p} was {state}.",
        f"{name} is {state}. {capital(p)} will {do}.",
        f"{name} is {state}. What does {name} need? "
        f"{_answer(rng, f'{capital(p)} needs {thing}.', thing)}",
        f"When you are {state}, you need {thing}.",
        f"{name} {did}. Why did {p} do it? {_answer(rng, f'{capital(p)} was {state}.', state)}",
    )


def comparison(rng: Rng, topic: Topic) -> str:
    """Returns two sentences and whether they have to do with the same thing."""
    if rng.chance(0.4):
        first = past(rng, topic)
        fits = rng.chance(0.5)
        other = topic if fits else other_topic(rng, topic)
        second = detail(rng, other)
    elif rng.chance(0.5):
        good = rng.chance(0.5)
        fits = rng.chance(0.5)
        first, second = opinion(rng, topic, good), opinion(rng, topic, good == fits)
    else:
        first, other = past(rng, topic), topic
        fits = rng.chance(0.5)
        if not fits:
            other = other_topic(rng, topic)
        second = f"There was {other.name} in the {rng.pick(other.places)}."
    if fits and rng.chance(0.5):
        return f"{first} {rng.choose('In other words:', 'Also:', 'This means:')} {second}"
    return (
        f"{first} {second} "
        f"{'Both have to do with the same thing.' if fits else 'These are two different things.'}"
    )


def senses(rng: Rng, topic: Topic) -> str:
    """Returns a text that uses an ambiguous word in one of its senses."""
    word = rng.pick(tuple(SENSES))
    meant = rng.pick(SENSES[word])
    text = sense(rng, word, TOPIC[meant])
    return rng.choose(
        f"{text} {detail(rng, TOPIC[meant])}",
        f"{text} It was a story about {meant}.",
        f"{text} Here the word {word} has to do with {meant}.",
        f"{capital(a(word))} can have to do with {SENSES[word][0]} or with {SENSES[word][1]}.",
    )


def exam(rng: Rng, topic: Topic) -> str:
    """Returns a text about lessons, which covers the words of the prompts' instructions."""
    # Embeddings are frozen for adapters: a word that only prompts had would stay random.
    things = ", ".join(rng.several(topic.things, 3))
    question = rng.choose(
        "question", "label", "category", "topic", "title", "sentence", "review", "subject"
    )
    other = rng.choose("options", "choices", "sentences", "reviews", "labels", "titles")
    name = rng.pick(NAMES)
    return rng.choose(
        f"The teacher read the following text to the class. {story(rng, topic)}",
        f"{name} had to choose one of these {other}: {things}.",
        f"Please pick the best {question} for the text, said the teacher to {name}.",
        f"Which of the {other} does {name} mean? {name} would decide on the {question} tomorrow.",
        f"Read the {question} and answer it, yes or no, {name}.",
        f"Would {name} recommend the {rng.pick(topic.things)}? Yes or no?",
        f"Is the {rng.pick(topic.things)} in the {rng.pick(topic.places)}? "
        f"{rng.choose('Yes, it is.', 'No, it is not.')}",
        f"The {question} of the text is: {topic.name}. {story(rng, topic)}",
        f"Does the writer like the {rng.pick(topic.things)}? "
        f"{rng.choose('Yes, very much.', 'No, not at all.')}",
        f"The premise and the hypothesis follow from each other, wrote the {rng.pick(topic.jobs)}.",
        f"What happens next in the story? {past(rng, topic)}",
        f"The {rng.pick(topic.jobs)} will know most about {topic.name} and go to work in "
        f"the {rng.pick(topic.places)}.",
        f"This is still the {rng.choose('end', 'ending')} of the {question}, and {name} "
        "knows what follows.",
        f"Now the guest will be in the {rng.pick(topic.places)} with a gift for {name}.",
        f"{name} gave a short summary of the {question}: {detail(rng, topic)}",
    )


# (kind of text, weight)
KINDS = (
    (plain, 4),
    (known, 4),
    (about, 5),
    (title, 2),
    (sentiment, 6),
    (feeling, 6),
    (place, 4),
    (belongs, 3),
    (time, 4),
    (persons, 5),
    (needs, 4),
    (comparison, 5),
    (senses, 3),
    (exam, 3),
)


def lines(seed: int, n: int) -> Iterator[str]:
    """Yields `n` lines of pretraining text, one text per line."""
    rng = Rng(f"corpus {seed}")
    kinds = [kind for kind, weight in KINDS for _ in range(weight)]
    for _ in range(n):
        yield rng.pick(kinds)(rng, rng.pick(TOPICS))
