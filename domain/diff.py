"""How two states differ: in what they hold, in their settings, and in what could come next."""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from domain.config import StateConfig
from domain.content import Fragment, ToldToken
from domain.ids import ModelId, StateId, TokenId, Version
from domain.state import Live, drop, take


class Side(Struct, frozen=True, kw_only=True):
    """One of the two: a state as it was at a version. ``dropped`` tokens came before its first."""

    state_id: StateId
    version: Version
    model_id: ModelId
    head_position: int
    dropped: int

    @classmethod
    def of(cls, state: Live) -> "Side":
        """The side that a state is."""
        return cls(
            state_id=state.state_id,
            version=state.version,
            model_id=state.model_id,
            head_position=state.head_position,
            dropped=state.dropped,
        )


class CommonPrefix(Struct, frozen=True, kw_only=True):
    """What both begin with: the number of its tokens, and their text."""

    tokens: int
    text: str


class Part(Struct, frozen=True, kw_only=True):
    """What one of them holds after that."""

    tokens: tuple[TokenId, ...]
    text: str

    @classmethod
    def of(cls, content: Fragment) -> "Part":
        """The part that a fragment is."""
        return cls(tokens=content.tokens, text=content.text)


class NextToken(Struct, frozen=True, kw_only=True):
    """The distributions of the token at a position, given the tokens that each holds before it.

    ``kl`` (nats) is the KL divergence of the second from the first, D(a || b), over the whole
    vocabulary, before temperature and filters. ``top_a`` and ``top_b`` are the likeliest tokens; of
    several the one with the lowest id.
    """

    position: int
    kl: float
    top_a: ToldToken
    top_b: ToldToken


class Diff(Struct, frozen=True, kw_only=True):
    """How state ``b`` differs from state ``a``.

    ``config`` has both values of each setting that differs. ``kl`` is null where the models cannot
    be compared; ``note`` says why. It goes on from position ``next_start``, null at its end.
    """

    a: Side
    b: Side
    same_model: bool
    common_prefix: CommonPrefix
    a_part: Part
    b_part: Part
    config: dict[str, tuple[Any, Any]]
    kl: tuple[NextToken, ...] | None = None
    next_start: int | None = None
    note: str | None = None


def diff(a: Live, b: Live) -> Diff:
    """How two states differ, as far as no model is needed to know."""
    common = prefix_length(_read(a.content), _read(b.content))
    return Diff(
        a=Side.of(a),
        b=Side.of(b),
        same_model=a.model_id == b.model_id,
        common_prefix=CommonPrefix(tokens=common, text=take(a.content, common).text),
        a_part=Part.of(drop(a.content, common)),
        b_part=Part.of(drop(b.content, common)),
        config=config_changes(a.config, b.config),
    )


def _read(content: Fragment) -> list[tuple[TokenId, str]]:
    """Tokens with what they mean: two models may mean different things by one number."""
    return list(zip(content.tokens, content.pieces(), strict=True))


def prefix_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How much two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def config_changes(first: StateConfig, second: StateConfig) -> dict[str, tuple[Any, Any]]:
    """Both values of each setting that differs."""
    other = asdict(second)
    return {name: (v, other[name]) for name, v in asdict(first).items() if v != other[name]}


def places(found: Diff) -> range:
    """Positions of both texts at which what comes next can be told apart.

    Up to the one after the shorter text. One model says the same of the same tokens, up to the
    first position after what they have in common.
    """
    first = found.common_prefix.tokens + 1 if found.same_model else 1
    return range(first, min(found.a.head_position, found.b.head_position) + 1)
