"""What a generation will record, growing token by token: no I/O, no model."""

from collections.abc import Sequence

from domain import decide
from domain.chain import blobs_digest
from domain.content import Fragment, Scores, StoredLogits
from domain.events import (
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    FinishReason,
    Recorded,
    TokensGenerated,
)
from domain.ids import TokenId
from domain.models import LanguageModel
from domain.plan import GenerationPlan
from domain.ports import Append
from domain.state import Live, apply
from domain.work import Drawing, GenerationRequest, Step


class TokensDraft:
    """The events of one call that continues a state.

    They are one text or, where the state is full and slides, several with a slide between them.
    ``earlier`` are the texts that the call recorded before it was cut off.
    """

    def __init__(
        self,
        state: Live,
        model: LanguageModel,
        plan: GenerationPlan,
        earlier: Sequence[Recorded] = (),
    ) -> None:
        contents = [one.event.content for one in earlier if isinstance(one.event, TokensGenerated)]
        self.appends: list[Append] = []
        self._state = state
        self._model = model
        self._plan = plan
        self._steps: list[Step] = []
        self._prior = [token for content in contents for token in content.tokens]
        self._said = "".join(content.text for content in contents)
        self._ended = False

    @property
    def begun(self) -> bool:
        """Whether there is anything to record."""
        return bool(self.appends or self._steps)

    @property
    def goes_on(self) -> bool:
        """Whether there is a text to be drawn."""
        return not self._ended

    def _slide(self) -> ContextSlid | None:
        """The slide that the next text needs before it, if there is to be one."""
        return None if self._state.room or not self._left else decide.slide(self._state)

    @property
    def _left(self) -> int:
        return self._plan.parameters.max_tokens - len(self._prior)

    def request(self) -> GenerationRequest:
        """Asks for the next text, after the slide that makes room for it where one is needed."""
        if slide := self._slide():
            self._append(slide)
        state = self._state
        return GenerationRequest(
            tokens=state.content.tokens,
            parameters=self._plan.parameters,
            drawing=_drawing(state, self._plan, tuple(self._prior)),
            max_new=min(self._left, state.room),
            context_size=state.config.context_size,
            said=self._said,
        )

    def add(self, step: Step) -> int:
        """Note a token; gives its index among those of the call."""
        self._steps.append(step)
        return len(self._prior) + len(self._steps) - 1

    def close(self, *, cancelled: bool) -> None:
        """The text that is being drawn ends here, for a reason of its own or ``cancelled``."""
        state, steps, self._steps = self._state, self._steps, []
        cancelled = cancelled and len(steps) < self._left
        drawn = _continuation(steps, _finish_reason(steps, cancelled=cancelled))
        logits = _logits(steps)
        event = TokensGenerated(
            parameters=self._plan.parameters,
            seed=self._plan.seed,
            start=state.absolute_position,
            dropped=state.dropped,
            resumes=len(self._prior),
            content=drawn.content,
            scores=drawn.scores,
            sampling_probabilities=drawn.sampling_probabilities,
            alternatives=drawn.alternatives,
            stored_logits=_stored(state, logits),
            finish_reason=drawn.finish_reason,
        )
        self._append(event, logits)
        self._prior += drawn.content.tokens
        self._said += drawn.content.text
        self._ended = event.finish_reason != "context_full" or self._slide() is None

    def cancel(self) -> None:
        """The call is cut off here, which may be where a full state was about to slide."""
        self.close(cancelled=True)
        if self.goes_on:
            self.request()
            self.close(cancelled=True)

    def _append(self, event: TokensGenerated | ContextSlid, logits: tuple[bytes, ...] = ()) -> None:
        model = None if isinstance(event, ContextSlid) else self._model
        self.appends.append(_append(self._state, event, model, logits))
        self._state = apply(self._state, event)


