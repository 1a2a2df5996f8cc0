"""The ASGI application: ``uvicorn app.main:app``."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from litestar import Litestar, Request, Router
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler
from litestar.openapi.config import OpenAPIConfig

from app import bootstrap, problems
from app.calls import check_key, echo_request_id
from app.parameters import check_parameters
from app.routes import analysis, audit, diff, generation, health, models, replay, states, transfer
from app.service import Service
from app.settings import BadSetting, Settings, from_environment
from app.stopping import on_stop

AnyConnection = ASGIConnection[Any, Any, Any, Any]


def create_app(settings: Settings) -> Litestar:
    """The application for these settings. Opens its database when it starts."""
    logging.basicConfig(level=settings.log_level.upper())

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None, None]:
        async with bootstrap.open_service(settings) as service:
            app.state.service = service
            with on_stop(service.feeds.stop), on_stop(service.replays.stop):
                yield

    def guard(connection: AnyConnection, _: BaseRouteHandler) -> None:
        check_key(Request(connection.scope), settings.api_keys)

    async def provide_service(state: State) -> Service:
        service: Service = state.service
        return service

    v1 = [module.router for module in (states, diff, generation, analysis, models, audit, replay)]
    v1.append(transfer.router(settings.max_import_bytes))
    return Litestar(
        route_handlers=[
            Router("/", route_handlers=v1, guards=[guard], before_request=check_parameters),
            health.router,  # probes may ask with what they like
        ],
        dependencies={"service": Provide(provide_service)},
        exception_handlers=problems.HANDLERS,
        before_send=[echo_request_id],
        lifespan=[lifespan],
        logging_config=None,
        openapi_config=OpenAPIConfig(title="Cacher", version="3", path="/schema"),
        request_max_body_size=settings.max_body_bytes,
    )


def __getattr__(name: str) -> Any:
    """``app`` is made when it is asked for, so that importing this module reads no environment."""
    if name == "app":
        try:
            settings = from_environment(os.environ)
            bootstrap.check(settings)
            return create_app(settings)
        except BadSetting as error:
            raise SystemExit(str(error)) from None
    raise AttributeError(name)
