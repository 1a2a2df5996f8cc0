"""A summary of attention as maps of layers by heads, one for each figure that sums up a head."""

from typing import TYPE_CHECKING, Final

from app.operations.analysis.analyze import Analyzed
from app.pictures import sheet
from domain.analysis.attention import AttentionFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURES: Final = {
    "entropy": "entropy (nats)",
    "distance": "distance (tokens)",
    "first_token": "weight on the first token",
}
_CELL: Final = 0.25
_LARGEST: Final = 8.0
_GAP: Final = 0.9
"""Inches."""


def draw(found: Analyzed, facts: AttentionFacts, media_type: str) -> bytes:
    """The maps beside each other, each on a scale of its own."""
    layers, named = facts.layers or (), facts.heads or ()
    width, height = (max(1.2, min(_CELL * len(each), _LARGEST)) for each in (named, layers))
    tensors = {tensor.name: tensor for tensor in found.result.tensors}

    def paint(figure: "Figure") -> None:
        for place, (name, meaning) in enumerate(_FIGURES.items()):
            left = place * (width + _GAP)
            axes = sheet.add_axes(figure, left, 0, width, height)
            cells = memoryview(tensors[name].data).cast("f", (len(layers), len(named)))
            image = axes.imshow(
                cells, sheet.COLOURS, aspect="auto", interpolation="none", origin="lower", vmin=0
            )
            axes.set_title(meaning, pad=3)
            sheet.number_places(axes.xaxis, named)
            sheet.number_places(axes.yaxis, layers)
            axes.set_xlabel("head")
            sheet.add_scale(figure, image, "", left + width + 0.08, height)
            if place == 0:
                of = sheet.span("token", facts.start, facts.end)
                sheet.entitle(axes, found, f"Attention of each head, mean over {of}")
                axes.set_ylabel("layer")

    return sheet.drawn((len(_FIGURES) * (width + _GAP), height), paint, media_type)
