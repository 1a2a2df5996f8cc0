"""How large an answer about the inside of a text may be, and what it is made from."""

from typing import Any, Final

import pytest

from domain.analysis.attention import MAX_ROLLED, check_sizes, select
from domain.analysis.hidden import asked_hidden
from domain.analysis.lens import asked_lens
from domain.analysis.parameters import AttentionParameters, HiddenParameters, LensParameters
from domain.analysis.ranges import CAPTURED
from domain.errors import ResultTooLarge
from domain.models import Dimensions

GPT2: Final = Dimensions(layers=12, heads=12, kv_heads=12, head_dim=64, width=768)
CONTEXT: Final = 1024
LIMIT: Final = 64 << 20
EVERY_STATE: Final = tuple(range(13))


def attention(limit: int = LIMIT, **asked: Any) -> None:
    parameters = AttentionParameters(**asked)
    check_sizes(parameters, select(parameters, GPT2, CONTEXT), GPT2, limit)


@pytest.mark.parametrize("method", ["rollout", "summary"])
def test_all_layers_of_a_long_text_of_gpt2_may_be_looked_at_by_default(method: str) -> None:
    attention(method=method)
    asked_hidden(HiddenParameters(layers=EVERY_STATE, pooling="mean"), GPT2, CONTEXT, LIMIT)
    asked_hidden(HiddenParameters(layers=EVERY_STATE), GPT2, CONTEXT, LIMIT)
    asked_lens(LensParameters(top_k=5), GPT2, CONTEXT, LIMIT)


@pytest.mark.parametrize(
    ("captured", "asked"),
    [
        (12 * 2 * CONTEXT * 768 * 4, {"method": "summary"}),
        (12 * 2 * CONTEXT * 768 * 4 + CONTEXT * CONTEXT * 8, {"method": "rollout", "start": 1000}),
        ((CONTEXT + 24) * 768 * 4, {"layer": 3, "start": 1000}),
    ],
)
def test_queries_and_keys_may_take_a_multiple_of_what_an_answer_may(
    captured: int, asked: dict[str, Any]
) -> None:
    limit = -(-captured // CAPTURED)
    attention(limit, **asked)
    with pytest.raises(ResultTooLarge, match="What an answer is made from counts too") as refused:
        attention(limit - 1, **asked)
    assert refused.value.facts["size"] == captured
    assert refused.value.facts["limit"] == CAPTURED * (limit - 1)


def test_an_answer_itself_may_not() -> None:
    rows = CONTEXT * CONTEXT * 4
    attention(16 * rows, layers=(0, 1), heads=tuple(range(8)))
    with pytest.raises(ResultTooLarge, match="fewer layers or heads") as refused:
        attention(16 * rows - 1, layers=(0, 1), heads=tuple(range(8)))
    assert refused.value.facts["limit"] == 16 * rows - 1
    states = CONTEXT * 768 * 4
    asked_hidden(HiddenParameters(), GPT2, CONTEXT, states)
    with pytest.raises(ResultTooLarge) as refused:
        asked_hidden(HiddenParameters(), GPT2, CONTEXT, states - 1)
    assert refused.value.facts["limit"] == states - 1
    pooled = HiddenParameters(pooling="mean")
    asked_hidden(pooled, GPT2, CONTEXT, states // CAPTURED)
    with pytest.raises(ResultTooLarge, match="What an answer is made from"):
        asked_hidden(pooled, GPT2, CONTEXT, states // CAPTURED - 1)


@pytest.mark.parametrize(("tokens", "layers"), [(2048, 6), (1024, 55), (3914, 1)])
def test_the_work_of_a_rollout_is_bounded_beside_its_memory(tokens: int, layers: int) -> None:
    def ask(layers: int) -> None:
        size = Dimensions(layers=layers, heads=1, kv_heads=1, head_dim=1, width=1)
        parameters = AttentionParameters(method="rollout")
        check_sizes(parameters, select(parameters, size, tokens), size, limit=1 << 40)

    ask(layers)
    with pytest.raises(ResultTooLarge, match="steps of work") as refused:
        ask(layers + 1)
    assert refused.value.facts["size"] == tokens**3 * (layers + 1)
    assert refused.value.facts["limit"] == MAX_ROLLED
    assert "Name a lower layer or an earlier end" in str(refused.value)
