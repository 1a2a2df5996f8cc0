"""What a generation will do: a state and a wish in, everything resolved out."""

from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from domain.config import (
    BeamParameters,
    Beams,
    Constraint,
    DiversityPenalty,
    EarlyStopping,
    GenerationParameters,
    LengthPenalty,
    LogitsChanges,
    LogitsParameters,
    MaxTokens,
    ModelType,
    NgramSize,
    SamplingChanges,
    SamplingParameters,
    StateConfig,
    StopSequences,
    StopTokenIds,
    TopLogprobs,
)
from domain.errors import (
    FieldProblem,
    FingerprintChanged,
    InvalidInput,
    NotRunnable,
    VersionConflict,
    invalid,
)
from domain.events import Recorded
from domain.ids import Seed
from domain.intents import GenerationStarted
from domain.state import Live

T = TypeVar("T")
P = TypeVar("P", bound=LogitsParameters)

DEFAULT_MAX_TOKENS: Final = 16

MAX_DRAWN: Final = 32_768
"""Tokens that one request may draw, over all its branches: they are recorded together."""

MAX_KEPT_BYTES: Final = 256 << 20
"""Logits that may be kept of them, before they are compressed."""

MAX_SLIDES: Final = 64
"""How often a state may slide in one request: each slide is an event, with a text after it."""


class ConstraintWish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A constraint as a client writes it: one of the three."""

    regex: str | UnsetType = UNSET
    json_schema: dict[str, Any] | bool | UnsetType = UNSET
    lark: str | UnsetType = UNSET

    def resolve(self) -> Constraint:
        """The constraint.

        Raises:
            InvalidInput: none is given, or more than one.
        """
        match self.regex, self.json_schema, self.lark:
            case str() as text, UnsetType(), UnsetType():
                return Constraint(kind="regex", text=text)
            case UnsetType(), dict() | bool() as schema, UnsetType():
                text = msgspec.json.encode(schema).decode()
                return Constraint(kind="json_schema", text=text)
            case UnsetType(), UnsetType(), str() as text:
                return Constraint(kind="lark", text=text)
            case _:
                raise invalid("constraint", "must have one of regex, json_schema and lark")


class GenerationWish(SamplingChanges, frozen=True, kw_only=True):
    """What a client asks of one generation; what is unset comes from the state's config."""

    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS
    seed: Seed | None | UnsetType = UNSET
    stop_sequences: StopSequences | UnsetType = UNSET
    stop_token_ids: StopTokenIds | UnsetType = UNSET
    ignore_eos: bool | UnsetType = UNSET
    constraint: ConstraintWish | None = None
    top_logprobs: TopLogprobs = 0


class BeamWish(LogitsChanges, frozen=True, kw_only=True):
    """What a client asks of one beam search; see :class:`domain.config.BeamParameters`."""

    max_length: MaxTokens = DEFAULT_MAX_TOKENS
    num_beams: Beams = 4
    early_stopping: EarlyStopping = False
    length_penalty: LengthPenalty = 1.0
    num_beam_groups: Beams = 1
    diversity_penalty: DiversityPenalty = 0.0
    no_repeat_ngram_size: NgramSize = 0
    num_return: Beams = 1
    stop_token_ids: StopTokenIds | UnsetType = UNSET
    ignore_eos: bool | UnsetType = UNSET


class GenerationPlan(Struct, frozen=True, kw_only=True):
    """A generation with nothing left open."""

    parameters: GenerationParameters
    seed: Seed


def plan_generation(state: Live, wish: GenerationWish, fresh_seed: Seed) -> GenerationPlan:
    """Resolve what a generation will do; ``fresh_seed`` is used where the seed is null.

    Raises:
        InvalidInput: more tokens than the context can hold, with as much sliding as may be.
    """
    config = state.config
    most, why = config.context_size, "the context_size"
    if config.on_full == "slide":
        most, why = MAX_SLIDES * config.slide_count, f"what {MAX_SLIDES} slides make room for"
    if wish.max_tokens > most:
        raise invalid("max_tokens", f"must be at most {most}, {why}")
    seed = _given(wish.seed, config.seed)
    return GenerationPlan(
        parameters=GenerationParameters(
            sampling=_resolved(SamplingParameters, wish, config),
            max_tokens=wish.max_tokens,
            stop_sequences=_given(wish.stop_sequences, config.stop_sequences),
            stop_token_ids=_given(wish.stop_token_ids, config.stop_token_ids),
            ignore_eos=_given(wish.ignore_eos, config.ignore_eos),
            constraint=wish.constraint.resolve() if wish.constraint else None,
            top_logprobs=wish.top_logprobs,
        ),
        seed=fresh_seed if seed is None else seed,
    )


