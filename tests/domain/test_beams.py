"""Beam search finds what ``transformers.generate`` finds; with groups, what a reference finds."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from random import Random
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PretrainedConfig,
    RepetitionPenaltyLogitsProcessor,
)

from domain.beams import BeamSearch, Candidate, Candidates, Hypothesis, candidates_needed
from domain.config import BeamParameters, LogitsParameters
from domain.events import BeamStep
from domain.ids import TokenId
from infra.models.catalogue import source_of

NEAR: Final = 1e-4
VOCABULARY: Final = 60

Tokens = tuple[int, ...]
Rows = Callable[[Sequence[Tokens]], Sequence[Candidates]]


def parameters(**changes: Any) -> BeamParameters:
    chosen: dict[str, Any] = {"logits": LogitsParameters(), "max_tokens": 10, "num_beams": 3}
    return BeamParameters(**(chosen | changes))


def run(
    rows: Rows, asked: BeamParameters, eos: frozenset[int], max_new: int
) -> tuple[BeamSearch, list[BeamStep]]:
    """A whole search; ``rows`` gives the candidates after each of some continuations."""
    search = BeamSearch(asked, eos_token_ids=frozenset(map(TokenId, eos)), max_new=max_new)
    steps: list[BeamStep] = []
    running: list[Tokens] = [()]
    while (step := search.step(rows(running))) is not None:
        steps.append(step)
        running = [
            (*running[parent], token)
            for parent, token in zip(step.parents, step.tokens, strict=True)
        ]
    return search, steps


# against transformers


def gpt2() -> PretrainedConfig:
    return GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=64)


def llama() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )


def random_model(config: PretrainedConfig, vocabulary: int = VOCABULARY) -> Any:
    """Its weights are larger than usual, so that no two logits are close."""
    config.update({"vocab_size": vocabulary, "initializer_range": 0.12})
    config.update(dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def cacher_tiny() -> Any:
    folder = source_of("cacher-tiny").location
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["gpt2", "llama", "cacher-tiny"])
def model(request: pytest.FixtureRequest) -> Any:
    make = {
        "gpt2": lambda: random_model(gpt2()),
        "llama": lambda: random_model(llama()),
        "cacher-tiny": cacher_tiny,
    }
    return make[request.param]()


class Biased(torch.nn.Module):
    """Adds to the logits of some tokens, so that they come often."""

    def __init__(self, head: torch.nn.Module, bias: dict[int, float]) -> None:
        super().__init__()
        self.head, self.bias = head, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden)
        for token, value in self.bias.items():
            logits[..., token] += value
        return logits


class Oracle:
    """A plain model: what its ``generate`` finds, and the candidates of each of its rows."""

    def __init__(self, model: Any, prompt: Tokens, eos: frozenset[int], bias: float) -> None:
        head = model.get_output_embeddings()
        head = head.head if isinstance(head, Biased) else head
        model.set_output_embeddings(Biased(head, dict.fromkeys(eos, bias)))
        self._model = model
        self._prompt = prompt
        self.eos = eos

    def _generate(self, max_new: int, **changes: Any) -> Any:
        prompt = torch.tensor([self._prompt])
        return self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new,
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=1,
            return_dict_in_generate=True,
            output_scores=True,
            **changes,
        )

    def greedy(self, max_new: int) -> Tokens:
        """What it finds without beams."""
        return tuple(self._generate(max_new).sequences[0, len(self._prompt) :].tolist())

    def generate(self, asked: BeamParameters, max_new: int) -> list[Hypothesis]:
        """What it finds by beam search."""
        out = self._generate(
            max_new,
            num_beams=asked.num_beams,
            num_return_sequences=asked.num_return,
            early_stopping=asked.early_stopping,
            length_penalty=asked.length_penalty,
            repetition_penalty=asked.logits.repetition_penalty,
            no_repeat_ngram_size=asked.no_repeat_ngram_size,
        )
        found = []
        for row, indices, score in zip(
            out.sequences, out.beam_indices, out.sequences_scores.tolist(), strict=True
        ):
            length = int((indices >= 0).sum())
            tokens = tuple(row[len(self._prompt) :][:length].tolist())
            found.append(Hypothesis(tokens, score, bool(self.eos.intersection(tokens[-1:]))))
        return found

    def rows(self, asked: BeamParameters) -> Rows:
        """The candidates, by its forward pass and transformers' processors."""
        processors = LogitsProcessorList()
        if asked.logits.repetition_penalty != 1.0:
            penalty = asked.logits.repetition_penalty
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if asked.no_repeat_ngram_size:
            processors.append(NoRepeatNGramLogitsProcessor(asked.no_repeat_ngram_size))
        count = candidates_needed(asked, len(self.eos))

        @torch.inference_mode()
        def rows(continuations: Sequence[Tokens]) -> list[Candidates]:
            texts = torch.tensor([(*self._prompt, *tokens) for tokens in continuations])
            logits = self._model(texts, use_cache=False).logits[:, -1]
            scores = processors(texts, torch.log_softmax(logits, -1))
            return [likeliest(row, count) for row in scores.tolist()]

        return rows


