"""Which token may come next, so that a text becomes one of a language; through llguidance.

A mask is a pure function of the constraint and the tokens. Only where the limits on memory and
time stop a computation can there be an error instead: a text that needs too many items of the
parser is an error wherever it is followed, one that needs too much of the lexer may be followed by
the help of others although it could not be alone. Alone it has twice the fuel for that reason.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import cached_property
from threading import Lock
from time import thread_time
from types import SimpleNamespace
from typing import Final, Literal, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from domain.config import Constraint
from domain.errors import InvalidInput
from domain.ids import TokenId
from infra.engine.constraints.grammar_trial import LEXER_FUEL, limits
from infra.engine.constraints.grammars import endures_trial, explained, grammar, refused
from infra.models.tokenizer import Tokenizer

Mask = NDArray[np.int32]
"""Bit ``i % 32`` of word ``i // 32`` says whether token ``i`` may come. Read only."""

Item = TypeVar("Item")

MAX_LANGUAGES: Final = 16
"""Compiled constraints that are kept: a usual one takes a few megabytes, the worst a hundred."""
MAX_CHECKS: Final = 2
"""Constraints that are tried and compiled at once: each takes seconds and a gigabyte at worst."""
RETRACE_SECONDS: Final = 0.25
"""Of CPU time, during which other texts may have to wait."""


