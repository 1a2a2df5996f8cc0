"""What a verification has found so far, in lists that are bounded."""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from domain.ids import Position, StateId
from domain.report import Divergence, Drift

MAX_LISTED: Final = 1000
"""Divergences and drifts that a report lists, besides the first of each state."""


class Findings:
    """Divergences, drifts and notes.

    What was found about one window of the log is ``fresh`` until it is settled.
    """

    def __init__(self) -> None:
        self.divergences: list[Divergence] = []
        self.drifts: list[Drift] = []
        self.notes: list[str] = []
        self.divergences_found = self.drifts_found = 0
        self.held = True
        self._fresh: list[Divergence] = []
        self._diverged: set[StateId | None] = set()
        self._drifted: set[StateId] = set()
        self._explained: set[StateId | None] = set()

    @property
    def clean(self) -> bool:
        """Whether all so far is as recorded, bit for bit."""
        return self.held and not self.divergences_found and not self._fresh

    @property
    def result(self) -> Literal["equal", "divergent", "unverified"]:
        """What a report calls it."""
        if self.divergences_found:
            return "divergent"
        return "equal" if self.held else "unverified"

    def diverges(self, found: Divergence | None) -> None:
        """Take a divergence, if it is one."""
        if found is not None:
            self._fresh.append(found)

    def drift(self, found: Drift) -> None:
        """Take a drift: the event was not held to the bit."""
        self.held = False
        self.drifts_found += 1
        if found.state_id not in self._drifted or len(self.drifts) < MAX_LISTED:
            self.drifts.append(found)
        self._drifted.add(found.state_id)

    def note(self, note: str) -> None:
        """Say something, once."""
        if note not in self.notes:
            self.notes.append(note)

    def not_held(self, note: str) -> None:
        """Say why some events could not be held to the bit."""
        self.held = False
        self.note(note)

    def fresh(self) -> list[Divergence]:
        """What was found since the last time, in the order of the log, firsts marked as such."""
        found = sorted(self._fresh, key=lambda one: one.position)
        self._fresh = []
        for index, one in enumerate(found):
            if one.state_id is None or one.state_id not in self._diverged:
                found[index] = msgspec.structs.replace(one, first=True)
                self._diverged.add(one.state_id)
        return found

    def to_explain(self, found: Iterable[Divergence]) -> list[Divergence]:
        """Those that are the first in their state which name a token."""
        chosen = []
        for one in found:
            if one.token_position is not None and one.state_id not in self._explained:
                self._explained.add(one.state_id)
                chosen.append(one)
        return chosen

    def settle(self, found: Iterable[Divergence]) -> Position | None:
        """List what was found; the position of the first of it."""
        earliest = None
        for one in found:
            self.divergences_found += 1
            earliest = one.position if earliest is None else min(earliest, one.position)
            if one.first or len(self.divergences) < MAX_LISTED:
                self.divergences.append(one)
        return earliest