def likeliest(row: Sequence[float], count: int) -> Candidates:
    """The best tokens of a row that may be chosen at all."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]
    return tuple(
        Candidate(TokenId(token), row[token]) for token in order if row[token] != -torch.inf
    )


def assert_near(ours: Sequence[Hypothesis], theirs: Sequence[Hypothesis]) -> None:
    scores = [[hypothesis.score for hypothesis in found] for found in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=NEAR, rel=1e-5)


def some_parameters(random: Random, num_beams: int, **chosen: Any) -> BeamParameters:
    """Some setting of everything that is not chosen."""
    logits = LogitsParameters(repetition_penalty=random.choice([1.0, 1.0, 1.3, 0.8]))
    return parameters(
        num_beams=num_beams,
        num_return=random.randint(1, num_beams),
        no_repeat_ngram_size=random.choice([0, 0, 1, 2, 3]),
        logits=logits,
        **chosen,
    )


def oracle(
    model: Any,
    random: Random,
    endings: Sequence[int] = (0, 1, 2, 5),
    biases: Sequence[float] = (0.0, 4.0, 8.0, 12.0),
) -> Oracle:
    """The model after some prompt, with some tokens that end a text, often or now and then."""
    vocabulary = model.config.vocab_size
    prompt = tuple(random.choices(range(vocabulary), k=random.randint(1, 8)))
    eos = frozenset(random.sample(range(vocabulary), random.choice(endings)))
    return Oracle(model, prompt, eos, bias=random.choice(biases))


def test_a_search_finds_what_transformers_finds(model: Any) -> None:
    random = Random(1)
    grid = list(product((2, 3, 4, 5, 6), (-1.0, 0.0, 0.5, 1.0, 2.0), (True, False, "never")))
    grid = random.sample(grid, 25 if model.config.num_hidden_layers > 2 else len(grid))
    seen: Counter[str] = Counter()
    for num_beams, length_penalty, early_stopping in grid:
        asked = some_parameters(
            random, num_beams, length_penalty=length_penalty, early_stopping=early_stopping
        )
        plain, max_new = oracle(model, random), random.choice([1, 5, 9, 14])
        search, steps = run(plain.rows(asked), asked, plain.eos, max_new)
        ours, theirs = search.best(), plain.generate(asked, max_new)
        assert_near(ours, theirs)
        seen["other tokens"] += [h.tokens for h in ours] != [h.tokens for h in theirs]
        seen["ended early"] += len(steps) + 1 < max_new
        seen["finished"] += ours[0].finished
        seen["unfinished"] += not ours[0].finished
        seen["several"] += len(ours) > 1
    assert seen["other tokens"] <= 1  # where two lie so near that rounding decides
    assert min(seen[what] for what in ("ended early", "finished", "unfinished", "several")) >= 2


def test_one_beam_is_greedy_search(model: Any) -> None:
    random, ended = Random(2), 0
    for length_penalty, early_stopping in product((-1.0, 0.0, 2.0), (True, False, "never")):
        asked = parameters(
            num_beams=1, length_penalty=length_penalty, early_stopping=early_stopping
        )
        plain = oracle(model, random, endings=[3], biases=[6.0])
        search, _ = run(plain.rows(asked), asked, plain.eos, 9)
        assert search.best()[0].tokens == plain.greedy(9)
        ended += search.best()[0].finished
    assert ended >= 3


def test_of_a_vocabulary_smaller_than_the_beams_it_finds_the_same_and_nothing_made_up() -> None:
    """What transformers adds then scores about -1e9: its sentinel for what does not exist."""
    random, model = Random(4), random_model(gpt2(), vocabulary=6)
    fewer = 0
    for _ in range(60):
        asked = some_parameters(
            random, random.randint(5, 8), early_stopping=random.choice([False, "never"])
        )
        plain = oracle(model, random)
        search, _ = run(plain.rows(asked), asked, plain.eos, 7)
        found = plain.generate(asked, 7)
        real = [hypothesis for hypothesis in found if hypothesis.score > -1e7]
        assert_near(search.best(), real)
        fewer += len(real) < len(found)
    assert fewer >= 3


# by itself

EOS: Final = frozenset({0, 5})


class Table:
    """A language model of a few tokens: each text has a fixed random row of logprobs."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self._seed, self.vocabulary = seed, vocabulary

    def row(self, text: Tokens) -> list[float]:
        random = Random(f"{self._seed} {text}")
        weights = [random.expovariate(1.0) for _ in range(self.vocabulary)]
        return [math.log(weight / sum(weights)) for weight in weights]

    def rows(self, count: int) -> Rows:
        return lambda texts: [likeliest(self.row(text), count) for text in texts]


