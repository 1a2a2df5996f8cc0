"""What is recorded comes in order, never from the engine's way to the next token."""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domain.ids import TokenId
from domain.work import Drawn, Redraw, Scored, ScoreRequest, Step
from infra.engine.constraints.matching import Constraints
from infra.engine.jobs.generating import Generation
from infra.engine.jobs.scoring import Scoring
from infra.engine.kernels.blake2b import LANES
from infra.engine.sampling import sampler
from infra.engine.sampling.recorder import Recorder, Recording
from infra.engine.sampling.sampler import Row
from infra.models.tokenizer import Tokenizer
from tests.app.api import eventually
from tests.infra.engine import small_models
from tests.infra.engine.asking import drawing, redraw, request, tokens_of
from tests.infra.engine.bench import ROOT, Bench, text

PROMPT = text(3, 20)


def row_of(number: int, size: int = 100) -> Row:
    return np.full(size, number, np.float32)


# the thread


def test_work_is_done_in_order_with_the_digests_of_its_rows() -> None:
    found: list[tuple[int, str]] = []
    with Recorder() as recorder:
        recordings = [Recording(recorder, found.append) for _ in range(3)]  # type: ignore[arg-type]
        for number in range(60):
            recording = recordings[number % 3]
            if number % 5:
                note = partial(lambda n, digest: found.append((n, digest)), number)
                recording.put_row(row_of(number, 1000 + number // 20), note)
            else:
                recording.put(partial(found.append, (number, "")))
    rows = [row_of(number, 1000 + number // 20) for number in range(60)]
    assert found == [
        (number, sampler.digest(row) if number % 5 else "") for number, row in enumerate(rows)
    ]


def test_rows_that_wait_are_hashed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    digests = sampler.digests
    monkeypatch.setattr(
        sampler, "digests", lambda rows: together.append(len(rows)) or digests(rows)
    )
    recorder = Recorder()
    recording = Recording(recorder, pytest.fail)
    for number in range(2 * LANES + 3):
        recording.put_row(row_of(number), lambda digest: None)
    with recorder:
        pass
    assert together == [LANES, LANES, 3]


def test_who_brings_more_rows_than_may_wait_waits_itself() -> None:
    room, count = 5, 40
    put: list[int] = []
    done: list[str] = []
    ahead: list[int] = []
    full, gate = threading.Event(), threading.Event()
    with Recorder(room * row_of(0).nbytes) as recorder:
        recording = Recording(recorder, pytest.fail)
        recording.put(lambda: None if gate.wait(60) else pytest.fail("no gate"))

        def bring() -> None:
            for number in range(count):
                recording.put_row(row_of(number), done.append)
                put.append(number)
                ahead.append(len(put) - len(done))
                if len(ahead) == room:
                    full.set()

        bringer = threading.Thread(target=bring)
        bringer.start()
        assert full.wait(60)
        gate.set()
        bringer.join()
    assert len(done) == count
    assert max(ahead) == room


def test_a_row_larger_than_the_room_passes_alone() -> None:
    done: list[str] = []
    with Recorder(max_bytes=1) as recorder:
        recording = Recording(recorder, pytest.fail)
        for number in range(5):
            recording.put_row(row_of(number), done.append)
    assert len(done) == 5


def test_an_error_ends_its_recording_alone_and_is_delivered_once() -> None:
    first: list[Any] = []
    second: list[Any] = []
    with Recorder() as recorder:
        failing, other = Recording(recorder, first.append), Recording(recorder, second.append)
        for number in range(4):
            failing.put_row(row_of(number), lambda _, n=number: first.append(1 // (2 - n)))
            other.put(partial(second.append, number))
        failing.fail(KeyError())
    assert first[:2] == [0, 1]
    assert [type(each) for each in first[2:]] == [ZeroDivisionError]
    assert second == [0, 1, 2, 3]


def test_rows_that_cannot_be_hashed_fail_their_recordings_and_the_thread_goes_on() -> None:
    found: list[Any] = []
    with Recorder() as recorder:
        Recording(recorder, found.append).put_row(np.array([{}]), found.append)  # type: ignore[arg-type]
        Recording(recorder, found.append).put(lambda: found.append("after"))
    assert isinstance(found[0], Exception)
    assert found[1:] in (["after"], [found[0]])  # the second was in the same batch, or was not


def test_a_row_that_was_recorded_is_held_no_more() -> None:
    with Recorder() as recorder:
        row = row_of(1)
        held = weakref.ref(row)
        Recording(recorder, pytest.fail).put_row(row, lambda digest: None)
        del row
        eventually(lambda: recorder._held_bytes == 0)
        assert held() is None


# the jobs


@pytest.fixture(scope="module")
def bench(folders: dict[str, str | Path]) -> Bench:
    return Bench(small_models.prepared(folders["llama"]))


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, str | Path]) -> Tokenizer:
    return small_models.read(folders["llama"]).tokenizer


Generate = Callable[..., tuple[Generation, list[Any]]]


@pytest.fixture
def generation(tokenizer: Tokenizer) -> Generate:
    """A job that generates, and what it delivers."""

    def made(recorder: Recorder, *, count: int = 12) -> tuple[Generation, list[Any]]:
        delivered: list[Any] = []
        job = Generation(
            request(PROMPT, count),
            0,
            root=ROOT,
            tokenizer=tokenizer,
            constraints=Constraints(tokenizer, 1024, frozenset()),
            eos_token_ids=frozenset(),
            deliver=delivered.append,
            recorder=recorder,
        )
        return job, delivered

    return made


def run(bench: Bench, *jobs: Generation | Scoring) -> None:
    for job in jobs:
        bench.runner.add(job)
    while bench.runner.busy:
        bench.runner.step()


def test_tokens_are_drawn_without_waiting_for_what_is_recorded_of_them(
    bench: Bench, generation: Generate
) -> None:
    recorder = Recorder()
    (job, delivered), (other, others) = generation(recorder), generation(recorder)
    run(bench, job, other)
    assert len(job.text.tokens) == len(PROMPT) + 12
    assert bench.pool.held == 0
    assert delivered == []
    with recorder:
        pass
    *steps, end = delivered
    assert end is None
    assert [step.position for step in steps] == list(range(20, 32))
    assert tokens_of(steps) == job.text.tokens[20:]
    assert others == delivered


def test_what_is_recorded_of_a_token_is_what_scoring_it_finds(
    bench: Bench, generation: Generate, tokenizer: Tokenizer
) -> None:
    delivered, scored = record_and_score(bench, generation, tokenizer, redraw)
    drawn = [step.drawn for step in delivered]
    assert scored.redrawn == tuple(drawn)
    assert scored.scores.logprobs == tuple(each.logprob for each in drawn)
    assert scored.scores.logits_digests == tuple(each.logits_digest for each in drawn)


def test_another_token_that_would_be_drawn_is_described_itself(
    bench: Bench, generation: Generate, tokenizer: Tokenizer
) -> None:
    def reseeded(start: int, count: int, _: object) -> Redraw:
        return Redraw(start=start, stop=start + count, drawing=drawing(seed=5, top_logprobs=20))

    delivered, scored = record_and_score(bench, generation, tokenizer, reseeded)
    differ = 0
    for step, other in zip(delivered, scored.redrawn, strict=True):
        differ += other.token_id != step.drawn.token_id
        assert other.logits_digest == step.drawn.logits_digest
        assert other.logprob == logprob_in(other)
    assert differ


def logprob_in(drawn: Drawn) -> float:
    """What the alternatives say of the token; itself where it is not among them."""
    found = {each.token_id: each.logprob for each in drawn.alternatives}
    return found.get(drawn.token_id, drawn.logprob)


def record_and_score(
    bench: Bench, generation: Generate, tokenizer: Tokenizer, ask: Callable[..., Redraw]
) -> tuple[list[Step], Scored]:
    with Recorder() as recorder:
        job, delivered = generation(recorder)
        run(bench, job)
        found: list[Any] = []
        scoring = Scoring(
            [
                ScoreRequest(
                    tokens=tuple(map(TokenId, job.text.tokens)),
                    start=len(PROMPT),
                    redraws=(ask(len(PROMPT), 12, request(PROMPT, 12)),),
                )
            ],
            root=None,
            scheduler=bench.runner.scheduler,
            tokenizer=tokenizer,
            constraints=Constraints(tokenizer, 1024, frozenset()),
            eos_token_ids=frozenset(),
            deliver=found.append,
            recorder=recorder,
        )
        run(bench, scoring)
    ((scored,),) = found
    return delivered[:-1], scored


def test_a_cancelled_job_delivers_no_end_and_nothing_that_was_not_drawn(
    bench: Bench, generation: Generate
) -> None:
    with Recorder() as recorder:
        job, delivered = generation(recorder)
        bench.runner.add(job)
        for _ in range(4):
            bench.runner.step()
        bench.runner.drop(job)
        job.fail(RuntimeError("nobody waits"))
    *steps, error = delivered
    assert tokens_of(steps) == job.text.tokens[len(PROMPT) :]
    assert isinstance(error, RuntimeError)


def test_an_error_comes_after_the_steps_before_it(
    bench: Bench, generation: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recorder() as recorder:
        job, delivered = generation(recorder)
        bench.runner.add(job)
        for _ in range(3):
            bench.runner.step()
        monkeypatch.setattr(bench.runner.executor, "run", lambda *_: 1 // 0)
        bench.runner.step()
    *steps, error = delivered
    assert len(steps) == 3
    assert isinstance(error, ZeroDivisionError)
    assert not bench.runner.busy
