"""What a transformers model does to its tokens, written down by ``torch.export``."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.export import ExportedProgram

from infra.engine.forward import Site, Unsupported, Weighing, every_site
from infra.engine.modules.watching import Layers, View
from infra.engine.strict.exact import rotary_buffers

TRACED: Final = "cacher-traced"
"""The attention that transformers calls while a model is traced."""


@torch.library.custom_op("cacher::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float, window: int, cap: float
) -> Tensor:
    """Stands for attention in a traced graph; never run."""
    raise NotImplementedError


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float, window: int, cap: float
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("cacher::see", mutates_args=("rows",))
def _see(rows: Tensor, kind: str, index: int) -> None:
    """Stands for a watch that sees rows in a traced graph, and may write to them; never run."""
    raise NotImplementedError


@_see.register_fake
def _(rows: Tensor, kind: str, index: int) -> None:
    return None


class _Marks:
    """A watch that has the sites of hidden states written down in the graph."""

    until = None

    def __init__(self, layers: int) -> None:
        self.sites = every_site(layers)

    def see(self, site: Site, rows: Tensor, weighing: Weighing | None) -> None:
        torch.ops.cacher.see(rows, site.kind, site.index)


@contextmanager
def _marked(model: Any) -> Iterator[None]:
    """Within it, a pass of the model shows its hidden states, if its layers can be told."""
    view = View(_Marks(model.config.num_hidden_layers), sys.maxsize)
    with ExitStack() as hooks:
        with suppress(Unsupported, RuntimeError, TypeError, AttributeError, IndexError):
            hooks.enter_context(Layers(model).seen_by(view))
        yield


def _traced(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return (
        torch.ops.cacher.attend(
            query, key, value, layer, scale, sliding_window or 0, softcap or 0.0
        ),
        None,
    )


transformers.AttentionInterface.register(TRACED, _traced)


class _Traced(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, wanted: Tensor) -> Any:
        return self.model(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=wanted
        ).logits


def trace(model: Any, context: int) -> ExportedProgram:
    """The graph of a causal language model: tokens, positions and wanted rows to logits.

    Raises:
        Unsupported: its code cannot be traced.
    """
    model.set_attn_implementation(TRACED)
    model.config.pad_token_id = None
    rows, wanted = torch.export.Dim("rows", min=2), torch.export.Dim("wanted", min=2)
    example = torch.arange(min(16, context))
    traced = _Traced(model)
    try:
        with torch.no_grad(), _marked(model):
            exported = torch.export.export(
                traced,
                (torch.zeros_like(example)[None], example[None], example[:8]),
                dynamic_shapes=({1: rows}, {1: rows}, {0: wanted}),
                strict=False,
            )
    except Exception as error:
        raise Unsupported(f"torch.export cannot trace it: {error}") from error
    exported.constants.update(rotary_buffers(traced))
    return exported
