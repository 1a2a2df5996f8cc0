"""A regression in words and short numbers: what every kind of report says alike."""

from domain.ids import TokenId
from domain.regress import Place, StateRegression, Summary


def percent(rate: float | None) -> str:
    """A rate for people; only what is whole says 100 %."""
    if rate is None:
        return "-"
    return f"{rate:.0%}" if rate in (0.0, 1.0) else f"{min(max(rate, 1e-4), 0.9999):.2%}"


def short(value: float) -> str:
    """Three digits are enough to compare by."""
    return "0" if value == 0 else f"{value:.3g}"


def divergence(summary: Summary, value: float) -> str:
    """A KL divergence of a summary; ``≥`` where not all of the earlier distributions was kept."""
    return ("" if summary.kl_exact else "≥ ") + short(value)


def where(place: Place) -> str:
    """Which token of a history a place is."""
    run = f", {place.run}" if place.run else ""
    return f"version {place.version}{run}, token {place.token_position}"


def token(place: Place, token_id: TokenId | None) -> str:
    """A token as it can be read: its text, if that is known, and its id."""
    texts = {one.token_id: one.text for one in place.alternatives} | {place.token_id: place.text}
    if token_id is None:
        return "unknown"
    return f"{texts[token_id]!r} (#{token_id})" if token_id in texts else f"#{token_id}"


def choices(place: Place) -> list[tuple[str, TokenId | None, TokenId]]:
    """The choices that changed at a place: which it is, the token then, the token now."""
    found: list[tuple[str, TokenId | None, TokenId]] = []
    if place.sampled is not None and place.sampled[0] != place.sampled[1]:
        found.append(("drawn", *place.sampled))
    if place.greedy[0] is not None and place.greedy[0] != place.greedy[1]:
        found.append(("likeliest", *place.greedy))
    return found


def change(place: Place) -> str:
    """What changed at a place."""
    said: dict[str, str] = {}
    for kind, was, now in choices(place):
        pair = f"was {token(place, was)}, is {token(place, now)}"
        said[pair] = f"{said[pair]} and {kind}" if pair in said else kind
    changes = "; ".join(f"{kinds} {pair}" for pair, kinds in said.items())
    return f"{where(place)}: {changes or 'the same choice'}"


def first_change(state: StateRegression) -> str | None:
    """The first choice of a state that changed, with the texts of its tokens where known."""
    first = None if state.summary is None else state.summary.first_changed
    if first is None:
        return None
    shown = (place for strip in state.worst for place in strip.places)
    at = (first.position, first.run, first.token_position)
    return change(
        next((one for one in shown if (one.position, one.run, one.token_position) == at), first)
    )


def only_skipped(state: StateRegression) -> bool:
    """Whether a state was skipped, and may be."""
    return state.skipped is not None and not state.failures


def explain(state: StateRegression) -> str:
    """What became of a state, in a few lines."""
    if state.summary is None:
        return f"state {state.state_id} was not replayed: {state.skipped}"
    found = state.summary
    lines = [
        f"state {state.state_id}, {found.tokens} tokens",
        *(f"  beyond its limit: {failure}" for failure in state.failures),
        *([f"  first change: {first}"] if (first := first_change(state)) else []),
        f"  agreement: drawn {percent(found.sampled_agreement)} of {found.sampled},"
        f" likeliest {percent(found.greedy_agreement)} of {found.greedy}",
        f"  KL (nats): mean {divergence(found, found.kl_mean)},"
        f" p99 {divergence(found, found.kl_p99)}, max {divergence(found, found.kl_max)};"
        f" largest |delta logprob| {short(found.max_logprob_delta)}",
    ]
    return "\n".join(lines)
