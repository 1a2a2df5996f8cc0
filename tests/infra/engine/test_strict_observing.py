"""What is seen of a pass of the strict strategy is what transformers computes, and what is changed
goes on as it would there. Nobody's looking changes a bit."""

from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from domain.errors import InvalidInput
from infra.engine.blocks import blocks_for
from infra.engine.executor import Executor
from infra.engine.forward import Prepared, Site, Weighing
from infra.engine.kv_store import KVStore
from infra.engine.scheduler import Sequence, Slice
from infra.engine.strict.execution import Execution
from tests.infra.engine import small_models
from tests.infra.engine.bench import Bits, text
from tests.infra.engine.small_models import EVERY_VOCABULARY

FAMILIES: Final = ("gpt2", "gemma2", "qwen3", "gpt_neox", "opt")
"""Of qwen3's graph llama's is a part, and mistral's is that with the window of gemma2's."""
TOKENS: Final = 150
TEXT: Final = text(0, TOKENS, EVERY_VOCABULARY)
ROUNDING: Final = 1e-5
Change = Callable[[Tensor], None]


class Subject(NamedTuple):
    """A prepared model, and the same as transformers computes it."""

    prepared: Prepared
    plain: Any
    layers: nn.ModuleList

    @property
    def sites(self) -> list[Site]:
        """All there are."""
        count = len(self.layers)
        return [
            *(Site(kind, layer) for layer in range(count) for kind in ("queries", "heads")),
            *(Site("residual", place) for place in range(count + 1)),
            Site("normalised", 0),
        ]


@pytest.fixture(scope="module")
def subjects(folders: dict[str, str | Path]) -> Callable[[str], Subject]:
    @cache
    def subject(family: str) -> Subject:
        plain = AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager")
        (layers,) = (m for m in plain.modules() if isinstance(m, nn.ModuleList))
        return Subject(small_models.prepared(folders[family]), plain, layers)

    return subject


class Changing:
    """A watch that keeps copies of what it sees, and then changes it."""

    def __init__(self, *sites: Site, changes: Mapping[Site, Change] | None = None) -> None:
        self.changes = changes or {}
        self.until: Site | None = None
        self.sites: Collection[Site] = {*sites, *self.changes}
        self.rows: dict[Site, Tensor] = {}
        self.weighing: dict[int, Weighing] = {}

    def see(self, site: Site, rows: Tensor, weighing: Weighing | None) -> None:
        before = self.rows.get(site, rows[:0])
        self.rows[site] = torch.cat([before, rows])
        if weighing is not None:
            self.weighing[site.index] = weighing
        if site in self.changes:
            self.changes[site](rows)


def compute(prepared: Prepared, watch: Changing | None = None, *, cut: int = TOKENS) -> Bits:
    """Logits, K and V of the text, in passes of at most ``cut`` rows."""
    blocks = blocks_for(TOKENS)
    store = KVStore(prepared.geometry, 1 + blocks, prepared.dtype)
    executor = Executor(prepared, store)
    sequence = Sequence(list(TEXT), TOKENS, 0, None, table=list(range(1, 1 + blocks)))
    logits = [
        executor.run([Slice(sequence, start, min(cut, TOKENS - start))], watch)
        for start in range(0, TOKENS, cut)
    ]
    return Bits(torch.cat(logits), *store.read(sequence.table, TOKENS))


