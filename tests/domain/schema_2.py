"""What the committed files of schema 2 hold, written out: it is the same for ever."""

from typing import Final

from domain.config import (
    BeamParameters,
    ConfigChanges,
    Constraint,
    GenerationParameters,
    LogitsParameters,
    SamplingParameters,
    StateConfig,
)
from domain.content import Alternative, Fragment, Scores, StoredLogits
from domain.events import (
    Beam,
    BeamsGenerated,
    BeamStep,
    ConfigChanged,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
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
from domain.origin import ContinuationId, Fork, Merge, New, Origin, Parent
from tests.builders import FINGERPRINT, state_id

# The first token is no character, the second half of one, and the third completes it.
SPLIT_CHARACTER: Final = Fragment(
    tokens=(TokenId(0), TokenId(195), TokenId(169)),
    text="é",
    ends=(0, 0, 1),
    partial={1: "c3", 2: "a9"},
)
LOGITS: Final = LogitsParameters(
    logit_bias={TokenId(3): -100.0, TokenId(7): 0.1},
    repetition_penalty=1.2,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    bad_words_ids=((TokenId(1),), (TokenId(2), TokenId(3))),
)
SAMPLING: Final = SamplingParameters(
    logit_bias=LOGITS.logit_bias,
    repetition_penalty=LOGITS.repetition_penalty,
    presence_penalty=LOGITS.presence_penalty,
    frequency_penalty=LOGITS.frequency_penalty,
    bad_words_ids=LOGITS.bad_words_ids,
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    typical_p=0.95,
)
ALL_PARAMETERS: Final = GenerationParameters(
    sampling=SAMPLING,
    max_tokens=8,
    stop_sequences=("\n\n", "é"),
    stop_token_ids=(TokenId(0), TokenId(7)),
    ignore_eos=True,
    constraint=Constraint(kind="json_schema", text='{"type":"string","const":"é"}'),
    top_logprobs=1,
)
GREEDY: Final = GenerationParameters(
    sampling=SamplingParameters(temperature=0.0, top_k=0, top_p=1.0), max_tokens=8
)
ALL_OF_A_SEARCH: Final = BeamParameters(
    logits=LOGITS,
    max_tokens=3,
    num_beams=4,
    early_stopping="never",
    length_penalty=0.8,
    num_beam_groups=2,
    diversity_penalty=0.5,
    no_repeat_ngram_size=2,
    num_return=2,
    stop_token_ids=(TokenId(7),),
    ignore_eos=True,
)
CONFIG: Final = StateConfig(
    temperature=0.7,
    top_p=1.0,
    top_k=0,
    seed=None,
    context_size=6,
    store_logits="top_k",
    top_k_logits=2,
    stop_sequences=("stop",),
    stop_token_ids=(TokenId(5),),
    ignore_eos=True,
    on_full="slide",
    min_p=0.1,
    typical_p=0.9,
    logit_bias={TokenId(4): 1.5},
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    bad_words_ids=((TokenId(9), TokenId(8)),),
)
STORED: Final = StoredLogits(kind="top_k", k=2, digest="ab" * 32)

# It is not made by shared builders: it stays as it is, whatever they become.


def content_of(text: str) -> Fragment:
    return Fragment.of([TokenId(ord(letter)) for letter in text], list(text))


def scores_of(count: int) -> Scores:
    return Scores(
        logprobs=(-0.5,) * count,
        ranks=(0,) * count,
        entropies=(1.25,) * count,
        logsumexps=(3.5,) * count,
        logits_digests=("00" * 8,) * count,
    )


def began(content: Fragment, origin: Origin, dropped: int = 0) -> StateCreated:
    return StateCreated(
        origin=origin,
        model_id=ModelId("cacher-tiny"),
        model_type="causal_lm",
        config=CONFIG,
        metadata={},
        content=content,
        dropped=dropped,
    )


def added(start: int, text: str, *, dropped: int = 0) -> TextForwarded:
    return TextForwarded(
        start=start, dropped=dropped, content=content_of(text), scores=scores_of(len(text))
    )


def drawn(
    start: int,
    content: Fragment,
    finish_reason: FinishReason | None,
    *,
    parameters: GenerationParameters = GREEDY,
    dropped: int = 0,
    resumes: int = 0,
) -> TokensGenerated:
    count = len(content.tokens)
    return TokensGenerated(
        parameters=parameters,
        seed=7,
        start=start,
        dropped=dropped,
        resumes=resumes,
        content=content,
        scores=scores_of(count),
        sampling_probabilities=(0.3333333333333333,) * count,
        alternatives=((),) * count,
        stored_logits=STORED if count else None,
        finish_reason=finish_reason,
    )


def several(start: int, dropped: int) -> ContinuationsGenerated:
    alternative = Alternative(token_id=TokenId(195), text="\ufffd", logprob=-0.25)
    contents = (SPLIT_CHARACTER, content_of("x"), content_of(""))
    reasons: tuple[FinishReason | None, ...] = ("constraint", "stop_token", "cancelled")
    return ContinuationsGenerated(
        parameters=ALL_PARAMETERS,
        seed=MAX_SEED,
        start=start,
        dropped=dropped,
        continuations=tuple(
            Continuation(
                content=content,
                scores=scores_of(len(content.tokens)),
                sampling_probabilities=(1e-09,) * len(content.tokens),
                alternatives=((alternative,),) * len(content.tokens),
                finish_reason=reason,
            )
            for content, reason in zip(contents, reasons, strict=True)
        ),
        stored_logits=StoredLogits(kind="top_k", k=2, digest="cd" * 32),
    )


def searched(start: int, dropped: int) -> BeamsGenerated:
    a, b = TokenId(97), TokenId(98)
    return BeamsGenerated(
        parameters=ALL_OF_A_SEARCH,
        start=start,
        dropped=dropped,
        steps=(
            BeamStep(parents=(0, 0, 0, 0), tokens=(a, b, a, b)),
            BeamStep(parents=(1, 0, 3, 2), tokens=(a, a, b, a)),
        ),
        beams=(
            Beam(content=content_of("bab"), scores=scores_of(3), score=-0.1, finished=False),
            Beam(content=content_of("ab"), scores=scores_of(2), score=-1.5, finished=True),
        ),
    )


def sliding_state() -> list[Event]:
    """Every kind of event but the deletion, and every reason to end."""
    changes = ConfigChanges(
        temperature=2.5,
        top_p=0.5,
        top_k=3,
        min_p=0.0,
        typical_p=1.0,
        seed=MAX_SEED,
        context_size=8,
        store_logits="none",
        top_k_logits=1,
        stop_sequences=("é",),
        stop_token_ids=(TokenId(1),),
        ignore_eos=False,
        on_full="stop",
        logit_bias={TokenId(2): -1.0},
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        bad_words_ids=(),
    )
    return [
        began(content_of("abc"), New()),
        drawn(3, SPLIT_CHARACTER, "context_full", parameters=ALL_PARAMETERS),
        ContextSlid(dropped=3),
        drawn(6, content_of("de"), "cancelled", parameters=ALL_PARAMETERS, dropped=3, resumes=3),
        drawn(8, content_of("f"), "eos", parameters=ALL_PARAMETERS, dropped=3, resumes=5),
        several(9, 3),
        searched(9, 3),
        ContextSlid(dropped=3),
        added(9, "ghi", dropped=6),
        HeadRewound(to_position=4),
        drawn(10, content_of("j"), None, dropped=6),
        drawn(11, content_of(""), "constraint", dropped=6),
        ConfigChanged(changes=changes),
        drawn(11, content_of("k"), "stop_sequence", dropped=6),
    ]


def adopting_state() -> list[Event]:
    first = ContinuationId(version=Version(7), index=1)
    origin = Fork(state_id=state_id(0), version=Version(7), head_position=6, continuation=first)
    held = Fragment(
        tokens=(*SPLIT_CHARACTER.tokens, *content_of("defab").tokens),
        text="édefab",
        ends=(0, 0, 1, 2, 3, 4, 5, 6),
        partial=SPLIT_CHARACTER.partial,
    )
    return [began(held, origin, dropped=3), StateDeleted()]


def merged_state() -> list[Event]:
    parents = (
        Parent(state_id=state_id(0), version=Version(1), head_position=3),
        Parent(state_id=state_id(1), version=Version(1), head_position=8),
    )
    tokens = (*content_of("abc").tokens, *SPLIT_CHARACTER.tokens, *content_of("defab").tokens)
    held = Fragment(
        tokens=tokens,
        text="abcédefab",
        ends=(1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9),
        partial={4: "c3", 5: "a9"},
    )
    return [began(held, Merge(parents=parents, strategy="concatenate"))]


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
        for number, one in enumerate((sliding_state(), adopting_state(), merged_state()))
        for version, event in enumerate(one, start=1)
    ]
