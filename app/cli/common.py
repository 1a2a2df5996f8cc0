"""What commands share: options, settings, exit codes."""

import os
import sys
from contextlib import suppress
from typing import Any, Final, NoReturn, TextIO

import msgspec
import rich_click as click

from app import bootstrap
from app.settings import BadSetting, Settings, from_environment

FINE: Final = 0
DIVERGENT: Final = 1
NOT_DONE: Final = 2

database_option = click.option(
    "--database", help="The SQLite file of the log [CACHER_DATABASE, cacher.db]."
)
model_option = click.option(
    "--model", "model_name", help="An embedded model, a hub name or a folder [CACHER_MODEL_NAME]."
)


def settings_of(**options: Any) -> Settings:
    """Settings from the environment; options given on the command line stand over them."""
    try:
        settings = from_environment(os.environ)
        bootstrap.check(settings)
    except BadSetting as error:
        fail(str(error))
    given = {name: value for name, value in options.items() if value is not None}
    return msgspec.structs.replace(settings, **given)


def fail(message: str) -> NoReturn:
    """End the command: it could not do its work."""
    try:
        click.echo(f"cacher: {message}", err=True)
    except OSError:
        abandon(sys.stderr)
    sys.exit(NOT_DONE)


def abandon(stream: TextIO) -> None:
    """Let what is still to be written go nowhere: Python would try once more as it exits."""
    with suppress(OSError, ValueError):  # it may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
