"""The logit lens as a grid: what each layer would say comes next, and how sure it is."""

import math
from typing import TYPE_CHECKING, Final

from app.operations.analysis.analyze import Analyzed
from app.pictures import sheet
from domain.analysis.extent import Extent
from domain.analysis.lens import LensFacts
from domain.analysis.result import Result
from domain.errors import ResultTooLarge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POSITIONS: Final = 48
MAX_CELLS: Final = 2048

_WIDTH: Final = 0.66
_HEIGHT: Final = 0.21
"""Inches that a cell takes."""
_LONGEST_LABEL: Final = 9
_DARK: Final = 0.55
"""From this probability on, letters are white."""


def check(extent: Extent) -> None:
    """Refuse more readings than a figure holds.

    Raises:
        ResultTooLarge: says how to ask for less.
    """
    positions, readings = len(extent.positions), len(extent.positions) * extent.layers
    remedy = "Ask for fewer positions, with start and end, or for fewer layers"
    if positions > MAX_POSITIONS:
        raise ResultTooLarge(positions, MAX_POSITIONS, remedy, unit="positions in one picture")
    if readings > MAX_CELLS:
        raise ResultTooLarge(readings, MAX_CELLS, remedy, unit="readings in one picture")


def draw(found: Analyzed, media_type: str) -> bytes:
    """Rows are layers, the last one at the top, columns positions; the likeliest token in each."""
    facts = _facts(found.result)
    width, height = (facts.end - facts.start) * _WIDTH, len(facts.layers) * _HEIGHT
    cells = [
        [math.exp(reading.top[0].logprob) for reading in readings] for readings in facts.readings
    ]

    def paint(figure: "Figure") -> None:
        axes = sheet.add_axes(figure, 0, 0, width, height)
        image = axes.imshow(
            cells,
            sheet.COLOURS,
            aspect="auto",
            interpolation="none",
            origin="lower",
            vmin=0,
            vmax=1,
        )
        for row, readings in enumerate(facts.readings):
            for column, reading in enumerate(readings):
                axes.text(
                    column,
                    row,
                    sheet.label(reading.top[0].text, sheet.MONO, _LONGEST_LABEL),
                    family=sheet.MONO,
                    size=7,
                    ha="center",
                    va="center_baseline",
                    color="white" if cells[row][column] > _DARK else "black",
                )
        names = [f"layer {layer}" if layer else "embedding" for layer in facts.layers]
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(
            range(len(facts.tokens)),
            [sheet.label(text) for text in facts.tokens],
            rotation=45,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_xlabel(sheet.span("token", facts.start, facts.end))
        sheet.entitle(axes, found, "Logit lens: the likeliest next token")
        sheet.add_scale(figure, image, "probability", width + 0.1, height)

    return sheet.drawn((width, height), paint, media_type)


def _facts(result: Result) -> LensFacts:
    assert isinstance(result.facts, LensFacts)
    return result.facts
