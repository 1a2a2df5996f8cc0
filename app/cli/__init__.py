"""The command line: ``cacher``. Each module holds the commands of one kind."""

import rich_click as click

from app.cli.backup import backup
from app.cli.group import Commands
from app.cli.log import log
from app.cli.regress import regress
from app.cli.serve import migrate, serve
from app.cli.transfer import check, export, import_
from app.cli.verify import verify


@click.group(cls=Commands)
@click.version_option(package_name="cacher-api3")
def main() -> None:
    """Cacher: a stateful, reproducible HTTP API for language-model operations."""


for command in (backup, serve, migrate, verify, log, regress, export, import_, check):
    main.add_command(command)
