"""What is measured: how large everything is, and how tokens are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

GREEDY: Final[Mapping[str, float]] = {"temperature": 0, "top_p": 1}
SAMPLED: Final[Mapping[str, float]] = {"temperature": 0.7, "top_p": 0.9}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts of tokens unless said otherwise; ``shape`` is what differs from GPT-2's config.

    ``streams`` are the numbers of states that generate ``new`` tokens together after a ``prompt``
    of their own; ``few`` and ``many`` stand for them where something is varied. A ``long`` text is
    held and gets ``added`` tokens, or ``forks`` forks. It goes on in ``branches`` ways, or by a
    search with so many ``beams``, of ``branch_new`` tokens each. ``rebuilt`` tokens are generated
    and then rebuilt. A prompt of ``arriving`` tokens comes while ``running`` streams run. Where
    something is looked at while states run, they have ``running_new`` tokens to generate.
    ``fork_requests``, ``departures`` (of clients whose stream runs), ``requests`` and ``appends``
    are how many of these are timed in a round; ``writers`` append at once. A history of ``texts``
    with ``verified`` tokens each is verified. A log of many ``events`` is used, of which one state
    has the ``longest`` history; one of ``moved`` events is exported and restored.
    """

    shape: Mapping[str, Any] = field(default_factory=dict)
    prompt: int = 64
    new: int = 128
    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    few: int = 1
    many: int = 8
    long: int = 512
    added: int = 16
    forks: int = 16
    branches: int = 16
    beams: int = 5
    branch_new: int = 64
    rebuilt: int = 512
    arriving: int = 900
    running: int = 4
    running_new: int = 256
    fork_requests: int = 50
    departures: int = 20
    requests: int = 100
    appends: int = 2000
    writers: tuple[int, ...] = (1, 8, 64)
    texts: int = 4
    verified: int = 384
    events: int = 1_000_000
    longest: int = 10_000
    moved: int = 50_000
    buffer_bytes: int = 1 << 30
