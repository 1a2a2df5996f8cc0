"""``/v1/states/{state_id}/export`` and ``/v1/states/import``: states that go elsewhere."""

import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from litestar import Request, Response, Router, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.response import Stream

from app import answers
from app.body import UnsupportedMediaType
from app.calls import call_of, etag
from app.operations import transfer
from app.operations.transfer import Export
from app.problems import RESPONSES
from app.schemas import ImportedView
from app.service import Call, Service
from app.streams import CutOff, EventStream
from domain.errors import Refusal, StateIsErased
from domain.events import Recorded
from domain.ids import StateId, Version
from domain.log_errors import LogError
from domain.state import Erased, Live

MEDIA_TYPE: Final = "application/gzip"

UNPACKED: Final = 4
"""An export may unpack to so many times the bytes that it may have: it is held until all of it has
proven itself.
"""

AnyRequest = Request[Any, Any, Any]

logger = logging.getLogger(__name__)


@get(
    "/states/{state_id:str}/export",
    media_type=MEDIA_TYPE,
    responses={
        **RESPONSES,
        200: ResponseSpec(bytes, generate_examples=False, media_type=MEDIA_TYPE),
    },
)
async def export_state(state_id: str, service: Service, version: int | None = None) -> Stream:
    """A state as it is, or was at a version, deleted or not, with all that it comes from.

    gzip of JSON lines, whose events prove that the log holds them.
    """
    asked = (StateId(state_id), None if version is None else Version(version))
    export = await Export.of_states(service.log, [asked], service.signer)
    chunks = _counted(service, export.parts())
    await anext(chunks)
    disposition = f'attachment; filename="{state_id}.jsonl.gz"'
    return EventStream(chunks, media_type=MEDIA_TYPE, headers={"Content-Disposition": disposition})


async def _counted(
    service: Service, parts: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """Nothing, once there is a place among the exports and a first part; then the parts."""
    async with service.exports.turn(object()), aclosing(parts):
        first = await anext(parts)
        yield b""
        yield first
        try:
            async for part in parts:
                yield part
        except (LogError, Refusal) as error:
            logger.error("an export was cut off: %s", error)
            raise CutOff from error


@dataclass
class _ImportOperation(Operation):
    """Describes the body, which is read as it comes."""

    def __post_init__(self) -> None:
        schema = Schema(type=OpenAPIType.STRING, content_media_type=MEDIA_TYPE)
        content = {MEDIA_TYPE: OpenAPIMediaType(schema=schema)}
        self.request_body = RequestBody(content=content, required=True)


def _importing(max_bytes: int) -> Any:
    """The handler that takes files of so many bytes."""

    @post(
        "/states/import",
        status_code=201,
        responses=RESPONSES,
        request_max_body_size=max_bytes,
        operation_class=_ImportOperation,
    )
    async def import_states(request: AnyRequest, service: Service) -> Response[ImportedView]:
        """Add the states of an export, and what they come from.

        ``state`` is the one imported last: the one that the export is of; null if it was deleted.
        """
        if request.headers.get("content-type", "").strip().lower() != MEDIA_TYPE:
            raise UnsupportedMediaType(f"Send the export as {MEDIA_TYPE}")
        async with service.imports.turn(import_states):
            parts, digest = await _body(request)
            call = await call_of(request, digest)
            recorded = await _import(service, call, parts, max_bytes)
        return await _answer(service, recorded)

    return import_states


async def _body(request: AnyRequest) -> tuple[list[bytes], bytes]:
    """The body as it came, and its SHA-256."""
    parts, digest = [], hashlib.sha256()
    async for part in request.stream():
        parts.append(part)
        digest.update(part)
    return parts, digest.digest()


async def _import(
    service: Service, call: Call, parts: list[bytes], max_bytes: int
) -> tuple[Recorded, ...]:
    async with service.answering(call) as remembered:
        if remembered:
            return remembered
        reading = await transfer.open_export(parts, limit=UNPACKED * max_bytes)
        return await transfer.import_states(
            service.log,
            reading,
            provenance=service.provenance(call),
            idempotency=call.idempotency,
        )


async def _answer(service: Service, recorded: tuple[Recorded, ...]) -> Response[ImportedView]:
    arrived = transfer.arrival(recorded)
    *_, last = (one for one in recorded if one.row.version is not None)
    state = await service.state(last.state_id, last.version)
    if isinstance(state, Erased):
        raise StateIsErased(state.state_id, state.erased_at)
    view = ImportedView(
        state=answers.state(state) if isinstance(state, Live) else None,
        imported=list(arrived.states),
        events=arrived.events,
    )
    location = {"Location": f"/v1/states/{state.state_id}", **etag(state.version)}
    return Response(view, status_code=201, headers=location)


def router(max_import_bytes: int) -> Router:
    """The routes; bodies of an import may be larger than others."""
    handlers = [export_state, _importing(max_import_bytes)]
    return Router("/v1", tags=["states"], route_handlers=handlers)
