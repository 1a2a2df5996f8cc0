"""The kernels of the strict strategy against the same in double precision."""

from random import Random
from typing import Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.kv_store import Geometry
from infra.engine.strict import exact
from infra.engine.strict.program import Code
from tests.infra.engine import programs
from tests.infra.engine.bench import Bench, random_cuts, text
from tests.infra.engine.programs import Writer

EPSILON: Final = 2.0**-24
NAN, INFINITY = float("nan"), float("inf")


def of(code: Code, *columns: Tensor) -> Tensor:
    """What the machine makes of floats, in rows of up to 1024."""
    count = columns[0].numel()
    rows = -(-count // 1024)
    writer = Writer()
    padded = [torch.nn.functional.pad(x, (0, rows * 1024 - count)) for x in columns]
    slots = [writer.embed(x.view(rows, 1024)) for x in padded]
    program = writer.finish(writer.apply(code, *slots), tokens=rows)
    return programs.run(program, rows).flatten()[:count]


def between(low: float, high: float, count: int = 200_000) -> Tensor:
    """Floats over a range, with many close to 0 where it holds 0."""
    spread = torch.linspace(low, high, count)
    return torch.cat([spread, spread / 1024])


def ulps(got: Tensor, exact: Tensor) -> float:
    """The largest distance from a value in double precision, in units of the last place."""
    place = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    return ((got.double() - exact).abs() / place).max().item()


def gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def test_the_exponential_is_within_two_units_of_the_last_place() -> None:
    x = between(-87, 88)
    assert ulps(of(Code.EXP, x), x.double().exp()) <= 2


def test_the_hyperbolic_tangent_is_within_three_units_of_the_last_place() -> None:
    x = between(-30, 30)
    assert ulps(of(Code.TANH, x), x.double().tanh()) <= 3


def test_the_gates_are_within_a_few_units_of_the_last_place() -> None:
    x = between(-80, 80)
    assert ulps(of(Code.SIGMOID, x), x.double().sigmoid()) <= 4
    assert ulps(of(Code.SILU, x), torch.nn.functional.silu(x.double())) <= 5
    assert ulps(of(Code.RSQRT, x.abs() + 1e-6), (x.abs() + 1e-6).double().rsqrt()) <= 2


@pytest.mark.parametrize(("code", "function"), [(Code.GELU, gelu), (Code.GELU_TANH, gelu_tanh)])
def test_gelu_is_within_the_error_of_its_approximation(code: Code, function: type) -> None:
    x = between(-12, 12)
    error = (of(code, x).double() - function(x.double())).abs()
    assert (error <= 2e-7 * (1 + x.double().abs())).all()


def test_arithmetic_is_that_of_ieee_754_bit_for_bit() -> None:
    x, y = (torch.randn(5000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for code, expected in (
        (Code.ADD, x + y),
        (Code.SUBTRACT, x - y),
        (Code.MULTIPLY, x * y),
        (Code.DIVIDE, x / y),
    ):
        assert torch.equal(of(code, x, y), expected)
    for code, expected in (
        (Code.COPY, x),
        (Code.NEGATIVE, -x),
        (Code.RELU, x.relu()),
        (Code.SQUARE, x * x),
        (Code.CUBE, x * x * x),
    ):
        assert torch.equal(of(code, x), expected)


FUNCTIONS = [code for code in Code if code < Code.MEAN]


@pytest.mark.parametrize("code", FUNCTIONS, ids=lambda code: code.name)
def test_what_is_no_number_stays_none(code: Code) -> None:
    x = torch.linspace(-3, 3, 100)
    x[[0, 17, 64, 99]] = NAN
    assert torch.equal(of(code, x).isnan(), (x.rsqrt() if code == Code.RSQRT else x).isnan())


def test_functions_of_infinity_are_their_limits() -> None:
    x = torch.tensor([-INFINITY, INFINITY])
    assert of(Code.EXP, x)[0] == 0
    assert of(Code.TANH, x).tolist() == [-1, 1]
    assert of(Code.SIGMOID, x)[1] == 1
    assert of(Code.SIGMOID, x)[0] < 1e-37
    assert of(Code.RELU, x).tolist() == [0, INFINITY]


@pytest.mark.parametrize("width", [1, 15, 16, 17, 172, 1000])
def test_norms_and_means_of_any_width_are_those_of_double_precision(width: int) -> None:
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(width)) + 3
    weight, bias = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    for parameters in ((weight, bias), (weight, None), (None, None)):
        writer = Writer()
        norm = writer.layer_norm(writer.embed(x), *parameters, 1e-5)
        got = programs.run(writer.finish(norm, tokens=9), 9)
        doubles = (None if each is None else each.double() for each in parameters)
        expected = torch.nn.functional.layer_norm(x.double(), (width,), *doubles, 1e-5)
        assert (got - expected).abs().max() < 2e-5
    writer = Writer()
    mean = writer.apply(Code.MEAN, writer.embed(x))
    got = programs.run(writer.finish(mean, tokens=9), 9)
    assert (got - x.double().mean(-1, keepdim=True)).abs().max() < 1e-6


def product(x: Tensor, weight: Tensor, bias: Tensor | None, threads: int = 2) -> Tensor:
    """Rows through a linear layer, in one pass."""
    writer = Writer()
    out = writer.linear(writer.embed(x), weight, bias)
    result = programs.run(writer.finish(out, tokens=len(x)), len(x), threads=threads)
    return result[:, : len(weight)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (7, 5), (20, 64), (172, 65), (64, 1027), (1030, 63)]
)
def test_products_of_any_shape_are_those_of_double_precision(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(40, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    whole = product(x, weight, bias)
    expected = x.double() @ weight.double().t() + bias.double()
    size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    assert ((whole - expected).abs() <= EPSILON * (inputs + 1) * size).all()
    for rows in (1, 2, 5, 6, 7, 13, 37):
        assert torch.equal(product(x[:rows], weight, bias, rows % 3 + 1), whole[:rows])


def test_a_product_is_summed_from_the_bias_on_in_the_order_of_its_inputs() -> None:
    large = 2.0**30  # next to it 1 is lost
    inputs = torch.tensor([[1.0, large, 1.0, -large, 1.0, 1.0]])
    ones = torch.ones(70, 6)
    assert product(inputs, ones, None).unique().tolist() == [2.0]
    assert product(inputs.flip(1), ones, None).unique().tolist() == [1.0]
    assert product(inputs[:, 2:], ones, torch.full((70,), large)).unique().tolist() == [2.0]


def test_a_product_rounds_once_for_each_input() -> None:
    step = 1 + 2.0**-12  # its square needs more digits than there are
    x = torch.tensor([[step, 1.0]])
    weight = torch.tensor([[step, -(1 + 2.0**-11)]])
    assert product(x, weight, None).item() == 0.0
    assert product(x.flip(1), weight.flip(1), None).item() == 2.0**-24


def softmax_of(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int, cap: float) -> Tensor:
    """Causal attention of one text in double precision, ``(tokens, heads * dim)``."""
    count, heads, dim = q.shape
    group = heads // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double() * scaling, k)
    if cap:
        scores = (scores / cap).tanh() * cap
    rows, keys = torch.arange(count)[:, None], torch.arange(count)[None]
    hidden = (keys > rows) | ((keys <= rows - window) if window else False)
    weights = scores.masked_fill(hidden, -INFINITY).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(count, heads * dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "cap"),
    [
        (1, 1, 16, 0, 0.0),
        (4, 1, 20, 0, 0.0),
        (6, 2, 24, 40, 0.0),
        (4, 4, 40, 1, 3.0),
        (16, 1, 16, 33, 2.0),
        (14, 2, 64, BLOCK_TOKENS, 0.0),
    ],
)
def test_attention_is_that_of_double_precision_however_rows_come_together(
    *, heads: int, kv_heads: int, dim: int, window: int, cap: float, dtype: torch.dtype
) -> None:
    geometry = Geometry(1, heads, kv_heads, dim)
    generator = torch.Generator().manual_seed(heads)
    tables = [torch.randn(16, n * dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
    writer = Writer()
    slots = [writer.embed(table) for table in tables]
    program = writer.finish(writer.attend(slots, geometry, dim**-0.5, window, cap), tokens=16)
    bench = Bench(programs.prepared(program, geometry=geometry, dtype=dtype), max_rows=64)
    random = Random(heads)
    begun = text(0, 70, 16)
    texts = [begun + text(1, 40, 16), begun + text(2, 9, 16), text(3, 33, 16), text(4, 1, 16)]
    bench.compute(begun)
    feedings = [
        bench.feeding(tokens, random_cuts(random, len(tokens), largest=24)) for tokens in texts
    ]
    for tokens, bits in zip(texts, bench.run(*feedings, random=random), strict=True):
        q, k, v = (
            table[tokens].view(len(tokens), -1, dim).to(torch.float32 if i == 0 else dtype)
            for i, table in enumerate(tables)
        )
        expected = softmax_of(q, k, v, dim**-0.5, window, cap)
        assert (bits.logits - expected).abs().max() < 2e-5


def test_a_score_that_is_no_number_does_not_vanish() -> None:
    geometry = Geometry(1, 2, 1, 16)
    query, key, value = (torch.randn(40, n * 16) for n in (2, 1, 1))
    key[5, 3] = NAN
    for cap in (0.0, 2.0):
        writer = Writer()
        slots = [writer.embed(table) for table in (query, key, value)]
        program = writer.finish(writer.attend(slots, geometry, 1.0, 20, cap), tokens=40)
        lost = programs.run(program, 40, geometry=geometry).isnan().all(1)
        assert lost.nonzero().flatten().tolist() == list(range(5, 25))  # who sees it


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 2**32 - 1))
def test_the_sine_of_any_position_is_that_of_double_precision_rounded(
    position: int, seed: int
) -> None:
    angles = torch.rand(500, generator=torch.Generator().manual_seed(seed)) * position
    doubles: NDArray[np.float64] = angles.double().numpy()
    for name, function in (("sin", np.sin), ("cos", np.cos)):
        got = exact.evaluate(None, name, (angles,), {})
        expected = torch.from_numpy(function(doubles))
        assert got.dtype == torch.float32
        assert ulps(got, expected) <= 0.5000001
