"""Checks the texts and choices passed to `Model`'s methods, and encodes them as token ids."""

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
# The arguments of `load_model` that limit the lengths, for warnings.
_LIMIT_NAMES = {"texts": "max_input_tokens", "choices": "max_target_tokens"}


class Limits(NamedTuple):
    """Limits of a `Model`, set by `load_model`.

    Attributes:
      input_tokens: largest number of tokens of a text, including EOS.
      target_tokens: largest number of tokens of a choice, including EOS.
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
    is_single = isinstance(texts, str)  # a string is a sequence of strings too
    if is_single or not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
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
    """Returns the choices of a text as a list.

    Raises:
      InputError: they are not a list of at least one string; see also `check_texts`.
    """
    if isinstance(choices, str) or not choices:
        raise InputError(
            f"choices of a text must be a list of at least one text, got {choices!r:.80}"
        )
    return check_texts("choices", choices)


def choices_by_text(choices: object, count: int) -> list[list[str]]:
    """Returns the list of choices of each of `count` texts.

    Args:
      choices: one list of choices for all texts, or a list of such lists, one for each text.
      count: number of texts.

    Raises:
      InputError: the number of lists is not `count`; see also `check_choices`.
    """
    if not isinstance(choices, Sequence) or all(isinstance(choice, str) for choice in choices):
        return [check_choices(choices)] * count
    if len(choices) != count:
        raise InputError(f"choices must have a list for each of {count} texts, got {len(choices)}")
    return [check_choices(row) for row in choices]


def encode(tokenizer: Tokenizer, name: str, texts: Sequence[str], limit: int) -> list[np.ndarray]:
    """Returns the token ids of each text, int32 [L]; warns about texts that it truncates.

    Args:
      tokenizer: the vocabulary.
      name: 'texts' or 'choices', for the warning.
      texts: the texts.
      limit: largest number of ids of a text, including EOS; longer texts are truncated.
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
        # Finds the first caller outside of this folder, so that the warning shows the user's line.
        # This function is frame 0 for `_getframe`, but level 1 for `stacklevel`.
        level = 1
        while os.path.dirname(sys._getframe(level).f_code.co_filename) == _FOLDER:
            level += 1
        warnings.warn(
            f"{num_truncated:,} of {plural(len(texts), name[:-1])} truncated to {limit:,} tokens"
            f" ({_LIMIT_NAMES[name]})",
            stacklevel=level + 1,
        )
    return encoded


def make_groups(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    choices: Sequence[Sequence[str]],
    limits: Limits,
) -> list[ChoiceGroup]:
    """Returns a `ChoiceGroup`, with token ids, for each text and its choices.

    Args:
      tokenizer: the vocabulary.
      texts: the texts.
      choices: the choices of each text.
      limits: the largest numbers of tokens; longer texts and choices are truncated.
    """
    from pemoe_jax.data.choices import ChoiceGroup

    inputs = encode(tokenizer, "texts", texts, limits.input_tokens)
    # Texts often share choices, so each distinct choice is encoded, and counted in a warning, only
    # once.
    distinct = list(dict.fromkeys(choice for row in choices for choice in row))
    encoded = encode(tokenizer, "choices", distinct, limits.target_tokens)
    ids = dict(zip(distinct, encoded, strict=True))
    return [
        ChoiceGroup(
            task="",  # texts belong to no task
            idx=index,
            inputs=inputs[index],
            choices=tuple(ids[choice] for choice in row),
            is_correct=(),  # unknown
            input_text=text,
            choice_texts=tuple(row),
            # These may be untrue, but the Python API does not use them; `encode` has warned.
            input_truncated=False,
            target_truncated=False,
        )
        for index, (text, row) in enumerate(zip(texts, choices, strict=True))
    ]
