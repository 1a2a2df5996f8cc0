"""Small functions that make valid values of the domain, and strategies that make many."""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st

from domain import decide
from domain.analysis.parameters import NextParameters
from domain.chain import Head, Row, genesis, row_hash
from domain.config import (
    BeamParameters,
    ConfigChanges,
    GenerationParameters,
    LogitsParameters,
    SamplingParameters,
    StateConfig,
)
from domain.content import Fragment, Scores
from domain.events import (
    SCHEMA,
    Beam,
    BeamsGenerated,
    BeamStep,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    Event,
    Recorded,
    StateAnalyzed,
    StateCreated,
    TextForwarded,
    TokensGenerated,
    decode,
    encode,
    event_type,
)
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, StateId, TokenId, Version
from domain.intents import GenerationStarted
from domain.origin import New
from domain.plan import GenerationWish, plan_generation
from domain.ports import Append, Idempotency, Provenance
from domain.state import Deleted, Live, State, evolve

MODEL = ModelId("cacher-tiny")
MODEL_CONTEXT = 64
RECORDED_AT = "2026-01-02T03:04:05.000006Z"
BY = Provenance(actor="tester", request_id="request-1", recorded_at=RECORDED_AT)
FINGERPRINT = Fingerprint(
    id=hashlib.sha256(b'{"cpu":"any"}').hexdigest(), document='{"cpu":"any"}', deterministic=True
)
SAMPLING = SamplingParameters(temperature=0.0, top_k=0, top_p=1.0)
PARAMETERS = GenerationParameters(sampling=SAMPLING, max_tokens=16)


def state_id(number: int = 0) -> StateId:
    return StateId(f"state-{number:032x}")


def config(**changes: Any) -> StateConfig:
    settings: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": None,
        "context_size": MODEL_CONTEXT,
        "store_logits": "none",
        "top_k_logits": 10,
    }
    return StateConfig(**(settings | changes))


def fragment(text: str = "abc") -> Fragment:
    """One token per character."""
    return Fragment(
        tokens=tuple(TokenId(ord(character)) for character in text),
        text=text,
        ends=tuple(range(1, len(text) + 1)),
    )


def scores(count: int) -> Scores:
    return Scores(
        logprobs=(-0.5,) * count,
        ranks=(0,) * count,
        entropies=(1.25,) * count,
        logsumexps=(3.5,) * count,
        logits_digests=("00" * 8,) * count,
    )


def created(text: str = "abc", model_id: ModelId = MODEL, **changes: Any) -> StateCreated:
    return StateCreated(
        origin=New(),
        model_id=model_id,
        model_type="causal_lm",
        model_revision=None,
        config=config(**changes),
        metadata={},
        content=fragment(text),
    )


def forwarded(start: int, text: str = "d") -> TextForwarded:
    return TextForwarded(start=start, content=fragment(text), scores=scores(len(text)))


def generated(start: int, content: Fragment | str = "d", **fields: Any) -> TokensGenerated:
    content = fragment(content) if isinstance(content, str) else content
    count = len(content.tokens)
    given: dict[str, Any] = {
        "parameters": PARAMETERS,
        "seed": 7,
        "start": start,
        "content": content,
        "scores": scores(count),
        "sampling_probabilities": (1.0,) * count,
        "alternatives": ((),) * count,
        "stored_logits": None,
        "finish_reason": None,
    }
    return TokensGenerated(**(given | fields))


def continued(state: Live, contents: Sequence[Fragment]) -> ContinuationsGenerated:
    """Continuations of a state that nobody drew."""
    return ContinuationsGenerated(
        parameters=PARAMETERS,
        seed=7,
        start=state.absolute_position,
        dropped=state.dropped,
        continuations=tuple(
            Continuation(
                content=content,
                scores=scores(len(content.tokens)),
                sampling_probabilities=(1.0,) * len(content.tokens),
                alternatives=((),) * len(content.tokens),
                finish_reason=None,
            )
            for content in contents
        ),
        stored_logits=None,
    )


def searched(state: Live, contents: Sequence[Fragment]) -> BeamsGenerated:
    """Beams of a state that nobody searched for."""
    return BeamsGenerated(
        parameters=BeamParameters(logits=LogitsParameters(), max_tokens=6, num_beams=3),
        start=state.absolute_position,
        dropped=state.dropped,
        steps=(BeamStep(parents=(0,), tokens=contents[0].tokens[:1]),),
        beams=tuple(
            Beam(content=one, scores=scores(len(one.tokens)), score=-1.0, finished=False)
            for one in contents
        ),
    )


def analyzed(**fields: Any) -> StateAnalyzed:
    """That somebody asked what could come next."""
    given: dict[str, Any] = {"parameters": NextParameters(), "form": 1, "result_digest": "0" * 64}
    return StateAnalyzed(**(given | fields))


def append(event: Event, version: int = 0, *, state: int = 0, **fields: Any) -> Append:
    """Add ``event`` to state number ``state``, which is at ``version``."""
    return Append(
        state_id=state_id(state), expected_version=Version(version), event=event, **fields
    )


def provenance(**fields: str) -> Provenance:
    return msgspec.structs.replace(BY, **fields)


