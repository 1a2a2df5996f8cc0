"""Beam search by the engine: what transformers finds, alone or among others, with shared K/V."""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.beams import BeamSearch, candidates_needed
from domain.config import BeamParameters, LogitsParameters
from domain.events import BeamStep
from domain.ids import TokenId
from domain.work import BeamRequest, BeamsFound
from infra.engine.engine import Engine
from infra.engine.executor import Executor
from infra.engine.forward import Prepared, Watch
from infra.engine.jobs.searching import Search, candidates
from infra.engine.language_model import TransformersModel
from infra.engine.sampling.processors import Processors
from infra.engine.sampling.recorder import Recorder
from infra.engine.sampling.sampler import Row, digest, measure
from infra.engine.scheduler import Slice
from tests.infra.engine import small_models
from tests.infra.engine.asking import request, steps
from tests.infra.engine.bench import ROOT, Bench, held_at_next_pass, text
from tests.infra.engine.small_models import CACHER_TINY, EVERY_VOCABULARY

NEAR: Final = 1e-4
EOS: Final = 0


def asking(prompt: Sequence[int], max_new: int, **changes: Any) -> BeamRequest:
    chosen: dict[str, Any] = {"logits": LogitsParameters(), "num_beams": 4, "num_return": 4}
    return BeamRequest(
        tokens=tuple(map(TokenId, prompt)),
        parameters=BeamParameters(max_tokens=max_new, **(chosen | changes)),
        max_new=max_new,
    )


def any_asking(random: Random, **chosen: Any) -> BeamRequest:
    """Some prompt and some setting of everything that is not chosen; often it ends early."""
    num_beams = chosen.setdefault("num_beams", random.randint(2, 6))
    stops = tuple(map(TokenId, random.sample(range(1, EVERY_VOCABULARY), random.choice((0, 1, 3)))))
    likely = random.choice((0.0, 6.0, 10.0))
    logits = LogitsParameters(
        logit_bias=dict.fromkeys((TokenId(EOS), *stops), likely),
        repetition_penalty=random.choice((1.0, 1.2, 0.8)),
        bad_words_ids=random.choice(((), ((TokenId(7),), (TokenId(4), TokenId(5))))),
    )
    picked: dict[str, Any] = {
        "logits": logits,
        "num_return": random.randint(1, num_beams),
        "no_repeat_ngram_size": random.choice((0, 1, 2, 3)),
        "stop_token_ids": stops,
        "ignore_eos": bool(stops) and random.random() < 0.3,
    }
    prompt = text(random.randrange(1000), random.randint(1, 70), EVERY_VOCABULARY)
    return asking(prompt, random.choice((1, 4, 12)), **(picked | chosen))


# which tokens are candidates

LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=40)


