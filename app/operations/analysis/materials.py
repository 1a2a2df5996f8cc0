"""What an analysis is made from: here for the one that is asked for, elsewhere to verify it."""

from typing import Protocol

from app.operations.analysis.stored import stored
from app.service import Service
from domain.analysis.tokens import Measured
from domain.ids import StateId, Version
from domain.models import Classifier, LanguageModel
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

    async def any_model(self, state: Live) -> LanguageModel | Classifier:
        """The model of a state."""

    async def model(self, state: Live) -> LanguageModel:
        """The language model of a state.

        Raises:
            InvalidInput: it is a state of a classifier.
        """

    async def stored(
        self, model: LanguageModel, state: Live, asked: range, top_k: int
    ) -> dict[int, Measured]:
        """What was recorded of tokens at some positions and is still true; nothing if private."""


class Asking:
    """The materials of an analysis that a client asks for."""

    private = False

    def __init__(self, service: Service) -> None:
        self._service = service

    async def state(self, state_id: StateId, version: Version) -> Live:
        """A state as it was at a version, also of one that was deleted since."""
        return await self._service.as_it_was(state_id, version)

    async def any_model(self, state: Live) -> LanguageModel | Classifier:
        """The model of a state."""
        return await self._service.any_model(state)

    async def model(self, state: Live) -> LanguageModel:
        """The language model of a state."""
        return await self._service.model(state)

    async def stored(
        self, model: LanguageModel, state: Live, asked: range, top_k: int
    ) -> dict[int, Measured]:
        """What was recorded of tokens at some positions and is still true."""
        return await stored(self._service.log, model, state, asked, top_k)
