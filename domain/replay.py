"""Cutting a recorded history into what can be re-executed.

A history is cut into *passages*: a run of tokens and the *claims* that events make about some of
them. Each passage is computed once, at prefill speed, and what came out is held against its claims
by :mod:`domain.compare`: equal bit for bit under the same numerics fingerprint (level L1), or a
measured drift under another (level L2).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from msgspec import Struct

from domain.events import (
    Beam,
    BeamsGenerated,
    BeamStep,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    HeadRewound,
    Recorded,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import Position, StateId, TokenId, Version
from domain.search_tree import SearchTree
from domain.state import Live, State, evolve
from domain.work import Drawing, Redraw, ScoreRequest

Run = TextForwarded | TokensGenerated | Continuation | Beam
"""What holds a run of tokens and what is said of each of them."""

Claiming = TextForwarded | TokensGenerated | ContinuationsGenerated | BeamsGenerated
"""Events that say something about tokens."""


class Divergence(Struct, frozen=True, kw_only=True):
    """The first thing about an event that is not as recorded.

    ``position`` is the event's place in the log, ``token_position`` the absolute position in the
    state's text, ``field`` what differs.
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
    first position in the text where another token would be drawn, or another beam be chosen, now.
    ``differences`` are the facts in which the two fingerprints differ, as recorded and as they
    are now.
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


def divergence(
    recorded: Recorded, field: str, expected: Any, actual: Any, index: int | None = None
) -> Divergence:
    """A difference in one field of an event; ``index`` counts the tokens from its start."""
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


# events in their place


class Occurrence(Struct, frozen=True, kw_only=True):
    """An event in its place in the history of one state.

    ``before`` is the state it happened to (null for its beginning), ``following`` the event after
    it. ``earlier`` are the parts of the same call before it, for one that says it resumes them.
    """

    recorded: Recorded
    before: Live | None
    following: Recorded | None
    earlier: tuple[TokensGenerated, ...] = ()

    @property
    def prior(self) -> tuple[TokenId, ...]:
        """Tokens that the same call drew before."""
        return tuple(token for part in self.earlier for token in part.content.tokens)

    @property
    def said(self) -> str:
        """Text that the same call added before."""
        return "".join(part.content.text for part in self.earlier)


def occurrences(events: Sequence[Recorded]) -> Iterator[Occurrence]:
    """One state's history from its beginning, each event in its place."""
    state: State | None = None
    parts: tuple[TokensGenerated, ...] = ()
    for recorded, following in zip(events, (*events[1:], None), strict=False):
        event = recorded.event
        resumes = isinstance(event, TokensGenerated) and event.resumes > 0
        yield Occurrence(
            recorded=recorded,
            before=state if isinstance(state, Live) else None,
            following=following,
            earlier=parts if resumes else (),
        )
        if isinstance(event, TokensGenerated):
            parts = (*(parts if resumes else ()), event)
        elif not isinstance(event, ContextSlid):
            parts = ()
        state = evolve(state, recorded)


# what events claim


class Claim(Struct, frozen=True, kw_only=True):
    """That some tokens of a passage came to be as an event says.

    ``place`` is that of the first of them in the passage, ``name`` where in the event the run is
    (a prefix of the names of its fields), ``drawing`` how the tokens were drawn if they were.
    """

    recorded: Recorded
    name: str
    run: Run
    place: int
    drawing: Drawing | None = None

    @property
    def tokens(self) -> tuple[TokenId, ...]:
        """The tokens it is about."""
        return self.run.content.tokens

    @property
    def end(self) -> int:
        """The place after the last of them."""
        return self.place + len(self.tokens)


class Passage(Struct, frozen=True, kw_only=True):
    """Tokens to compute from the place ``start`` on, and the claims about some of them.

    ``search`` is the beam search, if any, that chose from what comes at each of these places.
    """

    tokens: tuple[TokenId, ...]
    start: int
    claims: tuple[Claim, ...]
    search: Recorded | None = None

    def request(self) -> ScoreRequest:
        """What a model is asked about it."""
        redraws = tuple(
            Redraw(start=claim.place, stop=claim.end, drawing=claim.drawing)
            for claim in self.claims
            if claim.drawing is not None
        )
        searched = self.search and self.search.event
        return ScoreRequest(
            tokens=self.tokens,
            start=self.start,
            redraws=redraws,
            candidates=searched.parameters if isinstance(searched, BeamsGenerated) else None,
        )

    def apart(self) -> "tuple[Passage, ...]":
        """The same, with a passage for each claim."""
        if len(self.claims) < 2:
            return (self,)
        return tuple(
            Passage(tokens=self.tokens[: claim.end], start=claim.place, claims=(claim,))
            for claim in self.claims
        )


