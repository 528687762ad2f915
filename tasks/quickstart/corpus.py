"""The pretraining text: stories of the small world, what is known in it, questions and answers.

No line uses a prompt of the sample. The questions here are asked and mostly answered in whole
sentences ("What is it about? It is about music."), while the sample's prompts instruct, name their
choices and want a bare label. Every word of the sample's prompts occurs here, because embeddings
stay frozen when adapters are trained.
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
    Dice,
    Topic,
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


def _truth(dice: Dice, true: bool) -> str:
    if true:
        return dice.pick(("That is true.", "That is right.", "It is true.", "Yes, that is true."))
    return dice.pick(("That is false.", "That is wrong.", "It is false.", "No, that is false."))


def _claim(dice: Dice, statement: str) -> str:
    """The statement (without capital and full stop), put as something to be judged."""
    return dice.pick(
        (
            f"Is it true that {statement}?",
            f"Somebody says that {statement}.",
            f"Is it right to say that {statement}?",
            f"They said: {statement}.",
        )
    )


def _answer(dice: Dice, sentence: str, word: str) -> str:
    """An answer in a sentence, mostly; now and then the bare word after a lead."""
    return (
        sentence if dice.chance(0.7) else dice.pick((f"The answer is {word}.", f"Answer: {word}."))
    )


def plain(dice: Dice, topic: Topic) -> str:
    """A story."""
    if dice.chance(0.3):
        first = future(dice, topic)
        return f"{first} {future(dice, topic)}" if dice.chance(0.5) else first
    name = dice.pick(NAMES)
    parts = [
        past(dice, topic, name) if dice.chance(0.5) else past(dice, topic),
        detail(dice, topic),
    ]
    if dice.chance(0.5):
        parts.append(detail(dice, topic))
    if dice.chance(0.4):
        parts.append(opinion(dice, topic, dice.chance(0.5)))
    if dice.chance(0.4):
        parts.append(
            capital(past(dice, topic, pronoun(name), time=0.0))
            if name in parts[0]
            else past(dice, topic)
        )
    return " ".join(parts)


def known(dice: Dice, topic: Topic) -> str:
    """What is known of things, places and jobs."""
    thing, other, more = dice.several(topic.things, 3)
    place, job = dice.pick(topic.places), dice.pick(topic.jobs)
    return dice.pick(
        (
            f"{capital(a(thing))} has to do with {topic.name}. You find it in the {place}.",
            f"The word {thing} belongs to {topic.name}, and so does the word {other}.",
            f"You find {a(thing)} and {a(other)} in the {place}.",
            f"The {job} works in the {place}. The {job} knows all about {topic.name}.",
            f"{capital(topic.name)}: the {thing}, the {other} and the {more}.",
            f"In the {place} there is {topic.name}. The {job} is there with the {thing}.",
            f"{capital(a(job))} has {a(thing)} and works with it in the {place}.",
            f"The {place} is a place for {topic.name}. The {job} works there.",
        )
    )


def about(dice: Dice, topic: Topic) -> str:
    """A story, and what it is about."""
    text = story(dice, topic) if dice.chance(0.7) else future(dice, topic)
    if dice.chance(0.4):
        told = topic.name if dice.chance(0.5) else dice.pick(TOPIC_NAMES)
        return f"{text} {_claim(dice, f'it is about {told}')} {_truth(dice, told == topic.name)}"
    return dice.pick(
        (
            f"{text} What is it about? {_answer(dice, f'It is about {topic.name}.', topic.name)}",
            f"A story about {topic.name}: {text}",
            f"{text} It was a story about {topic.name}.",
            f"{text} What kind of story is it? "
            f"{_answer(dice, f'It is a story about {topic.name}.', topic.name)}",
        )
    )


def title(dice: Dice, topic: Topic) -> str:
    """A story and its title."""
    name, text = dice.pick(topic.titles), story(dice, topic)
    return dice.pick(
        (
            f"{name}. {text}",
            f"{text} What is the story called? It is called: {name}.",
            f"{text} The name of the story is: {name}.",
        )
    )


def praise(dice: Dice, topic: Topic) -> str:
    """An opinion, and whether it is a good one."""
    good = dice.chance(0.5)
    text = opinion(dice, topic, good)
    word = "good" if good else "bad"
    like = "liked" if good else "hated"
    if dice.chance(0.3):
        says = dice.chance(0.5)
        return (
            f"{text} {_claim(dice, 'it was ' + ('good' if says else 'bad'))} "
            f"{_truth(dice, says == good)}"
        )
    return dice.pick(
        (
            f"{text} How was it? {_answer(dice, f'It was {word}.', word)}",
            f"{text} Everybody {like} it.",
            f"{text} {capital(dice.pick(NAMES))} {like} the {dice.pick(topic.things)}.",
            f"{text} These are {'positive' if good else 'negative'} words.",
            f"{text} The guests {'will come back' if good else 'will not come back'}.",
            f"The words {' and '.join(dice.several(GOOD if good else BAD, 2))} are "
            f"{'positive' if good else 'negative'} and mean {word}.",
        )
    )


def feeling(dice: Dice, topic: Topic) -> str:
    """How a feeling shows, and which it is."""
    name, felt = dice.pick(NAMES), dice.pick(tuple(FEELINGS))
    text = feeling_shown(dice, name, felt)
    if dice.chance(0.4):
        text = f"{past(dice, topic, name)} {capital(feeling_shown(dice, pronoun(name), felt))}"
    return dice.pick(
        (
            f"{text} {capital(pronoun(name))} was {felt}.",
            f"{name} was {felt}. {text}",
            f"{text} How did {name} feel? "
            f"{_answer(dice, f'{capital(pronoun(name))} felt {felt}.', felt)}",
            f"{name} {dice.pick(FEELINGS[felt])} because {pronoun(name)} was {felt}.",
        )
    )


def place(dice: Dice, topic: Topic) -> str:
    """Where things, jobs and stories belong."""
    where, thing, job = dice.pick(topic.places), dice.pick(topic.things), dice.pick(topic.jobs)
    return dice.pick(
        (
            f"{past(dice, topic, place=0.0)} Where was it? "
            f"{_answer(dice, f'It was in the {where}.', where)}",
            f"Where is the {thing}? {_answer(dice, f'It is in the {where}.', where)}",
            f"Where is the {job}? {_answer(dice, f'The {job} works in the {where}.', where)}",
            f"Somebody works in the {where} with {a(thing)}. Who is it? "
            f"{_answer(dice, f'It is the {job}.', job)}",
            f"What is there in the {where}? {_answer(dice, f'There is {a(thing)}.', thing)}",
        )
    )


def belongs(dice: Dice, topic: Topic) -> str:
    """Which topic a thing belongs to."""
    thing = dice.pick(topic.things)
    if dice.chance(0.4):
        told = topic.name if dice.chance(0.5) else dice.pick(TOPIC_NAMES)
        return (
            f"{_claim(dice, f'{a(thing)} has to do with {told}')} "
            f"{_truth(dice, told == topic.name)}"
        )
    return (
        f"What does {a(thing)} belong to? "
        f"{_answer(dice, f'It belongs to {topic.name}.', topic.name)}"
    )


def time(dice: Dice, topic: Topic) -> str:
    """A story, and whether it is past or to come."""
    later = dice.chance(0.5)
    text = future(dice, topic) if later else past(dice, topic)
    word = "future" if later else "past"
    if dice.chance(0.3):
        told = dice.chance(0.5)
        return (
            f"{text} {_claim(dice, 'this is in the ' + ('future' if told else 'past'))} "
            f"{_truth(dice, told == later)}"
        )
    return dice.pick(
        (
            f"{text} When is it? {_answer(dice, f'It is in the {word}.', f'the {word}')}",
            f"{text} This is a story of the {word}.",
            f"{text} {'It did not happen yet.' if later else 'It happened already.'}",
            "Yesterday and last week are in the past. Tomorrow and next week are in the future.",
        )
    )


def persons(dice: Dice, topic: Topic) -> str:
    """Who did what, and whom a pronoun means."""
    she, he = dice.pick(FEMALE), dice.pick(MALE)
    one, two = dice.shuffled((she, he))
    name = dice.pick((she, he))
    word = capital(pronoun(name))
    doing = past(dice, topic, word, time=0.0)
    did = doing.removeprefix(word + " ").removesuffix(".")
    return dice.pick(
        (
            f"{one} and {two} went to the {dice.pick(topic.places)}. {doing} It was {name} who "
            f"{did}.",
            f"{one} met {two} in the {dice.pick(topic.places)}. {doing} Who {did}? "
            f"{_answer(dice, f'It was {name}.', name)}",
            f"{name} was in the {dice.pick(topic.places)}. {doing}",
            f"{past(dice, topic, name)} {past(dice, topic, word)} Who was it? "
            f"{_answer(dice, f'It was {name}.', name)}",
            f"{doing.replace(word, name, 1)} Who {did}? {_answer(dice, f'{name} {did}.', name)}",
            f"{she} is a woman and {he} is a man.",
        )
    )


def needs(dice: Dice, topic: Topic) -> str:
    """A need and what follows from it."""
    name, state = dice.pick(NAMES), dice.pick(STATES)
    thing, do, did = NEEDS[state]
    p = pronoun(name)
    return dice.pick(
        (
            f"{name} was {state}, so {p} {did}.",
            f"{name} was {state} in the {dice.pick(topic.places)}. Then {p} {did}.",
            f"{name} {did} because {p} was {state}.",
            f"{name} is {state}. {capital(p)} will {do}.",
            f"{name} is {state}. What does {name} need? "
            f"{_answer(dice, f'{capital(p)} needs {thing}.', thing)}",
            f"When you are {state}, you need {thing}.",
            f"{name} {did}. Why did {p} do it? "
            f"{_answer(dice, f'{capital(p)} was {state}.', state)}",
        )
    )


def again(dice: Dice, topic: Topic) -> str:
    """Two sentences that fit together, or do not."""
    if dice.chance(0.4):
        first = past(dice, topic)
        fits = dice.chance(0.5)
        other = topic if fits else dice.pick([t for t in TOPICS if t is not topic])
        second = detail(dice, other)
    elif dice.chance(0.5):
        good = dice.chance(0.5)
        fits = dice.chance(0.5)
        first, second = opinion(dice, topic, good), opinion(dice, topic, good == fits)
    else:
        first, other = past(dice, topic), topic
        fits = dice.chance(0.5)
        if not fits:
            other = dice.pick([t for t in TOPICS if t is not topic])
        second = f"There was {other.name} in the {dice.pick(other.places)}."
    if fits and dice.chance(0.5):
        return f"{first} {dice.pick(('In other words:', 'Also:', 'This means:'))} {second}"
    return (
        f"{first} {second} "
        f"{'Both have to do with the same thing.' if fits else 'These are two different things.'}"
    )


def senses(dice: Dice, topic: Topic) -> str:
    """An ambiguous word in one of its senses."""
    word = dice.pick(tuple(SENSES))
    meant = dice.pick(SENSES[word])
    text = sense(dice, word, TOPIC[meant])
    return dice.pick(
        (
            f"{text} {detail(dice, TOPIC[meant])}",
            f"{text} It was a story about {meant}.",
            f"{text} Here the word {word} has to do with {meant}.",
            f"{capital(a(word))} can have to do with {SENSES[word][0]} or with {SENSES[word][1]}.",
        )
    )


def exam(dice: Dice, topic: Topic) -> str:
    """A lesson at school: brings in the words that instructions use."""
    things = ", ".join(dice.several(topic.things, 3))
    question = dice.pick(
        ("question", "label", "category", "topic", "title", "sentence", "review", "subject")
    )
    other = dice.pick(("options", "choices", "sentences", "reviews", "labels", "titles"))
    name = dice.pick(NAMES)
    return dice.pick(
        (
            f"The teacher read the following text to the class. {story(dice, topic)}",
            f"{name} had to choose one of these {other}: {things}.",
            f"Please pick the best {question} for the text, said the teacher to {name}.",
            f"Which of the {other} does {name} mean? {name} would decide on the {question} "
            "tomorrow.",
            f"Read the {question} and answer it, yes or no, {name}.",
            f"Would {name} recommend the {dice.pick(topic.things)}? Yes or no?",
            f"Is the {dice.pick(topic.things)} in the {dice.pick(topic.places)}? "
            f"{dice.pick(('Yes, it is.', 'No, it is not.'))}",
            f"The {question} of the text is: {topic.name}. {story(dice, topic)}",
            f"Does the writer like the {dice.pick(topic.things)}? "
            f"{dice.pick(('Yes, very much.', 'No, not at all.'))}",
            "The premise and the hypothesis follow from each other, wrote the "
            f"{dice.pick(topic.jobs)}.",
            f"What happens next in the story? {past(dice, topic)}",
            f"The {dice.pick(topic.jobs)} will know most about {topic.name} and go to work in "
            f"the {dice.pick(topic.places)}.",
            f"This is still the {dice.pick(('end', 'ending'))} of the {question}, and {name} "
            "knows what follows.",
            f"Now the guest will be in the {dice.pick(topic.places)} with a gift for {name}.",
            f"{name} gave a short summary of the {question}: {detail(dice, topic)}",
        )
    )


KINDS = (
    (plain, 4),
    (known, 4),
    (about, 5),
    (title, 2),
    (praise, 6),
    (feeling, 6),
    (place, 4),
    (belongs, 3),
    (time, 4),
    (persons, 5),
    (needs, 4),
    (again, 5),
    (senses, 3),
    (exam, 3),
)


def lines(seed: int, n: int) -> Iterator[str]:
    """`n` lines of pretraining text, a text each."""
    dice = Dice(f"corpus {seed}")
    bag = [kind for kind, weight in KINDS for _ in range(weight)]
    for _ in range(n):
        yield dice.pick(bag)(dice, dice.pick(TOPICS))
