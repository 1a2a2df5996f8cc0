"""Many texts scored at once: each as if it were alone, what they have in common computed once."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.beams import candidates_needed
from domain.config import BeamParameters, Constraint, LogitsParameters, SamplingParameters
from domain.ids import TokenId
from domain.work import Redraw, Reference, RowKind, Scored, ScoreRequest, Step
from infra.engine.blocks import Copy, Move, blocks_for
from infra.engine.constraints.matching import Constraints
from infra.engine.forward import Prepared, Watch
from infra.engine.jobs.generating import Generation
from infra.engine.jobs.scoring import MAX_WIDTH, Scoring
from infra.engine.jobs.searching import candidates
from infra.engine.jobs.text_tree import branch_off
from infra.engine.sampling import sampler
from infra.engine.sampling.processors import Processors
from infra.engine.sampling.recorder import Recorder
from infra.engine.scheduler import Slice
from infra.models.tokenizer import Tokenizer
from tests.infra.engine import small_models
from tests.infra.engine.asking import request as to_generate
from tests.infra.engine.bench import ROOT, Bench, text

EOS = frozenset({TokenId(0)})


class Scorer(Bench):
    """A bench that scores, and counts what is computed for it."""

    tokenizer: Tokenizer
    constraints: Constraints

    def __init__(self, prepared: Prepared, **bounds: int) -> None:
        super().__init__(prepared, **bounds)
        self.recorder = Recorder()
        self.passes: list[list[int]] = []
        run = self.runner.executor.run

        def counted(slices: Sequence[Slice], watch: Watch | None = None) -> torch.Tensor:
            self.passes.append([piece.count for piece in slices])
            return run(slices, watch)

        self.runner.executor.run = counted  # type: ignore[method-assign]

    @property
    def rows(self) -> int:
        """How many rows were computed."""
        return sum(map(sum, self.passes))

    def job(
        self, requests: Sequence[ScoreRequest], found: list[Any], root: bytes | None = None
    ) -> Scoring:
        return Scoring(
            requests,
            root=root,
            scheduler=self.runner.scheduler,
            tokenizer=self.tokenizer,
            constraints=self.constraints,
            eos_token_ids=EOS,
            deliver=found.append,
            recorder=self.recorder,
        )

    def work(self, *jobs: Scoring | Generation) -> None:
        """All of it, and what is recorded of it."""
        with self.recorder:
            for job in jobs:
                self.runner.add(job)
            while self.runner.busy:
                self.runner.step()
        self.recorder = Recorder()

    def score(self, *requests: ScoreRequest) -> list[Scored]:
        """Texts scored in private, by one job."""
        found: list[Any] = []
        self.work(self.job(requests, found))
        (scored,) = found
        assert isinstance(scored, list), scored
        return scored

    def score_shared(self, *requests: ScoreRequest) -> list[Scored]:
        """Texts scored by a job each."""
        found: list[list[Any]] = [[] for _ in requests]
        self.work(*(self.job([r], f, ROOT) for r, f in zip(requests, found, strict=True)))
        return [scored for ((scored,),) in found]

    def holds_nothing(self) -> bool:
        return not self.runner.busy and (self.pool.held, self.pool.shared) == (0, 0)


@pytest.fixture(scope="module")
def prepared(folders: dict[str, str | Path]) -> Prepared:
    loaded = small_models.read(folders["llama"])
    Scorer.tokenizer = loaded.tokenizer
    Scorer.constraints = Constraints(loaded.tokenizer, loaded.vocabulary_size, EOS)
    return small_models.prepared(folders["llama"])


def asking(tokens: Sequence[int], start: int, **asked: Any) -> ScoreRequest:
    return ScoreRequest(tokens=tuple(map(TokenId, tokens)), start=start, **asked)


def alone(prepared: Prepared, requests: Iterable[ScoreRequest]) -> list[Scored]:
    """Each by a job and in a cache of its own."""
    return [scored for request in requests for scored in Scorer(prepared).score(request)]


def found(scored: Iterable[Scored]) -> list[object]:
    """Everything that was found, not how; digests stand for every bit of the logits."""
    return [(each.scores, each.redrawn, each.candidates) for each in scored]


def family() -> list[ScoreRequest]:
    """Twelve texts in no order: of two kinds, that part from each other at several places."""
    requests = []
    for number in range(12):
        kind = text(number % 2, 100)
        parts = (33, 64, 70, 70, 97, 99)[number // 2]
        tokens = [*text(9, 20), *kind[:parts], *text(20 + number, 10 + number)]
        requests.append(asking(tokens, 20 + parts + number % 3 + 1))
    Random(0).shuffle(requests)
    return requests


def different_beginnings(requests: Iterable[ScoreRequest]) -> int:
    """Tokens there are in all, where those that several texts begin with count once."""
    return len({each.tokens[:end] for each in requests for end in range(1, len(each.tokens) + 1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twelve_texts_have_the_scores_of_each_alone_and_compute_what_they_share_once(
    folders: dict[str, str | Path], prepared: Prepared, dtype: torch.dtype
) -> None:
    chosen = small_models.prepared(folders["llama"], dtype)
    scorer, requests = Scorer(chosen), family()
    scored = scorer.score(*requests)
    assert found(scored) == found(alone(chosen, requests))
    assert scorer.rows == different_beginnings(requests)
    assert sum(each.tokens_computed for each in scored) == scorer.rows
    assert all(each.tokens_reused == 0 for each in scored)
    assert scorer.holds_nothing()
    assert (scorer.pool.cached, scorer.pool.hits, scorer.pool.misses) == (0, 0, 0)


def test_control_a_copied_block_that_is_not_exact_changes_what_is_found(
    prepared: Prepared,
) -> None:
    scorer, requests = Scorer(prepared), family()
    move, copies = scorer.store.move, 0

    def move_inexactly(moves: Iterable[Move]) -> None:
        nonlocal copies
        for each in moves:
            move([each])
            if isinstance(each, Copy):
                copies += 1
                scorer.store.v[:, each.target] += 1e-3 if copies == 1 else 0

    scorer.store.move = move_inexactly  # type: ignore[method-assign]
    pairs = zip(found(scorer.score(*requests)), found(alone(prepared, requests)), strict=True)
    differ = [misled != honest for misled, honest in pairs]
    assert 2 < copies < len(requests)
    assert 0 < sum(differ) < len(requests)


def test_several_texts_are_in_a_pass_but_no_more_than_leave_places_to_others(
    prepared: Prepared,
) -> None:
    scorer = Scorer(prepared, blocks=160, max_sequences=32, max_rows=64)
    requests = [asking([*text(1, 50), number, *text(number, 40)], 51) for number in range(24)]
    scorer.score(*requests)
    widths = [len(counts) for counts in scorer.passes]
    assert widths[0] == 1
    assert max(widths) == MAX_WIDTH == 16
    assert len(widths) <= 2 + -(-scorer.rows // 64)


def search_tree() -> list[ScoreRequest]:
    """Sixty texts, each scored from where it parts from one before it: what a search went over."""
    random, texts = Random(1), [text(0, 80)]
    requests = [asking(texts[0], 50)]
    while len(texts) < 60:
        parent = random.randrange(len(texts))
        parting = random.randrange(requests[parent].start, len(texts[parent]))
        texts.append([*texts[parent][:parting], *text(len(texts), random.randint(3, 30))])
        requests.append(asking(texts[-1], parting + 1))
    random.shuffle(requests)
    return requests


def test_the_tree_of_a_search_takes_few_passes(prepared: Prepared) -> None:
    requests = search_tree()
    height = branch_off([r.tokens for r in requests], [r.start for r in requests]).height
    scorer = Scorer(prepared, blocks=400, max_sequences=32, max_rows=512)
    assert found(scorer.score(*requests)) == found(alone(prepared, requests))
    assert scorer.rows == different_beginnings(requests)
    assert len(scorer.passes) <= height + 1 + -(-len(requests) // MAX_WIDTH)


def test_texts_that_part_late_are_computed_together_from_there_on(prepared: Prepared) -> None:
    begun = text(1, 60)
    requests = [
        asking([*text(2, 10), *text(3, 60)], 70),
        *(asking([*text(2, 10), *begun, number, *text(number, 30)], 90) for number in range(3)),
    ]
    scorer = Scorer(prepared, max_rows=512)
    scorer.score(*requests)
    assert [len(counts) for counts in scorer.passes] == [1, 1, 2]
    assert scorer.rows == different_beginnings(requests)


def test_texts_that_begin_with_each_other_take_over_what_was_scored_before(
    prepared: Prepared,
) -> None:
    tokens = text(1, 150)
    requests = [asking(tokens[:end], end - 10) for end in (150, 40, 96, 64)]
    scorer = Scorer(prepared)
    assert found(scorer.score(*requests)) == found(alone(prepared, requests))
    assert scorer.rows == 150


def test_texts_that_are_not_private_find_each_others_blocks(prepared: Prepared) -> None:
    scorer, requests = Scorer(prepared), family()
    scored = scorer.score_shared(*requests)
    assert found(scored) == found(alone(prepared, requests))
    assert [each.tokens_computed + each.tokens_reused for each in scored] == [
        len(each.tokens) for each in requests
    ]
    assert sum(each.tokens_computed for each in scored) == scorer.rows
    assert scorer.pool.hits > 12
    assert scorer.holds_nothing()


def test_what_all_texts_of_a_job_begin_with_is_found_and_kept(prepared: Prepared) -> None:
    scorer = Scorer(prepared)
    requests = [asking([*text(1, 70), number, *text(number, 40)], 72) for number in range(6)]
    expected = found(alone(prepared, requests))
    for reused in (0, 64):
        scorer.passes.clear()
        delivered: list[Any] = []
        scorer.work(scorer.job(requests, delivered, ROOT))
        (scored,) = delivered
        assert found(scored) == expected
        assert sum(each.tokens_computed for each in scored) == scorer.rows
        assert sum(each.tokens_reused for each in scored) == reused
        assert scorer.rows == different_beginnings(requests) - reused
    assert scorer.holds_nothing()


def test_a_cache_with_room_for_one_text_is_enough(prepared: Prepared) -> None:
    requests = family()
    longest = max(len(each.tokens) for each in requests)
    scorer = Scorer(prepared, blocks=1 + blocks_for(longest))
    assert found(scorer.score(*requests)) == found(alone(prepared, requests))
    assert max(len(counts) for counts in scorer.passes) == 1
    assert scorer.rows == different_beginnings(requests)
    assert scorer.holds_nothing()


texts = st.lists(st.integers(1, 2), min_size=1, max_size=70)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), begun=texts, width=st.integers(1, 9), spare=st.integers(0, 20))
def test_whatever_the_texts_and_the_room_the_scores_are_those_of_each_alone(
    prepared: Prepared, data: st.DataObject, begun: list[int], width: int, spare: int
) -> None:
    requests = []
    for _ in range(data.draw(st.integers(1, 10))):
        tokens = [*begun[: data.draw(st.integers(0, 70))], *data.draw(texts)]
        requests.append(asking(tokens, data.draw(st.integers(1, len(tokens)))))
    blocks = 1 + blocks_for(max(len(each.tokens) for each in requests)) + spare
    scorer = Scorer(prepared, blocks=blocks, max_sequences=width, max_rows=48)
    scored = scorer.score(*requests)
    assert found(scored) == found(alone(prepared, requests))
    assert sum(each.tokens_computed for each in scored) == scorer.rows
    assert scorer.rows <= sum(len(each.tokens) for each in requests)
    wanted = sum(len(each.tokens) - each.start + 1 for each in requests)
    assert scorer.rows <= different_beginnings(requests) + wanted
    assert scorer.holds_nothing()
    assert scorer.pool.cached == 0


@pytest.mark.parametrize("steps", range(8))
def test_scoring_that_is_cancelled_at_any_step_leaves_nothing_behind(
    prepared: Prepared, steps: int
) -> None:
    scorer, delivered = Scorer(prepared, max_rows=48), []
    job = scorer.job(family(), delivered)
    with scorer.recorder:
        scorer.runner.add(job)
        for _ in range(steps):
            scorer.runner.step()
        assert scorer.runner.busy
        scorer.runner.drop(job)
    assert scorer.holds_nothing()
    assert (delivered, scorer.pool.cached) == ([], 0)


def test_an_error_in_one_text_ends_the_job_with_that_error(prepared: Prepared) -> None:
    good = family()
    drawing = to_generate([0], 1, seed=-1).drawing  # there are no random numbers for it
    bad = asking(text(3, 30), 5, redraws=(Redraw(start=10, stop=12, drawing=drawing),))
    scorer, delivered = Scorer(prepared), []
    scorer.work(scorer.job([*good, bad], delivered))
    assert [type(each) for each in delivered] == [ValueError]
    assert scorer.holds_nothing()


# redraws


def generated(
    scorer: Scorer, prompt: Sequence[int], count: int, branch: int, **asked: Any
) -> tuple[list[Step], Redraw]:
    """A branch of a generation, and what asks for all of it again."""
    wish = to_generate(prompt, count, **asked)
    steps: list[Any] = []
    job = Generation(
        wish,
        branch,
        root=ROOT,
        tokenizer=scorer.tokenizer,
        constraints=scorer.constraints,
        eos_token_ids=EOS,
        deliver=steps.append,
        recorder=scorer.recorder,
    )
    scorer.work(job)
    drawing = job._drawing
    return steps[:-1], Redraw(start=len(prompt), stop=len(prompt) + len(steps) - 1, drawing=drawing)


SAMPLING = SamplingParameters(
    temperature=1.3,
    top_k=0,
    top_p=0.95,
    repetition_penalty=1.4,
    frequency_penalty=0.3,
    logit_bias={TokenId(5): 2.0},
    bad_words_ids=((TokenId(7),), (TokenId(4), TokenId(5))),
)


@pytest.mark.parametrize(
    "asked",
    [
        {"sampling": SAMPLING},
        {"sampling": SAMPLING, "dropped": 1000},
        {"constraint": Constraint(kind="regex", text="[a-z ]{60}")},
        {"sampling": SAMPLING, "constraint": Constraint(kind="regex", text="[a-z ]{60}")},
    ],
    ids=["processors", "slid", "constraint", "both"],
)
def test_redraws_give_what_was_drawn_of_every_branch(
    prepared: Prepared, asked: dict[str, Any]
) -> None:
    scorer, requests, drawn = Scorer(prepared), [], []
    prompt = text(6, 40)
    for branch in range(3):
        steps, redraw = generated(scorer, prompt, 15, branch, **asked)
        tokens = [*prompt, *(step.drawn.token_id for step in steps)]
        requests.append(asking(tokens, 30, redraws=(redraw,)))
        drawn.append(tuple(step.drawn for step in steps))
    assert len(set(drawn)) == 3
    assert [each.redrawn for each in scorer.score(*requests)] == drawn
    for request, expected in zip(requests, drawn, strict=True):
        (redraw,) = request.redraws
        later = Redraw(start=redraw.start + 4, stop=redraw.stop, drawing=redraw.drawing)
        if redraw.drawing.constraint is None:
            (scored,) = scorer.score(asking(request.tokens, 44, redraws=(later,)))
            assert scored.redrawn == expected[4:]


def test_a_token_that_a_constraint_rules_out_is_redrawn_as_one_that_it_allows(
    prepared: Prepared,
) -> None:
    scorer, prompt = Scorer(prepared), text(6, 40)
    constraint = Constraint(kind="regex", text="[a-z ]{60}")
    steps, redraw = generated(scorer, prompt, 10, 0, constraint=constraint)
    tokens = [*prompt, *(step.drawn.token_id for step in steps)]
    tokens[44] = next(t for t in range(1, 1000) if scorer.tokenizer.text_of(TokenId(t)) == "!")
    (scored,) = scorer.score(asking(tokens, 40, redraws=(redraw,)))
    assert scored.redrawn[:5] == tuple(step.drawn for step in steps)[:5]
    assert scored.redrawn[4].token_id != tokens[44]
    assert len(scored.redrawn) == len(steps)


@pytest.mark.parametrize("seed", range(3))
def test_redraws_read_the_text_as_it_is_whatever_would_have_been_drawn(
    prepared: Prepared, seed: int
) -> None:
    tokens = [*text(6, 40), *[5, 9] * 10]
    drawing = to_generate([0], 1, sampling=SAMPLING, seed=seed, branch=2, dropped=7).drawing
    redraws = (
        Redraw(start=42, stop=50, drawing=drawing),
        Redraw(start=51, stop=60, drawing=drawing),
    )
    (scored,) = Scorer(prepared).score(asking(tokens, 41, redraws=redraws))
    rows = Bench(prepared).compute(tokens).logits.numpy()
    expected = []
    for place in [*range(42, 50), *range(51, 60)]:
        scores = Processors(SAMPLING, tokens[:place]).process(rows[place - 1])
        expected.append(sampler.draw(scores, SAMPLING, seed, place + 7, 2))
    assert [each.token_id for each in scored.redrawn] == [each.token_id for each in expected]
    assert [each.sampling_probability for each in scored.redrawn] == [
        each.probability for each in expected
    ]
    assert len(set(scored.redrawn)) > 10


# candidates of a beam search


def test_candidates_are_what_a_search_chooses_from_at_every_position(prepared: Prepared) -> None:
    parameters = BeamParameters(
        logits=LogitsParameters(repetition_penalty=1.5, bad_words_ids=((TokenId(7),),)),
        max_tokens=10,
        num_beams=3,
        no_repeat_ngram_size=2,
        stop_token_ids=(TokenId(11),),
    )
    requests = [
        asking([*text(8, 45), *text(i, 30)], 46 + i, candidates=parameters) for i in range(4)
    ]
    scored = Scorer(prepared).score(*requests)
    count = candidates_needed(parameters, 2)
    for request, each in zip(requests, scored, strict=True):
        rows = Bench(prepared).compute(request.tokens).logits.numpy()
        expected = []
        for place in range(request.start, len(request.tokens)):
            processors = Processors(
                parameters.logits, request.tokens[:place], no_repeat_ngram_size=2
            )
            expected.append(candidates(rows[place - 1], processors, count))
        assert each.candidates == tuple(expected)
        assert each.scores.logits_digests == tuple(
            map(sampler.digest, np.ascontiguousarray(rows[request.start - 1 : -1]))
        )
        assert {len(row) for row in each.candidates} == {count}


# rows kept, and held against others


def held_against(request: ScoreRequest, scored: Scored, kind: RowKind) -> ScoreRequest:
    """The same, with what was found as references, where rows of this kind were kept."""
    references = [
        Reference(token_id=token, logprob=logprob, logsumexp=logsumexp, kind=kind, row=row)
        for token, logprob, logsumexp, row in zip(
            request.tokens[request.start :],
            scored.scores.logprobs,
            scored.scores.logsumexps,
            scored.rows,
            strict=True,
        )
    ]
    return asking(request.tokens, request.start, references=tuple(references))


def keeping(request: ScoreRequest, kind: RowKind, k: int = 0) -> ScoreRequest:
    return asking(request.tokens, request.start, keep=kind, keep_k=k)


def test_kept_rows_are_those_that_the_digests_are_of(prepared: Prepared) -> None:
    requests = family()
    raw = Scorer(prepared).score(*(keeping(each, "raw") for each in requests))
    top = Scorer(prepared).score(*(keeping(each, "top_k", 5) for each in requests))
    for request, whole, part in zip(requests, raw, top, strict=True):
        assert len(whole.rows) == len(request.tokens) - request.start
        rows = [np.frombuffer(row, "<f4") for row in whole.rows]
        assert tuple(map(sampler.digest, rows)) == whole.scores.logits_digests
        assert tuple(sampler.pack_top_k(row, 5) for row in rows) == part.rows


@pytest.mark.parametrize(("kind", "k"), [("top_k", 5), ("full", 0), ("raw", 0)])
def test_each_position_is_held_against_its_own_reference(
    prepared: Prepared, kind: RowKind, k: int
) -> None:
    requests = family()
    kept = Scorer(prepared).score(*(keeping(each, kind, k) for each in requests))
    asked = [held_against(*pair, kind) for pair in zip(requests, kept, strict=True)]
    for request, scored in zip(asked, Scorer(prepared).score(*asked), strict=True):
        assert len(scored.comparisons) == len(request.references)
        assert {each.kl for each in scored.comparisons} == {0.0}
        assert {each.exact for each in scored.comparisons} == {kind != "top_k"}
        assert all(each.greedy[0] == each.greedy[1] for each in scored.comparisons)
    first = asked[0]
    shifted = asking(
        first.tokens, first.start, references=(*first.references[1:], first.references[0])
    )
    (scored,) = Scorer(prepared).score(shifted)
    assert all(each.kl > 0 for each in scored.comparisons)


def test_what_is_not_asked_for_is_not_there(prepared: Prepared) -> None:
    (scored,) = Scorer(prepared).score(family()[0])
    assert (scored.comparisons, scored.rows) == ((), ())
