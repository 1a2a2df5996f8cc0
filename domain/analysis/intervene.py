"""What could come next if something were otherwise: what may be changed, and what that changes."""

import struct
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from domain.analysis.next import Distribution
from domain.analysis.parameters import Addition, HeadAt, InterveneParameters
from domain.analysis.ranges import check_index, check_position, positions
from domain.content import ToldToken
from domain.errors import invalid
from domain.ids import TokenId
from domain.models import Dimensions

_EDITS: Final = "replace, zero_heads or add"


class Shift(ToldToken, frozen=True, kw_only=True):
    """How likely a token is without the edit and with it; ranks count from 0, the likeliest."""

    original_logprob: float
    edited_logprob: float
    original_rank: int
    edited_rank: int


class InterveneFacts(Struct, frozen=True, kw_only=True):
    """The distribution of the token at ``position``, the next one, as it is and as edited.

    ``kl`` (nats) is the divergence of the original from the edited one, ``KL(edited || original)``.
    ``shifts`` are of all tokens that are among the likeliest of either, by their rank in the edited
    one. ``greedy`` are the likeliest tokens: the original one, and the edited one.
    """

    position: int
    original: Distribution
    edited: Distribution
    kl: float
    greedy: tuple[TokenId, TokenId]
    greedy_changed: bool
    shifts: tuple[Shift, ...]


def check_edits(
    parameters: InterveneParameters, dimensions: Dimensions, held: int, vocabulary_size: int
) -> None:
    """Refuse edits of what there is not in a text of ``held`` tokens, and none at all.

    Raises:
        InvalidInput: names the field and what is allowed.
    """
    if not (parameters.replace or parameters.zero_heads or parameters.add):
        raise invalid("replace", f"nothing is edited: name what to edit in {_EDITS}")
    for position, token in parameters.replace.items():
        check_position(f"replace.{position}", position, held)
        if not 0 <= token < vocabulary_size:
            raise invalid(
                f"replace.{position}",
                f"must be 0 to {vocabulary_size - 1}: the vocabulary has {vocabulary_size} tokens",
            )
    known: set[HeadAt] = set()
    for place, zeroed in enumerate(parameters.zero_heads):
        check_index(f"zero_heads[{place}].layer", zeroed.layer, dimensions.layers, of="layers")
        check_index(f"zero_heads[{place}].head", zeroed.head, dimensions.heads, of="heads")
        if zeroed in known:
            raise invalid(f"zero_heads[{place}]", "is named twice")
        known.add(zeroed)
    for place, addition in enumerate(parameters.add):
        _check_addition(f"add[{place}]", addition, dimensions, held)


def _check_addition(field: str, addition: Addition, dimensions: Dimensions, held: int) -> None:
    check_index(f"{field}.layer", addition.layer, dimensions.layers, of="layers")
    added_to(addition, held, field)
    if len(addition.vector) != dimensions.width:
        raise invalid(
            f"{field}.vector",
            f"must hold {dimensions.width} numbers, as wide as the model's hidden states are;"
            f" it holds {len(addition.vector)}",
        )
    for at, value in enumerate(addition.vector):
        try:
            struct.pack("<f", value)
        except OverflowError:
            raise invalid(f"{field}.vector[{at}]", "is too large for float32") from None


def added_to(addition: Addition, held: int, field: str = "add") -> range:
    """The positions at which a vector is added.

    Raises:
        InvalidInput: there are none such.
    """
    return positions(addition.start, addition.end, held, prefix=f"{field}.")


def replaced(parameters: InterveneParameters, tokens: Sequence[TokenId]) -> tuple[TokenId, ...]:
    """A text with tokens replaced."""
    return tuple(parameters.replace.get(at, token) for at, token in enumerate(tokens))
