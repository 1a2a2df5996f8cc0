"""gzip (RFC 1952) of lines, both ways in parts, and bounded in what it unpacks to."""

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from domain.errors import BrokenExport, TooLarge

_GZIP: Final = 16 + zlib.MAX_WBITS
"""What zlib calls its format with a gzip header; the time in it is 0."""

GZIP_BEGIN: Final = b"\x1f\x8b"
"""What every gzip file begins with."""

_PART: Final = 1 << 18
"""Bytes unpacked at a time."""

LONGEST_FIRST_LINE: Final = 8 << 20
"""Bytes that the header may have: it can name 100,000 states."""

LONGEST_LINE: Final = 128 << 20
"""Bytes that any other line may have.

The longest is an event of 32,768 tokens with 20 alternatives each: some 60 MB, a third more if it
is sealed.
"""


class Packer:
    """Compresses what it is given, part by part."""

    def __init__(self) -> None:
        self._gzip = zlib.compressobj(wbits=_GZIP)

    def pack(self, data: bytes) -> bytes:
        """Take more in; returns what of the file is ready."""
        return self._gzip.compress(data)

    def end(self) -> bytes:
        """The rest of the file."""
        return self._gzip.flush()


def unpacked_lines(parts: Iterable[bytes], *, limit: int | None = None) -> Iterator[bytes]:
    """The lines of a file that comes in parts, each with its line feed.

    No more is unpacked than who takes the lines asks for.

    Raises:
        BrokenExport: it is no gzip file, is cut off, or goes on after its end, or has a line that
            is longer than any of an export; no more than such a line is held.
        TooLarge: it unpacks to more than ``limit`` bytes; no more than that is unpacked.
    """
    held: list[bytes] = []
    size, longest = 0, LONGEST_FIRST_LINE
    for data in _unpacked(parts, limit):
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join((*held, lines[0]))
            held, size, longest = [], 0, LONGEST_LINE
        yield from (line + b"\n" for line in lines)
        held.append(rest)
        size += len(rest)
        if size > longest:
            raise BrokenExport(f"a line of the file has more than {longest} bytes")
    if size:
        raise BrokenExport("the file ends within a line")


def _unpacked(parts: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    gzip = zlib.decompressobj(wbits=_GZIP)
    total = 0
    try:
        for part in parts:
            if gzip.eof and part:
                raise BrokenExport("the file goes on after its end")
            data = gzip.decompress(part, _PART)
            while data:
                total += len(data)
                if limit is not None and total > limit:
                    raise TooLarge(f"the file unpacks to more than {limit} bytes", limit=limit)
                yield data
                data = gzip.decompress(gzip.unconsumed_tail, _PART)
    except zlib.error as error:
        raise BrokenExport(f"the file is no gzip file, or damaged: {error}") from error
    if not gzip.eof:
        raise BrokenExport("the file is cut off")
    if gzip.unused_data:
        raise BrokenExport("the file goes on after its end")
