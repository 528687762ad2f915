"""The model `pemoe` of lm-evaluation-harness; importing this module registers it.

    import pemoe_jax.tools.lm_eval_model
    lm_eval.simple_evaluate(model="pemoe", model_args={"base": …, "adapter": …}, tasks=[…])

The extra `lm-eval` installs the harness. Its command `lm_eval` knows only its own models; `pemoe
lm_eval` imports this module and then runs that command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from pemoe_jax import api
from pemoe_jax.core.errors import InputError, check_integer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_BATCH_SIZE = 32  # for lm_eval's "auto"
# Setting of a task's `generation_kwargs` -> its values with which decoding is greedy.
_GREEDY: Mapping[str, Sequence[object]] = {
    "do_sample": (False, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
}


@register_model("pemoe")
class PemoeLM(LM):
    """A base model, usually with an adapter, behind lm-evaluation-harness's interface.

    A context is encoded once for all of its continuations. As in training, contexts and
    continuations end in EOS. The score of a continuation includes the log-probability of its EOS;
    lm_eval's own models score continuations without EOS.

    Args:
      base, adapter, vocabulary, dtype, frozen_dtype, max_input_tokens, max_target_tokens: see
        `api.load_model`. Without `base`, the base is the one that the adapter's record names.
      batch_size: number of contexts that are computed together; 'auto' is 32.
      max_gen_toks: number of tokens to generate for tasks that state none.
      device, max_batch_size: ignored; lm_eval's command passes them. JAX chooses the device.
    """

    def __init__(
        self,
        base: str | None = None,
        adapter: str | None = None,
        vocabulary: str | None = None,
        dtype: str | None = None,
        frozen_dtype: str | None = None,
        max_input_tokens: int = 1024,
        max_target_tokens: int = 256,
        batch_size: int | str = _BATCH_SIZE,
        max_gen_toks: int = 128,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if f"{batch_size}".startswith("auto"):
            batch_size = _BATCH_SIZE
        elif not f"{batch_size}".isdecimal():
            raise InputError(f"batch_size must be a positive integer or 'auto', got {batch_size!r}")
        if unknown:
            raise InputError(
                f"model_args of pemoe must be those of docs/lm_eval.md, got {min(unknown)!r}"
            )
        if base is None and adapter is None:
            raise InputError("model_args of pemoe must have base=… or adapter=…, got neither")
        check_integer("max_gen_toks", max_gen_toks)
        self.max_gen_toks = max_gen_toks
        # `load_model` takes the path of an adapter alone in the place of the base.
        path = adapter if base is None else base
        assert path is not None
        self.model = api.load_model(
            path,
            None if base is None else adapter,
            vocabulary,
            dtype=dtype,
            frozen_dtype=frozen_dtype,
            max_input_tokens=max_input_tokens,
            max_target_tokens=max_target_tokens,
            batch_size=int(batch_size),
        )

    @property
    def tokenizer_name(self) -> str:
        """Name of the model, for lm_eval's caches of requests."""
        return repr(self.model)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores the continuation in each request, given its context.

        Returns:
          For each request, the log-probability of its continuation, and whether greedy decoding
          generates it.
        """
        # Context -> its continuations, as an ordered set. Each context is encoded once.
        continuations: dict[str, dict[str, None]] = {}
        for request in requests:
            context, continuation = request.args[:2]
            continuations.setdefault(context, {})[continuation] = None
        contexts = [*continuations]
        choice_lists = [[*texts] for texts in continuations.values()]
        rows = self.model.score(contexts, choice_lists)
        scores = {
            (context, continuation): score
            for context, texts, row in zip(contexts, choice_lists, rows, strict=True)
            for continuation, score in zip(texts, row, strict=True)
        }
        answers = [scores[request.args[0], request.args[1]] for request in requests]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Always raises: an encoder-decoder has no probability of a text without a context.

        Raises:
          InputError: always.
        """
        raise InputError(
            "pemoe is an encoder-decoder, which has no log-likelihood of a text without a context"
            " (loglikelihood_rolling): choose tasks with output_type loglikelihood, multiple_choice"
            " or generate_until"
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the greedy answer to each context, cut before the first of its `until` texts.

        Raises:
          InputError: the task asks for sampling or beams.
        """
        # Grouped by the number of tokens to generate: `generate` compiles a program for each.
        indices_by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[1]
            for name, values in _GREEDY.items():
                if settings.get(name) not in values:
                    raise InputError(
                        f"generation_kwargs {name} must be {values[0]} (pemoe decodes greedily),"
                        f" got {settings[name]!r}"
                    )
            length = settings.get("max_gen_toks", self.max_gen_toks)
            indices_by_length.setdefault(int(length), []).append(index)
        answers = [""] * len(requests)
        for length, indices in indices_by_length.items():
            contexts = [requests[index].args[0] for index in indices]
            for index, text in zip(indices, self.model.generate(contexts, length), strict=True):
                answers[index] = _cut_before(text, requests[index].args[1].get("until") or ())
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers


def _cut_before(text: str, until: str | Sequence[str]) -> str:
    """Returns the part of a text before the first occurrence of any of the texts `until`."""
    for end in [until] if isinstance(until, str) else until:
        if end:
            text = text.split(end)[0]
    return text
