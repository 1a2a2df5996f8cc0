"""Attention as heat maps: rows are queries, columns the keys that they attend to."""

import math
import struct
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from app.operations.analysis.analyze import Analyzed
from app.pictures import heads, sheet
from domain.analysis.attention import AttentionFacts
from domain.analysis.extent import Extent
from domain.analysis.result import Result, Tensor
from domain.errors import ResultTooLarge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS: Final = 1024
"""Queries, and keys, of one map."""
MAX_MAPS: Final = 64
MAX_WEIGHTS: Final = 1 << 21
"""Of all maps together."""

_WIDEST: Final = 15.0
"""Inches that all maps take, side by side or one below the other, if each can still be seen."""
_GAP: Final = 0.3
_GAMMA: Final = 0.5
"""Colours go by the square root, so that what is not the largest weight can be seen, too."""


def check(extent: Extent) -> None:
    """Refuse more maps, or larger ones, than a figure holds.

    Raises:
        ResultTooLarge: says how to ask for less.
    """
    maps, keys = extent.layers * extent.heads, extent.positions.stop
    weights = maps * len(extent.positions) * keys
    for size, limit, unit, remedy in (
        (maps, MAX_MAPS, "maps in one picture", "Name fewer layers or heads"),
        (keys, MAX_TOKENS, "tokens along a map", "Name an earlier end, or use another form"),
        (weights, MAX_WEIGHTS, "weights in one picture", "Name fewer layers, heads or tokens"),
    ):
        if extent.positions and size > limit:
            raise ResultTooLarge(size, limit, remedy, unit)


def draw(found: Analyzed, media_type: str) -> bytes:
    """A map for each layer and head that was named, all on one scale."""
    facts = _facts(found.result)
    if facts.method == "summary":
        return heads.draw(found, facts, media_type)
    titles = _titles(facts)
    columns = _columns(facts, len(titles))
    lines = math.ceil(len(titles) / columns)
    rows, keys = facts.end - facts.start, facts.end
    width, height = _side(keys, columns), _side(rows, lines)

    def paint(figure: "Figure") -> None:
        from matplotlib.colors import PowerNorm

        scale = PowerNorm(_GAMMA, vmin=0, vmax=_highest(found.result))
        for place, (title, cells) in enumerate(zip(titles, _maps(found.result), strict=True)):
            line, column = divmod(place, columns)
            axes = sheet.add_axes(
                figure, column * (width + _GAP), line * (height + _GAP), width, height
            )
            image = axes.imshow(
                cells, sheet.COLOURS, norm=scale, aspect="auto", interpolation="none"
            )
            axes.set_title(title, pad=3)
            axes.set(xticks=(), yticks=())
            if place == 0:
                sheet.entitle(axes, found, _title(facts))
            if column == 0:
                sheet.name_places(axes.yaxis, facts.tokens[facts.start :], facts.start, height)
                axes.set_ylabel("query")
            if place + columns >= len(titles):
                sheet.name_places(axes.xaxis, facts.tokens, 0, width)
                axes.tick_params(axis="x", labelrotation=90)
                axes.set_xlabel("key")
        sheet.add_scale(
            figure, image, "weight (by its square root)", columns * (width + _GAP), height
        )

    return sheet.drawn((columns * (width + _GAP), lines * (height + _GAP)), paint, media_type)


def _facts(result: Result) -> AttentionFacts:
    assert isinstance(result.facts, AttentionFacts)
    return result.facts


def _title(facts: AttentionFacts) -> str:
    """What is seen, and what of it is left out."""
    if facts.method == "rollout":
        parts = [f"Attention rollout up to layer {facts.layer}"]
    else:
        parts = ["Attention"] + ([] if facts.layer is None else [f"layer {facts.layer}"])
        if facts.head is not None:
            parts.append(f"head {facts.head}")
        elif facts.heads is None:
            parts.append("mean over heads")
    if facts.threshold:
        parts.append(f"weights from {facts.threshold:g} on")
    if facts.top_k is not None and facts.top_k < facts.end:
        parts.append(f"the {facts.top_k} largest of each query")
    return ", ".join(parts)


def _titles(facts: AttentionFacts) -> list[str]:
    """What tells the maps from each other, in the order of the tensors."""
    layers = [""] if facts.layers is None else [f"layer {layer}" for layer in facts.layers]
    named = [""] if facts.heads is None else [f"head {head}" for head in facts.heads]
    return [", ".join(filter(None, (layer, head))) for layer in layers for head in named]


def _columns(facts: AttentionFacts, maps: int) -> int:
    """How many maps stand side by side: the heads of a layer, or about as many as below."""
    named = len(facts.heads or ())
    return named if 1 < named < maps else math.ceil(math.sqrt(maps))


def _side(places: int, maps: int) -> float:
    """Inches along the side of a map with so many places, one of so many maps in a row."""
    return max(1.2, min(0.15 * places, _WIDEST / maps - _GAP))


def _highest(result: Result) -> float:
    (weights,) = (one for one in result.tensors if one.name in ("attention_pattern", "values"))
    return max(memoryview(weights.data).cast("f")) or 1.0


def _maps(result: Result) -> Iterator[Any]:
    """The weights of each map: float32, as a memoryview of rows and columns."""
    facts, tensors = _facts(result), {tensor.name: tensor for tensor in result.tensors}
    shape = (facts.end - facts.start, facts.end)
    if facts.format == "dense":
        yield from _matrices(tensors["attention_pattern"].data, shape)
    else:
        yield from _spread(tensors["indices"], tensors["values"], shape)


def _matrices(data: bytes, shape: tuple[int, int]) -> Iterator[Any]:
    size = 4 * math.prod(shape)
    whole = memoryview(data)
    for start in range(0, len(data), size):
        yield whole[start : start + size].cast("f", shape)


def _spread(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Iterator[Any]:
    """Sparse rows with what was left out as 0; a place of -1 is none."""
    rows, columns = shape
    kept = indices.shape[-1]
    ids = struct.iter_unpack(f"<{kept}q", indices.data)
    weights = struct.iter_unpack(f"<{kept}f", values.data)
    for _ in range(len(values.data) // (4 * kept * rows)):
        cells = array("f", bytes(4 * rows * columns))
        for row in range(rows):
            for place, weight in zip(next(ids), next(weights), strict=True):
                if place >= 0:
                    cells[row * columns + place] = weight
        yield memoryview(cells).cast("B").cast("f", shape)
