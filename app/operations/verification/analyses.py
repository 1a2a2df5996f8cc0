"""Asking anew what was asked about the inside of states, and comparing what is found."""

import asyncio
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from app.operations.analysis.compute import compute
from app.operations.verification.beside import is_erased
from app.operations.verification.chain import broken
from app.operations.verification.courses import Courses
from app.operations.verification.execution import Execution
from app.operations.verification.findings import Findings
from domain import plan
from domain.analysis.result import FORM, digest
from domain.analysis.tokens import Measured
from domain.chain import Row
from domain.errors import (
    FingerprintChanged,
    ModelUnavailable,
    NotFound,
    Refusal,
    ResultTooLarge,
    StateNotFound,
    VersionNotFound,
)
from domain.events import DELETED, ERASED, Recorded, StateAnalyzed, decode
from domain.ids import ModelId, Position, StateId, Version
from domain.log_errors import EventErased, LogError
from domain.models import Classifier, LanguageModel, Models
from domain.ports import LogReader
from domain.report import Divergence, Standing, divergence
from domain.seals import check_seal
from domain.state import Live

NAMED: Final = 100
"""Analyses of another form that a report names."""

_LAST: Final = Version(2**63 - 1)
"""The largest version that there can be."""


class Recomputing:
    """The materials of an analysis that is verified: states as they were recorded ``before`` it.

    Nothing is used that was computed or recorded of them before. ``asked`` are the models asked.
    """

    private = True

    def __init__(
        self, models: Models, courses: Courses, execution: Execution, *, before: Position
    ) -> None:
        self.asked: set[ModelId] = set()
        self._models = models
        self._courses = courses
        self._execution = execution
        self._before = before

    async def state(self, state_id: StateId, version: Version) -> Live:
        """A state as it was at a version, also of one that was deleted since.

        Raises:
            StateNotFound, VersionNotFound: there was none yet.
            EventErased, UnknownEvent: it cannot be read any more.
        """
        course = await self._courses.at(state_id, min(version, _LAST))
        if course.last is None:
            raise StateNotFound(state_id)
        state = course.state
        if not isinstance(state, Live) or state.version != version:
            raise VersionNotFound(state_id, version, course.version)
        if course.last.position > self._before:
            raise VersionNotFound(state_id, version, Version(version - 1))
        return state

    async def any_model(self, state: Live) -> LanguageModel | Classifier:
        """The model of a state."""
        model = await self._models.get(state.model_id)
        plan.check_runnable(state, model.model_type, model.vocabulary_size, model.context_size)
        self.asked.add(model.model_id)
        self._execution.used[model.model_id] = model.fingerprint.id
        return model

    async def model(self, state: Live) -> LanguageModel:
        """The language model of a state."""
        plan.check_language(state)
        model = await self.any_model(state)
        assert model.model_type == "causal_lm"
        return model

    async def stored(
        self, model: LanguageModel, state: Live, asked: range, top_k: int
    ) -> dict[int, Measured]:
        """Nothing: what was recorded is what is verified."""
        return {}


