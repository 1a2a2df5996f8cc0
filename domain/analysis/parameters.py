"""What can be asked about the inside of a state: recorded, so that it can be asked again.

Positions are places among the tokens that the state holds, from 0. A range goes from ``start`` up
to, not with, ``end``; an end of null is the last token. Layers count from 0; in a list of hidden
states 0 is the embedding, ``i`` what comes out of the i-th layer, and the last one is normalised,
as in transformers.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from domain.ids import StateId, TokenId, Version

Place = Annotated[int, Meta(ge=0, le=2**31 - 1)]
LayerIndex = Annotated[int, Meta(ge=0, le=9999)]
HeadIndex = Annotated[int, Meta(ge=0, le=9999)]
Layers = Annotated[tuple[LayerIndex, ...], Meta(min_length=1, max_length=1024)]
Heads = Annotated[tuple[HeadIndex, ...], Meta(min_length=1, max_length=1024)]
Count = Annotated[int, Meta(ge=0, le=1000)]
Label = Annotated[str, Meta(min_length=1, max_length=1000)]


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """One kind of question, stored under its tag ``kind``."""


class TokensParameters(Asked, frozen=True, kw_only=True, tag="tokens"):
    """How likely each token of a range was, with ``top_k`` alternatives."""

    start: Place = 0
    end: Place | None = None
    top_k: Count = 0


class NextParameters(Asked, frozen=True, kw_only=True, tag="next"):
    """What could come next: the ``top_k`` likeliest tokens, raw and as the state would sample."""

    top_k: Annotated[int, Meta(ge=1, le=1000)] = 10


class AttentionParameters(Asked, frozen=True, kw_only=True, tag="attention"):
    """How much the tokens of a range (the queries) attend to those before them.

    Of one ``layer`` or of several ``layers``; of one ``head``, of several ``heads``, or the mean
    over all. ``rollout`` is over all layers up to the one named (Abnar and Zuidema 2020), or all;
    ``summary`` a few figures for each head. ``sparse`` gives the ``top_k`` largest weights of each
    row (10 if it is null) with the positions of their keys; weights below ``threshold`` are 0.
    """

    layer: LayerIndex | None = None
    layers: Layers | None = None
    head: HeadIndex | None = None
    heads: Heads | None = None
    method: Literal["weights", "rollout", "summary"] = "weights"
    start: Place = 0
    end: Place | None = None
    format: Literal["dense", "sparse"] = "dense"
    top_k: Annotated[int, Meta(ge=1, le=1000)] | None = None
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.0


class CacheParameters(Asked, frozen=True, kw_only=True, tag="cache"):
    """Keys or values of a range of tokens in one layer, of one K/V ``head`` or of all."""

    layer: LayerIndex
    key_name: Literal["k", "v"]
    head: HeadIndex | None = None
    start: Place = 0
    end: Place | None = None


class HiddenParameters(Asked, frozen=True, kw_only=True, tag="hidden"):
    """Hidden states of a range of tokens, or one vector for it: their mean, or the last one.

    Of the ``layers`` named; of the last one if there are none.
    """

    layers: Layers | None = None
    start: Place = 0
    end: Place | None = None
    pooling: Literal["none", "mean", "last"] = "none"


class EmbeddingParameters(Asked, frozen=True, kw_only=True, tag="embedding"):
    """The hidden state of one token; of the last layer if none is named."""

    token_index: Place
    layer: LayerIndex | None = None


class LensParameters(Asked, frozen=True, kw_only=True, tag="lens"):
    """The logit lens (nostalgebraist 2020): hidden states read as what could come next.

    Of the ``layers`` named, or of all; at one ``position`` or at those of a range.
    """

    position: Place | None = None
    layers: Layers | None = None
    start: Place = 0
    end: Place | None = None
    top_k: Annotated[int, Meta(ge=1, le=100)] = 5


class ClassifyParameters(Asked, frozen=True, kw_only=True, tag="classify"):
    """Which class a text belongs to; the state's own text if there is none.

    With ``labels``: the likeliest of them as what a causal model writes next.
    """

    text: str | None = None
    labels: Annotated[tuple[Label, ...], Meta(min_length=2, max_length=64)] | None = None


class CompareParameters(Asked, frozen=True, kw_only=True, tag="compare"):
    """Where a state differs from another one, or from another version of itself.

    ``other_fingerprint`` names the numerics of the other one's model, which can be another model.
    """

    other_state_id: StateId
    other_version: Version
    other_fingerprint: str | None = None
    start: Place = 0
    end: Place | None = None


class CompareWish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison with a state as it will be when it is made, if no version is named."""

    other_state_id: StateId
    other_version: Version | None = None
    start: Place = 0
    end: Place | None = None


class HeadAt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An attention head of a layer."""

    layer: LayerIndex
    head: HeadIndex


class Addition(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A vector, as wide as the hidden states, to be added to those that enter a layer.

    At the tokens of a range; at all if none is given.
    """

    layer: LayerIndex
    vector: Annotated[tuple[float, ...], Meta(min_length=1, max_length=65536)]
    start: Place = 0
    end: Place | None = None


class InterveneParameters(Asked, frozen=True, kw_only=True, tag="intervene"):
    """What could come next if something were otherwise.

    With tokens replaced (by position), heads giving nothing, or vectors added.
    """

    replace: dict[Place, TokenId] = {}
    zero_heads: Annotated[tuple[HeadAt, ...], Meta(max_length=4096)] = ()
    add: Annotated[tuple[Addition, ...], Meta(max_length=64)] = ()
    top_k: Annotated[int, Meta(ge=1, le=1000)] = 10


Inside = (
    NextParameters
    | AttentionParameters
    | CacheParameters
    | HiddenParameters
    | EmbeddingParameters
    | LensParameters
    | InterveneParameters
)
"""Questions that one pass of a language model over the state's own tokens answers."""

Parameters = Inside | TokensParameters | ClassifyParameters | CompareParameters

Question = Parameters | CompareWish
"""What a client asks: parameters, or what they come of."""
