"""Re-executing a log to hold it against what it says. Changes nothing in it.

It is worked through in windows of some events: the chain is followed, and what states did in the
window is computed anew, all of it together. A window that is done is progress: the mark of what was
found equal moves behind it. What is compared is compared in threads: whoever else is served does
not wait for it.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final

import msgspec
from msgspec import Struct

from app.operations.verification.chain import Chain, broken
from app.operations.verification.execution import Execution
from app.operations.verification.findings import Findings
from app.operations.verification.states import NAMED, History, Seen, States
from domain import compare
from domain.chain import Head, legible_row
from domain.content import Alternative
from domain.errors import ModelUnavailable, NotFound, StateNotFound, invalid
from domain.events import Recorded
from domain.ids import Position, StateId, TokenId, Version
from domain.log_errors import LogError
from domain.models import Classifier, LanguageModel, Models
from domain.ports import LogReader
from domain.report import Differences, Divergence, Mark, Marks, Progress, Range, Report
from domain.state import Live

WINDOW_EVENTS: Final = 1000
WINDOW_BYTES: Final = 32 << 20
"""What a window holds at most: events, and bytes of what they say."""

LAST: Final = 2**63 - 1
"""The largest position that there can be."""


class Request(Struct, frozen=True, kw_only=True):
    """What to verify: some states, or the whole log; against a remembered head if given.

    Only events after one position, and up to and with another; or those after the mark of what was
    verified before. Only a remembered head can show that the newest rows were removed.
    """

    state_ids: tuple[StateId, ...] | None = None
    after: Position = Position(0)
    until: Position | None = None
    since_verified: bool = False
    head: Head | None = None


class Verifier:
    """One verification of one log.

    ``progress`` is told how far it is, ``seen`` of every state. With ``marks``, it moves the mark
    of how far the log was found equal; a divergence before that takes the mark away.
    """

    def __init__(
        self,
        log: LogReader,
        models: Models,
        *,
        marks: Marks | None = None,
        progress: Callable[[Progress], None] = lambda progress: None,
        seen: Seen = lambda state_id, erased: None,
    ) -> None:
        self._log = log
        self._models = models
        self._marks = marks
        self._progress = progress
        self._seen = seen
        self._findings = Findings()
        self._execution = Execution(log, self._findings, told=self._tell)
        self._mark: Mark | None = None
        self._done = self._total = 0

    async def check(self, request: Request) -> None:
        """Find out early whether what is asked for is there.

        Raises:
            StateNotFound: a state is not.
            InvalidInput: the log ends before the position to begin after.
        """
        newest = await self._log.head()
        if request.after > newest.position:
            raise invalid("after", f"must not be beyond the log, which ends at {newest.position}")
        for state_id in request.state_ids or ():
            if not await self._log.state_rows(state_id, limit=1):
                raise StateNotFound(state_id)

    async def run(self, request: Request) -> Report:
        """Verify and report.

        Raises:
            StateNotFound, InvalidInput: what was asked for is not there; see :meth:`check`.
        """
        await self.check(request)
        await self._load_mark()
        tiles = await self._log.tiles(every=True)  # of no event after the newest
        newest = await self._log.head()
        begin, until = await self._range(request, newest)
        self._total = min(until - begin.position, await self._log.size())
        await self._check_head(request.head)
        for row in await self._log.rows_before_first(limit=WINDOW_EVENTS):
            self._findings.diverges(broken(row, "position", "from 1 on", row.position))
        chain = Chain(begin, tiles, self._findings)
        states = States(
            self._log,
            self._models,
            self._execution,
            self._findings,
            after=begin.position,
            seen=self._seen,
        )
        at_end = until == newest.position
        await self._work(request, chain, states, until, at_end=at_end)
        if states.released:
            count = states.released
            self._findings.note(f"the stored logits of {count} events are not there any more")
        return self._report(Range(after=begin.position, until=until), chain.head, states)

    def _report(self, span: Range, head: Head, states: States) -> Report:
        findings = self._findings
        return Report(
            result=findings.result,
            head={"position": head.position, "hash": head.hash.hex()},
            range=span,
            events_checked=states.events,
            analyses=states.analyses.checked,
            states_checked=states.states,
            imported=states.imported,
            imported_from=tuple(states.imported_from),
            erased=len(states.erased),
            erased_states=tuple(islice(states.erased, NAMED)),
            tokens_recomputed=self._execution.recomputed,
            tokens_reused=self._execution.reused,
            divergences_found=findings.divergences_found,
            divergences=tuple(findings.divergences),
            drifts_found=findings.drifts_found,
            drifts=tuple(findings.drifts),
            notes=tuple(findings.notes),
        )

    # where to begin

    async def _load_mark(self) -> None:
        """Find the mark of this log. Its row must be there: else rows were changed or removed."""
        mark = await self._marks.load() if self._marks else None
        if mark is None or mark.log_id != self._log.log_id:
            return
        self._mark = mark
        if not await self._holds(mark.position, mark.hash):
            self._misses(mark.position, mark.hash)
            self._marks = None  # it stays as it is: it is evidence

    async def _range(self, request: Request, newest: Head) -> tuple[Head, Position]:
        """The head to begin after, and the position to end with."""
        until = newest.position if request.until is None else request.until
        until = min(until, newest.position)
        if request.since_verified:
            mark = await self._usable_mark()
            return (mark or await self._log.genesis()), until
        if request.after == 0:
            return await self._log.genesis(), until
        if request.after == newest.position:
            return newest, newest.position
        (row,) = await self._log.rows(after=Position(request.after - 1), limit=1)
        if row.position == request.after:
            return Head(row.position, row.hash), until
        return Head(request.after, row.previous_hash), until

    async def _usable_mark(self) -> Head | None:
        """The head up to which the log was found equal, if that still says something."""
        mark = self._mark
        reason = "there is none" if mark is None else await self._unusable(mark)
        if mark is None or reason:
            self._mark = None
            self._findings.note(f"no verified mark is used, all is verified: {reason}")
            return None
        self._execution.used |= mark.fingerprints
        if mark.position:
            self._findings.note(
                f"events up to {mark.position} were not re-executed: the mark says they were equal"
            )
        return Head(mark.position, bytes.fromhex(mark.hash))

    async def _unusable(self, mark: Mark) -> str | None:
        """Why a mark of this log says nothing any more, if so."""
        if not await self._holds(mark.position, mark.hash):
            return f"position {mark.position} is not in the log as it was then"
        for model_id, fingerprint in mark.fingerprints.items():
            try:
                model = await self._models.get(model_id)
            except (ModelUnavailable, NotFound) as error:
                return str(error)
            if model.fingerprint.id != fingerprint:
                return f"it was made under another fingerprint of {model_id}"
        return None

    async def _holds(self, position: Position, digest: str) -> bool:
        """Whether a row, or the genesis, is there with this hash."""
        if position == 0:
            return (await self._log.genesis()).hash.hex() == digest
        if not 0 < position <= LAST:
            return False
        rows = await self._log.rows(after=Position(position - 1), limit=1)
        return [(row.position, row.hash.hex()) for row in rows] == [(position, digest)]

    async def _check_head(self, head: Head | None) -> None:
        if head is not None and not await self._holds(head.position, head.hash.hex()):
            self._misses(head.position, head.hash.hex())

    def _misses(self, position: Position, digest: str) -> None:
        self._findings.diverges(
            Divergence(
                position=position,
                state_id=None,
                version=None,
                field="head",
                expected=digest,
                actual="not in the log: rows were changed or removed",
            )
        )

    # window after window

    async def _work(
        self, request: Request, chain: Chain, states: States, until: Position, *, at_end: bool
    ) -> None:
        chosen = None if request.state_ids is None else frozenset(request.state_ids)
        whole = chosen is None and (request.since_verified or request.after == 0)
        self._tell()
        while chain.head.position < until:
            rows = await self._log.page(
                after=chain.head.position, limit=WINDOW_EVENTS, max_bytes=WINDOW_BYTES
            )
            rows = [row for row in rows if row.position <= until]
            if not rows:
                break
            await asyncio.to_thread(chain.follow, rows)
            # A row whose state has no legible name belongs to none: the chain said so.
            own = [shown for row in rows if (shown := legible_row(row)).state_id == row.state_id]
            own = own if chosen is None else [row for row in own if row.state_id in chosen]
            histories = await states.check(own) if own else {}
            await self._settle(histories, states)
            if whole:
                await self._move_mark(chain.head)
            self._done += len(rows)
            self._tell()
        chain.finish(at_end=at_end)
        if chosen is None:
            await states.lists.finish(until, states.stopped)
        states.analyses.finish()
        await self._settle({}, states)
        self._total = self._done
        self._tell()

    def _tell(self) -> None:
        self._progress(
            Progress(
                events_done=self._done,
                events_total=max(self._total, self._done),
                tokens=self._execution.recomputed,
            )
        )

    async def _move_mark(self, head: Head) -> None:
        """Keep a mark of what was found equal, unless more was before."""
        if self._marks is None or not self._findings.clean:
            return
        if self._mark is not None and self._mark.position >= head.position:
            return
        self._mark = Mark(
            log_id=self._log.log_id,
            position=head.position,
            hash=head.hash.hex(),
            fingerprints=dict(self._execution.used),
        )
        try:
            await self._marks.save(self._mark)
        except OSError as error:
            self._findings.note(f"no verified mark could be kept: {error}")
            self._marks = None

    # what was found

    async def _settle(self, histories: Mapping[StateId, History], states: States) -> None:
        """Explain what was found in a window, and list it."""
        found = self._findings.fresh()
        if not found:
            return
        likeliest = await self._alternatives(found, histories, states)
        explained = [
            msgspec.structs.replace(
                one,
                alternatives=likeliest.get(id(one), ()),
                differences=self._differences(one, histories) if one.first else {},
            )
            for one in found
        ]
        earliest = self._findings.settle(explained)
        if self._marks and self._mark and earliest is not None and earliest <= self._mark.position:
            self._mark = None
            await self._marks.forget()

    def _differences(self, found: Divergence, histories: Mapping[StateId, History]) -> Differences:
        recorded, model = _event(found, histories)
        if recorded is None or model is None:
            return {}
        return self._execution.differences(recorded, model)

    async def _alternatives(
        self,
        found: Sequence[Divergence],
        histories: Mapping[StateId, History],
        states: States,
    ) -> dict[int, tuple[Alternative, ...]]:
        """The likeliest tokens where divergences name one, for the first such of each state."""
        texts: dict[str, tuple[LanguageModel, dict[int, tuple[TokenId, ...]]]] = {}
        for one in self._findings.to_explain(found):
            recorded, model = _event(one, histories)
            if recorded is None or model is None or model.model_type != "causal_lm":
                continue
            text = await _text_before(one, recorded, states)
            if text and len(text) < model.context_size:
                texts.setdefault(model.model_id, (model, {}))[1][id(one)] = text
        likeliest: dict[int, tuple[Alternative, ...]] = {}
        for model, asked in texts.values():
            answers = await self._execution.alternatives(list(asked.values()), model)
            likeliest |= dict(zip(asked, answers, strict=True))
        return likeliest


def _event(
    found: Divergence, histories: Mapping[StateId, History]
) -> tuple[Recorded | None, LanguageModel | Classifier | None]:
    """The event that a divergence is about, and the model of its state."""
    history = None if found.state_id is None else histories.get(found.state_id)
    if history is None:
        return None, None
    events = (one for one in history.events if one.position == found.position)
    return next(events, None), history.model


async def _text_before(
    found: Divergence, recorded: Recorded, states: States
) -> tuple[TokenId, ...] | None:
    try:
        before = await states.courses.at(recorded.state_id, Version(recorded.version - 1))
    except LogError:
        return None
    held = before.state.content.tokens if isinstance(before.state, Live) else ()
    return compare.text_before(found, recorded, held)


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
