"""Run as a process of its own: compiles the grammar on its input and follows a few texts of it.

Nothing of llguidance is bounded by the clock, and rules that nest too deep overflow the stack. So
a grammar is tried where that harms nobody. The process comes to its end, whatever llguidance thinks
of the grammar, or is ended by the system when it takes more than its share.
"""

import contextlib
import random
import sys
import threading
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_SECONDS: Final = 2
MEMORY_BYTES: Final = 1 << 30
STACK_BYTES: Final = 1 << 21
"""A quarter of what the server's threads have."""
TEXTS: Final = 4
BYTES: Final = 128


LEXER_FUEL: Final = 100_000
"""For the lexer's new states in one mask: about ten milliseconds."""


def limits(lexer_fuel: int = LEXER_FUEL) -> LLParserLimits:
    """What following a text may cost.

    A row of the parser's chart, one for each lexeme, is built in a time that grows with the cube
    of its items: a millisecond for the most that may follow a token. All rows of one mask have
    20,000 items at most: tens of milliseconds. A state of the lexer takes about 2 kB.
    """
    return LLParserLimits(
        max_items_in_row=300,
        step_max_items=20_000,
        step_lexer_fuel=lexer_fuel,
        max_lexer_states=50_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def _try(grammar: str) -> None:
    start = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits())
    for seed in range(TEXTS):
        choice = random.Random(seed)
        state = start.deep_copy()
        for _ in range(BYTES):
            mask = int.from_bytes(state.compute_bitmask(), "little")
            allowed = [byte for byte in range(256) if mask >> byte & 1]
            if not allowed or not state.consume_token(choice.choice(allowed)):
                break


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows has only the clock of who started this
        return
    shares = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, share in shares.items():
        with contextlib.suppress(ValueError, OSError):  # a stricter limit stands already
            resource.setrlimit(kind, (share, share))


def main() -> None:
    """Try the grammar."""
    _limit_resources()
    threading.stack_size(STACK_BYTES)
    trial = threading.Thread(target=_try, args=(sys.stdin.buffer.read().decode(),))
    trial.start()
    trial.join()


if __name__ == "__main__":
    main()
