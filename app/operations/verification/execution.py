"""Computing passages anew, and holding what comes out against what events claim."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from app.operations.verification.findings import Findings
from domain import compare
from domain.compare import Evidence
from domain.config import SamplingParameters
from domain.content import Alternative
from domain.errors import InvalidInput
from domain.events import Recorded
from domain.fingerprint import Fingerprint
from domain.ids import ModelId, Position, TokenId
from domain.models import LanguageModel, Model
from domain.ports import LogReader
from domain.replay import Passage
from domain.report import Differences, Divergence, divergence
from domain.work import Drawing, Redraw, Scored, ScoreRequest

PASSAGES: Final = 256
"""Texts that a model is asked about together: what they begin with in common is computed once."""

KEPT_BYTES: Final = 1 << 28
"""Logits that are drawn again together, at most, where they are kept in full."""

ALTERNATIVES: Final = 5

Told = Callable[[], None]


class Execution:
    """Re-execution for one verification. ``told`` is called whenever there is progress."""

    def __init__(self, log: LogReader, findings: Findings, *, told: Told) -> None:
        self._log = log
        self._findings = findings
        self.told = told
        self._known: dict[str, Fingerprint | None] = {}
        self.used: dict[ModelId, str] = {}
        self.recomputed = self.reused = 0

    # fingerprints

    async def learn(self, names: Iterable[str | None]) -> None:
        """Read the fingerprints that events name."""
        for name in set(names) - self._known.keys() - {None}:
            assert name is not None
            self._known[name] = await self._log.fingerprint(name)

    def compare_fingerprint(self, recorded: Recorded) -> Divergence | None:
        """Whether a fingerprint that an event names is there, and is what its name says."""
        name = recorded.row.fingerprint
        if name is None or self.sound(recorded) is not None:
            return None
        found = self._known[name]
        return divergence(recorded, "fingerprint", name, None if found is None else found.document)

    def differences(self, recorded: Recorded, model: Model) -> Differences:
        """The facts in which the numerics of an event differ from those of now."""
        then = self.sound(recorded)
        return {} if then is None else compare.differences(then, model.fingerprint)

    def sound(self, recorded: Recorded) -> Fingerprint | None:
        """The fingerprint that an event names, if it is there and is what its name says."""
        name = recorded.row.fingerprint
        found = None if name is None else self._known[name]
        return found if found is not None and found.is_sound() else None

    # computing

    async def execute(self, asked: Sequence[Passage], model: LanguageModel) -> None:
        """Compute passages anew, without anything that was computed before, and compare."""
        self.used[model.model_id] = model.fingerprint.id
        for together in _calls(asked, model.vocabulary_size):
            scored = await self._score(together, model)
            self.recomputed += sum(one.tokens_computed for _, one in scored)
            self.reused += sum(one.tokens_reused for _, one in scored)
            await asyncio.to_thread(self._compare, compare.by_event(scored), model)
            self.told()

    async def _score(
        self, asked: Sequence[Passage], model: LanguageModel
    ) -> list[tuple[Passage, Scored]]:
        """What comes out for each passage; one that could not have been drawn is a divergence."""
        try:
            scored = await model.score([passage.request() for passage in asked], private=True)
        except InvalidInput as error:
            half = len(asked) // 2
            parts = (asked[:half], asked[half:]) if half else [(p,) for p in asked[0].apart()]
            if len(parts) > 1:
                return [pair for part in parts for pair in await self._score(part, model)]
            for claim in asked[0].claims:
                found = divergence(claim.recorded, "parameters", "allow a token", str(error))
                self._findings.diverges(found)
            return []
        return list(zip(asked, scored, strict=True))

    def _compare(self, found: Mapping[Position, Evidence], model: LanguageModel) -> None:
        eos = model.eos_token_ids
        for evidence in found.values():
            recorded = evidence.recorded
            fingerprint = self.sound(recorded)
            if fingerprint is None:
                if recorded.row.fingerprint is None:
                    self._findings.diverges(divergence(recorded, "fingerprint", None, None))
            elif fingerprint.deterministic and fingerprint.id == model.fingerprint.id:
                self._findings.diverges(compare.compare(recorded, evidence, eos))
            else:
                if not fingerprint.deterministic:
                    self._findings.not_held("some events were made without the numerics contract")
                different = compare.differences(fingerprint, model.fingerprint)
                self._findings.drift(compare.drift(recorded, evidence, eos, different))

    # explaining

    async def alternatives(
        self, texts: Sequence[tuple[TokenId, ...]], model: LanguageModel
    ) -> list[tuple[Alternative, ...]]:
        """The likeliest tokens after each of these texts."""
        found: list[tuple[Alternative, ...]] = []
        for begin in range(0, len(texts), PASSAGES):
            asked = [_likeliest(text) for text in texts[begin : begin + PASSAGES]]
            scored = await model.score(asked, private=True)
            found += [one.redrawn[0].alternatives for one in scored]
        return found


_GREEDY: Final = Drawing(
    sampling=SamplingParameters(temperature=0.0, top_k=0, top_p=1.0),
    seed=0,
    top_logprobs=ALTERNATIVES,
    store_logits="none",
    top_k_logits=0,
)


def _likeliest(text: tuple[TokenId, ...]) -> ScoreRequest:
    """Asks what comes after a text; the token that it has there is not looked at."""
    place = len(text)
    redraw = Redraw(start=place, stop=place + 1, drawing=_GREEDY)
    return ScoreRequest(tokens=(*text, TokenId(0)), start=place, redraws=(redraw,))


def _calls(asked: Sequence[Passage], vocabulary_size: int) -> Iterator[list[Passage]]:
    """Passages to compute together: those about one event, and such as begin alike.

    No more at a time than there is memory for what comes out.
    """
    groups = [list(group) for _, group in groupby(asked, key=lambda one: one.about)]
    groups.sort(key=lambda group: group[0].tokens)
    call: list[Passage] = []
    size = 0
    for group in groups:
        adds = sum(_kept_bytes(one, vocabulary_size) for one in group)
        if call and (len(call) + len(group) > PASSAGES or size + adds > KEPT_BYTES):
            yield call
            call, size = [], 0
        call += group
        size += adds
    if call:
        yield call


def _kept_bytes(passage: Passage, vocabulary_size: int) -> int:
    """About what the logits take that are kept in full."""
    full = [c for c in passage.claims if c.drawing and c.drawing.store_logits == "full"]
    return sum(len(claim.tokens) for claim in full) * vocabulary_size * 4
