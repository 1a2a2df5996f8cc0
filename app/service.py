"""What every operation stands on: the log, the models, time, chance, and states in memory."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import anyio
from msgspec import Struct

from app.feed import Feeds
from app.jobs import Jobs
from app.turns import Turns
from domain import decide, plan
from domain.config import StateConfig
from domain.errors import (
    IdempotencyKeyReused,
    LogUnavailable,
    StateNotFound,
    VersionConflict,
    VersionNotFound,
)
from domain.events import Recorded, decode
from domain.ids import ModelId, Seed, StateId, Version
from domain.log_errors import EventErased
from domain.models import Classifier, LanguageModel, Models
from domain.ports import Append, EventLog, Idempotency, Provenance, Signer
from domain.report import Marks, Progress, Report
from domain.state import Erased, Live, State, evolve, fold_rows
from domain.work import BeamsFound

MAX_FOLDS: Final = 256

MAX_IMPORTS: Final = 4
"""Files that are taken in one after the other; more than these are refused."""

MAX_LOOKS: Final = 4
"""Questions about the inside of states that are worked on at once; others wait."""

MAX_RESULTS: Final = 16
"""Answers to them that are being drawn, or are large and being sent; more are refused."""


class Call(Struct, frozen=True, kw_only=True):
    """What a request says besides its body: who, which request, and under which conditions."""

    actor: str
    request_id: str
    if_match: Version | None = None
    idempotency: Idempotency | None = None


class Surroundings(Struct, frozen=True, kw_only=True):
    """Time and chance, so that nothing below has to reach for them.

    ``now`` is RFC 3339, UTC, with microseconds.
    """

    now: Callable[[], str]
    new_state_id: Callable[[], StateId]
    fresh_seed: Callable[[], Seed]


class Service:
    """The parts that operations use. ``folds`` are a cache: the truth is in the log."""

    def __init__(
        self,
        log: EventLog,
        models: Models,
        surroundings: Surroundings,
        *,
        default_model: ModelId,
        default_config: StateConfig,
        max_queue: int,
        signer: Signer | None = None,
        marks: Marks | None = None,
    ) -> None:
        self.log = log
        self.signer = signer
        self.models = models
        self.surroundings = surroundings
        self.default_model = default_model
        self.default_config = default_config
        self.turns = Turns(max_queue)
        self.marks = marks
        self.replays: Jobs[Progress, Report] = Jobs("replay", now=surroundings.now)
        self.streams = Turns(max_queue, "streams are open")
        self.followers = Turns(max_queue, "feeds are open")
        self.exports = Turns(max_queue, "exports are being sent")
        self.imports = Turns(MAX_IMPORTS)
        self.questions = Turns(max_queue, "questions are waiting")
        self.looks = asyncio.Semaphore(MAX_LOOKS)
        self.results = Turns(MAX_RESULTS, "large answers are being drawn or sent")
        self.feeds = Feeds(log)
        self._answers = Turns(max_queue)
        self.stopping: set[StateId] = set()
        self.searches: dict[StateId, asyncio.Future[BeamsFound]] = {}
        self._folds: OrderedDict[StateId, State] = OrderedDict()
        # Events of states that were not in memory: what is being read meanwhile may be older.
        self._missed = 0

    async def state(self, state_id: StateId, version: Version | None = None) -> State:
        """A state as it is, or as it was at a version.

        Raises:
            StateNotFound, VersionNotFound: there is no such state or version.
        """
        while (current := self._folds.get(state_id)) is None:
            missed = self._missed
            read = await self._read(state_id)
            if read is None:
                raise StateNotFound(state_id)
            if missed == self._missed:
                self._keep(read)
        if version is None or version == current.version:
            return current
        if not 1 <= version <= current.version:
            raise VersionNotFound(state_id, version, current.version)
        then = fold_rows(await self.log.state_rows(state_id, until=version))
        assert then is not None
        return then

    async def _read(self, state_id: StateId) -> State | None:
        try:
            return fold_rows(await self.log.state_rows(state_id))
        except EventErased:  # just now, between reading its rows and opening them
            return fold_rows(await self.log.state_rows(state_id))

    def in_memory(self) -> Iterator[Live]:
        """The states that are in memory and take operations."""
        return (state for state in self._folds.values() if isinstance(state, Live))

    async def live(self, state_id: StateId, version: Version | None = None) -> Live:
        """A state that takes operations.

        Raises:
            StateNotFound, StateIsDeleted, VersionNotFound: there is none.
        """
        decide.live(await self.state(state_id), state_id)
        return decide.live(await self.state(state_id, version), state_id)

    async def as_it_was(self, state_id: StateId, version: Version | None) -> Live:
        """A state to read: as it is or, also if it was deleted since, as it was at a version.

        Raises:
            StateNotFound, StateIsDeleted, StateIsErased, VersionNotFound: there is none.
        """
        current = await self.state(state_id)
        if version is None or isinstance(current, Erased):
            return decide.live(current, state_id)
        return decide.live(await self.state(state_id, version), state_id)

    async def any_model(self, state: Live) -> LanguageModel | Classifier:
        """The model of a state, which can be asked about all that the state holds.

        Raises:
            ModelNotFound, ModelUnavailable: it cannot be had.
            NotRunnable: it is another one than the state is of.
        """
        model = await self.models.get(state.model_id)
        plan.check_runnable(state, model.model_type, model.vocabulary_size, model.context_size)
        return model

    async def model(self, state: Live) -> LanguageModel:
        """The language model of a state.

        Raises:
            InvalidInput: the state is one of a classifier.
            ModelNotFound, ModelUnavailable, NotRunnable: as for :meth:`any_model`.
        """
        plan.check_language(state)
        model = await self.any_model(state)
        assert model.model_type == "causal_lm"
        return model

    async def event(self, state_id: StateId, version: Version) -> Recorded:
        """The event that led to a version."""
        (row,) = await self.log.state_rows(state_id, after=Version(version - 1), until=version)
        return decode(row)

    async def append(
        self, call: Call, appends: Sequence[Append], *, replaces: bool = False
    ) -> tuple[Recorded, ...]:
        """Record events and keep the states they lead to.

        A caller that is cancelled ends when both are done, and its turn with it. ``replaces``:
        they are what the call's ``Idempotency-Key`` stands for from now on.
        """
        recording = self.log.append(
            appends,
            provenance=self.provenance(call),
            idempotency=call.idempotency,
            replaces=replaces,
        )
        return await self._to_its_end(self._keeping(recording))

    async def erase(self, call: Call, state_ids: Sequence[StateId]) -> tuple[Recorded, ...]:
        """Erase states, on disk and in memory; a caller that is cancelled ends when it is done.

        What runs on any but the first has been told to end.

        Raises:
            LogUnavailable: they may be erased, and are not in memory any more, but their keys are
                not destroyed yet.
        """
        recording = self.log.erase(
            state_ids, provenance=self.provenance(call), idempotency=call.idempotency
        )
        return await self._to_its_end(self._forgetting(state_ids, recording))

    @contextmanager
    def ending(self, state_ids: Sequence[StateId]) -> Iterator[None]:
        """End the generations that run on states, and those that begin on them meanwhile."""
        self.stopping.update(state_ids)
        for state_id in state_ids:
            if searching := self.searches.get(state_id):
                searching.cancel()
        try:
            yield
        finally:
            self.stopping.difference_update(state_ids)

    def provenance(self, call: Call) -> Provenance:
        """Who a call is from, and the time it is recorded at."""
        return Provenance(
            actor=call.actor, request_id=call.request_id, recorded_at=self.surroundings.now()
        )

    async def _to_its_end(
        self, work: Coroutine[Any, Any, tuple[Recorded, ...]]
    ) -> tuple[Recorded, ...]:
        recording = asyncio.ensure_future(work)
        with anyio.CancelScope(shield=True):  # from scopes; what cancels the task alone is awaited
            try:
                await asyncio.shield(recording)
            except asyncio.CancelledError:
                await asyncio.wait((recording,))
                raise
        return recording.result()

    async def _forgetting(
        self, state_ids: Sequence[StateId], erasing: Awaitable[tuple[Recorded, ...]]
    ) -> tuple[Recorded, ...]:
        try:
            recorded = await erasing
        except LogUnavailable:
            await self._forget(state_ids)
            raise
        await self._forget(state_ids)
        return recorded

    async def _forget(self, state_ids: Sequence[StateId]) -> None:
        """Drop what is in memory of states, and what was computed from them."""
        self._missed += 1
        for state_id in state_ids:
            self._folds.pop(state_id, None)
        for state_id in state_ids[1:]:  # what had begun on one since
            await self.turns.idle(state_id)
        await self.models.forget()

    async def _keeping(self, recording: Awaitable[tuple[Recorded, ...]]) -> tuple[Recorded, ...]:
        try:
            recorded = await recording
        except VersionConflict as conflict:
            self._folds.pop(conflict.facts["state_id"], None)
            raise
        for event in recorded:
            if event.row.version is None:  # it leaves its state as it was
                continue
            before = self._folds.get(event.state_id)
            if (before.version if before else 0) == event.version - 1:
                self._keep(evolve(before, event))
            else:
                self._missed += 1
        return recorded

    @asynccontextmanager
    async def answering(self, call: Call) -> AsyncIterator[tuple[Recorded, ...] | None]:
        """What an earlier request with this ``Idempotency-Key`` did, or null to do the work.

        A second request with the key waits for the first.

        Raises:
            IdempotencyKeyReused: the key was used with another body.
        """
        key = call.idempotency
        if key is None:
            yield None
            return
        async with self._answers.turn((key.actor, key.method, key.path, key.key)):
            remembered = await self.log.recall(key)
            if remembered is None:
                yield None
            elif remembered.request_digest == key.request_digest:
                yield remembered.events
            else:
                raise IdempotencyKeyReused(key.key)

    def _keep(self, state: State) -> None:
        known = self._folds.get(state.state_id)
        if known is None or known.version <= state.version:
            self._folds[state.state_id] = state
            self._folds.move_to_end(state.state_id)
        while len(self._folds) > MAX_FOLDS:
            self._folds.popitem(last=False)
