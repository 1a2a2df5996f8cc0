"""In float32 the engine computes what plain transformers computes."""

from pathlib import Path
from random import Random

import pytest
import torch

from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import small_models
from tests.infra.engine.asking import GREEDY, request, steps, tokens_of
from tests.infra.engine.bench import Bench, random_cuts, text
from tests.infra.engine.small_models import CONTEXT

FAMILIES = ["cacher-tiny", "gpt2", "llama", "qwen2", "qwen3", "mistral"]
NEAR = 1e-4
NEW = 40


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, str | Path]) -> str | Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def plain(folder: str | Path) -> torch.nn.Module:
    """The same files as transformers runs them, in float32."""
    return small_models.read(folder).model


@pytest.fixture(scope="module")
def model(folder: str | Path, engine: Engine, tiny: TransformersModel) -> TransformersModel:
    if folder == small_models.CACHER_TINY:
        return tiny
    return small_models.language_model(folder, engine)


@torch.inference_mode()
def logits_of(plain: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return plain(torch.tensor([tokens]), use_cache=False).logits[0]


@torch.inference_mode()
def generated(plain: torch.nn.Module, prompt: list[int]) -> list[int]:
    """What ``transformers.generate`` adds to a prompt, greedily."""
    ids = torch.tensor([prompt])
    out = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


async def test_greedy_generation_is_that_of_transformers_token_for_token(
    model: TransformersModel, plain: torch.nn.Module
) -> None:
    for seed in range(3):
        prompt = text(seed, 1 + 45 * seed)
        ours = tokens_of(await steps(model, request(prompt, NEW, sampling=GREEDY)))
        theirs = generated(plain, prompt)
        if ours != theirs:  # allowed where the two lie close together
            pairs = zip(ours, theirs, strict=False)
            same = next(i for i, pair in enumerate(pairs) if len(set(pair)) > 1)
            row = logits_of(plain, prompt + theirs[:same])[-1]
            assert abs(row[ours[same]] - row[theirs[same]]) < NEAR


def test_logits_are_those_of_transformers_but_for_rounding(
    folder: str | Path, plain: torch.nn.Module
) -> None:
    prepared = small_models.prepared(folder)
    for count in (1, 31, 100, CONTEXT):
        tokens = text(count, count)
        bits = Bench(prepared).compute(tokens, random_cuts(Random(count), count))
        assert (bits.logits - logits_of(plain, tokens)).abs().max() < NEAR
