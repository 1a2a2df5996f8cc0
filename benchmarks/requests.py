"""What a whole request costs beyond the model's own time."""

import asyncio
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection

from app.bootstrap import open_models
from app.settings import Settings
from benchmarks.bench import Bench
from benchmarks.client import Client
from benchmarks.measured import Measured, Ratio, percentile, seconds
from benchmarks.served import Served
from domain.config import GenerationParameters, SamplingParameters
from domain.ids import TokenId
from domain.models import LanguageModel
from domain.work import Drawing, GenerationRequest

MODEL = "cacher-tiny"
PROMPT = (1, 2, 3)
NEW = 8


def rows(bench: Bench) -> Iterator[Measured]:
    """The same requests over HTTP and to the model alone, by one client and by more."""
    served = bench.server()
    with _engine_alone(bench.threads) as alone:
        for clients in (bench.sizes.few, bench.sizes.many):
            each = bench.sizes.requests // clients
            samples = [
                (_over_http(served, clients, each), alone(clients, each))
                for _ in range(1 + bench.rounds)
            ][1:]  # the first are warm-up
            for percent in (50, 99):
                yield Measured(
                    what=f"{NEW} tokens of {MODEL} over HTTP, {clients} at once, p{percent}",
                    against="the model alone, no HTTP and no log",
                    unit="ms",
                    ratio=Ratio.COST,
                    ours=[1e3 * percentile(times, percent) for times, _ in samples],
                    theirs=[1e3 * percentile(times, percent) for _, times in samples],
                )


def _over_http(served: Served, clients: int, each: int) -> list[float]:
    """Seconds of each request; every one continues a state of its own."""

    def work(client: Client, states: list[str]) -> list[float]:
        return [seconds(partial(client.generate, state_id, NEW)) for state_id in states]

    states = [[served.client.create([*PROMPT], MODEL) for _ in range(each)] for _ in range(clients)]
    return [*chain.from_iterable(served.together(work, states))]


@contextmanager
def _engine_alone(threads: int) -> Iterator[Callable[[int, int], list[float]]]:
    """The engine in a process of its own, whose threads wait as the server's do."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_run_engine, args=(there, threads))
    process.start()
    there.close()  # so that its end is noticed here

    def alone(clients: int, each: int) -> list[float]:
        here.send((clients, each))
        times: list[float] = here.recv()
        return times

    try:
        yield alone
    finally:
        here.send(None)
        process.join()


def _run_engine(asked: Connection, threads: int) -> None:
    async def run() -> None:
        async with open_models(Settings(model_name=MODEL, threads=threads)) as models:
            model = await models.get(models.default)
            assert model.model_type == "causal_lm"
            while (wanted := asked.recv()) is not None:
                asked.send(await _alone(model, *wanted))

    asyncio.run(run())


async def _alone(model: LanguageModel, clients: int, each: int) -> list[float]:
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def client() -> None:
        for _ in range(each):
            start = loop.time()
            drawn = [step async for step in model.generate(_request())]
            times.append(loop.time() - start)
            assert len(drawn) == NEW

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


def _request() -> GenerationRequest:
    sampling = SamplingParameters(temperature=0, top_k=0, top_p=1)
    return GenerationRequest(
        tokens=tuple(map(TokenId, PROMPT)),
        parameters=GenerationParameters(sampling=sampling, max_tokens=NEW),
        drawing=Drawing(
            sampling=sampling, seed=0, top_logprobs=0, store_logits="none", top_k_logits=1
        ),
        max_new=NEW,
        context_size=1024,
    )
