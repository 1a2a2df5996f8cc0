"""What could come next if something were otherwise: two passes, one of them edited."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from domain.analysis.intervene import InterveneFacts, Shift, added_to, check_edits, replaced
from domain.analysis.parameters import InterveneParameters
from domain.analysis.result import Result
from domain.config import SamplingParameters
from domain.errors import invalid
from domain.ids import TokenId
from infra.engine.analysis.next import Said, distribution
from infra.engine.analysis.tensors import packed
from infra.engine.observing import Edits, Look
from infra.engine.sampling.comparing import divergence
from infra.engine.sampling.sampler import Row
from infra.engine.waiting import worked_out

if TYPE_CHECKING:
    from infra.engine.language_model import TransformersModel


async def intervene(
    model: "TransformersModel",
    tokens: tuple[TokenId, ...],
    sampling: SamplingParameters,
    parameters: InterveneParameters,
    *,
    private: bool,
) -> Result:
    """The next token's distribution as it is, and as it would be with what is edited."""
    check_edits(parameters, model.dimensions, len(tokens), model.vocabulary_size)
    edited = replaced(parameters, tokens)
    original_logits = await _logits(model, tokens, Edits(), private=private)
    edited_logits = await _logits(model, edited, _edits(parameters, len(tokens)), private=private)
    if not np.isfinite(edited_logits).all():
        raise invalid("add", "is so large that nothing the model computes after it is a number")
    facts = await worked_out(
        _facts, model, (tokens, edited), (original_logits, edited_logits), sampling, parameters
    )
    tensors = tuple(
        packed(name, torch.from_numpy(row), start=len(tokens), end=len(tokens) + 1, inline=False)
        for name, row in (("original_logits", original_logits), ("edited_logits", edited_logits))
    )
    return Result(facts=facts, tensors=tensors)


async def _logits(
    model: "TransformersModel", tokens: tuple[TokenId, ...], edits: Edits, *, private: bool
) -> Row:
    look = Look(tokens=tokens, start=len(tokens) - 1, logits=True, edits=edits)
    seen = await model.observe(look, private=private)
    assert seen.logits is not None
    row: Row = seen.logits.numpy()
    return row


def _edits(parameters: InterveneParameters, held: int) -> Edits:
    silenced: defaultdict[int, tuple[int, ...]] = defaultdict(tuple)
    for zeroed in parameters.zero_heads:
        silenced[zeroed.layer] += (zeroed.head,)
    added: defaultdict[int, tuple[tuple[range, Tensor], ...]] = defaultdict(tuple)
    for addition in parameters.add:
        vector = torch.tensor(addition.vector, dtype=torch.float32)
        added[addition.layer] += ((added_to(addition, held), vector),)
    return Edits(silenced=dict(silenced), added=dict(added))


def _facts(
    model: "TransformersModel",
    texts: tuple[Sequence[TokenId], Sequence[TokenId]],
    rows: tuple[Row, Row],
    sampling: SamplingParameters,
    parameters: InterveneParameters,
) -> InterveneFacts:
    """What is found, of the original and the edited one."""
    said = Said(rows[0]), Said(rows[1])
    original, edited = (
        distribution(model, each, text, sampling, parameters.top_k)
        for each, text in zip(said, texts, strict=True)
    )
    greedy = (original.top[0].token_id, edited.top[0].token_id)
    likeliest = dict.fromkeys(each.token_id for each in (*edited.top, *original.top))
    return InterveneFacts(
        position=len(texts[0]),
        original=original,
        edited=edited,
        kl=divergence(rows[1], rows[0]),
        greedy=greedy,
        greedy_changed=len(set(greedy)) > 1,
        shifts=_shifts(model, texts[0], said, list(likeliest)),
    )


def _shifts(
    model: "TransformersModel",
    before: Sequence[TokenId],
    said: tuple[Said, Said],
    tokens: Sequence[TokenId],
) -> tuple[Shift, ...]:
    """How the likelihoods of tokens after those before differ between original and edited."""
    original, edited = said
    columns = (
        *(original.logprobs(tokens), edited.logprobs(tokens)),
        *(original.ranks[tokens], edited.ranks[tokens]),
    )
    shifts = (
        Shift.of(
            model.fragment(before, (token,)),
            original_logprob=was,
            edited_logprob=now,
            original_rank=rank_before,
            edited_rank=rank,
        )
        for token, was, now, rank_before, rank in zip(
            tokens, *(each.tolist() for each in columns), strict=True
        )
    )
    return tuple(sorted(shifts, key=lambda shift: shift.edited_rank))
