"""One table of everything that was measured, for people and as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.measured import Measured, Ratio

Parts = Mapping[str, Sequence[Measured]]

_COLUMNS = ("what", "against", "unit", "ours", "theirs", "ratio", "spread")


def show(parts: Parts, about: Mapping[str, Any]) -> None:
    """Print the table and below it what it was measured with."""
    table = Table(title="Medians; the spread is that of the ratio over the rounds")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("what", "against", "unit") else "right")
    for rows in parts.values():
        for row in rows:
            table.add_row(*cells(row))
        table.add_section()
    console = Console(width=150)
    console.print(table)
    for name, value in about.items():
        console.print(f"{name}: {value}", highlight=False)


def cells(row: Measured) -> tuple[str, ...]:
    """A row as it is shown."""
    ratios = row.ratios()
    words = "as much" if row.ratio is Ratio.COST else "as fast"
    return (
        row.what,
        row.against,
        row.unit,
        _number(statistics.median(row.ours)),
        _number(statistics.median(row.theirs)),
        f"{_number(statistics.median(ratios))}x {words}",
        f"{_number(min(ratios))} - {_number(max(ratios))}",
    )


def as_json(parts: Parts, about: Mapping[str, Any]) -> bytes:
    """The same with every sample."""
    rows = [
        {"part": part, **msgspec.to_builtins(row), "ratios": row.ratios()}
        for part, measured in parts.items()
        for row in measured
    ]
    return msgspec.json.format(msgspec.json.encode({"about": about, "rows": rows}))


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
