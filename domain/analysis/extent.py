"""How much an answer tells, known before the work is done."""

from msgspec import Struct

from domain.analysis.attention import FIGURES, check_sizes, largest_of, select
from domain.analysis.cache import asked_cache
from domain.analysis.hidden import asked_embedding, asked_hidden
from domain.analysis.lens import asked_lens
from domain.analysis.parameters import (
    AttentionParameters,
    CacheParameters,
    EmbeddingParameters,
    HiddenParameters,
    LensParameters,
    Parameters,
    TokensParameters,
)
from domain.analysis.ranges import positions
from domain.models import Dimensions


class Extent(Struct, frozen=True, kw_only=True):
    """Of how many layers, and heads of each, an answer tells position by position, and of which.

    ``numbers`` are the elements of those of its tensors that are inline.
    """

    positions: range = range(0)
    layers: int = 1
    heads: int = 1
    numbers: int = 0


def extent(asked: Parameters, dimensions: Dimensions, held: int, limit: int) -> Extent:
    """How much is told about a text of ``held`` tokens, in tensors of ``limit`` bytes.

    Raises:
        InvalidInput, ResultTooLarge: as for the question itself.
    """
    match asked:
        case AttentionParameters():
            return _of_attention(asked, dimensions, held, limit)
        case CacheParameters():
            span = asked_cache(asked, dimensions, held, limit, "bfloat16")  # or wider
            heads = dimensions.kv_heads if asked.head is None else 1
            return Extent(numbers=heads * len(span) * dimensions.head_dim)
        case HiddenParameters():
            layers, span = asked_hidden(asked, dimensions, held, limit)
            vectors = len(layers) * (len(span) if asked.pooling == "none" else 1)
            return Extent(numbers=vectors * dimensions.width)
        case EmbeddingParameters():
            asked_embedding(asked, dimensions, held)
            return Extent(numbers=dimensions.width)
        case LensParameters():
            layers, span = asked_lens(asked, dimensions, held, limit)
            return Extent(positions=span, layers=len(layers))
        case TokensParameters():
            return Extent(positions=positions(asked.start, asked.end, held))
        case _:
            return Extent()


def _of_attention(
    asked: AttentionParameters, dimensions: Dimensions, held: int, limit: int
) -> Extent:
    """Of rows of weights, or of a few figures for each head."""
    selection = select(asked, dimensions, held)
    check_sizes(asked, selection, dimensions, limit)
    rows, top_k = selection.rows, largest_of(asked)
    layers, heads = len(selection.layers), max(1, len(selection.heads))
    if asked.method == "summary":
        return Extent(layers=layers, heads=heads, numbers=layers * heads * FIGURES)
    if asked.method == "rollout":
        layers = 1
    row = rows.stop if top_k is None else 2 * top_k  # places beside weights
    return Extent(
        positions=rows, layers=layers, heads=heads, numbers=layers * heads * len(rows) * row
    )
