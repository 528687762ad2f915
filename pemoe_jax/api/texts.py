"""Texts and answer choices of a call: checks, and encoding to token ids."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pemoe_jax.core.errors import InputError, plural

if TYPE_CHECKING:
    import numpy as np

    from pemoe_jax.data.choices import ChoiceGroup
    from pemoe_jax.tasks.tokenizer import Tokenizer

_FOLDER = os.path.dirname(__file__)


class Limits(NamedTuple):
    """Limits of a call.

    Attributes:
      input_tokens: largest number of tokens of a text, with EOS.
      target_tokens: largest number of tokens of a choice, with EOS.
      batch_size: largest number of texts in a batch.
    """

    input_tokens: int
    target_tokens: int
    batch_size: int


def check_texts(name: str, texts: object) -> list[str]:
    """Returns the texts as a list.

    Args:
      name: name of the argument, for the message.
      texts: the argument.

    Raises:
      InputError: it is not a list of strings, or one of them cannot be encoded as UTF-8.
    """
    is_text = isinstance(texts, str)  # a string is a sequence of strings too
    if is_text or not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
        raise InputError(f"{name} must be a list of texts, got {texts!r:.80}")
    try:
        for text in texts:
            text.encode()
    except UnicodeError:
        raise InputError(
            f"{name} must be encodable as UTF-8 (no lone surrogates), got {text!r:.80}"
        ) from None
    return list(texts)


def check_choices(choices: object) -> list[str]:
    """Returns the choices of a text; InputError unless they are a list of at least one text."""
    if isinstance(choices, str) or not choices:
        raise InputError(
            f"choices of a text must be a list of at least one text, got {choices!r:.80}"
        )
    return check_texts("choices", choices)


def choices_by_text(choices: object, count: int) -> list[list[str]]:
    """Returns the choices of each of `count` texts, from one list for all or a list of lists."""
    if not isinstance(choices, Sequence) or all(isinstance(choice, str) for choice in choices):
        return [check_choices(choices)] * count
    if len(choices) != count:
        raise InputError(f"choices must have a list for each of {count} texts, got {len(choices)}")
    return [check_choices(row) for row in choices]


def encode(tokenizer: Tokenizer, name: str, texts: Sequence[str], limit: int) -> list[np.ndarray]:
    """Returns the int32 ids of each text, with EOS; warns about texts of more than `limit` ids.

    Args:
      tokenizer: the vocabulary.
      name: 'texts' or 'choices', for the warning.
      texts: the texts.
      limit: number of ids, with EOS, that a text is truncated to.
    """
    import numpy as np

    from pemoe_jax.data import choices

    eos_id = tokenizer.eos_id
    encoded = []
    num_truncated = 0
    for text in texts:
        ids = np.array([*tokenizer.encode(text), eos_id], np.int32)
        ids, is_truncated = choices.truncate(ids, limit, eos_id)
        encoded.append(ids)
        num_truncated += is_truncated
    if num_truncated:
        # The first frame outside of this folder, so that the warning shows the user's line.
        # `_getframe` counts frames from 0 and `stacklevel` from 1; the first is this function.
        level = 1
        while os.path.dirname(sys._getframe(level).f_code.co_filename) == _FOLDER:
            level += 1
        warnings.warn(
            f"{num_truncated:,} of {plural(len(texts), name[:-1])} truncated to {limit:,} tokens",
            stacklevel=level + 1,
        )
    return encoded


def make_groups(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    choices: Sequence[Sequence[str]],
    limits: Limits,
) -> list[ChoiceGroup]:
    """Returns each text with its choices, encoded, in order.

    Args:
      tokenizer: the vocabulary.
      texts: the texts.
      choices: the choices of each text.
      limits: the lengths that texts and choices are truncated to.
    """
    from pemoe_jax.data.choices import ChoiceGroup

    inputs = encode(tokenizer, "texts", texts, limits.input_tokens)
    # Texts often share their choices: each is encoded, and counted in a warning, once.
    distinct = list(dict.fromkeys(choice for row in choices for choice in row))
    encoded = encode(tokenizer, "choices", distinct, limits.target_tokens)
    ids = dict(zip(distinct, encoded, strict=True))
    return [
        ChoiceGroup(
            task="",  # texts belong to no task, and their correct choice is unknown
            idx=index,
            inputs=inputs[index],
            choices=tuple(ids[choice] for choice in row),
            is_correct=(),
            input_text=text,
            choice_texts=tuple(row),
            input_truncated=False,  # not read here: `encode` has warned
            target_truncated=False,
        )
        for index, (text, row) in enumerate(zip(texts, choices, strict=True))
    ]
