"""What a replay kept of a log, to hold later ones against, as protocols; ``infra`` has the file."""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from domain.chain import Head
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, StateId, Version
from domain.teacher_forcing import Before
from domain.transfer import Identity
from domain.work import RowKind


class Covered(Struct, frozen=True, kw_only=True):
    """A state in a baseline: its history up to ``version``, and by which numerics.

    ``identity`` is that of its event at this version. It covers, by the chain of the log that
    recorded the event first, all that came before.
    """

    state_id: StateId
    version: Version
    identity: Identity
    model_id: ModelId
    fingerprint: Fingerprint


class Baseline(Protocol):
    """What a replay found of each place of some states."""

    def state_ids(self) -> tuple[StateId, ...]:
        """The states it has, in the order they were recorded."""

    def covered(self, state_id: StateId) -> Covered:
        """What it has of a state."""

    def read(self, state_id: StateId) -> list[Before]:
        """The places of a state, in the order they were recorded."""


class BaselineWriter(Protocol):
    """Records a baseline. Of each place it wants a row of this ``kind`` (``top_k``: of ``k``)."""

    kind: RowKind
    k: int

    def add(self, covered: Covered, places: Sequence[Before]) -> None:
        """Keep the places of a state, one or more, each with a row of logits."""

    def finish(self, log_id: str, head: Head) -> None:
        """End it; it was recorded of this log, when this was its head. Else there is none."""
