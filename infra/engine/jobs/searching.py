"""Continuing a text by beam search, with a sequence for each beam that runs."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from domain.beams import BeamSearch, Candidate, Candidates, candidates_needed, ends_of
from domain.content import Scores
from domain.events import Beam, BeamStep
from domain.ids import TokenId
from domain.work import BeamRequest, BeamsFound
from infra.engine.sampling import sampler
from infra.engine.sampling.processors import Processors
from infra.engine.sampling.recorder import Recorder, Recording
from infra.engine.sampling.sampler import Measures, Row
from infra.engine.scheduler import Scheduler
from infra.engine.scheduler import Sequence as Text
from infra.models.tokenizer import Tokenizer

Tokens = tuple[TokenId, ...]


def candidates(logits: Row, processors: Processors, count: int) -> Candidates:
    """The ``count`` best tokens to come next, or as many as are not ruled out.

    As in transformers' beam search, logits are normalised before they are processed.

    Raises:
        ValueError: the logits are not numbers.
    """
    logsumexp = sampler.measure(logits, TokenId(0)).logsumexp
    logprobs = np.subtract(logits, logsumexp, dtype=np.float64).astype(np.float32)
    scores = processors.process(logprobs)
    likeliest = sampler.largest(scores, count)
    pairs = zip(likeliest.tolist(), scores[likeliest].tolist(), strict=True)
    return tuple(Candidate(TokenId(token), score) for token, score in pairs if score > -np.inf)


class Search:
    """Finds the sequences that :class:`domain.beams.BeamSearch` finds by the model's logits.

    A step waits until the logits of all its beams are there. ``deliver`` gets the result, or the
    error that ended the work.
    """

    def __init__(
        self,
        request: BeamRequest,
        *,
        root: bytes,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[TokenId],
        scheduler: Scheduler,
        deliver: Callable[[BeamsFound | Exception], None],
        recorder: Recorder,
    ) -> None:
        asked, held = request.parameters, len(request.tokens)
        self.text = Text(
            tokens=list(request.tokens),
            limit=held + request.max_new,
            first_wanted=held - 1,
            root=root,
            width=asked.num_beams,
        )
        ends = ends_of(asked, eos_token_ids)
        self._before = request.tokens
        self._search = BeamSearch(asked, eos_token_ids=ends, max_new=request.max_new)
        self._count = candidates_needed(asked, len(ends))
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._beams = [self.text]
        self._rows: dict[Text, Row] = {}
        self._processors = [
            Processors(
                asked.logits,
                request.tokens,
                no_repeat_ngram_size=asked.no_repeat_ngram_size,
            )
        ]
        self._steps: list[BeamStep] = []
        self._trails = _Trails()
        self._deliver = deliver
        self._recording = Recording(recorder, deliver)

    def accept(self, text: Text, position: int, logits: Row) -> bool:
        """Keep the logits of one beam; with those of the last one, make a step."""
        self._rows[text] = logits
        if len(self._rows) < len(self._beams):
            return False
        rows = [self._rows.pop(beam) for beam in self._beams]
        step = self._search.step(
            [
                candidates(row, processors, self._count)
                for row, processors in zip(rows, self._processors, strict=True)
            ]
        )
        going = list(zip(step.parents, step.tokens, strict=True)) if step else []
        self._record(rows, going)
        if step is None:
            return True
        self._steps.append(step)
        self._beams = self._scheduler.reorder(self._beams, step.parents, step.tokens)
        self._processors = [self._pushed(parent, token) for parent, token in going]
        return False

    def _pushed(self, parent: int, token: TokenId) -> Processors:
        processors = self._processors[parent].copy()
        processors.push(token)
        return processors

    def _record(self, rows: Sequence[Row], going: list[tuple[int, TokenId]]) -> None:
        """Have recorded what goes on, and what was found in this step and is among the best."""
        place_of = {self._added(beam): place for place, beam in enumerate(self._beams)}
        ended = {
            hypothesis.tokens: place_of[hypothesis.tokens[:-1]]
            for hypothesis in self._search.best()
            if len(hypothesis.tokens) == len(self._steps) + 1
        }
        chosen = {*going, *((place, tokens[-1]) for tokens, place in ended.items())}
        for place, row in enumerate(rows):
            if tokens := [token for parent, token in chosen if parent == place]:
                measure = partial(self._trails.measure, place, row, tokens)
                self._recording.put_row(row, measure)
        self._recording.put(partial(self._trails.go_on, going, ended))

    def _added(self, beam: Text) -> Tokens:
        return tuple(map(TokenId, beam.tokens[len(self._before) :]))

    def finish(self) -> None:
        """Hand out what was found."""
        self._recording.put(lambda: self._deliver(self._found()))

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._recording.fail(error)

    def _found(self) -> BeamsFound:
        beams = (
            Beam(
                content=self._tokenizer.fragment(self._before, hypothesis.tokens),
                scores=self._trails.scores(hypothesis.tokens),
                score=hypothesis.score,
                finished=hypothesis.finished,
            )
            for hypothesis in self._search.best()
        )
        return BeamsFound(steps=tuple(self._steps), beams=tuple(beams))


class _Trail(NamedTuple):
    """What is recorded of the last token of a text, and of those before it."""

    before: "_Trail | None"
    measures: Measures
    digest: str


class _Trails:
    """What is recorded of the beams that run, and of the sequences that ended.

    Used on the recorder's thread; a beam that is left is forgotten.
    """

    def __init__(self) -> None:
        self._running: list[_Trail | None] = [None]
        self._ended: dict[Tokens, _Trail] = {}
        self._made: dict[tuple[int, TokenId], _Trail] = {}

    def measure(self, place: int, row: Row, tokens: Iterable[TokenId], digest: str) -> None:
        """Score the tokens that were chosen from the row of a beam."""
        for token in tokens:
            measures = sampler.measure(row, token)
            self._made[place, token] = _Trail(self._running[place], measures, digest)

    def go_on(self, going: list[tuple[int, TokenId]], ended: dict[Tokens, int]) -> None:
        """The beams that run from now on, by parent and token, and what ended and its parent."""
        self._ended |= {tokens: self._made[place, tokens[-1]] for tokens, place in ended.items()}
        self._running = [self._made[choice] for choice in going]
        self._made = {}

    def scores(self, tokens: Tokens) -> Scores:
        """What the model said about each token of a sequence that ended."""
        trails: list[_Trail] = []
        trail: _Trail | None = self._ended[tokens]
        while trail is not None:
            trails.append(trail)
            trail = trail.before
        trails.reverse()
        return Scores(
            logprobs=tuple(trail.measures.logprob for trail in trails),
            ranks=tuple(trail.measures.rank for trail in trails),
            entropies=tuple(trail.measures.entropy for trail in trails),
            logsumexps=tuple(trail.measures.logsumexp for trail in trails),
            logits_digests=tuple(trail.digest for trail in trails),
        )
