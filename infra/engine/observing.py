"""What can be seen of a text's passes, and how passes can be made to go otherwise."""

from dataclasses import dataclass, field

from torch import Tensor

from domain.ids import TokenId
from infra.engine.forward import Weighing


@dataclass(frozen=True, kw_only=True)
class Edits:
    """How passes are made to go otherwise.

    ``silenced`` heads, by layer, give nothing. ``added`` vectors ``(width,)``, by layer, are added
    to what enters it at the positions of a range.
    """

    silenced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    added: dict[int, tuple[tuple[range, Tensor], ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything goes otherwise."""
        return bool(self.silenced or self.added)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is to be seen of ``tokens`` from ``start``, one of their positions, on.

    The queries of some layers, the ``residual`` stream at some places and, ``normalised``, after
    the last of them (:class:`infra.engine.forward.Site`). The ``keys`` and ``values`` of some
    layers, from position 0, and with ``logits`` what comes after the last token. Where neither
    these nor ``normalised`` are asked for, nothing is computed that comes after what is.

    What is edited is computed for itself alone: nothing else may take it for what it is not.
    """

    tokens: tuple[TokenId, ...]
    start: int = 0
    queries: frozenset[int] = frozenset()
    residual: frozenset[int] = frozenset()
    normalised: bool = False
    keys: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()
    logits: bool = False
    edits: Edits = Edits()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen, in copies on the CPU: rows are positions from ``start`` on.

    By layer ``queries`` ``(rows, heads, head_dim)`` and how they weigh keys; by place ``residual``
    ``(rows, width)``; ``keys`` and ``values`` by layer, ``(kv_heads, tokens, head_dim)``, as they
    are stored; ``logits`` ``(vocabulary,)``.
    """

    queries: dict[int, tuple[Tensor, Weighing]]
    residual: dict[int, Tensor]
    normalised: Tensor | None
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    logits: Tensor | None
    tokens_computed: int
    tokens_reused: int
