"""The pretraining text: stories of the small world, facts, questions and answers.

No line uses a prompt of the sample. Questions here are mostly answered in whole sentences ("What is
it about? It is about music."), while the sample's prompts give instructions, list their choices and
expect a bare label. Every word of the prompts occurs here, because adapters are trained with frozen
embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator

from pemoe_jax.tasks.quickstart import world
from pemoe_jax.tasks.quickstart.world import TextRng, Topic, capitalized, pronoun, with_article


def _truth(rng: TextRng, true: bool) -> str:
    if true:
        return rng.choice_of("That is true.", "That is right.", "It is true.", "Yes, that is true.")
    return rng.choice_of("That is false.", "That is wrong.", "It is false.", "No, that is false.")


def _claim(rng: TextRng, statement: str, true: bool) -> str:
    """Returns a claim or question about a statement (lower case, no full stop), and its truth."""
    claim = rng.choice_of(
        f"Is it true that {statement}?",
        f"Somebody says that {statement}.",
        f"Is it right to say that {statement}?",
        f"They said: {statement}.",
    )
    return f"{claim} {_truth(rng, true)}"


def _answer(rng: TextRng, sentence: str, word: str) -> str:
    """Returns an answer: the sentence, or with probability 0.3 the word after 'Answer:'."""
    return (
        sentence if rng.chance(0.7) else rng.choice_of(f"The answer is {word}.", f"Answer: {word}.")
    )


def plain(rng: TextRng, topic: Topic) -> str:
    """Returns a story."""
    if rng.chance(0.3):
        first = rng.future_sentence(topic)
        return f"{first} {rng.future_sentence(topic)}" if rng.chance(0.5) else first
    name = rng.choice(world.NAMES)
    parts = [
        rng.past_sentence(topic, name) if rng.chance(0.5) else rng.past_sentence(topic),
        rng.detail(topic),
    ]
    if rng.chance(0.5):
        parts.append(rng.detail(topic))
    if rng.chance(0.4):
        parts.append(rng.opinion(topic, rng.chance(0.5)))
    if rng.chance(0.4):
        parts.append(
            capitalized(rng.past_sentence(topic, pronoun(name), time_prob=0.0))
            if name in parts[0]
            else rng.past_sentence(topic)
        )
    return " ".join(parts)


def known(rng: TextRng, topic: Topic) -> str:
    """Returns a fact about things, places and jobs."""
    thing, other, more = rng.sample(topic.things, 3)
    place, job = rng.choice(topic.places), rng.choice(topic.jobs)
    return rng.choice_of(
        f"{capitalized(with_article(thing))} has to do with {topic.name}."
        f" You find it in the {place}.",
        f"The word {thing} belongs to {topic.name}, and so does the word {other}.",
        f"You find {with_article(thing)} and {with_article(other)} in the {place}.",
        f"The {job} works in the {place}. The {job} knows all about {topic.name}.",
        f"{capitalized(topic.name)}: the {thing}, the {other} and the {more}.",
        f"In the {place} there is {topic.name}. The {job} is there with the {thing}.",
        f"{capitalized(with_article(job))} has {with_article(thing)} and works with it"
        f" in the {place}.",
        f"The {place} is a place for {topic.name}. The {job} works there.",
    )


def about(rng: TextRng, topic: Topic) -> str:
    """Returns a story and its topic."""
    text = rng.story(topic) if rng.chance(0.7) else rng.future_sentence(topic)
    if rng.chance(0.4):
        claimed = topic.name if rng.chance(0.5) else rng.choice(world.TOPIC_NAMES)
        return f"{text} {_claim(rng, f'it is about {claimed}', claimed == topic.name)}"
    return rng.choice_of(
        f"{text} What is it about? {_answer(rng, f'It is about {topic.name}.', topic.name)}",
        f"A story about {topic.name}: {text}",
        f"{text} It was a story about {topic.name}.",
        f"{text} What kind of story is it? "
        f"{_answer(rng, f'It is a story about {topic.name}.', topic.name)}",
    )


def title(rng: TextRng, topic: Topic) -> str:
    """Returns a story with its title."""
    name, text = rng.choice(topic.titles), rng.story(topic)
    return rng.choice_of(
        f"{name}. {text}",
        f"{text} What is the story called? It is called: {name}.",
        f"{text} The name of the story is: {name}.",
    )


def sentiment(rng: TextRng, topic: Topic) -> str:
    """Returns an opinion and its sentiment."""
    good = rng.chance(0.5)
    text = rng.opinion(topic, good)
    word = "good" if good else "bad"
    like = "liked" if good else "hated"
    if rng.chance(0.3):
        claims_good = rng.chance(0.5)
        claimed = "good" if claims_good else "bad"
        return f"{text} {_claim(rng, f'it was {claimed}', claims_good == good)}"
    return rng.choice_of(
        f"{text} How was it? {_answer(rng, f'It was {word}.', word)}",
        f"{text} Everybody {like} it.",
        f"{text} {capitalized(rng.choice(world.NAMES))} {like} the {rng.choice(topic.things)}.",
        f"{text} These are {'positive' if good else 'negative'} words.",
        f"{text} The guests {'will come back' if good else 'will not come back'}.",
        f"The words {' and '.join(rng.sample(world.POSITIVE if good else world.NEGATIVE, 2))} are "
        f"{'positive' if good else 'negative'} and mean {word}.",
    )


def feeling(rng: TextRng, topic: Topic) -> str:
    """Returns a text about a person who shows a feeling, and the feeling's name."""
    name, felt = rng.choice(world.NAMES), rng.choice(tuple(world.FEELINGS))
    text = rng.feeling_shown(name, felt)
    if rng.chance(0.4):
        before = rng.past_sentence(topic, name)
        text = f"{before} {capitalized(rng.feeling_shown(pronoun(name), felt))}"
    return rng.choice_of(
        f"{text} {capitalized(pronoun(name))} was {felt}.",
        f"{name} was {felt}. {text}",
        f"{text} How did {name} feel? "
        f"{_answer(rng, f'{capitalized(pronoun(name))} felt {felt}.', felt)}",
        f"{name} {rng.choice(world.FEELINGS[felt])} because {pronoun(name)} was {felt}.",
    )


