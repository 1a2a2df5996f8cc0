"""``cacher serve`` and ``cacher migrate``."""

from typing import Any

import rich_click as click
import uvicorn

from app import bootstrap
from app.cli.common import database_option, fail, model_option, settings_of
from app.main import create_app
from domain.log_errors import LogError


@click.command()
@click.option("--host", help="Address to listen on [CACHER_HOST, 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Port [CACHER_PORT, 8000].")
@model_option
@database_option
def serve(**options: Any) -> None:
    """Serve the API; the database is brought to this release's schema first."""
    settings = settings_of(**options)
    try:
        bootstrap.migrate(settings)
        bootstrap.prepare(settings)
    except LogError as error:
        fail(str(error))
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=10,
    )


@click.command()
@database_option
def migrate(**options: Any) -> None:
    """Bring a database to this release's schema; a backup is taken before the first change."""
    try:
        applied = bootstrap.migrate(settings_of(**options))
    except LogError as error:
        fail(str(error))
    click.echo("\n".join(f"applied {name}" for name in applied) or "nothing to do")
