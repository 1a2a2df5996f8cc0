"""Compiled kernels kept on disk, such that a stale one can never be run.

numba looks for compiled code under the name of a function and trusts it as long as the one file
that defines this function is unchanged; it does not see changes in functions of other files, and
writes its index before what the index names. Here the name of an entry point holds the digest of
every source that its code comes from, so other text is another name.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import llvmlite.binding
import numba


def _use_whole_registers() -> None:
    """Have LLVM use vectors of 512 bits where there are; by itself it takes half of one."""
    features = llvmlite.binding.get_host_cpu_features()
    chosen = (numba.config.CPU_NAME, numba.config.CPU_FEATURES)
    if features.get("avx512f") and not any(chosen):
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


_use_whole_registers()

_OPTIONS: Final[dict[str, Any]] = {"error_model": "numpy"}
"""For every kernel. Never ``fastmath``: the order and the rounding of operations are the text's."""

inlined: Final[Any] = numba.njit(**_OPTIONS)
"""Compiles a function that kernels are made of, for the types it is called with."""


def compiled(
    function: Callable[..., Any], signature: str, sources: Iterable[str], *, nogil: bool
) -> Any:
    """A kernel compiled for one signature, from the cache where it is there.

    ``sources`` are the files that its code comes from. Where no folder can be written to, neither
    beside the source nor the user's own, it is compiled each time. ``nogil`` lets other threads
    run Python meanwhile; a thread that must be quick keeps the lock, or it may wait for it.
    """
    text = b"".join(Path(source).read_bytes() for source in sources)
    digest = hashlib.sha256(text + numba.__version__.encode()).hexdigest()
    function.__qualname__ = f"{function.__name__}_{digest[:16]}"
    options = {"nogil": nogil, **_OPTIONS}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except (RuntimeError, OSError):  # numba's "no locator available", and a disk that is full
        return numba.njit(signature, **options)(function)
