"""The numerics fingerprint: everything the bits of a result depend on, in one digest."""

from importlib.metadata import version
from typing import Any, Final

import numpy as np
import torch
import transformers

from domain.fingerprint import Fingerprint
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.forward import Prepared
from infra.engine.probe import Finding
from infra.engine.sampling import sampler

NUMERICS_VERSION: Final = 2
"""Raised whenever our own kernels, their order or the sampler change their bits."""


def fingerprint(prepared: Prepared, identity: dict[str, Any], finding: Finding) -> Fingerprint:
    """Fingerprint of a prepared model; ``identity`` names its files.

    The golden digest covers logits and K/V of a fixed text: the CPU's capability alone is too
    coarse a name for what the libraries choose to do on it.
    """
    return Fingerprint.of(
        {
            "numerics_version": NUMERICS_VERSION,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "llguidance": version("llguidance"),
            "device": _device(prepared),
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "strategy": prepared.strategy,
            "quantum": prepared.quantum,
            "query_tile": prepared.query_tile,
            "block_tokens": BLOCK_TOKENS,
            "golden": finding.golden,
            "sampler": sampler.golden(),
            "deterministic": finding.failure is None,
            **identity,
        }
    )


def _device(prepared: Prepared) -> str:
    """What of the hardware the bits depend on: nothing, where the kernels fix their own order."""
    return device_name(prepared.shape.device) if prepared.tied else "any"


def device_name(device: torch.device) -> str:
    """What the bits of torch's own kernels depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
