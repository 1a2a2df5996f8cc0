"""Tensors of torch as those of an answer."""

from collections.abc import Sequence
from typing import Final

import torch

from domain.analysis.result import Dtype, Tensor

_DTYPES: Final[dict[torch.dtype, Dtype]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
}


def packed(
    name: str,
    values: torch.Tensor,
    *,
    layers: Sequence[int] = (),
    start: int = 0,
    end: int = 0,
    inline: bool = True,
) -> Tensor:
    """A tensor with its exact bits; ``layers`` and the range of positions are what it is of."""
    bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    return Tensor(
        name=name,
        shape=tuple(values.shape),
        dtype=_DTYPES[values.dtype],
        data=bits.numpy().tobytes(),
        layers=tuple(layers),
        start=start,
        end=end,
        inline=inline,
    )
