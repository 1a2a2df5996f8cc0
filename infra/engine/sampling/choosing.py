"""Choosing the next token of a text: what changes its logits, then the draw."""

from collections.abc import Sequence

from domain.errors import invalid
from domain.ids import TokenId
from domain.work import Drawing
from infra.engine.constraints.matching import Constraints
from infra.engine.sampling import sampler
from infra.engine.sampling.processors import Processors
from infra.engine.sampling.sampler import Draw, NothingLeft, Row


class Chooser:
    """Draws the tokens of one text, as ``drawing`` says; ``tokens`` are those it has."""

    def __init__(
        self, drawing: Drawing, tokens: Sequence[TokenId], constraints: Constraints
    ) -> None:
        self._drawing = drawing
        self._processors = Processors(drawing.sampling, tokens)
        constraint = drawing.constraint
        self._matcher = constraints.matcher(constraint, drawing.prior) if constraint else None

    @property
    def fulfilled(self) -> bool:
        """Whether the text has a constraint that allows nothing after it."""
        return self._matcher is not None and self._matcher.fulfilled

    def choose(self, logits: Row, place: int) -> Draw:
        """The token at ``place``, by the raw logits there.

        Raises:
            InvalidInput: what was asked for leaves no token to choose.
        """
        drawing = self._drawing
        allowed = self._matcher.allowed() if self._matcher else None
        scores = self._processors.process(logits, allowed)
        position = place + drawing.dropped
        try:
            return sampler.draw(scores, drawing.sampling, drawing.seed, position, drawing.branch)
        except NothingLeft:
            constraint = drawing.constraint
            field = f"constraint.{constraint.kind}" if constraint else "bad_words_ids"
            raise invalid(field, f"leaves no token to choose at position {place}") from None

    def push(self, token: TokenId) -> None:
        """Add the token that comes next, whatever would have been drawn."""
        self._processors.push(token)
        if self._matcher:
            self._matcher.push(token)
