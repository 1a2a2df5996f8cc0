"""What the committed files of schema 3 hold, written out: it is the same for ever.

It holds all that schema 2 holds, states that were erased, and one that was imported.
"""

from typing import Final

from domain.events import ContextSlid, Event, StateDeleted, StateErased
from domain.ids import StateId, Version
from domain.intents import GenerationStarted
from domain.origin import New
from domain.transfer import Source, stored
from tests.builders import state_id
from tests.domain import schema_2
from tests.domain.schema_2 import SPLIT_CHARACTER, added, began, content_of, drawn

ERASED: Final = state_id(3)
ERASED_AFTER_DELETION: Final = state_id(4)
IMPORTED: Final = state_id(5)


def came_from(position: int, before: Source | None = None) -> Source:
    """Where an event was recorded first; nobody holds its hashes against anything."""
    return Source(
        log_id=f"{'another' if before is None else 'a third'} log",
        position=position,
        previous_hash=f"{position:064x}",
        hash=f"{position + 1:064x}",
        recorded_at="2025-12-31T23:59:59.999999Z",
        actor="key-0123456789ab",
        request_id=f"é-{position}",
        source=before,
    )


SOURCES: Final = {
    (IMPORTED, Version(1)): came_from(7),
    (IMPORTED, Version(2)): came_from(9, came_from(2**53)),
}
"""Of events that were imported. The event after them happened here."""


def source(state: StateId, version: Version) -> str | None:
    """What the row of an event says of where it is from."""
    found = SOURCES.get((state, version))
    return None if found is None else stored(found)


def erased_state() -> list[Event]:
    return [
        began(SPLIT_CHARACTER, New()),
        drawn(3, content_of("abc"), "context_full"),
        ContextSlid(dropped=3),
        StateErased(),
    ]


def state_erased_after_deletion() -> list[Event]:
    return [began(content_of("x"), New()), StateDeleted(), StateErased()]


def imported_state() -> list[Event]:
    return [
        began(content_of("ab"), New()),
        added(2, "cd"),
        drawn(4, SPLIT_CHARACTER, "context_full"),
    ]


def intents() -> list[GenerationStarted]:
    """What the file of intents holds."""
    return schema_2.intents()


def the_history() -> list[tuple[StateId, Version, Event]]:
    """What the file of events holds."""
    states = (erased_state(), state_erased_after_deletion(), imported_state())
    return schema_2.the_history() + [
        (state_id(number), Version(version), event)
        for number, one in enumerate(states, start=3)
        for version, event in enumerate(one, start=1)
    ]
