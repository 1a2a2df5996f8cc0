"""Whether an event can be as it is recorded, by its own words and what came before it.

Nothing is computed again here: what is asked of the model is its vocabulary, the text of tokens
and what a constraint allows.
"""

from collections.abc import Callable, Sequence

from domain import decide
from domain.config import Constraint
from domain.events import (
    BeamsGenerated,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    FinishReason,
    Fragment,
    Recorded,
    StateCreated,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import TokenId, Version
from domain.origin import Fork, Merge, New
from domain.replay import Divergence, Occurrence, divergence, runs_of
from domain.state import Live, fold, join, take
from domain.stopping import Stopping

PARTIAL_SINCE = 2
"""The schema from which on the bytes of incomplete characters are recorded."""

TextOf = Callable[[Sequence[TokenId], Sequence[TokenId]], Fragment]
"""The text that tokens add after others: :meth:`domain.ports.LanguageModel.fragment`."""

Fulfils = Callable[[Constraint, Sequence[TokenId]], bool]
""":meth:`domain.ports.LanguageModel.fulfils`."""


# where a state comes from


def compare_origin(recorded: Recorded, parents: Sequence[Sequence[Recorded]]) -> Divergence | None:
    """Whether a state began with what those it comes from held.

    ``parents`` are their histories, in the order of the origin, up to the version it names.
    """
    created = recorded.event
    assert isinstance(created, StateCreated)
    match created.origin:
        case New():
            dropped, found = 0, None
        case Fork() as fork:
            parent = _held(parents[0], fork.version)
            if not isinstance(parent, Live):
                return divergence(recorded, "origin.version", fork.version, parent)
            dropped, found = (
                parent.dropped,
                _compare_fork(recorded, created, fork, parent, parents[0][-1]),
            )
        case Merge() as merge:
            dropped, found = 0, _compare_merge(recorded, created, merge, parents)
    if found is None and created.dropped != dropped:
        return divergence(recorded, "dropped", created.dropped, dropped)
    return found


def _held(history: Sequence[Recorded], version: Version) -> Live | Version | None:
    """A parent at a version; the one it has, or none, where it never got there alive."""
    state = fold(history)
    if isinstance(state, Live) and state.version == version:
        return state
    return state.version if state else None


def _compare_fork(
    recorded: Recorded, created: StateCreated, fork: Fork, parent: Live, last: Recorded
) -> Divergence | None:
    content = take(parent.content, fork.head_position)
    if fork.continuation is not None:
        version, index = fork.continuation.version, fork.continuation.index
        if version != fork.version:
            return divergence(recorded, "origin.continuation.version", version, fork.version)
        several = isinstance(last.event, ContinuationsGenerated | BeamsGenerated)
        runs = runs_of(last) if several else ()
        if not 0 <= index < len(runs):
            possible = f"one of {len(runs)} continuations"
            return divergence(recorded, "origin.continuation.index", index, possible)
        content = join(parent.content, runs[index][1].content)
    found = _compare_content(recorded, "", created.content, content)
    wanted = parent.head_position if fork.continuation else len(content.tokens)
    if found is None and fork.head_position != wanted:
        return divergence(recorded, "origin.head_position", fork.head_position, wanted)
    return found


def _compare_merge(
    recorded: Recorded,
    created: StateCreated,
    merge: Merge,
    parents: Sequence[Sequence[Recorded]],
) -> Divergence | None:
    texts = []
    for index, (parent, history) in enumerate(zip(merge.parents, parents, strict=True)):
        field, held = f"origin.parents[{index}]", _held(history, parent.version)
        if not isinstance(held, Live):
            return divergence(recorded, f"{field}.version", parent.version, held)
        if parent.head_position != held.head_position:
            told, actual = parent.head_position, held.head_position
            return divergence(recorded, f"{field}.head_position", told, actual)
        texts.append(held.content.tokens)
    tokens = decide.concatenate(texts) if texts else ()
    if created.content.tokens != tokens:
        return divergence(recorded, "content.tokens", created.content.tokens, tokens)
    return None


# text


def compare_text(occurrence: Occurrence, text_of: TextOf) -> Divergence | None:
    """Whether recorded texts are those of the recorded tokens. A fork's is that of its parent."""
    recorded, event = occurrence.recorded, occurrence.recorded.event
    if isinstance(event, StateCreated):
        if isinstance(event.origin, Fork):
            return None
        return _compare_content(recorded, "", event.content, text_of((), event.content.tokens))
    held = occurrence.before.content.tokens if occurrence.before else ()
    for name, run in runs_of(recorded):
        actual = text_of(held, run.content.tokens)
        if (found := _compare_content(recorded, name, run.content, actual)) is not None:
            return found
    return None


def _compare_content(
    recorded: Recorded, name: str, told: Fragment, actual: Fragment
) -> Divergence | None:
    if told.tokens != actual.tokens:
        return divergence(recorded, f"{name}content.tokens", told.tokens, actual.tokens)
    if (told.text, told.ends) != (actual.text, actual.ends):
        return divergence(recorded, f"{name}content.text", told.text, actual.text)
    if recorded.row.schema >= PARTIAL_SINCE and told.partial != actual.partial:
        return divergence(recorded, f"{name}content.partial", told.partial, actual.partial)
    return None


# calls


def compare_call(occurrence: Occurrence) -> Divergence | None:
    """Whether what is said to resume a call that was cut off goes on as that one began."""
    recorded, event = occurrence.recorded, occurrence.recorded.event
    if not isinstance(event, TokensGenerated) or not event.resumes:
        return None
    if not occurrence.earlier or event.resumes != len(occurrence.prior):
        return divergence(recorded, "resumes", event.resumes, len(occurrence.prior))
    last = occurrence.earlier[-1]
    for field in ("parameters", "seed"):
        was, now = getattr(last, field), getattr(event, field)
        if was != now:
            return divergence(recorded, field, now, was)
    if last.finish_reason not in ("cancelled", "context_full"):
        return divergence(recorded, "resumes", event.resumes, f"an end: {last.finish_reason}")
    return None


def compare_slide(occurrence: Occurrence) -> Divergence | None:
    """Whether a state slid as its config says, and because it had to."""
    recorded, event, before = occurrence.recorded, occurrence.recorded.event, occurrence.before
    if not isinstance(event, ContextSlid) or before is None:
        return None
    config = before.config
    allowed = config.slide_count if config.on_full == "slide" else 0
    if event.dropped != allowed:
        return divergence(recorded, "dropped", event.dropped, allowed)
    following = occurrence.following and occurrence.following.event
    comes = len(following.content.tokens) if isinstance(following, TextForwarded) else 0
    if before.room and comes <= before.room:
        return divergence(recorded, "dropped", event.dropped, f"room for {before.room}")
    return None


def compare_storage(occurrence: Occurrence) -> Divergence | None:
    """Whether a generation kept the logits that its state was to keep."""
    recorded, event, before = occurrence.recorded, occurrence.recorded.event, occurrence.before
    if not isinstance(event, TokensGenerated | ContinuationsGenerated) or before is None:
        return None
    stored, config = event.stored_logits, before.config
    kept = None if stored is None else (stored.kind, stored.k)
    wanted = None
    if config.store_logits != "none" and any(r.content.tokens for _, r in runs_of(recorded)):
        wanted = (config.store_logits, config.top_k_logits)
    return None if kept == wanted else divergence(recorded, "stored_logits", kept, wanted)


# ends


def compare_finish(
    occurrence: Occurrence, eos_token_ids: frozenset[TokenId], fulfils: Fulfils
) -> Divergence | None:
    """Whether generated texts ended where and why their parameters say."""
    recorded, event, before = occurrence.recorded, occurrence.recorded.event, occurrence.before
    if not isinstance(event, TokensGenerated | ContinuationsGenerated) or before is None:
        return None
    earlier = event.resumes if isinstance(event, TokensGenerated) else 0
    most = min(event.parameters.max_tokens - earlier, before.room)
    for name, run in runs_of(recorded):
        assert isinstance(run, TokensGenerated | Continuation)
        tokens = run.content.tokens
        ends = _ends(occurrence, run, eos_token_ids, fulfils)
        early = [index for index, reason in enumerate(ends[: len(tokens)]) if reason]
        if early:
            reason, index = ends[early[0]], early[0] - 1 if early[0] else None
            return divergence(recorded, f"{name}finish_reason", run.finish_reason, reason, index)
        if len(tokens) > most:
            return divergence(recorded, f"len({name}content.tokens)", len(tokens), most)
        possible = _possible_ends(ends[-1], len(tokens), most)
        if run.finish_reason not in possible:
            return divergence(recorded, f"{name}finish_reason", run.finish_reason, possible[0])
    return None


def _ends(
    occurrence: Occurrence,
    run: TokensGenerated | Continuation,
    eos_token_ids: frozenset[TokenId],
    fulfils: Fulfils,
) -> list[FinishReason | None]:
    """Why a text ended, had it ended before its first token, after its first, its second ..."""
    event, before = occurrence.recorded.event, occurrence.before
    assert isinstance(event, TokensGenerated | ContinuationsGenerated)
    assert before is not None
    fulfilled = _fulfilled(occurrence, event.parameters.constraint, run, eos_token_ids, fulfils)
    stopping = Stopping(
        event.parameters,
        eos_token_ids=eos_token_ids,
        held=before.head_position,
        context_size=before.config.context_size,
        said=occurrence.said,
    )
    at_once: FinishReason | None = "constraint" if 0 in fulfilled else None
    pieces = zip(run.content.tokens, run.content.pieces(), strict=True)
    return [
        at_once if before.room else "context_full",
        *(
            stopping.push(token, piece, fulfilled=count in fulfilled)
            for count, (token, piece) in enumerate(pieces, start=1)
        ),
    ]


def _fulfilled(
    occurrence: Occurrence,
    constraint: Constraint | None,
    run: TokensGenerated | Continuation,
    eos_token_ids: frozenset[TokenId],
    fulfils: Fulfils,
) -> set[int]:
    """Numbers of tokens with which a constraint was fulfilled.

    What can follow is the end of the sequence alone. Where another token does, it is one that
    could not be drawn, and is found as that: only the other places are looked at.
    """
    if constraint is None:
        return set()
    tokens = run.content.tokens
    last = [count for count, token in enumerate(tokens) if token in eos_token_ids]
    return {
        count
        for count in (*last, len(tokens))
        if fulfils(constraint, occurrence.prior + tokens[:count])
    }


def _possible_ends(
    reason: FinishReason | None, count: int, most: int
) -> tuple[FinishReason | None, ...]:
    """How a generation of ``count`` tokens can have ended, the likeliest first.

    ``reason`` is what its last token gives. A client may leave, or the state be deleted, at any
    moment before an end of its own; also while there is nothing to draw.
    """
    if reason is None:
        return ("cancelled",) if count < most else (None, "cancelled")
    return (reason,) if count else (reason, "cancelled")
