"""Continuing a state, token by token. Streamed or not, this is the one path."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from app.service import Call, Service
from domain import decide
from domain.chain import blobs_digest
from domain.decide import GenerationPlan, GenerationWish
from domain.events import (
    FinishReason,
    Fragment,
    GenerationStarted,
    Recorded,
    Scores,
    StoredLogits,
    TokensGenerated,
)
from domain.ids import Seed, StateId
from domain.ports import (
    Append,
    Drawing,
    GenerationRequest,
    LanguageModel,
    Provenance,
    Step,
)
from domain.state import Live


async def generate(
    service: Service, call: Call, state_id: StateId, wish: GenerationWish, *, streamed: bool
) -> AsyncGenerator[Step | Recorded, None]:
    """Continue a state: each step as it comes, then the event that records them.

    An earlier request with the same ``Idempotency-Key`` gives its event at once. Closing the
    iterator, or cancelling whoever reads it, ends the generation; the steps that had been
    yielded are recorded as ``cancelled``.
    """
    async with service.answering(call) as remembered, service.turns.turn(state_id):
        if remembered:
            yield remembered[0]
            return
        state = await service.live(state_id)
        decide.check_precondition(state, call.if_match)
        model = await service.models.get(state.model_id)
        decide.check_vocabulary("stop_token_ids", wish.stop_token_ids, model.vocabulary_size)
        plan = decide.plan_generation(state, wish, await _open_seed(service, call, state, model))
        if streamed:
            await _begin(service, call, state, model, plan)
        steps: list[Step] = []
        try:
            async with aclosing(model.generate(_request(state, plan))) as drawn:
                async for step in drawn:
                    steps.append(step)
                    yield step
                    if state_id in service.stopping:
                        break
        except (asyncio.CancelledError, GeneratorExit):
            if steps:
                await _record(service, call, state, model, plan, steps, cancelled=True)
            raise
        stopped = state_id in service.stopping
        recorded = await _record(service, call, state, model, plan, steps, cancelled=stopped)
        yield recorded[0]


async def ahead(
    items: AsyncGenerator[Step | Recorded, None],
) -> AsyncGenerator[Step | Recorded, None]:
    """``items``, produced in a task of their own: a slow reader holds up nobody.

    The generation goes on, is recorded and gives its turn back, however late it is read; what
    waits to be read is one text at most. Closing this ends it.
    """
    inbox: asyncio.Queue[Step | Recorded | Exception | None] = asyncio.Queue()
    producer = asyncio.create_task(_produce(items, inbox))
    try:
        while (item := await inbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        producer.cancel()


async def _produce(
    items: AsyncGenerator[Step | Recorded, None],
    inbox: "asyncio.Queue[Step | Recorded | Exception | None]",
) -> None:
    try:
        async with aclosing(items):
            async for item in items:
                inbox.put_nowait(item)
    except Exception as error:
        inbox.put_nowait(error)
    inbox.put_nowait(None)


async def _open_seed(service: Service, call: Call, state: Live, model: LanguageModel) -> Seed:
    """The seed for where the client left it open."""
    begun = None
    if call.idempotency is not None:
        begun = await service.log.begun_generation(call.idempotency)
    fresh = service.surroundings.fresh_seed()
    return decide.seed_to_resume(begun, state, model.fingerprint.id, fresh)


async def _begin(
    service: Service, call: Call, state: Live, model: LanguageModel, plan: GenerationPlan
) -> None:
    await service.log.begin_generation(
        GenerationStarted(
            state_id=state.state_id,
            base_version=state.version,
            parameters=plan.parameters,
            seed=plan.seed,
            fingerprint=model.fingerprint.id,
        ),
        provenance=Provenance(
            actor=call.actor,
            request_id=call.request_id,
            recorded_at=service.surroundings.now(),
        ),
        idempotency=call.idempotency,
    )


def _request(state: Live, plan: GenerationPlan) -> GenerationRequest:
    return GenerationRequest(
        tokens=state.content.tokens,
        parameters=plan.parameters,
        drawing=Drawing(
            sampling=plan.parameters.sampling,
            seed=plan.seed,
            top_logprobs=plan.parameters.top_logprobs,
            store_logits=state.config.store_logits,
            top_k_logits=state.config.top_k_logits,
        ),
        max_new=plan.max_new,
        context_size=state.config.context_size,
    )


async def _record(
    service: Service,
    call: Call,
    state: Live,
    model: LanguageModel,
    plan: GenerationPlan,
    steps: list[Step],
    *,
    cancelled: bool,
) -> tuple[Recorded, ...]:
    logits = tuple(step.drawn.logits for step in steps if step.drawn.logits is not None)
    append = Append(
        state_id=state.state_id,
        expected_version=state.version,
        event=_event(state, plan, steps, logits, _finish_reason(steps, cancelled=cancelled)),
        fingerprint=model.fingerprint,
        logits=logits,
    )
    return await service.append(call, [append])


def _finish_reason(steps: list[Step], *, cancelled: bool) -> FinishReason | None:
    """Why it ended; a state that was full before the first token ends at once."""
    if not steps:
        return "cancelled" if cancelled else "context_full"
    return steps[-1].finish_reason or ("cancelled" if cancelled else None)


def _event(
    state: Live,
    plan: GenerationPlan,
    steps: list[Step],
    logits: tuple[bytes, ...],
    finish_reason: FinishReason | None,
) -> TokensGenerated:
    drawn = [step.drawn for step in steps]
    config = state.config
    return TokensGenerated(
        parameters=plan.parameters,
        seed=plan.seed,
        start=state.head_position,
        content=Fragment.of([step.drawn.token_id for step in steps], [s.text for s in steps]),
        scores=Scores(
            logprobs=tuple(d.logprob for d in drawn),
            ranks=tuple(d.rank for d in drawn),
            entropies=tuple(d.entropy for d in drawn),
            logsumexps=tuple(d.logsumexp for d in drawn),
            logits_digests=tuple(d.logits_digest for d in drawn),
        ),
        sampling_probabilities=tuple(d.sampling_probability for d in drawn),
        alternatives=tuple(d.alternatives for d in drawn),
        stored_logits=StoredLogits(
            kind=config.store_logits, k=config.top_k_logits, digest=blobs_digest(logits)
        )
        if logits
        else None,
        finish_reason=finish_reason,
    )
