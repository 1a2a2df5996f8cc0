"""How many threads torch may use, decided per operation.

Element-wise kernels cut a tensor across threads wherever it happens to divide, and the last few
elements of each part take a scalar path with other bits. So everything runs on one thread except
the matrix products, whose bits do not depend on the split (the probe checks it). The setting is
per calling thread and costs a fraction of a microsecond.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

_WORTH_SHARING: Final = 2_000_000
"""Multiplications below which waking a thread costs more than it saves."""


@contextmanager
def threads(count: int, multiplications: int) -> Iterator[None]:
    """Let torch use ``count`` threads within, for a product of so many multiplications."""
    if multiplications < _WORTH_SHARING:
        count = 1
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
