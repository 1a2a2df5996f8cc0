"""Every family that is promised, in odd shapes: one set of bits, and those of transformers.

A model is saved, loaded by the real loader, prepared once, and then held against the contract and
against plain transformers.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    CohereConfig,
    FalconConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PretrainedConfig,
)

from domain.errors import ModelUnavailable
from domain.ids import ModelId
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from infra.engine.forward import Prepared
from infra.engine.probe import check_against_plain, plain_logits, probe
from tests.infra.engine import small_models
from tests.infra.engine.bench import Bench, Bits, random_cuts, text
from tests.infra.engine.small_models import CONTEXT, EVERY_VOCABULARY

DTYPES: Final = (torch.float32, torch.bfloat16)
TOKENS: Final = 2 * BLOCK_TOKENS + 21
TEXT: Final = text(0, TOKENS, EVERY_VOCABULARY)
WHOLE: Final = text(1, CONTEXT, EVERY_VOCABULARY)
ROUNDING: Final = 1e-5


class Variant(NamedTuple):
    """A model in one form."""

    name: str
    dtype: torch.dtype
    strategy: str

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}-{self.strategy}"


class Subject(NamedTuple):
    """A prepared model; what plain transformers, before, made of the probe's text and of ``WHOLE``;
    and its bits of ``TEXT`` by one prefill."""

    prepared: Prepared
    config: dict[str, Any]
    probed: Tensor
    plain: Tensor
    reference: Bits


STRICT: Final = [
    *(Variant(name, dtype, "strict") for name in small_models.FAMILIES for dtype in DTYPES),
    *(Variant(name, torch.float32, "strict") for name in small_models.SHAPES),
]
MODULES: Final = [
    *(Variant(name, torch.float32, "onednn") for name in ("gpt_neox", "opt", "gemma2", "phi3")),
    *(Variant("qwen2-mixed", torch.float32, strategy) for strategy in ("onednn", "tile")),
    Variant("gemma2", torch.bfloat16, "onednn"),
]


@pytest.fixture(scope="module")
def subjects(folders: dict[str, str | Path]) -> Callable[[Variant], Subject]:
    @cache
    def subject(variant: Variant) -> Subject:
        small_models.skip_unless_packable(variant.strategy, variant.dtype)
        loaded = small_models.read(folders[variant.name], variant.dtype)
        probed = plain_logits(
            loaded.model, loaded.config, loaded.vocabulary_size, loaded.context_size
        )
        with torch.inference_mode():
            plain = loaded.model(torch.tensor([WHOLE]), use_cache=False).logits[0].float()
        prepared = small_models.made_ready(loaded, variant.dtype, strategy=variant.strategy)
        return Subject(prepared, loaded.config, probed, plain, Bench(prepared).compute(TEXT))

    return subject


@pytest.fixture(params=[*STRICT, *MODULES], ids=str)
def subject(request: pytest.FixtureRequest, subjects: Callable[[Variant], Subject]) -> Subject:
    return subjects(request.param)


@pytest.fixture(params=STRICT, ids=str)
def strict(request: pytest.FixtureRequest, subjects: Callable[[Variant], Subject]) -> Subject:
    return subjects(request.param)


def test_it_is_certified_when_it_is_loaded(subject: Subject) -> None:
    vocabulary = subject.prepared.shape.vocabulary
    check_against_plain(ModelId("m"), subject.prepared, subject.probed, vocabulary)
    assert probe(subject.prepared, subject.config, vocabulary, CONTEXT).failure is None


def test_cuts_and_neighbours_change_no_bit(subject: Subject) -> None:
    random = Random(0)
    single = Bench(subject.prepared).compute(TEXT, [1] * TOKENS)
    assert single.equal(subject.reference)
    bench = Bench(subject.prepared, max_sequences=5, max_rows=64)
    others = [
        bench.feeding(tokens, random_cuts(random, len(tokens)))
        for tokens in (
            TEXT[: BLOCK_TOKENS + 3],
            *(text(9 + i, random.randint(1, 120), EVERY_VOCABULARY) for i in range(4)),
        )
    ]
    feeding = bench.feeding(TEXT, random_cuts(random, TOKENS))
    assert len(bench.run(*others[:3], feeding, *others[3:], random=random)) == 6
    assert feeding.bits is not None
    assert feeding.bits.equal(subject.reference)


def test_a_hot_an_evicted_and_a_private_text_have_the_same_bits(subject: Subject) -> None:
    bench = Bench(subject.prepared, blocks=6)
    bench.compute(TEXT)
    hot = bench.compute(TEXT, first_wanted=TOKENS - 3)
    assert (bench.pool.hits, bench.pool.evictions) == (2, 0)
    bench.compute(text(3, 5 * BLOCK_TOKENS, EVERY_VOCABULARY))
    assert bench.pool.evictions == 2
    evicted = bench.compute(TEXT, first_wanted=TOKENS - 3)
    private = bench.compute(TEXT, first_wanted=TOKENS - 3, root=None)
    assert bench.pool.hits == 2
    for bits in (hot, evicted, private):
        assert bits.equal(subject.reference)


@pytest.mark.parametrize("threads", [1, 3, 5, 8])
def test_the_number_of_threads_changes_no_bit(strict: Subject, threads: int) -> None:
    bench = Bench(small_models.on_threads(strict.prepared, threads))
    other = bench.feeding(text(3, 50, EVERY_VOCABULARY), [7] * 7 + [1])
    bits = bench.run(other, bench.feeding(TEXT, random_cuts(Random(threads), TOKENS)))
    assert bits[1].equal(strict.reference)


def test_logits_are_those_of_transformers_but_for_rounding(subject: Subject) -> None:
    rounding = ROUNDING if subject.prepared.dtype == torch.float32 else 5e-2
    cuts = random_cuts(Random(1), CONTEXT)
    logits = Bench(subject.prepared).compute(WHOLE, cuts).logits
    assert logits.shape == subject.plain.shape
    scale = subject.plain.abs().max().clamp(min=1)
    assert scale > 2  # or nothing would be told apart
    assert (logits - subject.plain).abs().max() <= rounding * scale


def test_control_a_window_that_is_not_kept_is_seen(subjects: Callable[[Variant], Subject]) -> None:
    subject = subjects(Variant("qwen2-mixed", torch.float32, "strict"))
    logits = Bench(subject.prepared).compute(WHOLE[-41:]).logits
    difference = (logits[-1] - subject.plain[-1]).abs().max()
    assert difference > 100 * ROUNDING * subject.plain.abs().max()


SMALL: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
}
GATED: Final[dict[str, Any]] = SMALL | {"intermediate_size": 172, "num_key_value_heads": 2}
ROPE: Final = {"rope_type": "default", "rope_theta": 10_000.0}
REFUSED: Final[dict[str, PretrainedConfig]] = {
    "attention of its own": FalconConfig(**SMALL),
    "attention sinks": GptOssConfig(
        **GATED, head_dim=16, num_local_experts=2, num_experts_per_tok=1, rope_parameters=ROPE
    ),
    "attention within chunks": Llama4TextConfig(
        **GATED, head_dim=16, attention_chunk_size=64, num_local_experts=2, rope_parameters=ROPE
    ),
    "tokens that see later ones": BertConfig(**SMALL, intermediate_size=64),
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_attends_in_another_way_is_refused(
    engine: Engine, tmp_path: Path, config: PretrainedConfig
) -> None:
    folder = small_models.write(tmp_path / "odd", config)
    with pytest.raises(ModelUnavailable, match=r"'odd'.*differ from plain transformers.*family"):
        small_models.language_model(folder, engine, strategy="auto")


def test_a_model_that_strict_has_no_kernels_for_is_served_by_another_strategy(
    engine: Engine, tmp_path: Path
) -> None:
    folder = small_models.write(tmp_path / "cohere", CohereConfig(**GATED))
    with pytest.raises(ModelUnavailable, match="no kernel strategy can run it: strict: the operat"):
        small_models.language_model(folder, engine, strategy="strict")
    model = small_models.language_model(folder, engine, strategy="auto")
    assert model.numerics.strategy in ("onednn", "tile")
    assert model.numerics.deterministic is True


def test_experts_are_served_without_the_claim_and_never_silently(
    engine: Engine, tmp_path: Path
) -> None:
    config = MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2)
    folder = small_models.write(tmp_path / "experts", config)
    model = small_models.language_model(folder, engine, strategy="auto")
    assert model.numerics.strategy in ("onednn", "tile")
    assert model.numerics.deterministic is False
    assert "differ" in (model.numerics.note or "")
