"""Figures of what was found, drawn by matplotlib: an optional extra, loaded when one is drawn."""

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from app.operations.analysis.analyze import Analyzed
from app.pictures import attention, lens, tokens
from domain.analysis.extent import Extent
from domain.analysis.parameters import (
    AttentionParameters,
    LensParameters,
    Question,
    TokensParameters,
)

MEDIA_TYPES: Final = ("image/png", "image/svg+xml")
REMEDY: Final = "pictures need matplotlib here: pip install cacher-api3[pictures]"


class Kind(Protocol):
    """How one kind of finding is drawn: a module."""

    def check(self, extent: Extent) -> None:
        """Refuse what is too much for one figure.

        Raises:
            ResultTooLarge: says how to ask for less.
        """

    def draw(self, found: Analyzed, media_type: str) -> bytes:
        """The figure as a file."""


_KINDS: Final[dict[type[Question], Kind]] = {
    AttentionParameters: attention,
    LensParameters: lens,
    TokensParameters: tokens,
}

# One at a time: matplotlib is not safe for threads, and what is drawn takes memory.
_THREAD: Final = ThreadPoolExecutor(1, thread_name_prefix="pictures")


def offered(question: Question) -> tuple[str, ...]:
    """The media types of pictures that a question can be answered with here."""
    return MEDIA_TYPES if type(question) in _KINDS and _installed() else ()


def lacking(question: Question) -> bool:
    """Whether there would be pictures, were matplotlib installed."""
    return type(question) in _KINDS and not _installed()


def check(question: Question, extent: Extent) -> None:
    """Refuse what is too much for one figure.

    Raises:
        ResultTooLarge: says how to ask for less.
    """
    _KINDS[type(question)].check(extent)


async def draw(found: Analyzed, media_type: str) -> bytes:
    """The figure of a finding; takes a second, off the event loop, one after the other."""
    loop = asyncio.get_running_loop()
    kind = _KINDS[type(found.parameters)]
    return await loop.run_in_executor(_THREAD, kind.draw, found, media_type)


def _installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
