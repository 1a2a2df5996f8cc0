"""What may happen next. A decision is a pure function: a state and a wish in, an event out.

Anything that needs the model, a clock or chance has been done before and is passed in.
"""

from collections.abc import Sequence
from typing import Final, TypeVar

from msgspec import UNSET, Struct, UnsetType

from domain.config import (
    ConfigChanges,
    GenerationParameters,
    MaxTokens,
    Metadata,
    ModelType,
    SamplingParameters,
    StateConfig,
    StopSequences,
    StopTokenIds,
    Temperature,
    TopK,
    TopLogprobs,
    TopP,
)
from domain.errors import (
    FieldProblem,
    FingerprintChanged,
    InvalidInput,
    NotAPrefix,
    PreconditionFailed,
    StateIsDeleted,
    StateNotFound,
    TooLarge,
    VersionConflict,
    invalid,
)
from domain.events import (
    ConfigChanged,
    Fork,
    Fragment,
    GenerationStarted,
    HeadRewound,
    New,
    Scores,
    StateCreated,
    StateDeleted,
    TextForwarded,
)
from domain.ids import ModelId, Seed, StateId, TokenId, Version
from domain.state import Live, State, take

T = TypeVar("T")

DEFAULT_MAX_TOKENS: Final = 16


class GenerationWish(Struct, frozen=True, kw_only=True):
    """What a client asks of one generation; what is unset comes from the state's config."""

    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS
    temperature: Temperature | UnsetType = UNSET
    top_p: TopP | UnsetType = UNSET
    top_k: TopK | UnsetType = UNSET
    seed: Seed | None | UnsetType = UNSET
    stop_sequences: StopSequences = ()
    stop_token_ids: StopTokenIds = ()
    top_logprobs: TopLogprobs = 0


class GenerationPlan(Struct, frozen=True, kw_only=True):
    """A generation with nothing left open: parameters, seed, and how many tokens fit."""

    parameters: GenerationParameters
    seed: Seed
    max_new: int


def live(state: State | None, state_id: StateId) -> Live:
    """The state, if it takes operations.

    Raises:
        StateNotFound, StateIsDeleted: it does not.
    """
    match state:
        case None:
            raise StateNotFound(state_id)
        case Live():
            return state
        case deleted:
            raise StateIsDeleted(state_id, deleted.deleted_at)


def check_precondition(state: Live, if_match: Version | None) -> None:
    """Hold ``If-Match`` against the state's version.

    Raises:
        PreconditionFailed: another version.
    """
    if if_match is not None and if_match != state.version:
        raise PreconditionFailed(state.state_id, if_match, state.version)


def _check_context(context_size: int, limit: int) -> None:
    if context_size > limit:
        raise invalid("config.context_size", f"must be at most {limit}, the model's own limit")


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
        InvalidInput: a context size above the model's own.
        TooLarge: the content does not fit the context.
    """
    _check_context(config.context_size, model_context)
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


def forward(state: Live, content: Fragment, scores: Scores) -> TextForwarded:
    """Append given content."""
    check_fits(
        len(content.tokens), held=state.head_position, context_size=state.config.context_size
    )
    return TextForwarded(start=state.head_position, content=content, scores=scores)


def plan_generation(state: Live, wish: GenerationWish, fresh_seed: Seed) -> GenerationPlan:
    """Resolve what a generation will do; ``fresh_seed`` is used where the seed is null.

    Raises:
        InvalidInput: more tokens than the context could ever hold.
    """
    config = state.config
    if wish.max_tokens > config.context_size:
        raise invalid("max_tokens", f"must be at most {config.context_size}, the context_size")
    seed = config.seed if wish.seed is UNSET else wish.seed
    return GenerationPlan(
        parameters=GenerationParameters(
            sampling=SamplingParameters(
                temperature=_given(wish.temperature, config.temperature),
                top_k=_given(wish.top_k, config.top_k),
                top_p=_given(wish.top_p, config.top_p),
            ),
            max_tokens=wish.max_tokens,
            stop_sequences=wish.stop_sequences,
            stop_token_ids=wish.stop_token_ids,
            top_logprobs=wish.top_logprobs,
        ),
        seed=fresh_seed if seed is None else seed,
        max_new=min(wish.max_tokens, state.room),
    )


def seed_to_resume(
    begun: GenerationStarted | None, state: Live, fingerprint: str, fresh_seed: Seed
) -> Seed:
    """The seed for where a request leaves it open.

    A stream that was cut off before anything was recorded is drawn again with the seed it had
    begun with: the same tokens come, or it is refused.

    Raises:
        VersionConflict: the state has moved on since the stream began.
        FingerprintChanged: other numerics could draw other tokens.
    """
    if begun is None:
        return fresh_seed
    if begun.base_version != state.version:
        raise VersionConflict(state.state_id, begun.base_version, state.version)
    if begun.fingerprint != fingerprint:
        raise FingerprintChanged(state.state_id, begun.fingerprint, fingerprint)
    return begun.seed


def _given(value: T | UnsetType, default: T) -> T:
    return default if value is UNSET else value


def change_config(state: Live, changes: ConfigChanges, model_context: int) -> ConfigChanged:
    """Change settings from here on.

    Raises:
        InvalidInput: nothing to change, or a context size that the model or the tokens held
            do not allow.
    """
    if not changes.given():
        raise invalid("config", "must name at least one setting to change")
    size = changes.apply(state.config).context_size
    _check_context(size, model_context)
    if size < state.head_position:
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
        NotAPrefix: those tokens do not begin the tokens held now.
    """
    count = then.head_position
    if state.content.tokens[:count] != then.content.tokens:
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
        InvalidInput: a position outside the parent, a context size that does not fit.
    """
    count = parent.head_position if position is None else position
    if not 1 <= count <= parent.head_position:
        raise invalid("position", f"must be from 1 to {parent.head_position}, the head")
    config = changes.apply(parent.config)
    _check_context(config.context_size, model_context)
    check_fits(count, held=0, context_size=config.context_size)
    return StateCreated(
        origin=Fork(state_id=parent.state_id, version=parent.version, head_position=count),
        model_id=parent.model_id,
        model_type=parent.model_type,
        config=config,
        metadata=metadata,
        content=take(parent.content, count),
    )


def delete(_: Live) -> StateDeleted:
    """End a state."""
    return StateDeleted()
