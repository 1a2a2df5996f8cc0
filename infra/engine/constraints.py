"""Which token may come next, so that a text becomes one of a language; through llguidance.

A mask is a pure function of the constraint and the tokens. Only where the limits on memory and
time stop a computation can there be an error instead.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import cached_property
from threading import Lock
from types import SimpleNamespace
from typing import Final, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from domain.config import Constraint
from domain.ids import TokenId
from infra.engine.grammar_trial import limits
from infra.engine.grammars import endures_trial, explained, grammar, refused
from infra.models.tokenizer import Tokenizer

Mask = NDArray[np.int32]
"""Bit ``i % 32`` of word ``i // 32`` says whether token ``i`` may come. Read only."""

MAX_LANGUAGES: Final = 16
"""Compiled constraints that are kept: a usual one takes a few megabytes, the worst a hundred."""


class Constraints:
    """The constraints of texts of one model; safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, vocabulary_size: int, eos_token_ids: frozenset[TokenId]
    ) -> None:
        self._parts = (tokenizer, vocabulary_size, eos_token_ids)
        self._languages: OrderedDict[Constraint, _Language] = OrderedDict()
        self._lock = Lock()
        self._worker = ThreadPoolExecutor(1, "masks")

    def check(self, constraint: Constraint) -> None:
        """Make sure that a text can be held to a constraint; the first time takes a while.

        Raises:
            InvalidInput: it is malformed, too large or complex, uses what is not supported, or no
                text but the empty one satisfies it; says where.
        """
        self._language(constraint)

    def matcher(self, constraint: Constraint, tokens: Sequence[TokenId] = ()) -> "Matcher":
        """A matcher that stands at the end of ``tokens``.

        Raises:
            InvalidInput: as for :meth:`check`.
        """
        return Matcher(self._language(constraint), tokens, self._worker)

    @cached_property
    def _vocabulary(self) -> "_Vocabulary":
        return _Vocabulary(*self._parts)

    def _language(self, constraint: Constraint) -> "_Language":
        with self._lock:
            if language := self._languages.get(constraint):
                self._languages.move_to_end(constraint)
                return language
        language = _Language(constraint, self._vocabulary)
        with self._lock:
            self._languages[constraint] = language
            while len(self._languages) > MAX_LANGUAGES:
                self._languages.popitem(last=False)
        return language


class Matcher:
    """Follows one text, token by token.

    The mask of the next token is computed beside the engine's thread, from the moment the token
    before it is known. Where the text can go no further although it is not complete, EOS alone
    may come, as where it is fulfilled; so it is after a token that could not come.
    """

    def __init__(self, language: "_Language", tokens: Sequence[TokenId], worker: Executor) -> None:
        self._language = language
        self._worker = worker
        self._tokens: list[TokenId] = []
        self._state = language.start.deep_copy()
        self._standing: Literal["open", "fulfilled", "astray"] = "open"
        for token in tokens:
            self._take(token)
        self._next = self._ahead() if tokens else language.first

    @property
    def fulfilled(self) -> bool:
        """Whether the text satisfies the constraint and nothing may follow, or ended with EOS."""
        return self._standing == "fulfilled"

    def allowed(self) -> Mask:
        """Which tokens may come next; waits until that is known.

        Raises:
            InvalidInput: the constraint turned out to be too complex.
        """
        return self._next.result()

    def push(self, token: TokenId) -> None:
        """The text goes on with ``token``.

        Raises:
            InvalidInput: the constraint turned out to be too complex.
        """
        wait([self._next])
        self._take(token)
        self._next = self._ahead()

    def _ahead(self) -> "Future[Mask]":
        if self._standing == "open":
            return self._worker.submit(self._mask)
        return _done(self._language.vocabulary.ends)

    def _mask(self) -> Mask:
        mask = self._language.vocabulary.mask(self._state)
        if _exhausted(self._state):
            self._state = self._language.retraced(self._tokens)
            mask = self._language.vocabulary.mask(self._state)
            self._language.raise_if_exhausted(self._state)
        return mask

    def _take(self, token: TokenId) -> None:
        self._tokens.append(token)
        vocabulary = self._language.vocabulary
        if self._standing != "open" or not vocabulary.has(token):
            self._standing = "astray"
        elif token in vocabulary.eos_token_ids:
            self._standing = "fulfilled"
        else:
            self._state.consume_token(token)
            if _exhausted(self._state):
                self._state = self._language.retraced(self._tokens)
            if self._state.is_error():
                self._standing = "astray"
            elif self._state.is_stopped():
                self._standing = "fulfilled"


class _Vocabulary:
    """A model's tokens as runs of bytes; special tokens and what lies beyond have none."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: frozenset[TokenId]) -> None:
        self.eos_token_ids = eos_token_ids.intersection(range(size))
        eos = sorted(self.eos_token_ids)
        tokens = [
            b"" if token in self.eos_token_ids else _bytes(tokenizer, token)
            for token in map(TokenId, range(size))
        ]
        parts = SimpleNamespace(
            tokens=tokens, eos_token_id=eos[0] if eos else None, bos_token_id=None
        )
        self.tokenizer = LLTokenizer(TokenizerWrapper(parts), eos_token=list(map(int, eos)) or None)
        self._words = -(-self.tokenizer.vocab_size // 32)  # without EOS, llguidance makes one up
        ends = np.isin(np.arange(size), eos)
        self._usable = _packed(np.array([len(token) > 0 for token in tokens]) | ends)
        self.ends = _packed(ends)

    def has(self, token: TokenId) -> bool:
        """Whether a token can come at all."""
        return token < 32 * len(self._usable) and bool(self._usable[token // 32] >> token % 32 & 1)

    def mask(self, state: LLMatcher) -> Mask:
        """Which tokens may come next; only EOS where ``state`` is in error."""
        words = np.empty(self._words, np.int32)
        state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        mask: Mask = words[: len(self._usable)] & self._usable
        mask.flags.writeable = False
        return mask


class _Language:
    """A compiled constraint.

    Copies of ``start`` share the lexer's states, so that a text finds much of its way known. What
    the others found counts against the limits too; :meth:`retraced` is then alone.
    """

    def __init__(self, constraint: Constraint, vocabulary: _Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._constraint = constraint
        self._grammar = grammar(constraint)
        if not endures_trial(self._grammar):
            raise refused(constraint, "it is too complex: it takes too long or nests too deep")
        self.start = self._compiled()
        if self.start.is_error():
            raise refused(constraint, explained(constraint, self.start.get_error()))
        first = vocabulary.mask(self.start)
        self.raise_if_exhausted(self.start)
        if not (first & ~vocabulary.ends).any():
            accepting = self.start.is_accepting()
            raise refused(constraint, f"no text {'but the empty one ' * accepting}satisfies it")
        self.first = _done(first)

    def retraced(self, tokens: Sequence[TokenId]) -> LLMatcher:
        """The state after ``tokens``, found as if no other text had been.

        Raises:
            InvalidInput: that exceeds the limits as well.
        """
        state = self._compiled()
        for token in tokens:
            self.vocabulary.mask(state)
            state.consume_token(token)
        self.raise_if_exhausted(state)
        return state

    def raise_if_exhausted(self, state: LLMatcher) -> None:
        """Raise :class:`InvalidInput` if the limits stopped a computation."""
        if _exhausted(state):
            reason = explained(self._constraint, state.get_error())
            raise refused(self._constraint, f"it is too complex: {reason}")

    def _compiled(self) -> LLMatcher:
        return LLMatcher(self.vocabulary.tokenizer, self._grammar, log_level=0, limits=limits())


def _exhausted(state: LLMatcher) -> bool:
    """Whether a limit was exceeded, which is no fault of the text."""
    error = state.get_error()
    at_fault = error.startswith("NoExtensionBias") or "doesn't satisfy the grammar" in error
    return state.is_error() and not at_fault


def _bytes(tokenizer: Tokenizer, token: TokenId) -> bytes:
    return tokenizer.partial(token) or tokenizer.text_of(token).encode()


def _packed(allowed: NDArray[np.bool_]) -> Mask:
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    words = np.packbits(padded, bitorder="little").view("<i4").astype(np.int32)
    words.flags.writeable = False
    return words


def _done(mask: Mask) -> "Future[Mask]":
    future: Future[Mask] = Future()
    future.set_result(mask)
    return future
