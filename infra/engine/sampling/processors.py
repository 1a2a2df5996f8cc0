"""What becomes of the scores of a row before a token is drawn, given the text so far.

Each step is transformers' ``LogitsProcessor`` of that name, in its order there; the presence and
frequency penalties, which transformers lacks, follow the repetition penalty. A score changes by
single operations of IEEE 754, so every CPU gives the same bits.
"""

from array import array
from collections.abc import Sequence
from copy import copy
from typing import Final

import numpy as np
from numpy.typing import NDArray

from domain.config import BadWords, LogitsParameters
from infra.engine.sampling.sampler import Row

_RULED_OUT: Final = np.float32(-np.inf)
_OCTETS: Final[Row] = np.array(
    [[0 if octet >> bit & 1 else _RULED_OUT for bit in range(8)] for octet in range(256)],
    np.float32,
)
"""What eight bits of a mask add to eight scores."""


class Processors:
    """What the parameters make of the scores of a text that grows token by token.

    The text is all that a state holds, its prompt too. Every token, of the text and of the
    parameters, is below the width of the rows.
    """

    def __init__(
        self,
        parameters: LogitsParameters,
        tokens: Sequence[int],
        *,
        no_repeat_ngram_size: int = 0,
    ) -> None:
        self._biased = np.array(list(parameters.logit_bias), np.int64)
        self._bias = np.array(list(parameters.logit_bias.values()), np.float32)
        self._penalties = _Penalties(parameters, tokens) if _penalises(parameters) else None
        self._bans: list[_BadWords | _NGrams] = []
        if no_repeat_ngram_size:
            self._bans.append(_NGrams(no_repeat_ngram_size, tokens))
        if parameters.bad_words_ids:
            self._bans.append(_BadWords(parameters.bad_words_ids, tokens))

    def copy(self) -> "Processors":
        """The same, for another way in which the text goes on."""
        twin = copy(self)
        twin._penalties = self._penalties and self._penalties.copy()
        twin._bans = [copy(bans) for bans in self._bans]
        return twin

    def push(self, token: int) -> None:
        """The text goes on with ``token``."""
        if self._penalties:
            self._penalties.push(token)
        for bans in self._bans:
            bans.push(token)

    def process(self, scores: Row, allowed: NDArray[np.int32] | None = None) -> Row:
        """What the scores of the next token become: the row itself where nothing changes them.

        Of ``allowed``, bit ``i % 32`` of word ``i // 32`` says whether token ``i`` may come; one
        that may not, or is beyond the last word, gets minus infinity.
        """
        banned = [token for bans in self._bans for token in bans.banned()]
        if allowed is not None:
            scores = _restricted(scores, allowed)
        elif len(self._biased) or self._penalties or banned:
            scores = scores.copy()
        if len(self._biased):
            scores[self._biased] += self._bias
        if self._penalties:
            self._penalties.apply(scores)
        if banned:
            scores[banned] = _RULED_OUT
        return scores


def _restricted(scores: Row, allowed: NDArray[np.int32]) -> Row:
    octets = allowed.astype("<i4", copy=False).view(np.uint8)
    addends = _OCTETS.take(octets, axis=0).ravel()[: len(scores)]
    restricted = np.full(len(scores), _RULED_OUT)
    restricted[: len(addends)] = scores[: len(addends)] + addends
    return restricted


def _penalises(parameters: LogitsParameters) -> bool:
    additive = (parameters.presence_penalty, parameters.frequency_penalty)
    return parameters.repetition_penalty != 1 or additive != (0, 0)


class _Penalties:
    """Lowers the scores of the tokens that a text holds, by how often it does."""

    def __init__(self, parameters: LogitsParameters, tokens: Sequence[int]) -> None:
        ids, counts = np.unique(np.array(tokens, np.int64), return_counts=True)
        self._ids, self._counts = array("q", ids.tobytes()), array("q", counts.tobytes())
        self._places = {token: place for place, token in enumerate(self._ids)}
        self._factor = np.float32(parameters.repetition_penalty)
        self._once, self._each = parameters.presence_penalty, parameters.frequency_penalty

    def copy(self) -> "_Penalties":
        twin = copy(self)
        twin._ids, twin._counts = self._ids[:], self._counts[:]
        twin._places = self._places.copy()
        return twin

    def push(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def apply(self, scores: Row) -> None:
        ids, counts = np.asarray(self._ids), np.asarray(self._counts)
        held = scores[ids]
        held = np.where(held < 0, held * self._factor, held / self._factor)
        scores[ids] = held - (self._once + self._each * counts)


class _BadWords:
    """Rules out the last token of a bad word where the others are the end of the text."""

    def __init__(self, words: BadWords, tokens: Sequence[int]) -> None:
        self._always = [word[0] for word in words if len(word) == 1]
        self._after: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._after.setdefault(word[-2], []).append(word)
        self._longest = max(map(len, words)) - 1
        self._end = tuple(tokens[max(0, len(tokens) - self._longest) :])

    def push(self, token: int) -> None:
        self._end = (*self._end, token)[-self._longest :] if self._longest else ()

    def banned(self) -> list[int]:
        words = self._after.get(self._end[-1], ()) if self._end else ()
        return [
            *self._always,
            *(word[-1] for word in words if word[:-1] == self._end[1 - len(word) :]),
        ]


class _NGrams:
    """Rules out tokens that would make a run of ``size`` tokens come a second time.

    ``_alike[i]`` is how many tokens before the place ``i`` equal the last ones of the text.
    """

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        self._size = size
        self._tokens = np.array(tokens, np.int64)
        self._alike = _alike(tokens)

    def push(self, token: int) -> None:
        alike = np.where(self._tokens == token, self._alike + 1, 0)
        self._alike = np.concatenate(([0], alike))
        self._tokens = np.append(self._tokens, token)

    def banned(self) -> list[int]:
        found: list[int] = np.unique(self._tokens[self._alike >= self._size - 1]).tolist()
        return found


def _alike(tokens: Sequence[int]) -> NDArray[np.int64]:
    """How many tokens before each place equal the last ones: Gusfield's Z algorithm (1997)."""
    backwards, count = list(reversed(tokens)), len(tokens)
    lengths = [0] * count
    left = right = 0
    for i in range(1, count):
        length = min(right - i, lengths[i - left]) if i < right else 0
        while i + length < count and backwards[length] == backwards[i + length]:
            length += 1
        if i + length > right:
            left, right = i, i + length
        lengths[i] = length
    # what is i from the end of the text ends at the place count - i
    return np.array([0, *lengths[:0:-1]][:count], np.int64)
