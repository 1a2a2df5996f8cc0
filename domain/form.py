"""Whether a model can be asked about an event at all: what comes before any comparison."""

from collections.abc import Sequence
from typing import Any

from domain.config import LogitsParameters
from domain.events import (
    BeamsGenerated,
    Continuation,
    ContinuationsGenerated,
    Recorded,
    StateCreated,
    TokensGenerated,
)
from domain.ids import TokenId
from domain.replay import Run, place_of, runs_of
from domain.report import Divergence, divergence


def compare_form(
    recorded: Recorded, vocabulary_size: int, context_size: int, *, scored: bool = True
) -> Divergence | None:
    """Whether a model can be asked about an event at all.

    Every token it names is in the vocabulary, it has runs, which have tokens where none is no
    result and fit the model's context, whatever is recorded of each token is there once for each,
    and the steps of a search follow each other. Of a model that scores no tokens (``scored``) no
    scores are recorded.
    """
    event = recorded.event
    runs = (("", event),) if isinstance(event, StateCreated) else runs_of(recorded)
    found = _compare_parameters(recorded, vocabulary_size)
    if isinstance(event, ContinuationsGenerated | BeamsGenerated) and not runs:
        kind = "beams" if isinstance(event, BeamsGenerated) else "continuations"
        found = found or divergence(recorded, f"len({kind})", 0, "at least 1")
    for name, run in runs:
        found = found or _compare_lengths(recorded, name, run, scored=scored)
        found = found or _compare_run(recorded, name, run, vocabulary_size, context_size)
    return found or _compare_steps(recorded, vocabulary_size, context_size)


def _compare_lengths(
    recorded: Recorded, name: str, run: StateCreated | Run, *, scored: bool
) -> Divergence | None:
    count = len(run.content.tokens)
    for field, values in _of_each_token(run).items():
        wanted = 0 if field.startswith("scores.") and not scored else count
        if len(values) != wanted:
            return divergence(recorded, f"len({name}{field})", len(values), wanted)
    return None


def _compare_run(
    recorded: Recorded, name: str, run: StateCreated | Run, vocabulary_size: int, context_size: int
) -> Divergence | None:
    count, room = len(run.content.tokens), context_size - place_of(recorded)
    least = 0 if isinstance(run, TokensGenerated | Continuation) else 1
    if count > room or count < least:
        possible = f"at most {room}" if count > room else f"at least {least}"
        return divergence(recorded, f"len({name}content.tokens)", count, possible)
    field = f"{name}content.tokens"
    return _compare_vocabulary(recorded, field, run.content.tokens, vocabulary_size, range(count))


def _of_each_token(run: StateCreated | Run) -> dict[str, Sequence[Any]]:
    """Fields that have one value for each token of a run."""
    fields: dict[str, Sequence[Any]] = {"content.ends": run.content.ends}
    if not isinstance(run, StateCreated):
        scores = run.scores.__struct_fields__
        fields |= {f"scores.{name}": getattr(run.scores, name) for name in scores}
    if isinstance(run, TokensGenerated | Continuation):
        fields["sampling_probabilities"] = run.sampling_probabilities
        fields["alternatives"] = run.alternatives
    return fields


def _compare_vocabulary(
    recorded: Recorded, field: str, tokens: Sequence[TokenId], size: int, at: Sequence[int | None]
) -> Divergence | None:
    """Whether tokens are in the vocabulary; ``at`` is the index of each in the text, if it has."""
    for token, index in zip(tokens, at, strict=True):
        if not 0 <= token < size:
            possible = f"a token from 0 to {size - 1}"
            return divergence(recorded, field, token, possible, index)
    return None


def _compare_parameters(recorded: Recorded, vocabulary_size: int) -> Divergence | None:
    """Whether the tokens that parameters name are in the vocabulary, and beams fit their groups."""
    logits: LogitsParameters
    match recorded.event:
        case TokensGenerated(parameters=asked) | ContinuationsGenerated(parameters=asked):
            field, logits = "parameters.sampling", asked.sampling
        case BeamsGenerated(parameters=asked):
            beams, groups = asked.num_beams, asked.num_beam_groups
            if beams % groups:
                possible = f"a divisor of {beams}"
                return divergence(recorded, "parameters.num_beam_groups", groups, possible)
            field, logits = "parameters.logits", asked.logits
        case _:
            return None
    named = {
        f"{field}.logit_bias": tuple(logits.logit_bias),
        f"{field}.bad_words_ids": sum(logits.bad_words_ids, ()),
        "parameters.stop_token_ids": asked.stop_token_ids,
    }
    for name, tokens in named.items():
        nowhere = (None,) * len(tokens)
        found = _compare_vocabulary(recorded, name, tokens, vocabulary_size, nowhere)
        if found is not None:
            return found
    return None


def _compare_steps(
    recorded: Recorded, vocabulary_size: int, context_size: int
) -> Divergence | None:
    """Whether the beams of each step go on from beams of the step before, and fit the context."""
    event = recorded.event
    if not isinstance(event, BeamsGenerated):
        return None
    most, before = context_size - place_of(recorded) - 1, 1
    if len(event.steps) > most:
        return divergence(recorded, "len(steps)", len(event.steps), f"at most {most}")
    for index, step in enumerate(event.steps):
        name, count = f"steps[{index}]", len(step.tokens)
        if len(step.parents) != count:
            return divergence(recorded, f"len({name}.parents)", len(step.parents), count)
        for parent in step.parents:
            if not 0 <= parent < before:
                possible = f"a beam from 0 to {before - 1}"
                return divergence(recorded, f"{name}.parents", parent, possible, index)
        at = (index,) * count
        found = _compare_vocabulary(recorded, f"{name}.tokens", step.tokens, vocabulary_size, at)
        if found is not None:
            return found
        before = count
    return None