def place(rng: TextRng, topic: Topic) -> str:
    """Returns a question or fact about a place."""
    where, thing, job = rng.choice(topic.places), rng.choice(topic.things), rng.choice(topic.jobs)
    return rng.choice_of(
        f"{rng.past_sentence(topic, place_prob=0.0)} Where was it? "
        f"{_answer(rng, f'It was in the {where}.', where)}",
        f"Where is the {thing}? {_answer(rng, f'It is in the {where}.', where)}",
        f"Where is the {job}? {_answer(rng, f'The {job} works in the {where}.', where)}",
        f"Somebody works in the {where} with {with_article(thing)}. Who is it? "
        f"{_answer(rng, f'It is the {job}.', job)}",
        f"What is there in the {where}? {_answer(rng, f'There is {with_article(thing)}.', thing)}",
    )


def belongs(rng: TextRng, topic: Topic) -> str:
    """Returns the topic that a thing belongs to."""
    thing = rng.choice(topic.things)
    if rng.chance(0.4):
        claimed = topic.name if rng.chance(0.5) else rng.choice(world.TOPIC_NAMES)
        return _claim(rng, f"{with_article(thing)} has to do with {claimed}", claimed == topic.name)
    return (
        f"What does {with_article(thing)} belong to? "
        f"{_answer(rng, f'It belongs to {topic.name}.', topic.name)}"
    )


def time(rng: TextRng, topic: Topic) -> str:
    """Returns a sentence and whether it is in the past or the future."""
    later = rng.chance(0.5)
    text = rng.future_sentence(topic) if later else rng.past_sentence(topic)
    word = "future" if later else "past"
    if rng.chance(0.3):
        claims_future = rng.chance(0.5)
        claimed = "future" if claims_future else "past"
        return f"{text} {_claim(rng, f'this is in the {claimed}', claims_future == later)}"
    return rng.choice_of(
        f"{text} When is it? {_answer(rng, f'It is in the {word}.', f'the {word}')}",
        f"{text} This is a story of the {word}.",
        f"{text} {'It did not happen yet.' if later else 'It happened already.'}",
        "Yesterday and last week are in the past. Tomorrow and next week are in the future.",
    )


def persons(rng: TextRng, topic: Topic) -> str:
    """Returns a text on who did what, or on the referent of a pronoun."""
    she, he = rng.choice(world.FEMALE_NAMES), rng.choice(world.MALE_NAMES)
    # One woman and one man, in random order: only the pronoun tells who is meant.
    first, second = rng.shuffled((she, he))
    name = rng.choice_of(she, he)
    word = capitalized(pronoun(name))
    doing = rng.past_sentence(topic, word, time_prob=0.0)
    did = doing.removeprefix(word + " ").removesuffix(".")
    return rng.choice_of(
        f"{first} and {second} went to the {rng.choice(topic.places)}. {doing} It was {name} who "
        f"{did}.",
        f"{first} met {second} in the {rng.choice(topic.places)}. {doing} Who {did}? "
        f"{_answer(rng, f'It was {name}.', name)}",
        f"{name} was in the {rng.choice(topic.places)}. {doing}",
        f"{rng.past_sentence(topic, name)} {rng.past_sentence(topic, word)} Who was it? "
        f"{_answer(rng, f'It was {name}.', name)}",
        f"{doing.replace(word, name, 1)} Who {did}? {_answer(rng, f'{name} {did}.', name)}",
        f"{she} is a woman and {he} is a man.",
    )


