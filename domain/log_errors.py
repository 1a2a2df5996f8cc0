"""What can be wrong with the log itself; nobody's request is to blame.

::

    LogError                    the log itself is wrong; nobody's request is to blame
     |- ChainBroken             a stored row does not match its hash
     |- UnknownEvent            an event of a newer release, or not an event at all
     |- EventErased             the event is sealed and its key was destroyed
     |- SchemaTooNew            the database was written by a newer release
     |- MigrationChanged        an applied migration's text is not what was applied
     `- LogIsLocked             another process writes to this log
"""

from domain.ids import Position


class LogError(Exception):
    """The log itself is wrong."""


class ChainBroken(LogError):
    """A stored row does not match its hash or its predecessor."""

    def __init__(self, position: Position, message: str) -> None:
        super().__init__(f"position {position}: {message}")
        self.position = position


class UnknownEvent(LogError):
    """A stored event that this release cannot read."""

    def __init__(self, position: Position, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position = position


class EventErased(LogError):
    """The event is sealed, and its key was destroyed or is not here."""

    def __init__(self, position: Position) -> None:
        super().__init__(f"position {position}: sealed, and there is no key to it")
        self.position = position


class SchemaTooNew(LogError):
    """The database was written by a newer release."""


class MigrationChanged(LogError):
    """An applied migration is not the one this release carries."""


class LogIsLocked(LogError):
    """Another process writes to this log."""
