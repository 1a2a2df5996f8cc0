"""What was recorded of a state's tokens when it got them, where it is still true of them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import takewhile
from typing import Final

from domain.analysis.tokens import Likeliest, Measured, likeliest_of
from domain.chain import blobs_digest
from domain.events import (
    BeamsGenerated,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    HeadRewound,
    Recorded,
    StateCreated,
    TextForwarded,
    TokensGenerated,
    decode,
)
from domain.ids import Version
from domain.log_errors import LogError
from domain.models import LanguageModel
from domain.origin import ContinuationId, Fork
from domain.ports import LogReader
from domain.replay import Run, place_of
from domain.state import Live

PAGE: Final = 64
"""Events that are read at a time."""

MAX_PAGES: Final = 256
"""What only still older events know is computed again."""

MAX_ROW_BYTES: Final = 64 << 20
"""Whole rows of logits that are read of one event; where there are more they are computed again."""


async def stored(
    log: LogReader, model: LanguageModel, state: Live, asked: range, top_k: int
) -> dict[int, Measured]:
    """What is known of the tokens at some positions, with ``top_k`` alternatives.

    It is what the model would say now: recorded under the fingerprint that it has, of tokens that
    still have the same ones before them. A fork has it from the states it comes from.
    """
    found: dict[int, Measured] = {}
    head = state.head_position  # tokens from here on are not of the events that are still to come
    adopted: ContinuationId | None = None
    async for recorded in _newest_first(log, state):
        if head <= asked.start:
            break
        run, adopted = _added(recorded, adopted), None
        match recorded.event:
            case ContextSlid():  # tokens of before had others before them
                break
            case HeadRewound(to_position=position):
                head = min(head, position)
            case StateCreated(origin=Fork(continuation=None, head_position=position)):
                head = min(head, position)
            case StateCreated(origin=Fork(continuation=adopted)):
                pass
            case _ if run is not None:
                place = place_of(recorded)
                end = min(place + len(run.content.tokens), head, asked.stop)
                here = range(max(place, asked.start), end)
                if here and recorded.row.fingerprint == model.fingerprint.id:
                    found |= await _told(log, model, recorded, run, here, top_k)
                head = min(head, place)
    return found


async def _newest_first(log: LogReader, state: Live) -> AsyncIterator[Recorded]:
    """The events that led to a state, latest first; then those of the one it was forked from."""
    state_id, version = state.state_id, state.version
    for _ in range(MAX_PAGES):
        after = Version(max(0, version - PAGE))
        rows = await log.state_rows(state_id, after=after, until=version)
        for row in reversed(rows):
            try:
                recorded = decode(row)
            except LogError:  # it cannot be read any more
                return
            yield recorded
        version = after
        if not rows:
            return
        match recorded.event:
            case StateCreated(origin=Fork() as origin):
                state_id, version = origin.state_id, origin.version
            case StateCreated():
                return


def _added(recorded: Recorded, adopted: ContinuationId | None) -> Run | None:
    """What an event added to its state, or to the fork that ``adopted`` a continuation of it."""
    match recorded.event:
        case TextForwarded() | TokensGenerated() as event:
            return event
        case ContinuationsGenerated(continuations=runs) | BeamsGenerated(beams=runs) if adopted:
            run: Run = runs[adopted.index]
            return run
        case _:
            return None


async def _told(
    log: LogReader, model: LanguageModel, recorded: Recorded, run: Run, here: range, top_k: int
) -> dict[int, Measured]:
    """What an event tells of its tokens ``here``; nothing if that is not enough."""
    start, scores = place_of(recorded), run.scores
    steps = range(here.start - start, here.stop - start)
    likeliest = await _likeliest(log, model, recorded, run, steps, top_k) if top_k else None
    if top_k and likeliest is None:
        return {}
    return {
        start + step: Measured(
            logprob=scores.logprobs[step],
            rank=scores.ranks[step],
            entropy=scores.entropies[step],
            likeliest=likeliest[number] if likeliest else (),
        )
        for number, step in enumerate(steps)
    }


async def _likeliest(
    log: LogReader, model: LanguageModel, recorded: Recorded, run: Run, steps: range, top_k: int
) -> list[Likeliest] | None:
    """The likeliest tokens at some steps of a run, by what it returned or by its stored logits."""
    event, needed = recorded.event, min(top_k, model.vocabulary_size)
    if not isinstance(run, TokensGenerated | Continuation):
        return None
    if all(len(run.alternatives[step]) >= needed for step in steps):
        return [
            tuple((each.token_id, each.logprob) for each in run.alternatives[step][:top_k])
            for step in steps
        ]
    assert isinstance(event, TokensGenerated | ContinuationsGenerated)
    kept = event.stored_logits
    if kept is None or (kept.kind == "top_k" and kept.k < needed):
        return None
    if kept.kind == "full" and 4 * model.vocabulary_size * _rows(event) > MAX_ROW_BYTES:
        return None
    rows = await log.logits(recorded.position)
    if await asyncio.to_thread(blobs_digest, rows) != kept.digest:
        return None  # let go of
    first = _rows(event, run)
    rows = rows[first + steps.start : first + steps.stop]
    if kept.kind == "full":
        rows = tuple(await model.largest(rows, top_k))
    return await asyncio.to_thread(_read, rows, top_k, [run.scores.logsumexps[at] for at in steps])


def _read(rows: Sequence[bytes], top_k: int, logsumexps: Sequence[float]) -> list[Likeliest]:
    pairs = zip(rows, logsumexps, strict=True)
    return [likeliest_of(row, top_k, logsumexp) for row, logsumexp in pairs]


def _rows(event: TokensGenerated | ContinuationsGenerated, before: Run | None = None) -> int:
    """How many rows are stored of an event, in all or before those of one of its runs."""
    runs: Sequence[Run] = [event] if isinstance(event, TokensGenerated) else event.continuations
    return sum(len(run.content.tokens) for run in takewhile(lambda run: run is not before, runs))
