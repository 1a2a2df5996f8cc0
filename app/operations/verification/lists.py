"""What a log lists beside its events, which is made of them: its states, and what began with what.

Nothing that is verified depends on it. But a state can be hidden in it, or an erasure be misled.
"""

from collections.abc import Iterator, Sequence

from app.operations.verification.chain import broken
from app.operations.verification.findings import Findings
from domain.chain import Row, legible
from domain.events import ANALYZED, DELETED, ERASED, Recorded, StateCreated
from domain.ids import Position, StateId
from domain.origin import parents_of
from domain.ports import LogReader
from domain.report import Divergence, Kinship, Standing


class Lists:
    """The lists of one verification; ``after``: where it began."""

    def __init__(self, log: LogReader, findings: Findings, *, after: Position) -> None:
        self._log = log
        self._findings = findings
        self._after = after
        self._kinships: set[Kinship] = set()

    def take(self, rows: Sequence[Row], standing: Standing, created: Recorded | None) -> None:
        """Hold what is listed of a state against its rows of a window, the first one if read."""
        for found in compare_listed(rows, standing, created):
            self._findings.diverges(found)
        if created is not None and isinstance(created.event, StateCreated):
            for parent, _ in parents_of(created.event.origin):
                kinship = Kinship(parent=parent, child=created.state_id, position=created.position)
                self._kinships.add(kinship)

    async def finish(self, until: Position, unread: set[StateId]) -> None:
        """Find what is listed although no event up to a position says so, and the reverse.

        Of ``unread`` states it is not known what they began with.
        """
        for state_id, position in await self._log.phantoms():
            expected, actual = "a state that has events", "it has none"
            self._diverges(position, state_id, "states", expected, actual)
        listed = set(await self._log.kinships(after=self._after, until=until))
        for one in sorted(self._kinships ^ listed):
            told = "is listed" if one in listed else "is not listed"
            if one in self._kinships or one.child not in unread:
                expected = f"what {legible(one.child)} began with"
                self._diverges(
                    one.position, one.child, "parents", expected, f"{legible(one.parent)} {told}"
                )

    def _diverges(
        self, position: Position, state_id: StateId, field: str, expected: str, actual: str
    ) -> None:
        self._findings.diverges(
            Divergence(
                position=position,
                state_id=StateId(legible(state_id)),
                version=None,
                field=field,
                expected=expected,
                actual=actual,
            )
        )


def compare_listed(
    rows: Sequence[Row], standing: Standing, created: Recorded | None
) -> Iterator[Divergence]:
    """The list of states must say of each what its events say."""
    first, listed = rows[0], standing.listed
    begins = standing.first == first.position
    if listed is None:
        if begins:
            yield broken(first, "states", "a state that has events", "not among the states")
        return
    if begins and first.version == 1:
        if listed.created_position != first.position:
            field = "states.created_position"
            yield broken(first, field, first.position, listed.created_position)
        model_id = created and getattr(created.event, "model_id", None)
        if model_id is not None and listed.model_id != model_id:
            yield broken(first, "states.model_id", model_id, legible(listed.model_id))
    last = next((row for row in reversed(rows) if row.type != ANALYZED), None)
    if last is not None and last.version == standing.version:  # else newer events come
        told = {
            "version": standing.version,
            "deleted": standing.type in (DELETED, ERASED),
            "erased": standing.type == ERASED,
        }
        for name, expected in told.items():
            if (found := getattr(listed, name)) != expected:
                yield broken(last, f"states.{name}", expected, found)
