"""Scoring the tokens that texts have, at prefill speed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from domain.beams import Candidates, candidates_needed, ends_of
from domain.config import BeamParameters
from domain.content import Scores
from domain.ids import TokenId
from domain.work import Comparison, Drawn, Scored, ScoreRequest
from infra.engine.constraints.matching import Constraints
from infra.engine.jobs.job import describe
from infra.engine.jobs.searching import candidates
from infra.engine.jobs.text_tree import Branch, branch_off
from infra.engine.sampling import comparing, sampler
from infra.engine.sampling.choosing import Chooser
from infra.engine.sampling.processors import Processors
from infra.engine.sampling.recorder import Recorder, Recording
from infra.engine.sampling.sampler import Measures, Row
from infra.engine.scheduler import Scheduler
from infra.engine.scheduler import Sequence as Text
from infra.models.tokenizer import Tokenizer

MAX_WIDTH: Final = 16
"""Texts that a job works on at once: enough to fill passes, and others find places beside them."""


class Scoring:
    """Scores texts; a token that several begin with is computed once, unless it is to be scored.

    Texts branch off from each other as soon as what they share is computed. Where one ends before
    all its branches have begun, the latest of them takes its place, and the others branch off from
    that: every place has something to compute. ``deliver`` gets the results in the order of the
    requests, or the error that ended the work.
    """

    def __init__(
        self,
        requests: Sequence[ScoreRequest],
        *,
        root: bytes | None,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        constraints: Constraints,
        eos_token_ids: frozenset[TokenId],
        deliver: Callable[[list[Scored] | Exception], None],
        recorder: Recorder,
    ) -> None:
        self._scores = [_Scores(each, tokenizer, constraints, eos_token_ids) for each in requests]
        first = branch_off([each.tokens for each in requests], [each.start for each in requests])
        self.text = _beginning(requests, first, root, scheduler)
        self._running: dict[Text, Branch] = {}
        self._scheduler = scheduler
        self._deliver = deliver
        self._recording = Recording(recorder, deliver)
        self._run(first, self.text)

    def accept(self, text: Text, position: int, logits: Row) -> bool:
        """Score the token after ``position``, if it is one to be scored; go on where it ends."""
        scores, place = self._scores[self._running[text].place], position + 1
        if scores.request.start <= place < scores.end:
            self._recording.put_row(logits, partial(scores.add, place, logits))
        if place == text.computed:  # the last row of a pass
            if place == scores.end:
                self._end(text)
            self._begin_others()
        return not self._running

    def _begin_others(self) -> None:
        """Fill free places with texts that can begin, first where the longest line waits."""
        free = self.text.width - len(self._running)
        ready = [
            (branch, text)
            for text, parent in self._running.items()
            for branch in parent.branches
            if branch.at <= text.computed
        ]
        ready.sort(key=lambda each: -each[0].height)
        for branch, parent in ready[:free]:
            self._running[parent].branches.remove(branch)
            self._run(branch, self._scheduler.fork(parent, branch.at, (), branch.at))

    def _end(self, text: Text) -> None:
        """Give the place of a text to one that branches off from it."""
        ended = self._running.pop(text)
        scores = self._scores[ended.place]
        scores.reused = text.reused - ended.at
        if ended.branches:
            heir = ended.heir()
            self._run(heir, self._scheduler.replace(text, heir.at, (), heir.at))
        else:
            self._scheduler.remove(text)

    def _run(self, branch: Branch, text: Text) -> None:
        """Have a text computed to its end."""
        scores = self._scores[branch.place]
        scores.common = branch.at
        text.tokens += scores.request.tokens[len(text.tokens) :]
        text.first_wanted = min(scores.request.start, scores.end) - 1
        self._running[text] = branch

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._recording.fail(error)

    def finish(self) -> None:
        """Hand out what was found."""
        self._recording.put(lambda: self._deliver([each.scored() for each in self._scores]))


def _beginning(
    requests: Sequence[ScoreRequest], first: Branch, root: bytes | None, scheduler: Scheduler
) -> Text:
    """What all texts begin with, or all of the only one, with as many places as there may be."""
    request = requests[first.place]
    end = max(1, min((branch.at for branch in first.branches), default=len(request.tokens)))
    limit = max(len(each.tokens) for each in requests)

    def text(width: int) -> Text:
        tokens: list[int] = list(request.tokens[:end])
        return Text(tokens, limit, min(request.start, end) - 1, root, width)

    widths = range(min(MAX_WIDTH, len(requests)), 1, -1)
    return next(filter(scheduler.fits, map(text, widths)), text(1))


class _Scores:
    """What is found of one text, on the recorder's thread.

    Of its tokens ``common`` were computed for the text before it, and ``reused`` for others.
    """

    def __init__(
        self,
        request: ScoreRequest,
        tokenizer: Tokenizer,
        constraints: Constraints,
        eos_token_ids: frozenset[TokenId],
    ) -> None:
        self.request = request
        self.end = len(request.tokens)
        self.common = self.reused = 0
        self._measures: list[Measures] = []
        self._digests: list[str] = []
        self._redraws = _Redraws(request, tokenizer, constraints)
        asked = request.candidates
        self._choices = _Choices(request.tokens, asked, eos_token_ids) if asked else None
        self._comparisons: list[Comparison] = []
        self._rows: list[bytes] = []

    def add(self, place: int, logits: Row, digest: str) -> None:
        """Score the token at ``place``; it comes after those before it."""
        request = self.request
        measures = sampler.measure(logits, request.tokens[place])
        self._measures.append(measures)
        self._digests.append(digest)
        self._redraws.add(place, logits, digest, measures)
        if self._choices:
            self._choices.add(place, logits)
        if request.references:
            reference = request.references[place - request.start]
            self._comparisons.append(comparing.compare(reference, logits, measures.logsumexp))
        if request.keep:
            self._rows.append(comparing.pack(logits, request.keep, request.keep_k))

    def scored(self) -> Scored:
        """All of it."""
        return Scored(
            scores=Scores(
                logprobs=tuple(m.logprob for m in self._measures),
                ranks=tuple(m.rank for m in self._measures),
                entropies=tuple(m.entropy for m in self._measures),
                logsumexps=tuple(m.logsumexp for m in self._measures),
                logits_digests=tuple(self._digests),
            ),
            redrawn=tuple(self._redraws.drawn),
            candidates=tuple(self._choices.found) if self._choices else (),
            comparisons=tuple(self._comparisons),
            rows=tuple(self._rows),
            tokens_computed=self.end - self.common - self.reused,
            tokens_reused=self.reused,
        )


class _Redraws:
    """What generations would have drawn at places of a text."""

    def __init__(
        self, request: ScoreRequest, tokenizer: Tokenizer, constraints: Constraints
    ) -> None:
        self._tokens = request.tokens
        self._asked = {
            place: redraw
            for redraw in request.redraws
            for place in range(redraw.start, redraw.stop)
        }
        self._tokenizer = tokenizer
        self._constraints = constraints
        self.drawn: list[Drawn] = []

    def add(self, place: int, logits: Row, digest: str, measures: Measures) -> None:
        """Draw the token at ``place``, if asked to; ``measures`` are those of the one it has."""
        redraw = self._asked.get(place)
        if redraw is None:
            return
        token, drawing = self._tokens[place], redraw.drawing
        if place == redraw.start:
            self._chooser = Chooser(drawing, self._tokens[:place], self._constraints)
        choice = self._chooser.choose(logits, place)
        self._chooser.push(token)
        if choice.token_id != token:
            measures = sampler.measure(logits, choice.token_id)
        self.drawn.append(describe(logits, digest, choice, measures, drawing, self._tokenizer))


class _Choices:
    """What a beam search would choose from at each place of a text."""

    def __init__(
        self,
        tokens: Sequence[TokenId],
        asked: BeamParameters,
        eos_token_ids: frozenset[TokenId],
    ) -> None:
        self._count = candidates_needed(asked, len(ends_of(asked, eos_token_ids)))
        self._tokens = tokens
        self._asked = asked
        self._processors: Processors | None = None
        self.found: list[Candidates] = []

    def add(self, place: int, logits: Row) -> None:
        """Find them at ``place``."""
        if self._processors is None:
            self._processors = Processors(
                self._asked.logits,
                self._tokens[:place],
                no_repeat_ngram_size=self._asked.no_repeat_ngram_size,
            )
        self.found.append(candidates(logits, self._processors, self._count))
        self._processors.push(self._tokens[place])