def reference(table: Table, asked: BeamParameters, max_new: int) -> list[tuple[Tokens, float]]:
    """Group beam search over whole rows, one group after the other at each step."""
    size, power = asked.num_beams // asked.num_beam_groups, asked.length_penalty
    groups: list[dict[Tokens, float]] = [{(): 0.0} for _ in range(asked.num_beam_groups)]
    ended: list[dict[Tokens, float]] = [{} for _ in groups]
    for length in range(1, max_new + 1):
        cost = [0.0] * table.vocabulary
        for group, found in zip(groups, ended, strict=True):
            scores = {
                (*text, token): logprob + value - cost[token]
                for text, logprob in group.items()
                for token, value in enumerate(table.row(text))
            }
            ranking = sorted(scores, key=lambda text: -scores[text])
            for text in ranking[:size]:
                if length == max_new or text[-1] in EOS:
                    found[text] = scores[text] / length**power
            for text in sorted(found, key=lambda text: -found[text])[size:]:
                del found[text]
            going = [text for text in ranking if text[-1] not in EOS][:size]
            for text in going:
                cost[text[-1]] += asked.diversity_penalty
            reach = max_new if asked.early_stopping == "never" and power > 0 else length
            ends = (
                length == max_new
                or not going
                or (
                    len(found) == size
                    and (
                        asked.early_stopping is True
                        or scores[going[0]] / reach**power <= min(found.values())
                    )
                )
            )
            group.clear()
            group.update({} if ends else {text: scores[text] for text in going})
    everything = [item for found in ended for item in found.items()]
    return sorted(everything, key=lambda item: -item[1])[: asked.num_return]


