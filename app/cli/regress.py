"""``cacher regress``."""

import asyncio
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import rich_click as click
from msgspec import Struct
from rich.console import Console
from rich.progress import Progress

from app import bootstrap
from app.cli.common import DIVERGENT, FINE, fail, settings_of
from app.cli.outputs import Outputs, write
from app.operations.regress import Regressor, Request
from app.reports import regression as reports
from app.settings import BadSetting, Settings
from domain.errors import NotComparable, Refusal
from domain.ids import StateId
from domain.log_errors import LogError
from domain.regress import Limits, Regression

WIDE: Final = 132
"""Columns of the table where it is not read on a terminal."""

STDOUT: Final = "-"

FORMS: Final[dict[str, Callable[[Regression], str | bytes]]] = {
    "json": msgspec.json.encode,
    "junit": reports.junit,
    "html": reports.html,
}
"""Reports that may be asked for."""

_FILE = click.Path(dir_okay=False, path_type=Path)
_RATE = click.FloatRange(0, 1)
_AMOUNT = click.FloatRange(0)
_COUNT = click.IntRange(1, 1000)


class Given(Struct, frozen=True, kw_only=True):
    """What the command was given, but for settings, limits and where reports go."""

    log: Path
    with_model: bool
    states: tuple[str, ...]
    record: Path | None
    against: Path | None
    top_k: int
    full: bool


@click.command()
@click.argument("log", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", "model_name", help="An embedded model, a hub name or a folder [each own].")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="[CACHER_DTYPE].")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[CACHER_DEVICE].")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "strict", "onednn", "tile", "cuda", "plain"]),
    help="[CACHER_STRATEGY].",
)
@click.option("--threads", type=click.IntRange(0, 256), help="[CACHER_THREADS].")
@click.option("--state", "states", multiple=True, help="Only this state; may be repeated.")
@click.option("--record", type=_FILE, help="Write what is found to a baseline.")
@click.option("--force", is_flag=True, help="Replace the baseline if it is there already.")
@click.option("--top-k", type=_COUNT, default=64, help="Logits kept of each place [64].")
@click.option("--full", is_flag=True, help="Keep all logits of each place instead.")
@click.option("--against", type=_FILE, help="Hold against a baseline, not against the log.")
@click.option("--min-sampled-agreement", type=_RATE, help="Least share of equal draws [1].")
@click.option("--min-greedy-agreement", type=_RATE, help="Least share of equal likeliest [1].")
@click.option("--max-kl-mean", type=_AMOUNT, help="Largest mean KL divergence of a state, nats.")
@click.option("--max-kl-p99", type=_AMOUNT, help="Largest 99th percentile of it.")
@click.option("--max-kl", type=_AMOUNT, help="Largest KL divergence of a place.")
@click.option("--max-logprob-delta", type=_AMOUNT, help="Largest |change| of a logprob.")
@click.option("--json", "json_to", type=click.Path(allow_dash=True), help="Report as JSON; -: out.")
@click.option("--junit", "junit_to", type=_FILE, help="Report as JUnit XML.")
@click.option("--html", "html_to", type=_FILE, help="Report as one HTML page.")
def regress(**options: Any) -> None:
    """Replay a LOG (a database or an export) and say what another model or machine changes.

    Each recorded token is computed again after those before it, as they are recorded. Exit codes:
    0 every state is within the limits, 1 one is beyond, or the baseline has it and it was skipped,
    2 it could not be run. Without limits no choice may change; while a baseline is recorded,
    anything may.
    """
    named = {kind: options.pop(f"{kind}_to") for kind in FORMS}
    force, limits = options.pop("force"), _limits(options)
    given = Given(
        with_model=options["model_name"] is not None,
        **{name: options.pop(name) for name in Given.__struct_fields__ if name in options},
    )
    if given.record and given.against:
        fail("--record and --against cannot be given together")
    settings = settings_of(**options)
    given, wanted = _outputs(settings, given, named, force=force)
    try:
        bootstrap.check(settings)
        found = asyncio.run(_regress(settings, given, limits))
        for kind, target in wanted.items():
            write(target, FORMS[kind](found))
    except Exception as error:  # whatever it is, nothing was found to be beyond a limit
        known = isinstance(error, LogError | Refusal | NotComparable | BadSetting | OSError)
        fail(str(error) if known else f"the log could not be replayed: {error!r}")
    click.echo(msgspec.json.encode(found) if named["json"] == STDOUT else _table(found))
    sys.exit(DIVERGENT if found.failures else FINE)


def _limits(options: dict[str, Any]) -> Limits:
    """Take the limits out of the options."""
    given = {name: options.pop(name) for name in Limits.__struct_fields__}
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return Limits(**(dict.fromkeys(given) | chosen if options["record"] else chosen))
    except ValueError as error:
        fail(str(error))


def _outputs(
    settings: Settings, given: Given, named: dict[str, Path | str | None], *, force: bool
) -> tuple[Given, dict[str, Path]]:
    """Where the baseline and the reports go, once it is known that they can be written there."""
    outputs = Outputs(given.log, Path(settings.database), reads=[given.against])
    if given.record:
        given = msgspec.structs.replace(given, record=outputs.add(given.record, replace=force))
    files = {kind: Path(file) for kind, file in named.items() if file and file != STDOUT}
    return given, {kind: outputs.add(file, replace=True) for kind, file in files.items()}


def _table(found: Regression) -> str:
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    with console.capture() as captured:
        console.print(reports.table(found))
    return captured.get().removesuffix("\n")


async def _regress(settings: Settings, given: Given, limits: Limits) -> Regression:
    # Whoever runs this command may name any model that the log names.
    settings = msgspec.structs.replace(settings, allowed_models=(*settings.allowed_models, "*"))
    async with AsyncExitStack() as stack:
        reader = await stack.enter_async_context(bootstrap.open_recorded(given.log))
        baseline = given.against and stack.enter_context(bootstrap.open_baseline(given.against))
        k = None if given.full else given.top_k
        writer = given.record and stack.enter_context(bootstrap.write_baseline(given.record, k=k))
        models = await stack.enter_async_context(bootstrap.open_models(settings))
        bar = stack.enter_context(Progress(console=Console(stderr=True)))
        task = bar.add_task("states", total=None)
        regressor = Regressor(
            reader,
            models,
            baseline=baseline or None,
            writer=writer or None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        return await regressor.run(
            Request(
                state_ids=tuple(map(StateId, given.states)) or None,
                model_id=models.default if given.with_model else None,
                limits=limits,
            )
        )
