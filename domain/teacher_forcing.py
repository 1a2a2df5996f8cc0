"""Recorded passages computed again, each token given those before it as they are recorded.

What is found of each place is held against what was known of it before: by the log, or by an
earlier replay that was kept as a baseline (Williams and Zipser 1989 call it teacher forcing).
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from msgspec import Struct

from domain.ids import Position, TokenId, Version
from domain.regress import Place
from domain.replay import Claim, Passage, runs_of
from domain.work import Redraw, Reference, RowKind, Scored, ScoreRequest


class Before(Struct, frozen=True, kw_only=True):
    """What is known of one place from before: from the log, or from a baseline.

    The place is named as in :class:`Place`, by what is the same in every log that has the state.
    ``sampled`` is the token that was drawn, if one was.
    """

    version: Version
    run: str
    token_position: int
    sampled: TokenId | None
    reference: Reference

    @property
    def place(self) -> tuple[Version, str, int, TokenId]:
        """What names the place, and the token that is there."""
        return (self.version, self.run, self.token_position, self.reference.token_id)


# what is asked, and what is known from before


def request(
    passage: Passage, before: Sequence[Before], keep: RowKind = "top_k", keep_k: int = 0
) -> ScoreRequest:
    """What a model is asked about a passage; ``keep`` as in :class:`ScoreRequest`."""
    return ScoreRequest(
        tokens=passage.tokens,
        start=passage.start,
        redraws=tuple(map(_nothing_kept, passage.request().redraws)),
        references=tuple(one.reference for one in before),
        keep=keep,
        keep_k=keep_k,
    )


def _nothing_kept(redraw: Redraw) -> Redraw:
    drawing = msgspec.structs.replace(redraw.drawing, top_logprobs=0, store_logits="none")
    return msgspec.structs.replace(redraw, drawing=drawing)


def before_in_log(passage: Passage, logits: Mapping[Position, Sequence[bytes]]) -> list[Before]:
    """What the log says of each place; ``logits`` are the blobs beside events, where there are."""
    return [
        Before(
            version=claim.recorded.version,
            run=claim.name,
            token_position=_token_position(claim, index),
            sampled=token if claim.drawing else None,
            reference=Reference(
                token_id=token,
                logprob=claim.run.scores.logprobs[index],
                logsumexp=claim.run.scores.logsumexps[index],
                rank=claim.run.scores.ranks[index],
                kind=kind,
                row=row,
            ),
        )
        for claim in passage.claims
        for index, (token, (kind, row)) in enumerate(
            zip(claim.tokens, _stored_rows(claim, logits), strict=True)
        )
    ]


def before_next_time(
    passage: Passage, scored: Scored, before: Sequence[Before], kind: RowKind
) -> list[Before]:
    """What is found of each place now, for a baseline; ``before`` names the places."""
    now = zip(scored.scores.logprobs, scored.scores.logsumexps, scored.rows, strict=True)
    return [
        Before(
            version=one.version,
            run=one.run,
            token_position=one.token_position,
            sampled=sampled,
            reference=Reference(
                token_id=one.reference.token_id,
                logprob=logprob,
                logsumexp=logsumexp,
                kind=kind,
                row=row,
            ),
        )
        for one, sampled, (logprob, logsumexp, row) in zip(
            before, _sampled(passage, scored), now, strict=True
        )
    ]


def _token_position(claim: Claim, index: int) -> int:
    start: int = getattr(claim.recorded.event, "start", 0)
    return start + index


def _stored_rows(
    claim: Claim, logits: Mapping[Position, Sequence[bytes]]
) -> Sequence[tuple[RowKind | None, bytes | None]]:
    """The row of logits kept of each token of a claim; of none where they were let go of."""
    event, blobs = claim.recorded.event, logits.get(claim.recorded.position)
    stored = getattr(event, "stored_logits", None)
    if not blobs or stored is None:
        return [(None, None)] * len(claim.tokens)
    first = 0  # blobs come run after run
    for name, run in runs_of(claim.recorded):
        if name == claim.name:
            break
        first += len(run.content.tokens)
    return [(stored.kind, row) for row in blobs[first : first + len(claim.tokens)]]


# places


def places(passage: Passage, before: Sequence[Before], scored: Scored) -> list[Place]:
    """What became of each place of a passage."""
    described = ((claim, piece) for claim in passage.claims for piece in claim.run.content.pieces())
    found = zip(scored.scores.logprobs, scored.comparisons, strict=True)
    return [
        Place(
            position=claim.recorded.position,
            version=one.version,
            run=one.run,
            token_position=one.token_position,
            token_id=one.reference.token_id,
            text=text,
            sampled=None if one.sampled is None or now is None else (one.sampled, now),
            greedy=comparison.greedy,
            logprobs=(one.reference.logprob, logprob),
            kl=comparison.kl,
            kl_exact=comparison.exact,
        )
        for one, (claim, text), now, (logprob, comparison) in zip(
            before, described, _sampled(passage, scored), found, strict=True
        )
    ]


def _sampled(passage: Passage, scored: Scored) -> Iterator[TokenId | None]:
    """What would be drawn now at each place; nothing where nothing was."""
    drawn = iter(scored.redrawn)
    for claim in passage.claims:
        for _ in claim.tokens:
            yield next(drawn).token_id if claim.drawing else None