class Constraints:
    """The constraints of texts of one model; safe to use from several threads.

    They are compiled on threads kept for that. What came of the latest is remembered, refusals
    too; and a compiled one for as long as anybody holds it.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocabulary_size: int, eos_token_ids: frozenset[TokenId]
    ) -> None:
        self._parts = (tokenizer, vocabulary_size, eos_token_ids)
        self._latest: OrderedDict[Constraint, Future[Language | InvalidInput]] = OrderedDict()
        self._languages: WeakValueDictionary[Constraint, Language] = WeakValueDictionary()
        self._lock = Lock()
        self._checks = ThreadPoolExecutor(MAX_CHECKS, "checks")
        self._worker = ThreadPoolExecutor(1, "masks")

    async def language(self, constraint: Constraint) -> "Language":
        """The compiled constraint: :meth:`matcher` need not wait while the caller holds it.

        Raises:
            InvalidInput: it is malformed, too large or complex, uses what is not supported, or no
                text but the empty one satisfies it; says where.
        """
        found, ready = self._compiled(constraint), asyncio.Event()
        loop = asyncio.get_running_loop()
        found.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(ready.set))
        await ready.wait()
        return _unless_refused(found.result())

    def matcher(self, constraint: Constraint, tokens: Sequence[TokenId] = ()) -> "Matcher":
        """A matcher that stands at the end of ``tokens``; waits until the constraint is compiled.

        Raises:
            InvalidInput: as for :meth:`language`, or the tokens are too complex to follow.
        """
        language = _unless_refused(self._compiled(constraint).result())
        return Matcher(language, tokens, self._worker)

    @cached_property
    def _vocabulary(self) -> "_Vocabulary":
        return _Vocabulary(*self._parts)

    def _compiled(self, constraint: Constraint) -> "Future[Language | InvalidInput]":
        with self._lock:
            found = self._latest.pop(constraint, None)
            language = self._languages.pop(constraint, None)
            if language and not language.exhausted:
                self._languages[constraint] = language
                found = _done(language)
            elif language or not found:
                found = self._checks.submit(self._compile, constraint)
            self._latest[constraint] = found
            while len(self._latest) > MAX_LANGUAGES:
                self._latest.popitem(last=False)
        return found

    def _compile(self, constraint: Constraint) -> "Language | InvalidInput":
        try:
            language = Language(constraint, self._vocabulary)
        except InvalidInput as refusal:
            return _again(refusal)
        except BaseException:
            with self._lock:
                self._latest.pop(constraint, None)
            raise
        with self._lock:
            self._languages[constraint] = language
        return language


class Matcher:
    """Follows one text, token by token.

    The mask of the next token is computed beside the engine's thread, from the moment the token
    before it is known. Where the text can go no further although it is not complete, EOS alone
    may come, as where it is fulfilled; so it is after a token that could not come.
    """

    def __init__(self, language: "Language", tokens: Sequence[TokenId], worker: Executor) -> None:
        self._language = language
        self._worker = worker
        self._tokens: list[TokenId] = []
        self._state = language.start.deep_copy()
        self._alone = False
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
        if self._stopped_short():
            mask = self._language.vocabulary.mask(self._state)
            self._stopped_short()
        return mask

    def _stopped_short(self) -> bool:
        """Whether a limit was exceeded, which other texts may have caused; now it is alone.

        Raises:
            InvalidInput: it is the text's own doing.
        """
        if not _exhausted(self._state):
            return False
        if self._alone or _too_many_items(self._state):
            self._language.raise_if_exhausted(self._state)
        self._alone = self._language.exhausted = True
        self._state = self._language.retraced(self._tokens)
        return True

    def _take(self, token: TokenId) -> None:
        self._tokens.append(token)
        vocabulary = self._language.vocabulary
        if self._standing != "open" or not vocabulary.has(token):
            self._standing = "astray"
        elif token in vocabulary.eos_token_ids:
            self._standing = "fulfilled"
        else:
            self._state.consume_token(token)
            self._stopped_short()
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


class Language:
    """A compiled constraint.

    Copies of ``start`` share the lexer's states, so that a text finds much of its way known. What
    the others found counts against the limits too; :meth:`retraced` is then alone. ``exhausted``
    says that this has happened, as it would to every further text.
    """

    def __init__(self, constraint: Constraint, vocabulary: _Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.exhausted = False
        self._constraint = constraint
        self._grammar = grammar(constraint)
        if not endures_trial(self._grammar):
            raise refused(constraint, "it is too complex: it takes too long or nests too deep")
        begun = thread_time()
        self.start = self._compiled(LEXER_FUEL)
        self._compile_seconds = thread_time() - begun
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
            InvalidInput: that exceeds the limits as well, or takes too long.
        """
        too_long = self._too_complex("other texts of it take all that it may take")
        if self._compile_seconds > RETRACE_SECONDS:
            raise too_long
        end = thread_time() + RETRACE_SECONDS
        state = self._compiled(2 * LEXER_FUEL)
        for token in tokens:
            if thread_time() > end:
                raise too_long
            self.vocabulary.mask(state)
            state.consume_token(token)
        self.raise_if_exhausted(state)
        return state

    def raise_if_exhausted(self, state: LLMatcher) -> None:
        """Raise :class:`InvalidInput` if the limits stopped a computation."""
        if _exhausted(state):
            raise self._too_complex(explained(self._constraint, state.get_error()))

    def _too_complex(self, reason: str) -> InvalidInput:
        return refused(self._constraint, f"it is too complex: {reason}")

    def _compiled(self, lexer_fuel: int) -> LLMatcher:
        return LLMatcher(
            self.vocabulary.tokenizer, self._grammar, log_level=0, limits=limits(lexer_fuel)
        )


def _exhausted(state: LLMatcher) -> bool:
    """Whether a limit was exceeded, which is no fault of the text."""
    error = state.get_error()
    at_fault = error.startswith("NoExtensionBias") or "doesn't satisfy the grammar" in error
    return state.is_error() and not at_fault


def _too_many_items(state: LLMatcher) -> bool:
    """Whether it was a limit of the parser, of which each text has its own."""
    error = state.get_error()
    return "Too many items" in error or "Current row has" in error


def _unless_refused(found: Language | InvalidInput) -> Language:
    if isinstance(found, InvalidInput):
        raise _again(found)
    return found


def _again(refusal: InvalidInput) -> InvalidInput:
    """The same without where it came from, and all that is held by that."""
    return InvalidInput(*refusal.facts["errors"])


def _bytes(tokenizer: Tokenizer, token: TokenId) -> bytes:
    return tokenizer.partial(token) or tokenizer.text_of(token).encode()


def _packed(allowed: NDArray[np.bool_]) -> Mask:
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    words = np.packbits(padded, bitorder="little").view("<i4").astype(np.int32)
    words.flags.writeable = False
    return words


def _done(item: Item) -> "Future[Item]":
    future: Future[Item] = Future()
    future.set_result(item)
    return future
