"""What is done with the logits of a sequence: draw its next token, or score the one it has."""

from collections.abc import Callable, Sequence
from typing import Protocol


from domain.events import Alternative, FinishReason, Scores
from domain.ids import TokenId
from domain.ports import Choice, GenerationRequest, Scored, Step
from infra.engine import sampler
from infra.engine.sampler import Row
from infra.engine.scheduler import Sequence as Text
from infra.models.tokenizer import Tokenizer


class Job(Protocol):
    """Work on one sequence. Runs on the engine's thread."""

    text: Text

    def accept(self, position: int, logits: Row) -> bool:
        """Use the logits at ``position``; true if the job is done."""

    def fail(self, error: Exception) -> None:
        """The job cannot be finished."""


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
        deliver: Callable[[Step | Exception | None], None],
    ) -> None:
        held = len(request.tokens)
        self.text = Text(
            tokens=list(request.tokens),
            limit=held + request.max_new,
            first_wanted=held - 1,
            root=root,
        )
        self._request = request
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(request.tokens)
        self._generated = ""
        self._deliver = deliver

    def accept(self, position: int, logits: Row) -> bool:
        """Draw the token after ``position``."""
        request, parameters = self._request, self._request.parameters
        drawn = sampler.draw(logits, parameters.sampling, request.seed, position + 1)
        measures = sampler.measure(logits, drawn.token_id)
        piece = self._decoder.push(drawn.token_id)
        self.text.tokens.append(drawn.token_id)
        reason = self._finish_reason(drawn.token_id, piece)
        self._deliver(
            Step(
                token_id=drawn.token_id,
                text=piece,
                logprob=measures.logprob,
                rank=measures.rank,
                entropy=measures.entropy,
                logsumexp=measures.logsumexp,
                logits_digest=measures.digest,
                sampling_probability=drawn.probability,
                alternatives=self._alternatives(logits, measures.logsumexp),
                logits=self._stored(logits),
                finish_reason=reason,
            )
        )
        if reason is None and len(self.text.tokens) < self.text.limit:
            return False
        self._deliver(None)
        return True

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._deliver(error)

    def _finish_reason(self, token: TokenId, piece: str) -> FinishReason | None:
        parameters = self._request.parameters
        if token == self._tokenizer.eos_token_id:
            return "eos"
        if token in parameters.stop_token_ids:
            return "stop_token"
        searched = len(self._generated)
        self._generated += piece
        for stop in parameters.stop_sequences:
            if self._generated.find(stop, max(0, searched - len(stop) + 1)) >= 0:
                return "stop_sequence"
        if len(self.text.tokens) >= self._request.context_size:
            return "context_full"
        return None

    def _alternatives(self, logits: Row, logsumexp: float) -> tuple[Alternative, ...]:
        count = self._request.parameters.top_logprobs
        return tuple(
            Alternative(
                token_id=TokenId(int(token)),
                text=self._tokenizer.text_of(TokenId(int(token))),
                logprob=float(logits[token]) - logsumexp,
            )
            for token in (sampler.largest(logits, count) if count else ())
        )

    def _stored(self, logits: Row) -> bytes | None:
        match self._request.store_logits:
            case "none":
                return None
            case "top_k":
                return sampler.pack_top_k(logits, self._request.top_k_logits)
            case "full":
                return sampler.pack_full(logits)


class Scoring:
    """Scores the tokens of a text from position ``start`` on, in one pass.

    ``choices`` asks what would be drawn at some of these positions. ``deliver`` gets the result,
    or the error that ended the work.
    """

    def __init__(
        self,
        tokens: Sequence[TokenId],
        start: int,
        *,
        root: bytes | None,
        choices: Sequence[Choice],
        deliver: Callable[[Scored | Exception], None],
    ) -> None:
        self.text = Text(tokens=list(tokens), limit=len(tokens), first_wanted=start - 1, root=root)
        self._choices = {choice.position: choice for choice in choices}
        self._drawn: dict[int, sampler.Draw] = {}
        self._measures: list[sampler.Measures] = []
        self._deliver = deliver

    def accept(self, position: int, logits: Row) -> bool:
        """Score the token after ``position``."""
        place = position + 1
        choice = self._choices.get(place)
        if choice is not None:
            self._drawn[place] = sampler.draw(logits, choice.sampling, choice.seed, place)
        if place < len(self.text.tokens):
            token = TokenId(self.text.tokens[place])
            self._measures.append(sampler.measure(logits, token))
            return False
        self._deliver(self._result())
        return True

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self._deliver(error)

    def _result(self) -> Scored:
        drawn = [self._drawn[place] for place in sorted(self._drawn)]
        return Scored(
            scores=scores(self._measures),
            chosen=tuple(draw.token_id for draw in drawn),
            sampling_probabilities=tuple(draw.probability for draw in drawn),
            tokens_computed=len(self.text.tokens) - self.text.reused,
            tokens_reused=self.text.reused,
        )


def scores(measures: Sequence[sampler.Measures]) -> Scores:
    """Measures of a run of tokens, as they are recorded."""
    return Scores(
        logprobs=tuple(m.logprob for m in measures),
        ranks=tuple(m.rank for m in measures),
        entropies=tuple(m.entropy for m in measures),
        logsumexps=tuple(m.logsumexp for m in measures),
        logits_digests=tuple(m.digest for m in measures),
    )
