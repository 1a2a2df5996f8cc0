"""What a node of a graph stands for while it is lowered, and how its floats are walked through."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from infra.engine.forward import Unsupported
from infra.engine.strict.program import Domain


@dataclass(frozen=True)
class Rows:
    """A value of each row: where it lies in a slot, told by a tensor without data for one row."""

    slot: int
    shape: Tensor
    domain: Domain


@dataclass(frozen=True)
class Table:
    """A value of each position: as the model computes it for all of them."""

    tensor: Tensor
    axis: int


@dataclass(frozen=True)
class Input:
    """What a pass brings: ``tokens``, ``wanted`` rows, or the ``size`` of one of them."""

    name: str


def row_axis(example: Tensor) -> int:
    """The one dimension of a traced tensor that counts rows.

    Raises:
        Unsupported: there is none, or more than one.
    """
    axes = [axis for axis, size in enumerate(example.shape) if not isinstance(size, int)]
    if len(axes) != 1 or not str(example.shape[axes[0]]).isidentifier():
        raise Unsupported(f"a tensor of shape {tuple(example.shape)}")
    return axes[0]


def viewable(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor can be given this shape without moving a float."""
    try:
        tensor.view(shape)
    except RuntimeError:
        return False
    return True


def two_loops(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Sizes and strides with dimensions joined until at most two are left.

    Raises:
        Unsupported: more are needed.
    """
    dims = [
        (size, [stride[axis] for stride in strides]) for axis, size in enumerate(shape) if size > 1
    ]
    joined: list[tuple[int, list[int]]] = []
    for size, steps in dims:
        if joined and all(a == b * size for a, b in zip(joined[-1][1], steps, strict=True)):
            joined[-1] = (joined[-1][0] * size, steps)
        else:
            joined.append((size, steps))
    if len(joined) > 2:
        raise Unsupported(f"arithmetic over {len(joined)} strides")
    none = (1, [0] * len(strides))
    (outer, far), (inner, near) = (none, none, *joined)[-2:]
    return (outer, inner), list(zip(far, near, strict=True))