class Analyses:
    """The analyses of one verification; ``checked`` counts them.

    Of ``stopped`` states something is wrong, or cannot be read.
    """

    def __init__(
        self,
        log: LogReader,
        models: Models,
        execution: Execution,
        findings: Findings,
        courses: Courses,
        *,
        stopped: AbstractSet[StateId],
    ) -> None:
        self._log = log
        self._models = models
        self._execution = execution
        self._findings = findings
        self._courses = courses
        self._stopped = stopped
        self._of_other_forms: list[Position] = []
        self.checked = 0

    async def check(self, rows: Sequence[Row], standing: Standing) -> bool:
        """Check the analyses of one state in a window; whether it turns out to be erased."""
        if not rows:
            return False
        self.checked += len(rows)
        await self._execution.learn(row.fingerprint for row in rows)
        ended = await self._ended(rows[0].state_id, standing)
        erased = False
        for row in rows:
            found = await self._misplaced(row, ended)
            self._findings.diverges(found)
            if found is None:
                erased |= not await self._check(row)
        return erased

    def finish(self) -> None:
        """Say which analyses were not asked again because of the form that their digests are of."""
        if self._of_other_forms:
            found = sorted(self._of_other_forms)
            named = ", ".join(map(str, found[:NAMED])) + (", ..." if len(found) > NAMED else "")
            self._findings.not_held(
                f"analyses recorded in another form than {FORM}, that of this release, were not"
                f" asked again: {len(found)}, at positions {named}; nothing says whether their"
                " digests are right"
            )

    # where it was recorded

    async def _ended(self, state_id: StateId, standing: Standing) -> Row | None:
        """The event with which a state took no more operations."""
        if standing.version is None or standing.type not in (DELETED, ERASED):
            return None
        last = await self._log.state_rows(state_id, after=Version(standing.version - 2))
        return next((row for row in last if row.type in (DELETED, ERASED)), None)

    async def _misplaced(self, row: Row, ended: Row | None) -> Divergence | None:
        """Whether the state was there to be looked at, as it was said to be."""
        at = row.at_version
        assert at is not None
        if ended is not None and ended.position < row.position:
            possible = f"nothing: {ended.type} came before, at position {ended.position}"
            return broken(row, "at_version", at, possible)
        led = await self._log.state_rows(row.state_id, after=Version(at - 1), until=at)
        if not led:
            return broken(row, "at_version", at, "a version that the state has come to")
        if led[0].position > row.position:
            possible = f"an earlier one: it came later, at position {led[0].position}"
            return broken(row, "at_version", at, possible)
        return None

    # what was found

    async def _check(self, row: Row) -> bool:
        """Check one analysis; false if its state turns out to be erased."""
        try:
            check_seal(row, erasable=self._log.erasable)
            await self._compare(decode(row))
        except EventErased:
            return not await self._is_erased(row)
        except LogError as error:
            self._findings.diverges(broken(row, "event", "an analysis", str(error)))
        return True

    async def _is_erased(self, row: Row) -> bool:
        """Why an analysis cannot be read: its state was erased, or keys are lost."""
        if await is_erased(self._log, row.state_id):
            return True
        if self._log.has_keys:
            wrong = "sealed, and the key of its state is missing or does not open it"
            self._findings.diverges(broken(row, "event", "an analysis", wrong))
        else:
            self._findings.not_held("sealed events were not re-executed: their keys are not here")
        return False

    async def _compare(self, recorded: Recorded) -> None:
        """Compute anew what was found, if it was found under the same numerics, in this form.

        Raises:
            EventErased: the state cannot be read.
        """
        if recorded.state_id in self._stopped:  # so its own check said why
            return
        state = await self._state(recorded)
        model = None if state is None else await self._model(state)
        if state is None or model is None:
            return
        numerics, form = self._has_numerics_of(model, recorded), self._has_form(recorded)
        if numerics and form:
            await self._recompute(recorded, state)
            self._execution.told()

    async def _state(self, recorded: Recorded) -> Live | None:
        """The state that was looked at; null if nobody could have looked inside."""
        course = await self._courses.at(recorded.state_id, recorded.version)
        if isinstance(course.state, Live):
            return course.state
        possible = "a version at which the state could be looked at"
        self._findings.diverges(divergence(recorded, "at_version", recorded.version, possible))
        return None

    async def _model(self, state: Live) -> LanguageModel | Classifier | None:
        try:
            return await self._models.get(state.model_id)
        except (ModelUnavailable, NotFound) as error:
            self._findings.not_held(f"not re-executed: {error}")
            return None

    def _has_form(self, recorded: Recorded) -> bool:
        """Whether what was found then was digested as it is now."""
        assert isinstance(recorded.event, StateAnalyzed)
        if recorded.event.form == FORM:
            return True
        self._of_other_forms.append(recorded.position)
        self._findings.held = False
        return False

    def _has_numerics_of(self, model: LanguageModel | Classifier, recorded: Recorded) -> bool:
        """Whether what is found now must have the bits of what was found then."""
        self._findings.diverges(self._execution.compare_fingerprint(recorded))
        fingerprint = self._execution.sound(recorded)
        if fingerprint is None:
            if recorded.row.fingerprint is None:
                self._findings.diverges(divergence(recorded, "fingerprint", None, None))
            return False
        if not fingerprint.deterministic:
            self._findings.not_held("some events were made without the numerics contract")
        elif fingerprint.id != model.fingerprint.id:
            self._findings.not_held(
                "some analyses were made under other numerics: there is no measure of how far what"
                " they found is from what would be found now"
            )
        return fingerprint.deterministic and fingerprint.id == model.fingerprint.id

    async def _recompute(self, recorded: Recorded, state: Live) -> None:
        event = recorded.event
        assert isinstance(event, StateAnalyzed)
        materials = Recomputing(
            self._models, self._courses, self._execution, before=recorded.position
        )
        try:
            result, _ = await compute(materials, state, event.parameters)
        except Refusal as error:
            if _is_of_this_place(error, materials):
                self._findings.not_held(f"not re-executed: {error}")
            else:
                self._findings.diverges(divergence(recorded, "parameters", "an answer", str(error)))
        except EventErased:
            self._findings.note(
                "some analyses compare with what cannot be read any more: they were not re-executed"
            )
        except LogError:
            self._findings.not_held("what some analyses compare with cannot be read")
        else:
            was, found = event.result_digest, await asyncio.to_thread(digest, result)
            if was != found:
                self._findings.diverges(divergence(recorded, "result_digest", was, found))


def _is_of_this_place(error: Refusal, materials: Recomputing) -> bool:
    """Whether an analysis is refused for what is different here, not for what was recorded.

    Another model that was asked, too, can have other numerics now; a single model cannot.
    """
    if isinstance(error, FingerprintChanged):
        return len(materials.asked) > 1
    return isinstance(error, ResultTooLarge | ModelUnavailable)
