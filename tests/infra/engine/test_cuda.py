"""The fixed tile: one shape for every product, whatever a pass holds.

Where there is a GPU these tests run on it, through captured graphs; without one they run the same
operations on the CPU. The contract suite runs this strategy too.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig

from infra.engine import strategies
from infra.engine.blocks import BLOCK_TOKENS, Transfer, blocks_for
from infra.engine.engine import Engine
from infra.engine.executor import Executor, prepare
from infra.engine.forward import Prepared, Unsupported
from infra.engine.kv_store import Geometry, KVStore
from infra.engine.modules.watching import View
from infra.engine.scheduler import Sequence, Slice
from infra.engine.strategies import cuda
from infra.engine.strategies.cuda import SPAN, TILE, TileForward
from tests.infra.engine import small_models
from tests.infra.engine.bench import Bench, random_cuts, text
from tests.infra.engine.small_models import CONTEXT
from tests.infra.engine.test_kv_tiers import Tiered

KEYS = SPAN * BLOCK_TOKENS
LONG = 2 * KEYS + 40
"""Tokens in three spans."""

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
META = torch.device("meta")
"""Computes shapes alone, on a device that is not the CPU."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose texts may have several spans, with a window wider than one."""
    config = MistralConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=LONG,
        sliding_window=KEYS + 30,
    )
    return small_models.write(tmp_path_factory.mktemp("cuda") / "long", config)


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Prepared:
    return small_models.prepared(folder, strategy="cuda")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Spans of each tile that is computed, and whether it has a head."""
    seen: list[tuple[int, bool]] = []
    compute = TileForward._compute

    def watched(self: TileForward, spans: int, *, head: bool, view: View | None) -> None:
        seen.append((spans, head))
        compute(self, spans, head=head, view=view)

    monkeypatch.setattr(TileForward, "_compute", watched)
    return seen


def sequence(tokens: list[int], first_block: int, *, wanted: int = 0) -> Sequence:
    table = list(range(first_block, first_block + blocks_for(len(tokens))))
    return Sequence(tokens, len(tokens), wanted, None, table=table)


def executor(prepared: Prepared, blocks: int = 64) -> Executor:
    store = KVStore(prepared.geometry, blocks, prepared.dtype, device=prepared.shape.device)
    return Executor(prepared, store)


# one set of bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_the_contract_kept(
    folder: Path, engine: Engine, dtype: torch.dtype
) -> None:
    numerics = small_models.language_model(folder, engine, strategy="cuda", dtype=dtype).numerics
    assert numerics.note == f"contract probed up to {LONG} tokens"
    assert numerics.deterministic
    assert (numerics.strategy, numerics.quantum) == ("cuda", TILE)


def test_how_many_spans_its_tile_has_changes_no_bit_of_a_row(
    prepared: Prepared, tiles: list[tuple[int, bool]]
) -> None:
    short, long = text(1, 40), text(2, LONG)
    alone = Bench(prepared).compute(short)
    assert tiles == [(1, True)]
    bench = Bench(prepared)
    feedings = [
        bench.feeding(long, [LONG - 40, *[1] * 40], first_wanted=LONG - 41),
        bench.feeding(short, [1] * 40),
    ]
    tiles.clear()
    beside = bench.run(*feedings)[1]
    assert (3, True) in tiles
    assert beside.equal(alone)


def test_decoding_over_the_edge_of_a_span_gives_the_bits_of_a_prefill(
    prepared: Prepared, tiles: list[tuple[int, bool]]
) -> None:
    tokens = text(3, LONG)
    prefill = Bench(prepared).compute(tokens)
    tiles.clear()
    cuts = [KEYS - 2, 1, 1, 1, 1, KEYS - 4, 1, 1, 1, 1, LONG - 2 * KEYS - 2]
    assert Bench(prepared).compute(tokens, cuts).equal(prefill)
    assert {spans for spans, _ in tiles} == {1, 2, 3}


def test_a_row_has_its_bits_at_every_place_of_a_tile(prepared: Prepared) -> None:
    tokens, run = text(4, BLOCK_TOKENS), executor(prepared)
    subject = sequence(tokens, 1)
    run.run([Slice(subject, 0, BLOCK_TOKENS - 1)])
    last = Slice(subject, BLOCK_TOKENS - 1, 1)
    alone = run.run([last])
    for before in range(1, TILE + 2):
        other = sequence(text(before, before), 2, wanted=before)
        assert torch.equal(run.run([Slice(other, 0, before), last]), alone), before


def test_control_rows_in_tiles_of_another_size_have_other_bits(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = text(5, 40)
    expected = Bench(prepared).compute(tokens)
    monkeypatch.setattr(cuda, "TILE", 1)
    assert not Bench(prepared).compute(tokens).equal(expected)


# why: one shape


class Products(TorchDispatchMode):
    """Notes shapes and strides of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
            tensors = [x for x in args if isinstance(x, Tensor)]
            self.shapes.add((name, *((tuple(x.shape), x.stride()) for x in tensors)))
        return func(*args, **kwargs or {})


