"""When kernels are compiled that are not those of a strategy."""

from infra.engine.analysis import attention_kernels, statistics
from infra.engine.kernels import blake2b
from infra.engine.sampling import comparing, row_kernels


def compile_kernels() -> None:
    """Have every kernel ready before somebody waits for it.

    The first time on a machine it takes seconds, and holds up whatever else runs Python; after that
    they are on disk, which takes tens of milliseconds.
    """
    row_kernels.kernels()
    blake2b.kernel()
    comparing.kernel()
    statistics.kernel()
    attention_kernels.kernels()
