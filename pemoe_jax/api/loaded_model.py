"""A model in memory: its base, the adapter that is set on it, and adapters for single texts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pemoe_jax.core.errors import InputError, plural

if TYPE_CHECKING:
    import numpy as np

    from pemoe_jax.checkpoints.models import OpenedModel
    from pemoe_jax.core.network import Transformer
    from pemoe_jax.core.params import PyTree
    from pemoe_jax.tasks.tokenizer import Tokenizer

StrPath = str | os.PathLike[str]

MAX_ADAPTERS = 32  # largest number of adapters that `select_adapters` keeps in memory


class SelectedAdapters(NamedTuple):
    """The adapters for the texts of one call, such as `Model.rank`.

    Attributes:
      network: the network, which is the same for all adapters.
      params: parameters of the A distinct adapters, stacked [A, …].
      ids: index of each text's adapter, [N].
    """

    network: Transformer
    params: PyTree
    ids: np.ndarray


def fill_rows(indices: list[int], num_rows: int) -> list[int]:
    """Pads the indices of a batch's texts to its number of rows, by repeating the last index."""
    return indices + [indices[-1]] * (num_rows - len(indices))


class LoadedModel:
    """The network and the parameters of a model.

    Args:
      opened: the model; the constructor reads its arrays.
      tokenizer: the vocabulary, which must be that of each adapter.

    Attributes:
      path: path of the base, or of a run that trained the whole model; None for a base of random
        weights.
      adapter: path of the adapter, or of a run that trained a part of the base; None if `path` is
        the whole model.
      network: the network with its adapters.
      params: all parameters.
      base: the parameters that an adapter can be set on. They are those of the base, or of a run
        that trained the whole model without adapters. None for any other run that trained base
        parameters, because the original values are then not in memory.
    """

    base: dict[str, PyTree] | None

    def __init__(self, opened: OpenedModel, tokenizer: Tokenizer) -> None:
        from pemoe_jax.analysis import generation
        from pemoe_jax.checkpoints import models
        from pemoe_jax.core import params as params_lib

        generation.check_decodes_texts(opened, tokenizer, "vocabulary")
        self._tokenizer = tokenizer
        # The fingerprint and checksum of `base`, with which the record of each adapter is compared.
        self._identity: Mapping[str, Any] | None = None
        self.network = _make_network(opened)
        if opened.record is None:
            self.params, self._identity = models.load_base(
                opened.model, opened.path, 0, frozen_dtype=opened.frozen_dtype
            )
            self.base = self.params
        elif opened.needs_base:
            self.params, self._identity = opened.load_with_identity()
            is_adapter = all(map(params_lib.is_adapter, opened.trained_arrays))
            self.base = params_lib.select(self.params, params_lib.is_base) if is_adapter else None
        else:
            self.params = opened.load()
            self.base = None if opened.record.adapters else self.params
        # A run that does not need a base is the whole model.
        self.path = opened.base_path if opened.needs_base else opened.path
        self.adapter = opened.path if opened.needs_base else None
        # Path -> (network, adapter parameters) of the adapters that `select_adapters` used last, in
        # the order of their last use. They stay in memory, because calls repeat them.
        self._adapters: dict[str, tuple[Transformer, PyTree]] = {}

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else f" with adapter {self.adapter}"
        return f"{self.path or 'random base'}{adapter}"

    def set_adapter(self, adapter: StrPath | None) -> None:
        """Replaces the adapter; see `Model.set_adapter`."""
        self.network, self.params = self._load_adapter(adapter)
        self.adapter = None if adapter is None else os.fspath(adapter)

    def _load_adapter(self, adapter: StrPath | None) -> tuple[Transformer, dict[str, PyTree]]:
        """Returns (network, all parameters) of the base with an adapter, or of the base alone."""
        from pemoe_jax.analysis import generation
        from pemoe_jax.checkpoints import models
        from pemoe_jax.core import params as params_lib

        if self.base is None:
            raise InputError(
                f"{self.adapter or self.path} trained parameters of its base: load a base model to"
                " set adapters on it"
            )
        if adapter is None:  # a network with an empty collection of adapters
            return self.network.clone(adapters=type(self.network.adapters)()), self.base
        opened = models.open_models(
            os.fspath(adapter), base_path=self.path, dtype=self.network.config.dtype
        )[0]
        if opened.record is None or not all(map(params_lib.is_adapter, opened.trained_arrays)):
            got = "a base" if opened.record is None else "a run that trained parameters of its base"
            raise InputError(f"{adapter} must be an adapter, got {got}")
        # The adapter is checked against the base in memory. If that has random weights, its path is
        # None, and `open_models` took the base that the adapter's record names instead.
        opened.base_path = self.path
        trained = opened.load_trained()
        generation.check_decodes_texts(opened, self._tokenizer, "vocabulary")
        params = opened.join_base(trained, self.base, self._base_identity())
        return _make_network(opened), params

    def select_adapters(
        self, paths: Sequence[StrPath] | None, count: int
    ) -> SelectedAdapters | None:
        """Returns the adapters for the texts of a call.

        The `MAX_ADAPTERS` adapters that were used last stay in memory; others are read again.

        Args:
          paths: path of each text's adapter; None: all texts use the model's own adapter.
          count: number of texts.

        Returns:
          None if `paths` is None.

        Raises:
          InputError: `paths` is not a list of `count` paths, a path is not an adapter of this base,
            or the adapters differ in method or settings.
        """
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
        # A list of its own, because a call may have more adapters than `_adapters` keeps.
        selected: list[tuple[Transformer, PyTree]] = []
        for name in distinct:
            adapter = self._adapters.pop(name, None)
            if adapter is None:
                network, params = self._load_adapter(name)
                adapter = network, params_lib.select(params, params_lib.is_adapter)
            self._adapters[name] = adapter
            selected.append(adapter)
            if len(self._adapters) > MAX_ADAPTERS:
                del self._adapters[next(iter(self._adapters))]
        networks, trees = zip(*selected, strict=True)
        # One program computes all rows, with the adapters' parameters stacked.
        for name, network in zip(distinct, networks, strict=True):
            if network != networks[0]:
                raise InputError(
                    "adapter must be a list of adapters of the same method and settings, got"
                    f" {distinct[0]} and {name}, which differ"
                )
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
        return SelectedAdapters(
            networks[0], stacked, np.array([distinct.index(name) for name in names])
        )

    def apply(
        self,
        function: Callable[..., PyTree],
        selected: SelectedAdapters | None,
        indices: list[int],
        rows: Mapping[str, PyTree],
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> PyTree:
        """Calls a function of a batch with the model's parameters, or with selected adapters.

        Args:
          function, rows, settings, options: see `adapter_rows.map_adapters`.
          selected: the adapters of all texts of the call; None: the model's own parameters.
          indices: the texts in the batch; the batch may have further rows, which are padding.
        """
        if selected is None:
            return function(self.network, self.params, **rows, **settings, **options)
        import jax

        from pemoe_jax.core import adapter_rows

        num_rows = len(jax.tree.leaves(rows)[0])
        assert self.base is not None  # otherwise `select_adapters` has raised
        ids = jax.numpy.asarray(selected.ids[fill_rows(indices, num_rows)])
        apply = adapter_rows.map_adapters(function, selected.network, **settings)
        return apply(self.base, selected.params, ids, rows, options)

    def _base_identity(self) -> Mapping[str, Any]:
        """Returns the fingerprint and checksum of the base, see `OpenedModel.check_base`."""
        from pemoe_jax.checkpoints import base_model

        # They are unknown if the model is a run that trained all parameters. Its checkpoint is then
        # read once more.
        if self._identity is None:
            assert self.path is not None
            dtype = self.network.config.dtype
            self._identity = base_model.open_base(self.path).identity(dtype)
        return self._identity


def _make_network(opened: OpenedModel) -> Transformer:
    """Returns the network of an opened model; networks of equal settings compare equal."""
    from pemoe_jax.checkpoints import models

    # JAX compiles a program for each distinct network. The dropout rate, which nothing here uses,
    # is set to 0, so that runs that differ only in it share programs.
    config = dataclasses.replace(opened.model.config, dropout_rate=0.0)
    if opened.record is None:
        return opened.model.clone(config=config)
    return models.build_model(dataclasses.replace(opened.record, config=config.as_dict()))
