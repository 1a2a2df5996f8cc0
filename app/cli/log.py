"""``cacher log``: what is known of a log as a whole."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import rich_click as click
from rich.filesize import decimal

from app import bootstrap
from app.cli.common import database_option, fail, settings_of
from app.operations.proofs import Proofs, note
from app.settings import Settings
from domain.errors import Refusal
from domain.log_errors import LogError
from domain.upkeep import Statistics


@click.group()
def log() -> None:
    """Look at a log, or tend it."""


@log.command()
@database_option
@click.option("--size", type=click.IntRange(min=0), help="As it was after so many events.")
def head(size: int | None, **options: Any) -> None:
    """Print a checkpoint of the log: keep it, and nothing before it can change unseen.

    It is signed if there is a key (CACHER_SIGNING_KEY). Works beside a running server.
    """
    settings = settings_of(**options)
    try:
        click.echo(asyncio.run(_head(settings, size)), nl=False)
    except (LogError, Refusal) as error:
        fail(str(error))


async def _head(settings: Settings, size: int | None) -> str:
    async with bootstrap.open_reader(settings) as reader:
        signer = bootstrap.open_signer(settings, reader.log_id)
        return note(await Proofs(reader).checkpoint(size), signer)


@log.command()
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def stat(as_json: bool, **options: Any) -> None:
    """Print what the log holds, in figures. Works beside a running server.

    Events by type and by fingerprint are counted up to 20,000 events, and estimated from as many,
    evenly spread, beyond that.
    """
    try:
        found = bootstrap.statistics(settings_of(**options))
    except LogError as error:
        fail(str(error))
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    figures = list(_figures(found))
    width = max(len(name) for name, _ in figures) + 2
    for name, value in figures:
        click.echo(f"{name:{width}}{value}")


@log.command(name="prune-logits")
@database_option
@click.option(
    "--max-days",
    "logits_max_days",
    type=click.IntRange(min=0),
    help="Keep those of so many days; 0: of all [CACHER_LOGITS_MAX_DAYS, 0].",
)
@click.option(
    "--max-bytes",
    "logits_max_bytes",
    type=click.IntRange(min=0),
    help="Keep so many bytes of the newest; 0: all [CACHER_LOGITS_MAX_BYTES, 0].",
)
def prune_logits(**options: Any) -> None:
    """Let go of stored logits, oldest first. A server with these settings does so by itself.

    The chain does not change, and verification does not miss them. No server may be running; the
    file does not shrink, later events use the space.
    """
    settings = settings_of(**options)
    if not settings.logits_max_days and not settings.logits_max_bytes:
        fail("all stored logits are kept: say how many with --max-days or --max-bytes")
    try:
        released = bootstrap.prune_logits(settings)
    except LogError as error:
        fail(str(error))
    click.echo(f"let go of the logits of {released.events} events, {decimal(released.bytes)}")


def _figures(found: Statistics) -> Iterator[tuple[str, str]]:
    """Names of figures, and what they are."""
    about, size = "" if found.exact else "about ", found.bytes
    yield "log", found.log_id + (", erasable" if found.erasable else "")
    yield "head", found.head
    yield "events", f"{found.events:,}"
    yield from ((f"  {kind}", f"{about}{n:,}") for kind, n in found.events_by_type.items())
    yield "recorded", f"{found.first_recorded_at} to {found.last_recorded_at}"
    states = found.states
    yield "states", f"{states.live:,} live, {states.deleted:,} deleted, {states.erased:,} erased"
    yield "file", f"{decimal(size.file)}, of it free {decimal(size.free)}; WAL {decimal(size.wal)}"
    yield from ((f"  {name}", decimal(n)) for name, n in (size.by_table or {}).items())
    yield "payloads", about + decimal(size.payloads)
    gone = f", let go of up to position {found.released_until}" if found.released_until else ""
    yield "stored logits", decimal(size.logits) + gone
    for fingerprint, n in found.fingerprints.items():
        yield "fingerprint", f"{fingerprint}, {about}{n:,} events"
    for step in found.migrations:
        yield f"migration {step.number}", f"{step.name}, {step.applied_at}"
    yield "verified", "not yet" if found.verified is None else json.dumps(found.verified)
