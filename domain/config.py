"""How a state generates: recorded with every event that depends on it, hence part of the domain."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from domain.ids import Seed, TokenId

Temperature = Annotated[float, Meta(ge=0, le=100)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=1_000_000)]
MinP = Annotated[float, Meta(ge=0, le=1)]
TypicalP = Annotated[float, Meta(gt=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100)]
AdditivePenalty = Annotated[float, Meta(ge=-100, le=100)]
ContextSize = Annotated[int, Meta(ge=1, le=1_000_000)]
TopKLogits = Annotated[int, Meta(ge=1, le=1000)]
MaxTokens = Annotated[int, Meta(ge=1, le=1_000_000)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Token = Annotated[TokenId, Meta(ge=0)]
LogitBias = Annotated[dict[Token, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
BadWords = Annotated[
    tuple[Annotated[tuple[Token, ...], Meta(min_length=1, max_length=32)], ...],
    Meta(max_length=256),
]
StopSequence = Annotated[str, Meta(min_length=1, max_length=1000)]
StopSequences = Annotated[tuple[StopSequence, ...], Meta(max_length=16)]
StopTokenIds = Annotated[tuple[Token, ...], Meta(max_length=64)]

Beams = Annotated[int, Meta(ge=1, le=64)]
EarlyStopping = bool | Literal["never"]
LengthPenalty = Annotated[float, Meta(ge=-10, le=10)]
DiversityPenalty = Annotated[float, Meta(ge=0, le=100)]
NgramSize = Annotated[int, Meta(ge=0, le=1_000_000)]

ModelType = Literal["causal_lm", "sequence_classification"]
LogitsStorage = Literal["none", "top_k", "full"]
OnFull = Literal["stop", "slide"]
Metadata = dict[str, Any]


class LogitsParameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes scores of tokens before any is chosen, in the order of its application.

    ``logit_bias`` is added to the scores of the tokens it names. ``repetition_penalty`` (Keskar et
    al. 2019) divides positive scores of tokens that the state holds and multiplies negative ones.
    ``presence_penalty`` is subtracted from the scores of those tokens once, ``frequency_penalty``
    as often as the state holds them. ``bad_words_ids`` are runs of tokens whose last token is not
    chosen where the others are the end of the text.
    """

    logit_bias: LogitBias = {}
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: AdditivePenalty = 0.0
    frequency_penalty: AdditivePenalty = 0.0
    bad_words_ids: BadWords = ()


class SamplingParameters(LogitsParameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What turns logits into a choice, besides the seed and the position.

    Applied in this order, after what :class:`LogitsParameters` change. ``temperature`` 0 is
    greedy. ``top_k`` 0 and ``top_p`` 1 switch these filters off, as do ``min_p`` 0 and
    ``typical_p`` 1 (Meister et al. 2022).
    """

    temperature: Temperature
    top_k: TopK
    top_p: TopP
    min_p: MinP = 0.0
    typical_p: TypicalP = 1.0


class StateConfig(SamplingParameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings a state generates with, complete: nothing is looked up elsewhere later.

    ``seed`` null draws a fresh seed for each generation, which is recorded with it.
    ``context_size`` is the largest number of tokens the state may hold; ``on_full`` says whether a
    generation ends there or lets go of the first ones and goes on.
    """

    seed: Seed | None
    context_size: ContextSize
    store_logits: LogitsStorage
    top_k_logits: TopKLogits
    stop_sequences: StopSequences = ()
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
    on_full: OnFull = "stop"

    @property
    def slide_count(self) -> int:
        """How many tokens are let go of when a full state slides: half of what it may hold."""
        return -(-self.context_size // 2)


class LogitsChanges(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of :class:`LogitsParameters`; what is unset stays as it was."""

    logit_bias: LogitBias | UnsetType = UNSET
    repetition_penalty: RepetitionPenalty | UnsetType = UNSET
    presence_penalty: AdditivePenalty | UnsetType = UNSET
    frequency_penalty: AdditivePenalty | UnsetType = UNSET
    bad_words_ids: BadWords | UnsetType = UNSET

    def given(self) -> dict[str, Any]:
        """Only what was set, by name."""
        return {
            name: value
            for name in self.__struct_fields__
            if (value := getattr(self, name)) is not UNSET
        }


class SamplingChanges(LogitsChanges, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of :class:`SamplingParameters`; what is unset stays as it was."""

    temperature: Temperature | UnsetType = UNSET
    top_p: TopP | UnsetType = UNSET
    top_k: TopK | UnsetType = UNSET
    min_p: MinP | UnsetType = UNSET
    typical_p: TypicalP | UnsetType = UNSET


class ConfigChanges(SamplingChanges, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some settings of a :class:`StateConfig`; what is unset stays as it was."""

    seed: Seed | None | UnsetType = UNSET
    context_size: ContextSize | UnsetType = UNSET
    store_logits: LogitsStorage | UnsetType = UNSET
    top_k_logits: TopKLogits | UnsetType = UNSET
    stop_sequences: StopSequences | UnsetType = UNSET
    stop_token_ids: StopTokenIds | UnsetType = UNSET
    ignore_eos: bool | UnsetType = UNSET
    on_full: OnFull | UnsetType = UNSET

    def apply(self, config: StateConfig) -> StateConfig:
        """``config`` with these changes."""
        return msgspec.structs.replace(config, **self.given())


class Constraint(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A language that a generated text must belong to.

    ``text`` is a regular expression (of Rust's ``regex`` syntax), a JSON Schema (its JSON as the
    client wrote it: the order of properties matters), or a grammar in Lark's syntax.
    """

    kind: Literal["regex", "json_schema", "lark"]
    text: str


class GenerationParameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything one generation was asked to do, with all defaults resolved.

    ``max_tokens`` counts new tokens. A stop sequence ends the text once it has appeared in the
    text of this generation; a stop token ends it once drawn; both stay in the text. With
    ``ignore_eos`` the model's end-of-sequence token is a token like others. ``top_logprobs`` is
    how many alternatives are recorded per token.
    """

    sampling: SamplingParameters
    max_tokens: MaxTokens
    stop_sequences: StopSequences = ()
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None
    top_logprobs: TopLogprobs = 0


class BeamParameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything one beam search was asked to do; names and meanings as in transformers.

    ``logits`` apply to logarithms of probabilities. ``max_tokens`` counts new tokens.
    ``early_stopping``: true ends the search when ``num_beams`` sequences are finished, false when
    it is unlikely that a better one comes, ``"never"`` when none can. A finished sequence scores
    the sum of its logprobs divided by its number of new tokens to the power ``length_penalty``.
    The beams are ``num_beam_groups`` groups of equal size, searched one after the other; a group
    pays ``diversity_penalty`` for each beam of earlier groups that chose the same token at the
    same step (Vijayakumar et al. 2016). No run of ``no_repeat_ngram_size`` tokens (0: of any size)
    comes twice in the text. The ``num_return`` best sequences are kept.
    """

    logits: LogitsParameters
    max_tokens: MaxTokens
    num_beams: Beams
    early_stopping: EarlyStopping = False
    length_penalty: LengthPenalty = 1.0
    num_beam_groups: Beams = 1
    diversity_penalty: DiversityPenalty = 0.0
    no_repeat_ngram_size: NgramSize = 0
    num_return: Beams = 1
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
