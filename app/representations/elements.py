"""A tensor's elements as Python's numbers, without a library for arrays."""

import struct
from typing import Any, Final

from msgspec import UNSET, Struct, UnsetType

from domain.analysis.result import ITEM_BYTES, Dtype, Tensor

_FORMATS: Final[dict[Dtype, str]] = {
    "float32": "f",
    "float64": "d",
    "bfloat16": "f",
    "int64": "q",
}


class TensorView(Struct, frozen=True, kw_only=True):
    """What a tensor is: ``layers`` in the order of its dimension of layers, ``range`` of positions.

    ``inline`` is false where its elements are not in this answer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    layers: tuple[int, ...]
    range: tuple[int, int]
    inline: bool | UnsetType = UNSET


def view(tensor: Tensor, *, inline: bool = True) -> TensorView:
    """What is said of a tensor beside its elements, which are ``inline`` or not."""
    return TensorView(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        layers=tensor.layers,
        range=(tensor.start, tensor.end),
        inline=UNSET if inline else False,
    )


def widened(data: bytes | memoryview) -> bytes:
    """bfloat16 as the float32 of the same value: its upper two bytes."""
    wide = bytearray(2 * len(data))
    wide[2::4] = data[0::2]
    wide[3::4] = data[1::2]
    return bytes(wide)


def numbers(tensor: Tensor, start: int, end: int) -> tuple[Any, ...]:
    """The elements from number ``start`` up to ``end``; a float32 is exactly a double."""
    size = ITEM_BYTES[tensor.dtype]
    data: bytes | memoryview = memoryview(tensor.data)[start * size : end * size]
    if tensor.dtype == "bfloat16":
        data = widened(data)
    return struct.unpack(f"<{end - start}{_FORMATS[tensor.dtype]}", data)
