"""A text with the surprisal of each of its tokens as its colour."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from app.operations.analysis.analyze import Analyzed
from app.pictures import sheet
from domain.analysis.extent import Extent
from domain.analysis.result import Result
from domain.analysis.tokens import TokensFacts
from domain.errors import ResultTooLarge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS: Final = 512

_WIDEST: Final = 9.0
_LINE: Final = 0.26
_LETTER: Final = 0.0753
"""Inches, as wide as a letter of nine points is in DejaVu Sans Mono: 0.602 of its size."""
_PADDING: Final = 0.06
_UNKNOWN: Final = "0.92"
_DARK: Final = 0.55
"""From this part of the scale on, letters are white."""


class Box(NamedTuple):
    """A token of the strip: where its box begins (inches), on which line, and how wide it is."""

    left: float
    line: int
    width: float
    label: str
    surprisal: float | None


def check(extent: Extent) -> None:
    """Refuse more tokens than a figure holds.

    Raises:
        ResultTooLarge: says how to ask for less.
    """
    count = len(extent.positions)
    if count > MAX_TOKENS:
        remedy = "Ask for fewer tokens, with start and end"
        raise ResultTooLarge(count, MAX_TOKENS, remedy, unit="tokens in one picture")


def draw(found: Analyzed, media_type: str) -> bytes:
    """The text in lines; what nothing comes before is grey."""
    facts = _facts(found.result)
    boxes = list(_boxes(facts))
    width = max(box.left + box.width for box in boxes)
    height = (boxes[-1].line + 1) * _LINE

    def paint(figure: "Figure") -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import Normalize
        from matplotlib.patches import Rectangle

        axes = sheet.add_axes(figure, 0, 0, width, height)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        highest = max((box.surprisal or 0 for box in boxes), default=0) or 1
        scale = ScalarMappable(Normalize(0, highest), colormaps["Oranges"])
        patches, colours = [], []
        for box in boxes:
            top = box.line * _LINE
            patches.append(Rectangle((box.left, top), box.width, _LINE - 0.04))
            known = box.surprisal is not None
            colours.append(scale.cmap((box.surprisal or 0) / highest) if known else _UNKNOWN)
            axes.text(
                box.left + box.width / 2,
                top + (_LINE - 0.04) / 2,
                box.label,
                family=sheet.MONO,
                size=9,
                ha="center",
                va="center_baseline",
                color="white" if (box.surprisal or 0) / highest > _DARK else "black",
            )
        axes.add_collection(PatchCollection(patches, facecolors=colours, linewidths=0))
        sheet.entitle(axes, found, _title(facts))
        sheet.add_scale(figure, scale, "surprisal (nats)", width + 0.1, height)

    return sheet.drawn((width, height), paint, media_type)


def _facts(result: Result) -> TokensFacts:
    assert isinstance(result.facts, TokensFacts)
    return result.facts


def _title(facts: TokensFacts) -> str:
    title = f"Surprisal, {sheet.span('token', facts.start, facts.end)}"
    return title if facts.perplexity is None else f"{title}, perplexity {facts.perplexity:.4g}"


def _boxes(facts: TokensFacts) -> Iterator[Box]:
    left, line = 0.0, 0
    for token in facts.tokens:
        label = sheet.label(token.text, sheet.MONO)
        width = len(label) * _LETTER + _PADDING
        if left + width > _WIDEST:
            left, line = 0.0, line + 1
        yield Box(left, line, width, label, token.surprisal)
        left += width + 0.02
