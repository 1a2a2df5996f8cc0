"""The same finding as JSON, ``.npy`` and safetensors, with nothing lost; and who gets which."""

import io
import json
import math
import struct
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar import Request
from litestar.testing import RequestFactory
from msgspec import Struct

from app.operations.analysis.analyze import Analyzed
from app.representations import files, forms, nested
from app.representations.negotiation import NotAcceptable, best, ranges
from app.streams import EventStream
from app.turns import Turns
from domain.analysis.extent import Extent
from domain.analysis.parameters import NextParameters
from domain.analysis.result import ITEM_BYTES, Dtype, Result, Tensor
from domain.analysis.tokens import Likely, TokenFacts, TokensFacts
from domain.errors import InvalidInput, QueueFull, ResultTooLarge
from domain.ids import TokenId
from tests.app.api import Json
from tests.builders import created, live

JSON, NPY, SAFETENSORS = forms.JSON, forms.NPY, forms.SAFETENSORS
TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}
NUMBERS = Tensor(
    name="numbers",
    shape=(2, 3),
    dtype="float32",
    data=struct.pack("<6f", 0.1, 1.5, -2.0, 3e38, math.inf, -0.0),
    layers=(4,),
    start=1,
    end=3,
)
IDS = Tensor(name="ids", shape=(2,), dtype="int64", data=struct.pack("<2q", -1, 2**53))


class Facts(Struct, frozen=True):
    """What a test claims to have found."""

    layer: int = 4
    mean: float | None = None


class Beside(Struct, frozen=True):
    """What is true at the moment only."""

    hot: int


def found(*tensors: Tensor, **fields: Any) -> Analyzed:
    result = Result(facts=Facts(), tensors=tensors, **fields)
    return Analyzed(live(created("abc")), NextParameters(), result, "f" * 64)


def request(accept: str | None = None, **query: str) -> Request[Any, Any, Any]:
    headers = {} if accept is None else {"Accept": accept}
    return RequestFactory().get("/", headers=headers, query_params=query)


def wanted(accept: str | None = None, *, places: Turns | None = None, **query: str) -> forms.Wanted:
    return forms.wanted(request(accept, **query), NextParameters(), places or Turns(1))


def as_json(one: Analyzed) -> Json:
    read: Json = json.loads(b"".join(nested.parts(one)), parse_constant=_refuse)
    return read


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


