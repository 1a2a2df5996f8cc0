"""Attention: which weights of which rows are asked for, and what is said beside them."""

from collections.abc import Iterator
from typing import Final, Literal

from msgspec import Struct

from domain.analysis.parameters import AttentionParameters
from domain.analysis.ranges import (
    check_captured,
    check_index,
    check_indices,
    check_size,
    positions,
)
from domain.errors import FieldProblem, InvalidInput, ResultTooLarge
from domain.ids import TokenId
from domain.models import Dimensions

_TOP_K: Final = 10
"""Weights that are given of each row where the answer is sparse and no number is named."""

FIGURES: Final = 3
"""What a summary tells of a head."""

MAX_ROLLED: Final = 60_000_000_000
"""Tokens of a rollout, cubed, in all its layers: some ten seconds of one core."""

_REMEDIES: Final = {
    "weights": "Name fewer layers or heads, a shorter range, or the format sparse with a low top_k",
    "rollout": "Name a lower layer or an earlier end",
    "summary": "Name fewer layers or a shorter range",
}


class AttentionFacts(Struct, frozen=True, kw_only=True):
    """What is said of attention beside its numbers.

    Rows are the tokens from ``start`` up to ``end``, the queries; columns are the tokens from 0 up
    to ``end``, the keys, with ids ``token_ids`` and texts ``tokens``.

    Of ``layer`` and ``layers``, and of ``head`` and ``heads``, the one that was named is given;
    neither of heads for the mean over them. A rollout goes up to ``layer``, a summary always lists
    ``layers`` and ``heads``. ``top_k`` is null where the answer is not sparse.
    """

    method: Literal["weights", "rollout", "summary"]
    format: Literal["dense", "sparse"]
    layer: int | None
    layers: tuple[int, ...] | None
    head: int | None
    heads: tuple[int, ...] | None
    start: int
    end: int
    threshold: float
    top_k: int | None
    token_ids: tuple[TokenId, ...]
    tokens: tuple[str, ...]


class Selection(Struct, frozen=True, kw_only=True):
    """The layers that are looked at, their heads (none: the mean), and the rows: queries."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    rows: range


def select(asked: AttentionParameters, dimensions: Dimensions, held: int) -> Selection:
    """What is asked of a model with these dimensions, about a text of ``held`` tokens.

    Raises:
        InvalidInput: it contradicts itself, or names what there is not; says what is allowed.
    """
    problems = tuple(_contradictions(asked))
    if problems:
        raise InvalidInput(*problems)
    if asked.layer is not None:
        check_index("layer", asked.layer, dimensions.layers, of="layers")
    check_indices("layers", asked.layers or (), dimensions.layers, of="layers")
    if asked.head is not None:
        check_index("head", asked.head, dimensions.heads, of="heads")
    check_indices("heads", asked.heads or (), dimensions.heads, of="heads")
    return Selection(
        layers=_layers(asked, dimensions.layers),
        heads=_heads(asked, dimensions.heads),
        rows=positions(asked.start, asked.end, held),
    )


def describe(
    asked: AttentionParameters,
    selection: Selection,
    token_ids: tuple[TokenId, ...],
    tokens: tuple[str, ...],
) -> AttentionFacts:
    """The facts of an answer, with ids and texts of the keys."""
    summary = asked.method == "summary"
    layer = selection.layers[-1] if asked.method == "rollout" else asked.layer
    return AttentionFacts(
        method=asked.method,
        format=asked.format,
        layer=None if summary else layer,
        layers=selection.layers if summary else asked.layers,
        head=None if summary else asked.head,
        heads=selection.heads if summary else asked.heads,
        start=selection.rows.start,
        end=selection.rows.stop,
        threshold=asked.threshold,
        top_k=largest_of(asked),
        token_ids=token_ids,
        tokens=tokens,
    )


def largest_of(asked: AttentionParameters) -> int | None:
    """How many weights of each row are asked for; null for all."""
    return None if asked.format == "dense" else asked.top_k or _TOP_K


def check_sizes(
    asked: AttentionParameters, selection: Selection, dimensions: Dimensions, limit: int
) -> None:
    """Refuse an answer of more than ``limit`` bytes, and too much memory or work on the way to it.

    Raises:
        ResultTooLarge: says how to ask for less.
    """
    layers, rows, keys = len(selection.layers), len(selection.rows), selection.rows.stop
    matrices = layers * max(1, len(selection.heads))
    seen, rolled = rows, 0
    match asked.method:
        case "summary":
            answer = layers * len(selection.heads) * FIGURES * 4
        case "weights":
            answer = matrices * rows * _row_bytes(asked, keys)
        case "rollout":
            answer = rows * _row_bytes(asked, keys)
            seen, rolled = keys, keys * keys * 8
            if (work := keys**3 * layers) > MAX_ROLLED:
                unit = "steps of work (the tokens cubed, times the layers)"
                raise ResultTooLarge(work, MAX_ROLLED, _REMEDIES["rollout"], unit)
    vectors = seen * dimensions.heads + keys * dimensions.kv_heads
    remedy = _REMEDIES[asked.method]
    check_size(answer, limit, remedy)
    check_captured(layers * vectors * dimensions.head_dim * 4 + rolled, limit, remedy)


def _row_bytes(asked: AttentionParameters, keys: int) -> int:
    """A dense row has a float for each key; a sparse one indices of 8 bytes and floats."""
    top_k = largest_of(asked)
    return keys * 4 if top_k is None else top_k * 12


def _layers(asked: AttentionParameters, count: int) -> tuple[int, ...]:
    if asked.method == "rollout":
        return tuple(range(count if asked.layer is None else asked.layer + 1))
    if asked.layer is not None:
        return (asked.layer,)
    return tuple(range(count)) if asked.layers is None else asked.layers


def _heads(asked: AttentionParameters, count: int) -> tuple[int, ...]:
    if asked.head is not None:
        return (asked.head,)
    if asked.heads is not None:
        return asked.heads
    return tuple(range(count)) if asked.method == "summary" else ()


def _contradictions(asked: AttentionParameters) -> Iterator[FieldProblem]:
    """What is wrong with a question, whatever it is asked of."""
    if asked.layer is not None and asked.layers is not None:
        yield FieldProblem("layers", "name one layer or several layers, not both")
    if asked.head is not None and asked.heads is not None:
        yield FieldProblem("heads", "name one head or several heads, not both")
    if asked.format == "dense" and asked.top_k is not None:
        yield FieldProblem("top_k", "is for the format sparse; a dense row has every key")
    match asked.method:
        case "weights":
            if asked.layer is None and asked.layers is None:
                yield FieldProblem("layer", "name one layer, or several as layers")
        case "rollout":
            named = {"layers": asked.layers, "head": asked.head, "heads": asked.heads}
            for field in (field for field, value in named.items() if value is not None):
                yield FieldProblem(
                    field, "a rollout is over the mean of all heads, in all layers up to layer"
                )
        case "summary":
            if asked.format == "sparse":
                yield FieldProblem("format", "must be dense: a summary has no rows")
            if asked.threshold > 0:
                yield FieldProblem("threshold", "must be 0: a summary is of all weights")
