"""How a state generates: recorded with every event that depends on it, hence part of the domain."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from domain.ids import Seed, TokenId

Temperature = Annotated[float, Meta(ge=0, le=100)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=1_000_000)]
ContextSize = Annotated[int, Meta(ge=1, le=1_000_000)]
TopKLogits = Annotated[int, Meta(ge=1, le=1000)]
MaxTokens = Annotated[int, Meta(ge=1, le=1_000_000)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
StopSequence = Annotated[str, Meta(min_length=1, max_length=1000)]
StopSequences = Annotated[tuple[StopSequence, ...], Meta(max_length=16)]
StopTokenIds = Annotated[tuple[Annotated[TokenId, Meta(ge=0)], ...], Meta(max_length=64)]

ModelType = Literal["causal_lm", "sequence_classification"]
LogitsStorage = Literal["none", "top_k", "full"]
Metadata = dict[str, Any]


class StateConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings a state generates with, complete: nothing is looked up elsewhere later.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch these filters off.
    ``seed`` null draws a fresh seed for each generation, which is recorded with it.
    ``context_size`` is the largest number of tokens the state may hold.
    """

    temperature: Temperature
    top_p: TopP
    top_k: TopK
    seed: Seed | None
    context_size: ContextSize
    store_logits: LogitsStorage
    top_k_logits: TopKLogits


class ConfigChanges(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some settings of a :class:`StateConfig`; what is unset stays as it was."""

    temperature: Temperature | UnsetType = UNSET
    top_p: TopP | UnsetType = UNSET
    top_k: TopK | UnsetType = UNSET
    seed: Seed | None | UnsetType = UNSET
    context_size: ContextSize | UnsetType = UNSET
    store_logits: LogitsStorage | UnsetType = UNSET
    top_k_logits: TopKLogits | UnsetType = UNSET

    def apply(self, config: StateConfig) -> StateConfig:
        """``config`` with these changes."""
        return msgspec.structs.replace(config, **self.given())

    def given(self) -> dict[str, Any]:
        """Only what was set, by name."""
        return {
            name: value
            for name in self.__struct_fields__
            if (value := getattr(self, name)) is not UNSET
        }


class SamplingParameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What turns logits into a choice, besides the seed and the position."""

    temperature: Temperature
    top_k: TopK
    top_p: TopP


class GenerationParameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything one generation was asked to do, with all defaults resolved.

    ``max_tokens`` counts new tokens. A stop sequence ends the text once it has appeared in the
    text of this generation; a stop token ends it once drawn; both stay in the text.
    ``top_logprobs`` is how many alternatives are recorded per token.
    """

    sampling: SamplingParameters
    max_tokens: MaxTokens
    stop_sequences: StopSequences = ()
    stop_token_ids: StopTokenIds = ()
    top_logprobs: TopLogprobs = 0
