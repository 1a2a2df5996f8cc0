"""What the committed files of schema 1 hold, written out: it is the same for ever."""

from typing import Final

from domain.config import (
    ConfigChanges,
    GenerationParameters,
    Metadata,
    SamplingParameters,
    StateConfig,
)
from domain.content import Alternative, Fragment, Scores, StoredLogits
from domain.events import (
    ConfigChanged,
    Event,
    FinishReason,
    HeadRewound,
    StateCreated,
    StateDeleted,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import MAX_SEED, ModelId, StateId, TokenId, Version
from domain.intents import GenerationStarted
from domain.origin import Fork, New, Origin
from tests.builders import FINGERPRINT, state_id

AWKWARD_TEXT: Final = 'tab\t quote" \\ é \u0000 \u2028 \U0001f600'
# The first token ends inside a character, the second completes it, the third is special.
SPLIT_CHARACTER: Final = Fragment(
    tokens=(TokenId(195), TokenId(169), TokenId(0)), text="é", ends=(0, 1, 1)
)
AWKWARD_NUMBERS: Final = Scores(
    logprobs=(-0.0, -1e-300, -123456789.125),
    ranks=(0, 1023, 2**31),
    entropies=(0.0, 0.1, 6.931471805599453),
    logsumexps=(5e-324, -1.7976931348623157e308, 1e16),
    logits_digests=("00" * 8, "0123456789abcdef", "ff" * 8),
)
ALL_PARAMETERS: Final = GenerationParameters(
    sampling=SamplingParameters(temperature=0.7, top_k=40, top_p=0.9),
    max_tokens=3,
    stop_sequences=("\n\n", "é"),
    stop_token_ids=(TokenId(0), TokenId(7)),
    top_logprobs=1,
)
GREEDY: Final = GenerationParameters(
    sampling=SamplingParameters(temperature=0.0, top_k=0, top_p=1.0), max_tokens=16
)
CONFIG: Final = StateConfig(
    temperature=0.7,
    top_p=1.0,
    top_k=0,
    seed=42,
    context_size=64,
    store_logits="none",
    top_k_logits=10,
)

# It is not made by shared builders: it stays as it is, whatever they become.


def content_of(text: str) -> Fragment:
    return Fragment.of([TokenId(ord(letter)) for letter in text], list(text))


def scores_of(text: str) -> Scores:
    count = len(text)
    return Scores(
        logprobs=(-0.5,) * count,
        ranks=(0,) * count,
        entropies=(1.25,) * count,
        logsumexps=(3.5,) * count,
        logits_digests=("00" * 8,) * count,
    )


def began(text: str, origin: Origin, metadata: Metadata) -> StateCreated:
    return StateCreated(
        origin=origin,
        model_id=ModelId("cacher-tiny"),
        model_type="causal_lm",
        config=CONFIG,
        metadata=metadata,
        content=content_of(text),
    )


def added(start: int, text: str) -> TextForwarded:
    return TextForwarded(start=start, content=content_of(text), scores=scores_of(text))


def drawn(
    start: int,
    text: str,
    finish_reason: FinishReason | None,
    *,
    seed: int = 7,
    stored_logits: StoredLogits | None = None,
) -> TokensGenerated:
    return TokensGenerated(
        parameters=GREEDY,
        seed=seed,
        start=start,
        content=content_of(text),
        scores=scores_of(text),
        sampling_probabilities=(1.0,) * len(text),
        alternatives=((),) * len(text),
        stored_logits=stored_logits,
        finish_reason=finish_reason,
    )


def everything_about_a_generation(start: int) -> TokensGenerated:
    alternative = Alternative(token_id=TokenId(195), text="\ufffd", logprob=-0.25)
    return TokensGenerated(
        parameters=ALL_PARAMETERS,
        seed=MAX_SEED,
        start=start,
        content=SPLIT_CHARACTER,
        scores=AWKWARD_NUMBERS,
        sampling_probabilities=(1.0, 0.3333333333333333, 1e-09),
        alternatives=((alternative,), (), (alternative, alternative)),
        stored_logits=StoredLogits(kind="top_k", k=20, digest="ab" * 32),
        finish_reason="eos",
    )


def first_state() -> list[Event]:
    """Every kind of event of schema 1 but the deletion, and every reason to end."""
    kept = StoredLogits(kind="full", k=1, digest="cd" * 32)
    changed = ConfigChanges(
        temperature=2.5,
        top_p=0.5,
        top_k=3,
        seed=None,
        context_size=32,
        store_logits="full",
        top_k_logits=1,
    )
    metadata = {"plain": "text", "é": [1, 2.5, None, True, {"deep": ""}]}
    return [
        began(AWKWARD_TEXT, New(), metadata),
        added(len(AWKWARD_TEXT), "ab"),
        everything_about_a_generation(len(AWKWARD_TEXT) + 2),
        HeadRewound(to_position=3),
        drawn(3, "c", None),
        drawn(4, "d", "stop_sequence", seed=0),
        drawn(5, "e", "stop_token", stored_logits=kept),
        drawn(6, "f", "cancelled"),
        ConfigChanged(changes=ConfigChanges(context_size=7)),
        drawn(7, "", "context_full"),
        ConfigChanged(changes=changed),
    ]


def forked_state() -> list[Event]:
    origin = Fork(state_id=state_id(0), version=Version(5), head_position=3)
    return [began("tab", origin, {}), StateDeleted()]


def intents() -> list[GenerationStarted]:
    """What the file of intents holds."""
    return [
        GenerationStarted(
            state_id=state_id(number),
            base_version=Version(number + 1),
            parameters=parameters,
            seed=7 * number,
            fingerprint=FINGERPRINT.id,
        )
        for number, parameters in enumerate((GREEDY, ALL_PARAMETERS))
    ]


def the_history() -> list[tuple[StateId, Version, Event]]:
    """What the file of events holds."""
    return [
        (state_id(number), Version(version), event)
        for number, one in enumerate((first_state(), forked_state()))
        for version, event in enumerate(one, start=1)
    ]