def needs(rng: TextRng, topic: Topic) -> str:
    """Returns a need and its consequence."""
    # Both directions: the sample asks for the need, the text also for the reason.
    name, state = rng.choice(world.NAMES), rng.choice(tuple(world.NEEDS))
    thing, do, did = world.NEEDS[state]
    p = pronoun(name)
    return rng.choice_of(
        f"{name} was {state}, so {p} {did}.",
        f"{name} was {state} in the {rng.choice(topic.places)}. Then {p} {did}.",
        f"{name} {did} because {p} was {state}.",
        f"{name} is {state}. {capitalized(p)} will {do}.",
        f"{name} is {state}. What does {name} need? "
        f"{_answer(rng, f'{capitalized(p)} needs {thing}.', thing)}",
        f"When you are {state}, you need {thing}.",
        f"{name} {did}. Why did {p} do it? {_answer(rng, f'{capitalized(p)} was {state}.', state)}",
    )


def comparison(rng: TextRng, topic: Topic) -> str:
    """Returns two sentences and whether they have to do with the same thing."""
    if rng.chance(0.4):
        first = rng.past_sentence(topic)
        fits = rng.chance(0.5)
        other = topic if fits else rng.other_topic(topic)
        second = rng.detail(other)
    elif rng.chance(0.5):
        good = rng.chance(0.5)
        fits = rng.chance(0.5)
        first, second = rng.opinion(topic, good), rng.opinion(topic, good == fits)
    else:
        first = rng.past_sentence(topic)
        fits = rng.chance(0.5)
        other = topic if fits else rng.other_topic(topic)
        second = f"There was {other.name} in the {rng.choice(other.places)}."
    if fits and rng.chance(0.5):
        return f"{first} {rng.choice_of('In other words:', 'Also:', 'This means:')} {second}"
    return (
        f"{first} {second} "
        f"{'Both have to do with the same thing.' if fits else 'These are two different things.'}"
    )


def senses(rng: TextRng, topic: Topic) -> str:
    """Returns a text that uses an ambiguous word in one of its senses."""
    word = rng.choice(tuple(world.SENSES))
    first, second = world.SENSES[word]
    meant = rng.choice_of(first, second)
    text = rng.sentence_with(word, world.TOPIC_BY_NAME[meant])
    return rng.choice_of(
        f"{text} {rng.detail(world.TOPIC_BY_NAME[meant])}",
        f"{text} It was a story about {meant}.",
        f"{text} Here the word {word} has to do with {meant}.",
        f"{capitalized(with_article(word))} can have to do with {first} or with {second}.",
    )


def exam(rng: TextRng, topic: Topic) -> str:
    """Returns a text about lessons, which covers the words of the prompts' instructions."""
    # Embeddings are frozen for adapters: a word that only prompts had would stay random.
    things = ", ".join(rng.sample(topic.things, 3))
    question = rng.choice_of(
        "question", "label", "category", "topic", "title", "sentence", "review", "subject"
    )
    other = rng.choice_of("options", "choices", "sentences", "reviews", "labels", "titles")
    name = rng.choice(world.NAMES)
    return rng.choice_of(
        f"The teacher read the following text to the class. {rng.story(topic)}",
        f"{name} had to choose one of these {other}: {things}.",
        f"Please pick the best {question} for the text, said the teacher to {name}.",
        f"Which of the {other} does {name} mean? {name} would decide on the {question} tomorrow.",
        f"Read the {question} and answer it, yes or no, {name}.",
        f"Would {name} recommend the {rng.choice(topic.things)}? Yes or no?",
        f"Is the {rng.choice(topic.things)} in the {rng.choice(topic.places)}? "
        f"{rng.choice_of('Yes, it is.', 'No, it is not.')}",
        f"The {question} of the text is: {topic.name}. {rng.story(topic)}",
        f"Does the writer like the {rng.choice(topic.things)}? "
        f"{rng.choice_of('Yes, very much.', 'No, not at all.')}",
        "The premise and the hypothesis follow from each other,"
        f" wrote the {rng.choice(topic.jobs)}.",
        f"What happens next in the story? {rng.past_sentence(topic)}",
        f"The {rng.choice(topic.jobs)} will know most about {topic.name} and go to work in "
        f"the {rng.choice(topic.places)}.",
        f"This is still the {rng.choice_of('end', 'ending')} of the {question}, and {name} "
        "knows what follows.",
        f"Now the guest will be in the {rng.choice(topic.places)} with a gift for {name}.",
        f"{name} gave a short summary of the {question}: {rng.detail(topic)}",
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
    rng = TextRng(f"corpus {seed}")
    kinds = [kind for kind, weight in KINDS for _ in range(weight)]
    for _ in range(n):
        yield rng.choice(kinds)(rng, rng.choice(world.TOPICS))
