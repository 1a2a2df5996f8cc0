"""What may happen next. A decision is a pure function: a state and a wish in, an event out.

Anything that needs the model, a clock or chance has been done before and is passed in.
"""

from collections.abc import Sequence

from domain.config import ConfigChanges, Metadata, ModelType, StateConfig
from domain.content import Fragment, Scores
from domain.errors import (
    FieldProblem,
    InvalidInput,
    NotAPrefix,
    PreconditionFailed,
    StateIsDeleted,
    StateIsErased,
    StateNotFound,
    TooLarge,
    invalid,
)
from domain.events import (
    BeamsGenerated,
    ConfigChanged,
    ContextSlid,
    ContinuationsGenerated,
    Event,
    HeadRewound,
    StateCreated,
    StateDeleted,
    TextForwarded,
    event_type,
)
from domain.ids import ModelId, StateId, TokenId, Version
from domain.origin import ContinuationId, Fork, Merge, New, Parent
from domain.state import Deleted, Erased, Live, State, join, take


def live(state: State | None, state_id: StateId) -> Live:
    """The state, if it takes operations.

    Raises:
        StateNotFound, StateIsDeleted, StateIsErased: it does not.
    """
    match state:
        case None:
            raise StateNotFound(state_id)
        case Live():
            return state
        case Deleted():
            raise StateIsDeleted(state_id, state.deleted_at)
        case Erased():
            raise StateIsErased(state_id, state.erased_at)


def check_precondition(state: Live, if_match: Version | None) -> None:
    """Hold ``If-Match`` against the state's version.

    Raises:
        PreconditionFailed: another version.
    """
    if if_match is not None and if_match != state.version:
        raise PreconditionFailed(state.state_id, if_match, state.version)


def check_config(config: StateConfig, model_context: int) -> None:
    """Refuse settings that no state of a model can have.

    Raises:
        InvalidInput: a context size above the model's own, or too small to slide.
    """
    if config.context_size > model_context:
        raise invalid(
            "config.context_size", f"must be at most {model_context}, the model's own limit"
        )
    if config.on_full == "slide" and config.context_size < 2:
        raise invalid("config.on_full", "may be slide from a context_size of 2 on")


def create(
    *,
    model_id: ModelId,
    model_type: ModelType,
    model_revision: str | None,
    model_context: int,
    config: StateConfig,
    metadata: Metadata,
    content: Fragment,
) -> StateCreated:
    """Begin a state with some content.

    Raises:
        InvalidInput: a context size above the model's own, or too small to slide.
        TooLarge: the content does not fit the context.
    """
    check_config(config, model_context)
    check_fits(len(content.tokens), held=0, context_size=config.context_size)
    return StateCreated(
        origin=New(),
        model_id=model_id,
        model_type=model_type,
        model_revision=model_revision,
        config=config,
        metadata=metadata,
        content=content,
    )


def check_fits(count: int, *, held: int, context_size: int) -> None:
    """Refuse more tokens than the context has room for.

    Raises:
        TooLarge: names the room there is.
    """
    if held + count > context_size:
        raise TooLarge(
            f"{count} tokens do not fit: the state holds {held} of at most"
            f" {context_size} (context_size)",
            tokens=count,
            head_position=held,
            context_size=context_size,
        )


def check_vocabulary(field: str, tokens: Sequence[TokenId], size: int) -> None:
    """Refuse ids that are no token of a vocabulary of ``size`` entries.

    Raises:
        InvalidInput: names every one of them.
    """
    problems = [
        FieldProblem(f"{field}[{index}]", f"must be from 0 to {size - 1}")
        for index, token in enumerate(tokens)
        if not 0 <= token < size
    ]
    if problems:
        raise InvalidInput(*problems)


def slide(state: Live) -> ContextSlid | None:
    """What a state that slides lets go of when it is full; it must hold more than that.

    What is then left is no more than that again: one slide is all there is before new tokens.
    """
    count = state.config.slide_count
    if state.config.on_full == "stop" or state.head_position <= count:
        return None
    return ContextSlid(dropped=count)


def room(state: Live) -> int:
    """Number of tokens that may be forwarded, after a slide where there is one."""
    slid = slide(state)
    return state.room + (slid.dropped if slid else 0)


def make_room(state: Live, count: int) -> ContextSlid | None:
    """The slide that ``count`` more tokens need before them, if they need one.

    Raises:
        TooLarge: they do not fit even so; names the room there is.
    """
    most = room(state)
    if count > most:
        held, size = state.head_position, state.config.context_size
        raise TooLarge(
            f"{count} tokens do not fit: the state holds {held} of at most {size}"
            f" (context_size), which leaves room for {most}",
            tokens=count,
            head_position=held,
            context_size=size,
            room=most,
        )
    return None if count <= state.room else slide(state)


def forward(state: Live, content: Fragment, scores: Scores) -> TextForwarded:
    """Append given content."""
    check_fits(
        len(content.tokens), held=state.head_position, context_size=state.config.context_size
    )
    return TextForwarded(
        start=state.absolute_position, dropped=state.dropped, content=content, scores=scores
    )


def change_config(state: Live, changes: ConfigChanges, model_context: int) -> ConfigChanged:
    """Change settings from here on.

    Raises:
        InvalidInput: nothing to change, or a context size that the model, the tokens held or
            sliding do not allow.
    """
    if not changes.given():
        raise invalid("config", "must name at least one setting to change")
    config = changes.apply(state.config)
    check_config(config, model_context)
    if config.context_size < state.head_position:
        raise invalid(
            "config.context_size", f"must be at least {state.head_position}, the tokens held"
        )
    return ConfigChanged(changes=changes)


