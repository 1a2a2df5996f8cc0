"""Continuing a state, in one way or in several. Streamed or not, this is the one path."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import Struct

from app import answers
from app.operations.drafts import ContinuationsDraft, TokensDraft
from app.schemas import StreamedToken
from app.service import Call, Service
from app.turns import Turns
from domain import decide, plan
from domain.errors import NothingToResume
from domain.events import ContinuationsGenerated, Recorded, TokensGenerated
from domain.ids import Seed, StateId, Version
from domain.intents import GenerationStarted
from domain.models import LanguageModel
from domain.plan import GenerationPlan, GenerationWish
from domain.ports import Provenance
from domain.state import Live
from domain.work import Step

Made = tuple[Recorded, ...]
"""What a call made, in order: events that together are its answer."""

Items = AsyncGenerator[StreamedToken | Made, None]
"""The tokens of a call as they come, then what it made."""


class Wish(Struct, frozen=True, kw_only=True):
    """What is to be done to a state: a generation, whether its tokens are sent as they come.

    ``resuming``: a stream of the same request was cut off, and this one goes on from there.
    """

    state_id: StateId
    generation: GenerationWish
    streamed: bool
    resuming: bool


class _Opened(Struct, frozen=True):
    state: Live
    model: LanguageModel
    plan: GenerationPlan


async def generate(service: Service, call: Call, wish: Wish) -> Items:
    """Continue a state: each token as it comes, then the events that record them.

    An earlier request with the same ``Idempotency-Key`` gives its events at once; one that
    resumes a stream gives the tokens of its events, then the rest. Closing the iterator, or
    cancelling whoever reads it, ends the generation; the tokens of a stream that had been yielded
    are recorded as ``cancelled``.
    """
    async with service.answering(call) as remembered, service.turns.turn(wish.state_id):
        earlier = await _whole_call(service, remembered or ())
        done = bool(earlier) and not (wish.resuming and _was_cut_off(earlier))
        opened = None if done else await _open(service, call, wish, earlier)
        for token in answers.streamed(earlier):
            yield token
        if opened is None:
            yield earlier
            return
        draft = TokensDraft(opened.state, opened.model, opened.plan, earlier)
        try:
            while draft.goes_on:
                async with aclosing(opened.model.generate(draft.request())) as steps:
                    async for step in steps:
                        yield answers.streamed_step(step, draft.add(step))
                        if wish.state_id in service.stopping:
                            break
                draft.close(cancelled=wish.state_id in service.stopping)
        except (asyncio.CancelledError, GeneratorExit):
            if wish.streamed and draft.begun:
                draft.cancel()
                await service.append(call, draft.appends, replaces=bool(earlier))
            raise
        recorded = await service.append(call, draft.appends, replaces=bool(earlier))
        yield earlier + _texts(recorded)


async def generate_multi(service: Service, call: Call, wish: Wish, branches: int) -> Items:
    """Continue a state in several ways; the state stays as it is. As :func:`generate`.

    Tokens come in a fixed order, the first ones of all branches before the second ones. A stream
    that resumes another draws everything again and is given whole: its head has not moved.
    """
    turn = service.turns.turn(wish.state_id, count=branches)
    async with service.answering(call) as remembered, turn:
        earlier = remembered or ()
        if earlier and not (wish.resuming and _was_cut_off(earlier)):
            for token in answers.streamed(earlier):
                yield token
            yield earlier
            return
        opened = await _open(service, call, wish, earlier, branches)
        draft = ContinuationsDraft(opened.state, opened.model, opened.plan, branches)
        try:
            async with aclosing(opened.model.generate(draft.request())) as steps:
                async for step in _in_order(steps, draft):
                    yield answers.streamed_step(step, draft.add(step), branch=step.branch)
                    if wish.state_id in service.stopping:
                        break
        except (asyncio.CancelledError, GeneratorExit):
            if wish.streamed and draft.begun:
                await service.append(call, [draft.close(cancelled=True)], replaces=bool(earlier))
            raise
        appends = [draft.close(cancelled=wish.state_id in service.stopping)]
        yield await service.append(call, appends, replaces=bool(earlier))


async def ahead(items: Items) -> Items:
    """``items``, produced in a task of their own: a slow reader holds up nobody.

    The generation goes on, is recorded and gives its turn back, however late it is read; what
    waits to be read is one answer at most. Closing this ends it.
    """
    inbox: asyncio.Queue[StreamedToken | Made | Exception | None] = asyncio.Queue()
    producer = asyncio.create_task(_produce(items, inbox))
    try:
        while (item := await inbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        producer.cancel()


async def counted(streams: Turns, items: Items) -> Items:
    """``items``, which are one of no more ``streams`` than may be open, read or not.

    Raises:
        QueueFull: there are too many.
    """
    async with streams.turn(object()), aclosing(items):
        async for item in items:
            yield item


async def _produce(
    items: Items, inbox: "asyncio.Queue[StreamedToken | Made | Exception | None]"
) -> None:
    try:
        async with aclosing(items):
            async for item in items:
                inbox.put_nowait(item)
    except Exception as error:
        inbox.put_nowait(error)
    inbox.put_nowait(None)


async def _in_order(
    steps: AsyncGenerator[Step, None], draft: ContinuationsDraft
) -> AsyncGenerator[Step, None]:
    """Steps of several branches: the first one of each, then the second one of each ..."""
    waiting: list[deque[Step]] = [deque() for _ in range(draft.branches)]
    running = deque(range(draft.branches))
    async for step in steps:
        waiting[step.branch].append(step)
        while running and waiting[running[0]]:
            branch = running.popleft()
            yield waiting[branch].popleft()
            if not draft.ended(branch):
                running.append(branch)


async def _whole_call(service: Service, events: Sequence[Recorded]) -> Made:
    """All texts that a call generated, also those before it was cut off and resumed."""
    texts = _texts(events)
    version = texts[0].version if texts else 0
    while texts and isinstance(first := texts[0].event, TokensGenerated) and first.resumes:
        version = Version(version - 1)
        texts = _texts([await service.event(texts[0].state_id, version)]) + texts
    return texts


def _texts(events: Sequence[Recorded]) -> Made:
    """Those of a call's events that hold what it generated."""
    return tuple(one for one in events if isinstance(one.event, TokensGenerated))


