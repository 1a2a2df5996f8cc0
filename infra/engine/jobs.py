"""What is done with the logits of a sequence: draw its next token, or score the one it has.

The engine waits only for what decides its next pass: the token, and whether the text ends with it.
What is recorded of it is worked out and delivered by the recorder's thread, in order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from domain.events import Alternative, FinishReason, Scores
from domain.ids import TokenId
from domain.ports import Drawing, Drawn, GenerationRequest, Redraw, Scored, Step
from domain.stopping import Stopping
from infra.engine import sampler
from infra.engine.recorder import Recorder, Recording
from infra.engine.sampler import Draw, Measures, Row
from infra.engine.scheduler import Sequence as Text
from infra.models.tokenizer import Tokenizer


class Job(Protocol):
    """Work on one sequence. Runs on the engine's thread."""

    text: Text

    def accept(self, position: int, logits: Row) -> bool:
        """Use the logits at ``position``; true if the job is done."""

    def finish(self) -> None:
        """The job is done and holds no memory of the engine any more."""

    def fail(self, error: Exception) -> None:
        """The job cannot be finished."""


def describe(
    logits: Row,
    digest: str,
    choice: Draw,
    measures: Measures,
    drawing: Drawing,
    tokenizer: Tokenizer,
) -> Drawn:
    """Everything that is recorded about a drawn token."""
    likeliest = sampler.largest(logits, drawing.top_logprobs) if drawing.top_logprobs else ()
    return Drawn(
        token_id=choice.token_id,
        logprob=measures.logprob,
        rank=measures.rank,
        entropy=measures.entropy,
        logsumexp=measures.logsumexp,
        logits_digest=digest,
        sampling_probability=choice.probability,
        alternatives=tuple(
            Alternative(
                token_id=TokenId(int(token)),
                text=tokenizer.text_of(TokenId(int(token))),
                logprob=float(logits[token]) - measures.logsumexp,
            )
            for token in likeliest
        ),
        logits=_stored(logits, drawing),
    )


def _stored(logits: Row, drawing: Drawing) -> bytes | None:
    match drawing.store_logits:
        case "none":
            return None
        case "top_k":
            return sampler.pack_top_k(logits, drawing.top_k_logits)
        case "full":
            return sampler.pack_full(logits)


class Generation:
    """Draws tokens until a stop, the end of the sequence, or enough.

    Each :class:`Step` goes to ``deliver``; after the last one ``deliver`` gets null, or the error
    that ended the work.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        root: bytes,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[TokenId],
        deliver: Callable[[Step | Exception | None], None],
        recorder: Recorder,
    ) -> None:
        held = len(request.tokens)
        self.text = Text(
            tokens=list(request.tokens),
            limit=held + request.max_new,
            first_wanted=held - 1,
            root=root,
        )
        self._drawing = request.drawing
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(request.tokens)
        self._stopping = Stopping(
            request.parameters,
            eos_token_ids=eos_token_ids,
            held=held,
            context_size=request.context_size,
        )
        self._deliver = deliver
        self._recording = Recording(recorder, deliver)

    def accept(self, position: int, logits: Row) -> bool:
        """Draw the token after ``position``."""
        place, drawing = position + 1, self._drawing
        choice = sampler.draw(logits, drawing.sampling, drawing.seed, place)
        self.text.tokens.append(choice.token_id)
        piece = self._decoder.push(choice.token_id)
        reason = self._stopping.push(choice.token_id, piece)
        record = partial(self._record, place, logits, choice, piece, reason)
        self._recording.put_row(logits, record)
        return reason is not None or len(self.text.tokens) >= self.text.limit

    def _record(
        self,
        place: int,
        logits: Row,
        choice: Draw,
        piece: str,
        reason: FinishReason | None,
        digest: str,
    ) -> None:
        measures = sampler.measure(logits, choice.token_id)
        drawn = describe(logits, digest, choice, measures, self._drawing, self._tokenizer)
        self._deliver(Step(place, drawn, piece, reason))

    def finish(self) -> None:
        """Say that there are no more steps."""
        self._recording.put(partial(self._deliver, None))

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._recording.fail(error)


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

    def accept(self, position: int, logits: Row) -> bool:
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
