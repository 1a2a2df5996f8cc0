"""What JSON answers hold, for the OpenAPI document: facts, tensors, and whose they are."""

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from app.representations.elements import TensorView
from domain.analysis.attention import AttentionFacts
from domain.analysis.cache import CacheFacts, Residence
from domain.analysis.classify import Classified, LikeliestLabel
from domain.analysis.compare import CompareFacts
from domain.analysis.hidden import EmbeddingFacts, HiddenFacts
from domain.analysis.intervene import InterveneFacts
from domain.analysis.lens import LensFacts
from domain.analysis.next import NextFacts
from domain.analysis.tokens import TokensFacts, TokensSource
from domain.ids import ModelId, StateId, Version


class Looked(Struct, frozen=True, kw_only=True):
    """A state as it was looked at, and the numerics it was looked at under."""

    state_id: StateId
    version: Version
    model_id: ModelId
    fingerprint: str


class Described(Struct, frozen=True, kw_only=True):
    """The tensors that were found; ``note`` says what of them is not in the JSON."""

    tensors: tuple[TensorView, ...]
    note: str | UnsetType = UNSET


def _answer(
    name: str, facts: type[Struct], *tensors: str, beside: type[Struct] | None = None
) -> Any:
    """An answer with these facts, and with these tensors as lists in lists."""
    fields: list[Any] = [*_fields(Looked), *_fields(facts)]
    fields += [(tensor, list[Any] | UnsetType, UNSET) for tensor in tensors]
    fields += [*_fields(Described), *(_fields(beside) if beside else ())]
    return msgspec.defstruct(
        name, fields, kw_only=True, module=__name__, namespace={"__doc__": facts.__doc__}
    )


def _fields(struct: type[Struct]) -> list[Any]:
    return [
        (field.name, field.type) if field.required else (field.name, field.type, field.default)
        for field in msgspec.structs.fields(struct)
    ]


TOKENS = _answer("TokensAnswer", TokensFacts, beside=TokensSource)
NEXT = _answer("NextAnswer", NextFacts)
ATTENTION = _answer(
    "AttentionAnswer",
    AttentionFacts,
    *("attention_pattern", "indices", "values", "entropy", "distance", "first_token"),
)
CACHE = _answer("CacheAnswer", CacheFacts, "cache_data", beside=Residence)
HIDDEN = _answer("HiddenAnswer", HiddenFacts, "hidden_states")
EMBEDDING = _answer("EmbeddingAnswer", EmbeddingFacts, "embedding")
LENS = _answer("LensAnswer", LensFacts)
CLASSES = _answer("ClassesAnswer", Classified, "logits")
LABELS = _answer("LabelsAnswer", LikeliestLabel)
COMPARE = _answer("CompareAnswer", CompareFacts)
INTERVENE = _answer("InterveneAnswer", InterveneFacts)