def runs_of(recorded: Recorded) -> tuple[tuple[str, Run], ...]:
    """The runs of tokens that an event holds, each with where it is."""
    match recorded.event:
        case TextForwarded() | TokensGenerated() as event:
            return (("", event),)
        case ContinuationsGenerated(continuations=found):
            return tuple((f"continuations[{i}].", one) for i, one in enumerate(found))
        case BeamsGenerated(beams=beams):
            return tuple((f"beams[{i}].", one) for i, one in enumerate(beams))
        case _:
            return ()


def place_of(recorded: Recorded) -> int:
    """Number of tokens that the state held before an event's own; 0 for its beginning."""
    event = recorded.event
    return event.start - event.dropped if isinstance(event, Claiming) else 0


def claims_of(occurrence: Occurrence) -> tuple[Claim, ...]:
    """What an event claims about tokens; an empty run claims nothing."""
    return tuple(
        Claim(
            recorded=occurrence.recorded,
            name=name,
            run=run,
            place=place_of(occurrence.recorded),
            drawing=_drawing(occurrence, branch),
        )
        for branch, (name, run) in enumerate(runs_of(occurrence.recorded))
        if run.content.tokens
    )


def _drawing(occurrence: Occurrence, branch: int) -> Drawing | None:
    event = occurrence.recorded.event
    if not isinstance(event, TokensGenerated | ContinuationsGenerated):
        return None
    stored = event.stored_logits
    return Drawing(
        sampling=event.parameters.sampling,
        seed=event.seed,
        branch=branch,
        dropped=event.dropped,
        constraint=event.parameters.constraint,
        prior=occurrence.prior,
        top_logprobs=event.parameters.top_logprobs,
        store_logits=stored.kind if stored else "none",
        top_k_logits=stored.k if stored else 0,
    )


# passages


def passages(history: Iterable[Occurrence]) -> list[Passage]:
    """Cut one state's history into as few passages as cover every claim.

    What the state itself holds is one passage until a rewind drops claimed tokens or a slide the
    first ones. Every continuation is a passage of its own, and of a search as many as it takes to
    have all its beams.
    """
    found: list[Passage] = []
    tokens: tuple[TokenId, ...] = ()
    claims: list[Claim] = []
    for occurrence in history:
        event, before = occurrence.recorded.event, occurrence.before
        held = before.content.tokens if before else ()
        made = claims_of(occurrence)
        if claims and _ends_passage(claims, occurrence):
            found.append(_passage(tokens, claims))
            claims = []
        match event:
            case BeamsGenerated():
                found += _search_passages(occurrence.recorded, event.steps, held, made)
            case ContinuationsGenerated():
                found += [_passage(held + claim.tokens, [claim]) for claim in made]
            case _ if made:
                claims += made
                tokens = held + made[0].tokens
    if claims:
        found.append(_passage(tokens, claims))
    return found


def _passage(tokens: tuple[TokenId, ...], claims: Sequence[Claim]) -> Passage:
    return Passage(tokens=tokens, start=min(c.place for c in claims), claims=tuple(claims))


def _ends_passage(claims: Sequence[Claim], occurrence: Occurrence) -> bool:
    match occurrence.recorded.event:
        case ContextSlid():
            return True
        case HeadRewound(to_position=position):
            return any(claim.end > position for claim in claims)
        case _:
            return False


def _search_passages(
    recorded: Recorded,
    steps: Sequence[BeamStep],
    held: tuple[TokenId, ...],
    claims: Sequence[Claim],
) -> list[Passage]:
    """Texts that have every beam of a search: those it found, then as many as the others need.

    Of each beam is asked what comes after it, hence each of the others has one more token.
    """
    tree = SearchTree(steps)
    found = [
        Passage(tokens=held + claim.tokens, start=len(held), claims=(claim,), search=recorded)
        for claim in claims
    ]
    covered = {node for claim in claims for node in tree.walk(claim.tokens)}
    for node in tree.deepest_first():
        if node not in covered:
            lacking = [one for one in tree.lineage(node) if one not in covered]
            covered.update(lacking)
            tokens = held + tree.tokens(node)
            found.append(
                Passage(
                    tokens=(*tokens, tokens[-1]),
                    start=len(tokens) - len(lacking) + 1,
                    claims=(),
                    search=recorded,
                )
            )
    return found
