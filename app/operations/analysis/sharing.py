"""With whom a text's part of the cache is shared: as counts, since keys do not isolate tenants."""

from msgspec.structs import replace

from app.service import Service
from domain.analysis.cache import Residence, shared
from domain.analysis.result import Result
from domain.state import Live


def with_sharers(service: Service, state: Live, result: Result) -> Result:
    """What was found; where it tells of blocks, with how many other states share each."""
    if not isinstance(result.beside, Residence):
        return result
    others = (
        other.content.tokens
        for other in service.in_memory()
        if other.state_id != state.state_id and other.model_id == state.model_id
    )
    return replace(result, beside=shared(result.beside, state.content.tokens, others))
