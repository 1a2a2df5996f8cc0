"""What an analysis finds: facts, and tensors with their exact bits."""

import hashlib
import math
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from domain.canonical import as_json, members
from domain.errors import Conflict
from domain.ids import StateId

FORM: Final = 1
"""Number of the form in which results are digested, recorded beside each digest.

It is raised whenever the same bits of a model come to another digest: for another field of facts,
another name of a tensor, another arithmetic on what is captured. So older digests are known for
what they are, and not taken for changed ones.
"""

Dtype = Literal["float32", "float64", "bfloat16", "int64"]

ITEM_BYTES: Final[dict[Dtype, int]] = {"float32": 4, "float64": 8, "bfloat16": 2, "int64": 8}


class Tensor(Struct, frozen=True, kw_only=True):
    """A tensor. ``data`` are its elements, little endian, the last dimension fastest.

    ``layers`` are those that it is of, in the order of its dimension of layers if it has one;
    ``start`` and ``end`` the range of positions. One that is not ``inline`` is too much for a JSON
    answer, and given on demand only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    data: bytes
    layers: tuple[int, ...] = ()
    start: int = 0
    end: int = 0
    inline: bool = True

    def __post_init__(self) -> None:
        expected = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if len(self.data) != expected:
            raise ValueError(f"{len(self.data)} bytes for a tensor of {expected}")


class Result(Struct, frozen=True, kw_only=True):
    """What was found: JSON ``facts`` (a struct of the kind of analysis), and tensors by name.

    It is a pure function of the tokens, the question and the numerics. ``beside`` is what is true
    at the moment only, such as what is in the cache: it is answered and not recorded.
    """

    facts: Struct
    tensors: tuple[Tensor, ...] = ()
    beside: Struct | None = None


class ResultChanged(Conflict):
    """A question that is retried finds something else than it did at first."""

    slug = "result-changed"

    def __init__(self, state_id: StateId) -> None:
        super().__init__(
            f"what is found in state {state_id!r} now is not what was found when this request was"
            " answered first; send the request with a fresh Idempotency-Key",
            state_id=state_id,
        )


def digest(result: Result) -> str:
    """SHA-256, in hexadecimal, of what an analysis found.

    Over the JSON (sorted keys) of ``facts`` and ``tensors``: of each tensor its name, dtype, shape,
    layers and range, and the SHA-256 of its data.
    """
    found = hashlib.sha256(b'{"facts":{')
    facts = dict(sorted(msgspec.structs.asdict(result.facts).items()))
    for piece in members(facts, _encoded):
        found.update(piece)
    found.update(b'},"tensors":' + _encoded([_digested(tensor) for tensor in result.tensors]))
    found.update(b"}")
    return found.hexdigest()


def _encoded(value: Any) -> bytes:
    return as_json(value).encode()


def _digested(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "layers": tensor.layers,
        "range": (tensor.start, tensor.end),
        "data": hashlib.sha256(tensor.data).hexdigest(),
    }
