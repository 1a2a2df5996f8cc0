"""The machine, the libraries and the servers that a table was measured with."""

import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.served import Served


def describe(bench: Bench) -> dict[str, Any]:
    """Names and figures, by what they are."""
    bytes_per_second = bench.memory.bytes_per_second()
    return {
        "CPU": _cpu(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads of each side": bench.threads,
        "rounds": bench.rounds,
        "memory read": f"{bytes_per_second / 1e9:.1f} GB/s by {bench.memory.best}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numba")},
        "servers": [_kernels(served) for served in bench.servers],
        "server start to ready": f"{statistics.median(bench.starts_s):.1f} s"
        if bench.starts_s
        else "not measured",
    }


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _kernels(served: Served) -> str:
    numerics = served.numerics
    claim = "deterministic" if numerics["deterministic"] else "not deterministic"
    return f"{numerics['strategy']} {numerics['dtype']}, {claim}"