def shapes(prepared: Prepared, slices: list[Slice]) -> set[tuple[object, ...]]:
    run = executor(prepared)
    with Products() as products:
        run.run(slices)
    return products.shapes


def passes() -> Iterator[list[Slice]]:
    """Passes that have little in common but that each asks for logits."""
    one, several, long = (
        sequence(text(6, 9), 1),
        sequence(text(7, 70), 2),
        sequence(text(8, LONG), 9),
    )
    yield [Slice(one, 8, 1)]
    yield [Slice(several, 0, 70)]
    yield [Slice(one, 8, 1), Slice(several, 40, 30), Slice(long, LONG - 7, 7)]
    yield [Slice(long, 0, LONG)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a graph replays is not dispatched")
def test_every_product_has_the_same_shape_in_every_pass(prepared: Prepared) -> None:
    found = [shapes(prepared, slices) for slices in passes()]
    assert len(found[0]) == 7, found[0]
    assert all(each == found[0] for each in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a graph replays is not dispatched")
def test_control_the_products_of_plain_blas_have_the_shapes_of_their_pass(folder: Path) -> None:
    plain = small_models.prepared(folder, strategy="plain")
    found = [shapes(plain, slices) for slices in passes()]
    assert all(each != found[0] for each in found[1:])


def test_a_tile_that_nobody_wants_logits_of_has_no_head(
    prepared: Prepared, tiles: list[tuple[int, bool]]
) -> None:
    subject = sequence(text(9, 3 * TILE), 1, wanted=3 * TILE - 1)
    logits = executor(prepared).run([Slice(subject, 0, 3 * TILE)])
    assert tiles == [(1, False), (1, False), (1, True)]
    assert logits.shape == (1, 1024)


def test_the_logits_of_a_pass_are_not_written_to_by_the_next(prepared: Prepared) -> None:
    run = executor(prepared)
    first = run.run([Slice(sequence(text(10, 5), 1), 0, 5)])
    kept = first.clone()
    assert not torch.equal(run.run([Slice(sequence(text(11, 5), 2), 0, 5)]), kept)
    assert torch.equal(first, kept)


# the device


class Strangers(TorchDispatchMode):
    """Notes tensors of a pass that are not on the meta device, and what is copied off and on to it.

    Copies off it are left out: there is nothing to copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.copied: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        where = {tensor.device for tensor in tensors}
        if name == "copy_" and len(where) == 2:
            self.copied.append((args[1].device.type, len(args[1])))
            return args[0]
        if name == "to" and where == {META} and torch.device("cpu") in leaves:
            self.copied.append(("meta", len(args[0])))
            return torch.zeros(args[0].shape)
        if META in where and len(where) > 1:
            self.found.add(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("strategy", ["cuda", "plain"])
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_a_pass_has_all_its_tensors_where_the_model_is(
    folders: dict[str, str | Path], family: str, strategy: str
) -> None:
    model = small_models.read(folders[family], device="meta").model
    shape = {"threads": 1, "context": CONTEXT, "vocabulary": 1024}
    run = executor(prepare(model, strategy, torch.float32, device="meta", **shape))
    slices = [
        Slice(sequence(text(12, 70), 1, wanted=60), 0, 70),
        Slice(sequence(text(13, 3), 9), 2, 1),
    ]
    with Strangers() as strangers:
        logits = run.run(slices)
    assert logits.shape == (11, 1024)
    assert logits.device.type == "cpu"
    assert strangers.found == set()
    inputs = ("cpu", 4 + SPAN)
    tiles = [inputs, ("meta", 4), inputs, ("meta", 7)]
    assert strangers.copied == (tiles if strategy == "cuda" else [("meta", 11)])


def test_control_a_tensor_that_is_elsewhere_is_found(folders: dict[str, str | Path]) -> None:
    model = small_models.read(folders["llama"], device="meta").model
    shape = {"threads": 1, "context": CONTEXT, "vocabulary": 1024}
    prepared = prepare(model, "cuda", torch.float32, device="meta", **shape)
    store = KVStore(prepared.geometry, 64, prepared.dtype)  # on the CPU
    with Strangers() as strangers, pytest.raises((RuntimeError, NotImplementedError)):
        Executor(prepared, store).run([Slice(sequence(text(14, 3), 1), 0, 3)])
    assert strangers.found


def test_auto_takes_the_fixed_tile_on_a_gpu_and_what_needs_a_cpu_is_refused_there(
    folder: Path,
) -> None:
    model = small_models.read(folder).model
    shape = {"threads": 1, "context": LONG, "vocabulary": 1024, "device": "cuda"}
    for name in ("strict", "onednn"):
        with pytest.raises(Unsupported, match=f"{name}: it runs on a CPU"):
            prepare(model, name, torch.float32, **shape)
    assert prepare(model, "auto", torch.float32, **shape).strategy == "cuda"
    assert set(strategies.PREFERRED["cuda"]) <= set(strategies.known())


def test_a_gpu_is_told_to_compute_in_the_type_it_is_given(folder: Path) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    matmul.allow_bf16_reduced_precision_reduction = True
    small_models.prepared(folder, strategy="cuda")
    assert matmul.fp32_precision == "ieee"
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_fp16_accumulation


@on_gpu
def test_a_graph_gives_the_bits_of_its_operations_one_by_one(prepared: Prepared) -> None:
    tokens = text(15, LONG)
    cuts = random_cuts(Random(15), LONG)
    captured = Bench(prepared)
    bits = captured.compute(tokens, cuts)
    forward = captured.runner.executor._forward
    assert isinstance(forward, TileForward)
    assert forward._graphs is not None
    assert {spans for spans, _ in forward._graphs._captured} == {1, 2, 3}
    one_by_one = Bench(prepared)
    one_by_one.runner.executor._forward._graphs = None
    assert one_by_one.compute(tokens, cuts).equal(bits)


# the host's memory


def test_a_text_restored_from_the_host_has_the_bits_it_was_computed_with(
    prepared: Prepared,
) -> None:
    first, second = text(16, 150), text(17, 150)
    expected = Bench(prepared).compute(first, first_wanted=149)
    bench = Tiered(prepared, blocks=1 + blocks_for(150), host_slots=8)
    bench.compute(first)
    bench.compute(second)
    restored, reused = bench.last(first)
    assert (bench.pool.restores, reused) == (4, 4 * BLOCK_TOKENS)
    assert restored.equal(expected)


@on_gpu
def test_the_hosts_memory_is_pinned_and_copies_keep_the_order_they_were_made_in() -> None:
    store = KVStore(
        Geometry(3, 4, 2, 8), 6, torch.bfloat16, device=torch.device("cuda"), host_slots=1
    )
    assert store.host_k.is_pinned()
    assert store.host_v.is_pinned()
    for tensor in (store.k, store.v):
        tensor.copy_(torch.randn(tensor.shape))
    before = store.k.clone()
    transfers = [  # all through the one slot
        Transfer(block, 0, to_host=to_host)
        for source, target in ((1, 4), (2, 5))
        for block, to_host in ((source, True), (target, False))
    ]
    store.move(transfers)
    assert torch.equal(store.k, before[:, [0, 1, 2, 3, 1, 2]])


@given(budget=st.integers(0, 1 << 40), head_dim=st.integers(1, 256), layers=st.integers(1, 80))
def test_blocks_on_the_host_take_no_more_than_their_budget_however_memory_is_pinned(
    budget: int, head_dim: int, layers: int
) -> None:
    geometry = Geometry(layers, 8, 8, head_dim)
    slots = geometry.host_slots(torch.bfloat16, budget)
    k, v = (layers * 8 * BLOCK_TOKENS * width * 2 for width in (head_dim, geometry.value_dim))
    pinned = sum(1 << (slots * each - 1).bit_length() for each in (k, v)) if slots else 0
    assert pinned <= budget
    assert (slots + 1) * v > budget // 4  # more than half of each half, but for one block


def test_a_budget_that_is_a_power_of_two_is_used_to_the_last_block() -> None:
    geometry = Geometry(16, 32, 8, 64)
    block = geometry.block_bytes(torch.bfloat16)
    assert geometry.host_slots(torch.bfloat16, 1 << 33) == (1 << 33) // block
