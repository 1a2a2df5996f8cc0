"""How fast this machine reads memory."""

import torch

from benchmarks.measured import seconds

_ROW = 65536


class MemoryReader:
    """Reads a buffer far larger than any cache, with all threads, in several ways."""

    def __init__(self, size: int, threads: int) -> None:
        self._threads = threads
        self._rows = torch.ones(size // 4).view(-1, _ROW)
        self._vector = torch.ones(_ROW)
        self.best = ""
        """The way that was fastest."""

    def bytes_per_second(self) -> float:
        """The best of three reads in each way."""
        torch.set_num_threads(self._threads)
        ways = {
            "torch matrix times vector": lambda: self._rows @ self._vector,
            "torch sum": lambda: self._rows.sum(),
        }
        times = {name: min(seconds(read) for _ in range(3)) for name, read in ways.items()}
        self.best = min(times, key=times.__getitem__)
        return self._rows.nbytes / times[self.best]
