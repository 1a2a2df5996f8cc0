"""What could come next, as a row of logits says: for itself and as a state would sample it."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from msgspec import UNSET
from msgspec.structs import asdict
from numpy.typing import NDArray

from domain.analysis.next import Candidate, Distribution, NextFacts
from domain.analysis.parameters import NextParameters
from domain.analysis.result import Result
from domain.config import SamplingParameters
from domain.ids import TokenId
from infra.engine import sampler
from infra.engine.analysis.tensors import packed
from infra.engine.observing import Look
from infra.engine.processors import Processors
from infra.engine.row_kernels import kernels
from infra.engine.sampler import Measures, NothingLeft, Row
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
    found = await worked_out(distribution, model, row, tokens, sampling, parameters.top_k)
    logits = packed("logits", seen.logits, start=place, end=place + 1, inline=False)
    return Result(facts=NextFacts(position=place, **asdict(found)), tensors=(logits,))


def distribution(
    model: "TransformersModel",
    logits: Row,
    tokens: Sequence[TokenId],
    sampling: SamplingParameters,
    top_k: int,
) -> Distribution:
    """What a row of logits, those after ``tokens``, says about the token that comes next.

    Takes milliseconds, so not on the event loop.
    """
    likeliest = sampler.largest(logits, top_k)
    likeliest = likeliest[logits[likeliest] > -np.inf]
    measures = sampler.measure(logits, TokenId(int(likeliest[0])))
    chances = _chances(logits, tokens, sampling)
    sampled = sampler.largest(chances, top_k)
    candidates = _Candidates(model, logits, tokens, measures, chances)
    return Distribution(
        entropy=measures.entropy,
        logsumexp=measures.logsumexp,
        top=candidates.of(likeliest),
        sampled=candidates.of(sampled[chances[sampled] > 0]),
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


class _Candidates:
    """Describes tokens that could come after ``tokens``."""

    def __init__(
        self,
        model: "TransformersModel",
        logits: Row,
        tokens: Sequence[TokenId],
        measures: Measures,
        chances: NDArray[np.float64],
    ) -> None:
        self._model = model
        self._logits = logits
        self._before = tokens
        self._measures = measures
        self._chances = chances

    def of(self, ids: NDArray[np.int64]) -> tuple[Candidate, ...]:
        """What is known of each of these tokens."""
        logprobs = self._logits[ids].astype(np.float64) - self._measures.logsumexp
        probabilities = kernels().exponentials(logprobs)
        found: Iterable[tuple[int, float, float]] = zip(
            ids.tolist(), logprobs.tolist(), probabilities.tolist(), strict=True
        )
        return tuple(self._candidate(TokenId(token), *rest) for token, *rest in found)

    def _candidate(self, token: TokenId, logprob: float, probability: float) -> Candidate:
        content = self._model.fragment(self._before, (token,))
        raw = content.partial.get(0)
        return Candidate(
            token_id=token,
            text=content.text,
            bytes=UNSET if raw is None else tuple(bytes.fromhex(raw)),
            logprob=logprob,
            probability=probability,
            rank=_rank(self._logits, token),
            sampling_probability=float(self._chances[token]),
        )


def _rank(logits: Row, token: TokenId) -> int:
    """How many tokens are likelier, or as likely and of a lower id."""
    value = logits[token]
    return int(np.count_nonzero(logits > value) + np.count_nonzero(logits[:token] == value))
