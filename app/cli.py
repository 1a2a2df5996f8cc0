"""The command line: ``cacher serve``, ``cacher verify``, ``cacher migrate``."""

import asyncio
import os
import sys
from typing import Any, Final, NoReturn

import msgspec
import rich_click as click
import uvicorn
from rich.console import Console
from rich.progress import Progress

from app import bootstrap
from app.main import create_app
from app.operations.verify import Request, Verifier, remembered_head
from app.settings import BadSetting, Settings, from_environment
from domain.chain import Head
from domain.errors import LogError, Refusal
from domain.ids import StateId
from domain.replay import Report

EQUAL: Final = 0
DIVERGENT: Final = 1
NOT_VERIFIED: Final = 2

database_option = click.option(
    "--database", help="The SQLite file of the log [CACHER_DATABASE, cacher.db]."
)
model_option = click.option(
    "--model", "model_name", help="An embedded model, a hub name or a folder [CACHER_MODEL_NAME]."
)


@click.group()
@click.version_option(package_name="cacher-api3")
def main() -> None:
    """Cacher: a stateful, reproducible HTTP API for language-model operations."""


@main.command()
@click.option("--host", help="Address to listen on [CACHER_HOST, 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Port [CACHER_PORT, 8000].")
@model_option
@database_option
def serve(**options: Any) -> None:
    """Serve the API; the database is brought to this release's schema first."""
    settings = _settings(**options)
    try:
        bootstrap.migrate(settings)
    except LogError as error:
        _fail(str(error))
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=10,
    )


@main.command()
@database_option
@model_option
@click.option("--state", "states", multiple=True, help="Only this state; may be repeated.")
@click.option("--head", help="A remembered head, position:hash, that must be in the log.")
@click.option("--allow-drift", is_flag=True, help="Exit 0 where only the fingerprint differs.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(
    states: tuple[str, ...], head: str | None, allow_drift: bool, as_json: bool, **options: Any
) -> None:
    """Re-execute a log and hold it against what it says.

    Works beside a running server and changes nothing. Exit codes: 0 everything is equal bit for
    bit, 1 something is not as recorded, 2 it could not be verified.
    """
    settings = _settings(**options)
    try:
        remembered = None if head is None else remembered_head(head)
    except ValueError:
        _fail("--head must be position:hash, as GET /v1/audit/head gives them")
    try:
        report = asyncio.run(_verify(settings, states, remembered, show_progress=not as_json))
    except Exception as error:  # whatever it is, nothing was found to be divergent
        known = isinstance(error, LogError | Refusal)
        _fail(str(error) if known else f"the log could not be verified: {error!r}")
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print(report)
    if report.result == "unverified":
        sys.exit(EQUAL if allow_drift else NOT_VERIFIED)
    sys.exit(DIVERGENT if report.result == "divergent" else EQUAL)


async def _verify(
    settings: Settings, states: tuple[str, ...], head: Head | None, *, show_progress: bool
) -> Report:
    # Whoever runs this command may name any model that the log names.
    settings = msgspec.structs.replace(settings, allowed_models=(*settings.allowed_models, "*"))
    async with bootstrap.open_reader(settings) as reader, bootstrap.open_models(settings) as models:
        with Progress(console=Console(stderr=True), disable=not show_progress) as bar:
            task = bar.add_task("states", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            verifier = Verifier(reader, models, progress=progress)
            chosen = tuple(map(StateId, states)) or None
            return await verifier.run(Request(state_ids=chosen, head=head))


def _print(report: Report) -> None:
    click.echo(
        f"{report.result}: {report.events_checked} events of {report.states_checked} states,"
        f" {report.tokens_recomputed} tokens recomputed"
    )
    click.echo(f"head {report.head['position']}:{report.head['hash']}")
    for d in report.divergences:
        place = f"position {d.position}, state {d.state_id} version {d.version}, {d.field}"
        token = "" if d.token_position is None else f" at token {d.token_position}"
        click.echo(f"divergent: {place}{token}: recorded {d.expected!r}, now {d.actual!r}")
    for drift in report.drifts:
        click.echo(
            f"drift: position {drift.position}, state {drift.state_id} version {drift.version}:"
            f" |delta logprob| up to {drift.max_logprob_delta:.3g}, first changed token"
            f" {drift.first_changed}; fingerprints differ in {', '.join(drift.differences)}"
        )
    for note in report.notes:
        click.echo(f"note: {note}")


@main.command(name="migrate")
@database_option
def migrate_command(**options: Any) -> None:
    """Bring a database to this release's schema; a backup is taken before the first change."""
    try:
        applied = bootstrap.migrate(_settings(**options))
    except LogError as error:
        _fail(str(error))
    click.echo("\n".join(f"applied {name}" for name in applied) or "nothing to do")


def _settings(**options: Any) -> Settings:
    """Settings from the environment; options given on the command line stand over them."""
    try:
        settings = from_environment(os.environ)
        bootstrap.check(settings)
    except BadSetting as error:
        _fail(str(error))
    given = {name: value for name, value in options.items() if value is not None}
    return msgspec.structs.replace(settings, **given)


def _fail(message: str) -> NoReturn:
    click.echo(f"cacher: {message}", err=True)
    sys.exit(NOT_VERIFIED)
