"""How likely each token of a text was."""

import struct
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from domain.content import ToldToken
from domain.ids import TokenId

TOKEN_BYTES: Final = 512
"""About what is held for a token while its answer is made."""
ALTERNATIVE_BYTES: Final = 256
"""About what is held for each alternative."""

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


class Likely(ToldToken, frozen=True, kw_only=True):
    """A token that could have come, and how likely that was."""

    logprob: float


class TokenFacts(ToldToken, frozen=True, kw_only=True):
    """A token of a text and how likely it was, given the tokens before it.

    ``logprob`` is natural, ``surprisal`` (nats) the same without its sign, ``rank`` 0 for the
    likeliest, ``entropy`` (nats) that of the distribution it came from; they are null for the first
    token, which nothing comes before. ``top`` are the likeliest tokens, where they are wanted.
    """

    position: int
    logprob: float | None
    surprisal: float | None
    rank: int | None
    entropy: float | None
    top: tuple[Likely, ...] | UnsetType = UNSET


class TokensFacts(Struct, frozen=True, kw_only=True):
    """The tokens from ``start`` up to, not with, ``end``.

    ``perplexity`` is that of those that were scored: see :func:`domain.analysis.exact.perplexity`.
    """

    start: int
    end: int
    tokens: tuple[TokenFacts, ...]
    perplexity: float | None


class TokensSource(Struct, frozen=True, kw_only=True):
    """Where what is said of the tokens comes from: recorded with them, or computed now."""

    tokens_stored: int
    tokens_recomputed: int


def likeliest_of(row: bytes, count: int, logsumexp: float) -> Likeliest:
    """The ``count`` likeliest tokens of a row kept as ``top_k``, with their logprobs.

    See :class:`domain.content.StoredLogits`.
    """
    held = len(row) // 8
    ids = struct.unpack_from(f"<{held}i", row)
    logits = struct.unpack_from(f"<{held}f", row, 4 * held)
    pairs = zip(ids[:count], logits[:count], strict=True)
    return tuple((TokenId(token), logit - logsumexp) for token, logit in pairs)
