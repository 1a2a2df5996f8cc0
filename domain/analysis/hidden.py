"""Hidden states: which may be asked for, and what is said of them.

Of a model with ``n`` layers there are ``n + 1``: 0 is the embedding, ``i`` what comes out of the
i-th layer, the last one is normalised; a model that makes it narrower before the head, as OPT may,
does so later.
"""

from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct

from domain.analysis.parameters import EmbeddingParameters, HiddenParameters
from domain.analysis.ranges import (
    check_captured,
    check_index,
    check_indices,
    check_position,
    check_size,
    positions,
)
from domain.analysis.result import Dtype
from domain.models import Dimensions

Pooling = Literal["none", "mean", "last"]
"""What one vector is made of for a range: nothing, all hidden states, or the last of them."""

WIDEST_ITEM_BYTES: Final = 4
"""Hidden states are float32 or narrower."""
_STATES: Final = "hidden states, the embedding first"
_REMEDY: Final = "Name fewer layers, or a narrower range with start and end"


class HiddenFacts(Struct, frozen=True, kw_only=True):
    """What the tensor ``hidden_states`` holds.

    The hidden states of ``layers``, in this order, at the tokens from ``start`` up to, not with,
    ``end``: ``(layers, positions, width)``, and pooled ``(layers, width)``. Of one layer too.
    """

    layers: tuple[int, ...]
    start: int
    end: int
    pooling: Pooling
    shape: tuple[int, ...]
    dtype: Dtype


class EmbeddingFacts(Struct, frozen=True, kw_only=True):
    """What the tensor ``embedding`` ``(width,)`` holds: the hidden state of one token."""

    token_index: int
    layer: int
    shape: tuple[int, ...]
    dtype: Dtype


def states_named(named: Sequence[int] | None, dimensions: Dimensions) -> Sequence[int] | None:
    """The hidden states that are named, if any.

    Raises:
        InvalidInput: there is no such one, or it is named twice.
    """
    check_indices("layers", named or (), dimensions.layers + 1, of=_STATES)
    return named


def asked_hidden(
    parameters: HiddenParameters, dimensions: Dimensions, held: int, limit: int
) -> tuple[tuple[int, ...], range]:
    """The hidden states and the positions asked for of a text of ``held`` tokens.

    Raises:
        InvalidInput: there are none such.
        ResultTooLarge: there are too many to be pooled, or for an answer of ``limit`` bytes.
    """
    layers = tuple(states_named(parameters.layers, dimensions) or (dimensions.layers,))
    span = positions(parameters.start, parameters.end, held)
    read = 1 if parameters.pooling == "last" else len(span)
    given = len(span) if parameters.pooling == "none" else 1
    check_size(states_bytes(len(layers) * given, dimensions), limit, _REMEDY)
    check_captured(states_bytes(len(layers) * read, dimensions), limit, _REMEDY)
    return layers, span


def asked_embedding(parameters: EmbeddingParameters, dimensions: Dimensions, held: int) -> int:
    """The hidden state asked for of a token.

    Raises:
        InvalidInput: there is no such token, or no such hidden state.
    """
    check_position("token_index", parameters.token_index, held)
    layer = dimensions.layers if parameters.layer is None else parameters.layer
    check_index("layer", layer, dimensions.layers + 1, of=_STATES)
    return layer


def states_bytes(count: int, dimensions: Dimensions) -> int:
    """Bytes that so many hidden states take at most."""
    return count * dimensions.width * WIDEST_ITEM_BYTES
