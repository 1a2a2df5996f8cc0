"""What an analysis is made from: here for the one that is asked for, elsewhere to verify it."""

from typing import Protocol

from app.service import Service
from domain.ids import StateId, Version
from domain.models import LanguageModel
from domain.state import Live


class Materials(Protocol):
    """Where states and models come from.

    ``private``: nothing is used that was computed or stored before.
    """

    private: bool

    async def state(self, state_id: StateId, version: Version) -> Live:
        """A state as it was at a version.

        Raises:
            NotFound, StateIsErased: there is none, or it cannot be read any more.
        """

    async def model(self, state: Live) -> LanguageModel:
        """The model of a state."""


class Asking:
    """The materials of an analysis that a client asks for."""

    private = False

    def __init__(self, service: Service) -> None:
        self._service = service

    async def state(self, state_id: StateId, version: Version) -> Live:
        """A state as it was at a version, also of one that was deleted since."""
        return await self._service.as_it_was(state_id, version)

    async def model(self, state: Live) -> LanguageModel:
        """The model of a state."""
        return await self._service.model(state)
