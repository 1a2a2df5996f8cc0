"""Holding what events claim against what came out when it was computed again."""

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from domain.beams import BeamSearch, Candidates, ends_of
from domain.chain import blobs_digest
from domain.content import Scores
from domain.events import (
    BeamsGenerated,
    BeamStep,
    Continuation,
    Recorded,
    StateCreated,
    TokensGenerated,
)
from domain.fingerprint import Fingerprint
from domain.ids import Position, TokenId
from domain.replay import Claim, Passage, place_of, runs_of
from domain.report import Differences, Divergence, Drift, divergence
from domain.search_tree import SearchTree
from domain.work import Drawn, Scored


class Redone(Struct, frozen=True):
    """What came out for the tokens of one claim.

    ``drawn`` is what would be drawn in their place now; nothing for tokens that were not.
    """

    claim: Claim
    scores: Scores
    drawn: tuple[Drawn, ...]


class Evidence(Struct, frozen=True):
    """Everything that came out for one event: its claims, and the passages of its beam search."""

    redone: list[Redone]
    searched: list[tuple[Passage, Scored]]

    @property
    def recorded(self) -> Recorded:
        """The event."""
        if self.redone:
            return self.redone[0].claim.recorded
        searched = self.searched[0][0].search
        assert searched is not None
        return searched


def by_event(results: Iterable[tuple[Passage, Scored]]) -> dict[Position, Evidence]:
    """What came out for each event, by its place in the log."""
    found: dict[Position, Evidence] = {}
    for passage, scored in results:
        for one in _redone(passage, scored):
            position = one.claim.recorded.position
            found.setdefault(position, Evidence([], [])).redone.append(one)
        if passage.search:
            position = passage.search.position
            found.setdefault(position, Evidence([], [])).searched.append((passage, scored))
    return found


def _redone(passage: Passage, scored: Scored) -> list[Redone]:
    found, drawn = [], 0
    for claim in passage.claims:
        fields = Scores.__struct_fields__
        run = slice(claim.place - passage.start, claim.end - passage.start)
        scores = Scores(**{name: getattr(scored.scores, name)[run] for name in fields})
        count = len(claim.tokens) if claim.drawing else 0
        found.append(Redone(claim, scores, scored.redrawn[drawn : drawn + count]))
        drawn += count
    return found


def compare(
    recorded: Recorded, evidence: Evidence, eos_token_ids: frozenset[TokenId]
) -> Divergence | None:
    """The first difference between what an event claims and its re-execution, if there is one."""
    found = _compare_search(recorded, evidence, eos_token_ids)
    for redone in evidence.redone:
        found = found or _compare_run(redone)
    return found or _compare_stored(recorded, evidence.redone)


def _compare_run(redone: Redone) -> Divergence | None:
    claim = redone.claim
    for name in Scores.__struct_fields__:
        field = f"{claim.name}scores.{name}"
        told = getattr(claim.run.scores, name)
        found = _first(claim.recorded, field, told, getattr(redone.scores, name))
        if found is not None:
            return _name_choice(redone, found) if name == "logprobs" else found
    return _compare_choices(redone)


def _name_choice(redone: Redone, found: Divergence) -> Divergence:
    """A changed token shows first in its logprob: say it where it is the token."""
    claim = redone.claim
    if not redone.drawn or found.token_position is None:
        return found
    index = found.token_position - _start(claim.recorded)
    token, drawn = claim.tokens[index], redone.drawn[index].token_id
    if token == drawn:
        return found
    return divergence(claim.recorded, f"{claim.name}content.tokens", token, drawn, index)


def _compare_choices(redone: Redone) -> Divergence | None:
    claim, run, drawn = redone.claim, redone.claim.run, redone.drawn
    if not isinstance(run, TokensGenerated | Continuation):
        return None
    found: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
        "content.tokens": (run.content.tokens, [d.token_id for d in drawn]),
        "sampling_probabilities": (
            run.sampling_probabilities,
            [d.sampling_probability for d in drawn],
        ),
        "alternatives": (run.alternatives, [d.alternatives for d in drawn]),
    }
    for name, (told, actual) in found.items():
        if (different := _first(claim.recorded, claim.name + name, told, actual)) is not None:
            return different
    return None


def _compare_stored(recorded: Recorded, redone: Sequence[Redone]) -> Divergence | None:
    stored = getattr(recorded.event, "stored_logits", None)
    if stored is None:
        return None
    drawn = [drawn for one in redone for drawn in one.drawn]
    actual = blobs_digest(tuple(one.logits for one in drawn if one.logits is not None))
    if stored.digest == actual:
        return None
    return divergence(recorded, "stored_logits.digest", stored.digest, actual)


# beam search


