"""Replaying a history to see what another model, library, number format or machine changes.

What is found is looked at in threads. Of the places of a log no more is held than one batch of
states, or one large state, needs; of all the others, a number each.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from app.operations.replays import Replay, Replays, Skipped
from domain import compare, regress, teacher_forcing
from domain.baseline import Baseline, BaselineWriter
from domain.content import Alternative
from domain.errors import NotComparable, Refusal, invalid
from domain.ids import ModelId, StateId, TokenId
from domain.models import LanguageModel, Models
from domain.ports import LogReader
from domain.regress import Limits, Place, Regression, StateRegression, Strip, Tally
from domain.work import RowKind, Scored

BATCH_TOKENS: Final = 4096
"""Tokens from which on states are enough for a batch: what they begin with is computed once."""
BATCH_BYTES: Final = 64 << 20
"""Bytes of rows of logits from which on they are enough, too."""
LIKELIEST: Final = 5
"""So many of the likeliest tokens are shown at each place of a strip."""

Progress = Callable[[int, int], None]


class Request(Struct, frozen=True, kw_only=True):
    """What to replay: some states, or all; with one model, or each state with its own."""

    state_ids: tuple[StateId, ...] | None = None
    model_id: ModelId | None = None
    limits: Limits = Limits()


class Regressor:
    """One replay of one log, held against what the log says, or against a baseline.

    A ``writer`` is given what is found, as a new baseline. ``progress`` is told states done and
    states in all.
    """

    def __init__(
        self,
        log: LogReader,
        models: Models,
        *,
        baseline: Baseline | None = None,
        writer: BaselineWriter | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self._log = log
        self._models = models
        self._baseline = baseline
        self._writer = writer
        self._progress = progress
        self._kind: RowKind = writer.kind if writer else "top_k"
        self._k = writer.k if writer else LIKELIEST
        self._limits = Limits()
        self._overall = Tally()
        self._found: dict[StateId, StateRegression] = {}
        self._used: dict[ModelId, str] = {}
        self._differences: dict[tuple[str, str], dict[str, tuple[Any, Any]]] = {}

    async def run(self, request: Request) -> Regression:
        """Replay and report.

        Raises:
            NotComparable: nothing could be replayed, or not what the baseline is of.
            StateNotFound: a state that was asked for does not exist.
            NotFound, ModelUnavailable: the one model that was asked for cannot be had.
            LogError: the log is not sound.
        """
        self._limits = request.limits
        if request.model_id is not None:
            model = await self._models.get(request.model_id)
            if model.model_type != "causal_lm":
                raise invalid("model_id", f"{model.model_id!r} is a classifier, not a causal_lm")
        head = await self._log.head()
        state_ids = await self._state_ids(request)
        replays = Replays(
            self._log,
            self._models,
            until=head.position,
            model_id=request.model_id,
            baseline=self._baseline,
        )
        await self._replay(state_ids, replays)
        states = tuple(self._found[one] for one in state_ids if one in self._found)
        overall = self._overall.summary()
        if overall is None:
            reasons = dict.fromkeys(state.skipped for state in states)
            raise NotComparable(f"nothing was replayed: {'; '.join(map(str, reasons))}")
        if self._writer:
            await asyncio.to_thread(self._writer.finish, self._log.log_id, head)
        return Regression(
            log=self._log.log_id,
            before="the baseline" if self._baseline else "the log",
            model=", ".join(self._used),
            fingerprint=", ".join(self._used.values()),
            differences=regress.merged(self._differences.values()),
            limits=request.limits,
            overall=overall,
            states=states,
            failures=tuple(f"{one.state_id}: {f}" for one in states for f in one.failures),
        )

    async def _state_ids(self, request: Request) -> tuple[StateId, ...]:
        asked = None if request.state_ids is None else tuple(dict.fromkeys(request.state_ids))
        if self._baseline is None:
            return tuple(await self._log.state_ids()) if asked is None else asked
        known = self._baseline.state_ids()
        unknown = [one for one in asked or () if one not in known]
        if unknown:
            raise NotComparable(f"the baseline has no state {unknown[0]!r}")
        return known if asked is None else asked

    async def _replay(self, state_ids: Sequence[StateId], replays: Replays) -> None:
        """Replay states in batches of one model each."""
        batch: list[Replay] = []
        for done, state_id in enumerate(state_ids):
            self._progress(done, len(state_ids))
            try:
                replay = await replays.of(state_id)
            except Skipped as reason:
                self._skip(state_id, str(reason))
                continue
            if replay is not None:
                if batch and (batch[0].model is not replay.model or self._is_full(batch)):
                    await self._score(batch)
                    batch = []
                batch.append(replay)
        if batch:
            await self._score(batch)
        self._progress(len(state_ids), len(state_ids))

    def _is_full(self, batch: Sequence[Replay]) -> bool:
        tokens = sum(replay.tokens for replay in batch)
        row = 4 * batch[0].model.vocabulary_size if self._kind == "raw" else 8 * self._k
        size = tokens * row + sum(replay.row_bytes for replay in batch)
        return tokens >= BATCH_TOKENS or size >= BATCH_BYTES

    def _skip(self, state_id: StateId, reason: str) -> None:
        missed = f"the baseline has it, and it was not replayed: {reason}"
        self._found[state_id] = StateRegression(
            state_id=state_id,
            summary=None,
            worst=(),
            failures=(missed,) if self._baseline else (),
            skipped=reason,
        )

    async def _score(self, batch: Sequence[Replay]) -> None:
        """Replay some states at once, without anything that was computed before."""
        requests = [
            teacher_forcing.request(passage, before, self._kind, self._k)
            for replay in batch
            for passage, before in zip(replay.passages, replay.before, strict=True)
        ]
        try:
            scored = iter(await batch[0].model.score(requests, private=True))
        except Refusal as error:
            if len(batch) == 1:
                self._skip(batch[0].covered.state_id, str(error))
            else:
                for replay in batch:
                    await self._score([replay])
            return
        for replay in batch:
            await asyncio.to_thread(self._take, replay, [next(scored) for _ in replay.passages])

    def _take(self, replay: Replay, scored: Sequence[Scored]) -> None:
        """Take in what was found of a state."""
        texts = [
            teacher_forcing.places(*one)
            for one in zip(replay.passages, replay.before, scored, strict=True)
        ]
        tally = Tally()
        for text in texts:
            tally.add(text)
            self._overall.add(text)
        summary = tally.summary()
        assert summary is not None
        self._found[replay.covered.state_id] = StateRegression(
            state_id=replay.covered.state_id,
            summary=summary,
            worst=self._strips(texts, scored, replay.model),
            failures=regress.failures(summary, self._limits),
        )
        now = replay.model.fingerprint
        self._used[replay.model.model_id] = now.id
        for was in replay.numerics:
            self._differences.setdefault((was.id, now.id), compare.differences(was, now))
        if self._writer:
            kept = [
                one
                for line in zip(replay.passages, scored, replay.before, strict=True)
                for one in teacher_forcing.before_next_time(*line, self._kind)
            ]
            self._writer.add(replay.covered, kept)

    def _strips(
        self, texts: Sequence[Sequence[Place]], scored: Sequence[Scored], model: LanguageModel
    ) -> tuple[Strip, ...]:
        """The worst places with those around them, and what is likeliest at each now."""
        return tuple(
            Strip(
                places=tuple(
                    replace(
                        texts[span.text][at],
                        alternatives=self._alternatives(scored[span.text], at, model),
                    )
                    for at in range(span.start, span.stop)
                ),
                worst=span.worst - span.start,
            )
            for span in regress.worst(texts)
        )

    def _alternatives(
        self, scored: Scored, at: int, model: LanguageModel
    ) -> tuple[Alternative, ...]:
        logsumexp = scored.scores.logsumexps[at]
        return tuple(
            Alternative(token_id=token, text=_text(model, token), logprob=logit - logsumexp)
            for token, logit in regress.likeliest(self._kind, scored.rows[at], LIKELIEST)
        )


def _text(model: LanguageModel, token: TokenId) -> str:
    """A token on its own, as far as it is text."""
    alone = model.fragment((), (token,))
    return alone.text or "\N{REPLACEMENT CHARACTER}" * len(alone.partial)
