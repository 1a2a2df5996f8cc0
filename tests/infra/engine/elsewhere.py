"""What a model computes, as digests to be compared with those of another process.

``python -m tests.infra.engine.elsewhere`` reads what is asked for from its standard input, a JSON
list of arguments for :func:`everything`, and prints the answers as JSON.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import torch
from numba.core.registry import cpu_target
from torch import Tensor

from infra.engine.engine import Engine
from infra.engine.kernels import elementary
from infra.engine.sampling import sampler
from infra.engine.sampling.row_kernels import kernels
from infra.engine.strict.vectors import WIDE
from tests.infra.engine import small_models
from tests.infra.engine.asking import request, steps
from tests.infra.engine.bench import Bench, random_cuts, text
from tests.infra.engine.small_models import EVERY_VOCABULARY

TOKENS: Final = 40
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROOT: Final = Path(__file__).parents[3]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def computed(folder: str, dtype: str) -> dict[str, str]:
    """Digests of the logits and K/V of a text, by the strict strategy, in some cuts."""
    prepared = small_models.prepared(folder, DTYPES[dtype])
    tokens = text(7, TOKENS, EVERY_VOCABULARY)
    bits = Bench(prepared).compute(tokens, [5, *random_cuts(Random(1), TOKENS - 5)])
    return {name: digest(getattr(bits, name)) for name in ("logits", "k", "v")}


def torch_frequencies(folder: str) -> str:
    """A digest of the frequencies of rotary positions as torch computes them."""
    model: Any = small_models.read(folder).model
    return digest(model.model.rotary_emb.inv_freq)


def processor() -> dict[str, Any]:
    """What the kernels are compiled for, and what torch uses."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    elementary.exp(-1.0)
    return {
        "name": name,
        "features": features,
        "wide": WIDE,
        "fused": "vfmadd" in "".join(elementary.exp.inspect_asm().values()),
        "torch": torch.backends.cpu.get_cpu_capability(),
    }


def chances() -> list[str]:
    """Digests of what is drawn, of how some rows are drawn from, and of their exponentials."""
    weights, exponentials = hashlib.sha256(), hashlib.sha256()
    for seed, sampling in enumerate(sampler._WAYS):
        row = np.random.Generator(np.random.Philox(seed)).random(5000).astype(np.float32) * 16
        weights.update(sampler.distribution(row, sampling).tobytes())
        exponentials.update(kernels().exponentials(-row.astype(np.float64)).tobytes())
    return [sampler.golden(), weights.hexdigest(), exponentials.hexdigest()]


def drawn(folder: str) -> list[list[Any]]:
    """Tokens of a generation through the engine, with the digests of their logits."""

    async def draw(engine: Engine) -> list[list[Any]]:
        model = small_models.language_model(folder, engine)
        made = await steps(model, request(text(8, 70, EVERY_VOCABULARY), 24, seed=5))
        return [[step.drawn.token_id, step.drawn.logits_digest] for step in made]

    with Engine() as engine:
        return asyncio.run(draw(engine))


FUNCTIONS: Final = {
    function.__name__: function
    for function in (computed, torch_frequencies, processor, chances, drawn)
}


def everything(asked: Sequence[Sequence[str]]) -> list[Any]:
    """The answer of each function, asked for by its name and its arguments."""
    return [FUNCTIONS[name](*arguments) for name, *arguments in asked]


class Elsewhere:
    """A process of its own that computes what is asked for, from the moment it is made."""

    def __init__(self, asked: Sequence[Sequence[str]], **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.infra.engine.elsewhere"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
        assert self._process.stdin is not None
        json.dump(asked, self._process.stdin)
        self._process.stdin.close()

    def answers(self) -> list[Any]:
        """What it computed."""
        assert self._process.stdout is not None
        printed = self._process.stdout.read()
        assert self._process.wait() == 0
        answers: list[Any] = json.loads(printed.splitlines()[-1])
        return answers

    def end(self) -> None:
        """Do not wait for it any longer."""
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    print(json.dumps(everything(json.load(sys.stdin))))  # noqa: T201 - to the one who asked
