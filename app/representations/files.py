"""Tensors as files of their exact bits, piece by piece: ``.npy`` and safetensors."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw

from app.operations.analysis.analyze import Analyzed
from app.representations import elements, nested
from domain.analysis.result import ITEM_BYTES, Dtype, Tensor

_PIECE_BYTES: Final = 1 << 18
_NPY_DTYPES: Final[dict[Dtype, str]] = {
    "float32": "<f4",
    "float64": "<f8",
    "bfloat16": "<f4",
    "int64": "<i8",
}
_SAFETENSORS_DTYPES: Final[dict[Dtype, str]] = {
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "int64": "I64",
}


def npy(tensor: Tensor) -> tuple[int, Iterator[bytes]]:
    """The size and the parts of a tensor as ``.npy``, version 1.0 (NumPy Enhancement Proposal 1).

    There is no bfloat16 in it: that becomes the float32 of the same value.
    """
    header = _npy_header(tensor)
    widens = tensor.dtype == "bfloat16"

    def parts() -> Iterator[bytes]:
        yield header
        for piece in _pieces(tensor):
            yield elements.widened(piece) if widens else bytes(piece)

    return len(header) + len(tensor.data) * (2 if widens else 1), parts()


def npy_note(tensor: Tensor) -> str:
    """What a tensor is, as JSON in ASCII, for a header of an answer that is its file."""
    note: dict[str, Any] = msgspec.to_builtins(elements.view(tensor))
    if tensor.dtype == "bfloat16":
        note["note"] = "bfloat16, widened to float32 of the same values"
    return json.dumps(note)


def safetensors(found: Analyzed) -> tuple[int, Iterator[bytes]]:
    """The size and the parts of all tensors as one safetensors file, the same whenever it is made.

    Its ``__metadata__`` says whose they are, what else was found, and of what each tensor is.
    """
    # The widest elements first, as the library does: each tensor is then aligned.
    tensors = sorted(found.result.tensors, key=lambda one: -ITEM_BYTES[one.dtype])
    header = _safetensors_header(tensors, _metadata(found))

    def parts() -> Iterator[bytes]:
        yield header
        for tensor in tensors:
            yield from map(bytes, _pieces(tensor))

    return len(header) + sum(len(tensor.data) for tensor in tensors), parts()


def _npy_header(tensor: Tensor) -> bytes:
    fields = {
        "descr": _NPY_DTYPES[tensor.dtype],
        "fortran_order": False,
        "shape": tensor.shape,
    }
    text = repr(fields).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _safetensors_header(tensors: Sequence[Tensor], metadata: dict[str, str | Raw]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for tensor in tensors:
        end = start + len(tensor.data)
        entries[tensor.name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metadata(found: Analyzed) -> dict[str, str | Raw]:
    said: dict[str, str | Raw] = {
        "state_id": found.state.state_id,
        "version": str(found.state.version),
        "model_id": found.state.model_id,
        "fingerprint": found.fingerprint,
        "facts": _quoted(b"{", *nested.members(found.result.facts), b"}"),
    }
    for tensor in found.result.tensors:
        said[f"{tensor.name}.layers"] = json.dumps(tensor.layers)
        said[f"{tensor.name}.range"] = json.dumps((tensor.start, tensor.end))
    return said


def _quoted(*pieces: bytes) -> Raw:
    """A text as a string in JSON, made piece by piece."""
    return Raw(b'"' + b"".join(msgspec.json.encode(one.decode())[1:-1] for one in pieces) + b'"')


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    whole = memoryview(tensor.data)
    starts = range(0, len(whole), _PIECE_BYTES)
    return (whole[start : start + _PIECE_BYTES] for start in starts)
