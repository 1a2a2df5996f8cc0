"""What states did in a window of the log: checked by its own words, and cut into passages."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from app.operations.verification.analyses import Analyses
from app.operations.verification.beside import Beside
from app.operations.verification.chain import broken, compare_source, logs_of
from app.operations.verification.courses import Courses
from app.operations.verification.execution import Execution
from app.operations.verification.findings import Findings
from app.operations.verification.lists import Lists
from domain import consistency
from domain.chain import Row
from domain.config import Constraint
from domain.errors import InvalidInput, ModelUnavailable, NotFound
from domain.events import (
    ANALYZED,
    ERASED,
    ContextSlid,
    ContinuationsGenerated,
    Recorded,
    StateCreated,
    TextForwarded,
    TokensGenerated,
    decode,
    misnumbered,
)
from domain.form import compare_form
from domain.ids import ModelId, Position, StateId, Version
from domain.log_errors import EventErased, LogError, UnknownEvent
from domain.models import Classifier, LanguageModel, Models
from domain.origin import parents_of
from domain.ports import LogReader
from domain.replay import BEGINNING, Claiming, Course, Occurrence, Passage, passages
from domain.report import Divergence, Standing, divergence
from domain.seals import check_seal
from domain.state import Deleted, Live

NAMED: Final = 1000
"""Erased states, and logs that events came from, that a report names."""

Seen = Callable[[StateId, bool], None]
"""Told of each state that is verified, and whether it is erased."""


class History(Struct, kw_only=True):
    """What happened to one state in a window, after its ``course`` up to there.

    ``changes`` are the rows but those of ``analyses``. ``events`` are those changes that can be
    read, and of these ``possible`` the ones that can have happened; ``sealed`` the rows from the
    first on that there is no key to. ``following`` is the event after the window, where it matters.
    """

    state_id: StateId
    rows: Sequence[Row]
    changes: Sequence[Row]
    analyses: Sequence[Row]
    standing: Standing
    course: Course = BEGINNING
    events: list[Recorded] = []
    possible: list[Recorded] = []
    following: Recorded | None = None
    sealed: Sequence[Row] = ()
    model: LanguageModel | Classifier | None = None
    erased: bool = False


class States:
    """The states of one verification, window after window. ``after``: where it began."""

    def __init__(
        self,
        log: LogReader,
        models: Models,
        execution: Execution,
        findings: Findings,
        *,
        after: Position,
        seen: Seen,
    ) -> None:
        self._log = log
        self._models = models
        self._execution = execution
        self._findings = findings
        self._after = after
        self._seen = seen
        self.courses = Courses(log)
        self.lists = Lists(log, findings, after=after)
        self._beside = Beside(log, execution, findings, self.courses)
        # Of these nothing further can be said: something about them could not have happened.
        self.stopped: set[StateId] = set()
        self.analyses = Analyses(
            log, models, execution, findings, self.courses, stopped=self.stopped
        )
        # Of these there is no key to what they hold: how far each was followed by its versions.
        self._sealed: dict[StateId, Version] = {}
        self._wrong: dict[tuple[ModelId, Constraint], str | None] = {}
        self.events = self.states = self.imported = 0
        self.imported_from: dict[str, None] = {}
        self.erased: dict[StateId, None] = {}

    @property
    def released(self) -> int:
        """Number of events whose stored logits are not there any more."""
        return self._beside.released

    async def check(self, rows: Sequence[Row]) -> dict[StateId, History]:
        """Check and re-execute what happened in a window; rows are in the order of the log."""
        grouped: defaultdict[StateId, list[Row]] = defaultdict(list)
        for row in rows:
            grouped[row.state_id].append(row)
        standings = await self._log.standings(list(grouped), after=self._after)
        histories = {
            state_id: _history(state_id, own, standings[state_id])
            for state_id, own in grouped.items()
        }
        for state_id in grouped.keys() & self._sealed.keys():
            histories[state_id].sealed = histories[state_id].changes
        going = [one for one in histories.values() if one.state_id not in self.stopped]
        await asyncio.to_thread(self._read, going)
        for history in going:
            await self._equip(history)
        await self._execution.learn(
            recorded.row.fingerprint for history in going for recorded in history.events
        )
        cut = await asyncio.to_thread(self._place, going)
        for history in going:
            await self._beside.check(history.possible)
        for model, asked in cut:
            await self._execution.execute(asked, model)
        for history in histories.values():
            self._check_sealed(history)
            history.erased |= await self.analyses.check(history.analyses, history.standing)
            self.lists.take(history.rows, history.standing, next(iter(history.events), None))
            self._count(history)
        return histories

    def _count(self, history: History) -> None:
        self.events += len(history.rows)
        for logs in filter(None, map(logs_of, history.rows)):
            self.imported += 1
            if len(self.imported_from) < NAMED:
                self.imported_from |= dict.fromkeys(logs)
        if history.erased:
            self.erased[history.state_id] = None
        if history.standing.first == history.rows[0].position:
            self.states += 1
            self._seen(history.state_id, history.erased)

    # reading

    def _read(self, histories: Sequence[History]) -> None:
        """Read the events up to the first that cannot be read."""
        for history in histories:
            for row in history.rows:
                self._findings.diverges(None if row.source is None else compare_source(row))
            for index, row in enumerate(history.changes):
                if row.version is None or row.version < 1 or row.type == ANALYZED:
                    self.stopped.add(history.state_id)  # as was said of the row
                    break
                try:
                    check_seal(row, erasable=self._log.erasable)
                    history.events.append(decode(row))
                except EventErased as error:
                    self._cannot_open(history, index, error)
                    break
                except LogError as error:
                    self._cannot_follow(history, row, Version(row.version - 1), error)
                    break

    def _cannot_follow(self, history: History, row: Row, version: Version, error: LogError) -> None:
        """End a state's history before a row."""
        self.stopped.add(history.state_id)
        expected = f"an event that can follow version {version}"
        self._findings.diverges(broken(row, "event", expected, str(error)))

    def _cannot_open(self, history: History, index: int, error: EventErased) -> None:
        """End a state's history before a row for want of a key: it was erased, or keys are lost."""
        row = history.changes[index]
        before = Version((row.version or 1) - 1)
        self.stopped.add(history.state_id)
        history.sealed = history.changes[index:]
        known = self._after or index or history.standing.first != row.position
        self._sealed[history.state_id] = before if known else Version(0)
        if any(one.opened is not None for one in history.changes):  # so there is a key
            history.sealed = ()
            wrong = UnknownEvent(row.position, "sealed, and the key of its state does not open it")
            self._cannot_follow(history, row, before, wrong)
        elif history.standing.type == ERASED:
            history.erased = True
        elif not self._log.has_keys:
            self._findings.not_held("sealed events were not re-executed: their keys are not here")
        else:
            wrong = UnknownEvent(row.position, f"sealed, key missing: {error}")
            self._cannot_follow(history, row, before, wrong)

    def _check_sealed(self, history: History) -> None:
        """Check what can be seen of rows that there is no key to: their order, and how they end."""
        for row in history.sealed:
            reached = self._sealed[row.state_id]
            try:
                check_seal(row, erasable=self._log.erasable)
                if row.version != reached + 1:
                    raise UnknownEvent(row.position, f"it is version {row.version}")
                if not row.sealed:
                    decode(row)
                    if row.version != history.standing.version:
                        raise UnknownEvent(row.position, "newer ones come after an erasure")
            except LogError as error:
                self._cannot_follow(history, row, reached, error)
            self._sealed[row.state_id] = max(reached, Version(row.version or 0))

    async def _equip(self, history: History) -> None:
        """Find what the events of a state are held against: what was before, and its model."""
        if not history.events:
            return
        first, last = history.events[0], history.events[-1]
        before = Version(first.version - 1)
        erased: EventErased | None = None
        try:
            history.course = await self.courses.at(history.state_id, before)
            if isinstance(last.event, ContextSlid):
                rows = await self._log.state_rows(history.state_id, after=last.version, limit=1)
                history.following = decode(rows[0]) if rows else None
        except EventErased as error:
            erased = error
        except LogError as error:
            history.events.clear()
            self._cannot_follow(history, first.row, before, error)
            return
        if erased is not None:  # perhaps since its rows were read
            history.events.clear()
            shut = [msgspec.structs.replace(row, opened=None) for row in history.changes]
            history.changes = shut
            history.standing = await self._standing(history.state_id) or history.standing
            self._cannot_open(history, 0, erased)
            return
        match history.course.state, first.event:
            case (Live(model_id=model_id) | Deleted(model_id=model_id), _) | (
                None,
                StateCreated(model_id=model_id),
            ):
                history.model = await self._model(model_id)
        if history.model is not None and history.model.model_type == "causal_lm":
            await self._check_constraints(history.events, history.model)

    async def _standing(self, state_id: StateId) -> Standing | None:
        """Where a state stands now."""
        found = await self._log.standings([state_id], after=self._after)
        return found.get(state_id)

    async def _model(self, model_id: ModelId) -> LanguageModel | Classifier | None:
        try:
            return await self._models.get(model_id)
        except (ModelUnavailable, NotFound) as error:
            self._findings.not_held(f"not re-executed: {error}")
            return None

    async def _check_constraints(self, events: Sequence[Recorded], model: LanguageModel) -> None:
        """Find out which constraints no text can be held to."""
        for recorded in events:
            constraint = _constraint(recorded)
            if constraint is None or (model.model_id, constraint) in self._wrong:
                continue
            try:
                await model.check_constraint(constraint)
                self._wrong[model.model_id, constraint] = None
            except InvalidInput as error:
                self._wrong[model.model_id, constraint] = str(error)

    # checking

    def _place(self, histories: Sequence[History]) -> list[tuple[LanguageModel, list[Passage]]]:
        """What is to be computed anew for these histories, of each model."""
        wanted = {
            parent
            for history in histories
            for recorded in history.events[:1]
            if isinstance(recorded.event, StateCreated)
            for parent in parents_of(recorded.event.origin)
        }
        cut: dict[ModelId, tuple[LanguageModel, list[Passage]]] = {}
        for history in histories:
            found = passages(self._placed(history, wanted))
            if history.model is not None and history.model.model_type == "causal_lm":
                _, asked = cut.setdefault(history.model.model_id, (history.model, []))
                asked += found
        return list(cut.values())

    def _placed(
        self, history: History, wanted: set[tuple[StateId, Version]]
    ) -> Iterator[Occurrence]:
        """Events that a model can be asked about, each checked in its place.

        What states held at ``wanted`` versions is kept.
        """
        state_id, course, model = history.state_id, history.course, history.model
        events = history.events
        for recorded, following in zip(events, (*events[1:], history.following), strict=False):
            try:
                reached = course.after(recorded)
            except LogError as error:
                self._cannot_follow(history, recorded.row, course.version, error)
                return
            history.possible.append(recorded)
            if model is not None:
                if (found := self._unaskable(recorded, model)) is not None:
                    self._findings.diverges(found)
                    self.stopped.add(state_id)
                    return
                occurrence = course.place(recorded, following)
                self._check_consistency(occurrence, model)
                yield occurrence
            course = reached
            if (state_id, course.version) in wanted:
                self.courses.keep(state_id, course)
        self.courses.keep(state_id, course)

    def _unaskable(
        self, recorded: Recorded, model: LanguageModel | Classifier
    ) -> Divergence | None:
        """Why a model cannot be asked about an event, if so."""
        found = _compare_type(recorded, model)
        size, context = model.vocabulary_size, model.context_size
        scored = model.model_type == "causal_lm"
        found = found or compare_form(recorded, size, context, scored=scored)
        constraint = _constraint(recorded)
        if found is None and constraint is not None:
            wrong = self._wrong[model.model_id, constraint]
            if wrong is not None:
                return divergence(recorded, "parameters.constraint", constraint.text, wrong)
        return found

    def _check_consistency(self, occurrence: Occurrence, model: LanguageModel | Classifier) -> None:
        size, context = model.vocabulary_size, model.context_size
        for found in (
            consistency.compare_text(occurrence, model.fragment),
            consistency.compare_config(occurrence, size, context),
            consistency.compare_room(occurrence),
            consistency.compare_call(occurrence),
            consistency.compare_slide(occurrence),
            consistency.compare_storage(occurrence),
        ):
            self._findings.diverges(found)
        if model.model_type == "causal_lm":
            eos, fulfils = model.eos_token_ids, model.fulfils
            self._findings.diverges(consistency.compare_finish(occurrence, eos, fulfils))


def _history(state_id: StateId, rows: Sequence[Row], standing: Standing) -> History:
    changes: list[Row] = []
    analyses: list[Row] = []
    for row in rows:
        is_analysis = row.type == ANALYZED and not any(misnumbered(row))
        (analyses if is_analysis else changes).append(row)
    return History(
        state_id=state_id, rows=rows, changes=changes, analyses=analyses, standing=standing
    )


def _compare_type(recorded: Recorded, model: LanguageModel | Classifier) -> Divergence | None:
    """Whether a state is of a model of its type, and what happened to it can happen to one."""
    event = recorded.event
    if isinstance(event, StateCreated) and event.model_type != model.model_type:
        return divergence(recorded, "model_type", event.model_type, model.model_type)
    generated = isinstance(event, Claiming) and not isinstance(event, TextForwarded)
    if generated and model.model_type != "causal_lm":
        return divergence(recorded, "type", recorded.row.type, f"no text: {model.model_type}")
    return None


def _constraint(recorded: Recorded) -> Constraint | None:
    event = recorded.event
    if not isinstance(event, TokensGenerated | ContinuationsGenerated):
        return None
    return event.parameters.constraint
