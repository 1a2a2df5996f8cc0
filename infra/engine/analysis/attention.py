"""Attention as it was: weights from the queries and the K blocks of the engine's own pass.

Only the weights of a few rows, of one head of one layer, are held at a time besides the answer.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domain.analysis import result
from domain.analysis.attention import Selection, check_sizes, describe, largest_of, select
from domain.analysis.parameters import AttentionParameters
from domain.analysis.result import Result
from domain.ids import TokenId
from infra.engine.analysis.attention_kernels import Floats, LayerWeights, roll
from infra.engine.analysis.tensors import packed
from infra.engine.observing import Look, Seen
from infra.engine.waiting import Parts, worked_through

if TYPE_CHECKING:
    from infra.engine.language_model import TransformersModel

_ROWS: Final = 256


async def attention(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    asked: AttentionParameters,
    *,
    private: bool,
) -> Result:
    """How much tokens attend to those before them.

    ``attention_pattern`` ``(layers?, heads?, queries, keys)``, or ``indices`` and ``values``
    ``(layers?, heads?, queries, top_k)``, where several layers or heads were named; a summary has
    ``entropy``, ``distance`` and ``first_token``, ``(layers, heads)``.
    """
    selection = select(asked, model.dimensions, len(tokens))
    check_sizes(asked, selection, model.dimensions, model.max_result_bytes)
    rows, layers = selection.rows, frozenset(selection.layers)
    first = 0 if asked.method == "rollout" else rows.start
    text = tokens[: rows.stop]
    look = Look(tokens=text, start=first, queries=layers, keys=layers)
    seen = await model.observe(look, private=private)
    facts = describe(asked, selection, text, model.fragment((), text).pieces())
    tensors = await worked_through(_tensors(seen, asked, selection, first))
    return Result(facts=facts, tensors=tensors)


def _tensors(
    seen: Seen, asked: AttentionParameters, selection: Selection, first: int
) -> Parts[tuple[result.Tensor, ...]]:
    """The tensors of an answer; queries were seen from the position ``first`` on."""
    found, rows = (yield from _compute(seen, asked, selection, first)), selection.rows
    return tuple(
        packed(name, values, layers=selection.layers, start=rows.start, end=rows.stop)
        for name, values in found.items()
    )


def _compute(
    seen: Seen, asked: AttentionParameters, selection: Selection, first: int
) -> Parts[dict[str, Tensor]]:
    layers = (
        LayerWeights(*seen.queries[layer], seen.keys[layer], first) for layer in selection.layers
    )
    match asked.method:
        case "weights":
            return (yield from _weights(layers, asked, selection))
        case "rollout":
            return (yield from _rollout(layers, asked, selection))
        case "summary":
            return (yield from _summary(layers, selection))


def _weights(
    layers: Iterator[LayerWeights], asked: AttentionParameters, selection: Selection
) -> Parts[dict[str, Tensor]]:
    matrices = (len(selection.layers), len(selection.heads) or 1)
    kept = _Rows(asked, matrices, selection.rows)
    for at, layer in enumerate(layers):
        for rows in _chunks(selection.rows):
            if not selection.heads:
                kept.put((at, 0), rows, layer.mean(rows))
            for place, head in enumerate(selection.heads):
                kept.put((at, place), rows, layer.of_head(head, rows))
            yield
    several = ((asked.layers, matrices[0]), (asked.heads, matrices[1]))
    return kept.tensors(tuple(count for named, count in several if named is not None))


def _rollout(
    layers: Iterator[LayerWeights], asked: AttentionParameters, selection: Selection
) -> Parts[dict[str, Tensor]]:
    every = range(selection.rows.stop)
    rolled = np.eye(len(every))
    for layer in layers:
        for rows in reversed(list(_chunks(every))):
            roll(layer.mean(rows), rows.start, rolled)
            yield
    kept = _Rows(asked, (1, 1), selection.rows)
    for rows in _chunks(selection.rows):
        kept.put((0, 0), rows, rolled[rows.start : rows.stop].astype(np.float32))
    return kept.tensors(())


def _summary(layers: Iterator[LayerWeights], selection: Selection) -> Parts[dict[str, Tensor]]:
    sums = np.zeros((len(selection.layers), len(selection.heads), 3))
    for at, layer in enumerate(layers):
        for rows in _chunks(selection.rows):
            for place, head in enumerate(selection.heads):
                sums[at, place] += layer.summarise(head, rows)
            yield
    means = (sums / len(selection.rows)).astype(np.float32)
    entropy, distance, first_token = torch.from_numpy(means).unbind(-1)
    return {"entropy": entropy, "distance": distance, "first_token": first_token}


class _Rows:
    """Rows of weights for an answer, dense or the largest of each, of some ``matrices``."""

    def __init__(self, asked: AttentionParameters, matrices: tuple[int, int], rows: range) -> None:
        self._threshold = np.float64(asked.threshold)  # not to be rounded to float32
        self._rows = rows
        self._top_k = largest_of(asked)
        shape = (*matrices, len(rows), rows.stop if self._top_k is None else self._top_k)
        self._values = np.empty(shape, np.float32)
        self._indices = None if self._top_k is None else np.empty(shape, np.int64)

    def put(self, matrix: tuple[int, int], rows: range, weights: Floats) -> None:
        """Keep rows of a matrix; ``weights`` may be written to."""
        weights[weights < self._threshold] = 0
        place = (*matrix, slice(rows.start - self._rows.start, rows.stop - self._rows.start))
        if self._indices is None or self._top_k is None:
            self._values[place] = weights
        else:
            self._indices[place], self._values[place] = _largest(weights, self._top_k)

    def tensors(self, several: tuple[int, ...]) -> dict[str, Tensor]:
        """What was kept, with these dimensions before those of a matrix."""
        shape = (*several, *self._values.shape[2:])
        values = torch.from_numpy(self._values).view(shape)
        if self._indices is None:
            return {"attention_pattern": values}
        return {"indices": torch.from_numpy(self._indices).view(shape), "values": values}


def _largest(weights: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """Places and values of the ``k`` largest of each row, ties by lower place.

    Where only 0 is left, the place is -1. Floats that are not negative have the order of their
    bits; with the place below them no two are equal, so any way to sort them gives the same.
    """
    count = min(k, weights.shape[1])
    indices = np.full((len(weights), k), -1, np.int64)
    values = np.zeros((len(weights), k), np.float32)
    bits = np.ascontiguousarray(weights).view(np.int32).astype(np.int64)
    order = np.arange(weights.shape[1]) - (bits << 32)
    chosen = np.sort(np.partition(order, count - 1, axis=1)[:, :count], axis=1)
    places = chosen & 0xFFFFFFFF
    found = np.take_along_axis(weights, places, axis=1)
    indices[:, :count] = np.where(found > 0, places, -1)
    values[:, :count] = found
    return indices, values


def _chunks(rows: range) -> Iterator[range]:
    return (rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS))
