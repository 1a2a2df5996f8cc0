"""What could come next, as a row of logits says: for itself and as a state would sample it."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from domain.analysis.next import Candidate, Distribution, NextFacts
from domain.analysis.parameters import NextParameters
from domain.analysis.result import Result
from domain.config import SamplingParameters
from domain.ids import TokenId
from infra.engine.analysis.tensors import packed
from infra.engine.observing import Look
from infra.engine.sampling import sampler
from infra.engine.sampling.processors import Processors
from infra.engine.sampling.row_kernels import kernels
from infra.engine.sampling.sampler import NothingLeft, Row
from infra.engine.waiting import worked_out

if TYPE_CHECKING:
    from infra.engine.language_model import TransformersModel


async def look_next(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    sampling: SamplingParameters,
    parameters: NextParameters,
    *,
    private: bool,
) -> Result:
    """What could come after ``tokens``; they may fill the model's context."""
    place = len(tokens)
    seen = await model.observe(Look(tokens=tokens, start=place - 1, logits=True), private=private)
    assert seen.logits is not None
    row: Row = seen.logits.numpy()
    found = await worked_out(_distribution, model, row, tokens, sampling, parameters.top_k)
    logits = packed("logits", seen.logits, start=place, end=place + 1, inline=False)
    return Result(facts=NextFacts(position=place, **asdict(found)), tensors=(logits,))


def _distribution(
    model: "TransformersModel",
    logits: Row,
    tokens: Sequence[TokenId],
    sampling: SamplingParameters,
    top_k: int,
) -> Distribution:
    return distribution(model, Said(logits), tokens, sampling, top_k)


class Said:
    """What a row of raw logits says about every token; takes milliseconds to make.

    ``order`` are the tokens, the likeliest first, ties by lower id; ``ranks`` the place of each in
    it. ``entropy`` is in nats.
    """

    def __init__(self, logits: Row) -> None:
        self.logits = logits
        self.order = sampler.largest(logits, len(logits))
        self.ranks = np.empty_like(self.order)
        self.ranks[self.order] = np.arange(len(logits))
        measures = sampler.measure(logits, TokenId(int(self.order[0])))
        self.entropy, self.logsumexp = measures.entropy, measures.logsumexp

    def logprobs(self, tokens: Sequence[TokenId] | NDArray[np.int64]) -> NDArray[np.float64]:
        """The natural logarithms of how likely some tokens are."""
        return self.logits[tokens].astype(np.float64) - self.logsumexp


def distribution(
    model: "TransformersModel",
    said: Said,
    tokens: Sequence[TokenId],
    sampling: SamplingParameters,
    top_k: int,
) -> Distribution:
    """What is said about the token that comes after ``tokens``.

    Takes milliseconds, so not on the event loop.
    """
    chances = _chances(said.logits, tokens, sampling)
    sampled = sampler.largest(chances, top_k)
    told = functools.partial(_candidates, model, tokens, said, chances)
    return Distribution(
        entropy=said.entropy,
        logsumexp=said.logsumexp,
        top=told(said.order[:top_k]),
        sampled=told(sampled[chances[sampled] > 0]),
        sampled_from=int(np.count_nonzero(chances)),
    )


def _chances(
    logits: Row, tokens: Sequence[TokenId], sampling: SamplingParameters
) -> NDArray[np.float64]:
    """With which probability each token would be drawn."""
    scores = Processors(sampling, tokens).process(logits)
    try:
        return sampler.distribution(scores, sampling)
    except NothingLeft:
        return np.zeros(len(logits))


def _candidates(
    model: "TransformersModel",
    before: Sequence[TokenId],
    said: Said,
    chances: NDArray[np.float64],
    tokens: NDArray[np.int64],
) -> tuple[Candidate, ...]:
    """What is known of each of some tokens that could come after those before."""
    logprobs = said.logprobs(tokens)
    columns = (tokens, logprobs, kernels().exponentials(logprobs), said.ranks[tokens])
    rows = zip(*(each.tolist() for each in (*columns, chances[tokens])), strict=True)
    return tuple(
        Candidate.of(
            model.fragment(before, (TokenId(token),)),
            logprob=logprob,
            probability=probability,
            rank=rank,
            sampling_probability=chance,
        )
        for token, logprob, probability, rank, chance in rows
    )
