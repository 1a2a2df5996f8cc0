"""How likely each token of a text was."""

import math
import struct
from collections.abc import Iterable
from decimal import Context, Decimal
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from domain.ids import TokenId

TOKEN_BYTES: Final = 512
"""About what is held for a token while its answer is made."""
ALTERNATIVE_BYTES: Final = 256
"""About what is held for each alternative."""

_EXACT: Final = Context(prec=40)

Likeliest = tuple[tuple[TokenId, float], ...]
"""The likeliest tokens in a place with their logprobs, the likeliest first."""


class Measured(Struct, frozen=True, kw_only=True):
    """What the model said in the place of a token, before any processing of its logits.

    Of the token ``logprob`` (natural logarithm) and ``rank`` (0: the likeliest), of the whole
    distribution ``entropy`` (nats); ``likeliest`` tokens with their logprobs, if they are wanted.
    """

    logprob: float
    rank: int
    entropy: float
    likeliest: Likeliest = ()


class Likely(Struct, frozen=True, kw_only=True):
    """A token that could have come: what it would have added, and how likely that was.

    ``bytes`` are there where it is not whole characters by itself.
    """

    token_id: TokenId
    text: str
    bytes: tuple[int, ...] | UnsetType = UNSET
    logprob: float


class TokenFacts(Struct, frozen=True, kw_only=True):
    """A token of a text and how likely it was, given the tokens before it.

    ``text`` is what it adds, ``bytes`` are there where it is not whole characters by itself.
    ``logprob`` is natural, ``surprisal`` (nats) the same without its sign, ``rank`` 0 for the
    likeliest, ``entropy`` (nats) that of the distribution it came from; they are null for the first
    token, which nothing comes before. ``top`` are the likeliest tokens, where they are wanted.
    """

    position: int
    token_id: TokenId
    text: str
    bytes: tuple[int, ...] | UnsetType = UNSET
    logprob: float | None
    surprisal: float | None
    rank: int | None
    entropy: float | None
    top: tuple[Likely, ...] | UnsetType = UNSET


class TokensFacts(Struct, frozen=True, kw_only=True):
    """The tokens from ``start`` up to, not with, ``end``.

    ``perplexity`` is the exponential of their mean surprisal (Jelinek et al. 1977); null where no
    token was scored, or one of them was impossible.
    """

    start: int
    end: int
    tokens: tuple[TokenFacts, ...]
    perplexity: float | None


class TokensSource(Struct, frozen=True, kw_only=True):
    """Where what is said of the tokens comes from: recorded with them, or computed now."""

    tokens_stored: int
    tokens_recomputed: int


def finite(value: float) -> float | None:
    """A number that JSON has, or null."""
    return value if math.isfinite(value) else None


def possible(likeliest: Iterable[tuple[TokenId, float]]) -> Likeliest:
    """Tokens with their logprobs, without those that the model rules out."""
    return tuple((token, logprob) for token, logprob in likeliest if logprob > -math.inf)


def likeliest_of(row: bytes, count: int, logsumexp: float) -> Likeliest:
    """The ``count`` likeliest tokens of a row kept as ``top_k``, with their logprobs.

    See :class:`domain.content.StoredLogits`.
    """
    held = len(row) // 8
    ids = struct.unpack_from(f"<{held}i", row)
    logits = struct.unpack_from(f"<{held}f", row, 4 * held)
    pairs = zip(ids[:count], logits[:count], strict=True)
    return possible((TokenId(token), logit - logsumexp) for token, logit in pairs)


def perplexity(logprobs: Iterable[float]) -> float | None:
    """The exponential of the mean surprisal, the same bits everywhere: see :class:`TokensFacts`.

    The sum is rounded once, the exponential taken in decimal arithmetic.
    """
    surprisals = [-logprob for logprob in logprobs]
    if not surprisals or not all(map(math.isfinite, surprisals)):
        return None
    mean = Decimal(math.fsum(surprisals) / len(surprisals))
    return finite(float(mean.exp(_EXACT)))
