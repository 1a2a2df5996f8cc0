"""Checking an export against what was remembered, with nothing else at hand."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct

from domain.chain import Head
from domain.export import Header
from domain.merkle import Checkpoint, Consistency, continues, from_note
from domain.reading import Reading

_HEAD_ALONE: Final = (
    "a head says nothing of the events of some states: it takes a remembered checkpoint"
    " (--checkpoint), a key that signs them (--public-key), or an export of the whole log"
)
_OTHER_MOMENT: Final = (
    "the checkpoint is of another moment than the export: --consistency must name a proof, as GET"
    " /v1/audit/proof?first={}&second={} gives it"
)
_UNREAD: Final = {
    "log": "what they hold cannot be read without keys",
    "state": "what they hold cannot be read without keys, nor can be told whether all that the"
    " states come from is in the export",
}


class NotProven(Exception):
    """The export is not of the log that was remembered; says why."""


class CannotCheck(Exception):
    """What is at hand is not enough to tell; says what would be."""


class Remembered(Struct, frozen=True, kw_only=True):
    """What is known of a log besides the export: at least one of the first three.

    ``checkpoint`` is the text of a note. ``signed`` gives the checkpoint in a note once it has
    checked its signature, and raises ``ValueError``. ``consistency`` is between the checkpoint
    and the one in the export, whichever is the earlier.
    """

    head: Head | None = None
    checkpoint: str | None = None
    signed: Callable[[str], Checkpoint] | None = None
    consistency: Consistency | None = None


def check(reading: Reading, remembered: Remembered) -> list[str]:
    """What of an export is proven, in words.

    Raises:
        BrokenExport: the file does not prove what it holds.
        NotProven, CannotCheck: it does, but not that it is of the log that was remembered.
    """
    exported = reading.header.checkpoint
    trusted = _trusted(reading.header, remembered)
    if trusted is not None and trusted.log_id != exported.log_id:
        raise NotProven(f"the export is of log {exported.log_id}, not of {trusted.log_id}")
    if reading.header.kind == "log":
        _check_log(reading, remembered, trusted)
    else:
        _check_states(reading, remembered, trusted)
    return [*_what(reading), *_how(remembered, trusted)]


def _trusted(header: Header, remembered: Remembered) -> Checkpoint | None:
    """The checkpoint that everything is held against, if there is one."""
    note = remembered.checkpoint
    if remembered.signed is None:
        try:
            return None if note is None else from_note(note)
        except ValueError as error:
            raise CannotCheck(str(error)) from error
    try:
        return remembered.signed(header.note if note is None else note)
    except ValueError as error:
        raise NotProven(str(error)) from error


def _check_log(reading: Reading, remembered: Remembered, trusted: Checkpoint | None) -> None:
    """The chain leads from the genesis over what was remembered to the end of the export."""
    seen, root = reading.head == remembered.head, None
    for _ in reading.events():
        seen = seen or reading.head == remembered.head
        if trusted is not None and reading.size == trusted.size:
            root = reading.root(), reading.head.position, reading.head.hash.hex()
    if remembered.head is not None and not seen:
        raise NotProven(
            f"the remembered head {_head(remembered.head)} is not in the log: its events up to"
            " there were altered, or the newest ones are missing"
        )
    if root is not None and trusted is not None:
        if root != (trusted.root, trusted.position, trusted.hash):
            raise NotProven(f"the first {trusted.size} events are not those of the checkpoint")
    elif trusted is not None:
        _check_continued(reading.header.checkpoint, trusted, remembered.consistency)


def _check_states(reading: Reading, remembered: Remembered, trusted: Checkpoint | None) -> None:
    """Every event is in the tree of a checkpoint, which is part of what was remembered."""
    if trusted is None:
        raise CannotCheck(_HEAD_ALONE)
    deque(reading.events(), maxlen=0)
    _check_continued(reading.header.checkpoint, trusted, remembered.consistency)
    newest = Head(trusted.position, bytes.fromhex(trusted.hash))
    if remembered.head not in (None, newest):
        raise CannotCheck(f"the remembered head is not that of the checkpoint. {_HEAD_ALONE}")


def _check_continued(
    exported: Checkpoint, trusted: Checkpoint, consistency: Consistency | None
) -> None:
    """One of two checkpoints continues the other."""
    if exported.size == trusted.size:
        if exported != trusted:
            raise NotProven("the export is of another log than the checkpoint, of the same size")
        return
    first, second = sorted((exported, trusted), key=lambda one: one.size)
    if consistency is None or (consistency.first, consistency.second) != (first.size, second.size):
        raise CannotCheck(_OTHER_MOMENT.format(first.size, second.size))
    if not continues(first, second, consistency):
        raise NotProven(
            f"the log of {second.size} events does not continue that of {first.size}: its history"
            " was rewritten"
        )


def _what(reading: Reading) -> Iterator[str]:
    header = reading.header
    if header.kind == "log":
        yield (
            f"the export holds all of log {header.checkpoint.log_id} up to {_head(reading.head)}:"
            f" {reading.size} events of {len(reading.versions)} states, chained from the genesis"
        )
    else:
        asked = ", ".join(f"{one.state_id} (version {one.version})" for one in header.states)
        others = "others" if reading.sealed else "what it comes from"
        yield (
            f"all {reading.size} events in the export are in log {header.checkpoint.log_id}:"
            f" those of {asked} and {others}"
        )
    if reading.sealed:
        yield f"{reading.sealed} events are sealed: {_UNREAD[header.kind]}"


def _how(remembered: Remembered, trusted: Checkpoint | None) -> Iterator[str]:
    if remembered.head is not None:
        yield f"the remembered head {_head(remembered.head)} is in it"
    if trusted is not None:
        signed = "" if remembered.signed is None else ", whose signature is right,"
        yield f"the checkpoint of {trusted.size} events{signed} is of the same history"


def _head(head: Head) -> str:
    return f"{head.position}:{head.hash.hex()}"
