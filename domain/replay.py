"""Cutting a recorded history into what can be re-executed.

A history is cut into *passages*: a run of tokens and the *claims* that events make about some of
them. Each passage is computed once, at prefill speed, and what came out is held against its claims
by :mod:`domain.compare`: equal bit for bit under the same numerics fingerprint (level L1), or a
measured drift under another (level L2).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

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
from domain.ids import Position, TokenId, Version
from domain.log_errors import UnknownEvent
from domain.search_tree import SearchTree
from domain.state import Live, State, evolve
from domain.work import Drawing, Redraw, ScoreRequest

Run = TextForwarded | TokensGenerated | Continuation | Beam
"""What holds a run of tokens and what is said of each of them."""

Claiming = TextForwarded | TokensGenerated | ContinuationsGenerated | BeamsGenerated
"""Events that say something about tokens."""


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


class Course(Struct, frozen=True, kw_only=True):
    """A state's history up to some event, as far as what comes after it depends on it.

    ``state`` is its fold and ``last`` its latest event (null before the beginning). ``parts`` are
    those of the call that a next part would go on from.
    """

    state: State | None = None
    last: Recorded | None = None
    parts: tuple[TokensGenerated, ...] = ()

    @property
    def version(self) -> Version:
        """Number of events so far."""
        return self.state.version if self.state else Version(0)

    def place(self, recorded: Recorded, following: Recorded | None) -> Occurrence:
        """The next event in its place."""
        return Occurrence(
            recorded=recorded,
            before=self.state if isinstance(self.state, Live) else None,
            following=following,
            earlier=self._resumed(recorded),
        )

    def after(self, recorded: Recorded) -> "Course":
        """The history with one more event.

        Raises:
            UnknownEvent: the event cannot follow, or was recorded before the latest one.
        """
        event, parts = recorded.event, self.parts
        if self.last is not None and recorded.position < self.last.position:
            raise UnknownEvent(recorded.position, "recorded before the version it follows")
        if isinstance(event, TokensGenerated):
            parts = (*self._resumed(recorded), event)
        elif not isinstance(event, ContextSlid):
            parts = ()
        return Course(state=evolve(self.state, recorded), last=recorded, parts=parts)

    def _resumed(self, recorded: Recorded) -> tuple[TokensGenerated, ...]:
        event = recorded.event
        return self.parts if isinstance(event, TokensGenerated) and event.resumes else ()


BEGINNING: Final = Course()
"""The history of a state that does not exist yet."""


def occurrences(
    events: Sequence[Recorded], start: Course = BEGINNING, following: Recorded | None = None
) -> Iterator[Occurrence]:
    """Events of one state, each in its place; ``start`` is what was before, ``following`` comes.

    Raises:
        UnknownEvent: an event cannot follow those before it.
    """
    for recorded, after in zip(events, (*events[1:], following), strict=False):
        yield start.place(recorded, after)
        start = start.after(recorded)


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

    ``search`` is the beam search, if any, that chose from what comes at each of these places, and
    ``room`` the number of tokens that it could add.
    """

    tokens: tuple[TokenId, ...]
    start: int
    claims: tuple[Claim, ...]
    search: Recorded | None = None
    room: int = 0

    @property
    def about(self) -> tuple[Position, ...]:
        """The events that it is evidence of, by their places in the log, in order."""
        found = {claim.recorded.position for claim in self.claims}
        return tuple(sorted(found | ({self.search.position} if self.search else set())))

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
                found += _search_passages(occurrence, event.steps, made)
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
    occurrence: Occurrence, steps: Sequence[BeamStep], claims: Sequence[Claim]
) -> list[Passage]:
    """Texts that have every beam of a search: those it found, then as many as the others need.

    Of each beam is asked what comes after it, hence each of the others has one more token.
    """
    recorded, before, tree = occurrence.recorded, occurrence.before, SearchTree(steps)
    held, room = (before.content.tokens, before.room) if before else ((), 0)
    found = [
        Passage(
            tokens=held + claim.tokens,
            start=len(held),
            claims=(claim,),
            search=recorded,
            room=room,
        )
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
                    room=room,
                )
            )
    return found