@torch.inference_mode()
def plainly(subject: Subject, **options: Any) -> Any:
    return subject.plain(torch.tensor([TEXT]), use_cache=False, **options)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    allowed = ROUNDING * max(1.0, expected.abs().max().item())
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(
    subjects: Callable[[str], Subject], family: str
) -> None:
    subject = subjects(family)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        outputs[name] = output[0]

    (norm,) = (
        module
        for name, module in subject.plain.base_model.named_modules()
        if name.split(".")[-1] in ("norm", "ln_f", "final_layer_norm") and "layers" not in name
    )
    with (
        subject.layers[-1].register_forward_hook(partial(keep, "last")),
        norm.register_forward_hook(partial(keep, "normalised")),
    ):
        expected = plainly(subject, output_hidden_states=True).hidden_states
    watch = Changing(*subject.sites)
    compute(subject.prepared, watch, cut=64)
    count = len(subject.layers)
    for place in range(count):
        assert_close(watch.rows[Site("residual", place)], expected[place][0])
    assert_close(watch.rows[Site("residual", count)], outputs["last"])
    assert_close(watch.rows[Site("normalised", 0)], outputs["normalised"])
    if family != "opt":  # there it is projected after that
        assert torch.equal(outputs["normalised"], expected[count][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_give_the_attentions_of_transformers(
    subjects: Callable[[str], Subject], family: str
) -> None:
    subject = subjects(family)
    expected = plainly(subject, output_attentions=True).attentions
    watch = Changing(*(site for site in subject.sites if site.kind == "queries"))
    bits = compute(subject.prepared, watch, cut=64)
    group = subject.prepared.geometry.query_heads // subject.prepared.geometry.kv_heads
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    for layer, (scaling, window, softcap) in watch.weighing.items():
        queries = watch.rows[Site("queries", layer)].transpose(0, 1)
        scores = queries @ bits.k[layer].repeat_interleave(group, 0).transpose(1, 2) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = (distance < 0) | (distance >= (window or TOKENS))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        assert_close(weights, expected[layer][0])
    assert len(watch.weighing) == len(subject.layers)


def test_keys_are_in_the_store_by_the_time_their_queries_are_seen(
    subjects: Callable[[str], Subject],
) -> None:
    prepared = subjects("qwen3").prepared
    blocks = blocks_for(TOKENS)
    store = KVStore(prepared.geometry, 1 + blocks, prepared.dtype)
    table = list(range(1, 1 + blocks))
    found: dict[Site, Tensor] = {}
    sites = [Site("queries", layer) for layer in range(prepared.geometry.layers)]

    def read(site: Site, _: Tensor) -> None:
        found[site] = store.read(table, TOKENS)[0]

    watch = Changing(changes={site: partial(read, site) for site in sites})
    sequence = Sequence(list(TEXT), TOKENS, TOKENS, None, table=table)
    Executor(prepared, store).run([Slice(sequence, 0, TOKENS)], watch)
    k, _ = store.read(table, TOKENS)
    for site, then in found.items():
        assert torch.equal(then[: site.index + 1], k[: site.index + 1])
        assert not then[site.index + 1 :].any()
    assert len(found) == len(sites)


def silenced(heads: list[int]) -> Change:
    def change(rows: Tensor) -> None:
        rows[:, heads] = 0

    return change


def added(positions: range, vector: Tensor) -> Change:
    def change(rows: Tensor) -> None:
        rows[positions.start : positions.stop] += vector

    return change


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_go_on_as_they_do_in_transformers(
    subjects: Callable[[str], Subject], family: str
) -> None:
    subject = subjects(family)
    geometry, layers = subject.prepared.geometry, subject.layers
    vector = torch.randn(subject.plain.config.hidden_size, generator=torch.Generator())
    positions, heads = range(30, 90), [1, 3]

    def silence(_: nn.Module, taken: tuple[Tensor]) -> tuple[Tensor]:
        rows = taken[0].clone()
        rows.view(-1, geometry.query_heads, geometry.head_dim)[:, heads] = 0
        return (rows,)

    def add(_: nn.Module, taken: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = taken[0].clone()
        rows[:, positions.start : positions.stop] += vector
        return rows, *taken[1:]

    (projection,) = (
        module
        for name, module in layers[0].named_modules()
        if name.split(".")[-2:]
        in (["attn", "c_proj"], ["self_attn", "o_proj"], ["self_attn", "out_proj"])
        or name == "attention.dense"
    )
    unchanged = plainly(subject).logits[0]
    for site, change, module, hook in (
        (Site("heads", 0), silenced(heads), projection, silence),
        (Site("residual", 1), added(positions, vector), layers[1], add),
    ):
        with module.register_forward_pre_hook(hook):
            expected = plainly(subject).logits[0]
        bits = compute(subject.prepared, Changing(changes={site: change}))
        assert_close(bits.logits, expected)
        assert (expected - unchanged).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize(("threads", "cut"), [(1, 1), (2, 37), (3, 7)])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_looking_on_changes_no_bit(
    subjects: Callable[[str], Subject], family: str, threads: int, cut: int
) -> None:
    subject = subjects(family)
    prepared = small_models.on_threads(subject.prepared, threads)
    expected = compute(prepared)
    whole = Changing(*subject.sites)
    assert compute(prepared, whole).equal(expected)
    watch = Changing(*subject.sites)
    assert compute(prepared, watch, cut=cut).equal(expected)
    assert watch.rows.keys() == set(subject.sites)
    for site, rows in watch.rows.items():
        assert torch.equal(rows, whole.rows[site]), site
    some = Changing(Site("queries", 1), Site("residual", 1))
    assert compute(prepared, some).equal(expected)
    assert all(torch.equal(rows, whole.rows[site]) for site, rows in some.rows.items())


@pytest.mark.parametrize("kind", ["residual", "normalised", "queries", "heads"])
def test_control_one_changed_float_changes_bits(
    subjects: Callable[[str], Subject], kind: Any
) -> None:
    def change(rows: Tensor) -> None:
        rows[-1, ..., 0] += 1

    prepared = subjects("qwen3").prepared
    assert not compute(prepared, Changing(changes={Site(kind, 0): change})).equal(compute(prepared))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_last_layer_give_the_logits_of_their_pass(
    subjects: Callable[[str], Subject], family: str, threads: int
) -> None:
    prepared = small_models.on_threads(subjects(family).prepared, threads)
    last = Site("residual", prepared.geometry.layers)
    watch = Changing(last)
    expected = compute(prepared, watch).logits
    forward = prepared.bind(KVStore(prepared.geometry, 1, prepared.dtype))
    rows = watch.rows[last]
    assert torch.equal(forward.project(rows), expected)
    for start, count in ((0, 1), (7, 2), (149, 1), (20, 83)):
        part = slice(start, start + count)
        assert torch.equal(forward.project(rows[part]), expected[part])
    assert not torch.equal(forward.project(rows[:1] + 1), expected[:1])
    assert forward.project(rows[:0]).shape == (0, prepared.shape.vocabulary)


def test_rows_in_bfloat16_models_are_single_precision_and_change_no_bit(
    folders: dict[str, str | Path],
) -> None:
    prepared = small_models.prepared(folders["llama"], torch.bfloat16)
    last = Site("residual", prepared.geometry.layers)
    watch = Changing(last, Site("queries", 0))
    bits = compute(prepared, watch)
    assert {rows.dtype for rows in watch.rows.values()} == {torch.float32}
    assert bits.equal(compute(prepared))
    forward = prepared.bind(KVStore(prepared.geometry, 1, prepared.dtype))
    assert torch.equal(forward.project(watch.rows[last]), bits.logits)


def test_a_model_whose_layers_cannot_be_told_runs_and_refuses_to_show_them(
    subjects: Callable[[str], Subject], folders: dict[str, str | Path]
) -> None:
    loaded = small_models.read(folders["gpt2"])
    decoder: Any = loaded.model.transformer
    decoder.h = nn.Sequential(*decoder.h)
    prepared = small_models.made_ready(loaded, torch.float32)
    expected = compute(subjects("gpt2").prepared)
    assert compute(prepared).equal(expected)
    assert compute(prepared, Changing(Site("queries", 0), Site("heads", 1))).equal(expected)
    forward = prepared.bind(KVStore(prepared.geometry, 1, prepared.dtype))
    assert isinstance(forward, Execution)
    assert {site.kind for site in forward.sites} == {"queries", "heads"}
    for site in (Site("residual", 0), Site("normalised", 0)):
        with pytest.raises(InvalidInput, match=r"state_id: .* cannot be given truly"):
            compute(prepared, Changing(Site("queries", 0), site))
        with pytest.raises(InvalidInput, match=r"state_id: .* cannot be given truly"):
            Executor(prepared, KVStore(prepared.geometry, 1, prepared.dtype)).check(
                [Site("queries", 0), site]
            )
    with pytest.raises(InvalidInput, match=r"state_id: .* cannot be given truly"):
        forward.project(torch.zeros(1, 64))


def test_a_watch_that_fails_leaves_the_machine_as_it_was(
    subjects: Callable[[str], Subject],
) -> None:
    def fail(_: Tensor) -> None:
        raise RuntimeError("cannot look")

    prepared = subjects("gpt2").prepared
    with pytest.raises(RuntimeError, match="cannot look"):
        compute(prepared, Changing(changes={Site("residual", 1): fail}))
    assert compute(prepared, Changing(Site("heads", 0))).equal(compute(prepared))
