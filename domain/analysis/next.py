"""What could come after a text: the distribution of the next token."""

from msgspec import Struct

from domain.content import ToldToken


class Candidate(ToldToken, frozen=True, kw_only=True):
    """A token that could come next.

    ``logprob`` (natural logarithm), ``probability`` and ``rank`` (0: the likeliest, ties by lower
    id) are of the model's raw distribution; with ``sampling_probability`` it would be drawn.
    """

    logprob: float
    probability: float
    rank: int
    sampling_probability: float


class Distribution(Struct, frozen=True, kw_only=True):
    """A distribution of the next token, raw and as it would be sampled.

    ``entropy`` (nats) and ``logsumexp`` are of the raw logits. ``top`` are the likeliest tokens,
    ``sampled`` those that are likeliest to be drawn, out of ``sampled_from`` that can be: none
    where every token is ruled out.
    """

    entropy: float
    logsumexp: float
    top: tuple[Candidate, ...]
    sampled: tuple[Candidate, ...]
    sampled_from: int


class NextFacts(Distribution, frozen=True, kw_only=True):
    """The distribution of the token at ``position``, the one after the last."""

    position: int
