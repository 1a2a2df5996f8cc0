"""``cacher backup``."""

import sys
from pathlib import Path
from typing import Any, Final

import rich_click as click
from rich.console import Console
from rich.progress import Progress

from app import bootstrap
from app.cli.common import DIVERGENT, database_option, fail, settings_of
from app.cli.outputs import Outputs
from domain.log_errors import LogError

_NO_KEYS: Final = (
    "note: what states of this erasable log hold can be read with its keys alone; they are in a"
    " file of their own (<database>.keys), and not in the backup"
)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@database_option
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.option("--check", "only_check", is_flag=True, help="Only check that FILE can be restored.")
def backup(file: Path, force: bool, only_check: bool, **options: Any) -> None:
    """Copy a log to FILE, also beside a running server, and check that it can be restored.

    The check: SQLite's own integrity, the hash chain from its beginning, the versions of every
    state. FILE takes its place only when it is sound; its head is printed, to be remembered. To
    restore it, stop the server and start it on a copy of FILE (--database). Exit codes: 0 sound,
    1 not sound, 2 it could not be made or checked.
    """
    settings = settings_of(**options)
    if not only_check:
        file = Outputs(Path(settings.database)).add(file, replace=force)
    try:
        with Progress(console=Console(stderr=True), transient=True, disable=only_check) as bar:
            task = bar.add_task("pages", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            checked = (
                bootstrap.check_backup(file)
                if only_check
                else bootstrap.back_up(settings, file, replace=force, progress=progress)
            )
    except LogError as error:
        fail(str(error))
    for problem in checked.problems:
        click.echo(f"not sound: {problem}", err=True)
    if checked.problems:
        sys.exit(DIVERGENT)
    click.echo(f"{checked.head.position}:{checked.head.hash.hex()}")
    click.echo(f"sound: {checked.events} events of {checked.states} states", err=True)
    if checked.erasable:
        click.echo(_NO_KEYS, err=True)
