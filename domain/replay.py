"""Holding a recorded history against its re-execution.

A history is cut into *passages*: a run of tokens and the events that claim something about them.
Each passage is computed once, in one prefill, and every claim of its events is compared with what
came out: equal bit for bit under the same numerics fingerprint (level L1), or a measured drift
under another (level L2).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from msgspec import Struct

from domain.chain import blobs_digest
from domain.config import StateConfig
from domain.events import (
    Fingerprint,
    FinishReason,
    Fragment,
    HeadRewound,
    Recorded,
    StateCreated,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import Position, StateId, TokenId, Version
from domain.ports import Drawing, Drawn, Redraw, Scored
from domain.state import State, evolve
from domain.stopping import Stopping

Claim = TextForwarded | TokensGenerated


class Divergence(Struct, frozen=True, kw_only=True):
    """The first thing about an event that is not as recorded.

    ``position`` is the event's place in the log, ``token_position`` the place in the state's
    text, ``field`` what differs.
    """

    position: Position
    state_id: StateId | None
    version: Version | None
    field: str
    expected: Any
    actual: Any
    token_position: int | None = None


class Drift(Struct, frozen=True, kw_only=True):
    """How far an event is from its re-execution under another fingerprint.

    ``max_logprob_delta`` is the largest |difference| of a logprob (nats); ``first_changed`` the
    first position in the text where another token would be drawn now. ``differences`` are the
    facts in which the two fingerprints differ, as recorded and as they are now.
    """

    position: Position
    state_id: StateId
    version: Version
    recorded_fingerprint: str | None
    max_logprob_delta: float
    first_changed: int | None
    differences: dict[str, tuple[Any, Any]]


class Report(Struct, frozen=True, kw_only=True):
    """What verifying a log found.

    ``equal``: everything was re-executed and is equal bit for bit. ``divergent``: something is
    not as recorded. ``unverified``: no divergence, but some events could not be held to the bit,
    because they were made under another fingerprint or without the contract.
    """

    result: Literal["equal", "divergent", "unverified"]
    head: dict[str, Any]
    events_checked: int
    states_checked: int
    tokens_recomputed: int
    tokens_reused: int
    divergences: tuple[Divergence, ...]
    drifts: tuple[Drift, ...]
    notes: tuple[str, ...]


class Passage(Struct, frozen=True):
    """Tokens to compute, and the events that say something about some of them."""

    tokens: tuple[TokenId, ...]
    claims: tuple[Recorded, ...]

    @property
    def start(self) -> int:
        """The first position that is claimed."""
        return min(claim_of(recorded).start for recorded in self.claims)

    def redraws(self) -> tuple[Redraw, ...]:
        """The draws that its generations made."""
        return tuple(
            Redraw(
                start=event.start,
                stop=event.start + len(event.content.tokens),
                drawing=drawing_of(event),
            )
            for recorded in self.claims
            if isinstance(event := recorded.event, TokensGenerated)
        )


def claim_of(recorded: Recorded) -> Claim:
    """The event, which is one that claims something about tokens."""
    assert isinstance(recorded.event, Claim)
    return recorded.event


def drawing_of(event: TokensGenerated) -> Drawing:
    """How the tokens of a generation were drawn."""
    stored = event.stored_logits
    return Drawing(
        sampling=event.parameters.sampling,
        seed=event.seed,
        top_logprobs=event.parameters.top_logprobs,
        store_logits=stored.kind if stored else "none",
        top_k_logits=stored.k if stored else 0,
    )


def passages(events: Iterable[Recorded]) -> list[Passage]:
    """Cut one state's history into as few passages as cover every claim.

    A rewind ends a passage if it drops claimed tokens.
    """
    found: list[Passage] = []
    state: State | None = None
    claims: list[Recorded] = []
    tokens: tuple[TokenId, ...] = ()
    for recorded in events:
        if isinstance(recorded.event, HeadRewound) and _dropped(claims, recorded.event):
            found.append(Passage(tokens, tuple(claims)))
            claims = []
        state = evolve(state, recorded)
        if isinstance(recorded.event, Claim) and recorded.event.content.tokens:
            claims.append(recorded)
        tokens = tokens_of(state) or tokens
    if claims:
        found.append(Passage(tokens, tuple(claims)))
    return found


def tokens_of(state: State) -> tuple[TokenId, ...]:
    """Tokens that a state holds; none once it is deleted."""
    return getattr(state, "content", Fragment.of((), ())).tokens


def _dropped(claims: Sequence[Recorded], rewound: HeadRewound) -> bool:
    ends = (claim_of(r).start + len(claim_of(r).content.tokens) for r in claims)
    return any(end > rewound.to_position for end in ends)


def compare(passage: Passage, recorded: Recorded, scored: Scored) -> Divergence | None:
    """The first difference between what an event claims and its re-execution, if there is one."""
    event = claim_of(recorded)
    offset = event.start - passage.start
    count = len(event.content.tokens)
    for field in event.scores.__struct_fields__:
        actual = getattr(scored.scores, field)[offset : offset + count]
        divergence = _first(recorded, f"scores.{field}", getattr(event.scores, field), actual)
        if divergence is not None and field != "logprobs":
            return divergence
        if divergence is not None:
            return _name_choice(recorded, passage, scored, divergence)
    return _compare_choices(recorded, passage, scored)


def _name_choice(
    recorded: Recorded, passage: Passage, scored: Scored, found: Divergence
) -> Divergence:
    """A changed token shows first in its logprob: say it where it is the token."""
    event = recorded.event
    if not isinstance(event, TokensGenerated) or found.token_position is None:
        return found
    index = found.token_position - event.start
    token, drawn = event.content.tokens[index], redrawn_for(recorded, passage, scored)[index]
    if token == drawn.token_id:
        return found
    return divergence(recorded, "content.tokens", token, drawn.token_id, index)


def _compare_choices(recorded: Recorded, passage: Passage, scored: Scored) -> Divergence | None:
    event = recorded.event
    if not isinstance(event, TokensGenerated):
        return None
    drawn = redrawn_for(recorded, passage, scored)
    logits = tuple(d.logits for d in drawn if d.logits is not None)
    digest = event.stored_logits.digest if event.stored_logits else None
    return (
        _first(recorded, "content.tokens", event.content.tokens, [d.token_id for d in drawn])
        or _first(
            recorded,
            "sampling_probabilities",
            event.sampling_probabilities,
            [d.sampling_probability for d in drawn],
        )
        or _first(recorded, "alternatives", event.alternatives, [d.alternatives for d in drawn])
        or (
            divergence(recorded, "stored_logits.digest", digest, blobs_digest(logits))
            if digest not in (None, blobs_digest(logits))
            else None
        )
    )


def redrawn_for(recorded: Recorded, passage: Passage, scored: Scored) -> tuple[Drawn, ...]:
    """The re-executed draws of one generation of a passage."""
    offset = 0
    for other in passage.claims:
        if isinstance(other.event, TokensGenerated):
            count = len(other.event.content.tokens)
            if other is recorded:
                return scored.redrawn[offset : offset + count]
            offset += count
    return ()


def compare_form(recorded: Recorded, vocabulary_size: int, context_size: int) -> Divergence | None:
    """Whether a model can be asked about an event at all.

    Its tokens are in the vocabulary and fit the model's context, and whatever is recorded of each
    token is there once for each.
    """
    event = recorded.event
    if not isinstance(event, StateCreated | Claim):
        return None
    count = len(event.content.tokens)
    for field, values in _of_each_token(event).items():
        if len(values) != count:
            return divergence(recorded, f"len({field})", len(values), count)
    for index, token in enumerate(event.content.tokens):
        if not 0 <= token < vocabulary_size:
            possible = f"a token from 0 to {vocabulary_size - 1}"
            return divergence(recorded, "content.tokens", token, possible, index)
    room = context_size - (0 if isinstance(event, StateCreated) else event.start)
    if count > room:
        return divergence(recorded, "len(content.tokens)", count, f"at most {room}")
    return None


def _of_each_token(event: StateCreated | Claim) -> dict[str, Sequence[Any]]:
    """Fields of an event that have one value for each of its tokens."""
    fields: dict[str, Sequence[Any]] = {"content.ends": event.content.ends}
    if isinstance(event, Claim):
        scores = event.scores.__struct_fields__
        fields |= {f"scores.{name}": getattr(event.scores, name) for name in scores}
    if isinstance(event, TokensGenerated):
        fields["sampling_probabilities"] = event.sampling_probabilities
        fields["alternatives"] = event.alternatives
    return fields


def compare_storage(recorded: Recorded, config: StateConfig) -> Divergence | None:
    """Whether a generation kept the logits that its state was to keep."""
    event = recorded.event
    if not isinstance(event, TokensGenerated):
        return None
    stored = event.stored_logits
    kept = None if stored is None else (stored.kind, stored.k)
    wanted = None
    if event.content.tokens and config.store_logits != "none":
        wanted = (config.store_logits, config.top_k_logits)
    return None if kept == wanted else divergence(recorded, "stored_logits", kept, wanted)


def compare_finish(
    recorded: Recorded, eos_token_ids: frozenset[TokenId], context: int
) -> Divergence | None:
    """Whether a generation ended where and why its parameters say."""
    event = recorded.event
    if not isinstance(event, TokensGenerated):
        return None
    stopping = Stopping(
        event.parameters, eos_token_ids=eos_token_ids, held=event.start, context_size=context
    )
    reasons = [
        stopping.push(token, piece)
        for token, piece in zip(event.content.tokens, event.content.pieces(), strict=True)
    ]
    early = [index for index, reason in enumerate(reasons[:-1]) if reason]
    if early:
        return divergence(
            recorded, "finish_reason", event.finish_reason, reasons[early[0]], early[0]
        )
    most = event.parameters.max_tokens
    if len(reasons) > most:
        return divergence(recorded, "len(content.tokens)", len(reasons), most)
    full: FinishReason | None = "context_full" if event.start >= context else None
    possible = _possible_ends(reasons[-1] if reasons else full, len(reasons), most)
    if event.finish_reason not in possible:
        return divergence(recorded, "finish_reason", event.finish_reason, possible[0])
    return None


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


def compare_text(recorded: Recorded, actual: Fragment) -> Divergence | None:
    """Whether the recorded text is that of the recorded tokens."""
    content = getattr(recorded.event, "content", actual)
    if (content.text, content.ends) != (actual.text, actual.ends):
        return divergence(recorded, "content.text", content.text, actual.text)
    return None


def drift(
    recorded: Recorded,
    passage: Passage,
    scored: Scored,
    differences: dict[str, tuple[Any, Any]],
) -> Drift:
    """How far an event is from its re-execution under another fingerprint."""
    event = claim_of(recorded)
    offset = event.start - passage.start
    actual = scored.scores.logprobs[offset : offset + len(event.content.tokens)]
    deltas = [abs(a - b) for a, b in zip(event.scores.logprobs, actual, strict=True)]
    drawn = redrawn_for(recorded, passage, scored)
    changed = (
        event.start + index
        for index, (old, new) in enumerate(zip(event.content.tokens, drawn, strict=False))
        if old != new.token_id
    )
    return Drift(
        position=recorded.position,
        state_id=recorded.state_id,
        version=recorded.version,
        recorded_fingerprint=recorded.row.fingerprint,
        max_logprob_delta=max(deltas, default=0.0),
        first_changed=next(changed, None),
        differences=differences,
    )


def differences(recorded: Fingerprint, now: Fingerprint) -> dict[str, tuple[Any, Any]]:
    """The facts in which two fingerprints differ; what one of them does not name is null."""
    old, new = recorded.facts(), now.facts()
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def divergence(
    recorded: Recorded, field: str, expected: Any, actual: Any, index: int | None = None
) -> Divergence:
    """A difference in one field of an event; ``index`` counts its tokens."""
    start = getattr(recorded.event, "start", 0)
    return Divergence(
        position=recorded.position,
        state_id=recorded.state_id,
        version=recorded.version,
        field=field,
        expected=expected,
        actual=actual,
        token_position=None if index is None else start + index,
    )


def _first(
    recorded: Recorded, field: str, expected: Sequence[Any], actual: Sequence[Any]
) -> Divergence | None:
    """The first index at which two runs of values differ."""
    if len(expected) != len(actual):
        return divergence(recorded, f"len({field})", len(expected), len(actual))
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a != b:
            return divergence(recorded, field, a, b, index)
    return None
