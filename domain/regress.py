"""A recorded history under another model, library, number format or machine: what changed.

Every recorded token is computed again with the tokens before it as they are recorded (teacher
forcing), so that one changed choice does not hide what comes after it.
"""

import heapq
import math
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import asdict, force_setattr

from domain.content import Alternative
from domain.ids import Position, StateId, TokenId, Version
from domain.work import RowKind

STRIPS: Final = 3
"""So many of the worst places of a state are shown."""
AROUND: Final = 8
"""So many places before each of them, and after it, are shown with it."""


class Place(Struct, frozen=True, kw_only=True):
    """One token of a history and what became of it.

    ``position`` is its event's place in the log, ``run`` which of the event's texts it is in (""
    where there is but one), ``token_position`` its absolute place in the state. ``sampled`` are the
    tokens drawn then and now (null for text that was given, and for beams), ``greedy`` the
    likeliest ones (then: null where it was not kept). ``kl`` (nats) is the KL divergence of what
    was then from what is now, over the tokens that are known of then and all others as one: exact
    (``kl_exact``) where all were kept, else no more than it; infinite where it is no number.
    ``alternatives`` are the likeliest tokens now, where they were asked for.
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

    def __post_init__(self) -> None:
        """What cannot be measured is not near anything."""
        if math.isnan(self.kl):
            force_setattr(self, "kl", math.inf)

    @property
    def logprob_delta(self) -> float:
        """How far the logprob moved; infinite where that is no number."""
        was, now = self.logprobs
        delta = 0.0 if was == now else abs(now - was)
        return math.inf if math.isnan(delta) else delta

    @property
    def changed(self) -> bool:
        """Whether another token would be drawn, or is the likeliest, now."""
        sampled = self.sampled is not None and self.sampled[0] != self.sampled[1]
        return sampled or (self.greedy[0] is not None and self.greedy[0] != self.greedy[1])


class Summary(Struct, frozen=True, kw_only=True):
    """Many places taken together.

    Rates are null where nothing was compared: ``sampled_agreement`` of the ``sampled`` places at
    which a token was drawn, ``greedy_agreement`` of the ``greedy`` ones at which the likeliest
    token of then is known. ``first_changed`` is the first place at which a choice changed. A place
    that is no number makes what it is part of infinite (null in JSON).
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
    """What became of one state; ``skipped`` says why nothing was computed, if so.

    It fails beyond a limit, and where a baseline has it and it was skipped.
    """

    state_id: StateId
    summary: Summary | None
    worst: tuple[Strip, ...]
    failures: tuple[str, ...]
    skipped: str | None = None


class Limits(Struct, frozen=True, kw_only=True):
    """What a replay may differ in, for each state; null: in anything.

    Raises:
        ValueError: one is below 0, infinite or no number, or a rate above 1.
    """

    min_sampled_agreement: float | None = 1.0
    min_greedy_agreement: float | None = 1.0
    max_kl_mean: float | None = None
    max_kl_p99: float | None = None
    max_kl: float | None = None
    max_logprob_delta: float | None = None

    def __post_init__(self) -> None:
        """Refuse what nothing could be held to."""
        for name, limit in asdict(self).items():
            most = 1.0 if name.startswith("min") else sys.float_info.max
            if limit is not None and not 0 <= limit <= most:
                least = "from 0 to 1" if most == 1 else "of 0 or more"
                raise ValueError(f"{name} must be a number {least}, not {limit}")


