"""What is about to be done: kept beside the facts, outside the versions of a state."""

from msgspec import Struct

from domain.config import GenerationParameters
from domain.ids import Seed, StateId, Version


class GenerationStarted(Struct, frozen=True, kw_only=True):
    """The intent of a streamed generation, kept outside the state's versions.

    Written before the first token leaves, so that a crash in mid-stream leaves a trace and the
    same tokens can be drawn again.
    """

    state_id: StateId
    base_version: Version
    parameters: GenerationParameters
    seed: Seed
    fingerprint: str
