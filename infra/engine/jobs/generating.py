"""Drawing the tokens of a text one by one."""

from collections.abc import Callable
from functools import partial

import msgspec

from domain.events import FinishReason
from domain.ids import TokenId
from domain.stopping import Stopping
from domain.work import GenerationRequest, Step
from infra.engine.constraints.matching import Constraints
from infra.engine.jobs.job import describe
from infra.engine.sampling import sampler
from infra.engine.sampling.choosing import Chooser
from infra.engine.sampling.recorder import Recorder, Recording
from infra.engine.sampling.sampler import Draw, Row
from infra.engine.scheduler import Sequence as Text
from infra.models.tokenizer import Tokenizer


class Generation:
    """Draws tokens of one branch until a stop, the end of the sequence, or enough.

    Each :class:`Step` goes to ``deliver``; after the last one ``deliver`` gets null, or the error
    that ended the work.
    """

    def __init__(
        self,
        request: GenerationRequest,
        branch: int,
        *,
        root: bytes,
        tokenizer: Tokenizer,
        constraints: Constraints,
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
        self._drawing = msgspec.structs.replace(request.drawing, branch=branch)
        self._chooser = Chooser(self._drawing, request.tokens, constraints)
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(request.tokens)
        self._stopping = Stopping(
            request.parameters,
            eos_token_ids=eos_token_ids,
            held=held,
            context_size=request.context_size,
            said=request.said,
        )
        self._deliver = deliver
        self._recording = Recording(recorder, deliver)

    def accept(self, text: Text, position: int, logits: Row) -> bool:
        """Draw the token after ``position``."""
        place = position + 1
        choice = self._chooser.choose(logits, place)
        token = choice.token_id
        text.tokens.append(token)
        self._chooser.push(token)
        piece = self._decoder.push(token)
        reason = self._stopping.push(token, piece, fulfilled=self._chooser.fulfilled)
        record = partial(self._record, place, logits, choice, piece, reason)
        self._recording.put_row(logits, record)
        return reason is not None or len(text.tokens) >= text.limit

    def _record(
        self,
        place: int,
        logits: Row,
        choice: Draw,
        piece: str,
        reason: FinishReason | None,
        digest: str,
    ) -> None:
        token, drawing = choice.token_id, self._drawing
        measures = sampler.measure(logits, token)
        drawn = describe(logits, digest, choice, measures, drawing, self._tokenizer)
        partial_bytes = self._tokenizer.partial(token)
        self._deliver(Step(drawing.branch, place, drawn, piece, partial_bytes, reason))

    def finish(self) -> None:
        """Say that there are no more steps."""
        self._recording.put(partial(self._deliver, None))

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._recording.fail(error)
