"""A loaded model as the application sees it: :class:`domain.models.LanguageModel`."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any, Final, Literal, TypeVar

import torch

from domain.analysis.cache import Residence
from domain.analysis.parameters import Inside
from domain.analysis.result import Result
from domain.config import Constraint, StateConfig
from domain.content import Fragment, ToldToken
from domain.errors import ModelUnavailable, TooLarge
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, TokenId
from domain.models import CacheCounters, Dimensions, Numerics, Tier
from domain.work import BeamRequest, BeamsFound, GenerationRequest, Scored, ScoreRequest, Step
from infra.engine.analysis.cache import residence
from infra.engine.analysis.looking import look
from infra.engine.blocks import BLOCK_TOKENS, BlockPool, block_keys, blocks_for
from infra.engine.compilation import compile_kernels
from infra.engine.constraints.matching import Constraints, Language
from infra.engine.engine import Engine
from infra.engine.executor import Executor, prepare
from infra.engine.fingerprint import fingerprint
from infra.engine.forward import Prepared, Unsupported
from infra.engine.jobs.generating import Generation
from infra.engine.jobs.job import Job
from infra.engine.jobs.observation import Observation
from infra.engine.jobs.scoring import Scoring
from infra.engine.jobs.searching import Search
from infra.engine.kv_store import KVStore
from infra.engine.observing import Look, Seen
from infra.engine.options import EngineOptions
from infra.engine.probe import check_against_plain, plain_logits, probe
from infra.engine.runner import Runner
from infra.engine.sampling.comparing import largest
from infra.engine.waiting import deliver_to, done_by, encoded, taken_from, worked_out
from infra.models.loader import Loaded

Item = TypeVar("Item")

MAX_ROWS: Final = 512
"""Rows of one forward pass at most: enough for a prefill to be as fast as it gets."""

MAX_PREFILL_ROWS_BESIDE_STREAMS: Final = 48
"""Of them prefill, when texts are generated: a stream then waits about three of its usual steps."""

MAX_OBSERVED_ROWS_BESIDE_STREAMS: Final = 16
"""Of them, where all of it is looked at: nobody waits for a first token, but streams for each.

