"""Ours: a server in a process of its own, and its clients."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import TypeVar

from benchmarks.client import TIMEOUT_S, Client
from benchmarks.workload import GREEDY
from tests.support import Server

T = TypeVar("T")
R = TypeVar("R")


class Served:
    """The default model of a server, loaded, and ``clients`` that may use it at once."""

    def __init__(self, server: Server, model_id: str, clients: int) -> None:
        self._server = server
        self._model_id = model_id
        self._clients = [Client(server.port) for _ in range(clients)]
        self._pool = ThreadPoolExecutor(clients)
        self.client = Client(server.port)
        """For whoever sends one request after the other."""
        self.guest = Client(server.port)
        """For whoever goes in the middle of an answer."""
        self.numerics = json.loads(self.client.get(f"/v1/models/{model_id}"))["numerics"]

    def close(self) -> None:
        """End the clients' threads."""
        self._pool.shutdown()

    def together(self, work: Callable[[Client, T], R], items: Sequence[T]) -> list[R]:
        """``work`` on all items at once, each with a client of its own."""
        assert len(items) <= len(self._clients)
        return [*self._pool.map(work, self._clients, items)]

    def beside(
        self,
        states: Sequence[str],
        new: int,
        *,
        after: int,
        do: Callable[[], R],
        sampling: Mapping[str, float] = GREEDY,
    ) -> tuple[R, list[list[float]]]:
        """Stream all states; ``do`` something beside them once each has ``after`` tokens.

        Returns what was done, and the times at which tokens arrived, state by state.
        """
        under_way = Semaphore(0)

        def stream(client: Client, state_id: str) -> list[float]:
            arrivals: list[float] = []
            for arrival in client.stream(state_id, new, sampling):
                arrivals.append(arrival)
                if len(arrivals) == after:
                    under_way.release()
            return arrivals

        def wait_and_do() -> R:
            for _ in states:
                assert under_way.acquire(timeout=TIMEOUT_S), "a stream ended early"
            return do()

        done = self._pool.submit(wait_and_do)
        streams = self.together(stream, states)
        return done.result(), streams

    def kv(self) -> dict[str, int]:
        """Counters of the KV cache, from ``/metrics``."""
        label = f'{{model="{self._model_id}"}} '
        lines = self.client.get("/metrics").decode().splitlines()
        found = (line.partition(label) for line in lines if line.startswith("cacher_kv_"))
        return {name.removeprefix("cacher_kv_"): int(value) for name, _, value in found if value}

    def resident_bytes(self) -> int:
        """Memory of the server's process."""
        return self._memory("VmRSS")

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The most memory that the server's process has while some work is done."""
        (self._process / "clear_refs").write_text("5")  # the peak so far is forgotten: proc(5)
        work()
        return self._memory("VmHWM")

    @property
    def _process(self) -> Path:
        assert self._server.process is not None
        return Path(f"/proc/{self._server.process.pid}")

    def _memory(self, name: str) -> int:
        status = (self._process / "status").read_text()
        return 1024 * int(status.partition(f"{name}:")[2].split()[0])
