"""What a model is asked to do with a text, and what comes of it."""

from typing import Literal

from msgspec import Struct

from domain.beams import Candidates
from domain.config import (
    BeamParameters,
    Constraint,
    GenerationParameters,
    LogitsStorage,
    SamplingParameters,
)
from domain.content import Alternative, Scores
from domain.events import Beam, BeamStep, FinishReason
from domain.ids import Seed, TokenId


class Drawing(Struct, frozen=True, kw_only=True):
    """How tokens are drawn, and what is kept of each draw.

    ``branch`` and the token's absolute position, which is ``dropped`` more than its place among
    the tokens held, choose the random number. ``prior`` are tokens that the same call drew before:
    a constraint reads all of a call.
    """

    sampling: SamplingParameters
    seed: Seed
    branch: int = 0
    dropped: int = 0
    constraint: Constraint | None = None
    prior: tuple[TokenId, ...] = ()
    top_logprobs: int
    store_logits: LogitsStorage
    top_k_logits: int


class Drawn(Struct, frozen=True, kw_only=True):
    """One drawn token, with everything about it that is recorded. See :class:`Scores`."""

    token_id: TokenId
    logprob: float
    rank: int
    entropy: float
    logsumexp: float
    logits_digest: str
    sampling_probability: float
    alternatives: tuple[Alternative, ...]
    logits: bytes | None


class Step(Struct, frozen=True):
    """A token of a generation as it comes.

    Its branch, its place among the tokens held, what was drawn, the text it adds, its bytes where
    it is not whole characters by itself, and why the branch ends with it.
    """

    branch: int
    position: int
    drawn: Drawn
    text: str
    partial: bytes | None
    finish_reason: FinishReason | None


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """Continue ``tokens`` by at most ``max_new`` tokens (0 or more), in ``branches`` ways.

    A branch ends before that at a stop or at the model's end-of-sequence token; reaching
    ``context_size`` is an end of its own. Branch ``i`` draws as ``drawing`` says with ``i`` as
    the branch. ``said`` is the text that the same call added before: stop sequences see it.
    """

    tokens: tuple[TokenId, ...]
    parameters: GenerationParameters
    drawing: Drawing
    max_new: int
    context_size: int
    branches: int = 1
    said: str = ""


class BeamRequest(Struct, frozen=True, kw_only=True):
    """Continue ``tokens`` by beam search, by at most ``max_new`` tokens (1 or more)."""

    tokens: tuple[TokenId, ...]
    parameters: BeamParameters
    max_new: int


class BeamsFound(Struct, frozen=True, kw_only=True):
    """A whole beam search, and the sequences it found, best first."""

    steps: tuple[BeamStep, ...]
    beams: tuple[Beam, ...]


class Redraw(Struct, frozen=True, kw_only=True):
    """Asks what a generation would draw, given the tokens before, at some positions."""

    start: int
    stop: int
    drawing: Drawing


RowKind = Literal["top_k", "full", "raw"]
"""How a row of logits is kept: as :class:`domain.content.StoredLogits` says, or plain float32."""


class Reference(Struct, frozen=True, kw_only=True):
    """What is known of another distribution, to hold that of a place against.

    Of its token at least the ``logprob`` and, where it is told, the ``rank`` (0: the likeliest);
    with a ``row`` (logits of that ``kind``) also of others. ``logsumexp`` is that of all its
    logits.
    """

    token_id: TokenId
    logprob: float
    logsumexp: float
    rank: int | None = None
    kind: RowKind | None = None
    row: bytes | None = None


class Comparison(Struct, frozen=True, kw_only=True):
    """A place's distribution held against a :class:`Reference`.

    ``kl`` (nats) is the KL divergence of the reference from what is now, over the tokens the
    reference knows and all others as one: ``exact`` where it knows all, else no more than that.
    ``greedy`` are the likeliest tokens (ties: the lower id) of the reference, if it knows, and now.
    """

    kl: float
    exact: bool
    greedy: tuple[TokenId | None, TokenId]


class ScoreRequest(Struct, frozen=True, kw_only=True):
    """Score ``tokens[start:]`` (``start`` >= 1).

    ``redraws`` lie within these positions and do not overlap. Where ``candidates`` are given, also
    the tokens that a beam search with these parameters chooses from at each of the positions.
    ``references``, one for each position if any, are held against what is found there. ``keep``
    asks for the row of logits at each position, in that form (``top_k``: so many).
    """

    tokens: tuple[TokenId, ...]
    start: int
    redraws: tuple[Redraw, ...] = ()
    candidates: BeamParameters | None = None
    references: tuple[Reference, ...] = ()
    keep: RowKind | None = None
    keep_k: int = 0


class Scored(Struct, frozen=True, kw_only=True):
    """The scores of a run of given tokens, and what the redraws asked about gave, in order.

    ``candidates``, ``comparisons`` and ``rows`` have one entry for each position if they were
    asked for. ``tokens_reused`` had their K/V in the cache, ``tokens_computed`` did not.
    """

    scores: Scores
    redrawn: tuple[Drawn, ...]
    candidates: tuple[Candidates, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    rows: tuple[bytes, ...] = ()
    tokens_computed: int
    tokens_reused: int