def _was_cut_off(made: Made) -> bool:
    match made[-1].event:
        case TokensGenerated() as last:
            drawn = last.resumes + len(last.content.tokens)
            return last.finish_reason == "cancelled" and drawn < last.parameters.max_tokens
        case ContinuationsGenerated() as event:
            return any(one.finish_reason == "cancelled" for one in event.continuations)
    return False


async def _open(
    service: Service, call: Call, wish: Wish, earlier: Made, branches: int = 1
) -> _Opened:
    """Everything a generation begins with; the intent of a stream is on disk then.

    ``earlier`` is what the call made before it was cut off: it goes on as it began.
    """
    state = await service.live(wish.state_id)
    if not earlier:
        decide.check_precondition(state, call.if_match)
    model = await service.model(state)
    if earlier:
        plan.check_resumable(earlier[-1], state, model.fingerprint.id)
        event = earlier[-1].event
        assert isinstance(event, TokensGenerated | ContinuationsGenerated)
        planned = GenerationPlan(parameters=event.parameters, seed=event.seed)
    else:
        plan.check_tokens(wish.generation, model.vocabulary_size)
        seed = await _open_seed(service, call, state, model, resuming=wish.resuming)
        planned = plan.plan_generation(state, wish.generation, seed)
        size = model.vocabulary_size
        plan.check_kept(state.config, planned.parameters, branches, vocabulary_size=size)
    if planned.parameters.constraint:
        await model.check_constraint(planned.parameters.constraint)
    if wish.streamed:
        await _begin(service, call, state, model, planned)
    return _Opened(state, model, planned)


async def _open_seed(
    service: Service, call: Call, state: Live, model: LanguageModel, *, resuming: bool
) -> Seed:
    """The seed for where the client left it open."""
    begun = None
    if call.idempotency is not None:
        begun = await service.log.begun_generation(call.idempotency)
        if begun is None and resuming:
            raise NothingToResume(call.idempotency.key)
    fresh = service.surroundings.fresh_seed()
    return plan.seed_to_resume(begun, state, model.fingerprint.id, fresh)


async def _begin(
    service: Service, call: Call, state: Live, model: LanguageModel, planned: GenerationPlan
) -> None:
    await service.log.begin_generation(
        GenerationStarted(
            state_id=state.state_id,
            base_version=state.version,
            parameters=planned.parameters,
            seed=planned.seed,
            fingerprint=model.fingerprint.id,
        ),
        provenance=Provenance(
            actor=call.actor,
            request_id=call.request_id,
            recorded_at=service.surroundings.now(),
        ),
        idempotency=call.idempotency,
    )
