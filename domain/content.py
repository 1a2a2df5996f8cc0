"""Runs of tokens with their text, and what is known of each token: what events are made of."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, Self

from msgspec import UNSET, Struct, UnsetType

from domain.config import LogitsStorage, TopKLogits
from domain.ids import TokenId


class Fragment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run of tokens and the text they add.

    ``ends[i]`` is the length (Unicode code points) of the text after token ``i``; a token that
    ends inside a character adds nothing, the one that completes it adds the whole character.
    ``partial`` has the bytes, in hexadecimal, of each token that is not whole characters by
    itself, by its index.
    """

    tokens: tuple[TokenId, ...]
    text: str
    ends: tuple[int, ...]
    partial: dict[int, str] = {}

    @classmethod
    def of(
        cls,
        tokens: Sequence[TokenId],
        pieces: Sequence[str],
        partial: Sequence[bytes | None] = (),
    ) -> "Fragment":
        """A fragment of tokens, what each of them adds to the text, and its bytes if needed."""
        return cls(
            tokens=tuple(tokens),
            text="".join(pieces),
            ends=tuple(accumulate(map(len, pieces))),
            partial={at: raw.hex() for at, raw in enumerate(partial) if raw is not None},
        )

    def pieces(self) -> tuple[str, ...]:
        """What each token adds to the text; together they are the text."""
        starts = (0, *self.ends)
        return tuple(self.text[start:end] for start, end in zip(starts, self.ends, strict=False))

    def bytes_of(self, at: int) -> tuple[int, ...] | UnsetType:
        """The bytes of token ``at``, if it is not whole characters by itself."""
        raw = self.partial.get(at)
        return UNSET if raw is None else tuple(bytes.fromhex(raw))


class ToldToken(Struct, frozen=True, kw_only=True):
    """A token as answers tell it: its id, and the ``text`` that it adds.

    ``bytes`` are there where it is not whole characters by itself.
    """

    token_id: TokenId
    text: str
    bytes: tuple[int, ...] | UnsetType = UNSET

    @classmethod
    def of(cls, content: Fragment, **known: Any) -> Self:
        """The one token of a fragment, with what is known of it."""
        (token,) = content.tokens
        return cls(token_id=token, text=content.text, bytes=content.bytes_of(0), **known)


class Alternative(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the likeliest tokens at a place."""

    token_id: TokenId
    text: str
    logprob: float


class Scores(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model said about each of a run of tokens, before any processing of its logits.

    ``logprobs`` (natural logarithm), ``ranks`` (0 = likeliest), ``entropies`` (nats) and
    ``logsumexps`` have one value per token. ``logits_digests`` are BLAKE2b with 8 bytes, in
    hexadecimal, over the logits row (float32, little endian, one value per vocabulary entry).
    """

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    entropies: tuple[float, ...]
    logsumexps: tuple[float, ...]
    logits_digests: tuple[str, ...]


NO_SCORES: Final = Scores(logprobs=(), ranks=(), entropies=(), logsumexps=(), logits_digests=())
"""Those of tokens of which nothing was said: a classifier's."""


class StoredLogits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logits kept beside the event, one blob per token.

    ``top_k``: ids (int32) then values (float32) of the ``k`` largest, little endian, largest
    first, ties by lower id. ``full``: the float32 row, compressed with zlib. ``digest`` is the
    SHA-256 of the length-prefixed blobs in order.
    """

    kind: LogitsStorage
    k: TopKLogits
    digest: str
