"""The Python API: `load_model`, the `Model` that it returns, and `finetune`."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from pemoe_jax.core.errors import InputError, check_integer, first_line, plural
from pemoe_jax.runtime import compile_cache

if TYPE_CHECKING:
    import numpy as np

    from pemoe_jax.checkpoints.models import OpenedModel
    from pemoe_jax.core.network import Transformer
    from pemoe_jax.core.params import PyTree
    from pemoe_jax.data.choices import ChoiceGroup
    from pemoe_jax.tasks.tokenizer import Tokenizer

StrPath = str | os.PathLike[str]
_Texts = TypeVar("_Texts", str, list[str])  # a text gives a result, a list a list of results

SPIECE_FILE = "spiece.model"  # T5's and mT5's vocabulary in folders of Hugging Face


class ScoredChoice(NamedTuple):
    """An answer choice and its log-probability, in nats, summed over its tokens."""

    choice: str
    log_prob: float


# --- loading ---


def load_model(
    path: StrPath,
    adapter: StrPath | None = None,
    vocabulary: Any = None,
    *,
    dtype: str | None = None,
    frozen_dtype: str | None = None,
    max_input_tokens: int = 1024,
    max_target_tokens: int = 256,
    batch_size: int = 32,
) -> Model:
    """Loads a model onto JAX's default device.

    Compiled programs are cached on disk, as by the commands, unless JAX already has a cache folder.

    Args:
      path: a base model, in the format of T5X, Hugging Face or this package; or a run, a run's
        checkpoint or an adapter, whose base is loaded with it.
      adapter: a run, a run's checkpoint, an exported adapter or a PEFT adapter, trained on the base
        `path`; None: `path` alone.
      vocabulary: the base's SentencePiece file, 'bytes' for ByT5, or a tokenizer of transformers.
        None: the `spiece.model` in a folder of the base, or else the VOCAB_PATH of the run, or else
        the environment's PEMOE_VOCAB_PATH.
      dtype: dtype of activations, 'float32' or 'bfloat16'; None: as in training.
      frozen_dtype: dtype of frozen matrices, 'activations', 'int8' or 'float8_e4m3fn'; None: as in
        training.
      max_input_tokens: longer texts are truncated.
      max_target_tokens: longer answer choices are truncated.
      batch_size: largest number of texts that are computed together.

    Raises:
      InputError: a path is not a model, the adapter belongs to another base, or the vocabulary is
        missing or differs from that of training.
    """
    compile_cache.enable_in_process()
    from pemoe_jax.checkpoints import models

    for name, value in (
        ("max_input_tokens", max_input_tokens),
        ("max_target_tokens", max_target_tokens),
        ("batch_size", batch_size),
    ):
        check_integer(name, value)
    base_path = None if adapter is None else os.fspath(path)
    opened = models.open_models(
        os.fspath(path if adapter is None else adapter),
        base_path=base_path,
        dtype=dtype,
        frozen_dtype=frozen_dtype,
    )[0]
    tokenizer = _open_vocabulary(vocabulary, opened)
    limits = _Limits(max_input_tokens, max_target_tokens, batch_size)
    return Model(opened, tokenizer, limits)


def _open_vocabulary(vocabulary: Any, opened: OpenedModel) -> Tokenizer:
    """Returns the tokenizer that `vocabulary` names; if it is None, that of the base or the run."""
    from pemoe_jax.checkpoints import run_settings
    from pemoe_jax.runtime import file_io
    from pemoe_jax.tasks import tokenizer

    if vocabulary is not None:
        return tokenizer.open_tokenizer(vocabulary)
    recorded = run_settings.read_settings(opened.path).get("VOCAB_PATH", "None")
    if recorded == repr(tokenizer.BYTES):
        return tokenizer.ByteTokenizer()
    files = [_spiece_file(path) for path in (opened.path, opened.base_path)]
    if recorded[:1] in ("'", '"'):  # a path, not a gin reference to the default
        files.append(ast.literal_eval(recorded))
    files.append(os.environ.get("PEMOE_VOCAB_PATH"))
    for file in filter(None, files):
        if "://" not in file and file_io.to_path(file).expanduser().is_file():
            return tokenizer.open_tokenizer(file)
    raise InputError(
        "vocabulary must be the SentencePiece file of the base model, 'bytes' or a tokenizer of"
        f" transformers, got None, and {opened.base_path or opened.path} has no {SPIECE_FILE}"
    )


def _spiece_file(path: str | None) -> str | None:
    """Returns the vocabulary's file in a folder of Hugging Face, or None."""
    file = os.path.join(path or "", SPIECE_FILE)
    return file if path is not None and os.path.isfile(file) else None