def rewind(state: Live, position: int) -> HeadRewound:
    """Cut the state back to its first ``position`` tokens.

    Raises:
        InvalidInput: not between 1 and the head.
    """
    if not 1 <= position <= state.head_position:
        raise invalid("position", f"must be from 1 to {state.head_position}, the head")
    return HeadRewound(to_position=position)


def rewind_to(state: Live, then: Live) -> HeadRewound:
    """Cut the state back to the tokens it held at an earlier version.

    Raises:
        NotAPrefix: those tokens do not begin the tokens held now, or they began at another
            absolute position: the state has slid since.
    """
    count = then.head_position
    begin = (state.dropped, state.content.tokens[:count])
    if begin != (then.dropped, then.content.tokens):
        raise NotAPrefix(state.state_id, then.version)
    return HeadRewound(to_position=count)


def fork(
    parent: Live,
    *,
    position: int | None,
    changes: ConfigChanges,
    metadata: Metadata,
    model_context: int,
) -> StateCreated:
    """Begin a state with the first ``position`` tokens (all if none is given) of another.

    Raises:
        InvalidInput: a position outside the parent, or settings that do not fit.
        TooLarge: the tokens do not fit the context.
    """
    count = parent.head_position if position is None else position
    if not 1 <= count <= parent.head_position:
        raise invalid("position", f"must be from 1 to {parent.head_position}, the head")
    return _derive(
        parent,
        Fork(state_id=parent.state_id, version=parent.version, head_position=count),
        take(parent.content, count),
        changes=changes,
        metadata=metadata,
        model_context=model_context,
    )


def adopt(
    parent: Live,
    event: Event,
    index: int,
    *,
    changes: ConfigChanges,
    metadata: Metadata,
    model_context: int,
) -> StateCreated:
    """Begin a state with all tokens of another and those of one of its continuations.

    ``event`` is what led to the parent's version; beams are continuations too.

    Raises:
        InvalidInput: the event holds no continuation of this index, or settings do not fit.
        TooLarge: the tokens do not fit the context.
    """
    return _derive(
        parent,
        Fork(
            state_id=parent.state_id,
            version=parent.version,
            head_position=parent.head_position,
            continuation=ContinuationId(version=parent.version, index=index),
        ),
        join(parent.content, _continuation(event, index)),
        changes=changes,
        metadata=metadata,
        model_context=model_context,
    )


def _continuation(event: Event, index: int) -> Fragment:
    match event:
        case ContinuationsGenerated(continuations=found) | BeamsGenerated(beams=found):
            if not 0 <= index < len(found):
                raise invalid("continuation.index", f"must be from 0 to {len(found) - 1}")
            content: Fragment = found[index].content
            return content
        case _:
            raise invalid(
                "continuation.version",
                f"holds no continuations: its event is {event_type(event)}, those that hold some"
                " are continuations_generated and beams_generated",
            )


def check_parents(parents: Sequence[Live]) -> None:
    """Refuse states that cannot be merged.

    Raises:
        InvalidInput: a state comes twice, or states are of different models; names every one.
    """
    first = parents[0]
    places: dict[StateId, int] = {}
    problems = []
    for index, parent in enumerate(parents):
        before = places.setdefault(parent.state_id, index)
        if before != index:
            rule = f"is state_ids[{before}] again; fork it to have its own part twice"
            problems.append(FieldProblem(f"state_ids[{index}]", rule))
        elif parent.model_id != first.model_id:
            rule = f"is a state of {parent.model_id}, the first one is of {first.model_id}"
            problems.append(FieldProblem(f"state_ids[{index}]", rule))
    if problems:
        raise InvalidInput(*problems)


def concatenate(texts: Sequence[tuple[TokenId, ...]]) -> tuple[TokenId, ...]:
    """What all texts begin with, then what follows it in each of them, in order."""
    columns = enumerate(zip(*texts, strict=False))
    shortest = min(map(len, texts))
    common = next((index for index, column in columns if len(set(column)) > 1), shortest)
    return texts[0][:common] + tuple(token for text in texts for token in text[common:])


def merge(
    parents: Sequence[Live],
    content: Fragment,
    *,
    changes: ConfigChanges,
    metadata: Metadata,
    model_context: int,
) -> StateCreated:
    """Begin a state with the concatenated tokens of others, and the settings of the first.

    Raises:
        InvalidInput: settings that do not fit.
        TooLarge: the tokens do not fit the context.
    """
    return _derive(
        parents[0],
        Merge(
            parents=tuple(
                Parent(state_id=one.state_id, version=one.version, head_position=one.head_position)
                for one in parents
            ),
            strategy="concatenate",
        ),
        content,
        changes=changes,
        metadata=metadata,
        model_context=model_context,
    )


def _derive(
    parent: Live,
    origin: Fork | Merge,
    content: Fragment,
    *,
    changes: ConfigChanges,
    metadata: Metadata,
    model_context: int,
) -> StateCreated:
    """A state like ``parent`` that holds ``content``; only a fork goes on where it had begun."""
    config = changes.apply(parent.config)
    check_config(config, model_context)
    check_fits(len(content.tokens), held=0, context_size=config.context_size)
    return StateCreated(
        origin=origin,
        model_id=parent.model_id,
        model_type=parent.model_type,
        config=config,
        metadata=metadata,
        content=content,
        dropped=parent.dropped if isinstance(origin, Fork) else 0,
    )


def delete(_: Live) -> StateDeleted:
    """End a state."""
    return StateDeleted()
