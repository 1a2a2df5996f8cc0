"""A pass that need not go to its end does not, and what is seen of it has the same bits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from domain.ids import TokenId
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.forward import Prepared, Site, Watch
from infra.engine.jobs.observation import Observation
from infra.engine.language_model import TransformersModel
from infra.engine.observing import Edits, Look, Seen
from infra.engine.scheduler import Slice
from tests.infra.engine import small_models
from tests.infra.engine.asking import score
from tests.infra.engine.bench import text
from tests.infra.engine.test_observing import START, STRATEGIES, TOKENS, Desk, streams, unchanged

LAYERS: Final = 3
TEXT: Final = tuple(map(TokenId, TOKENS))
WIDE: Final[dict[str, Any]] = {"tokens": TEXT, "start": START}


def one(layer: int) -> frozenset[int]:
    return frozenset({layer})


ENDS: Final[dict[str, tuple[Look, Site, int]]] = {
    "embedding": (Look(residual=one(0), **WIDE), Site("residual", 0), 0),
    "values 0": (Look(values=one(0), **WIDE), Site("queries", 0), 1),
    "residual 1": (Look(residual=one(1), keys=one(0), **WIDE), Site("residual", 1), 1),
    "attention 1": (Look(queries=one(1), keys=one(1), **WIDE), Site("queries", 1), 2),
    "residual 2": (Look(residual=one(2), queries=one(0), **WIDE), Site("residual", 2), 2),
    "attention 2": (Look(queries=one(2), keys=one(2), **WIDE), Site("queries", 2), 3),
    "last residual": (Look(residual=one(3), **WIDE), Site("residual", 3), 3),
}
"""Questions, the site that they need last, and how many of three layers have K/V by then."""
SHALLOW: Final = [name for name, (_, _, layers) in ENDS.items() if layers < LAYERS]


@pytest.fixture(scope="module")
def made(folders: dict[str, str | Path]) -> Callable[[str], Prepared]:
    return cache(lambda strategy: small_models.prepared(folders["qwen2"], strategy=strategy))


@pytest.fixture(params=STRATEGIES)
def prepared(request: pytest.FixtureRequest, made: Callable[[str], Prepared]) -> Prepared:
    return made(request.param)


def tensors(seen: Seen) -> dict[tuple[str, int], Tensor]:
    found = {("queries", layer): rows for layer, (rows, _) in seen.queries.items()}
    found |= {("residual", place): rows for place, rows in seen.residual.items()}
    found |= {("keys", layer): keys for layer, keys in seen.keys.items()}
    return found | {("values", layer): values for layer, values in seen.values.items()}


def is_part_of(part: Seen, whole: Seen) -> bool:
    """Whether all that was seen is what was seen of the whole model."""
    found, every = tensors(part), tensors(whole)
    return bool(found) and all(torch.equal(found[name], every[name]) for name in found)


def ends_of(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> list[Site | None]:
    """Where each pass that is computed from now on was to end."""
    ends: list[Site | None] = []
    run = desk.runner.executor.run

    def noting(slices: Sequence[Slice], watch: Watch | None) -> Tensor:
        ends.append(watch.until if watch else None)
        return run(slices, watch)

    monkeypatch.setattr(desk.runner.executor, "run", noting)
    return ends


@pytest.mark.parametrize("name", ENDS)
def test_bits_are_those_of_a_whole_pass_and_later_layers_are_not_computed(
    prepared: Prepared, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, end, layers = ENDS[name]
    whole = Desk(prepared).observe(Desk(prepared).everything())
    for rows in (256, 40):
        desk = Desk(prepared, max_rows=rows)
        ends = ends_of(desk, monkeypatch)
        seen = desk.observe(look, root=None)
        assert set(ends) == {end}
        assert is_part_of(seen, whole)
        written = [bool(desk.store.k[layer].any()) for layer in range(LAYERS)]
        assert written == [layer < layers for layer in range(LAYERS)]
        assert written == [bool(desk.store.v[layer].any()) for layer in range(LAYERS)]
        control = desk.observe(desk.everything())
        assert ends[-1] is None
        assert all(desk.store.k[layer].any() for layer in range(LAYERS))
        assert is_part_of(control, whole)  # whatever ended early before


def test_what_an_end_leaves_out_may_be_edited_and_changes_nothing(prepared: Prepared) -> None:
    look = replace(ENDS["attention 1"][0], edits=Edits(silenced={0: (1,)}))
    deeper = replace(look, edits=Edits(silenced={0: (1,), 2: (0,)}))
    desk = Desk(prepared)
    seen = desk.observe(look)
    assert is_part_of(desk.observe(deeper), seen)
    assert not is_part_of(desk.observe(ENDS["attention 1"][0]), seen)


@pytest.mark.parametrize("name", SHALLOW)
def test_nothing_is_left_of_a_text_that_lacks_layers(prepared: Prepared, name: str) -> None:
    desk = Desk(prepared)
    expected = Desk(prepared).compute(TOKENS, root=None)
    desk.observe(ENDS[name][0])
    assert (desk.pool.cached, desk.pool.held) == (0, 0)
    after = desk.feeding(TOKENS, first_wanted=len(TOKENS) - 1)
    (bits,) = desk.run(after)
    assert (after.text.reused, desk.pool.hits) == (0, 0)
    assert bits.equal(expected)


def test_one_that_comes_to_the_last_layer_leaves_its_blocks(prepared: Prepared) -> None:
    expected = Desk(prepared).compute(TOKENS, root=None)
    for name in ENDS.keys() - set(SHALLOW):
        desk = Desk(prepared)
        desk.observe(ENDS[name][0])
        after = desk.feeding(TOKENS, first_wanted=len(TOKENS) - 1)
        (bits,) = desk.run(after)
        assert after.text.reused == len(TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
        assert bits.equal(expected)


@pytest.mark.parametrize("name", SHALLOW)
def test_blocks_that_are_found_are_used_and_stay_whole(prepared: Prepared, name: str) -> None:
    desk = Desk(prepared)
    look = ENDS[name][0]
    cold = desk.observe(look)
    expected = desk.compute(TOKENS)
    hot = desk.observe(look)
    needed = START if look.queries or look.residual else len(TOKENS) - 1
    found = min(needed, len(TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS)
    assert (cold.tokens_reused, hot.tokens_reused) == (0, found)
    assert is_part_of(hot, cold)
    after = desk.feeding(TOKENS, first_wanted=len(TOKENS) - 1)
    (bits,) = desk.run(after)
    assert after.text.reused == len(TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
    assert bits.equal(expected)


def test_a_pass_with_others_in_it_goes_to_its_end(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, end, _ = ENDS["attention 1"]
    alone = Desk(prepared).observe(look)
    desk = Desk(prepared, max_rows=30)
    ends = ends_of(desk, monkeypatch)
    others = streams(desk)
    desk.runner.add(desk.job(look))
    for _ in range(2):
        desk.runner.step()
    assert ends == [end, end]
    for feeding in others:
        desk.runner.add(feeding)
    while desk.runner.busy:
        desk.runner.step()
    assert set(ends[2:]) == {None}
    (job,) = desk.delivered
    assert isinstance(job, Observation)
    assert is_part_of(job.seen(), alone)
    assert unchanged(others, desk)
    assert desk.compute(TOKENS).equal(Desk(prepared).compute(TOKENS))
    after = desk.feeding(TOKENS, first_wanted=len(TOKENS) - 1)
    assert desk.run(after)[0].equal(Desk(prepared).compute(TOKENS))


def test_the_deepest_question_of_a_pass_says_where_it_ends(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(prepared, max_rows=512)
    ends = ends_of(desk, monkeypatch)
    asked = [ENDS[name][0] for name in ("attention 1", "embedding", "residual 2")]
    looks = [
        replace(look, tokens=tuple(map(TokenId, text(60 + n, 80 + n))))
        for n, look in enumerate(asked)
    ]
    apart = [Desk(prepared).observe(look) for look in looks]
    for look in looks:
        desk.runner.add(desk.job(look))
    desk.runner.step()
    assert ends == [Site("residual", 2)]
    for job, seen in zip(desk.delivered, apart, strict=True):
        assert isinstance(job, Observation)
        assert is_part_of(job.seen(), seen)
    desk.observe(replace(looks[0], logits=True))
    assert ends[-1] is None


def test_one_that_is_dropped_on_its_way_leaves_nothing(prepared: Prepared) -> None:
    desk = Desk(prepared, max_rows=64)
    job = desk.job(ENDS["attention 1"][0])
    desk.runner.add(job)
    desk.runner.step()
    assert (job.text.computed, desk.pool.held) == (64, 2)
    desk.runner.drop(job)
    assert (desk.runner.busy, desk.pool.held, desk.pool.cached) == (False, 0, 0)
    assert desk.compute(TOKENS).equal(Desk(prepared).compute(TOKENS))


async def test_a_served_model_answers_from_the_first_layer_with_the_same_bits(
    tiny: TransformersModel,
) -> None:
    await tiny.forget()
    tokens = tuple(map(TokenId, text(70, 200)))
    look = Look(tokens=tokens, queries=one(0), keys=one(0))
    cold = await tiny.observe(look)
    assert tiny.counters().blocks_cached == 0
    scored = await score(tiny, tokens, 199)
    assert scored.tokens_reused == 0
    hot = await tiny.observe(replace(look, start=150))
    assert hot.tokens_reused == 150
    assert torch.equal(hot.queries[0][0], cold.queries[0][0][150:])
    assert torch.equal(hot.keys[0], cold.keys[0])
    again = await score(tiny, tokens, 199)
    assert again.tokens_reused > 0
    assert again.scores == scored.scores