class ContinuationsDraft:
    """The event of one call that continues a state in several ways."""

    def __init__(
        self, state: Live, model: LanguageModel, plan: GenerationPlan, branches: int
    ) -> None:
        self.branches = branches
        self._state = state
        self._model = model
        self._plan = plan
        self._max_new = min(plan.parameters.max_tokens, state.room)
        self._steps: list[list[Step]] = [[] for _ in range(branches)]

    @property
    def begun(self) -> bool:
        """Whether there is anything to record."""
        return any(self._steps)

    def request(self) -> GenerationRequest:
        """Asks for all branches."""
        return GenerationRequest(
            tokens=self._state.content.tokens,
            parameters=self._plan.parameters,
            drawing=_drawing(self._state, self._plan),
            max_new=self._max_new,
            context_size=self._state.config.context_size,
            branches=self.branches,
        )

    def add(self, step: Step) -> int:
        """Note a token; gives its index in its branch."""
        steps = self._steps[step.branch]
        steps.append(step)
        return len(steps) - 1

    def ended(self, branch: int) -> bool:
        """Whether a branch has its last token."""
        steps = self._steps[branch]
        return len(steps) == self._max_new or (bool(steps) and steps[-1].finish_reason is not None)

    def close(self, *, cancelled: bool) -> Append:
        """All branches end here: those without a reason of their own are ``cancelled``."""
        state = self._state
        logits = tuple(blob for steps in self._steps for blob in _logits(steps))
        event = ContinuationsGenerated(
            parameters=self._plan.parameters,
            seed=self._plan.seed,
            start=state.absolute_position,
            dropped=state.dropped,
            continuations=tuple(
                _continuation(
                    steps,
                    _finish_reason(steps, cancelled=cancelled and not self.ended(branch)),
                )
                for branch, steps in enumerate(self._steps)
            ),
            stored_logits=_stored(state, logits),
        )
        return _append(state, event, self._model, logits)


def _append(
    state: Live,
    event: TokensGenerated | ContinuationsGenerated | ContextSlid,
    model: LanguageModel | None,
    logits: tuple[bytes, ...],
) -> Append:
    return Append(
        state_id=state.state_id,
        expected_version=state.version,
        event=event,
        fingerprint=model.fingerprint if model else None,
        logits=logits,
    )


def _drawing(state: Live, plan: GenerationPlan, prior: tuple[TokenId, ...] = ()) -> Drawing:
    parameters, config = plan.parameters, state.config
    return Drawing(
        sampling=parameters.sampling,
        seed=plan.seed,
        dropped=state.dropped,
        constraint=parameters.constraint,
        prior=prior,
        top_logprobs=parameters.top_logprobs,
        store_logits=config.store_logits,
        top_k_logits=config.top_k_logits,
    )


def _finish_reason(steps: Sequence[Step], *, cancelled: bool) -> FinishReason | None:
    """Why a text ended: one without a token since none fitted, if it was not cut off."""
    if not steps:
        return "cancelled" if cancelled else "context_full"
    return steps[-1].finish_reason or ("cancelled" if cancelled else None)


def _continuation(steps: Sequence[Step], finish_reason: FinishReason | None) -> Continuation:
    drawn = [step.drawn for step in steps]
    return Continuation(
        content=Fragment.of(
            [one.token_id for one in drawn],
            [step.text for step in steps],
            [step.partial for step in steps],
        ),
        scores=Scores(
            logprobs=tuple(one.logprob for one in drawn),
            ranks=tuple(one.rank for one in drawn),
            entropies=tuple(one.entropy for one in drawn),
            logsumexps=tuple(one.logsumexp for one in drawn),
            logits_digests=tuple(one.logits_digest for one in drawn),
        ),
        sampling_probabilities=tuple(one.sampling_probability for one in drawn),
        alternatives=tuple(one.alternatives for one in drawn),
        finish_reason=finish_reason,
    )


def _logits(steps: Sequence[Step]) -> tuple[bytes, ...]:
    return tuple(step.drawn.logits for step in steps if step.drawn.logits is not None)


def _stored(state: Live, logits: tuple[bytes, ...]) -> StoredLogits | None:
    if not logits:
        return None
    config = state.config
    return StoredLogits(
        kind=config.store_logits, k=config.top_k_logits, digest=blobs_digest(logits)
    )
