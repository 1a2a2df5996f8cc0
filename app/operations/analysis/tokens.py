"""How likely each token of a state was: as it was recorded, or computed again."""

import asyncio
import struct
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from app.operations.analysis.materials import Materials
from domain.analysis.exact import perplexity
from domain.analysis.parameters import TokensParameters
from domain.analysis.ranges import check_alternatives, check_size, positions
from domain.analysis.result import Dtype, Result, Tensor
from domain.analysis.tokens import (
    ALTERNATIVE_BYTES,
    TOKEN_BYTES,
    Likely,
    Measured,
    TokenFacts,
    TokensFacts,
    TokensSource,
    likeliest_of,
)
from domain.content import Fragment
from domain.ids import TokenId
from domain.models import LanguageModel
from domain.state import Live
from domain.work import Scored, ScoreRequest


async def look_at_tokens(
    materials: Materials, model: LanguageModel, state: Live, parameters: TokensParameters
) -> Result:
    """How likely the tokens of a range were; equal bits wherever it comes from.

    Raises:
        InvalidInput: there is no such range.
        ResultTooLarge: too many alternatives.
    """
    top_k = parameters.top_k
    asked = positions(parameters.start, parameters.end, state.head_position)
    remedy = "Ask for fewer positions with start and end, or for fewer alternatives with top_k"
    check_alternatives(len(asked) * top_k, remedy)
    size = len(asked) * (TOKEN_BYTES + top_k * ALTERNATIVE_BYTES)
    check_size(size, model.max_result_bytes, remedy)
    scored = range(max(1, asked.start), asked.stop)  # nothing comes before the first token
    known = await materials.stored(model, state, scored, top_k)
    missing = [position for position in scored if position not in known]
    if missing:
        again = range(missing[0], missing[-1] + 1)
        known |= await _computed(model, state, again, top_k, private=materials.private)
    source = TokensSource(tokens_stored=len(scored) - len(missing), tokens_recomputed=len(missing))
    return await asyncio.to_thread(_result, model, state.content, asked, top_k, known, source)


async def _computed(
    model: LanguageModel, state: Live, asked: range, top_k: int, *, private: bool
) -> dict[int, Measured]:
    """What the model says in the places of some tokens."""
    request = ScoreRequest(
        tokens=state.content.tokens[: asked.stop],
        start=asked.start,
        keep="top_k" if top_k else None,
        keep_k=top_k,
    )
    (found,) = await model.score([request], private=private)
    return await asyncio.to_thread(_measured, found, asked, top_k)


def _measured(found: Scored, asked: range, top_k: int) -> dict[int, Measured]:
    scores = found.scores
    return {
        position: Measured(
            logprob=scores.logprobs[step],
            rank=scores.ranks[step],
            entropy=scores.entropies[step],
            likeliest=likeliest_of(found.rows[step], top_k, scores.logsumexps[step])
            if top_k
            else (),
        )
        for step, position in enumerate(asked)
    }


def _result(
    model: LanguageModel,
    content: Fragment,
    asked: range,
    top_k: int,
    known: dict[int, Measured],
    source: TokensSource,
) -> Result:
    """All of it; takes a while where there are many alternatives."""
    pieces = content.pieces()
    facts = [
        TokenFacts(
            position=position,
            token_id=content.tokens[position],
            text=pieces[position],
            bytes=content.bytes_of(position),
            top=_top(model, content.tokens[:position], known.get(position)) if top_k else UNSET,
            **_scores(known.get(position)),
        )
        for position in asked
    ]
    scored = [known[position] for position in asked if position in known]
    start, end = asked.stop - len(scored), asked.stop
    return Result(
        facts=TokensFacts(
            start=asked.start,
            end=asked.stop,
            tokens=tuple(facts),
            perplexity=perplexity(each.logprob for each in scored),
        ),
        tensors=(
            _tensor("logprobs", "float64", [each.logprob for each in scored], start, end),
            _tensor("ranks", "int64", [each.rank for each in scored], start, end),
            _tensor("entropies", "float64", [each.entropy for each in scored], start, end),
        ),
        beside=source,
    )


def _scores(measured: Measured | None) -> dict[str, Any]:
    if measured is None:
        return dict.fromkeys(("logprob", "surprisal", "rank", "entropy"))
    return {
        "logprob": measured.logprob,
        "surprisal": 0.0 - measured.logprob,
        "rank": measured.rank,
        "entropy": measured.entropy,
    }


def _top(
    model: LanguageModel, before: Sequence[TokenId], measured: Measured | None
) -> tuple[Likely, ...]:
    likeliest = measured.likeliest if measured else ()
    told = model.told(before, [token for token, _ in likeliest])
    return tuple(
        Likely(token_id=one.token_id, text=one.text, bytes=one.bytes, logprob=logprob)
        for one, (_, logprob) in zip(told, likeliest, strict=True)
    )


def _tensor(name: str, dtype: Dtype, values: Sequence[float | int], start: int, end: int) -> Tensor:
    """What the facts say, as a tensor."""
    code = "d" if dtype == "float64" else "q"
    return Tensor(
        name=name,
        shape=(len(values),),
        dtype=dtype,
        data=struct.pack(f"<{len(values)}{code}", *values),
        start=start,
        end=end,
        inline=False,
    )
