"""What our figures have in common: their look, the labels of tokens, and how they become files.

matplotlib is imported where it is used, so that a server without it starts.
"""

import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from app.operations.analysis.analyze import Analyzed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

SANS: Final = "DejaVu Sans"
MONO: Final = "DejaVu Sans Mono"
"""Fonts that come with matplotlib, so that a figure is the same everywhere."""

COLOURS: Final = "Blues"

_LOOK: Final[dict[str, Any]] = {
    "font.family": SANS,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titley": 1.0,
    "axes.labelsize": 8,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.width": 0.5,
    "ytick.major.size": 2,
    "savefig.bbox": "tight",
    "savefig.dpi": 150,
    "svg.hashsalt": "cacher",
    "text.parse_math": False,
}
_FORMATS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "image/png": ("png", {"Software": None}),
    "image/svg+xml": ("svg", {"Creator": None, "Date": None}),
}
_SHOWN: Final = str.maketrans({" ": "␣", "\N{NO-BREAK SPACE}": "␣", "\n": "⏎", "\t": "⇥"})
_LONGEST_LABEL: Final = 14
_SMALLEST_POINTS: Final = 4.0


def drawn(size: tuple[float, float], draw: "Callable[[Figure], None]", media_type: str) -> bytes:
    """A figure of ``size`` (width and height in inches) as a file; the same bytes every time.

    What is drawn beyond the size makes the file larger.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    file = io.BytesIO()
    form, metadata = _FORMATS[media_type]
    with style.context(["default", _LOOK]):
        figure = Figure(figsize=size)
        draw(figure)
        figure.savefig(file, format=form, metadata=metadata)
    return file.getvalue()


def add_axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at a place from the upper left corner of a figure; all in inches."""
    across, down = figure.get_size_inches()
    return figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down)
    )


def entitle(axes: "Axes", found: Analyzed, title: str) -> None:
    """Say above axes what they show, and of which state."""
    state = found.state
    of = f"{state.model_id}, {state.state_id}, version {state.version}"
    for text, above, size, colour in ((title, 27, 10, "black"), (of, 17, 6, "0.4")):
        axes.annotate(
            text,
            (0, 1),
            (0, above),
            xycoords="axes fraction",
            textcoords="offset points",
            size=size,
            color=colour,
        )


def add_scale(
    figure: "Figure", colours: "ScalarMappable", name: str, left: float, height: float
) -> None:
    """What colours stand for, to the right of axes of this height."""
    axes = add_axes(figure, left, 0, 0.12, max(0.6, min(2.0, height)))
    bar = figure.colorbar(colours, cax=axes, label=name)
    bar.outline.set_linewidth(0.5)
    bar.ax.tick_params(labelsize=6)


def span(name: str, start: int, end: int) -> str:
    """The places from ``start`` up to, not with, ``end`` in words, such as "tokens 0 to 7"."""
    return f"{name} {start}" if end - start == 1 else f"{name}s {start} to {end - 1}"


def label(text: str, font: str = SANS, longest: int = _LONGEST_LABEL) -> str:
    """A token as it is to be read: with white space shown, and □ for what cannot be.

    Of a long one the beginning.
    """
    shown = text.translate(_SHOWN)
    if len(shown) > longest:
        shown = f"{shown[: longest - 1]}…"
    known = _characters(font)
    return "".join(one if one.isprintable() and ord(one) in known else "□" for one in shown) or "∅"


def name_places(axis: "Axis", texts: Sequence[str], first: int, inches: float) -> None:
    """Write tokens along a side so long, or where they do not fit, the positions of some.

    ``first`` is the position of the first one.
    """
    size = min(7.0, 60 * inches / len(texts))
    if size < _SMALLEST_POINTS:
        number_places(axis, range(first, first + len(texts)))
    else:
        axis.set_ticks(range(len(texts)), [label(text) for text in texts], size=size)


def number_places(axis: "Axis", numbers: Sequence[int]) -> None:
    """Write the numbers that places stand for, as many as there is room for."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def number(place: float, _: Any) -> str:
        return str(numbers[int(place)]) if 0 <= place < len(numbers) else ""

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(number))
    axis.set_tick_params(labelsize=6)


@cache
def _characters(font: str) -> frozenset[int]:
    """The characters that a font has glyphs for."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(font)).get_charmap())
