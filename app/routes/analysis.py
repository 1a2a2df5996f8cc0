"""``/v1/analyze``."""

import hashlib
from typing import Annotated, Any, Final

from litestar import Request, Response, Router
from litestar.params import Parameter

from app.calls import call_of, etag
from app.leaving import CLIENT_LEFT, ClientLeft, unless_left
from app.operations.analysis.analyze import analyze
from app.representations import answers, represent, wanted
from app.routes.handlers import looking
from app.service import Service
from domain.analysis import parameters as asked
from domain.ids import StateId, Version

AnyRequest = Request[Any, Any, Any]
Place = Annotated[int, Parameter(ge=0, le=2**31 - 1)]
Count = Annotated[int, Parameter(ge=0, le=1000)]
_WHICH_TENSOR: Final = Parameter(
    str | None,
    required=False,
    description="The tensor to send as .npy, where there are several.",
)


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


class Compare(asked.CompareWish, frozen=True, kw_only=True):
    """Where two states, or two versions of one, differ; both as they are if no version is named."""

    state_id: StateId
    version: Version | None = None


class Intervene(asked.InterveneParameters, frozen=True, kw_only=True, tag=False):
    """What could come next if something were otherwise."""

    state_id: StateId
    version: Version | None = None


@looking("/analyze/tokens/{state_id:str}", answer=answers.TOKENS, pictured=True)
async def analyze_tokens(
    state_id: str,
    request: AnyRequest,
    service: Service,
    top_k: Count = 0,
    start: Place = 0,
    end: Place | None = None,
    version: int | None = None,
) -> Response[Any]:
    """How likely each token of a state was."""
    question = asked.TokensParameters(top_k=top_k, start=start, end=end)
    return await _answer(request, service, state_id, version, question)


@looking("/analyze/next/{state_id:str}", answer=answers.NEXT)
async def analyze_next(
    state_id: str,
    request: AnyRequest,
    service: Service,
    top_k: Annotated[int, Parameter(ge=1, le=1000)] = 10,
    version: int | None = None,
) -> Response[Any]:
    """What could come next, as the model says and as the state would sample it."""
    return await _answer(request, service, state_id, version, asked.NextParameters(top_k=top_k))


@looking("/analyze/attention", AnalyzeAttention, answer=answers.ATTENTION, pictured=True)
async def analyze_attention(
    data: AnalyzeAttention, request: AnyRequest, service: Service
) -> Response[Any]:
    """How much tokens attend to those before them."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


@looking("/analyze/cache/inspect", InspectCache, answer=answers.CACHE)
async def inspect_cache(data: InspectCache, request: AnyRequest, service: Service) -> Response[Any]:
    """Keys or values of a state's tokens."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


@looking("/analyze/hidden", AnalyzeHidden, answer=answers.HIDDEN)
async def analyze_hidden(
    data: AnalyzeHidden, request: AnyRequest, service: Service
) -> Response[Any]:
    """Hidden states of a range of tokens."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


@looking("/analyze/embedding", AnalyzeEmbedding, answer=answers.EMBEDDING)
async def analyze_embedding(
    data: AnalyzeEmbedding, request: AnyRequest, service: Service
) -> Response[Any]:
    """The hidden state of one token."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


@looking("/analyze/lens", AnalyzeLens, answer=answers.LENS, pictured=True)
async def analyze_lens(data: AnalyzeLens, request: AnyRequest, service: Service) -> Response[Any]:
    """Hidden states read as what could come next."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


@looking("/analyze/classify", Classify, answer=answers.CLASSES | answers.LABELS)
async def classify(data: Classify, request: AnyRequest, service: Service) -> Response[Any]:
    """Which class a text belongs to."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


@looking("/analyze/compare", Compare, answer=answers.COMPARE)
async def compare(data: Compare, request: AnyRequest, service: Service) -> Response[Any]:
    """Where two states, or two versions of one, differ."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


@looking("/analyze/intervene", Intervene, answer=answers.INTERVENE)
async def intervene(data: Intervene, request: AnyRequest, service: Service) -> Response[Any]:
    """What could come next if something were otherwise."""
    return await _answer(request, service, data.state_id, data.version, _question(data))


def _question(data: asked.Question) -> asked.Question:
    """What is asked, without whom it is asked of."""
    kind: type[asked.Question] = type(data).__bases__[0]
    return kind(**{name: getattr(data, name) for name in kind.__struct_fields__})


async def _answer(
    request: AnyRequest,
    service: Service,
    state_id: str,
    version: int | None,
    question: asked.Question,
) -> Response[Any]:
    """The answer, in the form that the client accepts; nobody works on for one that has left."""
    form = wanted(request, question, service.results)
    digest = hashlib.sha256(request.scope["query_string"] + await request.body()).digest()
    call = await call_of(request, digest)
    which = None if version is None else Version(version)

    async def answer() -> Response[Any]:
        found = await analyze(service, call, StateId(state_id), which, question, form=form)
        headers = etag(found.state.version)
        return await represent(form, found, headers)

    try:
        return await unless_left(request, answer())
    except ClientLeft:
        return Response(None, status_code=CLIENT_LEFT)


router = Router(
    "/v1",
    tags=["analysis"],
    parameters={"tensor": _WHICH_TENSOR},
    route_handlers=[
        analyze_tokens,
        analyze_next,
        analyze_attention,
        inspect_cache,
        analyze_hidden,
        analyze_embedding,
        analyze_lens,
        classify,
        compare,
        intervene,
    ],
)
