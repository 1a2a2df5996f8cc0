"""Answers as pure functions of what was recorded, so that a retry gets the same one."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import chain, zip_longest
from typing import Any

from msgspec import UNSET, UnsetType

from app.schemas import (
    CacheView,
    ContinuationView,
    Forwarded,
    ForwardedToken,
    Generated,
    GeneratedBeams,
    GeneratedMulti,
    SequenceView,
    StateView,
    StreamedToken,
)
from domain.config import GenerationParameters
from domain.content import Scores
from domain.events import (
    BeamsGenerated,
    Continuation,
    ContinuationsGenerated,
    Recorded,
    TextForwarded,
    TokensGenerated,
)
from domain.state import Live, join
from domain.work import Step


def state(
    live: Live, *, include_tokens: bool = False, cache: CacheView | UnsetType = UNSET
) -> StateView:
    """A state, with its tokens and what of it is in the KV cache if they were asked for."""
    return StateView(
        state_id=live.state_id,
        model_id=live.model_id,
        model_type=live.model_type,
        head_position=live.head_position,
        version=live.version,
        text=live.content.text,
        config=live.config,
        metadata=live.metadata,
        origin=live.origin,
        created_at=live.created_at,
        modified_at=live.modified_at,
        dropped=live.dropped,
        tokens=live.content.tokens if include_tokens else UNSET,
        cache=cache,
    )


def forwarded(recorded: Recorded) -> Forwarded:
    """What was appended."""
    event = recorded.event
    assert isinstance(event, TextForwarded)
    content = event.content
    logprobs = event.scores.logprobs or (None,) * len(content.tokens)
    return Forwarded(
        state_id=recorded.state_id,
        head_position=event.start - event.dropped + len(content.tokens),
        version=recorded.version,
        tokens=[
            ForwardedToken(token_id=token, text=text, logprob=logprob, bytes=content.bytes_of(at))
            for at, (token, text, logprob) in enumerate(
                zip(content.tokens, content.pieces(), logprobs, strict=True)
            )
        ],
    )


def generated(made: Sequence[Recorded], *, include_sampling: bool) -> Generated:
    """What a call generated: one text, though it may be recorded in several events."""
    events = [one.event for one in made if isinstance(one.event, TokensGenerated)]
    last = events[-1]
    fields = _continuation(_joined(events), last.parameters, include_sampling=include_sampling)
    return Generated(
        **fields,
        state_id=made[-1].state_id,
        seed=last.seed,
        version=made[-1].version,
        head_position=last.start - last.dropped + len(last.content.tokens),
    )


def continued(recorded: Recorded, *, include_sampling: bool) -> GeneratedMulti:
    """The ways in which a state could go on."""
    event = recorded.event
    assert isinstance(event, ContinuationsGenerated)
    return GeneratedMulti(
        state_id=recorded.state_id,
        version=recorded.version,
        seed=event.seed,
        continuations=[
            ContinuationView(
                **_continuation(one, event.parameters, include_sampling=include_sampling)
            )
            for one in event.continuations
        ],
    )


def searched(recorded: Recorded) -> GeneratedBeams:
    """What beam search found."""
    event = recorded.event
    assert isinstance(event, BeamsGenerated)
    return GeneratedBeams(
        state_id=recorded.state_id,
        version=recorded.version,
        beams=[beam.content.text for beam in event.beams],
        scores=[beam.score for beam in event.beams],
        sequences=[
            SequenceView(
                text=beam.content.text,
                token_ids=beam.content.tokens,
                logprobs=list(beam.scores.logprobs),
                score=beam.score,
                finished=beam.finished,
            )
            for beam in event.beams
        ],
    )


def streamed_step(step: Step, index: int, *, branch: int | UnsetType = UNSET) -> StreamedToken:
    """A token as a stream sends it while it is generated; ``index`` counts from 0."""
    return StreamedToken(
        branch=branch,
        index=index,
        position=step.position,
        token_id=step.drawn.token_id,
        text=step.text,
        probability=math.exp(step.drawn.logprob),
        logprob=step.drawn.logprob,
        bytes=UNSET if step.partial is None else tuple(step.partial),
    )


def streamed(made: Sequence[Recorded]) -> list[StreamedToken]:
    """The tokens of a recorded call, in the order in which a stream sends them."""
    tokens: list[StreamedToken] = []
    for one in made:
        match one.event:
            case TokensGenerated() as event:
                tokens += _tokens(event, event.start - event.dropped, first=event.resumes)
            case ContinuationsGenerated() as event:
                branches = [
                    _tokens(continuation, event.start - event.dropped, branch=branch)
                    for branch, continuation in enumerate(event.continuations)
                ]
                rounds = zip_longest(*branches)
                tokens += [token for drawn in rounds for token in drawn if token is not None]
    return tokens


def _tokens(
    text: TokensGenerated | Continuation,
    place: int,
    *,
    first: int = 0,
    branch: int | UnsetType = UNSET,
) -> list[StreamedToken]:
    content = text.content
    return [
        StreamedToken(
            branch=branch,
            index=first + offset,
            position=place + offset,
            token_id=token,
            text=piece,
            probability=math.exp(logprob),
            logprob=logprob,
            bytes=content.bytes_of(offset),
        )
        for offset, (token, piece, logprob) in enumerate(
            zip(content.tokens, content.pieces(), text.scores.logprobs, strict=True)
        )
    ]


def _joined(events: Sequence[TokensGenerated]) -> Continuation:
    """The text of a call that is recorded in several events."""
    scores = [event.scores for event in events]
    return Continuation(
        content=reduce(join, (event.content for event in events)),
        scores=Scores(
            **{
                name: tuple(chain.from_iterable(getattr(one, name) for one in scores))
                for name in Scores.__struct_fields__
            }
        ),
        sampling_probabilities=tuple(
            chain.from_iterable(event.sampling_probabilities for event in events)
        ),
        alternatives=tuple(chain.from_iterable(event.alternatives for event in events)),
        finish_reason=events[-1].finish_reason,
    )


def _continuation(
    text: Continuation, parameters: GenerationParameters, *, include_sampling: bool
) -> dict[str, Any]:
    """The fields of a :class:`ContinuationView`."""
    content, logprobs = text.content, text.scores.logprobs
    raw = [content.bytes_of(at) for at in range(len(content.tokens))]
    return {
        "text": content.text,
        "new_tokens": list(content.pieces()),
        "token_ids": content.tokens,
        "probabilities": [math.exp(logprob) for logprob in logprobs],
        "logprobs": list(logprobs),
        "finished": text.finish_reason is not None,
        "finish_reason": text.finish_reason,
        "top_logprobs": list(text.alternatives) if parameters.top_logprobs else UNSET,
        "sampling_probabilities": list(text.sampling_probabilities) if include_sampling else UNSET,
        "bytes": [None if one is UNSET else one for one in raw] if content.partial else UNSET,
    }
