"""Timing and printing."""

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

from rich.console import Console
from rich.table import Table


async def seconds(work: Callable[[], Awaitable[object]]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


def percentile(values: Sequence[float], percent: int) -> float:
    """The given percentile of some values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
