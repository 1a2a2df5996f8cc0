"""Whether an event can be as it is recorded, by its own words and what came before it.

Nothing is computed again here: what is asked of the model is its vocabulary, the text of tokens
and what a constraint allows.
"""

import re
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from domain import decide, plan
from domain.config import ConfigChanges, Constraint
from domain.content import Fragment
from domain.errors import InvalidInput
from domain.events import (
    BeamsGenerated,
    ConfigChanged,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    FinishReason,
    Recorded,
    StateCreated,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import TokenId
from domain.origin import Fork, Merge, New, Origin, parents_of
from domain.replay import Course, Occurrence, runs_of
from domain.report import Divergence, divergence
from domain.state import Live, join, take
from domain.stopping import Stopping

PARTIAL_SINCE: Final = 2
"""The schema from which on the bytes of incomplete characters are recorded."""

PARENTS: Final = range(2, 65)
"""How many states are merged into one."""

TextOf = Callable[[Sequence[TokenId], Sequence[TokenId]], Fragment]
"""The text that tokens add after others: :meth:`domain.models.LanguageModel.fragment`."""

Fulfils = Callable[[Constraint, Sequence[TokenId]], bool]
""":meth:`domain.models.LanguageModel.fulfils`."""


# where a state comes from


def compare_origin(recorded: Recorded, parents: Sequence[Course]) -> Divergence | None:
    """Whether a state began with what those it comes from held, which were there before it.

    ``parents`` are the histories of :func:`parents_of` its origin, each up to its version.
    """
    created = recorded.event
    assert isinstance(created, StateCreated)
    origin, held, dropped = created.origin, [], 0
    for index, parent in enumerate(parents):
        state = _held(recorded, origin, index, parent)
        if isinstance(state, Divergence):
            return state
        held.append(state)
    match origin:
        case New():
            found = None
        case Fork():
            found = _compare_fork(recorded, created, origin, held[0], parents[0].last)
            dropped = held[0].dropped
        case Merge():
            found = _compare_merge(recorded, created, origin, held)
    found = found or _compare_model(recorded, created, held)
    if found is None and created.dropped != dropped:
        return divergence(recorded, "dropped", created.dropped, dropped)
    return found


def _held(recorded: Recorded, origin: Origin, index: int, parent: Course) -> Live | Divergence:
    """A parent as it was: it must have been alive at that version, and before its child began."""
    _, version = parents_of(origin)[index]
    field = "origin.version" if isinstance(origin, Fork) else f"origin.parents[{index}].version"
    state, last = parent.state, parent.last
    if not isinstance(state, Live) or state.version != version or last is None:
        return divergence(recorded, field, version, state.version if state else None)
    latest = last.position
    if latest >= recorded.position:
        return divergence(recorded, field, version, f"recorded later, at position {latest}")
    return state


def _compare_model(
    recorded: Recorded, created: StateCreated, parents: Sequence[Live]
) -> Divergence | None:
    """Whether a state has the model of those it comes from, whose own beginnings say the rest."""
    for parent in parents:
        for field in ("model_id", "model_type"):
            told, actual = getattr(created, field), getattr(parent, field)
            if told != actual:
                return divergence(recorded, field, told, actual)
    if parents and created.model_revision is not None:
        return divergence(recorded, "model_revision", created.model_revision, None)
    return None


def _compare_fork(
    recorded: Recorded, created: StateCreated, fork: Fork, parent: Live, last: Recorded | None
) -> Divergence | None:
    content = take(parent.content, fork.head_position)
    if fork.continuation is not None:
        version, index = fork.continuation.version, fork.continuation.index
        if version != fork.version:
            return divergence(recorded, "origin.continuation.version", version, fork.version)
        several = last and isinstance(last.event, ContinuationsGenerated | BeamsGenerated)
        runs = runs_of(last) if last and several else ()
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
    recorded: Recorded, created: StateCreated, merge: Merge, parents: Sequence[Live]
) -> Divergence | None:
    if (count := len(parents)) not in PARENTS:
        possible = f"from {PARENTS[0]} to {PARENTS[-1]}"
        return divergence(recorded, "len(origin.parents)", count, possible)
    named = [parent.state_id for parent in parents]
    for index, (parent, held) in enumerate(zip(merge.parents, parents, strict=True)):
        field = f"origin.parents[{index}]"
        if parent.state_id in named[:index]:
            return divergence(recorded, f"{field}.state_id", parent.state_id, "another state")
        if parent.head_position != held.head_position:
            told, actual = parent.head_position, held.head_position
            return divergence(recorded, f"{field}.head_position", told, actual)
    tokens = decide.concatenate([parent.content.tokens for parent in parents])
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
    partial = actual.partial if recorded.row.schema >= PARTIAL_SINCE else {}
    if told.partial != partial:
        return divergence(recorded, f"{name}content.partial", told.partial, partial)
    return None


# settings and room


def compare_config(
    occurrence: Occurrence, vocabulary_size: int, context_size: int
) -> Divergence | None:
    """Whether settings are such that a state of a model can have, by the rules of requests."""
    recorded, event, before = occurrence.recorded, occurrence.recorded.event, occurrence.before
    match event:
        case StateCreated(config=config, content=content):
            changes, held = ConfigChanges(**msgspec.structs.asdict(config)), len(content.tokens)
        case ConfigChanged(changes=changes) if before is not None:
            config, held = changes.apply(before.config), before.head_position
        case _:
            return None
    try:
        plan.check_tokens(changes, vocabulary_size, "config.")
        decide.check_config(config, context_size)
    except InvalidInput as error:
        field = error.facts["field"]
        setting = re.split(r"[.[]", field)[1]
        return divergence(recorded, field, getattr(config, setting), str(error))
    if config.context_size < held:
        possible = f"at least {held}, the tokens held"
        return divergence(recorded, "config.context_size", config.context_size, possible)
    return None


def compare_room(occurrence: Occurrence) -> Divergence | None:
    """Whether a forwarded text had room."""
    recorded, event, before = occurrence.recorded, occurrence.recorded.event, occurrence.before
    if not isinstance(event, TextForwarded) or before is None:
        return None
    count, possible = len(event.content.tokens), f"at most {before.room}"
    if count > before.room:
        return divergence(recorded, "len(content.tokens)", count, possible)
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
    """Whether a state slid as its config says, because it had to, and for text that came then."""
    recorded, event, before = occurrence.recorded, occurrence.recorded.event, occurrence.before
    if not isinstance(event, ContextSlid) or before is None:
        return None
    config = before.config
    allowed = config.slide_count if config.on_full == "slide" else 0
    if event.dropped != allowed:
        return divergence(recorded, "dropped", event.dropped, allowed)
    following = occurrence.following and occurrence.following.event
    if not isinstance(following, TextForwarded | TokensGenerated):
        return divergence(recorded, "dropped", event.dropped, "nothing: no text came after it")
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
    pieces = zip(run.content.tokens, run.content.pieces(), strict=True)
    return [
        None if before.room else "context_full",
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
        if count and fulfils(constraint, occurrence.prior + tokens[:count])
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
