"""Re-executing a log to hold it against what it says. Changes nothing.

What is compared is compared in threads: whoever else is served does not wait for it.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import Struct

from domain import compare, consistency
from domain.chain import Head, Row, blobs_digest, follow, row_hash
from domain.compare import Evidence
from domain.errors import (
    ChainBroken,
    InvalidInput,
    LogError,
    ModelUnavailable,
    NotFound,
    StateNotFound,
    UnknownEvent,
)
from domain.events import ContinuationsGenerated, Recorded, StateCreated, TokensGenerated, decode
from domain.fingerprint import Fingerprint
from domain.form import compare_form
from domain.ids import ModelId, Position, StateId, Version
from domain.origin import parents_of
from domain.ports import LanguageModel, LogReader, Models
from domain.replay import (
    Divergence,
    Drift,
    Occurrence,
    Passage,
    Report,
    divergence,
    occurrences,
    passages,
)
from domain.state import State, evolve
from domain.work import Scored

PAGE = 1000

PASSAGES = 256
"""Texts that a model is asked about together: what they begin with in common is computed once."""

Progress = Callable[[int, int], None]


class Request(Struct, frozen=True, kw_only=True):
    """What to verify: some states, or the whole log; against a remembered head if given.

    Only a remembered head can show that the newest rows were removed.
    """

    state_ids: tuple[StateId, ...] | None = None
    head: Head | None = None


class Verifier:
    """One verification of one log. ``progress`` is told states done and states in all."""

    def __init__(
        self, log: LogReader, models: Models, *, progress: Progress = lambda done, total: None
    ) -> None:
        self._log = log
        self._models = models
        self._progress = progress
        self._divergences: list[Divergence] = []
        self._drifts: list[Drift] = []
        self._notes: list[str] = []
        self._begun: dict[StateId, Position] = {}
        self._events = 0
        self._recomputed = 0
        self._reused = 0

    async def run(self, request: Request) -> Report:
        """Verify and report.

        Raises:
            StateNotFound: a state that was asked for does not exist.
        """
        head = await self._check_chain(request.head)
        if request.state_ids is None:
            await self._check_list()
            state_ids = tuple(self._begun)
        else:
            state_ids = request.state_ids
        for done, state_id in enumerate(state_ids):
            self._progress(done, len(state_ids))
            await self._check_state(state_id)
        self._progress(len(state_ids), len(state_ids))
        unverified = self._drifts or self._notes
        return Report(
            result="divergent" if self._divergences else ("unverified" if unverified else "equal"),
            head={"position": head.position, "hash": head.hash.hex()},
            events_checked=self._events,
            states_checked=len(state_ids),
            tokens_recomputed=self._recomputed,
            tokens_reused=self._reused,
            divergences=tuple(self._divergences),
            drifts=tuple(self._drifts),
            notes=tuple(self._notes),
        )

    async def _check_chain(self, remembered: Head | None) -> Head:
        """Walk all rows; after a break go on from the broken row, to name the next one too."""
        head = await self._log.genesis()
        found = remembered is None or remembered == head
        while rows := await self._log.rows(after=head.position, limit=PAGE):
            heads = await asyncio.to_thread(self._follow, head, rows)
            head, found = heads[-1], found or remembered in heads
        if not found and remembered is not None:
            self._divergences.append(
                Divergence(
                    position=remembered.position,
                    state_id=None,
                    version=None,
                    field="head",
                    expected=remembered.hash.hex(),
                    actual="not in the log: rows were changed or removed",
                )
            )
        return head

    def _follow(self, head: Head, rows: Iterable[Row]) -> list[Head]:
        """The heads after ``head``, one for each row."""
        heads = []
        for row in rows:
            try:
                head = follow(head, row)
            except ChainBroken as error:
                self._broken(row, "hash", row.hash.hex(), f"{row_hash(row).hex()}: {error}")
                head = Head(row.position, row.hash)
            if row.version is None or row.version < 1:
                self._broken(row, "version", row.version, "an event has a version from 1 on")
            if row.at_version is not None:
                self._broken(row, "at_version", row.at_version, "it changed its state")
            self._begun.setdefault(row.state_id, row.position)
            heads.append(head)
        return heads

    def _broken(self, row: Row, field: str, expected: Any, actual: str) -> None:
        self._divergences.append(
            Divergence(
                position=row.position,
                state_id=row.state_id,
                version=row.version,
                field=field,
                expected=expected,
                actual=actual,
            )
        )

    async def _check_list(self) -> None:
        """The states are those of the events: the list beside them must not hide one."""
        listed = set(await self._log.state_ids())
        self._divergences += [
            Divergence(
                position=position,
                state_id=state_id,
                version=None,
                field="states",
                expected="a state that has events",
                actual="not among the states",
            )
            for state_id, position in self._begun.items()
            if state_id not in listed
        ]

    async def _check_state(self, state_id: StateId) -> None:
        rows = await self._log.state_rows(state_id)
        if state_id not in self._begun:
            raise StateNotFound(state_id)
        events = await asyncio.to_thread(self._readable, rows)
        self._events += len(rows)
        if not events or not isinstance(events[0].event, StateCreated):
            return
        for recorded in events:
            await self._check_blobs(recorded)
        await self._check_origin(events[0], events[0].event)
        if events[0].row.fingerprint is not None:
            await self._fingerprint(events[0])
        model = await self._model(events[0].event.model_id)
        if model is None:
            return
        placed = await asyncio.to_thread(lambda: list(occurrences(events)))
        placed = placed[: await self._count_executable(events, model)]
        await asyncio.to_thread(self._check_consistency, placed, model)
        asked = await asyncio.to_thread(passages, placed)
        scored = await self._execute(asked, model)
        evidence = await asyncio.to_thread(compare.by_event, scored)
        for occurrence in placed:
            if (found := evidence.get(occurrence.recorded.position)) is not None:
                await self._check_evidence(occurrence, found, model)

    def _readable(self, rows: Iterable[Row]) -> list[Recorded]:
        """The events up to the first that cannot be read or cannot have happened."""
        events: list[Recorded] = []
        state: State | None = None
        for row in rows:
            try:
                recorded = decode(row)
                if events and row.position < events[-1].position:
                    raise UnknownEvent(row.position, "recorded before the version it follows")
                state = evolve(state, recorded)
            except LogError as error:
                expected = f"an event that can follow version {len(events)}"
                self._broken(row, "event", expected, str(error))
                break
            events.append(recorded)
        return events

    async def _count_executable(self, events: Sequence[Recorded], model: LanguageModel) -> int:
        """How many events come before the first that the model cannot be asked about."""
        size, context = model.vocabulary_size, model.context_size
        for index, recorded in enumerate(events):
            found = await asyncio.to_thread(compare_form, recorded, size, context)
            found = found or await self._compare_constraint(recorded, model)
            if found is not None:
                self._diverges(found)
                return index
        return len(events)

    async def _compare_constraint(
        self, recorded: Recorded, model: LanguageModel
    ) -> Divergence | None:
        """Whether the constraint of a generation is one that a text can be held to."""
        event = recorded.event
        if not isinstance(event, TokensGenerated | ContinuationsGenerated):
            return None
        constraint = event.parameters.constraint
        if constraint is None:
            return None
        try:
            await model.check_constraint(constraint)
        except InvalidInput as error:
            return divergence(recorded, "parameters.constraint", constraint.text, str(error))
        return None

    async def _check_blobs(self, recorded: Recorded) -> None:
        stored = getattr(recorded.event, "stored_logits", None)
        if stored is not None:
            blobs = await self._log.logits(recorded.position)
            actual = await asyncio.to_thread(blobs_digest, blobs)
            if actual != stored.digest:
                self._diverges(divergence(recorded, "logits", stored.digest, actual))

    async def _check_origin(self, recorded: Recorded, created: StateCreated) -> None:
        """A fork or a merge must begin with what its parents held."""
        try:
            named = parents_of(created.origin)
            histories = [await self._history(*parent) for parent in named]
            found = await asyncio.to_thread(consistency.compare_origin, recorded, histories)
            self._diverges(found)
        except LogError:
            return  # the parent's own check says so

    async def _history(self, state_id: StateId, until: Version) -> list[Recorded]:
        rows = await self._log.state_rows(state_id, until=until)
        return await asyncio.to_thread(lambda: list(map(decode, rows)))

    async def _model(self, model_id: ModelId) -> LanguageModel | None:
        try:
            return await self._models.get(model_id)
        except (ModelUnavailable, NotFound) as error:
            self._note(f"not re-executed: {error}")
            return None

    def _check_consistency(self, placed: Iterable[Occurrence], model: LanguageModel) -> None:
        eos, size, context = model.eos_token_ids, model.vocabulary_size, model.context_size
        for occurrence in placed:
            self._diverges(consistency.compare_text(occurrence, model.fragment))
            self._diverges(consistency.compare_config(occurrence, size, context))
            self._diverges(consistency.compare_room(occurrence))
            self._diverges(consistency.compare_call(occurrence))
            self._diverges(consistency.compare_slide(occurrence))
            self._diverges(consistency.compare_finish(occurrence, eos, model.fulfils))
            self._diverges(consistency.compare_storage(occurrence))

    async def _execute(
        self, asked: Sequence[Passage], model: LanguageModel
    ) -> list[tuple[Passage, Scored]]:
        """Compute passages anew, some at a time, without anything that was computed before."""
        found: list[tuple[Passage, Scored]] = []
        for begin in range(0, len(asked), PASSAGES):
            found += await self._score(asked[begin : begin + PASSAGES], model)
        self._recomputed += sum(scored.tokens_computed for _, scored in found)
        self._reused += sum(scored.tokens_reused for _, scored in found)
        return found

    async def _score(
        self, asked: Sequence[Passage], model: LanguageModel
    ) -> list[tuple[Passage, Scored]]:
        """What comes out for each passage; one that could not have been drawn is a divergence."""
        try:
            scored = await model.score([passage.request() for passage in asked], private=True)
        except InvalidInput as error:
            apart = asked if len(asked) > 1 else asked[0].apart()
            if len(apart) > 1:
                return [pair for one in apart for pair in await self._score([one], model)]
            for claim in apart[0].claims:
                found = divergence(claim.recorded, "parameters", "allow a token", str(error))
                self._diverges(found)
            return []
        return list(zip(asked, scored, strict=True))

    async def _check_evidence(
        self, occurrence: Occurrence, evidence: Evidence, model: LanguageModel
    ) -> None:
        fingerprint = await self._fingerprint(occurrence.recorded)
        if fingerprint is None:
            return
        eos = model.eos_token_ids
        if not fingerprint.deterministic:
            self._note("some events were made without the numerics contract")
        if fingerprint.deterministic and fingerprint.id == model.fingerprint.id:
            self._diverges(await asyncio.to_thread(compare.compare, occurrence, evidence, eos))
        else:
            different = compare.differences(fingerprint, model.fingerprint)
            self._drifts.append(
                await asyncio.to_thread(compare.drift, occurrence, evidence, eos, different)
            )

    async def _fingerprint(self, recorded: Recorded) -> Fingerprint | None:
        """The fingerprint an event names; one that is not there or not sound is a divergence."""
        name = recorded.row.fingerprint
        found = None if name is None else await self._log.fingerprint(name)
        if found is not None and found.is_sound():
            return found
        actual = None if found is None else found.document
        self._diverges(divergence(recorded, "fingerprint", name, actual))
        return None

    def _diverges(self, found: Divergence | None) -> None:
        if found is not None:
            self._divergences.append(found)

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)


def remembered_head(text: str) -> Head:
    """A head as it is written down: ``position:hash``, the hash in hexadecimal.

    Raises:
        ValueError: it is not that.
    """
    position, _, digest = text.partition(":")
    head = Head(Position(int(position)), bytes.fromhex(digest))
    if len(head.hash) != hashlib.sha256().digest_size:
        raise ValueError("the hash is not that of SHA-256")
    return head
