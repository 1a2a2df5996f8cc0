"""The threads of the strict machine: they come with a model, work together, and go with it."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from infra.engine.forward import Prepared
from infra.engine.strict.machine import Team
from infra.engine.strict.program import Code, Program
from tests.infra.engine import programs
from tests.infra.engine.bench import Bench, text
from tests.infra.engine.programs import Writer


def followers() -> set[threading.Thread]:
    """Threads that wait for work of a machine."""
    return {t for t in threading.enumerate() if "_keep" in t.name}


def gone(threads: set[threading.Thread]) -> bool:
    """Whether they end."""
    for thread in threads:
        thread.join(timeout=60)
    return not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def program() -> Program:
    """Several segments of products, so that threads have to wait for each other often."""
    generator = torch.Generator().manual_seed(0)
    writer = Writer()
    value = writer.embed(torch.randn(60, 64, generator=generator))
    for _ in range(12):
        weight = torch.randn(64, 64, generator=generator) / 8
        value = writer.apply(Code.TANH, writer.linear(value, weight))
    return writer.finish(value, tokens=60)


@pytest.fixture(scope="module")
def expected(program: Program) -> torch.Tensor:
    return programs.run(program, 60, threads=1)


@pytest.mark.parametrize("threads", range(2, 9))
def test_any_number_of_threads_computes_the_same_and_ends_with_its_model(
    program: Program, expected: torch.Tensor, threads: int
) -> None:
    before = followers()
    prepared = programs.prepared(program, threads=threads)
    bench = Bench(prepared)
    started = followers() - before
    assert len(started) == threads - 1
    for _ in range(5):
        assert torch.equal(bench.compute(list(range(60))).logits, expected)
    del bench, prepared
    gc.collect()
    assert gone(started)


def test_a_team_that_never_ran_ends_too() -> None:
    before = followers()
    team = Team(4)
    started = followers() - before
    assert len(started) == 3
    del team
    assert gone(started)


def test_machines_that_run_at_the_same_time_do_not_disturb_each_other(
    program: Program, expected: torch.Tensor
) -> None:
    def compute(prepared: Prepared) -> bool:
        bench = Bench(prepared)
        tokens = list(range(60))
        same = (
            torch.equal(bench.compute(tokens, cuts, root=None).logits, expected)
            for cuts in ([60], [1] * 60, [7, 20, 33])
        )
        return all(same)

    machines = [programs.prepared(program, threads=threads) for threads in (1, 2, 2, 3)]
    with ThreadPoolExecutor(len(machines)) as pool:
        assert all(pool.map(compute, machines))


def test_a_token_that_the_model_does_not_have_is_refused_and_the_machine_goes_on(
    program: Program, expected: torch.Tensor
) -> None:
    prepared = programs.prepared(program)
    for token in (-1, program.vocabulary):
        with pytest.raises(IndexError):
            Bench(prepared).compute([*text(0, 5, 60), token])
    assert torch.equal(Bench(prepared).compute(list(range(60))).logits, expected)
