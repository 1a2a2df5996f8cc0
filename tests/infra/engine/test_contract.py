"""The numerics contract: one text, one set of bits, however the computation was cut up.

Every test compares logits and K/V with ``torch.equal``. The negative control is the strategy of
plain BLAS: the same comparison must find that it breaks the contract.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.forward import Prepared
from infra.engine.modules.strategy import MIN_ROWS
from infra.engine.probe import probe
from infra.engine.strategies.onednn import PackedLinear
from infra.engine.strategies.tile import TiledLinear
from tests.infra.engine import small_models
from tests.infra.engine.bench import Bench, Bits, random_cuts, text
from tests.infra.engine.small_models import CONTEXT

TOKENS: Final = 2 * BLOCK_TOKENS + 21
TEXT: Final = text(0, TOKENS)
FAMILIES: Final = ("cacher-tiny", "llama", "qwen2", "qwen3")
DTYPES: Final = (torch.float32, torch.bfloat16)


class Variant(NamedTuple):
    """A model in one form: what the fixtures below are parametrised by."""

    family: str
    dtype: torch.dtype
    strategy: str

    def __str__(self) -> str:
        return f"{self.family}-{str(self.dtype).removeprefix('torch.')}-{self.strategy}"


VARIANTS: Final = [
    *(Variant(family, dtype, "strict") for family in FAMILIES for dtype in DTYPES),
    *(Variant("llama", dtype, "onednn") for dtype in DTYPES),
    *(Variant("llama", dtype, "tile") for dtype in DTYPES),
    *(Variant("llama", dtype, "cuda") for dtype in DTYPES),
    Variant("mistral", torch.float32, "strict"),
    Variant("mistral", torch.float32, "onednn"),
    Variant("gpt2", torch.float32, "strict"),
    Variant("gpt2", torch.float32, "tile"),
    Variant("gpt2", torch.float32, "cuda"),
]


class Subject(NamedTuple):
    """A prepared model and the bits of ``TEXT`` by one prefill in a fresh cache."""

    prepared: Prepared
    reference: Bits


Subjects = Callable[[Variant], Subject]


@pytest.fixture(scope="module")
def subjects(folders: dict[str, str | Path]) -> Subjects:
    @cache
    def subject(variant: Variant) -> Subject:
        prepared = load(folders, variant)
        return Subject(prepared, Bench(prepared).compute(TEXT))

    return subject


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture
def subject(subjects: Subjects, variant: Variant) -> Subject:
    return subjects(variant)


def load(folders: dict[str, str | Path], variant: Variant, *, threads: int = 2) -> Prepared:
    small_models.skip_unless_packable(variant.strategy, variant.dtype)
    return small_models.prepared(
        folders[variant.family], variant.dtype, strategy=variant.strategy, threads=threads
    )


def test_token_by_token_gives_the_bits_of_one_prefill(subject: Subject) -> None:
    assert Bench(subject.prepared).compute(TEXT, [1] * TOKENS).equal(subject.reference)


def test_chunks_of_random_sizes_give_the_bits_of_one_prefill(subject: Subject) -> None:
    for seed in range(2):
        cuts = random_cuts(Random(seed), TOKENS)
        assert Bench(subject.prepared).compute(TEXT, cuts).equal(subject.reference), cuts


def test_neighbours_in_the_batch_change_no_bit(subject: Subject) -> None:
    for seed in range(2):
        random = Random(seed)
        bench = Bench(subject.prepared, max_sequences=random.randint(2, 8), max_rows=64)
        others = [
            bench.feeding(tokens, random_cuts(random, len(tokens)))
            for tokens in (text(100 + i, random.randint(1, TOKENS + 40)) for i in range(5))
        ]
        feeding = bench.feeding(TEXT, random_cuts(random, TOKENS))
        others.insert(random.randint(0, len(others)), feeding)
        assert len(bench.run(*others, random=random)) == 6
        assert feeding.bits is not None
        assert feeding.bits.equal(subject.reference)


def test_a_hot_prefix_gives_the_bits_of_a_cold_one(subject: Subject) -> None:
    bench = Bench(subject.prepared)
    bench.compute(TEXT)
    assert bench.pool.hits == 0
    hot = bench.compute(TEXT, first_wanted=TOKENS - 3)
    assert bench.pool.hits == 2
    assert hot.equal(subject.reference)


def test_a_cache_rebuilt_after_it_was_dropped_has_the_same_bits(subject: Subject) -> None:
    bench = Bench(subject.prepared)
    bench.compute(TEXT, random_cuts(Random(5), TOKENS))
    bench.pool.forget()
    bench.store.k.fill_(7)
    bench.store.v.fill_(7)
    rebuilt = bench.compute(TEXT, first_wanted=TOKENS - 3)
    assert bench.pool.hits == 0
    assert rebuilt.equal(subject.reference)


def test_a_model_loaded_anew_gives_the_same_bits(
    subject: Subject, folders: dict[str, str | Path], variant: Variant
) -> None:
    again = load(folders, variant)
    assert again is not subject.prepared
    assert Bench(again).compute(TEXT).equal(subject.reference)


def test_forks_that_share_blocks_have_the_bits_of_texts_of_their_own(subject: Subject) -> None:
    shared = 2 * BLOCK_TOKENS
    fork = TEXT[:shared] + text(1, 30)
    alone = Bench(subject.prepared).compute(fork)
    bench = Bench(subject.prepared)
    bench.compute(TEXT[:shared])
    feedings = [bench.feeding(tokens, first_wanted=shared) for tokens in (TEXT, fork)]
    bits = bench.run(*feedings)
    assert bench.pool.hits == 4
    assert feedings[0].text.reused == feedings[1].text.reused == shared
    assert bits[0].equal(subject.reference)
    assert bits[1].equal(alone)


def test_a_text_rewound_and_continued_again_gets_its_bits_back(subject: Subject) -> None:
    bench = Bench(subject.prepared)
    bench.compute(TEXT)
    kept = BLOCK_TOKENS + 5
    detour = TEXT[:kept] + text(2, 40)
    bench.compute(detour, random_cuts(Random(6), len(detour), first=kept), first_wanted=kept - 1)
    again = bench.compute(TEXT, random_cuts(Random(7), TOKENS, first=kept), first_wanted=kept - 1)
    assert bench.pool.hits == 2
    assert again.equal(subject.reference)


def test_a_private_text_shares_nothing_and_has_the_same_bits(subject: Subject) -> None:
    bench = Bench(subject.prepared)
    bench.compute(TEXT)
    cached = bench.pool.cached
    private = bench.compute(TEXT, first_wanted=TOKENS - 3, root=None)
    assert bench.pool.hits == 0
    assert bench.pool.cached == cached
    assert private.equal(subject.reference)


@pytest.mark.parametrize("threads", [1, 3, 5, 8])
@pytest.mark.parametrize(
    "variant",
    [
        Variant("cacher-tiny", torch.float32, "onednn"),
        *(Variant("llama", dtype, name) for dtype in DTYPES for name in ("onednn", "tile")),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_no_bit(
    subjects: Subjects,
    folders: dict[str, str | Path],
    variant: Variant,
    threads: int,
) -> None:
    prepared = load(folders, variant, threads=threads)
    reference = subjects(variant).reference  # computed by two
    assert Bench(prepared).compute(TEXT).equal(reference)
    bench = Bench(prepared)
    other = bench.feeding(text(3, 50), [7] * 7 + [1])
    bits = bench.run(other, bench.feeding(TEXT, random_cuts(Random(threads), TOKENS)))
    assert bits[1].equal(reference)


@pytest.mark.parametrize("width", [1000, 1376])
def test_tensors_large_enough_to_be_cut_across_threads_keep_their_bits(
    tmp_path: Path, width: int
) -> None:
    wide = small_models.prepared(small_models.write(tmp_path / "wide", small_models.wide(width)))
    long = text(5, CONTEXT - 11)
    found: list[Bits] = []
    for threads in (1, 2, 3, 5, 8):
        prepared = small_models.on_threads(wide, threads)
        cuts = random_cuts(Random(threads), len(long), largest=170)
        found += (Bench(prepared, max_rows=256).compute(long, cut) for cut in (None, cuts))
    assert all(bits.equal(found[0]) for bits in found)


@pytest.mark.parametrize("strategy", ["onednn", "tile"])
def test_no_linear_layer_is_ever_given_fewer_rows_than_blas_treats_as_vectors(
    folders: dict[str, str | Path], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    for kind in (PackedLinear, TiledLinear):

        def watched(self: nn.Module, x: Tensor, forward: Any = kind.forward) -> Tensor:
            rows.append(x.shape[-2])
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", watched)
    prepared = load(folders, Variant("llama", torch.float32, strategy))
    rows.clear()
    Bench(prepared).compute(TEXT[:9], [1, 1, 3, 1, 2, 1])
    assert len(rows) == 6 * (7 * 2 + 1)  # passes, layers of each block, head
    assert min(rows) >= MIN_ROWS


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_text_as_long_as_the_context_has_one_set_of_bits(subjects: Subjects, family: str) -> None:
    prepared = subjects(Variant(family, torch.float32, "strict")).prepared
    long = text(4, CONTEXT)
    prefill = Bench(prepared, max_rows=CONTEXT).compute(long)
    cuts = [CONTEXT - 12, *[1] * 12]
    assert Bench(prepared, max_rows=37).compute(long, cuts).equal(prefill)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_text_in_any_cuts_beside_any_other_has_one_set_of_bits(
    subjects: Subjects, data: st.DataObject
) -> None:
    prepared = subjects(Variant("llama", torch.float32, "onednn")).prepared
    token = st.integers(0, 1023)
    tokens = data.draw(st.lists(token, min_size=1, max_size=70))
    other = data.draw(st.lists(token, min_size=1, max_size=70))
    random = data.draw(st.randoms(use_true_random=False))
    cuts, its_cuts = random_cuts(random, len(tokens)), random_cuts(random, len(other))
    bench = Bench(prepared, max_rows=data.draw(st.integers(1, 64)))
    bits = bench.run(bench.feeding(other, its_cuts), bench.feeding(tokens, cuts), random=random)
    assert bits[1].equal(Bench(prepared).compute(tokens))


@pytest.mark.parametrize("family", ["cacher-tiny", "llama"])
def test_control_plain_blas_breaks_the_contract_and_the_probe_says_so(
    folders: dict[str, str | Path], family: str
) -> None:
    plain = load(folders, Variant(family, torch.float32, "plain"))
    prefill = Bench(plain).compute(TEXT)
    assert not Bench(plain).compute(TEXT, [1] * TOKENS).equal(prefill)
    finding = probe(plain, {}, 1024, CONTEXT)
    assert finding.failure is not None
    assert "differ" in finding.failure


def test_control_a_block_that_is_not_what_it_claims_is_seen(subjects: Subjects) -> None:
    prepared, reference = subjects(Variant("llama", torch.float32, "onednn"))
    bench = Bench(prepared)
    bench.compute(TEXT)
    bench.store.v[0, :, :, 3] += 1e-3
    hot = bench.compute(TEXT, first_wanted=TOKENS - 3)
    assert bench.pool.hits == 2
    assert not hot.equal(reference)
    assert not torch.equal(hot.logits, reference.tail(TOKENS - 3).logits)
