"""``cacher verify``."""

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import rich_click as click
from rich import progress as bars
from rich.console import Console

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
from app.cli.outputs import Outputs, write
from app.operations.verification.verify import Request, Verifier, remembered_head
from app.reports.junit import in_words, junit
from app.settings import Settings
from domain.chain import Head
from domain.errors import Refusal
from domain.ids import Position, StateId
from domain.log_errors import LogError
from domain.report import Progress, Report

NAMED: Final = 10
"""Erased states, and logs that events came from, that are named on a line; JSON has more."""

_POSITION = click.IntRange(0, 2**53 - 1)
_FILE = click.Path(dir_okay=False, path_type=Path)

States = list[tuple[StateId, bool]]


@click.command()
@database_option
@model_option
@click.option("--state", "states", multiple=True, help="Only this state; may be repeated.")
@click.option("--after", type=_POSITION, help="Only events after this position.")
@click.option("--until", type=_POSITION, help="Only events up to and with this position.")
@click.option("--since-verified", is_flag=True, help="Only events since the verified mark.")
@click.option("--head", help="A remembered head, position:hash, that must be in the log.")
@click.option("--allow-drift", is_flag=True, help="Exit 0 where only the fingerprint differs.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--junit", "junit_to", type=_FILE, help="Write the report as JUnit XML.")
def verify(
    states: tuple[str, ...],
    after: int | None,
    until: int | None,
    since_verified: bool,
    head: str | None,
    allow_drift: bool,
    as_json: bool,
    junit_to: Path | None,
    **options: Any,
) -> None:
    """Re-execute a log and hold it against what it says.

    Works beside a running server and changes nothing in the log. How far the whole log was found
    equal is kept beside it, in DATABASE.verified. Exit codes: 0 everything is equal bit for bit, 1
    something is not as recorded, 2 it could not be verified.
    """
    settings = settings_of(**options)
    junit_to = Outputs(Path(settings.database)).report(junit_to)
    if since_verified and (states or after is not None):
        fail("--since-verified is about the whole log: give no --state and no --after with it")
    request = Request(
        state_ids=tuple(map(StateId, states)) or None,
        after=Position(after or 0),
        until=None if until is None else Position(until),
        since_verified=since_verified,
        head=_head(head),
    )
    try:
        report, seen = asyncio.run(_verify(settings, request, show_progress=not as_json))
        if junit_to is not None:
            write(junit_to, junit(report, seen, allow_drift=allow_drift))
    except Exception as error:  # whatever it is, nothing was found to be divergent
        known = isinstance(error, LogError | Refusal | OSError)
        fail(str(error) if known else f"the log could not be verified: {error!r}")
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _print(report)
    if report.result == "unverified":
        sys.exit(FINE if allow_drift else NOT_DONE)
    sys.exit(DIVERGENT if report.result == "divergent" else FINE)


def _head(text: str | None) -> Head | None:
    try:
        return None if text is None else remembered_head(text)
    except ValueError:
        fail("--head must be position:hash, as GET /v1/audit/head gives them")


async def _verify(
    settings: Settings, request: Request, *, show_progress: bool
) -> tuple[Report, States]:
    """The report, and every state that was verified."""
    # Whoever runs this command may name any model that the log names.
    settings = msgspec.structs.replace(settings, allowed_models=(*settings.allowed_models, "*"))
    seen: States = []
    async with bootstrap.open_reader(settings) as reader, bootstrap.open_models(settings) as models:
        with _bar(shown=show_progress) as bar:
            task = bar.add_task("events", total=None, speed_tokens=0)

            def tell(now: Progress) -> None:
                elapsed_s = bar.tasks[0].elapsed or 0
                bar.update(
                    task,
                    completed=now.events_done,
                    total=now.events_total,
                    speed_tokens=now.tokens / elapsed_s if elapsed_s else 0,
                )

            verifier = Verifier(
                reader,
                models,
                marks=bootstrap.marks(settings),
                progress=tell,
                seen=lambda state_id, erased: seen.append((state_id, erased)),
            )
            return await verifier.run(request), seen


def _bar(*, shown: bool) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[speed_tokens]:,.0f} tokens/s"),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def _print(report: Report) -> None:
    click.echo(
        f"{report.result}: {report.events_checked} events of {report.states_checked} states,"
        f" {report.tokens_recomputed} tokens recomputed"
    )
    click.echo(f"head {report.head['position']}:{report.head['hash']}")
    if report.range.after:
        click.echo(f"after position {report.range.after}, until {report.range.until}")
    if report.analyses:
        click.echo(f"analyses: {report.analyses}")
    for count, what, named in (
        (report.imported, "imported events", report.imported_from),
        (report.erased, "erased states", report.erased_states),
    ):
        if count:
            click.echo(
                f"{what}: {count} ({', '.join(named[:NAMED])}{', ...' * (len(named) > NAMED)})"
            )
    for one in report.divergences:
        click.echo(in_words(one))
    for drift in report.drifts:
        click.echo(in_words(drift))
    for count, listed in (
        (report.divergences_found, report.divergences),
        (report.drifts_found, report.drifts),
    ):
        if count > len(listed):
            click.echo(f"and {count - len(listed)} more")
    for note in report.notes:
        click.echo(f"note: {note}")