def check_kept(
    config: StateConfig, parameters: GenerationParameters, branches: int, *, vocabulary_size: int
) -> None:
    """Refuse more tokens than can be recorded together with what is kept of each.

    Raises:
        InvalidInput: too many tokens.
    """
    a_token = {
        "none": 0,
        "top_k": 8 * config.top_k_logits,
        "full": 4 * vocabulary_size,
    }[config.store_logits]
    most = min(MAX_DRAWN, MAX_KEPT_BYTES // max(1, a_token)) // branches
    if parameters.max_tokens > most:
        raise invalid(
            "max_tokens",
            f"must be at most {most} for n = {branches} with store_logits {config.store_logits}",
        )


def plan_beams(state: Live, wish: BeamWish, max_beams: int) -> BeamParameters:
    """Resolve what a beam search will do; the engine runs ``max_beams`` texts together.

    Raises:
        InvalidInput: names every parameter that is out of range or does not fit another one.
    """
    _check_beams(state.config, wish, max_beams)
    return BeamParameters(
        logits=_resolved(LogitsParameters, wish, state.config),
        max_tokens=wish.max_length,
        num_beams=wish.num_beams,
        early_stopping=wish.early_stopping,
        length_penalty=wish.length_penalty,
        num_beam_groups=wish.num_beam_groups,
        diversity_penalty=wish.diversity_penalty,
        no_repeat_ngram_size=wish.no_repeat_ngram_size,
        num_return=wish.num_return,
        stop_token_ids=_given(wish.stop_token_ids, state.config.stop_token_ids),
        ignore_eos=_given(wish.ignore_eos, state.config.ignore_eos),
    )


def _check_beams(config: StateConfig, wish: BeamWish, max_beams: int) -> None:
    beams, size = wish.num_beams, config.context_size
    rules = {
        "num_beams": (beams <= max_beams, f"must be at most {max_beams}, what runs together"),
        "num_beam_groups": (
            beams % wish.num_beam_groups == 0,
            f"must divide num_beams, which is {beams}",
        ),
        "diversity_penalty": (
            wish.num_beam_groups > 1 or wish.diversity_penalty == 0,
            "must be 0 for a single group of beams",
        ),
        "num_return": (wish.num_return <= beams, f"must be at most {beams}, the num_beams"),
        "max_length": (
            wish.max_length <= min(size, MAX_DRAWN // beams),
            f"must be at most {min(size, MAX_DRAWN // beams)} for {beams} beams",
        ),
    }
    problems = [FieldProblem(field, rule) for field, (holds, rule) in rules.items() if not holds]
    if problems:
        raise InvalidInput(*problems)


def check_language(state: Live, *, field: str = "state_id") -> None:
    """Refuse a state, named by a ``field``, whose model writes no text.

    Raises:
        InvalidInput: it is a state of a classifier.
    """
    if state.model_type != "causal_lm":
        reason = f"is a state of a classifier ({state.model_type}): this needs a causal_lm state"
        raise invalid(field, f"{reason}; POST /v1/analyze/classify takes it")


def check_runnable(
    state: Live, model_type: ModelType, vocabulary_size: int, model_context: int
) -> None:
    """Refuse a state that another model made: one that was imported need not be of the model here.

    Raises:
        NotRunnable: the model is of another type, or the state holds tokens that the model does
            not have, or may hold too many.
    """
    tokens = state.content.tokens
    if state.model_type != model_type:
        reason = f"it is a {state.model_type} state, the model a {model_type}"
    elif not 0 <= min(tokens) <= max(tokens) < vocabulary_size:
        reason = f"it holds tokens beyond 0 to {vocabulary_size - 1}"
    elif state.config.context_size > model_context:
        reason = (
            f"its context_size is {state.config.context_size}, that of the model {model_context}"
        )
    else:
        return
    raise NotRunnable(state.state_id, state.model_id, reason)


def check_tokens(wish: LogitsChanges, size: int, prefix: str = "") -> None:
    """Refuse ids that are no token of a vocabulary of ``size`` entries, wherever they are named.

    ``prefix`` is where in the request the wish is, such as ``"config."``.

    Raises:
        InvalidInput: names every one of them.
    """
    given = wish.given()
    named = [(f"logit_bias.{token}", token) for token in given.get("logit_bias", ())]
    named += [
        (f"stop_token_ids[{i}]", token) for i, token in enumerate(given.get("stop_token_ids", ()))
    ]
    named += [
        (f"bad_words_ids[{i}][{j}]", token)
        for i, word in enumerate(given.get("bad_words_ids", ()))
        for j, token in enumerate(word)
    ]
    rule = f"must be from 0 to {size - 1}"
    problems = [
        FieldProblem(prefix + field, rule) for field, token in named if not 0 <= token < size
    ]
    if problems:
        raise InvalidInput(*problems)


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


def check_resumable(cut_off: Recorded, state: Live, fingerprint: str) -> None:
    """Refuse to go on from an event that cannot be gone on from.

    Raises:
        VersionConflict: the state has moved on since.
        FingerprintChanged: other numerics could draw other tokens.
    """
    if cut_off.version != state.version:
        raise VersionConflict(state.state_id, cut_off.version, state.version)
    if cut_off.row.fingerprint != fingerprint:
        raise FingerprintChanged(state.state_id, cut_off.row.fingerprint or "", fingerprint)


def _resolved(kind: type[P], wish: LogitsChanges, config: StateConfig) -> P:
    """Parameters of a kind: what the wish gives, the rest from the state's config."""
    given = wish.given()
    return kind(**{name: given.get(name, getattr(config, name)) for name in kind.__struct_fields__})


def _given(value: T | UnsetType, default: T) -> T:
    return default if value is UNSET else value
