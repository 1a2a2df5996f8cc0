"""What lies beside the events of a state: numerics, stored logits, and the states it comes from."""

import asyncio
from collections.abc import Sequence
from typing import Final

from app.operations.verification.courses import Courses
from app.operations.verification.execution import Execution
from app.operations.verification.findings import Findings
from domain import consistency
from domain.chain import blobs_digest
from domain.events import ERASED, Recorded, StateCreated
from domain.ids import Position, StateId
from domain.log_errors import LogError
from domain.origin import parents_of
from domain.ports import LogReader
from domain.report import divergence

INLINE_BYTES: Final = 1 << 16
"""Blobs up to this size are hashed at once; a thread is not worth its while."""


class Beside:
    """Holds events against what they refer to. ``released`` of them have no logits any more."""

    def __init__(
        self, log: LogReader, execution: Execution, findings: Findings, courses: Courses
    ) -> None:
        self._log = log
        self._execution = execution
        self._findings = findings
        self._courses = courses
        self.released = 0

    async def check(self, events: Sequence[Recorded]) -> None:
        """Check what events refer to; the execution has learned of their fingerprints."""
        for recorded in events:
            self._findings.diverges(self._execution.compare_fingerprint(recorded))
            stored = getattr(recorded.event, "stored_logits", None)
            if stored is not None:
                await self._check_blobs(recorded, stored.digest)
            if isinstance(recorded.event, StateCreated):
                await self._check_origin(recorded, recorded.event)

    async def _check_blobs(self, recorded: Recorded, digest: str) -> None:
        """Whether stored logits are those that the event names, or were all let go of.

        Those of an imported event may have been let go of where it comes from.
        """
        blobs = await self._log.logits(recorded.position)
        here = recorded.row.source is None
        if not blobs and (not here or recorded.position <= await self._log.released_until()):
            self.released += 1
            return
        large = sum(map(len, blobs)) > INLINE_BYTES
        actual = await asyncio.to_thread(blobs_digest, blobs) if large else blobs_digest(blobs)
        if actual != digest and not await is_erased(self._log, recorded.state_id):
            self._findings.diverges(divergence(recorded, "logits", digest, actual))

    async def _check_origin(self, recorded: Recorded, created: StateCreated) -> None:
        """A fork or a merge must begin with what its parents held."""
        try:
            named = parents_of(created.origin)
            parents = [await self._courses.at(*parent) for parent in named]
        except LogError:
            await self._check_unread_parents(recorded, [parent for parent, _ in named])
        else:
            self._findings.diverges(consistency.compare_origin(recorded, parents))

    async def _check_unread_parents(self, recorded: Recorded, named: Sequence[StateId]) -> None:
        """With a state all that began with it is erased. Else it is damaged, as its check says."""
        erased = [parent for parent in named if await is_erased(self._log, parent)]
        if not erased:
            self._findings.not_held("what some states began with cannot be read")
        elif not await is_erased(self._log, recorded.state_id):
            expected = f"erased, as {erased[0]} was"
            self._findings.diverges(divergence(recorded, "origin", expected, "not erased"))


async def is_erased(log: LogReader, state_id: StateId) -> bool:
    """Whether what a state held can never be read again."""
    found = await log.standings([state_id], after=Position(0))
    return state_id in found and found[state_id].type == ERASED