def _compare_search(
    recorded: Recorded, evidence: Evidence, eos_token_ids: frozenset[TokenId]
) -> Divergence | None:
    event = recorded.event
    if not isinstance(event, BeamsGenerated):
        return None
    tree = SearchTree(event.steps)
    rows = _rows(tree, place_of(recorded), evidence.searched)
    search = BeamSearch(
        event.parameters,
        eos_token_ids=ends_of(event.parameters, eos_token_ids),
        max_new=min(event.parameters.max_tokens, evidence.searched[0][0].room),
    )
    for index, running in enumerate(tree.running):
        told = event.steps[index] if index < len(event.steps) else None
        step = search.step([rows[node] for node in running])
        if (found := _compare_step(recorded, index, told, step)) is not None:
            return found
    return _compare_found(recorded, event, search)


def _rows(
    tree: SearchTree, held: int, searched: Sequence[tuple[Passage, Scored]]
) -> dict[int, Candidates]:
    """What each beam of a search chose from."""
    rows: dict[int, Candidates] = {}
    for passage, scored in searched:
        for place, node in enumerate(tree.walk(passage.tokens[held:]), start=held):
            if place >= passage.start:
                rows[node] = scored.candidates[place - passage.start]
    return rows


def _compare_step(
    recorded: Recorded, index: int, told: BeamStep | None, step: BeamStep | None
) -> Divergence | None:
    """Hold step ``index`` against what the search does now; null stands for its end."""
    match told, step:
        case BeamStep(), BeamStep():
            for field in ("tokens", "parents"):
                was, now = getattr(told, field), getattr(step, field)
                if was != now:
                    return divergence(recorded, f"steps[{index}].{field}", was, now, index)
            return None
        case None, None:
            return None
        case _:
            return divergence(recorded, f"steps[{index}]", told, step, index)


def _compare_found(
    recorded: Recorded, event: BeamsGenerated, search: BeamSearch
) -> Divergence | None:
    best = search.best()
    if len(event.beams) != len(best):
        return divergence(recorded, "len(beams)", len(event.beams), len(best))
    for index, (beam, now) in enumerate(zip(event.beams, best, strict=True)):
        field = f"beams[{index}].content.tokens"
        if (found := _first(recorded, field, beam.content.tokens, now.tokens)) is not None:
            return found
    for index, (beam, now) in enumerate(zip(event.beams, best, strict=True)):
        for field in ("score", "finished"):
            was, is_now = getattr(beam, field), getattr(now, field)
            if was != is_now:
                return divergence(recorded, f"beams[{index}].{field}", was, is_now)
    return None


# drift


def drift(
    recorded: Recorded,
    evidence: Evidence,
    eos_token_ids: frozenset[TokenId],
    differences: Differences,
) -> Drift:
    """How far an event is from its re-execution under another fingerprint."""
    deltas = [
        abs(was - now)
        for one in evidence.redone
        for was, now in zip(one.claim.run.scores.logprobs, one.scores.logprobs, strict=True)
    ]
    changed = [
        _start(recorded) + index
        for one in evidence.redone
        for index, (was, now) in enumerate(zip(one.claim.tokens, one.drawn, strict=False))
        if was != now.token_id
    ]
    searched = _compare_search(recorded, evidence, eos_token_ids)
    if searched is not None and searched.token_position is not None:
        changed.append(searched.token_position)
    return Drift(
        position=recorded.position,
        state_id=recorded.state_id,
        version=recorded.version,
        recorded_fingerprint=recorded.row.fingerprint,
        max_logprob_delta=max(deltas, default=0.0),
        first_changed=min(changed, default=None),
        differences=differences,
    )


def differences(recorded: Fingerprint, now: Fingerprint) -> Differences:
    """The facts in which two fingerprints differ; what one of them does not name is null."""
    old, new = recorded.facts(), now.facts()
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def text_before(
    found: Divergence, recorded: Recorded, held: tuple[TokenId, ...]
) -> tuple[TokenId, ...] | None:
    """The text before the token that a divergence names; ``held`` is what the state held.

    Null where it names none, or one of a step of a search, which is in no single text.
    """
    if found.token_position is None:
        return None
    count, event = found.token_position - _start(recorded), recorded.event
    runs = (("", event),) if isinstance(event, StateCreated) else runs_of(recorded)
    for name, run in runs:
        if found.field.startswith(name):
            return held + run.content.tokens[:count]
    return None


def _start(recorded: Recorded) -> int:
    start: int = getattr(recorded.event, "start", 0)
    return start


def _first(
    recorded: Recorded, field: str, expected: Sequence[Any], actual: Sequence[Any]
) -> Divergence | None:
    """The first index at which two runs of values differ."""
    if len(expected) != len(actual):
        return divergence(recorded, f"len({field})", len(expected), len(actual))
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a != b:
            return divergence(recorded, field, a, b, index)
    return None
