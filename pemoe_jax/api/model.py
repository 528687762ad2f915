"""The model of the Python API: scores, decodes and shows the routing of texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from pemoe_jax.api.loaded_model import LoadedModel, StrPath, fill_rows
from pemoe_jax.api.texts import (
    Limits,
    check_choices,
    check_texts,
    choices_by_text,
    encode,
    make_groups,
)
from pemoe_jax.core.errors import InputError, check_integer, plural

if TYPE_CHECKING:
    import numpy as np

    from pemoe_jax.core.network import Transformer
    from pemoe_jax.core.params import PyTree
    from pemoe_jax.tasks.tokenizer import Tokenizer

# `generate` returns a text for a text, and a list of texts for a list of texts.
_Texts = TypeVar("_Texts", str, list[str])


class ScoredChoice(NamedTuple):
    """An answer choice, and its log-probability in nats, summed over its tokens and end token."""

    choice: str
    log_prob: float


class Model:
    """A base model with an adapter, or without one; see `load_model`.

    `rank` and `generate` return one result for one text, and a list of results for a list of texts.
    Batches are padded to few lengths, so that calls share compiled programs. Results do not depend
    on the other texts of a call, up to rounding, unless the model has experts of limited capacity.

    Attributes:
      path: path of the base model, or of a run that trained the whole model; None for a base of
        random weights.
      adapter: path of the adapter, or of a run that trained a part of the base; None if `path` is
        the whole model.
      tokenizer: the vocabulary; its `encode` and `decode` omit the end token.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: Tokenizer, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self._limits = limits
        self._loaded = loaded

    @property
    def path(self) -> str | None:
        return self._loaded.path

    @property
    def adapter(self) -> str | None:
        return self._loaded.adapter

    def __repr__(self) -> str:
        return repr(self._loaded)

    def set_adapter(self, adapter: StrPath | None) -> None:
        """Replaces the adapter. The base stays in memory.

        Adapters of the same method and settings share compiled programs.

        Args:
          adapter: see `load_model`; None: the base alone.

        Raises:
          InputError: the adapter is of another base or vocabulary; it is a run that trained base
            parameters; or this model was loaded from such a run, so that the original base is not
            in memory. The model is then unchanged.
        """
        self._loaded.set_adapter(adapter)

    # --- scoring ---

    @overload
    def rank(  # type: ignore[overload-overlap]  # a text is also a sequence of texts
        self, texts: str, choices: Sequence[str]
    ) -> list[ScoredChoice]: ...
    @overload
    def rank(
        self,
        texts: Sequence[str],
        choices: Sequence[str] | Sequence[Sequence[str]],
        adapter: Sequence[StrPath] | None = None,
    ) -> list[list[ScoredChoice]]: ...
    def rank(self, texts: Any, choices: Any, adapter: Any = None) -> Any:
        """Returns the answer choices of each text with their log-probabilities, best first.

        The scores are those of `pemoe evaluate`: each text is encoded once for all of its choices,
        and a log-probability is summed over a choice's tokens and the end token, without
        normalizing it by length.

        Args:
          texts: a text, or a list of texts.
          choices: the choices of the text; for a list of texts, one list of choices for all, or a
            list for each.
          adapter: for a list of texts, a list with the adapter of each text, in place of the
            model's; all must have the same method and settings.

        Raises:
          InputError: a text has no choices, or a score is not finite; see also `set_adapter`.
        """
        is_single = isinstance(texts, str)
        texts = check_texts("texts", [texts] if is_single else texts)
        choice_lists = (
            [check_choices(choices)] if is_single else choices_by_text(choices, len(texts))
        )
        scores = self._score(_score_choices(), texts, choice_lists, adapter)
        ranked = [
            sorted(map(ScoredChoice, row, log_probs), key=lambda choice: -choice.log_prob)
            for row, (log_probs,) in zip(choice_lists, scores, strict=True)
        ]
        return ranked[0] if is_single else ranked

    def score(
        self, texts: Sequence[str], choices: Sequence[str] | Sequence[Sequence[str]]
    ) -> list[list[tuple[float, bool]]]:
        """Returns each choice's log-probability, and whether greedy decoding would generate it.

        Args:
          texts: a list of texts.
          choices: see `rank`.

        Returns:
          For each text, a pair for each of its choices, in the given order: the log-probability
          of `rank`, and whether each token of the choice and its end token is the most likely one.

        Raises:
          InputError: see `rank`.
        """
        texts = check_texts("texts", texts)
        choice_lists = choices_by_text(choices, len(texts))
        scores = self._score(_score_and_match_choices(), texts, choice_lists)
        return [[*zip(*arrays, strict=True)] for arrays in scores]

    def _score(
        self,
        function: Callable[..., PyTree],
        texts: Sequence[str],
        choice_lists: Sequence[Sequence[str]],
        adapter: Sequence[StrPath] | None = None,
    ) -> list[list[list[Any]]]:
        """Scores the choices of all texts, batch by batch.

        Args:
          function: a function of (model, params, batch) that returns one or several arrays [B, C];
            the first array has the scores.
          texts: the texts.
          choice_lists: the choices of each text.
          adapter: see `rank`.

        Returns:
          For each text, one list for each array that the function returns, with the array's values
          for the text's choices.
        """
        import jax
        import numpy as np

        from pemoe_jax.analysis.evaluation import NOT_FINITE_ADVICE
        from pemoe_jax.data import inference_batches, prefetch

        groups = make_groups(self.tokenizer, texts, choice_lists, self._limits)
        selected = self._loaded.select_adapters(adapter, len(texts))

        def score(batch: Mapping[str, np.ndarray], indices: list[int]) -> PyTree:
            rows = {"batch": batch}
            return self._loaded.apply(function, selected, indices, rows, settings={}, options={})

        batches = inference_batches.bucketed_score_batches(groups, self._limits.batch_size)
        results = ((score(batch, indices), indices) for batch, indices in batches)
        # The device computes the next batches while the results of a batch are read.
        by_text: dict[int, list[list[Any]]] = {}
        for arrays, indices in prefetch.keep_in_flight(results):
            host_arrays = [np.asarray(array) for array in jax.tree.leaves(arrays)]  # [B, C]
            for row, index in enumerate(indices):
                count = len(choice_lists[index])  # further choices of the row are padding
                scores, *others = (array[row, :count].tolist() for array in host_arrays)
                if not np.isfinite(scores).all():
                    raise InputError(
                        f"{self}: expected finite scores, got {scores} for texts[{index}]:"
                        f" {NOT_FINITE_ADVICE}"
                    )
                by_text[index] = [scores, *others]
        return [by_text[index] for index in range(len(texts))]

    # --- decoding ---

    def generate(
        self,
        texts: _Texts,
        max_new_tokens: int = 32,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        adapter: Sequence[StrPath] | None = None,
    ) -> _Texts:
        """Decodes the answer to each text.

        Decoding is greedy, samples with `do_sample`, or is a beam search if `num_beams` is above 1.
        The options are those of Hugging Face's `generate`, without its default `top_k` of 50.

        Args:
          texts: a text, or a list of texts.
          max_new_tokens: largest number of tokens to decode; each value compiles a program.
          do_sample: whether to sample tokens.
          temperature: divides the logits before sampling.
          top_k: number of most likely tokens to draw from; None: all.
          top_p: draw only from the smallest set of most likely tokens (after `top_k`) whose
            probabilities sum to at least `top_p`; 1: all.
          seed: seed of the samples.
          num_beams: number of beams of a beam search; 1: no beam search.
          length_penalty: α; a beam search scores an answer by its log-probability / length ** α.
            Positive values favor longer answers.
          early_stopping: whether a beam search stops as soon as it has `num_beams` finished
            answers.
          adapter: see `rank`.

        Raises:
          InputError: an option is out of its range, or the model's logits are not finite; see also
            `set_adapter`.
        """
        import numpy as np

        from pemoe_jax.analysis.evaluation import NOT_FINITE_ADVICE
        from pemoe_jax.core import beam_search, decoding, sampling
        from pemoe_jax.data import inference_batches, prefetch

        for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            check_integer(name, value)
        _check_sampling(do_sample, temperature, top_k, top_p, num_beams)
        is_single = isinstance(texts, str)
        all_texts = check_texts("texts", [texts] if is_single else texts)
        inputs = encode(self.tokenizer, "texts", all_texts, self._limits.input_tokens)
        selected = self._loaded.select_adapters(adapter, len(inputs))
        function: Callable[..., PyTree] = decoding.greedy_decode
        # Each combination of values of `settings` compiles a program; `options` are its arguments.
        settings: dict[str, Any] = {"max_decode_length": max_new_tokens}
        options: dict[str, Any] = {"eos_id": self.tokenizer.eos_id}
        if do_sample:
            function = sampling.sample_decode
            # With neither top_k nor top_p, a faster program is used that does not sort the
            # vocabulary.
            settings |= {"truncate": top_k is not None or top_p < 1.0}
            options |= {"seed": seed, "temperature": temperature, "top_p": top_p}
            options["top_k"] = top_k or self._loaded.network.config.vocab_size
        elif num_beams > 1:
            function = beam_search.beam_search_decode
            settings |= {"num_beams": num_beams}
            options |= {"length_penalty": length_penalty, "early_stopping": early_stopping}

        def decode(tokens: np.ndarray, indices: list[int]) -> PyTree:
            rows = {"encoder_input_tokens": tokens}
            if do_sample:
                # The PRNG key is derived from the text's index, so samples do not depend on the
                # batching.
                rows["row_ids"] = np.array(fill_rows(indices, len(tokens)), np.int32)
            return self._loaded.apply(function, selected, indices, rows, settings, options)

        batches = inference_batches.bucketed_input_batches(inputs, self._limits.batch_size)
        results = ((decode(tokens, indices), indices) for tokens, indices in batches)
        answers: dict[int, str] = {}
        for tokens, indices in prefetch.keep_in_flight(results):
            # tokens [B, T]; further rows than `indices` only fill the batch.
            for row, index in zip(np.asarray(tokens), indices, strict=False):
                if (row == decoding.NOT_FINITE).any():
                    raise InputError(
                        f"{self}: expected finite logits, got infinite or NaN ones for"
                        f" texts[{index}]: {NOT_FINITE_ADVICE}"
                    )
                answers[index] = self.tokenizer.decode(row.tolist())
        in_order: Any = [answers[index] for index in range(len(inputs))]
        return in_order[0] if is_single else in_order

    # --- routing ---

    def routing(
        self, texts: str | Sequence[str], targets: str | Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns each text's router probabilities at every site, averaged over its tokens.

        Args:
          texts: a text, or a list of texts.
          targets: the text that the decoder reads for each of the texts; None: only the sites that
            read the encoder's tokens are returned.

        Returns:
          site -> [E], or [N, E] for a list of N texts. A site is the path of a router's adapter,
          such as 'encoder/layers_3/mlp/gate'. The averages are computed as by `pemoe routes`.

        Raises:
          InputError: the model has no routers, or a probability is not finite.
        """
        import numpy as np

        from pemoe_jax.analysis.routing import measure, metrics, probe
        from pemoe_jax.data import inference_batches

        if isinstance(texts, str):
            if not isinstance(targets, str | None):
                raise InputError(f"targets of a text must be a text, got {targets!r:.80}")
            single = self.routing([texts], None if targets is None else [targets])
            return {site: probs[0] for site, probs in single.items()}
        network = self._loaded.network
        if not (experts := probe.expert_counts(network)):
            raise InputError(f"{self}: expected a method with routers, got none")
        texts = check_texts("texts", texts)
        if targets is not None:
            targets = check_texts("targets", targets)
            if len(targets) != len(texts):
                raise InputError(
                    f"targets must be a list of {plural(len(texts), 'text')}, one for each of"
                    f" texts, got {len(targets)}"
                )
        sites = [s for s in experts if targets is not None or probe.token_stack(s) == "encoder"]
        # The probe runs both stacks. Without targets the decoder reads an empty text, and its sites
        # are left out of the results.
        choice_lists = [[target] for target in targets or [""] * len(texts)]
        groups = make_groups(self.tokenizer, texts, choice_lists, self._limits)
        results = {site: np.zeros((len(texts), experts[site])) for site in sites}
        batches = inference_batches.bucketed_score_batches(groups, self._limits.batch_size)
        for batch, indices in batches:
            rows = len(batch["encoder_input_tokens"])
            # A single choice per text: [B, 1, Lt] -> [B, Lt].
            flat = {
                name: array[:, 0] if array.ndim == 3 else array for name, array in batch.items()
            }
            # The probe, a jitted function that adds up router probabilities by task, gets the row
            # number as the task, so each row has its own sum.
            totals = _probe(network)(
                self._loaded.params, flat, np.arange(rows), probe.init_totals(network, rows)
            )
            names = [f"texts[{index}]" for index in fill_rows(indices, rows)]
            measure.check_finite(totals, names)
            for site in sites:
                means = metrics.mean_distributions(totals, site)
                results[site][indices] = means[: len(indices)]
        return results


# Cached, because JAX and `adapter_rows.map_adapters` cache compiled programs under the function's
# identity, and a new `jax.jit` would compile again.
@functools.cache
def _score_choices() -> Any:
    """Returns `steps.score_choices`, jitted once for all models."""
    import jax

    from pemoe_jax.core import steps

    return jax.jit(steps.score_choices, static_argnames="model")


@functools.cache
def _score_and_match_choices() -> Any:
    """Returns `steps.score_and_match_choices`, jitted once for all models."""
    import jax

    from pemoe_jax.core import steps

    return jax.jit(steps.score_and_match_choices, static_argnames="model")


@functools.lru_cache(maxsize=16)
def _probe(model: Transformer) -> Any:
    """Returns the probe of a network (see `Model.routing`), which keeps its compiled programs."""
    from pemoe_jax.analysis.routing import probe

    return probe.make_probe(model)


def _check_sampling(
    do_sample: bool, temperature: float, top_k: int | None, top_p: float, num_beams: int
) -> None:
    """Raises InputError if an option of `Model.generate` is out of its range."""
    if do_sample and num_beams > 1:
        raise InputError(f"num_beams must be 1 if do_sample is True, got {num_beams}")
    if not temperature > 0:
        raise InputError(f"temperature must be greater than 0, got {temperature!r}")
    if top_k is not None:
        check_integer("top_k", top_k)
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p!r}")
