"""The logit lens: what may be asked for, and what is found."""

from typing import Final

from msgspec import Struct

from domain.analysis.hidden import states_bytes, states_named
from domain.analysis.parameters import LensParameters
from domain.analysis.ranges import (
    check_alternatives,
    check_captured,
    check_position,
    check_size,
    positions,
)
from domain.analysis.tokens import Likely
from domain.errors import ResultTooLarge, invalid
from domain.ids import TokenId
from domain.models import Dimensions

MAX_READINGS: Final = 16_384
"""Hidden states that are read for one answer: each is multiplied with the whole vocabulary."""
_LIKELIEST_BYTES: Final = 12
"""An id of 8 bytes and a logprob of 4, for each of the likeliest tokens."""
_REMEDY: Final = "Name fewer layers, one position, or a narrower range with start and end"


class Reading(Struct, frozen=True, kw_only=True):
    """A hidden state at ``position``, read as what could come after it.

    The likeliest tokens (``top``) and the ``entropy`` (nats). Of the token that does come after it,
    null where there is none, the ``logprob`` and the ``rank`` (0: the likeliest).
    """

    position: int
    top: tuple[Likely, ...]
    entropy: float
    logprob: float | None
    rank: int | None


class LensFacts(Struct, frozen=True, kw_only=True):
    """The logit lens over ``layers`` and the positions from ``start`` up to, not with, ``end``.

    The tokens there have the ids ``token_ids`` and the texts ``tokens``. ``readings`` are by layer,
    and of each layer by position. What the last layer is read as is what the model says. The
    tensors ``top_token_ids`` and ``top_logprobs`` ``(layers, positions, top_k)`` hold the likeliest
    tokens again.
    """

    start: int
    end: int
    token_ids: tuple[TokenId, ...]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    readings: tuple[tuple[Reading, ...], ...]


def asked_lens(
    parameters: LensParameters, dimensions: Dimensions, held: int, limit: int
) -> tuple[tuple[int, ...], range]:
    """The layers and the positions asked for of a text of ``held`` tokens.

    Raises:
        InvalidInput: there are none such.
        ResultTooLarge: there are too many, also for tensors of ``limit`` bytes.
    """
    layers = tuple(states_named(parameters.layers, dimensions) or range(dimensions.layers + 1))
    span = _span(parameters, held)
    readings = len(layers) * len(span)
    if readings > MAX_READINGS:
        raise ResultTooLarge(readings, MAX_READINGS, _REMEDY, unit="hidden states' readings")
    count, remedy = readings * parameters.top_k, f"{_REMEDY}; or lower top_k"
    check_alternatives(count, remedy)
    check_size(count * _LIKELIEST_BYTES, limit, remedy)
    check_captured(states_bytes(readings, dimensions), limit, _REMEDY)
    return layers, span


def _span(parameters: LensParameters, held: int) -> range:
    position = parameters.position
    if position is None:
        return positions(parameters.start, parameters.end, held)
    if parameters.start or parameters.end is not None:
        raise invalid("position", "stands in place of start and end, not beside them")
    check_position("position", position, held)
    return range(position, position + 1)
