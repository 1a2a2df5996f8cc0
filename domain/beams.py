"""Beam search over the likeliest tokens of each row: a pure function, without logits or tensors.

It finds what transformers' ``generate`` finds. That one marks as impossible what it scores with
-1e9; here it does not exist: where fewer tokens may be chosen than there are beams, fewer beams
run, and where there are none at all, the search ends with what it has.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from domain.config import BeamParameters
from domain.events import BeamStep
from domain.ids import TokenId


class Candidate(NamedTuple):
    """A token that may come next, and the logarithm of its probability after processing."""

    token: TokenId
    logprob: float


Candidates = tuple[Candidate, ...]
"""The likeliest tokens of one row, likeliest first, ties by lower id; every logprob is finite."""


def ends_of(parameters: BeamParameters, eos_token_ids: frozenset[TokenId]) -> frozenset[TokenId]:
    """All tokens that end a text of a beam search."""
    eos = frozenset() if parameters.ignore_eos else eos_token_ids
    return eos | frozenset(parameters.stop_token_ids)


def candidates_needed(parameters: BeamParameters, eos_count: int) -> int:
    """How many candidates of each row decide the search, where ``eos_count`` tokens end a text.

    The best ``num_beams`` tokens that go on, each token that does not, and for a group as many
    more as the groups before it can make pay: all that together is ``num_beams`` of all groups.
    """
    return parameters.num_beams + eos_count


class Hypothesis(NamedTuple):
    """A sequence that was found: its new tokens, and what it is ranked by.

    ``finished`` says that its last token ended it, not the number of tokens asked for.
    """

    tokens: tuple[TokenId, ...]
    score: float
    finished: bool


class _Beam(NamedTuple):
    """A sequence that goes on: the sum of its logprobs, and which row of candidates is its own."""

    row: int
    tokens: tuple[TokenId, ...]
    logprob: float


class BeamSearch:
    """One search, step by step.

    ``eos_token_ids`` are all tokens that end a text, ``max_new`` (1 or more) tokens the most it
    gets. The beams must divide into the groups, and ``num_return`` be no more than the beams.
    """

    def __init__(
        self, parameters: BeamParameters, *, eos_token_ids: frozenset[TokenId], max_new: int
    ) -> None:
        self._parameters = parameters
        self._groups = [
            _Group(parameters, eos_token_ids, max_new) for _ in range(parameters.num_beam_groups)
        ]
        self._length = 0

    def step(self, candidates: Sequence[Candidates]) -> BeamStep | None:
        """Go on from the candidates of each running beam, at first from the row of the prompt.

        The beams that run after it, whose candidates the next step needs, each with the row it
        came from; null where the search is done. Of each row at least
        :func:`candidates_needed` or all there are.
        """
        self._length += 1
        chosen: Counter[TokenId] = Counter()
        parents: list[int] = []
        tokens: list[TokenId] = []
        for group in self._groups:
            came_from = group.step(candidates, chosen, self._length, first_row=len(parents))
            parents += came_from
            tokens += (beam.tokens[-1] for beam in group.running)
        return None if self.done else BeamStep(parents=tuple(parents), tokens=tuple(tokens))

    @property
    def done(self) -> bool:
        """Whether no beam runs any more."""
        return not any(group.running for group in self._groups)

    def best(self) -> tuple[Hypothesis, ...]:
        """The ``num_return`` best sequences found so far, best first; fewer if there are fewer."""
        found = [hypothesis for group in self._groups for hypothesis in group.found]
        return tuple(_by_score(found)[: self._parameters.num_return])


class _Group:
    """Beams that compete with each other (all of them, in a search without groups)."""

    def __init__(
        self, parameters: BeamParameters, eos_token_ids: frozenset[TokenId], max_new: int
    ) -> None:
        self._parameters = parameters
        self._eos = eos_token_ids
        self._max_new = max_new
        self._size = parameters.num_beams // parameters.num_beam_groups
        self.running = [_Beam(0, (), 0.0)]
        self.found: list[Hypothesis] = []

    def step(
        self,
        candidates: Sequence[Candidates],
        chosen: Counter[TokenId],
        length: int,
        *,
        first_row: int,
    ) -> list[int]:
        """Make sequences of ``length`` new tokens; gives the rows that the running beams came from.

        Adds to ``chosen`` what its beams choose. Their own rows are those from ``first_row`` on.
        """
        offers = self._offers(candidates, chosen)
        last = length == self._max_new
        for cost, place, token in offers[: self._size]:
            if last or token in self._eos:
                tokens = (*self.running[place].tokens, token)
                score = self._score(-cost, length)
                self.found.append(Hypothesis(tokens, score, token in self._eos))
        self.found = _by_score(self.found)[: self._size]
        going = [offer for offer in offers if offer[2] not in self._eos][: self._size]
        chosen.update(token for _, _, token in going)
        if last or not going or self._cannot_improve(-going[0][0], length):
            self.running = []
            return []
        came_from = [self.running[place].row for _, place, _ in going]
        self.running = [
            _Beam(row, (*self.running[place].tokens, token), -cost)
            for row, (cost, place, token) in enumerate(going, start=first_row)
        ]
        return came_from

    def _offers(
        self, candidates: Sequence[Candidates], chosen: Counter[TokenId]
    ) -> list[tuple[float, int, TokenId]]:
        """Every continuation, best first: its negative logprob, whose it is, and the token."""
        penalty = self._parameters.diversity_penalty
        return sorted(
            (penalty * chosen[token] - logprob - beam.logprob, place, token)
            for place, beam in enumerate(self.running)
            for token, logprob in candidates[beam.row]
        )

    def _cannot_improve(self, best_logprob: float, length: int) -> bool:
        """Whether what is found stays, judged by the best of the running beams."""
        asked = self._parameters
        if len(self.found) < self._size:
            return False
        if asked.early_stopping is True or asked.num_beams == 1:  # one beam is greedy search
            return True
        to_the_end = asked.early_stopping == "never" and asked.length_penalty > 0
        reached = self._max_new if to_the_end else length
        return self._score(best_logprob, reached) <= self.found[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(length, self._parameters.length_penalty)


def _by_score(found: list[Hypothesis]) -> list[Hypothesis]:
    return sorted(found, key=lambda hypothesis: -hypothesis.score)
