"""Questions about the inside of a text, as tests ask them, and what transformers says to them."""

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from domain.analysis.parameters import Inside
from domain.analysis.result import Result
from domain.ids import TokenId
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.builders import config
from tests.infra.engine import small_models
from tests.infra.engine.asking import request, steps
from tests.infra.engine.bench import Gate, recorded_passes, text

FAMILIES: Final = ("cacher-tiny", "gpt2", "llama", "mistral")
"""Learned positions and rotary ones, grouped heads, a window that the text is longer than."""
TEXT: Final = text(3, 2 * BLOCK_TOKENS + 9)
NEAR: Final = 1e-5
_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


@functools.cache
def loaded(folder: str | Path, engine: Engine, **changes: Any) -> TransformersModel:
    """A model that several tests look into."""
    return small_models.language_model(folder, engine, **changes)


def of_family(
    family: str, folders: dict[str, str | Path], engine: Engine, tiny: TransformersModel
) -> TransformersModel:
    """The model of a family, loaded once."""
    return tiny if family == small_models.CACHER_TINY else loaded(folders[family], engine)


async def look(
    model: TransformersModel,
    question: Inside,
    tokens: Sequence[int] = TEXT,
    *,
    private: bool = False,
) -> Result:
    """What a model finds in some tokens."""
    return await model.look(tuple(map(TokenId, tokens)), config(), question, private=private)


@asynccontextmanager
async def streaming(model: TransformersModel, count: int = 6) -> AsyncIterator[None]:
    """Within, texts are generated: what is asked first there is begun in one pass with them.

    Raises:
        ExceptionGroup: what went wrong within, or in one of the texts.
        AssertionError: no pass was shared by all of them and the question.
    """
    texts = [request(text(seed, 40), 120, seed=seed) for seed in range(count)]
    async with asyncio.TaskGroup() as tasks:
        with Gate(model._engine) as gate, recorded_passes() as passes:
            streams = [tasks.create_task(steps(model, each)) for each in texts]
            await gate.asked(count)

            async def begin() -> None:
                await gate.asked(count + 1)
                gate.open()

            beginning = tasks.create_task(begin())
            yield
            await beginning
            for stream in streams:
                stream.cancel()
    assert max(map(len, passes)) > count, "all streams and the question in one pass"


def values(result: Result, name: str) -> Tensor:
    """A tensor of an answer."""
    (found,) = (tensor for tensor in result.tensors if tensor.name == name)
    flat = torch.frombuffer(bytearray(found.data), dtype=_DTYPES[found.dtype])
    return flat.view(found.shape)


@functools.cache
def plain(folder: str | Path) -> Any:
    """The same files as transformers runs them, in float32."""
    return small_models.read(folder).model


@torch.inference_mode()
def computed(folder: str | Path, tokens: Sequence[int] = TEXT) -> Any:
    """What transformers finds: logits, hidden states, and K/V of all tokens."""
    ids = torch.tensor([tokens])
    return plain(folder)(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=DynamicCache(),
        use_cache=True,
        output_hidden_states=True,
    )


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; of vectors with elements above 1 as a part of the largest."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.double(), theirs.double()
    scale = theirs.abs().amax(-1, keepdim=True).clamp(min=1)
    return float(((ours - theirs).abs() / scale).max())
