"""Signed notes: a text that people keep, with signature lines below it (C2SP signed-note).

The text ends in a newline; a blank line and any number of signatures follow. Each signature is over
the text alone, so that others can add theirs to it.
"""

import base64
import binascii
import hashlib
import re
from typing import Final

from msgspec import Struct

_ED25519: Final = b"\x01"
"""The type of the signatures made here."""

_KEY_ID_BYTES: Final = 4

_LINE: Final = re.compile(r"\u2014 (?P<name>[^\s+]+) (?P<signature>[A-Za-z0-9+/]+={0,2})")


class Signature(Struct, frozen=True):
    """One signature line: which key made it, and the signature itself."""

    name: str
    key_id: bytes
    signature: bytes


def key_id(name: str, public_key: bytes) -> bytes:
    """The four bytes that tell the Ed25519 keys of one name apart."""
    digest = hashlib.sha256(name.encode() + b"\n" + _ED25519 + public_key)
    return digest.digest()[:_KEY_ID_BYTES]


def text_of(note: str) -> str:
    """What the signatures of a note are over: all before its last blank line, newline included."""
    text, blank, _ = note.rpartition("\n\n")
    return (text if blank else note.removesuffix("\n")) + "\n"


def signatures(note: str) -> list[Signature]:
    """The signatures of a note, by whomever; none of them is checked here.

    Raises:
        ValueError: a line below the blank one is no signature.
    """
    _, blank, below = note.rpartition("\n\n")
    lines = below.removesuffix("\n").split("\n") if blank and below else []
    return [_signature(line) for line in lines]


def _signature(line: str) -> Signature:
    if match := _LINE.fullmatch(line):
        data = _decoded(match["signature"])
        if len(data) > _KEY_ID_BYTES:
            return Signature(match["name"], data[:_KEY_ID_BYTES], data[_KEY_ID_BYTES:])
    raise ValueError(f"this line is no signature: {line!r}")


def _decoded(text: str) -> bytes:
    """Bytes from the one base64 there is of them; of anything else, none."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
    return data if base64.b64encode(data).decode() == text else b""


def with_signature(note: str, signature: Signature) -> str:
    """The note with one more signature below it."""
    data = base64.b64encode(signature.key_id + signature.signature).decode()
    return f"{note}\u2014 {signature.name} {data}\n"
