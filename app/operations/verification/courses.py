"""Folds of states' histories, of which those used last are kept."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from domain.chain import Row
from domain.events import decode
from domain.ids import StateId, Version
from domain.ports import LogReader
from domain.replay import BEGINNING, Course
from domain.state import Live

KEPT_TOKENS: Final = 1 << 19
"""Tokens that the states kept hold together, at most."""

EMPTY_TOKENS: Final = 64
"""What a state counts for that holds none."""

PAGE: Final = 250
"""Events of one state that are read at a time."""


class Courses:
    """Histories of states up to their versions: those kept, or folded from the log."""

    def __init__(self, log: LogReader) -> None:
        self._log = log
        self._kept: OrderedDict[tuple[StateId, Version], Course] = OrderedDict()
        self._tokens = 0

    async def at(self, state_id: StateId, version: Version) -> Course:
        """A state's history up to a version, or to its latest before that.

        Raises:
            UnknownEvent: an event cannot be read or cannot follow those before it.
            EventErased: an event is sealed, and there is no key.
        """
        course = self._kept.get((state_id, version), BEGINNING)
        while course.version < version:
            rows = await self._log.state_rows(
                state_id, after=course.version, until=version, limit=PAGE
            )
            if not rows:
                break
            course = await asyncio.to_thread(_fold, course, rows)
        self.keep(state_id, course)
        return course

    def keep(self, state_id: StateId, course: Course) -> None:
        """Keep a history for whoever goes on from it; those used longest ago leave."""
        key = (state_id, course.version)
        if key not in self._kept:
            self._tokens += _size(course)
        self._kept[key] = course
        self._kept.move_to_end(key)
        while self._tokens > KEPT_TOKENS and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._tokens -= _size(oldest)

    def drop(self, state_id: StateId, version: Version) -> None:
        """Keep a history no longer: nothing will go on from there."""
        course = self._kept.pop((state_id, version), None)
        if course is not None:
            self._tokens -= _size(course)


def _fold(course: Course, rows: Sequence[Row]) -> Course:
    for row in rows:
        course = course.after(decode(row))
    return course


def _size(course: Course) -> int:
    state = course.state
    return EMPTY_TOKENS + (state.head_position if isinstance(state, Live) else 0)
