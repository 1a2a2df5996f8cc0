"""The same bits on every processor, and in every process.

Kernels are compiled for older processors than this one, which fuse and vectorise less, and torch is
told to do without what they lack. Compiled code is kept per processor, so only the first run of
these tests compiles.
"""

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import llvmlite.binding
import pytest
from transformers import LlamaConfig

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from tests.infra.engine import elsewhere, small_models
from tests.infra.engine.asking import request, steps
from tests.infra.engine.bench import text
from tests.infra.engine.elsewhere import Elsewhere
from tests.infra.engine.small_models import CACHER_TINY, EVERY_VOCABULARY

PROCESSORS: Final = {
    "AVX2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    "SSE2": {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "ATEN_CPU_CAPABILITY": "default",
    },
}
HERE: Final = "here"


@pytest.fixture(scope="module")
def asked(folders: dict[str, str | Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each process computes: three models in two types, draws, and a generation."""
    config = LlamaConfig(
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=104,  # with such heads torch's frequencies are not the same everywhere
        num_hidden_layers=2,
        intermediate_size=172,
        max_position_embeddings=small_models.CONTEXT,
    )
    llama = small_models.write(tmp_path_factory.mktemp("processors") / "llama", config)
    models = [CACHER_TINY, str(llama), str(folders["gpt2-untied"])]
    return [
        ["processor"],
        ["torch_frequencies", str(llama)],
        ["chances"],
        *(["computed", model, dtype] for model in models for dtype in elsewhere.DTYPES),
        ["drawn", str(folders["llama3"])],
    ]


@pytest.fixture(scope="module")
def others(asked: list[Any]) -> Iterator[dict[str, Elsewhere]]:
    """Processes that compute it, all at the same time."""
    usable = {HERE: Elsewhere(asked)}
    if platform.machine().lower() in ("x86_64", "amd64"):
        if llvmlite.binding.get_host_cpu_features().get("avx2"):
            usable["AVX2"] = Elsewhere(asked, **PROCESSORS["AVX2"])
        usable["SSE2"] = Elsewhere(asked, **PROCESSORS["SSE2"])
    yield usable
    for each in usable.values():
        each.end()


@pytest.fixture(scope="module")
def expected(asked: list[Any], others: dict[str, Elsewhere]) -> list[Any]:
    return elsewhere.everything(asked)


def test_another_process_computes_and_draws_the_same(
    others: dict[str, Elsewhere], expected: list[Any]
) -> None:
    assert others[HERE].answers() == expected


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_older_processor_computes_and_draws_the_same(
    others: dict[str, Elsewhere], expected: list[Any], name: str
) -> None:
    if name not in others:
        pytest.skip(f"this machine has no {name}")
    processor, frequencies, *results = others[name].answers()
    here, torch_here, *results_here = expected
    assert processor["name"] == PROCESSORS[name]["NUMBA_CPU_NAME"]
    assert processor["features"] != here["features"]
    assert not processor["wide"]
    assert processor["fused"] == (name == "AVX2")
    if processor["torch"] != here["torch"]:
        assert frequencies != torch_here  # so it does make a difference
    assert results == results_here


async def test_cold_twice_hot_and_rebuilt_draw_the_same(
    engine: Engine, folders: dict[str, str | Path], expected: list[Any]
) -> None:
    prompt, asked = text(8, 70, EVERY_VOCABULARY), 24
    made: list[Any] = []
    for _ in range(2):
        model = small_models.language_model(folders["llama3"], engine)
        made.append(await steps(model, request(prompt, asked, seed=5)))
        assert model.counters().hits == 0
    made.append(await steps(model, request(prompt, asked, seed=5)))
    assert model.counters().hits == 70 // BLOCK_TOKENS
    await model.forget()
    made.append(await steps(model, request(prompt, asked, seed=5)))
    assert model.counters().hits == 70 // BLOCK_TOKENS
    for each in made:
        assert each == made[0]
    drawn = [[step.drawn.token_id, step.drawn.logits_digest] for step in made[0]]
    assert drawn == expected[-1]
