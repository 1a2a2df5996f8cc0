"""When a generation ends: a pure function of what it has drawn and was asked."""

from domain.config import GenerationParameters
from domain.events import FinishReason
from domain.ids import TokenId


class Stopping:
    """Watches one generation token by token and says when and why it ends.

    ``held`` tokens were there before; ``context_size`` is the most there may be. ``said`` is text
    that the same call added before: a stop sequence may begin in it.
    """

    def __init__(
        self,
        parameters: GenerationParameters,
        *,
        eos_token_ids: frozenset[TokenId],
        held: int,
        context_size: int,
        said: str = "",
    ) -> None:
        self._parameters = parameters
        self._eos = frozenset() if parameters.ignore_eos else eos_token_ids
        self._held = held
        self._context_size = context_size
        self._text = said

    def push(self, token: TokenId, piece: str, *, fulfilled: bool = False) -> FinishReason | None:
        """The reason to end after ``token``, which adds ``piece``; null to go on.

        ``fulfilled`` says that a constraint allows nothing after it. ``max_tokens`` is not a
        reason of its own: the text could go on.
        """
        self._held += 1
        searched, self._text = len(self._text), self._text + piece
        if token in self._eos:
            return "eos"
        if token in self._parameters.stop_token_ids:
            return "stop_token"
        for stop in self._parameters.stop_sequences:
            if self._text.find(stop, max(0, searched - len(stop) + 1)) >= 0:
                return "stop_sequence"
        if fulfilled:
            return "constraint"
        return "context_full" if self._held >= self._context_size else None
