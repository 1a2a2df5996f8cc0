"""Digests of what is found, written down: the same for ever, or the form of results is another one.

Of every kind of question, about texts of ``cacher-tiny`` in float32 under the strict kernels, which
give the same bits on every CPU. What a classifier's own modules give depends on it: of them there
is only what is made of logits.
"""

import asyncio
from pathlib import Path
from typing import Final

import msgspec

from app.bootstrap import open_models
from app.operations.analysis.compute import compute
from app.settings import Settings
from domain.analysis.classify import Problem, classified
from domain.analysis.parameters import (
    Addition,
    AttentionParameters,
    CacheParameters,
    ClassifyParameters,
    CompareParameters,
    EmbeddingParameters,
    HeadAt,
    HiddenParameters,
    InterveneParameters,
    LensParameters,
    NextParameters,
    Parameters,
    TokensParameters,
)
from domain.analysis.result import FORM, digest
from domain.analysis.tokens import Measured
from domain.canonical import as_json
from domain.ids import ModelId, StateId, TokenId, Version
from domain.models import Classifier, LanguageModel, Models
from domain.origin import New
from domain.state import Live
from tests.builders import RECORDED_AT, config, state_id

SETTINGS: Final = Settings(
    model_name="cacher-tiny", threads=1, strategy="strict", hot_cache_bytes=32 << 20
)
FILE: Final = Path(__file__).parent / "data" / f"result_digests_form_{FORM}.json"
WHAT_TO_DO: Final = """\
What is found is digested otherwise than in the form that logs say it is of, so verification would
call honest ones divergent. Raise FORM in domain/analysis/result.py, then write the new digests:
python -m tests.end_to_end.result_digests"""

TEXTS: Final = (
    "Once upon a time there was a small bear. \N{BEAR FACE} He went",
    "Once upon a time there was a small girl, and the bear saw her.",
)
DIMENSIONS: Final = 128
"""The width of the model's hidden states."""

ASKED: Final[dict[str, Parameters]] = {
    "tokens": TokensParameters(),
    "tokens, with alternatives": TokensParameters(start=2, end=9, top_k=40),
    "next": NextParameters(),
    "attention, weights": AttentionParameters(layers=(0, 1)),
    "attention, mean": AttentionParameters(layer=1, start=3, end=7),
    "attention, of a head": AttentionParameters(layer=0, head=1, threshold=0.05),
    "attention, sparse": AttentionParameters(layer=0, heads=(0, 2), format="sparse", top_k=3),
    "attention, rollout": AttentionParameters(method="rollout"),
    "attention, summary": AttentionParameters(layers=(0, 1), method="summary"),
    "cache, keys": CacheParameters(layer=0, key_name="k"),
    "cache, values": CacheParameters(layer=1, key_name="v", head=0, start=1, end=5),
    "hidden": HiddenParameters(layers=(0, 1, 2)),
    "hidden, mean": HiddenParameters(start=1, end=8, pooling="mean"),
    "hidden, last": HiddenParameters(pooling="last"),
    "embedding": EmbeddingParameters(token_index=3),
    "lens": LensParameters(),
    "lens, at a position": LensParameters(position=4, layers=(1, 2), top_k=20),
    "classify, labels": ClassifyParameters(labels=(" happy", " very sad", " away")),
    "classify, text": ClassifyParameters(text=" home.", labels=(" He", " She")),
    "compare": CompareParameters(other_state_id=state_id(1), other_version=Version(1)),
    "intervene, tokens": InterveneParameters(replace={3: TokenId(7), 1: TokenId(12)}),
    "intervene, heads": InterveneParameters(zero_heads=(HeadAt(layer=0, head=1),), top_k=20),
    "intervene, vectors": InterveneParameters(
        add=(Addition(layer=1, vector=tuple(0.25 * (i % 5) for i in range(DIMENSIONS)), start=2),)
    ),
}
LOGITS: Final = (0.75, -2.5, 0.125)
PROBLEMS: Final[dict[str, Problem]] = {
    "classify, one of the classes": "single_label_classification",
    "classify, some of the classes": "multi_label_classification",
    "classify, values": "regression",
}


class Texts:
    """The materials of the questions: states of these texts, never stored."""

    private = True

    def __init__(self, models: Models) -> None:
        self._models = models

    async def state(self, asked: StateId, version: Version) -> Live:
        """The state of a text."""
        model_id = ModelId("cacher-tiny")
        model = await self._models.get(model_id)
        assert model.model_type == "causal_lm"
        number = [state_id(0), state_id(1)].index(asked)
        tokens = await model.encode(TEXTS[number], beginning=True, room=model.context_size)
        return Live(
            state_id=asked,
            version=version,
            model_id=model_id,
            model_type="causal_lm",
            config=config(temperature=0.8, top_k=50, repetition_penalty=1.25),
            metadata={},
            origin=New(),
            content=model.fragment((), tokens),
            dropped=0,
            created_at=RECORDED_AT,
            modified_at=RECORDED_AT,
        )

    async def any_model(self, state: Live) -> LanguageModel | Classifier:
        """The model of a state."""
        return await self._models.get(state.model_id)

    async def model(self, state: Live) -> LanguageModel:
        """The same."""
        model = await self.any_model(state)
        assert model.model_type == "causal_lm"
        return model

    async def stored(
        self, model: LanguageModel, state: Live, asked: range, top_k: int
    ) -> dict[int, Measured]:
        """Nothing."""
        return {}


async def found_by(models: Models) -> dict[str, str]:
    """The digest of what is found, by question."""
    found = {
        name: digest(classified(LOGITS, ("good", "bad", "neither"), problem))
        for name, problem in PROBLEMS.items()
    }
    texts = Texts(models)
    state = await texts.state(state_id(0), Version(2))
    for name, parameters in ASKED.items():
        result, _ = await compute(texts, state, parameters)
        found[name] = digest(result)
    return found


def written() -> dict[str, str]:
    """The digests that results of this form have for ever."""
    assert FILE.exists(), WHAT_TO_DO
    return msgspec.json.decode(FILE.read_bytes(), type=dict[str, str])


async def _write() -> None:
    """Add what is not written yet; a digest that is there stays."""
    async with open_models(SETTINGS) as models:
        found = await found_by(models)
    known = written() if FILE.exists() else {}
    FILE.write_text(msgspec.json.format(as_json(found | known), indent=2) + "\n")


if __name__ == "__main__":
    asyncio.run(_write())
