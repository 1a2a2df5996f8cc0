"""Answers as pure functions of what was recorded, so that a retry gets the same one."""

import math

from msgspec import UNSET, UnsetType

from app.schemas import (
    CacheView,
    Forwarded,
    ForwardedToken,
    Generated,
    StateView,
    StreamedToken,
)
from domain.events import Recorded, TextForwarded, TokensGenerated
from domain.ports import Step
from domain.state import Live


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
        tokens=live.content.tokens if include_tokens else UNSET,
        cache=cache,
    )


def forwarded(recorded: Recorded) -> Forwarded:
    """What was appended."""
    event = recorded.event
    assert isinstance(event, TextForwarded)
    content = event.content
    return Forwarded(
        state_id=recorded.state_id,
        head_position=event.start + len(content.tokens),
        version=recorded.version,
        tokens=[
            ForwardedToken(token_id=token, text=text, logprob=logprob)
            for token, text, logprob in zip(
                content.tokens, content.pieces(), event.scores.logprobs, strict=True
            )
        ],
    )


def generated(recorded: Recorded, *, include_sampling: bool) -> Generated:
    """What was generated."""
    event = recorded.event
    assert isinstance(event, TokensGenerated)
    content = event.content
    return Generated(
        state_id=recorded.state_id,
        text=content.text,
        new_tokens=list(content.pieces()),
        token_ids=content.tokens,
        probabilities=[math.exp(logprob) for logprob in event.scores.logprobs],
        logprobs=list(event.scores.logprobs),
        finished=event.finish_reason is not None,
        finish_reason=event.finish_reason,
        seed=event.seed,
        version=recorded.version,
        head_position=event.start + len(content.tokens),
        top_logprobs=event.alternatives if event.parameters.top_logprobs else UNSET,
        sampling_probabilities=list(event.sampling_probabilities) if include_sampling else UNSET,
    )


def streamed_step(step: Step, index: int) -> StreamedToken:
    """A token as a stream sends it while it is generated; ``index`` counts from 0."""
    return StreamedToken(
        index=index,
        position=step.position,
        token_id=step.drawn.token_id,
        text=step.text,
        probability=math.exp(step.drawn.logprob),
        logprob=step.drawn.logprob,
    )


def streamed(recorded: Recorded) -> list[StreamedToken]:
    """The tokens of a recorded generation, as its stream sent them."""
    event = recorded.event
    assert isinstance(event, TokensGenerated)
    content = event.content
    return [
        StreamedToken(
            index=index,
            position=event.start + index,
            token_id=token,
            text=text,
            probability=math.exp(logprob),
            logprob=logprob,
        )
        for index, (token, text, logprob) in enumerate(
            zip(content.tokens, content.pieces(), event.scores.logprobs, strict=True)
        )
    ]