class Regression(Struct, frozen=True, kw_only=True):
    """What became of a log.

    ``before`` names what is compared with: the log itself, or a baseline. ``model`` is what it was
    replayed with; ``differences`` are the facts in which its numerics differ from those before.
    ``failures`` name each limit that a state is beyond, and each state of the baseline that was
    skipped.
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


# summaries


class Tally:
    """Adds places up. Of each it keeps its divergence alone, to know the 99th percentile."""

    def __init__(self) -> None:
        self._divergences = array("d")
        self._sampled = self._sampled_alike = self._greedy = self._greedy_alike = 0
        self._first: Place | None = None
        self._max_delta = 0.0
        self._exact = True

    def add(self, places: Iterable[Place]) -> None:
        """Take in some places."""
        for place in places:
            self._divergences.append(place.kl)
            self._exact &= place.kl_exact
            self._max_delta = max(self._max_delta, place.logprob_delta)
            if place.sampled is not None:
                self._sampled += 1
                self._sampled_alike += place.sampled[0] == place.sampled[1]
            if place.greedy[0] is not None:
                self._greedy += 1
                self._greedy_alike += place.greedy[0] == place.greedy[1]
            if place.changed and (self._first is None or _order(place) < _order(self._first)):
                self._first = place

    def summary(self) -> Summary | None:
        """All of them taken together, if there were any."""
        count = len(self._divergences)
        if not count:
            return None
        ranked = sorted(self._divergences)
        return Summary(
            tokens=count,
            sampled=self._sampled,
            greedy=self._greedy,
            sampled_agreement=self._sampled_alike / self._sampled if self._sampled else None,
            greedy_agreement=self._greedy_alike / self._greedy if self._greedy else None,
            first_changed=self._first,
            kl_mean=math.fsum(ranked) / count,
            kl_p99=ranked[math.ceil(0.99 * count) - 1],  # the nearest rank
            kl_max=ranked[-1],
            kl_exact=self._exact,
            max_logprob_delta=self._max_delta,
        )


def _order(place: Place) -> tuple[int, int]:
    """Earlier in the log, then in the text."""
    return (place.position, place.token_position)


def failures(summary: Summary, limits: Limits) -> tuple[str, ...]:
    """The limits that a summary is beyond, in words."""
    least = {
        "sampled agreement": (summary.sampled_agreement, limits.min_sampled_agreement),
        "greedy agreement": (summary.greedy_agreement, limits.min_greedy_agreement),
    }
    most = {
        "mean KL": (summary.kl_mean, limits.max_kl_mean),
        "p99 KL": (summary.kl_p99, limits.max_kl_p99),
        "max KL": (summary.kl_max, limits.max_kl),
        "max |delta logprob|": (summary.max_logprob_delta, limits.max_logprob_delta),
    }
    below = [
        f"{name} {value} is below {limit}"
        for name, (value, limit) in least.items()
        if value is not None and limit is not None and not value >= limit
    ]
    above = [
        f"{name} {value} is above {limit}"
        for name, (value, limit) in most.items()
        if limit is not None and not value <= limit
    ]
    return (*below, *above)


def merged(differences: Iterable[Mapping[str, tuple[Any, Any]]]) -> dict[str, tuple[Any, Any]]:
    """Differences of several pairs of fingerprints as one; several values of a fact are a list."""
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    for one in differences:
        for name, pair in one.items():
            for values, value in zip(found.setdefault(name, ([], [])), pair, strict=True):
                if value not in values:
                    values.append(value)
    return {name: (_single(was), _single(now)) for name, (was, now) in sorted(found.items())}


def _single(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


# the worst places


class Span(Struct, frozen=True):
    """A strip to be made: places ``start`` to ``stop`` of a text, of which ``worst`` is why."""

    text: int
    start: int
    stop: int
    worst: int


def worst(texts: Sequence[Sequence[Place]]) -> list[Span]:
    """The worst places of the texts of a state, worst first, each with those around it.

    Those with a changed choice come before those with only a divergence. Spans do not overlap.
    """
    ranked = sorted(
        (not place.changed, -place.kl, text, index)
        for text, line in enumerate(texts)
        for index, place in enumerate(line)
        if place.changed or place.kl > 0
    )
    taken: set[tuple[int, int]] = set()
    found: list[Span] = []
    for _, _, text, index in ranked:
        if len(found) == STRIPS:
            break
        if (text, index) in taken:
            continue
        start, stop = index, index + 1
        while start > max(0, index - AROUND) and (text, start - 1) not in taken:
            start -= 1
        while stop < min(len(texts[text]), index + AROUND + 1) and (text, stop) not in taken:
            stop += 1
        taken.update((text, at) for at in range(start, stop))
        found.append(Span(text, start, stop, index))
    return found


def likeliest(kind: RowKind, row: bytes, count: int) -> list[tuple[TokenId, float]]:
    """The tokens with the largest logits of a kept row that is not compressed, largest first."""
    if kind == "top_k":
        size = len(row) // 8
        ids, values = struct.unpack(f"<{size}i", row[: 4 * size]), row[4 * size :]
        logits = struct.unpack(f"<{size}f", values)
        return [(TokenId(token), value) for token, value in zip(ids, logits, strict=True)][:count]
    raw = struct.unpack(f"<{len(row) // 4}f", row)
    return [
        (TokenId(token), raw[token])
        for token in heapq.nsmallest(count, range(len(raw)), key=lambda token: -raw[token])
    ]
