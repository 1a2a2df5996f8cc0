"""What the committed files of schema 4 hold, written out: it is the same for ever.

It holds all that schema 3 holds, a state that was looked into in every way, and a classifier's.
"""

from typing import Final

import msgspec

from domain.analysis.parameters import (
    Addition,
    AttentionParameters,
    CacheParameters,
    ClassifyParameters,
    CompareParameters,
    EmbeddingParameters,
    HeadAt,
    HiddenParameters,
    InterveneParameters,
    LensParameters,
    NextParameters,
    Parameters,
    TokensParameters,
)
from domain.content import NO_SCORES
from domain.events import Event, StateAnalyzed, TextForwarded
from domain.ids import StateId, TokenId, Version
from domain.intents import GenerationStarted
from domain.origin import New
from tests.builders import FINGERPRINT, state_id
from tests.domain import schema_3
from tests.domain.schema_2 import added, began, content_of
from tests.domain.schema_3 import source as source

LOOKED_INTO: Final = state_id(6)
CLASSIFIED: Final = state_id(7)

ASKED: Final[tuple[Parameters, ...]] = (
    TokensParameters(),
    TokensParameters(start=1, end=3, top_k=1000),
    NextParameters(),
    NextParameters(top_k=1),
    AttentionParameters(layer=0),
    AttentionParameters(
        layers=(0, 9999),
        heads=(1, 0),
        start=1,
        end=2,
        format="sparse",
        top_k=3,
        threshold=0.1,
    ),
    AttentionParameters(layer=1, method="rollout"),
    AttentionParameters(layer=1, head=2, method="summary"),
    CacheParameters(layer=0, key_name="k"),
    CacheParameters(layer=1, key_name="v", head=0, start=1, end=2),
    HiddenParameters(),
    HiddenParameters(layers=(0, 2), start=1, end=3, pooling="mean"),
    HiddenParameters(pooling="last"),
    EmbeddingParameters(token_index=0),
    EmbeddingParameters(token_index=2**31 - 1, layer=1),
    LensParameters(),
    LensParameters(position=1, layers=(2,), top_k=100),
    LensParameters(start=1, end=2),
    ClassifyParameters(labels=("é", "\N{BEAR FACE}")),
    ClassifyParameters(text=" or so", labels=("yes", "no")),
    CompareParameters(other_state_id=LOOKED_INTO, other_version=Version(1)),
    CompareParameters(
        other_state_id=state_id(0),
        other_version=Version(9),
        other_fingerprint=FINGERPRINT.id,
        start=1,
        end=2,
    ),
    InterveneParameters(),
    InterveneParameters(
        replace={1: TokenId(7), 0: TokenId(3)},
        zero_heads=(HeadAt(layer=0, head=1),),
        add=(
            Addition(layer=1, vector=(0.5, -1e-30)),
            Addition(layer=0, vector=(0.1,), start=1, end=2),
        ),
        top_k=2,
    ),
)


def seen(number: int, parameters: Parameters) -> StateAnalyzed:
    return StateAnalyzed(parameters=parameters, form=1, result_digest=f"{number:064x}")


def state_looked_into() -> list[tuple[Version, Event]]:
    """What happened to a state at its versions; the looks at both of them come last."""
    looks = [(Version(1 + n % 2), seen(n, asked)) for n, asked in enumerate(ASKED)]
    return [
        (Version(1), began(content_of("ab"), New())),
        (Version(2), added(2, "cd")),
        *looks,
    ]


def classified_state() -> list[tuple[Version, Event]]:
    begun = msgspec.structs.replace(
        began(content_of("ab"), New()), model_type="sequence_classification"
    )
    own = seen(100, ClassifyParameters())
    return [
        (Version(1), begun),
        (Version(1), own),
        (Version(2), TextForwarded(start=2, content=content_of("cd"), scores=NO_SCORES)),
        (Version(2), seen(101, ClassifyParameters(text="another"))),
    ]


def intents() -> list[GenerationStarted]:
    """What the file of intents holds."""
    return schema_3.intents()


def the_history() -> list[tuple[StateId, Version, Event]]:
    """What the file of events holds; of an analysis the version that it saw."""
    states = {LOOKED_INTO: state_looked_into(), CLASSIFIED: classified_state()}
    return schema_3.the_history() + [
        (state, version, event) for state, one in states.items() for version, event in one
    ]
