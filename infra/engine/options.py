"""How models are run."""

from dataclasses import dataclass
from typing import Final

import torch

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""By name, so that who sets up the engine need not load torch before :mod:`infra.engine` does."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How models are run: settings of the server.

    ``hot_cache_bytes`` bounds the KV cache of one model; ``max_batch`` the sequences that run
    together; ``host_cache_bytes`` the memory for blocks that had to leave a GPU.
    ``max_result_bytes`` bounds the tensors of one answer about the inside of a text.
    """

    dtype: torch.dtype
    strategy: str
    threads: int
    hot_cache_bytes: int
    max_batch: int
    device: str = "cpu"
    host_cache_bytes: int = 0
    max_result_bytes: int = 64 << 20
