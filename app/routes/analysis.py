"""``/v1/analyze``."""

from typing import Annotated, Any

from litestar import Request, Response, Router
from litestar.params import Parameter

from app.calls import call_of, etag
from app.operations.analysis.analyze import analyze
from app.representations import represent
from app.routes.handlers import reading, writing
from app.service import Service
from domain.analysis import parameters as asked
from domain.ids import StateId, Version

AnyRequest = Request[Any, Any, Any]
Place = Annotated[int, Parameter(ge=0, le=2**31 - 1)]
Likeliest = Annotated[int, Parameter(ge=0, le=1000)]


class AnalyzeAttention(asked.AttentionParameters, frozen=True, kw_only=True, tag=False):
    """How much tokens attend to those before them."""

    state_id: StateId
    version: Version | None = None


class InspectCache(asked.CacheParameters, frozen=True, kw_only=True, tag=False):
    """Keys or values of a state's tokens."""

    state_id: StateId
    version: Version | None = None


class AnalyzeHidden(asked.HiddenParameters, frozen=True, kw_only=True, tag=False):
    """Hidden states of a state's tokens."""

    state_id: StateId
    version: Version | None = None


class AnalyzeEmbedding(asked.EmbeddingParameters, frozen=True, kw_only=True, tag=False):
    """The hidden state of one token."""

    state_id: StateId
    version: Version | None = None


class AnalyzeLens(asked.LensParameters, frozen=True, kw_only=True, tag=False):
    """Hidden states read as what could come next."""

    state_id: StateId
    version: Version | None = None


class Classify(asked.ClassifyParameters, frozen=True, kw_only=True, tag=False):
    """Which class a text belongs to."""

    state_id: StateId
    version: Version | None = None


class Intervene(asked.InterveneParameters, frozen=True, kw_only=True, tag=False):
    """What could come next if something were otherwise."""

    state_id: StateId
    version: Version | None = None


async def _respond(
    request: AnyRequest, service: Service, data: Any, parameters: asked.Parameters
) -> Response[Any]:
    found = await analyze(service, await call_of(request), data.state_id, data.version, parameters)
    return represent(request, found, headers=etag(found.state.version))


router = Router("/v1", tags=["analysis"], route_handlers=[])
