"""An answer as JSON, piece by piece: facts, and tensors as lists in lists."""

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct

from app.operations.analysis.analyze import Analyzed
from app.representations import elements
from app.representations.answers import Described, Looked
from domain import canonical
from domain.analysis.extent import Extent
from domain.analysis.result import Result, Tensor
from domain.errors import ResultTooLarge

MAX_NUMBERS: Final = 1_000_000
"""Elements of tensors in one JSON answer: it takes up to five times the bytes of float32."""

_AT_ONCE: Final = 1 << 14
"""Elements that are held as numbers at a time."""


def check(extent: Extent) -> None:
    """Refuse more numbers than a JSON answer holds.

    Raises:
        ResultTooLarge: names the forms that hold more.
    """
    if extent.numbers > MAX_NUMBERS:
        raise ResultTooLarge(
            extent.numbers,
            MAX_NUMBERS,
            "Ask for less, by a smaller range or fewer layers; or for the tensors' bytes, with"
            " Accept: application/vnd.safetensors or application/x-npy",
            unit="numbers in JSON",
        )


def parts(found: Analyzed) -> Iterator[bytes]:
    """The JSON of an answer: whose it is, what was found, and what its tensors are."""
    state, result = found.state, found.result
    looked = Looked(
        state_id=state.state_id,
        version=state.version,
        model_id=state.model_id,
        fingerprint=found.fingerprint,
    )
    yield b"{"
    yield from members(looked, result.facts)
    nulls = 0
    for tensor in result.tensors:
        if tensor.inline:
            yield b"," + msgspec.json.encode(tensor.name) + b":"
            nulls += yield from _lists(tensor, tensor.shape, 0)
    described = Described(
        tensors=tuple(elements.view(tensor, inline=tensor.inline) for tensor in result.tensors),
        note=_note(result, nulls) or UNSET,
    )
    yield b","
    yield from members(described, result.beside)
    yield b"}"


def members(*structs: Struct | None) -> Iterator[bytes]:
    """The fields of structs as they stand in one JSON object."""
    fields: dict[str, Any] = {}
    for struct in filter(None, structs):
        fields |= msgspec.structs.asdict(struct)
    return canonical.members(fields, msgspec.json.encode)


def _note(result: Result, nulls: int) -> str:
    notes = []
    if nulls:
        notes.append(f"{nulls} elements are null: NaN or infinite, which JSON has no number for")
    if left_out := [tensor.name for tensor in result.tensors if not tensor.inline]:
        notes.append(
            f"{', '.join(left_out)}: to be had with Accept: application/vnd.safetensors, or one"
            " by one with application/x-npy"
        )
    return "; ".join(notes)


def _lists(tensor: Tensor, shape: Sequence[int], start: int) -> Generator[bytes, None, int]:
    """Elements from number ``start`` on as lists of ``shape``; returns how many are null."""
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    nulls = 0
    yield b"[" if shape else b""
    if width > _AT_ONCE:
        for row in range(rows):
            yield b"," if row else b""
            nulls += yield from _lists(tensor, shape[1:], start + row * width)
    else:
        at_once = _AT_ONCE // max(width, 1)
        for row in range(0, rows, at_once):
            many = min(at_once, rows - row)
            begin = start + row * width
            flat = elements.numbers(tensor, begin, begin + many * width)
            nulls += len(flat) - sum(map(math.isfinite, flat))
            yield b"," if row else b""
            yield msgspec.json.encode(_nested(flat, (many, *shape[1:])))[1:-1]
    yield b"]" if shape else b""
    return nulls


def _nested(flat: Sequence[Any], shape: Sequence[int]) -> Sequence[Any]:
    if len(shape) == 1:
        return flat
    width = math.prod(shape[1:])
    return [_nested(flat[row * width : (row + 1) * width], shape[1:]) for row in range(shape[0])]