A stream's step then takes about half as long again. A question takes three times as many passes,
but not twice as long, since each reads the weights that the streams need anyway.
"""


class TransformersModel:
    """A causal language model of transformers, run by the engine."""

    model_type: Literal["causal_lm"] = "causal_lm"

    def __init__(
        self, model_id: ModelId, loaded: Loaded, engine: Engine, options: EngineOptions
    ) -> None:
        """Prepare and probe the model; takes seconds, so not on the event loop.

        Raises:
            ModelUnavailable: its results are not those of plain transformers, or the cache is
                too small for one text.
        """
        self.model_id = model_id
        self.config: dict[str, Any] = loaded.config
        self.context_size = loaded.context_size
        self.vocabulary_size: int = loaded.vocabulary_size
        self._tokenizer = loaded.tokenizer
        self.revision = loaded.revision
        self.eos_token_ids = loaded.eos_token_ids
        self._engine = engine
        self.max_beams = options.max_batch
        self.max_result_bytes = options.max_result_bytes
        self._constraints = Constraints(
            loaded.tokenizer, loaded.vocabulary_size, loaded.eos_token_ids
        )
        torch.set_num_threads(1)
        plain = plain_logits(loaded.model, self.config, self.vocabulary_size, self.context_size)
        prepared = _prepared(model_id, loaded, options)
        check_against_plain(model_id, prepared, plain, self.vocabulary_size)
        finding = probe(prepared, loaded.config, self.vocabulary_size, self.context_size)
        self.fingerprint: Fingerprint = fingerprint(prepared, loaded.identity, finding)
        self.numerics = Numerics(
            deterministic=finding.failure is None,
            fingerprint=self.fingerprint.id,
            strategy=prepared.strategy,
            dtype=str(options.dtype).removeprefix("torch."),
            quantum=prepared.quantum,
            query_tile=prepared.query_tile,
            note=finding.failure or f"contract probed up to {finding.tokens} tokens",
        )
        geometry = prepared.geometry
        self.dimensions = Dimensions(
            layers=geometry.layers,
            heads=geometry.query_heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            width=loaded.width,
        )
        self._root = bytes.fromhex(self.fingerprint.id)
        self._block_bytes = geometry.block_bytes(options.dtype)
        blocks = options.hot_cache_bytes // self._block_bytes
        if blocks <= blocks_for(self.context_size):
            needed = (blocks_for(self.context_size) + 1) * self._block_bytes
            raise ModelUnavailable(
                model_id,
                f"one full text needs {needed} bytes of KV cache",
                "Raise CACHER_HOT_CACHE_BYTES",
            )
        slots = _host_slots(prepared, options)
        device = prepared.shape.device
        store = KVStore(geometry, blocks, options.dtype, device=device, host_slots=slots)
        self._runner = Runner(
            Executor(prepared, store),
            BlockPool(blocks, host_slots=slots),
            max_sequences=options.max_batch,
            max_rows=MAX_ROWS,
            max_prefill_rows_beside_streams=MAX_PREFILL_ROWS_BESIDE_STREAMS,
            max_observed_rows_beside_streams=MAX_OBSERVED_ROWS_BESIDE_STREAMS,
        )

    async def encode(self, text: str, *, beginning: bool, room: int) -> tuple[TokenId, ...]:
        """Tokens of a text; see the port. Long texts are encoded off the event loop."""
        return await encoded(self._tokenizer, text, beginning=beginning, room=room)

    def opening(self) -> tuple[TokenId, ...]:
        """Tokens of a state that begins with nothing: BOS, or EOS where there is no BOS."""
        tokenizer = self._tokenizer
        tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return tuple(token for token in tokens if token is not None)[:1]

    def fragment(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> Fragment:
        """``tokens`` with the text each of them adds after ``before``."""
        return self._tokenizer.fragment(before, tokens)

    def told(self, before: Sequence[TokenId], tokens: Sequence[TokenId]) -> list[ToldToken]:
        """Each of ``tokens`` with the text that it would add, by itself, after ``before``."""
        return self._tokenizer.told(before, tokens)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """Draw tokens one by one. Closing the iterator ends the work and frees its memory."""
        if request.max_new == 0:
            return
        inbox: asyncio.Queue[Step | Exception | None] = asyncio.Queue()
        begin = functools.partial(self._generations, request, deliver_to(inbox))
        constraint = request.drawing.constraint
        async with self._compiled([constraint]):
            jobs = await asyncio.to_thread(begin) if constraint else begin()
        unfinished = len(jobs)
        try:
            for job in jobs:
                self._start(job)
            while unfinished:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    unfinished -= 1
                else:
                    yield item
        finally:
            for job in jobs:
                self._engine.cancel(self._runner, job)

    def _generations(
        self, request: GenerationRequest, deliver: Callable[[Step | Exception | None], None]
    ) -> list[Generation]:
        """A job for each branch; a constraint reads what the call drew before, which can take."""
        return [
            Generation(
                request,
                branch,
                root=self._root,
                tokenizer=self._tokenizer,
                constraints=self._constraints,
                eos_token_ids=self.eos_token_ids,
                deliver=deliver,
                recorder=self._engine.recorder,
            )
            for branch in range(request.branches)
        ]

    async def search(self, request: BeamRequest) -> BeamsFound:
        """Continue a text by beam search. Cancelling it ends the work and frees its memory."""
        inbox: asyncio.Queue[BeamsFound | Exception] = asyncio.Queue()
        job = Search(
            request,
            root=self._root,
            tokenizer=self._tokenizer,
            eos_token_ids=self.eos_token_ids,
            scheduler=self._runner.scheduler,
            deliver=deliver_to(inbox),
            recorder=self._engine.recorder,
        )
        return await self._result(job, inbox)

    async def score(
        self, requests: Sequence[ScoreRequest], *, private: bool = False
    ) -> list[Scored]:
        """Score texts at prefill speed, together; see the port."""
        self._check_length(max((len(request.tokens) for request in requests), default=0))
        inbox: asyncio.Queue[list[Scored] | Exception] = asyncio.Queue()
        job = Scoring(
            requests,
            root=None if private else self._root,
            scheduler=self._runner.scheduler,
            tokenizer=self._tokenizer,
            constraints=self._constraints,
            eos_token_ids=self.eos_token_ids,
            deliver=deliver_to(inbox),
            recorder=self._engine.recorder,
        )
        redraws = (redraw for request in requests for redraw in request.redraws)
        async with self._compiled(redraw.drawing.constraint for redraw in redraws):
            return await self._result(job, inbox)

    @contextlib.asynccontextmanager
    async def _compiled(
        self, constraints: Iterable[Constraint | None]
    ) -> AsyncGenerator[list[Language], None]:
        """Holds constraints compiled, so that no thread that others wait for has to do it."""
        held = [await self._constraints.language(each) for each in set(constraints) if each]
        yield held

    async def _result(self, job: Job, inbox: "asyncio.Queue[Item | Exception]") -> Item:
        """What a job delivers once it is done."""
        self._start(job)
        try:
            return await taken_from(inbox)
        finally:
            self._engine.cancel(self._runner, job)

    async def observe(self, look: Look, *, private: bool = False) -> Seen:
        """Compute a text and see what is inside; ``private`` as for :meth:`score`."""
        self._check_length(len(look.tokens))
        inbox: asyncio.Queue[Observation | Exception] = asyncio.Queue()
        job = Observation(
            look,
            root=None if private else self._root,
            store=self._runner.executor.store,
            deliver=deliver_to(inbox),
        )
        self._runner.executor.check(job.sites)
        await self._result(job, inbox)
        return await worked_out(job.seen)

    async def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``(rows, vocabulary)`` of hidden states ``(rows, width)`` of any layer.

        They go through the last normalisation and the head, on the engine's thread, a few rows at a
        time where streams wait.
        """
        logits = torch.empty(len(hidden), self.vocabulary_size)
        done = 0
        while done < len(hidden):
            some = functools.partial(self._project_some, hidden[done:], logits[done:])
            done += await done_by(self._engine, some)
        return logits

    def _project_some(self, hidden: torch.Tensor, logits: torch.Tensor) -> int:
        """Project as many rows as a pass may have; returns how many."""
        rows = MAX_PREFILL_ROWS_BESIDE_STREAMS if self._engine.streaming else MAX_ROWS
        logits[:rows] = self._runner.executor.project(hidden[:rows])
        return rows

    async def largest(self, rows: Sequence[bytes], k: int) -> list[bytes]:
        """The ``k`` largest logits of rows that were kept ``full``; see the port."""
        return await asyncio.to_thread(lambda: [largest(row, k) for row in rows])

    async def look(
        self,
        tokens: Sequence[TokenId],
        config: StateConfig,
        parameters: Inside,
        *,
        private: bool = False,
    ) -> Result:
        """Look inside a text; see the port."""
        return await look(self, tuple(tokens), config, parameters, private=private)

    async def check_constraint(self, constraint: Constraint) -> None:
        """Make sure that a text can be held to a constraint; see the port."""
        await self._constraints.language(constraint)

    def fulfils(self, constraint: Constraint, tokens: Sequence[TokenId]) -> bool:
        """Whether tokens satisfy a constraint that allows nothing after them."""
        return self._constraints.matcher(constraint, tokens).fulfilled

    def tokens_hot(self, tokens: Sequence[TokenId]) -> int:
        """How many leading tokens have their K/V in the cache."""
        keys = block_keys(self._root, tokens, limit=len(tokens))
        return self._runner.pool.count_cached(keys) * BLOCK_TOKENS

    def residence(self, tokens: Sequence[TokenId]) -> Residence:
        """Where the K/V of a text's whole blocks is."""
        keys = block_keys(self._root, tokens, limit=len(tokens))
        return residence(self._runner.pool, keys, self._block_bytes)

    def tier(self, tokens: Sequence[TokenId]) -> Tier:
        """The slowest memory that a hot token's K/V would come from."""
        keys = block_keys(self._root, tokens, limit=len(tokens))
        hot = self._runner.pool.count_cached(keys)
        if not hot:
            return "none"
        on_device = self._runner.pool.count_cached(keys, on_device=True)
        return "device" if on_device == hot else "host"

    def counters(self) -> CacheCounters:
        """Counters of the KV cache."""
        pool, scheduler = self._runner.pool, self._runner.scheduler
        return CacheCounters(
            block_tokens=BLOCK_TOKENS,
            block_bytes=self._block_bytes,
            blocks_capacity=pool.capacity - 1,
            blocks_held=pool.held,
            blocks_cached=pool.cached,
            blocks_free=pool.free,
            blocks_shared=pool.shared,
            host_blocks_capacity=pool.host.slots,
            host_blocks_cached=len(pool.host),
            hits=pool.hits,
            misses=pool.misses,
            evictions=pool.evictions,
            restores=pool.restores,
            sequences=scheduler.running + scheduler.waiting,
            sequences_waiting=scheduler.waiting,
        )

    async def forget(self) -> None:
        """Drop every block of the cache that no running work holds."""
        await done_by(self._engine, self._runner.pool.forget)

    def _check_length(self, tokens: int) -> None:
        if tokens > self.context_size:
            raise TooLarge(f"a text of {tokens} tokens is longer than {self.context_size}")

    def _start(self, job: Job) -> None:
        if not self._runner.scheduler.fits(job.text):
            raise TooLarge(
                f"{job.text.width} texts of {job.text.limit} tokens do not fit the KV cache:"
                " ask for less, or raise CACHER_HOT_CACHE_BYTES"
            )
        self._engine.start(self._runner, job)


def _host_slots(prepared: Prepared, options: EngineOptions) -> int:
    """Blocks that had to leave a GPU and are kept."""
    on_gpu = prepared.shape.device.type == "cuda"
    return prepared.geometry.host_slots(options.dtype, options.host_cache_bytes if on_gpu else 0)


def _prepared(model_id: ModelId, loaded: Loaded, options: EngineOptions) -> Prepared:
    """The model made ready, and all kernels that answers are worked out by."""
    compile_kernels()
    try:
        return prepare(
            loaded.model,
            options.strategy,
            options.dtype,
            threads=options.threads,
            context=loaded.context_size,
            vocabulary=loaded.vocabulary_size,
            device=options.device,
        )
    except Unsupported as error:
        raise ModelUnavailable(
            model_id,
            f"no kernel strategy can run it: {error}",
            "Use a model of another family, or CACHER_STRATEGY=auto",
        ) from error
