"""How every command ends: whatever could not be done is told in one line, by exit code 2."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich_click as click
from click.exceptions import Abort, Exit

from app.cli.common import NOT_DONE, abandon, fail


class Commands(click.RichGroup):
    """A group whose commands exit with 1 only to say that something is not as it should be.

    What Python and click do by themselves is 1 for any error, for an interruption, and for output
    that nobody reads.
    """

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Read the arguments; prints what ``--help`` and ``--version`` ask for."""
        with _ending():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _ending():
            return super().invoke(ctx)

    def resolve_command(self, *arguments: Any) -> Any:
        """The command that is asked for; all but the server need someone to tell what they find."""
        name, *found = super().resolve_command(*arguments)
        if sys.stdout is None and name != "serve":
            fail("standard output is closed")
        return name, *found


@contextmanager
def _ending() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            fail(str(error))
        abandon(sys.stdout)
        fail(f"standard output: {error.strerror or error}")
    except UnicodeEncodeError as error:
        shown = ascii(error.object[error.start : error.end])
        fail(f"standard output cannot show {shown}: set PYTHONUTF8=1")
    except KeyboardInterrupt:
        fail("interrupted")
    except (click.ClickException, Abort, Exit):
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(NOT_DONE)
