"""What is seen of a text is what plain transformers has there, in bits that nothing changes."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, PretrainedConfig

from domain.errors import InvalidInput, TooLarge
from domain.ids import TokenId
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.executor import Executor
from infra.engine.forward import Prepared, Unsupported, Watch, Weighing
from infra.engine.jobs.observation import Observation
from infra.engine.language_model import (
    MAX_PREFILL_ROWS_BESIDE_STREAMS,
    MAX_ROWS,
    TransformersModel,
)
from infra.engine.modules.watching import Layers
from infra.engine.observing import Edits, Look, Seen
from infra.engine.sampling import sampler
from infra.engine.scheduler import Slice
from tests.infra.engine import small_models
from tests.infra.engine.asking import request, score, steps, tokens_of
from tests.infra.engine.bench import ROOT, Bench, Feeding, Gate, held_at_next_pass, text

STRATEGIES: Final = ("strict", "onednn", "tile", "cuda")
TOKENS: Final = text(0, 150)
START: Final = 70
_PROJECTIONS: Final = ("c_proj", "o_proj", "dense", "out_proj")


class Desk(Bench):
    """A model that is looked into by hand, pass by pass."""

    def __init__(self, prepared: Prepared, **bounds: int) -> None:
        super().__init__(prepared, **bounds)
        self.prepared = prepared
        self.layers = prepared.geometry.layers
        self.delivered: list[Observation | Exception] = []

    def everything(self, tokens: Sequence[int] = TOKENS, start: int = START) -> Look:
        """All that there is to be seen of a text."""
        layers = frozenset(range(self.layers))
        return Look(
            tokens=tuple(map(TokenId, tokens)),
            start=start,
            queries=layers,
            residual=layers | {self.layers},
            normalised=True,
            keys=layers,
            values=layers,
            logits=True,
        )

    def job(self, look: Look, root: bytes | None = ROOT) -> Observation:
        """Work to be given to the runner."""
        return Observation(look, root=root, store=self.store, deliver=self.delivered.append)

    def observe(self, look: Look, *others: Feeding, root: bytes | None = ROOT) -> Seen:
        """What is seen of a text that is computed among others."""
        for job in (*others, self.job(look, root)):
            self.runner.add(job)
        while self.runner.busy:
            self.runner.step()
        job = self.delivered.pop()
        assert isinstance(job, Observation)
        return job.seen()


def same(one: Seen, other: Seen, skipped: int = 0) -> bool:
    """Whether every bit is the same, but for the first rows that only the other has."""
    pairs = [(one.residual[place], other.residual[place][skipped:]) for place in other.residual]
    pairs += [(one.queries[at][0], other.queries[at][0][skipped:]) for at in other.queries]
    pairs += [(one.keys[at], other.keys[at]) for at in other.keys]
    pairs += [(one.values[at], other.values[at]) for at in other.values]
    assert one.normalised is not None
    assert other.normalised is not None
    assert one.logits is not None
    assert other.logits is not None
    pairs += [(one.normalised, other.normalised[skipped:]), (one.logits, other.logits)]
    return all(torch.equal(*pair) for pair in pairs)


Make = Callable[[str, str], Prepared]


@pytest.fixture(scope="module")
def made(folders: dict[str, str | Path]) -> Make:
    """Models by family and strategy, each made ready once."""
    return cache(lambda family, strategy: small_models.prepared(folders[family], strategy=strategy))


@pytest.fixture(params=STRATEGIES)
def prepared(request: pytest.FixtureRequest, made: Make) -> Prepared:
    return made("llama", request.param)


@pytest.fixture
def desk(prepared: Prepared) -> Desk:
    return Desk(prepared)


# what there is in plain transformers


class Plain:
    """A model of transformers as it is, and what its modules are given and give."""

    def __init__(self, folder: str | Path) -> None:
        self.model: Any = small_models.read(folder).model
        self.model.set_attn_implementation("eager")
        self.layers: list[nn.Module] = next(
            list(module)
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == self.model.config.num_hidden_layers
        )

    def __call__(self, tokens: Sequence[int]) -> Any:
        with torch.no_grad():
            return self.model(
                torch.tensor([list(tokens)]), output_attentions=True, output_hidden_states=True
            )

    def projection(self, layer: int) -> nn.Module:
        """What puts the heads of a layer together."""
        attention = next(m for m in self.layers[layer].modules() if hasattr(m, "layer_idx"))
        return next(getattr(attention, name) for name in _PROJECTIONS if hasattr(attention, name))

    def leaving(self, tokens: Sequence[int]) -> Tensor:
        """What leaves the last layer, which ``output_hidden_states`` leaves out."""
        left: list[Tensor] = []
        hook = self.layers[-1].register_forward_hook(lambda *call: left.append(call[2][0]))
        self(tokens)
        hook.remove()
        return left[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest value, or of 1 where all are smaller."""
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def weights(query: Tensor, keys: Tensor, weighing: Weighing, start: int) -> Tensor:
    """Attention ``(heads, rows, tokens)`` by the textbook, of queries from ``start`` on."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[0], dim=0)
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * weighing.scaling
    if weighing.softcap:
        scores = torch.tanh(scores / weighing.softcap) * weighing.softcap
    rows, columns = torch.arange(start, keys.shape[1])[:, None], torch.arange(keys.shape[1])
    hidden = columns > rows
    if weighing.window:
        hidden |= columns <= rows - weighing.window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *((family, "tile") for family in small_models.FAMILIES),
        *((family, "cuda") for family in ("gemma2", "opt")),
        ("llama", "strict"),
    ],
)
def test_hidden_states_and_attention_are_those_of_plain_transformers(
    folders: dict[str, str | Path], made: Make, family: str, strategy: str
) -> None:
    desk = Desk(made(family, strategy))
    plain = Plain(folders[family])
    seen = desk.observe(desk.everything())
    expected = plain(TOKENS)
    for layer in range(desk.layers):
        hidden = expected.hidden_states[layer][0, START:]
        assert_close(seen.residual[layer], hidden)
        query, weighing = seen.queries[layer]
        found = weights(query, seen.keys[layer], weighing, START)
        assert_close(found, expected.attentions[layer][0][:, START:])
    leaving = plain.leaving(TOKENS)[START:]
    assert_close(seen.residual[desk.layers], leaving)
    assert seen.normalised is not None
    if family == "opt":  # its hidden states end after another projection
        normalised = plain.model.base_model.decoder.final_layer_norm(leaving).detach()
    else:
        normalised = expected.hidden_states[-1][0, START:]
    assert_close(seen.normalised, normalised)
    assert seen.logits is not None
    assert_close(seen.logits, expected.logits[0, -1])
    assert (seen.tokens_computed, seen.tokens_reused) == (len(TOKENS), 0)


def _opt_without_norm() -> PretrainedConfig:
    config = small_models.FAMILIES["opt"]()
    assert isinstance(config, OPTConfig)
    config.update({"do_layer_norm_before": False})
    return config


def test_where_nothing_normalises_what_leaves_the_last_layer_that_is_seen_as_it_is(
    tmp_path: Path,
) -> None:
    folder = small_models.write(tmp_path, _opt_without_norm())
    desk = Desk(small_models.prepared(folder, strategy="tile"))
    seen = desk.observe(desk.everything())
    assert seen.normalised is not None
    assert torch.equal(seen.normalised, seen.residual[desk.layers])


def test_a_model_whose_layers_cannot_be_told_is_not_supported() -> None:
    class Nothing(nn.Module):
        config = PretrainedConfig(num_hidden_layers=1)

    with pytest.raises(Unsupported, match="not a list of modules with attention"):
        Layers(Nothing())


# passes that go otherwise


def _adding(plain: Plain, layer: int, span: range, vector: Tensor) -> AbstractContextManager[Any]:
    def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].clone()
        hidden[0, span.start : span.stop] += vector
        return (hidden, *args[1:])

    return plain.layers[layer].register_forward_pre_hook(add)


def _silencing(plain: Plain, layer: int, heads: tuple[int, ...]) -> AbstractContextManager[Any]:
    projection = plain.projection(layer)
    count = plain.model.config.num_attention_heads

    def silence(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mixed = args[0].clone()
        by_head = mixed.view(*mixed.shape[:-1], count, -1)
        by_head[..., list(heads), :] = 0
        return (mixed,)

    return projection.register_forward_pre_hook(silence)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *(("llama", strategy) for strategy in ("strict", "tile", "cuda")),
        *((family, "tile") for family in ("gpt2", "gpt_neox")),
    ],
)
def test_edits_do_what_hooks_do_in_plain_transformers(
    folders: dict[str, str | Path], made: Make, family: str, strategy: str
) -> None:
    desk = Desk(made(family, strategy), max_rows=48)
    plain = Plain(folders[family])
    width = plain.model.config.hidden_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
    span, heads = range(20, 61), (1, 3)
    edits = {
        "added": Edits(added={1: ((span, vector), (range(60, 62), -vector))}),
        "silenced": Edits(silenced={0: heads}),
        "both": Edits(added={1: ((span, vector), (range(60, 62), -vector))}, silenced={0: heads}),
    }
    untouched = desk.observe(desk.everything())
    assert untouched.logits is not None
    for name, edit in edits.items():
        with ExitStack() as hooks:
            if name != "silenced":
                hooks.enter_context(_adding(plain, 1, span, vector))
                hooks.enter_context(_adding(plain, 1, range(60, 62), -vector))
            if name != "added":
                hooks.enter_context(_silencing(plain, 0, heads))
            expected = plain(TOKENS)
        seen = desk.observe(replace(desk.everything(), edits=edit))
        assert seen.logits is not None
        assert_close(seen.logits, expected.logits[0, -1])
        assert (seen.logits - untouched.logits).abs().max() > 1e-3
        assert (seen.tokens_computed, seen.tokens_reused) == (len(TOKENS), 0)
    again = desk.observe(desk.everything())
    assert again.tokens_reused == START
    assert same(again, untouched)  # what was edited has left nothing behind


def test_an_edit_changes_the_same_bits_however_the_text_is_cut(
    prepared: Prepared,
) -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(2))
    edits = Edits(added={1: ((range(10, 100), vector),)}, silenced={0: (2,)})
    whole, cut = Desk(prepared, max_rows=256), Desk(prepared, max_rows=7)
    look = replace(whole.everything(), edits=edits)
    assert same(cut.observe(look), whole.observe(look))


def test_numbers_that_an_edit_makes_infinite_are_met_by_nobody_else(prepared: Prepared) -> None:
    desk = Desk(prepared, blocks=8, max_rows=64)
    infinite = Edits(added={0: ((range(len(TOKENS)), torch.full((64,), torch.inf)),)})
    look = replace(desk.everything(), edits=infinite)
    expected = Desk(prepared).compute(text(9, 40))
    seen = desk.observe(look)
    assert not seen.values[1].isfinite().any()
    assert desk.compute(text(9, 40), root=None).equal(expected)
    job = desk.job(look)
    desk.runner.add(job)
    desk.runner.step()
    assert not desk.store.v.isfinite().all()
    desk.runner.drop(job)
    assert desk.compute(text(9, 40), root=None).equal(expected)


# bits


def streams(bench: Bench) -> list[Feeding]:
    """Texts that decode, one token a pass."""
    return [bench.feeding(text(1 + n, 12 + n), [4] + [1] * (8 + n)) for n in range(8)]


def unchanged(feedings: Sequence[Feeding], desk: Desk) -> bool:
    """Whether streams have the bits of their texts computed alone, each in one prefill."""
    alone = Desk(desk.prepared)
    bits = [alone.compute(each.text.tokens, root=None) for each in feedings]
    return all(each.bits and each.bits.equal(own) for each, own in zip(feedings, bits, strict=True))


def test_what_is_seen_has_the_same_bits_among_streams_in_chunks_hot_or_private(
    prepared: Prepared,
) -> None:
    desk = Desk(prepared)
    look = desk.everything()
    cold = desk.observe(look)
    assert (cold.tokens_computed, desk.pool.hits) == (len(TOKENS), 0)
    hot = desk.observe(look)
    found = -(-START // BLOCK_TOKENS)
    assert (hot.tokens_reused, desk.pool.hits) == (START, found)
    assert same(hot, cold)
    private = desk.observe(look, root=None)
    assert (private.tokens_computed, desk.pool.hits) == (len(TOKENS), found)
    assert same(private, cold)
    assert same(hot, desk.observe(desk.everything(start=0)), skipped=START)
    crowded = Desk(prepared, max_rows=30)
    others = streams(crowded)
    assert same(crowded.observe(look, *others), cold)
    assert crowded.pool.held == 0
    assert unchanged(others, desk)


def test_control_on_plain_blas_what_is_seen_depends_on_others(
    made: Make,
) -> None:
    cold = Desk(made("llama", "plain"))
    crowded = Desk(made("llama", "plain"), max_rows=30)
    look = cold.everything()
    assert not same(crowded.observe(look, *streams(crowded)), cold.observe(look))


def test_a_watch_is_there_only_for_the_passes_of_those_that_look_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[tuple[bool, bool]] = []
    run = desk.runner.executor.run
    job = desk.job(desk.everything())

    def noting(slices: Sequence[Slice], watch: Watch | None) -> Tensor:
        watched.append((watch is not None, any(s.sequence is job.text for s in slices)))
        return run(slices, watch)

    monkeypatch.setattr(desk.runner.executor, "run", noting)
    for feeding in streams(desk):
        desk.runner.add(feeding)
    desk.runner.step()
    desk.runner.add(job)
    while desk.runner.busy:
        desk.runner.step()
    assert {watches for watches, _ in watched} == {True, False}
    assert all(watches == looks for watches, looks in watched)


def test_two_that_look_on_in_one_pass_see_each_its_own(
    prepared: Prepared,
) -> None:
    desk, apart = Desk(prepared), Desk(prepared)
    looks = [desk.everything(text(20, 50), 10), desk.everything(text(21, 70), 0)]
    looks[1] = replace(looks[1], edits=Edits(silenced={1: (0,)}))
    for look in looks:
        desk.runner.add(desk.job(look))
    desk.runner.step()
    assert not desk.runner.busy
    for look, job in zip(looks, desk.delivered, strict=True):
        assert isinstance(job, Observation)
        assert same(job.seen(), apart.observe(look))


def test_k_and_v_read_from_the_cache_are_those_computed_anew(desk: Desk) -> None:
    layers = frozenset(range(desk.layers))
    look = Look(tokens=tuple(map(TokenId, TOKENS[: 4 * BLOCK_TOKENS])), keys=layers, values=layers)
    desk.observe(look)
    hot, private = desk.observe(look), desk.observe(look, root=None)
    assert (hot.tokens_computed, private.tokens_computed) == (1, len(look.tokens))
    assert hot.logits is None
    for layer in layers:
        assert torch.equal(hot.keys[layer], private.keys[layer])
        assert torch.equal(hot.values[layer], private.values[layer])
        assert private.keys[layer].abs().amin(dim=(0, 2)).gt(0).all()
    (block,) = desk.pool.match(desk.job(look).text.prefix[:1])
    desk.store.k[1, block, 0, 0, 0] += 1e-6
    desk.pool.release([block])
    corrupt = desk.observe(look)
    assert not torch.equal(corrupt.keys[1], private.keys[1])  # it was read, not computed


def test_only_what_is_asked_for_is_handed_out(desk: Desk) -> None:
    tokens = tuple(map(TokenId, TOKENS))
    seen = desk.observe(Look(tokens=tokens, start=140, residual=frozenset({1})))
    assert {place: rows.shape for place, rows in seen.residual.items()} == {1: (10, 64)}
    assert (seen.queries, seen.keys, seen.values) == ({}, {}, {})
    assert seen.normalised is None
    assert seen.logits is None
    keys = desk.observe(Look(tokens=tokens, keys=frozenset({0})))
    assert {layer: rows.shape for layer, rows in keys.keys.items()} == {0: (2, 150, 16)}
    assert (keys.queries, keys.residual, keys.values) == ({}, {}, {})


def test_what_is_seen_can_be_written_to(desk: Desk) -> None:
    seen = desk.observe(desk.everything())
    assert seen.normalised is not None
    assert seen.logits is not None
    queries = [rows for rows, _ in seen.queries.values()]
    for tensor in (
        *queries,
        *seen.residual.values(),
        *seen.keys.values(),
        seen.normalised,
        seen.logits,
    ):
        tensor += 1


# the head


def check_projection(prepared: Prepared) -> None:
    desk = Desk(prepared)
    logits = desk.compute(TOKENS).logits
    hidden = desk.observe(desk.everything(start=0)).residual[desk.layers]
    project = desk.runner.executor.project
    assert torch.equal(project(hidden), logits)
    random = Random(3)
    for count in (1, 2, 3, 5, 11, 40):
        rows = random.sample(range(len(TOKENS)), count)
        assert torch.equal(project(hidden[rows]), logits[rows])
    assert not torch.equal(project(hidden + 1), logits)
    bits = desk.compute(text(9, 40))
    assert bits.equal(Desk(prepared).compute(text(9, 40)))  # passes go on as before


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama", "strict"),
        *(("gemma2", strategy) for strategy in ("onednn", "tile", "cuda")),
        *(("opt", strategy) for strategy in ("onednn", "tile", "cuda")),
        ("gpt2", "onednn"),
    ],
)
def test_what_leaves_the_last_layer_projects_to_the_very_logits_of_the_pass(
    made: Make, family: str, strategy: str
) -> None:
    check_projection(made(family, strategy))


@pytest.mark.parametrize("strategy", ["tile", "cuda"])
def test_in_bfloat16_it_does_as_well(folders: dict[str, str | Path], strategy: str) -> None:
    check_projection(small_models.prepared(folders["llama"], torch.bfloat16, strategy=strategy))


class Counting(Executor):
    """Notes what is projected, and the passes in between."""

    def watch(self) -> list[int]:
        """Rows projected at a time; 0 for a pass."""
        self.noted: list[int] = []
        return self.noted

    def run(self, slices: Sequence[Slice], watch: Watch | None = None) -> Tensor:
        self.noted.append(0)
        return super().run(slices, watch)

    def project(self, hidden: Tensor) -> Tensor:
        self.noted.append(len(hidden))
        return super().project(hidden)


async def test_streams_go_on_between_parts_of_a_projection(
    tiny: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, count = text(30, 20), 40
    expected = await steps(tiny, request(prompt, count))
    hidden = torch.randn(1200, tiny.dimensions.width, generator=torch.Generator().manual_seed(4))
    executor = tiny._runner.executor
    monkeypatch.setattr(executor, "__class__", Counting)
    assert isinstance(executor, Counting)
    noted = executor.watch()
    logits = await tiny.project(hidden)
    assert noted == [MAX_ROWS, MAX_ROWS, 1200 - 2 * MAX_ROWS]
    assert logits.shape == (1200, tiny.vocabulary_size)
    noted = executor.watch()
    with Gate(tiny._engine) as gate:
        stream = asyncio.create_task(steps(tiny, request(prompt, count)))
        projections = [asyncio.create_task(tiny.project(hidden)) for _ in range(3)]
        await gate.asked(4)
    beside = await asyncio.gather(*projections)
    assert tokens_of(await stream) == tokens_of(expected)
    assert all(torch.equal(each, logits) for each in beside)
    passes = [place for place, rows in enumerate(noted) if not rows]
    during = [place for place in range(passes[0], passes[-1]) if noted[place]]
    assert len(during) >= 2
    assert all(noted[place] <= MAX_PREFILL_ROWS_BESIDE_STREAMS for place in during)
    assert all(noted[place + 1] == 0 for place in during)  # a pass after each, whoever else waits


# a loaded model


async def test_the_logits_after_a_text_are_those_that_score_its_next_token(
    tiny: TransformersModel,
) -> None:
    tokens = text(31, 70)
    seen = await tiny.observe(Look(tokens=tuple(map(TokenId, tokens[:-1])), logits=True))
    assert seen.logits is not None
    scored = await score(tiny, tokens, 69, private=True)
    assert scored.scores.logits_digests == (sampler.digest(seen.logits.numpy()),)
    assert scored.tokens_reused == 0


async def test_looking_on_beside_eight_streams_changes_none_of_their_tokens(
    tiny: TransformersModel,
) -> None:
    asked = [request(text(40 + n, 10 + n), 30, seed=n) for n in range(8)]
    expected = [tokens_of(await steps(tiny, each)) for each in asked]
    layers = frozenset(range(tiny.dimensions.layers))
    look = Look(
        tokens=tuple(map(TokenId, text(50, 200))), queries=layers, residual=layers, logits=True
    )
    first = await tiny.observe(look, private=True)
    await tiny.forget()
    running = [asyncio.create_task(steps(tiny, each)) for each in asked]
    found = [await tiny.observe(look, private=private) for private in (True, False, False)]
    assert [tokens_of(await each) for each in running] == expected
    for seen in found:
        assert torch.equal(seen.logits, first.logits)  # type: ignore[arg-type]
        assert all(torch.equal(seen.residual[at], first.residual[at]) for at in layers)
    assert tiny.counters().blocks_held == 0


async def test_one_who_waits_no_more_ends_the_work_and_frees_its_blocks(
    tiny: TransformersModel,
) -> None:
    await tiny.forget()
    look = Look(tokens=tuple(map(TokenId, text(51, 900))), residual=frozenset({0}))
    with held_at_next_pass(tiny) as held:
        task = asyncio.create_task(tiny.observe(look))
        assert await asyncio.to_thread(held.begun.wait, 60)
        assert tiny.counters().blocks_held
        task.cancel()
        await asyncio.wait((task,))
        held.goes_on.set()
        await tiny.forget()
    assert task.cancelled()
    assert held.count == 1
    counters = tiny.counters()
    assert (counters.blocks_held, counters.sequences) == (0, 0)


async def test_a_text_that_is_too_long_is_refused(tiny: TransformersModel) -> None:
    tokens = (TokenId(1),) * (tiny.context_size + 1)
    with pytest.raises(TooLarge, match=f"longer than {tiny.context_size}"):
        await tiny.observe(Look(tokens=tokens, logits=True))


async def test_what_a_pass_does_not_show_is_refused_before_any_is_computed(
    tiny: TransformersModel,
) -> None:
    layers = tiny.dimensions.layers
    for look in (
        Look(tokens=(TokenId(1),), queries=frozenset({layers})),
        Look(tokens=(TokenId(1),), residual=frozenset({layers + 1})),
        Look(tokens=(TokenId(1),), edits=Edits(silenced={layers: (0,)})),
    ):
        with pytest.raises(InvalidInput, match="cannot be"):
            await tiny.observe(look)


# failures


def test_one_that_looks_on_in_vain_ends_alone(desk: Desk) -> None:
    wrong = replace(desk.everything(), edits=Edits(added={0: ((range(9), torch.ones(7)),)}))
    others = streams(desk)
    for job in (*others, desk.job(wrong)):
        desk.runner.add(job)
    while desk.runner.busy:
        desk.runner.step()
    assert [type(each) for each in desk.delivered] == [RuntimeError]
    assert desk.pool.held == 0
    assert unchanged(others, desk)


def test_a_pass_that_fails_is_told_to_those_who_look_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.runner.add(desk.job(desk.everything()))
    monkeypatch.setattr(desk.runner.executor, "run", lambda *_: 1 // 0)
    desk.runner.step()
    assert [type(each) for each in desk.delivered] == [ZeroDivisionError]
    assert not desk.runner.busy
    assert desk.pool.held == 0


def test_one_that_is_dropped_between_two_of_its_passes_frees_its_blocks(
    prepared: Prepared,
) -> None:
    desk = Desk(prepared, max_rows=64)
    job = desk.job(desk.everything())
    desk.runner.add(job)
    desk.runner.step()
    assert (job.text.computed, desk.pool.held) == (64, 2)
    desk.runner.drop(job)
    assert not desk.runner.busy
    assert desk.pool.held == 0
    assert desk.delivered == []
