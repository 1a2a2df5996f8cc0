"""Where the rows of a pass can be seen in transformers' modules."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from infra.engine.forward import Site, Unsupported, Watch, Weighing

_TRIAL_ROWS: Final = 4


class Ended(Exception):
    """A pass has come to the site after which nothing of it is needed."""


@dataclass(frozen=True)
class View:
    """What a watch sees of a pass: its first ``count`` rows. The others are padding."""

    watch: Watch
    count: int

    def show(
        self,
        kind: Literal["residual", "normalised", "queries", "heads"],
        index: int,
        rows: Tensor,
        weighing: Weighing | None = None,
    ) -> None:
        """Let the watch see ``rows``, if they are at one of its sites.

        Raises:
            Ended: the pass is to end here.
        """
        site = Site(kind, index)
        if site in self.watch.sites:
            self.watch.see(site, rows[: self.count], weighing)
        if site == self.watch.until:
            raise Ended


class Layers:
    """The decoder layers of a model: the list whose members hold attention, each with its index.

    Raises:
        Unsupported: there is none.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parent, self._layers = _find(model)

    @contextmanager
    def seen_by(self, view: View | None) -> Iterator[None]:
        """While the model computes a pass, show its hidden states ``(1, rows, width)``.

        Where the pass is to end, :class:`Ended` leaves the model.
        """
        with ExitStack() as hooks:
            if view is not None:
                for handle in self._hooks(view):
                    hooks.callback(handle.remove)
            yield

    def _hooks(self, view: View) -> Iterator[Any]:
        norm, last = self._norm or self._layers[-1], len(self._layers)
        for index, layer in enumerate(self._layers):

            def enters(_: nn.Module, taken: tuple[Tensor, ...], index: int = index) -> None:
                view.show("residual", index, taken[0][0])

            if Site("residual", index) in {*view.watch.sites, view.watch.until}:
                yield layer.register_forward_pre_hook(enters)

        def leaves(_: nn.Module, taken: object, hidden: Tensor) -> None:
            view.show("residual", last, hidden[0])

        def normalised(_: nn.Module, taken: object, hidden: Tensor) -> None:
            view.show("normalised", 0, hidden[0])

        yield self._layers[-1].register_forward_hook(leaves)
        yield norm.register_forward_hook(normalised)

    @contextmanager
    def giving(self, rows: Tensor) -> Iterator[Tensor]:
        """Have every layer give these hidden states ``(rows, width)``, whatever it gets.

        What it gives is ``(1, rows, width)``, that very tensor.
        """
        hidden = rows[None]
        for layer in self._layers:
            layer.forward = lambda *_, **__: hidden
        try:
            yield hidden
        finally:
            for layer in self._layers:
                del layer.forward

    @cached_property
    def _norm(self) -> nn.Module | None:
        """The module that normalises what leaves the last layer; null where none does.

        The one beside the layers that takes it and keeps its shape.
        """
        model = self._model
        width = model.config.hidden_size
        rows = torch.zeros(_TRIAL_ROWS, width, dtype=model.dtype, device=model.device)
        tokens = torch.zeros(1, _TRIAL_ROWS, dtype=torch.int64, device=model.device)
        takers: list[nn.Module] = []
        with self.giving(rows) as hidden, ExitStack() as hooks:

            def note(module: nn.Module, taken: tuple[Any, ...], result: Any) -> None:
                if taken and taken[0] is hidden and result.shape == hidden.shape:
                    takers.append(module)

            for child in self._parent.children():
                hooks.callback(child.register_forward_hook(note).remove)
            model.base_model(input_ids=tokens, position_ids=tokens, use_cache=False)
        return takers[0] if takers else None


def _find(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The layers, and the module that they are a child of."""
    for parent in model.modules():
        for child in parent.children():
            if (
                isinstance(child, nn.ModuleList)
                and len(child) == model.config.num_hidden_layers
                and all(_attends(layer, index) for index, layer in enumerate(child))
            ):
                return parent, child
    raise Unsupported("its layers are not a list of modules with attention in each")


def _attends(layer: nn.Module, index: int) -> bool:
    return any(getattr(part, "layer_idx", None) == index for part in layer.modules())
