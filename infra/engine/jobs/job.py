"""What is done with the logits of a sequence, as the engine sees it.

The engine waits only for what decides its next pass: the token, and whether the text ends with it.
What is recorded of it is worked out and delivered by the recorder's thread, in order.
"""

from typing import Protocol

from domain.content import Alternative
from domain.ids import TokenId
from domain.work import Drawing, Drawn
from infra.engine.sampling import sampler
from infra.engine.sampling.sampler import Draw, Measures, Row
from infra.engine.scheduler import Sequence as Text
from infra.models.tokenizer import Tokenizer


class Job(Protocol):
    """Work on the sequence ``text`` and what it is forked into. Runs on the engine's thread."""

    text: Text

    def accept(self, text: Text, position: int, logits: Row) -> bool:
        """Use the logits at ``position`` of one of them; true if the job is done."""

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