@st.composite
def searches(draw: st.DrawFn) -> BeamParameters:
    groups = draw(st.integers(1, 4))
    num_beams = groups * draw(st.integers(2, 3))
    return parameters(
        num_beams=num_beams,
        num_beam_groups=groups,
        diversity_penalty=draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        length_penalty=draw(st.sampled_from([-1.0, 0.0, 0.7, 2.0])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        num_return=draw(st.integers(1, num_beams)),
    )


def search_of(
    table: Table, asked: BeamParameters, max_new: int, *, count: int | None = None
) -> tuple[BeamSearch, list[BeamStep]]:
    needed = candidates_needed(asked, len(EOS)) if count is None else count
    return run(table.rows(needed), asked, EOS, max_new)


@given(asked=searches(), seed=st.integers(0, 1000), max_new=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_groups_find_what_a_plain_reference_finds(
    asked: BeamParameters, seed: int, max_new: int
) -> None:
    table = Table(seed, vocabulary=9)
    search, _ = search_of(table, asked, max_new)
    expected = reference(table, asked, max_new)
    assert [hypothesis.tokens for hypothesis in search.best()] == [text for text, _ in expected]
    assert [hypothesis.score for hypothesis in search.best()] == pytest.approx(
        [score for _, score in expected]
    )


@given(asked=searches(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_more_candidates_than_needed_change_nothing(asked: BeamParameters, seed: int) -> None:
    table = Table(seed, vocabulary=40)
    search, steps = search_of(table, asked, 5)
    other, other_steps = search_of(table, asked, 5, count=40)
    assert (search.best(), steps) == (other.best(), other_steps)


def test_fewer_candidates_than_needed_change_what_is_found() -> None:
    asked = parameters(num_beams=4, num_return=4, num_beam_groups=2, diversity_penalty=5.0)
    found = {
        count: [search_of(Table(seed, 40), asked, 5, count=count)[0].best() for seed in range(50)]
        for count in (2, candidates_needed(asked, len(EOS)))
    }
    assert found[2] != found[candidates_needed(asked, len(EOS))]


@given(asked=searches(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_sequence_found_went_on_from_a_beam_that_ran(
    asked: BeamParameters, seed: int
) -> None:
    """So the steps hold every row that the search depends on."""
    search, steps = search_of(Table(seed, 12), asked, 6)
    texts: list[Tokens] = [()]
    ran: set[Tokens] = {()}
    for step in steps:
        assert len(step.parents) <= asked.num_beams
        texts = [
            (*texts[parent], token) for parent, token in zip(step.parents, step.tokens, strict=True)
        ]
        ran |= set(texts)
    assert search.best()
    for hypothesis in search.best():
        assert hypothesis.tokens[:-1] in ran
        assert hypothesis.finished == (hypothesis.tokens[-1] in EOS)
        assert hypothesis.finished or len(hypothesis.tokens) == 6


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.5])
def test_with_a_beam_for_every_text_it_finds_the_best_of_all_texts(length_penalty: float) -> None:
    table, max_new = Table(seed=6, vocabulary=4), 3
    asked = parameters(
        num_beams=64, num_return=64, length_penalty=length_penalty, early_stopping="never"
    )
    scores: dict[Tokens, float] = {}
    texts: dict[Tokens, float] = {(): 0.0}
    for length in range(1, max_new + 1):
        texts = {
            (*text, token): logprob + value
            for text, logprob in texts.items()
            for token, value in enumerate(table.row(text))
        }
        for text in [text for text in texts if text[-1] in EOS or length == max_new]:
            scores[text] = texts.pop(text) / length**length_penalty
    search, _ = search_of(table, asked, max_new)
    assert {h.tokens: h.score for h in search.best()} == pytest.approx(scores)
    assert [h.tokens for h in search.best()] == sorted(scores, key=lambda text: -scores[text])


def test_groups_that_pay_for_it_choose_other_tokens() -> None:
    alike, diverse = (
        search_of(
            Table(1, 12),
            parameters(num_beams=6, num_beam_groups=3, diversity_penalty=penalty),
            4,
        )[1][0]
        for penalty in (0.0, 100.0)
    )
    assert alike.tokens[:2] == alike.tokens[2:4] == alike.tokens[4:]
    assert len(set(diverse.tokens)) == 6


def test_where_no_token_may_come_the_search_ends_with_what_it_has() -> None:
    asked = parameters(num_beams=2, num_return=2)
    search = BeamSearch(asked, eos_token_ids=frozenset({TokenId(0)}), max_new=9)
    end, go = Candidate(TokenId(0), -1.0), Candidate(TokenId(1), -0.5)
    assert search.step([(go, end)]) == BeamStep(parents=(0,), tokens=(TokenId(1),))
    assert search.step([()]) is None
    assert search.done
    assert search.best() == (Hypothesis((TokenId(0),), -1.0, True),)


def test_of_equal_candidates_the_earlier_beam_and_the_lower_token_come_first() -> None:
    search = BeamSearch(parameters(num_beams=2), eos_token_ids=frozenset(), max_new=9)
    equal = tuple(Candidate(TokenId(token), -1.0) for token in range(3))
    assert search.step([equal]) == BeamStep(parents=(0, 0), tokens=(TokenId(0), TokenId(1)))
    assert search.step([equal] * 2) == BeamStep(parents=(0, 0), tokens=(TokenId(0), TokenId(1)))


def test_where_longer_texts_score_less_never_ends_no_search_that_could_still_find_better() -> None:
    asked = parameters(num_beams=2, length_penalty=-1.0, early_stopping="never")
    search = BeamSearch(asked, eos_token_ids=frozenset({TokenId(0)}), max_new=100)
    end, good, poor = (Candidate(TokenId(i), value) for i, value in enumerate((-6.0, -0.1, -7.0)))
    search.step([(good, end, poor)])
    assert search.step([(good, end), (end,)]) is not None  # -0.2 * 2 is above -6.1 * 2
    assert search.step([(good, end), (good, end)]) is not None
    assert search.best()[0].score == -6.0
