"""``cacher verify``."""

import asyncio
import sys
from typing import Any

import msgspec
import rich_click as click
from rich.console import Console
from rich.progress import Progress

from app import bootstrap
from app.cli.common import (
    DIVERGENT,
    FINE,
    NOT_DONE,
    database_option,
    fail,
    model_option,
    settings_of,
)
from app.operations.verify import Request, Verifier, remembered_head
from app.settings import Settings
from domain.chain import Head
from domain.errors import LogError, Refusal
from domain.ids import StateId
from domain.replay import Report


@click.command()
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
    settings = settings_of(**options)
    try:
        remembered = None if head is None else remembered_head(head)
    except ValueError:
        fail("--head must be position:hash, as GET /v1/audit/head gives them")
    try:
        report = asyncio.run(_verify(settings, states, remembered, show_progress=not as_json))
    except Exception as error:  # whatever it is, nothing was found to be divergent
        known = isinstance(error, LogError | Refusal)
        fail(str(error) if known else f"the log could not be verified: {error!r}")
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print(report)
    if report.result == "unverified":
        sys.exit(FINE if allow_drift else NOT_DONE)
    sys.exit(DIVERGENT if report.result == "divergent" else FINE)


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
