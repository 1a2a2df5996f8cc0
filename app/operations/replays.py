"""What of a log can be replayed, and what is known of it from before."""

import asyncio
from collections.abc import Iterable, Sequence

from msgspec import Struct

from domain.baseline import Baseline, Covered
from domain.chain import Row, blobs_digest, row_hash
from domain.errors import ModelUnavailable, NotComparable, NotFound, StateNotFound
from domain.events import Recorded, StateCreated, decode
from domain.fingerprint import Fingerprint
from domain.form import compare_form
from domain.ids import ModelId, Position, StateId
from domain.log_errors import ChainBroken, EventErased
from domain.models import LanguageModel, Models
from domain.ports import LogReader
from domain.replay import Passage, occurrences, passages
from domain.teacher_forcing import Before, before_in_log
from domain.transfer import identity


class Skipped(Exception):
    """A state cannot be replayed; the message says why."""


class Replay(Struct, frozen=True, kw_only=True):
    """A state to be replayed: its passages, and what is known of each place of each of them.

    ``numerics`` are the fingerprints that this is known by; ``covered`` says what a baseline of
    it is of.
    """

    covered: Covered
    model: LanguageModel
    passages: tuple[Passage, ...]
    before: tuple[Sequence[Before], ...]
    numerics: tuple[Fingerprint, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in all passages."""
        return sum(len(passage.tokens) for passage in self.passages)

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows of logits that are known from before."""
        return sum(len(one.reference.row or b"") for line in self.before for one in line)


class Replays:
    """Finds out of states what can be replayed of what they went through up to ``until``.

    What is known from before is what the log says, or what a baseline does. Without a
    ``model_id`` each state is replayed with its own model.
    """

    def __init__(
        self,
        log: LogReader,
        models: Models,
        *,
        until: Position,
        model_id: ModelId | None = None,
        baseline: Baseline | None = None,
    ) -> None:
        self._log = log
        self._models = models
        self._until = until
        self._model_id = model_id
        self._baseline = baseline

    async def of(self, state_id: StateId) -> Replay | None:
        """What to replay of a state; nothing of one that began later.

        Raises:
            Skipped: it cannot be replayed; says why.
            StateNotFound: there is no such state.
            NotComparable: the baseline does not have the places that the state has.
            LogError: the log is not sound.
        """
        known = self._baseline.covered(state_id) if self._baseline else None
        rows = await self._log.state_rows(state_id, until=known.version if known else None)
        if not rows:
            raise StateNotFound(state_id)
        events = await asyncio.to_thread(self._read, rows)
        if not events:
            return None
        last = identity(events[-1].row, self._log.log_id)
        if known and (known.version, known.identity) != (events[-1].version, last):
            raise NotComparable(
                f"the baseline is of another history: version {known.version} of state"
                f" {state_id!r} is there {known.identity[1]} of log {known.identity[0]}, and here"
                f" {last[1]} of log {last[0]}"
            )
        asked = await asyncio.to_thread(passages_said, events)
        model = await self._model(events[0])
        await asyncio.to_thread(_check_form, events, model)
        if self._baseline and known:
            before = await asyncio.to_thread(_told_by, self._baseline, state_id, asked)
            numerics: tuple[Fingerprint, ...] = (known.fingerprint,)
        else:
            before, numerics = await self._told_by_log(events, asked)
        covered = Covered(
            state_id=state_id,
            version=events[-1].version,
            identity=last,
            model_id=model.model_id,
            fingerprint=model.fingerprint,
        )
        return Replay(
            covered=covered, model=model, passages=asked, before=before, numerics=numerics
        )

    def _read(self, rows: Iterable[Row]) -> list[Recorded]:
        events = []
        for row in rows:
            if row.position > self._until:
                break
            if row_hash(row) != row.hash:
                raise ChainBroken(row.position, "the row does not match its hash")
            try:
                events.append(decode(row))
            except EventErased as error:
                raise Skipped(f"it cannot be read: {error}") from error
        return events

    async def _model(self, first: Recorded) -> LanguageModel:
        assert isinstance(first.event, StateCreated)
        try:
            model = await self._models.get(self._model_id or first.event.model_id)
        except (NotFound, ModelUnavailable) as error:
            raise Skipped(str(error)) from error
        if model.model_type != "causal_lm":
            raise Skipped(f"{model.model_id} says nothing of tokens: it is a {model.model_type}")
        return model

    async def _told_by_log(
        self, events: Iterable[Recorded], asked: Iterable[Passage]
    ) -> tuple[tuple[list[Before], ...], tuple[Fingerprint, ...]]:
        logits: dict[Position, tuple[bytes, ...]] = {}
        for recorded in events:
            stored = getattr(recorded.event, "stored_logits", None)
            blobs = await self._log.logits(recorded.position) if stored else ()
            if stored and blobs:  # else they were let go of
                if await asyncio.to_thread(blobs_digest, blobs) != stored.digest:
                    reason = "the logits beside it are not those that it names"
                    raise ChainBroken(recorded.position, reason)
                logits[recorded.position] = blobs
        named = {claim.recorded.row.fingerprint for one in asked for claim in one.claims}
        found = [await self._log.fingerprint(name) for name in sorted(filter(None, named))]
        before = tuple(before_in_log(passage, logits) for passage in asked)
        return before, tuple(one for one in found if one is not None)


def passages_said(events: Sequence[Recorded]) -> tuple[Passage, ...]:
    """The passages of a state with tokens that a model said something about.

    Raises:
        Skipped: there are none.
    """
    kinds = {one.event.model_type for one in events if isinstance(one.event, StateCreated)}
    for kind in kinds - {"causal_lm"}:
        raise Skipped(f"nothing was said of its tokens: it is a {kind} state")
    found = tuple(passage for passage in passages(occurrences(events)) if passage.claims)
    if not found:
        raise Skipped("no model said anything about its tokens")
    return found


def _check_form(events: Iterable[Recorded], model: LanguageModel) -> None:
    for recorded in events:
        found = compare_form(recorded, model.vocabulary_size, model.context_size)
        if found is not None:
            raise Skipped(
                f"the model cannot be asked about it: at position {recorded.position}"
                f" {found.field} is {found.expected}, possible is {found.actual}"
            )


def _told_by(
    baseline: Baseline, state_id: StateId, asked: Iterable[Passage]
) -> tuple[list[Before], ...]:
    """What a baseline says of each place; it must have them all, and no others."""
    known = {one.place: one for one in baseline.read(state_id)}
    found = []
    for passage in asked:
        named = before_in_log(passage, {})
        lacking = next((one for one in named if one.place not in known), None)
        if lacking is not None:
            raise NotComparable(f"the baseline lacks {_in_words(state_id, lacking)}")
        found.append([known.pop(one.place) for one in named])
    for one in known.values():
        raise NotComparable(f"the log lacks {_in_words(state_id, one)} of the baseline")
    return tuple(found)


def _in_words(state_id: StateId, one: Before) -> str:
    return (
        f"token {one.reference.token_id} at token position {one.token_position} of"
        f" {one.run}version {one.version}, state {state_id}"
    )