def idempotency(key: str = "key-1", body: bytes = b"{}", **fields: Any) -> Idempotency:
    given: dict[str, Any] = {"actor": "tester", "method": "POST", "path": "/v1/states", "key": key}
    return Idempotency(**(given | fields), request_digest=hashlib.sha256(body).digest())


def started(state: int = 0, base_version: int = 1, seed: int = 7) -> GenerationStarted:
    return GenerationStarted(
        state_id=state_id(state),
        base_version=Version(base_version),
        parameters=PARAMETERS,
        seed=seed,
        fingerprint=FINGERPRINT.id,
    )


def row(event: Event, *, version: int = 1, head: Head | None = None, **columns: Any) -> Row:
    """A row that follows ``head``, with a right hash; an analysis saw the version."""
    head = head or genesis("a log")
    looked = isinstance(event, StateAnalyzed)
    given: dict[str, Any] = {
        "position": Position(head.position + 1),
        "state_id": state_id(),
        "version": None if looked else Version(version),
        "at_version": Version(version) if looked else None,
        "type": event_type(event),
        "schema": SCHEMA,
        "payload": encode(event),
        "fingerprint": None,
        "recorded_at": RECORDED_AT,
        "actor": "tester",
        "request_id": f"request-{version}",
        "previous_hash": head.hash,
        "hash": b"",
    }
    unsealed = Row(**(given | columns))
    return msgspec.structs.replace(unsealed, hash=row_hash(unsealed))


def recorded(event: Event, *, version: int = 1, **columns: Any) -> Recorded:
    return decode(row(event, version=version, **columns))


def history(*events: Event, **columns: Any) -> list[Recorded]:
    """The events of one state as they would be recorded: versions from 1, chained."""
    head, found = genesis("a log"), []
    for version, event in enumerate(events, start=1):
        found.append(recorded(event, version=version, head=head, **columns))
        head = Head(found[-1].position, found[-1].row.hash)
    return found


def live(*events: Event) -> Live:
    """The state that events lead to; without any, a new one that holds "abc"."""
    state: State | None = None
    for one in history(*(events or (created(),))):
        state = evolve(state, one)
    assert isinstance(state, Live)
    return state


@st.composite
def fragments(draw: st.DrawFn, min_size: int = 1, max_size: int = 6) -> Fragment:
    """Tokens whose pieces may be empty (inside a character) or longer than one character."""
    letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
    pieces = draw(st.lists(letters, min_size=min_size, max_size=max_size))
    ends, text = [], ""
    for piece in pieces:
        text += piece
        ends.append(len(text))
    tokens = draw(st.lists(st.integers(0, 511), min_size=len(pieces), max_size=len(pieces)))
    return Fragment(tokens=tuple(map(TokenId, tokens)), text=text, ends=tuple(ends))


@st.composite
def creations(draw: st.DrawFn) -> StateCreated:
    size = draw(st.integers(6, MODEL_CONTEXT))
    return decide.create(
        model_id=MODEL,
        model_type="causal_lm",
        model_revision=None,
        model_context=MODEL_CONTEXT,
        config=config(context_size=size),
        metadata=draw(st.dictionaries(st.text(max_size=3), st.integers(-9, 9), max_size=2)),
        content=draw(fragments()),
    )


@st.composite
def next_events(draw: st.DrawFn, state: Live) -> Event:
    """Something that may happen to ``state``, by the rules of ``domain.decide``."""
    kinds = ["forward", "generate", "continue", "search", "slide", "configure", "rewind", "delete"]
    kind = draw(st.sampled_from(kinds))
    if kind == "forward" and state.room:
        content = draw(fragments(max_size=min(6, state.room)))
        return decide.forward(state, content, scores(len(content.tokens)))
    if kind == "generate":
        wish = GenerationWish(max_tokens=draw(st.integers(1, state.config.context_size)))
        plan = plan_generation(state, wish, fresh_seed=draw(st.integers(0, 2**53 - 1)))
        return generated(
            state.absolute_position,
            draw(fragments(min_size=0, max_size=min(6, wish.max_tokens, state.room))),
            dropped=state.dropped,
            parameters=plan.parameters,
            seed=plan.seed,
        )
    if kind == "continue":
        return continued(state, draw(st.lists(fragments(), min_size=1, max_size=3)))
    if kind == "search":
        return searched(state, draw(st.lists(fragments(), min_size=1, max_size=3)))
    if kind == "slide" and state.head_position > 1:
        return ContextSlid(dropped=draw(st.integers(1, state.head_position - 1)))
    if kind == "configure":
        size = draw(st.integers(state.head_position, MODEL_CONTEXT))
        changes = ConfigChanges(context_size=size, temperature=draw(st.floats(0, 2)))
        return decide.change_config(state, changes, MODEL_CONTEXT)
    if kind == "delete":
        return decide.delete(state)
    return decide.rewind(state, draw(st.integers(1, state.head_position)))


@st.composite
def histories(draw: st.DrawFn, max_size: int = 12) -> list[Recorded]:
    """The recorded events of one state: created, then anything that may happen to it."""
    events: list[Event] = [draw(creations())]
    for _ in range(draw(st.integers(0, max_size - 1))):
        state = fold_events(events)
        if isinstance(state, Deleted):
            break
        events.append(draw(next_events(state)))
    return history(*events)


def fold_events(events: list[Event]) -> State:
    state: State | None = None
    for one in history(*events):
        state = evolve(state, one)
    assert state is not None
    return state