async def sent(accept: str, one: Analyzed, **query: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an answer."""
    form = wanted(accept, **query)
    form.check(one.result)
    response = await forms.represent(form, one, {"ETag": '"1"'})
    headers = {"Content-Type": str(response.media_type), **response.headers}
    if isinstance(response, EventStream):
        return b"".join([chunk async for chunk in response.iterator]), headers  # type: ignore[union-attr]
    return response.content, headers


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of any bits, also of none at all."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    place = draw(st.integers(0, 9))
    return Tensor(
        name="found",
        shape=shape,
        dtype=dtype,
        data=draw(st.binary(min_size=size, max_size=size)),
        layers=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
        start=place,
        end=place + 1,
    )


def in_torch(tensor: Tensor) -> torch.Tensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


def bits_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


# nothing is lost


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_numpy_reads_back_every_bit(tensor: Tensor) -> None:
    size, parts = files.npy(tensor)
    file = b"".join(parts)
    assert len(file) == size
    read = torch.from_numpy(np.load(io.BytesIO(file), allow_pickle=False))
    expected = in_torch(tensor)
    if tensor.dtype == "bfloat16":
        assert read.dtype == torch.float32
        finite = expected.isfinite()
        assert torch.equal(read.isnan(), expected.isnan())
        assert bits_of(read[finite]) == bits_of(expected[finite].float())
        assert bits_of(read)[2::4] + bits_of(read)[3::4] == tensor.data[0::2] + tensor.data[1::2]
    else:
        assert (read.shape, read.dtype) == (expected.shape, expected.dtype)
        assert bits_of(read) == tensor.data


@settings(max_examples=150, deadline=None)
@given(st.lists(tensors(), max_size=3))
def test_safetensors_reads_back_every_bit_of_every_tensor(made: list[Tensor]) -> None:
    named = {
        f"tensor-{place}": Tensor(
            name=f"tensor-{place}", shape=one.shape, dtype=one.dtype, data=one.data
        )
        for place, one in enumerate(made)
    }
    size, parts = files.safetensors(found(*named.values()))
    file = b"".join(parts)
    assert len(file) == size
    read = safetensors.torch.load(file)
    assert read.keys() == named.keys()
    for name, tensor in named.items():
        assert (read[name].shape, read[name].dtype) == (tensor.shape, TORCH_DTYPES[tensor.dtype])
        assert bits_of(read[name]) == tensor.data


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_json_holds_every_finite_element_exactly_and_null_for_the_others(tensor: Tensor) -> None:
    read = as_json(found(tensor))
    expected = in_torch(tensor)
    finite = expected.isfinite()

    def check(lists: Any, own: torch.Tensor, there: torch.Tensor) -> None:
        if own.dim():
            assert len(lists) == len(own)
            for one, element, known in zip(lists, own, there, strict=True):
                check(one, element, known)
        elif not there:
            assert lists is None
        elif tensor.dtype == "int64":
            assert lists == own.item()
        else:
            assert struct.pack("<d", lists) == struct.pack("<d", own.item())

    check(read["found"], expected, finite)
    nulls = int((~finite).sum())
    assert read.get("note", "").startswith(f"{nulls} elements are null" if nulls else "")
    assert ("note" in read) == bool(nulls)
    (view,) = read["tensors"]
    assert view == {
        "name": "found",
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "layers": list(tensor.layers),
        "range": [tensor.start, tensor.end],
    }


@pytest.mark.parametrize("shape", [(3, 40_000), (40_000, 3), (5, 1), (2, 3, 10_000), (100_000,)])
def test_json_of_more_than_is_held_at_a_time_is_whole(shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    tensor = Tensor(name="many", shape=shape, dtype="float32", data=bits_of(numbers))
    assert torch.equal(torch.tensor(as_json(found(tensor))["many"]), numbers)


def test_json_says_whose_it_is_what_was_found_and_what_is_true_beside() -> None:
    assert as_json(found(NUMBERS, IDS, beside=Beside(hot=7))) == {
        "state_id": found().state.state_id,
        "version": 1,
        "model_id": "cacher-tiny",
        "fingerprint": "f" * 64,
        "layer": 4,
        "mean": None,
        "numbers": [[0.10000000149011612, 1.5, -2.0], [3.0000000054977558e38, None, -0.0]],
        "ids": [-1, 2**53],
        "tensors": [
            {
                "name": "numbers",
                "shape": [2, 3],
                "dtype": "float32",
                "layers": [4],
                "range": [1, 3],
            },
            {"name": "ids", "shape": [2], "dtype": "int64", "layers": [], "range": [0, 0]},
        ],
        "note": "1 elements are null: NaN or infinite, which JSON has no number for",
        "hot": 7,
    }


def hidden(count: int, dtype: Dtype = "float32", *, inline: bool = False) -> Tensor:
    data = bytes(count * ITEM_BYTES[dtype])
    return Tensor(name="logits", shape=(count,), dtype=dtype, data=data, inline=inline)


def test_a_tensor_that_is_not_inline_is_named_with_the_way_to_get_it() -> None:
    read = as_json(found(NUMBERS, hidden(5)))
    assert "logits" not in read
    assert [view.get("inline") for view in read["tensors"]] == [None, False]
    assert "; logits: to be had with" in read["note"]
    assert SAFETENSORS in read["note"]
    assert NPY in read["note"]


async def test_safetensors_say_whose_they_are_and_of_what() -> None:
    one = found(NUMBERS, IDS, hidden(5))
    file, headers = await sent(SAFETENSORS, one)
    size = int.from_bytes(file[:8], "little")
    metadata = json.loads(file[8 : 8 + size])["__metadata__"]
    assert size % 8 == 0
    assert headers == {"Content-Type": SAFETENSORS, "ETag": '"1"', "Vary": "Accept"}
    assert json.loads(metadata.pop("facts")) == {"layer": 4, "mean": None}
    assert metadata == {
        "state_id": one.state.state_id,
        "version": "1",
        "model_id": "cacher-tiny",
        "fingerprint": "f" * 64,
        "numbers.layers": "[4]",
        "numbers.range": "[1, 3]",
        "ids.layers": "[]",
        "ids.range": "[0, 0]",
        "logits.layers": "[]",
        "logits.range": "[0, 0]",
    }
    assert (await sent(SAFETENSORS, one))[0] == file


async def test_many_facts_are_encoded_token_by_token_and_come_to_the_same() -> None:
    tokens = [
        TokenFacts(
            position=place,
            token_id=TokenId(place),
            text='"\N{BEAR FACE}\n',
            logprob=-1.5,
            surprisal=1.5,
            rank=0,
            entropy=2.0,
            top=(Likely(token_id=TokenId(7), text="a", bytes=(195,), logprob=-0.1),) * 20,
        )
        for place in range(200)
    ]
    facts = TokensFacts(start=0, end=200, tokens=tuple(tokens), perplexity=4.5)
    one = msgspec.structs.replace(found(), result=Result(facts=facts))
    whole = msgspec.json.encode(facts)
    pieces = list(nested.parts(one))
    assert max(map(len, pieces)) < len(whole) / 100
    assert json.loads(whole).items() <= as_json(one).items()
    size, parts = files.safetensors(one)
    file = b"".join(parts)
    assert len(file) == size
    assert json.loads(file[8:])["__metadata__"]["facts"] == whole.decode()


async def test_npy_says_in_a_header_what_it_holds() -> None:
    file, headers = await sent(NPY, found(NUMBERS))
    assert np.load(io.BytesIO(file)).tobytes() == NUMBERS.data
    assert file.index(b"\n") % 64 == 63
    assert json.loads(headers["X-Tensor"]) == {
        "name": "numbers",
        "shape": [2, 3],
        "dtype": "float32",
        "layers": [4],
        "range": [1, 3],
    }
    _, headers = await sent(NPY, found(hidden(2, "bfloat16")))
    assert "widened to float32" in json.loads(headers["X-Tensor"])["note"]


async def test_of_several_tensors_the_one_that_is_named_is_sent() -> None:
    one = found(NUMBERS, IDS)
    for name in ("numbers", "ids"):
        _, headers = await sent(NPY, one, tensor=name)
        assert json.loads(headers["X-Tensor"])["name"] == name
    for query in ({}, {"tensor": "other"}):
        with pytest.raises(InvalidInput, match="tensor: must be one of numbers, ids"):
            await sent(NPY, one, **query)


# not too much


def test_json_of_too_many_numbers_is_refused_with_the_forms_that_hold_more() -> None:
    wanted().check_extent(Extent(numbers=nested.MAX_NUMBERS))
    more = Extent(numbers=nested.MAX_NUMBERS + 1)
    with pytest.raises(ResultTooLarge, match="1000001 numbers in JSON") as refused:
        wanted().check_extent(more)
    assert SAFETENSORS in str(refused.value)
    for accept in (SAFETENSORS, NPY):
        wanted(accept).check_extent(more)


@pytest.mark.parametrize("accept", [NPY, SAFETENSORS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_large_file_is_sent_in_parts_that_make_up_what_was_announced(
    accept: str, dtype: Dtype
) -> None:
    tensor = hidden(1_200_001, dtype)
    file, headers = await sent(accept, found(tensor))
    assert int(headers["Content-Length"]) == len(file)
    if accept == NPY:
        assert np.load(io.BytesIO(file)).shape == tensor.shape
    else:
        assert bits_of(safetensors.torch.load(file)["logits"]) == tensor.data


async def test_what_is_held_of_a_large_answer_does_not_grow_with_it() -> None:
    one = found(hidden(1_000_000, inline=True))
    tracemalloc.start()
    try:
        response = await forms.represent(wanted(), one, {})
        assert isinstance(response, EventStream)
        size = 0
        async for chunk in response.iterator:  # type: ignore[union-attr]
            size += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 4_000_000
    assert peak < 5_000_000


async def test_only_so_many_large_answers_are_sent_at_once() -> None:
    places = Turns(1, "large answers are being sent")
    form = wanted(places=places)
    large, small = found(hidden(1_000_000, inline=True)), found(hidden(4))
    form.check_extent(Extent(numbers=1_000_000))
    first = await forms.represent(form, large, {})
    with pytest.raises(QueueFull, match="1 large answers are being sent"):
        await forms.represent(form, large, {})
    with pytest.raises(QueueFull, match="1 large answers are being sent"):
        form.check_extent(Extent(numbers=1_000_000))
    form.check_extent(Extent(numbers=4))
    assert not isinstance(await forms.represent(form, small, {}), EventStream)
    assert isinstance(first, EventStream)
    async for _ in first.iterator:  # type: ignore[union-attr]
        pass
    assert places.held == 0
    assert isinstance(await forms.represent(form, large, {}), EventStream)


# who gets which

OFFERED = (JSON, SAFETENSORS, NPY)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        (NPY, NPY),
        (NPY.upper(), NPY),
        (f"{NPY};q=0.5, {JSON};q=0.4", NPY),
        (f"{NPY};q=0.5, {JSON}", JSON),
        (f"{NPY}, */*", NPY),
        (f"{NPY}, */*;q=0.1", NPY),
        (f"*/*;q=0.8, {SAFETENSORS}", SAFETENSORS),
        (f"{JSON};q=0, */*", SAFETENSORS),
        (f"{JSON};q=0, application/*;q=0.1", SAFETENSORS),
        (f"{SAFETENSORS} ; charset=utf-8 ; Q=0.9 , {NPY}; q=0.8", SAFETENSORS),
        ("text/html, application/xhtml+xml, */*;q=0.8", JSON),
        (f"text/html,,{NPY};q=1.000", NPY),
        (f"nonsense, {NPY}", NPY),
        (f"{JSON};q=2, {NPY};q=0.1", NPY),
        ("text/*", None),
        ("*/json", None),
        (f"{JSON};q=0", None),
        ("*/*;q=0.000", None),
        ("nonsense", None),
        (",", None),
    ],
)
def test_the_form_a_client_wants_most_is_chosen(accept: str, expected: str | None) -> None:
    assert best(ranges(accept), OFFERED) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="latin-1"), max_size=12)
        | st.sampled_from(["*/*", "*", JSON, f"{NPY};q=0.5", "q=1", ";q=", '"', "a/b;q=\u00b2"])
    ).map(",".join)
)
def test_no_accept_header_makes_the_choice_fail(accept: str) -> None:
    assert best(ranges(accept), OFFERED) in (*OFFERED, None)


def test_what_nobody_accepts_is_refused_by_what_there_is() -> None:
    with pytest.raises(NotAcceptable, match=f"{JSON}, {SAFETENSORS}, {NPY}") as refused:
        wanted("text/html")
    assert refused.value.facts["available"] == list(OFFERED)
    with pytest.raises(NotAcceptable, match=f"had as {JSON}:"):
        wanted(NPY).check(found().result)
    wanted(f"{NPY}, {JSON};q=0.1").check(found().result)


def test_accept_may_be_sent_line_by_line() -> None:
    lines = request()
    lines.scope["headers"] = [(b"accept", b"text/html"), (b"accept", NPY.encode())]
    assert forms.wanted(Request(lines.scope), NextParameters(), Turns(1)).form() == NPY
