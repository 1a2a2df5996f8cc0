"""The one thread that runs models."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.engine.engine import Engine
from infra.engine.runner import Runner
from infra.engine.sampling.sampler import Row
from infra.engine.scheduler import Sequence
from tests.infra.engine import small_models
from tests.infra.engine.bench import Bench, Feeding, text


class Noted(Feeding):
    """Writes down each of its steps, on the engine's thread, so in the order they were made."""

    def note(self, step: Callable[[], None]) -> "Noted":
        self._step = step
        self.ended = threading.Event()
        self.error: Exception | None = None
        return self

    def accept(self, text: Sequence, position: int, logits: Row) -> bool:
        self._step()
        return super().accept(text, position, logits)

    def finish(self) -> None:
        self.ended.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended.set()


@pytest.fixture
def benches(folders: dict[str, str | Path]) -> tuple[Bench, Bench]:
    return tuple(Bench(small_models.prepared(folders[f])) for f in ("llama", "gpt2"))  # type: ignore[return-value]


def one_by_one(bench: Bench, count: int, step: Callable[[], None]) -> Noted:
    return Noted(bench.store, text(count, count), [1] * count).note(step)


def test_models_with_work_take_turns(engine: Engine, benches: tuple[Bench, Bench]) -> None:
    first, second = benches
    order: list[str] = []

    def step_of_long() -> None:
        if not order:
            engine.start(second.runner, short)
        order.append("long")

    long = one_by_one(first, 30, step_of_long)
    short = one_by_one(second, 8, lambda: order.append("short"))
    engine.start(first.runner, long)
    assert long.ended.wait(60)
    assert short.ended.wait(60)
    begun = order.index("short")
    assert order[begun : begun + 16] == ["short", "long"] * 8
    assert (order.count("long"), order.count("short")) == (30, 8)


@pytest.mark.parametrize(("bound", "passes"), [(8, 15), (None, 1)])
def test_a_prompt_is_cut_short_where_another_model_streams(
    engine: Engine, benches: tuple[Bench, Bench], bound: int | None, passes: int
) -> None:
    streaming, other = benches
    runner = Runner(
        other.runner.executor,
        other.pool,
        max_sequences=4,
        max_rows=128,
        max_prefill_rows_beside_streams=bound,
    )
    order: list[str] = []

    def step_of_stream() -> None:
        if not order:
            engine.start(runner, prompt)
        order.append("stream")

    stream = one_by_one(streaming, 30, step_of_stream)
    prompt = Noted(other.store, text(1, 120), [120], first_wanted=119).note(
        lambda: order.append("prompt")
    )
    engine.start(streaming.runner, stream)
    assert stream.ended.wait(60)
    assert prompt.ended.wait(60)
    assert order.index("prompt") == 1 + passes  # one step of the stream before each of its own


def test_a_job_that_was_cancelled_is_never_stepped_again(
    engine: Engine, benches: tuple[Bench, Bench]
) -> None:
    bench, _ = benches
    steps: list[str] = []

    def step() -> None:
        steps.append("step")
        if len(steps) == 3:
            engine.cancel(bench.runner, job)
            engine.cancel(bench.runner, job)  # twice does nothing
            engine.start(bench.runner, after)

    job = one_by_one(bench, 20, step)
    after = one_by_one(bench, 5, lambda: None)
    engine.start(bench.runner, job)
    assert after.ended.wait(60)
    assert len(steps) == 3
    assert not job.ended.is_set()
    assert bench.pool.held == 0


def test_a_step_that_fails_for_no_fault_of_a_job_fails_them_all_and_the_engine_goes_on(
    engine: Engine, benches: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, other = benches
    jobs = [one_by_one(bench, count, lambda: None) for count in (6, 9)]

    def start_both() -> None:
        for job in jobs:
            engine.start(bench.runner, job)

    with monkeypatch.context() as patched:
        patched.setattr(bench.pool, "allocate", lambda: 1 // 0)
        engine.submit(start_both)  # before the next step
        for job in jobs:
            assert job.ended.wait(60)
            assert isinstance(job.error, ZeroDivisionError)
    for idle in (bench, other):
        again = one_by_one(idle, 6, lambda: None)
        engine.start(idle.runner, again)
        assert again.ended.wait(60)
        assert again.error is None


def test_an_engine_ends_when_it_is_left() -> None:
    with Engine() as engine:
        thread = engine._thread
        assert thread.is_alive()
    assert not thread.is_alive()
