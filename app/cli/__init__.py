"""The command line: ``cacher``. Each module holds the commands of one kind."""

import rich_click as click

from app.cli.serve import migrate, serve
from app.cli.verify import verify


@click.group()
@click.version_option(package_name="cacher-api3")
def main() -> None:
    """Cacher: a stateful, reproducible HTTP API for language-model operations."""


for command in (serve, migrate, verify):
    main.add_command(command)
