"""What every measurement works with: sizes, prompts, our servers, plain transformers."""

import tempfile
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import transformers

from benchmarks.measured import Arm, Measured, Ratio, alternately, seconds
from benchmarks.memory import MemoryReader
from benchmarks.plain import Plain
from benchmarks.served import Served
from benchmarks.vocabulary import tokenizer
from benchmarks.workload import Sizes
from tests.support import Server

MIN_CACHE_BYTES = 1 << 20
"""The least that ``CACHER_HOT_CACHE_BYTES`` may be."""


class Bench:
    """Makes what is asked for when it is asked for; used as a context manager.

    Servers stay up and idle until the end, so that any two things can be measured alternately.
    """

    def __init__(self, sizes: Sizes, *, threads: int, rounds: int, rest_s: float) -> None:
        self.sizes = sizes
        self.threads = threads
        self.rounds = rounds
        self._rest_s = rest_s
        self.starts_s: list[float] = []
        """How long each server took to be ready."""
        self._stack = ExitStack()
        self._servers: dict[tuple[tuple[str, str], ...], Served] = {}
        self._random = np.random.default_rng(0)
        self._config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes.shape)

    def __enter__(self) -> Self:
        # On the same disk as the log of whoever runs this, where a commit costs what it costs.
        folder = tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd())
        self.folder = Path(self._stack.enter_context(folder))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens, other ones each time, so that no cache has seen them."""
        return [int(t) for t in self._random.integers(1, self.vocabulary_size, tokens)]

    @cached_property
    def model(self) -> Path:
        """A folder with a model of the shape, with random weights.

        Its end of sequence is no token of the vocabulary, so it is never drawn.
        """
        target = self.folder / "gpt2-shape"
        model: Any = transformers.GPT2LMHeadModel(self._config)
        model.generation_config.eos_token_id = self.vocabulary_size
        model.save_pretrained(target)
        tokenizer(self.vocabulary_size).save_pretrained(target)
        return target

    @cached_property
    def plain(self) -> Plain:
        """Plain transformers, warm."""
        plain = Plain(self.model, self.threads)
        plain.generate(self.prompt(self.sizes.prompt), 2)
        return plain

    @cached_property
    def memory(self) -> MemoryReader:
        """This machine's memory."""
        return MemoryReader(self.sizes.buffer_bytes, self.threads)

    def server(self, dtype: str = "float32", **settings: str) -> Served:
        """A warm server with these settings, besides those that all have."""
        settings["dtype"] = dtype
        key = tuple(sorted(settings.items()))
        if key not in self._servers:
            self._servers[key] = self._start(settings)
        return self._servers[key]

    @property
    def servers(self) -> list[Served]:
        """Those that were started."""
        return [*self._servers.values()]

    @property
    def vocabulary_size(self) -> int:
        """Tokens that there are."""
        return int(self._config.vocab_size)

    @property
    def context_size(self) -> int:
        """Tokens that a text may hold."""
        return int(self._config.n_positions)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return int(self._config.n_layer)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the K/V of so many tokens in float32."""
        return int(2 * self._config.n_layer * self._config.n_embd * 4 * tokens)

    def _start(self, settings: dict[str, str]) -> Served:
        given = {
            "CACHER_MODEL_NAME": str(self.model),
            "CACHER_THREADS": str(self.threads),
            **{f"CACHER_{name.upper()}": value for name, value in settings.items()},
        }
        database = self.folder / f"{len(self._servers)}.db"
        server = Server(database, **given)
        self.starts_s.append(seconds(lambda: self._stack.enter_context(server)))
        clients = 1 + max(*self.sizes.streams, self.sizes.forks, self.sizes.running)
        served = Served(server, self.model.name, clients)
        self._stack.enter_context(closing(served))
        for tokens in (self.sizes.long, self.sizes.prompt):
            served.client.generate(served.client.create(self.prompt(tokens)), 2)
        return served

    def measure(self, *arms: Arm, repeat: int = 1) -> list[list[float]]:
        """Samples of each arm, measured in turn, ``repeat`` times in each round."""
        return alternately(*arms, rounds=self.rounds * repeat, rest_s=self._rest_s)

    def pair(
        self,
        what: str,
        against: str,
        unit: str,
        ratio: Ratio,
        *,
        ours: Arm,
        theirs: Arm,
        repeat: int = 1,
    ) -> Measured:
        """A pair of arms, measured alternately."""
        theirs_samples, our_samples = self.measure(theirs, ours, repeat=repeat)
        return Measured(
            what=what,
            against=against,
            unit=unit,
            ratio=ratio,
            ours=our_samples,
            theirs=theirs_samples,
        )
