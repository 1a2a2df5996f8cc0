"""Scoring the tokens that texts have."""

from collections.abc import Callable, Sequence
from functools import partial

from domain.events import Scores
from domain.ids import TokenId
from domain.work import Drawn, Redraw, Scored
from infra.engine import sampler
from infra.engine.jobs import describe
from infra.engine.recorder import Recorder, Recording
from infra.engine.sampler import Measures, Row
from infra.engine.scheduler import Sequence as Text
from infra.models.tokenizer import Tokenizer


class Scoring:
    """Scores the tokens of a text from position ``start`` on, in one pass.

    ``deliver`` gets the result, or the error that ended the work.
    """

    def __init__(
        self,
        tokens: Sequence[TokenId],
        start: int,
        *,
        root: bytes | None,
        redraws: Sequence[Redraw],
        tokenizer: Tokenizer,
        deliver: Callable[[Scored | Exception], None],
        recorder: Recorder,
    ) -> None:
        self.text = Text(tokens=list(tokens), limit=len(tokens), first_wanted=start - 1, root=root)
        self._drawings = {
            position: redraw.drawing
            for redraw in redraws
            for position in range(redraw.start, redraw.stop)
        }
        self._tokenizer = tokenizer
        self._redrawn: list[Drawn] = []
        self._measures: list[Measures] = []
        self._digests: list[str] = []
        self._deliver = deliver
        self._recording = Recording(recorder, deliver)

    def accept(self, text: Text, position: int, logits: Row) -> bool:
        """Score the token after ``position``."""
        place = position + 1
        if place == len(self.text.tokens):
            return True
        token = TokenId(self.text.tokens[place])
        self._recording.put_row(logits, partial(self._record, place, token, logits))
        return False

    def _record(self, place: int, token: TokenId, logits: Row, digest: str) -> None:
        measures = sampler.measure(logits, token)
        self._measures.append(measures)
        self._digests.append(digest)
        if (drawing := self._drawings.get(place)) is not None:
            choice = sampler.draw(logits, drawing.sampling, drawing.seed, place)
            if choice.token_id != token:
                measures = sampler.measure(logits, choice.token_id)
            self._redrawn.append(
                describe(logits, digest, choice, measures, drawing, self._tokenizer)
            )

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._recording.fail(error)

    def finish(self) -> None:
        """Hand out what was found."""
        self._recording.put(lambda: self._deliver(self._scored()))

    def _scored(self) -> Scored:
        return Scored(
            scores=Scores(
                logprobs=tuple(m.logprob for m in self._measures),
                ranks=tuple(m.rank for m in self._measures),
                entropies=tuple(m.entropy for m in self._measures),
                logsumexps=tuple(m.logsumexp for m in self._measures),
                logits_digests=tuple(self._digests),
            ),
            redrawn=tuple(self._redrawn),
            tokens_computed=len(self.text.tokens) - self.text.reused,
            tokens_reused=self.text.reused,
        )
