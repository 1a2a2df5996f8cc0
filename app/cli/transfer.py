"""``cacher export``, ``cacher import`` and ``cacher check``."""

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import rich_click as click
from msgspec import Struct

from app import bootstrap
from app.cli.common import DIVERGENT, database_option, fail, settings_of
from app.cli.outputs import Outputs
from app.operations.offline import CannotCheck, NotProven, Remembered
from app.operations.offline import check as check_export
from app.operations.transfer import Export
from app.operations.verification.verify import remembered_head
from app.settings import BadSetting, Settings
from domain.errors import BrokenExport, ExportTooNew, Refusal
from domain.ids import StateId
from domain.log_errors import LogError
from domain.merkle import Consistency
from domain.packing import GZIP_BEGIN, unpacked_lines
from domain.reading import Reading

_PART_BYTES: Final = 1 << 18


class _ProofAnswer(Struct):
    """What of the answer of ``GET /v1/audit/proof`` is needed here."""

    consistency: Consistency


@click.command("export")
@click.argument("file")
@database_option
@click.option("--state", "states", multiple=True, help="Only this state; may be repeated.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there already.")
def export(file: str, states: tuple[str, ...], force: bool, **options: Any) -> None:
    """Write the whole log to FILE, or some states with all that they come from; - is stdout.

    Works beside a running server. The keys of an erasable log are left out.
    """
    settings = settings_of(**options)
    try:
        if file == "-":
            asyncio.run(_export(settings, states, sys.stdout.buffer))
            return
        target = Outputs(Path(settings.database)).add(Path(file), replace=force)
        with bootstrap.writing(target) as opened:
            asyncio.run(_export(settings, states, opened))
    except (LogError, Refusal) as error:
        fail(str(error))


async def _export(settings: Settings, states: tuple[str, ...], file: BinaryIO) -> None:
    async with bootstrap.open_reader(settings) as log:
        signer = bootstrap.open_signer(settings, log.log_id)
        if states:
            asked = [(StateId(state_id), None) for state_id in dict.fromkeys(states)]
            exported = await Export.of_states(log, asked, signer)
        else:
            exported = await Export.of_log(log, signer)
        async for part in exported.parts():
            file.write(part)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@database_option
def import_(file: Path, **options: Any) -> None:
    """Take in an export: states are added to a log, a whole log is restored.

    A whole log is restored as it was, into a database that has no events; states get places and
    hashes of this log, and name where they come from. No server may run on the database.
    """
    settings = settings_of(**options)
    try:
        arrived = asyncio.run(bootstrap.import_file(file, Path(settings.database)))
    except (LogError, Refusal, OSError) as error:
        fail(str(error))
    what = "restored a log" if arrived.whole else "added states"
    click.echo(f"{what}: {arrived.events} events of {len(arrived.states)} states")
    click.echo(f"head {arrived.head.position}:{arrived.head.hash.hex()}")


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--head", help="A remembered head, position:hash.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A file with a remembered checkpoint, as `cacher log head` and GET /v1/audit/head give.",
)
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="A PEM file with the public key that must have signed the checkpoint.",
)
@click.option(
    "--consistency",
    type=click.Path(path_type=Path),
    help="A file with an answer of GET /v1/audit/proof, from the earlier checkpoint to the later.",
)
def check(
    file: Path,
    head: str | None,
    checkpoint: Path | None,
    public_key: Path | None,
    consistency: Path | None,
) -> None:
    """Check an export against what was remembered of its log; nothing else is needed.

    Without --checkpoint, --public-key is of the signature in the export itself. Exit codes: 0 it is
    proven that the export is of that log and nothing in it was changed, 1 it is not, 2 it could not
    be checked.
    """
    if head is None and checkpoint is None and public_key is None:
        fail("nothing to check against: give --head, --checkpoint or --public-key")
    try:
        remembered = _remembered(head, checkpoint, public_key, consistency)
        with file.open("rb") as opened:
            if opened.peek(len(GZIP_BEGIN))[: len(GZIP_BEGIN)] != GZIP_BEGIN:
                fail(f"{file} is no export: it does not begin as a gzip file")
            reading = Reading(unpacked_lines(iter(partial(opened.read, _PART_BYTES), b"")))
            proven = check_export(reading, remembered)
    except (OSError, CannotCheck, ExportTooNew, BadSetting) as error:
        fail(str(error))
    except (NotProven, BrokenExport) as error:
        click.echo(f"not proven: {error}")
        sys.exit(DIVERGENT)
    click.echo("\n".join(f"proven: {line}" for line in proven))


def _remembered(
    head: str | None, checkpoint: Path | None, public_key: Path | None, consistency: Path | None
) -> Remembered:
    try:
        remembered = None if head is None else remembered_head(head)
    except ValueError:
        fail("--head must be position:hash, as GET /v1/audit/head gives them")
    proof = None
    if consistency is not None:
        try:
            proof = msgspec.json.decode(consistency.read_bytes(), type=_ProofAnswer).consistency
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fail(f"--consistency must be an answer of GET /v1/audit/proof: {error}")
    pem = None if public_key is None else _text("--public-key", public_key)
    return Remembered(
        head=remembered,
        checkpoint=None if checkpoint is None else _text("--checkpoint", checkpoint),
        signed=None if pem is None else (lambda note: bootstrap.signed_checkpoint(note, pem)),
        consistency=proof,
    )


def _text(option: str, file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        fail(f"{option} must name a file of text, and {file} is none")
