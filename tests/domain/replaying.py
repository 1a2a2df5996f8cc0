"""An oracle in place of a model, and histories of one state as it would have made them.

What the oracle says is some pure function of the tokens before and of what it is asked.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from hypothesis import strategies as st

from domain import compare
from domain.beams import BeamSearch, Candidate, Candidates, candidates_needed, ends_of
from domain.chain import blobs_digest
from domain.config import (
    BeamParameters,
    ConfigChanges,
    Constraint,
    GenerationParameters,
    LogitsParameters,
    SamplingParameters,
)
from domain.content import Alternative, Fragment, Scores, StoredLogits
from domain.decide import make_room
from domain.events import (
    Beam,
    BeamsGenerated,
    ConfigChanged,
    ContextSlid,
    Continuation,
    ContinuationsGenerated,
    Event,
    FinishReason,
    HeadRewound,
    TextForwarded,
    TokensGenerated,
)
from domain.ids import TokenId
from domain.replay import occurrences, passages
from domain.report import Divergence
from domain.state import Live, apply
from domain.stopping import Stopping
from domain.work import Drawing, Drawn, Scored, ScoreRequest
from tests.builders import created, fragment, history, live

VOCABULARY: Final = 128
EOS: Final = frozenset({TokenId(0)})
INSIDE_A_CHARACTER: Final = 120
"""Tokens from here on add nothing to the text."""

Tokens = tuple[TokenId, ...]


def generation(**changes: Any) -> GenerationParameters:
    sampling = SamplingParameters(temperature=0.7, top_k=40, top_p=0.9)
    given: dict[str, Any] = {"sampling": sampling, "max_tokens": 4, "top_logprobs": 1}
    return GenerationParameters(**(given | changes))


def beams(**changes: Any) -> BeamParameters:
    given: dict[str, Any] = {"logits": LogitsParameters(), "max_tokens": 4, "num_beams": 3}
    return BeamParameters(**(given | {"num_return": 2} | changes))


# the oracle


def noise(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def text_of(_: Sequence[TokenId], tokens: Sequence[TokenId]) -> Fragment:
    inside = [token >= INSIDE_A_CHARACTER for token in tokens]
    return Fragment.of(
        tokens,
        ["" if cut else chr(token) for token, cut in zip(tokens, inside, strict=True)],
        [bytes([token]) if cut else None for token, cut in zip(tokens, inside, strict=True)],
    )


def fulfils(constraint: Constraint, tokens: Sequence[TokenId]) -> bool:
    """The constraints of the oracle are numbers: of so many tokens a text is."""
    return len(tokens) >= int(constraint.text)


def score(before: Tokens, token: TokenId) -> Scores:
    return Scores(
        logprobs=(-noise(before, token) / 8,),
        ranks=(noise(before, token) % VOCABULARY,),
        entropies=(noise(before) / 7,),
        logsumexps=(noise(before) / 9,),
        logits_digests=(f"{noise(before):016x}",),
    )


def scores_at(tokens: Tokens, start: int) -> Scores:
    parts = [score(tokens[:place], tokens[place]) for place in range(start, len(tokens))]
    fields = Scores.__struct_fields__
    return Scores(**{f: tuple(v for part in parts for v in getattr(part, f)) for f in fields})


def draw(before: Tokens, drawing: Drawing) -> Drawn:
    position = len(before) + drawing.dropped
    chance = noise(before, drawing.seed, drawing.branch, position, drawing.sampling)
    if drawing.constraint:
        chance = noise(chance, drawing.constraint, drawing.prior)
    token = TokenId(chance % VOCABULARY)
    scores = score(before, token)
    return Drawn(
        token_id=token,
        logprob=scores.logprobs[0],
        rank=scores.ranks[0],
        entropy=scores.entropies[0],
        logsumexp=scores.logsumexps[0],
        logits_digest=scores.logits_digests[0],
        sampling_probability=1 / (1 + chance),
        alternatives=(Alternative(token_id=token, text="", logprob=noise(before, "best") / 7),)
        * drawing.top_logprobs,
        logits=None if drawing.store_logits == "none" else b"%d" % noise(before),
    )


def candidates(before: Tokens, parameters: BeamParameters) -> Candidates:
    count = candidates_needed(parameters, len(EOS) + len(parameters.stop_token_ids))
    tokens = dict.fromkeys(
        noise(before, parameters.logits, parameters.no_repeat_ngram_size, i) % VOCABULARY
        for i in range(count)
    )
    found = [Candidate(TokenId(token), -noise(before, token) / 2**40) for token in tokens]
    return tuple(sorted(found, key=lambda one: (-one.logprob, one.token)))


def execute(request: ScoreRequest) -> Scored:
    tokens, asked = request.tokens, request.candidates
    redrawn = [
        draw(tokens[:place], redraw.drawing)
        for redraw in request.redraws
        for place in range(redraw.start, redraw.stop)
    ]
    places = range(request.start, len(tokens))
    return Scored(
        scores=scores_at(tokens, request.start),
        redrawn=tuple(redrawn),
        candidates=tuple(candidates(tokens[:place], asked) for place in places) if asked else (),
        tokens_computed=0,
        tokens_reused=0,
    )


# what it would have made of a state


class Story:
    """The history of one state as it comes to be."""

    def __init__(self, text: str = "abc", **config: Any) -> None:
        settings: dict[str, Any] = {"store_logits": "top_k", "top_k_logits": 2}
        first = created(text, **(settings | config))
        self.events: list[Event] = [first]
        self.state: Live = live(first)

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self.state = apply(self.state, event)

    def configure(self, **changes: Any) -> None:
        self._add(ConfigChanged(changes=ConfigChanges(**changes)))

    def rewind(self, position: int) -> None:
        self._add(HeadRewound(to_position=position))

    def forward(self, text: str) -> None:
        if (slid := make_room(self.state, len(text))) is not None:
            self._add(slid)
        content, held = fragment(text), self.state.content.tokens
        self._add(
            TextForwarded(
                start=self.state.absolute_position,
                dropped=self.state.dropped,
                content=content,
                scores=scores_at(held + content.tokens, len(held)),
            )
        )

    def generate(
        self, parameters: GenerationParameters, seed: int, leaves_after: int = 1000
    ) -> None:
        """Draw, slide and draw on; the client leaves after so many tokens of the call."""
        self._draw(parameters, seed, (), leaves_after)

    def resume(self) -> None:
        """The client of the last generation comes back."""
        parts: list[TokensGenerated] = []
        for event in reversed(self.events):
            if isinstance(event, TokensGenerated):
                parts.insert(0, event)
                if not event.resumes:
                    break
        self._draw(parts[0].parameters, parts[0].seed, tuple(part.content for part in parts), 1000)

    def _draw(
        self,
        parameters: GenerationParameters,
        seed: int,
        earlier: tuple[Fragment, ...],
        leaves_after: int,
    ) -> None:
        while True:
            prior = tuple(token for content in earlier for token in content.tokens)
            left = parameters.max_tokens - len(prior)
            if self.state.config.on_full == "slide" and not self.state.room:
                self._add(ContextSlid(dropped=self.state.config.slide_count))
            said = "".join(content.text for content in earlier)
            most = min(left, leaves_after - len(prior))
            drawing = self._drawing(parameters, seed, 0, prior)
            run, logits = self._run(parameters, drawing, said, most)
            self._add(
                TokensGenerated(
                    parameters=parameters,
                    seed=seed,
                    start=self.state.absolute_position,
                    dropped=self.state.dropped,
                    resumes=len(prior),
                    stored_logits=self._stored(logits),
                    **{name: getattr(run, name) for name in Continuation.__struct_fields__},
                )
            )
            earlier = (*earlier, run.content)
            slides = self.state.config.on_full == "slide" and len(run.content.tokens) < most
            if run.finish_reason != "context_full" or not slides:
                return

    def multi(self, parameters: GenerationParameters, seed: int, count: int) -> None:
        """Draw ``count`` continuations."""
        drawings = [self._drawing(parameters, seed, branch, ()) for branch in range(count)]
        runs = [self._run(parameters, drawing, "", parameters.max_tokens) for drawing in drawings]
        self._add(
            ContinuationsGenerated(
                parameters=parameters,
                seed=seed,
                start=self.state.absolute_position,
                dropped=self.state.dropped,
                continuations=tuple(run for run, _ in runs),
                stored_logits=self._stored(tuple(blob for _, logits in runs for blob in logits)),
            )
        )

    def _drawing(
        self, parameters: GenerationParameters, seed: int, branch: int, prior: Tokens
    ) -> Drawing:
        return Drawing(
            sampling=parameters.sampling,
            seed=seed,
            branch=branch,
            dropped=self.state.dropped,
            constraint=parameters.constraint,
            prior=prior,
            top_logprobs=parameters.top_logprobs,
            store_logits=self.state.config.store_logits,
            top_k_logits=self.state.config.top_k_logits,
        )

    def _stored(self, logits: tuple[bytes, ...]) -> StoredLogits | None:
        config = self.state.config
        if not logits:
            return None
        return StoredLogits(
            kind=config.store_logits, k=config.top_k_logits, digest=blobs_digest(logits)
        )

    def _run(
        self, parameters: GenerationParameters, drawing: Drawing, said: str, most: int
    ) -> tuple[Continuation, tuple[bytes, ...]]:
        held, room = self.state.content.tokens, self.state.room
        stopping = Stopping(
            parameters,
            eos_token_ids=EOS,
            held=len(held),
            context_size=self.state.config.context_size,
            said=said,
        )
        drawn: list[Drawn] = []
        tokens: Tokens = ()
        reason: FinishReason | None = None if room else "context_full"
        while reason is None and len(drawn) < min(most, room):
            drawn.append(draw(held + tokens, drawing))
            tokens = (*tokens, drawn[-1].token_id)
            whole = drawing.prior + tokens
            done = drawing.constraint is not None and fulfils(drawing.constraint, whole)
            piece = text_of((), tokens[-1:]).text
            reason = stopping.push(tokens[-1], piece, fulfilled=done)
        left = most < parameters.max_tokens - len(drawing.prior)
        run = Continuation(
            content=text_of(held, tokens),
            scores=scores_at(held + tokens, len(held)),
            sampling_probabilities=tuple(d.sampling_probability for d in drawn),
            alternatives=tuple(d.alternatives for d in drawn),
            finish_reason=reason or ("cancelled" if left else None),
        )
        return run, tuple(d.logits for d in drawn if d.logits is not None)

    def search(self, parameters: BeamParameters) -> None:
        held, room = self.state.content.tokens, self.state.room
        search = BeamSearch(
            parameters,
            eos_token_ids=ends_of(parameters, EOS),
            max_new=min(parameters.max_tokens, room),
        )
        running: list[Tokens] = [()]
        steps = []
        while (
            step := search.step([candidates(held + new, parameters) for new in running])
        ) is not None:
            steps.append(step)
            chosen = zip(step.parents, step.tokens, strict=True)
            running = [(*running[parent], token) for parent, token in chosen]
        self._add(
            BeamsGenerated(
                parameters=parameters,
                start=self.state.absolute_position,
                dropped=self.state.dropped,
                steps=tuple(steps),
                beams=tuple(
                    Beam(
                        content=text_of(held, found.tokens),
                        scores=scores_at(held + found.tokens, len(held)),
                        score=found.score,
                        finished=found.finished,
                    )
                    for found in search.best()
                ),
            )
        )


@st.composite
def stories(draw_: st.DrawFn, *first: str) -> Story:
    """Some of everything that may happen to a state, except that it is deleted.

    The first is of one of the kinds named, if any are.
    """
    size = draw_(st.integers(8, 40))
    story = Story(context_size=size, on_full=draw_(st.sampled_from(["stop", "slide"])))
    kinds = ["forward", "generate", "cut off", "multi", "search", "rewind", "configure"]
    seeds = st.integers(0, 99)
    sure = [draw_(st.sampled_from(first))] if first else []
    for kind in sure + draw_(st.lists(st.sampled_from(kinds), max_size=7)):
        many = draw_(st.integers(1, 9))
        room = story.state.room
        asked = generation(max_tokens=many, stop_sequences=("ab", chr(17)))
        match kind:
            case "forward" if room:
                story.forward(draw_(st.text("abc", min_size=1, max_size=min(3, room))))
            case "generate":
                story.generate(asked, draw_(seeds))
            case "cut off" if room > 3:
                story.generate(generation(max_tokens=many + 2), draw_(seeds), leaves_after=2)
                last = story.events[-1]
                cut_off = isinstance(last, TokensGenerated) and last.finish_reason == "cancelled"
                if cut_off and draw_(st.booleans()):
                    story.resume()
            case "multi":
                constraint = Constraint(kind="regex", text=str(draw_(st.integers(1, 9))))
                several = msgspec.structs.replace(asked, constraint=constraint)
                story.multi(several, draw_(seeds), draw_(st.integers(1, 4)))
            case "search" if room:
                groups = draw_(st.integers(1, 2))
                penalty = 0.5 if groups > 1 else 0.0
                story.search(
                    beams(
                        max_tokens=min(many, 5),
                        num_beams=4,
                        num_beam_groups=groups,
                        diversity_penalty=penalty,
                    )
                )
            case "rewind":
                story.rewind(draw_(st.integers(1, story.state.head_position)))
            case "configure":
                story.configure(temperature=draw_(st.floats(0, 2)))
    return story


# holding one against the oracle


def divergences(events: Sequence[Event]) -> list[Divergence]:
    """What re-execution by the oracle finds."""
    rows = history(*events)
    asked = passages(occurrences(rows))
    evidence = compare.by_event([(one, execute(one.request())) for one in asked])
    found = [
        compare.compare(one.recorded, evidence[one.recorded.position], EOS)
        for one in occurrences(rows)
        if one.recorded.position in evidence
    ]
    return [one for one in found if one is not None]


def the_first(events: Sequence[Event]) -> tuple[int | None, str, int | None]:
    """Version, field and token position of the first of them."""
    found = divergences(events)[0]
    return (found.version, found.field, found.token_position)


# changing one

Path = tuple[str | int, ...]


def changed(event: Event, path: Path, make: Callable[[Any], Any]) -> Event:
    """An event with another value at a path in it."""
    payload: Any = msgspec.json.decode(msgspec.json.encode(event))
    inner = payload
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = make(inner[path[-1]])
    return msgspec.json.decode(msgspec.json.encode(payload), type=type(event))


def other(value: Any) -> Any:
    """A value of the same type that is as near as can be."""
    match value:
        case bool():
            return not value
        case int():
            return value ^ 1
        case float():
            return value + max(1.0, abs(value)) * 2**-52
        case str():
            return ("1" if value[0] == "0" else "0") + value[1:]
        case _:
            return []