class _Limits(NamedTuple):
    input_tokens: int
    target_tokens: int
    batch_size: int


class _Selected(NamedTuple):
    """Adapters of one network, stacked [A, …], and the index of each text's adapter [N]."""

    network: Transformer
    params: PyTree
    ids: np.ndarray


def _fill(indices: list[int], rows: int) -> list[int]:
    """Pads the indices to the number of rows of a batch by repeating the last one."""
    return indices + [indices[-1]] * (rows - len(indices))


# --- the model ---


class Model:
    """A base model with an adapter, or without one; see `load_model`.

    Methods return one result for one text, and a list of results for a list of texts.
    Batches are padded to few lengths, so that calls share compiled programs. Results do not depend
    on the other texts of a call, up to rounding, unless the model has experts of limited capacity.

    Attributes:
      path: path of the base model; None for one of random weights.
      adapter: path of the adapter; None without an adapter.
      tokenizer: the vocabulary; its `encode` and `decode` omit the end token.
    """

    def __init__(self, opened: OpenedModel, tokenizer: Tokenizer, limits: _Limits) -> None:
        from pemoe_jax.analysis import generation
        from pemoe_jax.checkpoints import models
        from pemoe_jax.core import params as params_lib

        generation.check_decodes_texts(opened, tokenizer)
        self.tokenizer = tokenizer
        self._limits = limits
        self._network = _make_network(opened)
        # Parameters and identity of the base, for `set_adapter`. The parameters are None if the run
        # trained some of them: the original base is then not in memory.
        self._base: dict[str, PyTree] | None
        self._identity: Mapping[str, Any] | None = None
        record = opened.record
        if record is None:
            self._params, self._identity = models.load_base(
                opened.model, opened.path, 0, frozen_dtype=opened.frozen_dtype
            )
            self._base = self._params
        elif opened.needs_base:
            self._params, self._identity = opened.load_with_identity()
            is_adapter = all(map(params_lib.is_adapter, opened.trained_arrays))
            self._base = params_lib.select(self._params, params_lib.is_base) if is_adapter else None
        else:
            self._params = opened.load()
            self._base = None if record.adapters else self._params
        # Path -> network and adapter parameters, for each adapter that `adapter=` has named.
        self._loaded: dict[str, tuple[Transformer, PyTree]] = {}
        is_base = self._base is self._params
        self.path = opened.path if is_base else opened.base_path
        self.adapter = None if is_base else opened.path

    def set_adapter(self, adapter: StrPath | None) -> None:
        """Replaces the adapter; the base stays in memory.

        Adapters of the same method and settings share compiled programs.

        Args:
          adapter: see `load_model`; None: the base alone.

        Raises:
          InputError: the adapter belongs to another base, or a run trained parameters of this
            base. The model is then unchanged.
        """
        self._network, self._params = self._load_adapter(adapter)
        self.adapter = None if adapter is None else os.fspath(adapter)

    def _load_adapter(self, adapter: StrPath | None) -> tuple[Transformer, dict[str, PyTree]]:
        """Returns the network of an adapter on the base, and all parameters."""
        from pemoe_jax.analysis import generation
        from pemoe_jax.checkpoints import models
        from pemoe_jax.core import params as params_lib

        if self._base is None:
            raise InputError(
                f"{self.adapter} trained parameters of its base: load the base to set adapters on"
                " it"
            )
        if adapter is None:
            return self._network.clone(adapters=type(self._network.adapters)()), self._base
        opened = models.open_models(
            os.fspath(adapter), base_path=self.path, dtype=self._network.config.dtype
        )[0]
        if opened.record is None or not all(map(params_lib.is_adapter, opened.trained_arrays)):
            raise InputError(
                f"{adapter} must be an adapter, got a model that has a base of its own"
            )
        trained = opened.load_trained()
        generation.check_decodes_texts(opened, self.tokenizer)
        params = opened.join_base(trained, self._base, self._base_identity())
        return _make_network(opened), params

    def _select_adapters(self, paths: Sequence[StrPath] | None, count: int) -> _Selected | None:
        """Returns the adapters of the texts of a call; None for the model's adapter."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from pemoe_jax.core import params as params_lib

        if paths is None:
            return None
        is_list = isinstance(paths, Sequence) and not isinstance(paths, str)
        if not is_list or not all(isinstance(path, (str, os.PathLike)) for path in paths):
            raise InputError(f"adapter must be a list of paths, got {paths!r:.80}")
        if len(paths) != count or not paths:
            raise InputError(
                f"adapter must be a list of {plural(count, 'path')}, one for each text, got"
                f" {len(paths)}"
            )
        names = [os.fspath(path) for path in paths]
        distinct = list(dict.fromkeys(names))
        for name in distinct:
            if name not in self._loaded:
                network, params = self._load_adapter(name)
                self._loaded[name] = network, params_lib.select(params, params_lib.is_adapter)
        networks, trees = zip(*(self._loaded[name] for name in distinct), strict=True)
        for name, network in zip(distinct, networks, strict=True):
            if network != networks[0]:
                raise InputError(
                    f"adapter must be adapters of one method and settings, got {distinct[0]} and"
                    f" {name}, which differ"
                )
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
        return _Selected(networks[0], stacked, np.array([distinct.index(name) for name in names]))

    def _apply(
        self,
        function: Callable[..., PyTree],
        selected: _Selected | None,
        indices: list[int],
        rows: Mapping[str, PyTree],
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> PyTree:
        """Calls a function of a batch with the model's parameters, or with selected adapters.

        See `adapter_rows.map_adapters` for the function and its arguments.
        """
        if selected is None:
            return function(self._network, self._params, **rows, **settings, **options)
        import jax

        from pemoe_jax.core import adapter_rows

        num_rows = len(jax.tree.leaves(rows)[0])
        assert self._base is not None  # or no adapter could be selected
        ids = jax.numpy.asarray(selected.ids[_fill(indices, num_rows)])
        apply = adapter_rows.map_adapters(function, selected.network, **settings)
        return apply(self._base, selected.params, ids, rows, options)

    def _base_identity(self) -> Mapping[str, Any]:
        from pemoe_jax.checkpoints import base_model

        if self._identity is None:  # a run that trained the whole model
            assert self.path is not None
            dtype = self._network.config.dtype
            self._identity = base_model.open_base(self.path).identity(dtype)
        return self._identity

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
        and log-probabilities are not normalized by length.

        Args:
          texts: a text, or a list of texts.
          choices: the choices of the text; for a list of texts, one list of choices for all, or a
            list for each.
          adapter: for a list of texts, an adapter for each in place of the model's; all must have
            the same method and settings.

        Raises:
          InputError: a text has no choices, or a score is not finite; see also `set_adapter`.
        """
        is_single = isinstance(texts, str)
        texts = _check_texts("texts", [texts] if is_single else texts)
        lists = [_check_choices(choices)] if is_single else _choices_by_text(choices, len(texts))
        scores = self._score(_score_choices(), texts, lists, adapter)
        in_order = [
            sorted(map(ScoredChoice, row, log_probs), key=lambda choice: -choice.log_prob)
            for row, (log_probs,) in zip(lists, scores, strict=True)
        ]
        return in_order[0] if is_single else in_order

    def score(
        self, texts: Sequence[str], choices: Sequence[str] | Sequence[Sequence[str]]
    ) -> list[list[tuple[float, bool]]]:
        """Returns the log-probability of each choice, and whether greedy decoding generates it.

        Args:
          texts: a list of texts.
          choices: see `rank`.

        Returns:
          For each text, a pair for each of its choices, in order: the log-probability of `rank`,
          and whether every token of the choice, its end included, is the most likely one.

        Raises:
          InputError: see `rank`.
        """
        texts = _check_texts("texts", texts)
        lists = _choices_by_text(choices, len(texts))
        scores = self._score(_score_and_match_choices(), texts, lists)
        return [[*zip(*arrays, strict=True)] for arrays in scores]

    def _score(
        self,
        function: Callable[..., PyTree],
        texts: Sequence[str],
        lists: Sequence[Sequence[str]],
        adapter: Sequence[StrPath] | None = None,
    ) -> list[list[list[Any]]]:
        """Calls a function on batches of texts; it returns arrays [B, C], the first one of scores.

        Returns:
          For each text, a list for each array: the values of the text's choices.
        """
        import jax
        import numpy as np

        from pemoe_jax.analysis.evaluation import NOT_FINITE_ADVICE
        from pemoe_jax.data import inference_batches, prefetch

        groups = self._make_groups(texts, lists)
        selected = self._select_adapters(adapter, len(texts))
        results = (
            (self._apply(function, selected, indices, {"batch": batch}, {}, {}), indices)
            for batch, indices in inference_batches.bucketed_score_batches(
                groups, self._limits.batch_size
            )
        )
        by_text: dict[int, list[list[Any]]] = {}
        for arrays, indices in prefetch.keep_in_flight(results):
            host_arrays = [np.asarray(array) for array in jax.tree.leaves(arrays)]  # [B, C]
            for row, index in enumerate(indices):
                count = len(lists[index])
                scores, *others = (array[row, :count].tolist() for array in host_arrays)
                if not np.isfinite(scores).all():
                    raise InputError(
                        f"{self}: expected finite scores, got {scores} for text {index + 1}:"
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
        """Decodes the answer to each text: greedily, or by sampling or beam search if set.

        The options are those of Hugging Face's `generate`, without its default `top_k` of 50.

        Args:
          texts: a text, or a list of texts.
          max_new_tokens: largest number of tokens to decode; each value compiles a program.
          do_sample: whether to sample tokens.
          temperature: divides the logits.
          top_k: number of most likely tokens to draw from; None: all.
          top_p: of these, the most likely whose probabilities sum to at least `top_p`.
          seed: seed of the draws.
          num_beams: number of beams of a beam search; 1: none.
          length_penalty: exponent of the length, which divides the log-probability of an answer;
            above 0, longer answers score higher.
          early_stopping: whether to stop as soon as there are `num_beams` finished answers.
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
        all_texts = _check_texts("texts", [texts] if is_single else texts)
        inputs = self._encode("texts", all_texts, self._limits.input_tokens)
        selected = self._select_adapters(adapter, len(inputs))
        function: Callable[..., PyTree] = decoding.greedy_decode
        settings: dict[str, Any] = {"max_decode_length": max_new_tokens}
        options: dict[str, Any] = {"eos_id": self.tokenizer.eos_id}
        if do_sample:
            function = sampling.sample_decode
            settings |= {"truncate": top_k is not None or top_p < 1.0}
            options |= {"seed": seed, "temperature": temperature, "top_p": top_p}
            options["top_k"] = top_k or self._network.config.vocab_size
        elif num_beams > 1:
            function = beam_search.beam_search_decode
            settings |= {"num_beams": num_beams}
            options |= {"length_penalty": length_penalty, "early_stopping": early_stopping}

        def decode(tokens: np.ndarray, indices: list[int]) -> PyTree:
            rows = {"encoder_input_tokens": tokens}
            if do_sample:
                rows["rows"] = np.array(_fill(indices, len(tokens)), np.int32)
            return self._apply(function, selected, indices, rows, settings, options)

        batches = inference_batches.bucketed_input_batches(inputs, self._limits.batch_size)
        results = ((decode(tokens, indices), indices) for tokens, indices in batches)
        answers: dict[int, str] = {}
        for tokens, indices in prefetch.keep_in_flight(results):
            for row, index in zip(np.asarray(tokens), indices, strict=False):  # [B, T]
                if (row == decoding.NOT_FINITE).any():
                    raise InputError(
                        f"{self}: expected finite logits, got infinite or NaN ones for text"
                        f" {index + 1}: {NOT_FINITE_ADVICE}"
                    )
                answers[index] = self.tokenizer.decode(row.tolist())
        in_order: Any = [answers[index] for index in range(len(inputs))]
        return in_order[0] if is_single else in_order

    # --- routing ---

    def routing(
        self, texts: str | Sequence[str], targets: str | Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the mean router probabilities of each text by site, over its tokens.

        Args:
          texts: a text, or a list of texts.
          targets: the decoder's text for each of the texts; None: only the sites that read the
            encoder's tokens are returned.

        Returns:
          site -> [E], or [N, E] for a list of N texts. A site is a path such as
          'encoder/layers_3/mlp/gate'; the distributions are computed as by `pemoe routes`.

        Raises:
          InputError: the model has no routers.
        """
        import numpy as np

        from pemoe_jax.analysis.routing import measure, metrics, probe
        from pemoe_jax.data import inference_batches

        if isinstance(texts, str):
            single = self.routing([texts], None if targets is None else [targets])  # type: ignore
            return {site: probs[0] for site, probs in single.items()}
        if not (experts := probe.expert_counts(self._network)):
            raise InputError(f"{self}: expected a method with routers, got none")
        texts = _check_texts("texts", texts)
        if targets is not None:
            targets = _check_texts("targets", targets)
            if len(targets) != len(texts):
                raise InputError(
                    f"targets must be as many as texts, {len(texts)}, got {len(targets)}"
                )
        sites = [s for s in experts if targets is not None or probe.token_stack(s) == "encoder"]
        groups = self._make_groups(texts, [[target] for target in targets or [""] * len(texts)])
        results = {site: np.zeros((len(texts), experts[site])) for site in sites}
        batches = inference_batches.bucketed_score_batches(groups, self._limits.batch_size)
        for batch, indices in batches:
            rows = len(batch["encoder_input_tokens"])
            # The probe sums by task; here each row is a task.
            flat = {
                name: array[:, 0] if array.ndim == 3 else array for name, array in batch.items()
            }
            totals = _probe(self._network)(
                self._params, flat, np.arange(rows), probe.init_totals(self._network, rows)
            )
            measure.check_finite(totals, [f"text {index + 1}" for index in _fill(indices, rows)])
            for site in sites:
                means = metrics.mean_distributions(totals, site)
                results[site][indices] = means[: len(indices)]
        return results

    # --- texts ---

    def _encode(self, name: str, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """Returns the int32 ids of each text, with EOS; warns about truncated texts."""
        import numpy as np

        from pemoe_jax.data import choices

        eos_id = self.tokenizer.eos_id
        encoded = []
        num_truncated = 0
        for text in texts:
            ids = np.array([*self.tokenizer.encode(text), eos_id], np.int32)
            ids, is_truncated = choices.truncate(ids, limit, eos_id)
            encoded.append(ids)
            num_truncated += is_truncated
        if num_truncated:
            level = 1  # the caller of the public method
            while sys._getframe(level).f_code.co_filename == __file__:
                level += 1
            warnings.warn(
                f"{num_truncated:,} of {plural(len(texts), name[:-1])} truncated to {limit:,}"
                " tokens",
                stacklevel=level + 1,
            )
        return encoded

    def _make_groups(
        self, texts: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[ChoiceGroup]:
        from pemoe_jax.data.choices import ChoiceGroup

        inputs = self._encode("texts", texts, self._limits.input_tokens)
        distinct = list(dict.fromkeys(choice for row in choices for choice in row))
        encoded = self._encode("choices", distinct, self._limits.target_tokens)
        ids = dict(zip(distinct, encoded, strict=True))
        return [
            ChoiceGroup(
                task="",
                idx=index,
                inputs=inputs[index],
                choices=tuple(ids[choice] for choice in row),
                is_correct=(),
                input_text=text,
                choice_texts=tuple(row),
                input_truncated=False,
                target_truncated=False,
            )
            for index, (text, row) in enumerate(zip(texts, choices, strict=True))
        ]

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else f" with adapter {self.adapter}"
        return f"{self.path or 'random base'}{adapter}"


def _make_network(opened: OpenedModel) -> Transformer:
    """Returns the network of an opened model; networks of equal settings compare equal."""
    from pemoe_jax.checkpoints import models

    # A program is compiled for each configuration. Dropout, which runs may set differently, is
    # unused here.
    config = dataclasses.replace(opened.model.config, dropout_rate=0.0)
    if opened.record is None:
        return opened.model.clone(config=config)
    return models.build_model(dataclasses.replace(opened.record, config=config.as_dict()))


@functools.cache
def _score_choices() -> Any:
    """Returns `steps.score_choices`, jitted once for all models."""
    import jax

    from pemoe_jax.core import steps

    return jax.jit(steps.score_choices, static_argnames="model")


@functools.cache
def _score_and_match_choices() -> Any:
    import jax

    from pemoe_jax.core import steps

    return jax.jit(steps.score_and_match_choices, static_argnames="model")


@functools.lru_cache(maxsize=16)
def _probe(model: Transformer) -> Any:
    from pemoe_jax.analysis.routing import probe

    return probe.make_probe(model)


def _check_texts(name: str, texts: object) -> list[str]:
    """Returns the texts; InputError unless they are a list of texts, all of them UTF-8."""
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a text or a list of texts, got {texts!r:.80}")
    try:
        for text in texts:
            text.encode()
    except UnicodeError:
        raise InputError(f"{name} must be Unicode, got {text!r:.80}") from None
    return list(texts)


def _check_choices(choices: object) -> list[str]:
    if isinstance(choices, str) or not choices:
        raise InputError(
            f"choices of a text must be a list of at least one text, got {choices!r:.80}"
        )
    return _check_texts("choices", choices)


def _choices_by_text(choices: object, count: int) -> list[list[str]]:
    """Returns the choices of each of `count` texts, from one list for all or a list of lists."""
    if not isinstance(choices, Sequence) or all(isinstance(choice, str) for choice in choices):
        return [_check_choices(choices)] * count
    if len(choices) != count:
        raise InputError(f"choices must have a list for each of {count} texts, got {len(choices)}")
    return [_check_choices(row) for row in choices]


def _check_sampling(
    do_sample: bool, temperature: float, top_k: int | None, top_p: float, num_beams: int
) -> None:
    if do_sample and num_beams > 1:
        raise InputError(f"num_beams must be 1 with do_sample, got {num_beams}")
    if not temperature > 0:
        raise InputError(f"temperature must be greater than 0, got {temperature!r}")
    if top_k is not None:
        check_integer("top_k", top_k)
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p!r}")


# --- training ---


def finetune(
    base: StrPath | None,
    method: str,
    train: StrPath | Sequence[Mapping[str, Any]],
    model_dir: StrPath,
    *,
    validation: Sequence[Mapping[str, Any]] | None = None,
    vocabulary: StrPath | None = None,
    size: str = "t5_1_1",
    routing: str | Sequence[str] = (),
    gin_files: Sequence[StrPath] = (),
    allow_changes: bool = False,
    **options: Any,
) -> str:
    """Fine-tunes a base as `pemoe train` does, with its gin files, checks and messages.

    The same call again resumes from the newest checkpoint. It imports TensorFlow, and configures
    gin for the whole process.

    Args:
      base: the base model, or a run to continue from (INITIAL_CHECKPOINT_PATH); None: random
        weights of `size`.
      method: a file of methods/: 'mov', 'molora', 'ia3', 'lora', 'full', ….
      train: a folder of JSON lines (JSONL_DIR); or rows with 'inputs', 'targets' and optionally
        'answer_choices', which are written to `model_dir`/data.
      model_dir: folder of the run (MODEL_DIR).
      validation: rows of the evaluation loss (EVAL_PERIOD), if `train` is a list of rows.
      vocabulary: the base's SentencePiece file or 'bytes' (VOCAB_PATH); None: the `spiece.model` in
        the folder of the base, or else the command's default.
      size: a file of models/.
      routing: a file of routing/, or several: 'top_2', ….
      gin_files: further gin files.
      allow_changes: whether a run may resume with different data, seed or batches.
      options: the macros that `pemoe train --help` lists, in lower case: train_steps, batch_size,
        num_experts, …. A string that begins with '@' or '%' is a gin reference.

    Returns:
      The folder of the run, for `load_model`.

    Raises:
      InputError: a setting or a file is wrong, before any checkpoint is written.
    """
    compile_cache.enable_in_process()
    from pemoe_jax import train as train_lib
    from pemoe_jax.runtime import folder_lock, gin_flags, run_file

    gin_flags.silence_libraries()
    run_folder = os.fspath(model_dir)
    data_folder = train if isinstance(train, (str, os.PathLike)) else f"{run_folder}/data"
    if validation is not None and data_folder is train:
        raise InputError("validation must be None if train is a folder, which has its own splits")
    if vocabulary is None and base is not None:
        vocabulary = _spiece_file(os.fspath(base))
    macros = {
        "MODEL_DIR": run_folder,
        "INITIAL_CHECKPOINT_PATH": base,
        "JSONL_DIR": data_folder,
        **({} if vocabulary is None else {"VOCAB_PATH": vocabulary}),
        **{name.upper(): value for name, value in options.items()},
    }
    files = [f"models/{size}.gin", f"methods/{method}.gin"]
    files += [
        f"routing/{name}.gin" for name in ([routing] if isinstance(routing, str) else routing)
    ]
    files += [os.fspath(file) for file in gin_files]
    args = train_lib.FLAGS.parse_args([f"--gin_file={f}" for f in (*files, "runs/finetune.gin")])
    try:
        gin_flags.load_config(args, [f"{name} = {_gin_text(v)}" for name, v in macros.items()])
        if not isinstance(train, (str, os.PathLike)):
            _write_rows(data_folder, {"train": train, "validation": validation})
        gin_flags.call_configured(train_lib.train, allow_changes=allow_changes)
        run_file.finish("finished", "the work is done")
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if is_interrupt else f"{type(error).__name__}: {first_line(error)}"
        run_file.finish("stopped" if is_interrupt else "failed", reason)
        raise
    finally:
        folder_lock.release_all()
    return run_folder


def _gin_text(value: object) -> str:
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    return value if isinstance(value, str) and value[:1] in ("@", "%") else repr(value)


def _write_rows(folder: StrPath, splits: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> None:
    """Writes rows as the only task of a folder of JSON lines, unless they are there already."""
    from pemoe_jax.runtime import atomic_write, file_io

    for split, rows in splits.items():
        path = file_io.resolve_local(folder, "MODEL_DIR") / "rows" / f"{split}.jsonl"
        if rows is None:
            path.unlink(missing_ok=True)
            continue
        try:
            text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{split} must be a folder of JSON lines or rows, got {rows!r:.80}: {error}"
            ) from None
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write.write_text(path, text)
