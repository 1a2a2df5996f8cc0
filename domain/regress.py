"""A recorded history under another model, library, number format or machine: what changed.

Every recorded token is computed again with the tokens before it as they are recorded (teacher
forcing), so that one changed choice does not hide what comes after it.
"""

from typing import Any

from msgspec import Struct

from domain.events import Alternative
from domain.ids import Position, StateId, TokenId, Version


class Place(Struct, frozen=True, kw_only=True):
    """One token of a history and what became of it.

    ``position`` is its event's place in the log, ``run`` which of the event's texts it is in (""
    where there is but one), ``token_position`` its absolute place in the state. ``sampled`` are the
    tokens drawn then and now (null for text that was given, and for beams), ``greedy`` the
    likeliest ones (then: null where it was not kept). ``kl`` (nats) is the KL divergence of what
    was then from what is now, over the tokens that are known of then and all others as one: exact
    (``kl_exact``) where all were kept, else no more than it. ``alternatives`` are the likeliest
    tokens now, where they were asked for.
    """

    position: Position
    version: Version
    run: str
    token_position: int
    token_id: TokenId
    text: str
    sampled: tuple[TokenId, TokenId] | None
    greedy: tuple[TokenId | None, TokenId]
    logprobs: tuple[float, float]
    kl: float
    kl_exact: bool
    alternatives: tuple[Alternative, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether another token would be drawn, or is the likeliest, now."""
        sampled = self.sampled is not None and self.sampled[0] != self.sampled[1]
        return sampled or (self.greedy[0] is not None and self.greedy[0] != self.greedy[1])


class Summary(Struct, frozen=True, kw_only=True):
    """Many places taken together.

    Rates are null where nothing was compared: ``sampled_agreement`` of the ``sampled`` places at
    which a token was drawn, ``greedy_agreement`` of the ``greedy`` ones at which the likeliest
    token of then is known. ``first_changed`` is the first place at which a choice changed.
    """

    tokens: int
    sampled: int
    greedy: int
    sampled_agreement: float | None
    greedy_agreement: float | None
    first_changed: Place | None
    kl_mean: float
    kl_p99: float
    kl_max: float
    kl_exact: bool
    max_logprob_delta: float


class Strip(Struct, frozen=True, kw_only=True):
    """One of the worst places with those around it, in order; ``worst`` is its index there."""

    places: tuple[Place, ...]
    worst: int


class StateRegression(Struct, frozen=True, kw_only=True):
    """What became of one state; ``skipped`` says why nothing was computed, if so."""

    state_id: StateId
    summary: Summary | None
    worst: tuple[Strip, ...]
    failures: tuple[str, ...]
    skipped: str | None = None


class Limits(Struct, frozen=True, kw_only=True):
    """What a replay may differ in, for each state; null: in anything."""

    min_sampled_agreement: float | None = 1.0
    min_greedy_agreement: float | None = 1.0
    max_kl_mean: float | None = None
    max_kl_p99: float | None = None
    max_kl: float | None = None
    max_logprob_delta: float | None = None


class Regression(Struct, frozen=True, kw_only=True):
    """What became of a log.

    ``before`` names what is compared with: the log itself, or a baseline. ``model`` is what it was
    replayed with; ``differences`` are the facts in which its numerics differ from those before.
    ``failures`` name each limit that a state is beyond.
    """

    log: str
    before: str
    model: str
    fingerprint: str
    differences: dict[str, tuple[Any, Any]]
    limits: Limits
    overall: Summary | None
    states: tuple[StateRegression, ...]
    failures: tuple[str, ...]