@given(logits=LOGITS, ruled_out=st.sets(st.integers(0, 39), max_size=8), count=st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_candidates_are_the_best_processed_logprobs_ties_by_lower_id(
    logits: list[float], ruled_out: set[int], count: int
) -> None:
    row = np.array(logits, np.float32)
    width = len(row)
    bad = tuple((TokenId(token),) for token in sorted(ruled_out) if token < width)
    parameters = LogitsParameters(repetition_penalty=1.5, bad_words_ids=bad)
    scores = torch.log_softmax(torch.from_numpy(row), -1)
    scores[0] *= 1.5
    found = candidates(row, Processors(parameters, [0]), count)
    allowed = [token for token in range(width) if (TokenId(token),) not in bad]
    assert len(found) == min(count, len(allowed))
    assert [logprob for _, logprob in found] == pytest.approx(
        sorted((scores[token].item() for token in allowed), reverse=True)[:count], abs=1e-5
    )
    assert list(found) == sorted(found, key=lambda candidate: (-candidate.logprob, candidate.token))
    assert {token for token, _ in found} <= set(allowed)


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        candidates(np.array([1.0, np.nan], np.float32), Processors(LogitsParameters(), []), 2)


# against transformers


@pytest.fixture(scope="module", params=[CACHER_TINY, "gpt2", "llama", "mistral"])
def folder(request: pytest.FixtureRequest, folders: dict[str, str | Path]) -> str | Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def plain(folder: str | Path) -> Any:
    """The same files as transformers runs them."""
    return small_models.read(folder).model


@pytest.fixture(scope="module")
def model(folder: str | Path, engine: Engine, tiny: TransformersModel) -> TransformersModel:
    if folder == CACHER_TINY:
        return tiny
    return small_models.language_model(folder, engine)


@torch.inference_mode()
def found_by_transformers(plain: Any, asked: BeamRequest) -> list[tuple[tuple[int, ...], float]]:
    """Tokens and score of each sequence that ``generate`` returns."""
    parameters, logits = asked.parameters, asked.parameters.logits
    prompt = torch.tensor([asked.tokens])
    out = plain.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=asked.max_new,
        num_beams=parameters.num_beams,
        num_return_sequences=parameters.num_return,
        early_stopping=parameters.early_stopping,
        length_penalty=parameters.length_penalty,
        no_repeat_ngram_size=parameters.no_repeat_ngram_size,
        sequence_bias=[[[token], bias] for token, bias in logits.logit_bias.items()] or None,
        repetition_penalty=logits.repetition_penalty,
        bad_words_ids=[list(word) for word in logits.bad_words_ids] or None,
        eos_token_id=sorted(ends(asked)) or None,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    new = out.sequences[:, len(asked.tokens) :].tolist()
    return [
        (tuple(tokens[:length]), score)
        for tokens, length, score in zip(new, lengths, out.sequences_scores.tolist(), strict=True)
    ]


def ends(asked: BeamRequest) -> frozenset[TokenId]:
    own: set[TokenId] = set() if asked.parameters.ignore_eos else {TokenId(EOS)}
    return frozenset(own.union(asked.parameters.stop_token_ids))


async def test_a_search_finds_what_transformers_finds(model: TransformersModel, plain: Any) -> None:
    random = Random(0)
    others = finished = unfinished = 0
    grid = list(product((-1.0, 0.0, 1.0, 2.0), (True, False, "never")))
    for length_penalty, early_stopping in grid:
        asked = any_asking(random, length_penalty=length_penalty, early_stopping=early_stopping)
        found = (await model.search(asked)).beams
        expected = found_by_transformers(plain, asked)
        assert [beam.score for beam in found] == pytest.approx(
            [score for _, score in expected], abs=NEAR, rel=1e-5
        )
        others += [beam.content.tokens for beam in found] != [tokens for tokens, _ in expected]
        finished += found[0].finished
        unfinished += not found[0].finished
    assert others <= 1  # where two lie so near that rounding decides
    assert min(finished, unfinished) >= 2


# what is recorded


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return small_models.prepared(CACHER_TINY)


def rows_after(prepared: Prepared, asked: BeamRequest, tokens: Sequence[int]) -> list[Row]:
    """The logits after the prompt and after each of some tokens that follow it."""
    whole = [*asked.tokens, *tokens]
    bits = Bench(prepared).compute(whole, first_wanted=len(asked.tokens) - 1)
    return list(bits.logits.numpy())


GROUPS: Final[dict[str, Any]] = {
    "num_beams": 6,
    "num_return": 6,
    "num_beam_groups": 3,
    "diversity_penalty": 0.8,
}


@pytest.mark.parametrize("changes", [{}, GROUPS, {"num_return": 2}], ids=["one", "groups", "few"])
async def test_every_token_is_recorded_as_the_model_scores_it(
    tiny: TransformersModel, prepared: Prepared, changes: dict[str, Any]
) -> None:
    asked = any_asking(Random(3), **({"num_beams": 4} | changes))
    found = await tiny.search(asked)
    for beam in found.beams:
        tokens = beam.content.tokens
        assert beam.content == tiny.fragment(asked.tokens, tokens)
        assert beam.finished == (tokens[-1] in ends(asked))
        rows = rows_after(prepared, asked, tokens[:-1])
        measures = [measure(row, token) for row, token in zip(rows, tokens, strict=True)]
        assert beam.scores.logprobs == tuple(one.logprob for one in measures)
        assert beam.scores.ranks == tuple(one.rank for one in measures)
        assert beam.scores.entropies == tuple(one.entropy for one in measures)
        assert beam.scores.logsumexps == tuple(one.logsumexp for one in measures)
        assert beam.scores.logits_digests == tuple(map(digest, rows))


@pytest.mark.parametrize("changes", [{}, GROUPS], ids=["one group", "three groups"])
async def test_the_steps_are_those_of_the_pure_search_over_the_same_rows(
    tiny: TransformersModel, prepared: Prepared, changes: dict[str, Any]
) -> None:
    asked = asking(text(5, 40), 8, no_repeat_ngram_size=2, **changes)
    found = await tiny.search(asked)
    search = BeamSearch(asked.parameters, eos_token_ids=ends(asked), max_new=asked.max_new)
    texts: list[tuple[TokenId, ...]] = [()]
    made: list[BeamStep] = []
    while True:
        offered = []
        for tokens in texts:
            processors = Processors(
                asked.parameters.logits, [*asked.tokens, *tokens], no_repeat_ngram_size=2
            )
            row = rows_after(prepared, asked, tokens)[-1]
            offered.append(
                candidates(row, processors, candidates_needed(asked.parameters, len(ends(asked))))
            )
        step = search.step(offered)
        if step is None:
            break
        made.append(step)
        texts = [
            (*texts[parent], token) for parent, token in zip(step.parents, step.tokens, strict=True)
        ]
    assert found.steps == tuple(made)
    assert [(beam.content.tokens, beam.score, beam.finished) for beam in found.beams] == [
        tuple(hypothesis) for hypothesis in search.best()
    ]
    assert len(found.steps) == asked.max_new - 1


# among others


async def test_a_search_among_others_is_bit_for_bit_what_it_is_alone(
    folders: dict[str, str | Path], engine: Engine
) -> None:
    model = small_models.language_model(folders["llama"], engine, max_batch=24)
    subject = asking(text(1, 60, EVERY_VOCABULARY), 20, **GROUPS)
    alone = await model.search(subject)
    seen = 0
    for seed in range(3):
        random = Random(seed)
        await model.forget()
        prompts = [text(random.randrange(4), random.randint(3, 90)) for _ in range(10)]
        others = [steps(model, request(prompt, 25, seed=seed)) for prompt in prompts]
        searches = [model.search(subject), model.search(asking(prompts[0], 15))]
        tasks = [asyncio.ensure_future(one) for one in (*others, *searches)]
        while not tasks[-2].done():
            seen = max(seen, model.counters().sequences)
            await asyncio.sleep(0.002)
        results: list[Any] = await asyncio.gather(*tasks)
        assert results[-2] == alone
        assert results[-1] != alone
    assert seen > GROUPS["num_beams"]
    assert model.counters().blocks_held == 0


async def test_control_with_plain_kernels_a_search_depends_on_its_neighbours(
    folders: dict[str, str | Path], engine: Engine
) -> None:
    model = small_models.language_model(folders["llama"], engine, strategy="plain", max_batch=24)
    subject = asking(text(1, 60, EVERY_VOCABULARY), 20)
    alone = await model.search(subject)
    tasks = [asyncio.ensure_future(steps(model, request(text(seed, 75), 30))) for seed in range(12)]
    among = await model.search(subject)
    await asyncio.gather(*tasks)
    assert digests(among) != digests(alone)


def digests(found: BeamsFound) -> list[tuple[str, ...]]:
    return [beam.scores.logits_digests for beam in found.beams]


# memory


class Counting(Executor):
    """Counts the tokens whose K/V it computes."""

    computed = 0

    def run(self, slices: Sequence[Slice], watch: Watch | None = None) -> torch.Tensor:
        self.computed += sum(piece.count for piece in slices)
        return super().run(slices, watch)


class Desk:
    """A model whose searches are stepped by hand."""

    def __init__(
        self, prepared: Prepared, tokenizer: Any, recorder: Recorder, *, max_rows: int = 128
    ) -> None:
        self.bench = Bench(prepared, max_rows=max_rows)
        self.runner = self.bench.runner
        self.executor = self.runner.executor = Counting(prepared, self.bench.store)
        self._tokenizer, self._recorder = tokenizer, recorder
        self._delivered: SimpleQueue[BeamsFound | Exception] = SimpleQueue()

    def search(self, asked: BeamRequest) -> Search:
        return Search(
            asked,
            root=ROOT,
            tokenizer=self._tokenizer,
            eos_token_ids=frozenset({TokenId(EOS)}),
            scheduler=self.runner.scheduler,
            deliver=self._delivered.put,
            recorder=self._recorder,
        )

    def result(self, asked: BeamRequest) -> BeamsFound | Exception:
        """What is delivered in the end."""
        self.runner.add(self.search(asked))
        while self.runner.busy:
            self.runner.step()
        return self._delivered.get(timeout=60)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_models.read(CACHER_TINY).tokenizer


@pytest.fixture
def desk(prepared: Prepared, tokenizer: Any) -> Iterator[Desk]:
    with Recorder() as recorder:
        yield Desk(prepared, tokenizer, recorder)


def test_a_step_waits_for_all_beams_where_a_pass_has_fewer_rows(
    desk: Desk, prepared: Prepared, tokenizer: Any
) -> None:
    asked = asking(text(8, 40), 15, num_beams=5)
    with Recorder() as recorder:
        narrow = Desk(prepared, tokenizer, recorder, max_rows=3)
        assert narrow.result(asked) == desk.result(asked)


def test_no_token_is_computed_twice(desk: Desk) -> None:
    """Neither of the prompt nor of what beams have in common."""
    asked = asking(text(2, 75), 20, num_beams=5, ignore_eos=True)
    desk.result(asked)
    assert desk.executor.computed == len(asked.tokens) + 19 * 5


def test_a_search_may_be_given_up_at_any_step_and_leaves_no_block_held(desk: Desk) -> None:
    asked = asking(text(2, 62), 12, num_beams=5, ignore_eos=True)
    most = 0
    for count in range(14):
        job = desk.search(asked)
        desk.runner.add(job)
        for _ in range(count):
            if desk.runner.busy:
                desk.runner.step()
        most = max(most, desk.bench.pool.held)
        desk.runner.drop(job)
        assert desk.bench.pool.held == 0
        assert not desk.runner.busy
    assert most > 5
    desk.bench.pool.forget()
    assert desk.bench.pool.free == desk.bench.pool.capacity - 1


async def test_cancelling_a_search_frees_its_memory(tiny: TransformersModel) -> None:
    with held_at_next_pass(tiny) as held:
        task = asyncio.ensure_future(tiny.search(asking(text(6, 50), 120)))
        assert await asyncio.to_thread(held.begun.wait, 60)
        assert tiny.counters().blocks_held
        task.cancel()
        await asyncio.wait((task,))
        held.goes_on.set()
        await tiny.forget()
    assert task.cancelled()
    assert held.count == 1
    assert (tiny.counters().blocks_held, tiny.counters().sequences) == (0, 0)


def test_a_search_that_fails_says_so_and_holds_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(slices: list[Slice], _: Watch | None) -> torch.Tensor:
        return torch.full((sum(len(piece.wanted) for piece in slices), 8), torch.nan)

    monkeypatch.setattr(desk.executor, "run", run)
    assert isinstance(desk.result(asking([3], 4)), ValueError)
    assert desk.bench.pool.held == 0


@pytest.mark.parametrize(("ignore_eos", "found"), [(False, [(0,), (1, 0)]), (True, [])])
def test_where_few_tokens_may_come_few_sequences_are_found(
    desk: Desk, ignore_eos: bool, found: list[tuple[int, ...]]
) -> None:
    """All tokens but two are in the prompt already, and none may come twice."""
    asked = asking(range(2, 1024), 9, no_repeat_ngram_size=1, ignore_eos=ignore_eos)
    result = desk.result(asked)
    assert isinstance(result, BeamsFound)
    assert sorted(beam.content.tokens for beam in result.beams) == found
    assert desk.bench.pool.held == 0
