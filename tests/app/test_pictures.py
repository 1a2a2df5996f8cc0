"""Figures of findings: readable, the same bytes every time, bounded, and never a must."""

import asyncio
import math
import random
import struct
import subprocess
import sys
import threading
import warnings
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.font_manager import findfont, get_font

from app import pictures
from app.operations.analysis.analyze import Analyzed
from app.pictures import sheet
from app.representations import forms
from app.representations.negotiation import NotAcceptable, ranges
from app.turns import Turns
from domain.analysis.attention import AttentionFacts
from domain.analysis.extent import Extent
from domain.analysis.lens import LensFacts, Reading
from domain.analysis.parameters import (
    AttentionParameters,
    LensParameters,
    NextParameters,
    Parameters,
    TokensParameters,
)
from domain.analysis.result import Result, Tensor
from domain.analysis.tokens import Likely, TokenFacts, TokensFacts
from domain.errors import QueueFull, ResultTooLarge
from domain.ids import TokenId
from tests.builders import created, live

PNG, SVG = pictures.MEDIA_TYPES
NASTY = (
    " a",
    "\n",
    "\t\t",
    "",
    "$x^2$",
    "<b>&'\"",
    "-->",
    "한국",
    "\x00\x7f",
    "e\u0301",
    "\u202e",
    "😀",
)
"""Tokens that a careless figure trips over."""


def found(question: Parameters, result: Result) -> Analyzed:
    return Analyzed(live(created("abc")), question, result, "f" * 64)


def attention_facts(tokens: tuple[str, ...], **fields: Any) -> AttentionFacts:
    given: dict[str, Any] = {
        "method": "weights",
        "format": "dense",
        "layer": 0,
        "layers": None,
        "head": None,
        "heads": None,
        "start": 0,
        "end": len(tokens),
        "threshold": 0.0,
        "top_k": None,
        "token_ids": tuple(TokenId(place) for place in range(len(tokens))),
        "tokens": tokens,
    }
    return AttentionFacts(**(given | fields))


def floats(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    chance = random.Random(seed)
    count = math.prod(shape)
    data = struct.pack(f"<{count}f", *(chance.random() for _ in range(count)))
    return Tensor(name=name, shape=shape, dtype="float32", data=data)


def weights(tokens: tuple[str, ...] = NASTY, seed: int = 0, **fields: Any) -> Analyzed:
    facts = attention_facts(tokens, **fields)
    several = [len(each) for each in (facts.layers, facts.heads) if each is not None]
    shape = (*several, facts.end - facts.start, facts.end)
    result = Result(facts=facts, tensors=(floats("attention_pattern", shape, seed),))
    return found(AttentionParameters(layer=0), result)


def named(count: int, **fields: Any) -> Analyzed:
    """What is asked of so many tokens, without the weights."""
    return found(
        AttentionParameters(layer=0), Result(facts=attention_facts(("a",) * count, **fields))
    )


def summary() -> Analyzed:
    facts = attention_facts(NASTY, method="summary", layer=None, layers=(0, 3), heads=(0, 1, 2))
    names = ("entropy", "distance", "first_token")
    tensors = tuple(floats(name, (2, 3), seed) for seed, name in enumerate(names))
    return found(AttentionParameters(method="summary"), Result(facts=facts, tensors=tensors))


def surprisals(texts: tuple[str, ...] = NASTY, seed: int = 0) -> Analyzed:
    chance = random.Random(seed)
    tokens = tuple(
        TokenFacts(
            position=place,
            token_id=TokenId(place),
            text=text,
            logprob=None,
            surprisal=chance.random() * 9 if place else None,
            rank=None,
            entropy=None,
        )
        for place, text in enumerate(texts)
    )
    facts = TokensFacts(start=0, end=len(texts), tokens=tokens, perplexity=3.25)
    return found(TokensParameters(), Result(facts=facts))


def readings(texts: tuple[str, ...] = NASTY, layers: int = 3, seed: int = 0) -> Analyzed:
    chance = random.Random(seed)

    def reading(place: int) -> Reading:
        likeliest = Likely(
            token_id=TokenId(place), text=texts[place], logprob=math.log(chance.random())
        )
        return Reading(position=place, top=(likeliest,), entropy=1.0, logprob=None, rank=None)

    facts = LensFacts(
        start=0,
        end=len(texts),
        token_ids=tuple(TokenId(place) for place in range(len(texts))),
        tokens=texts,
        layers=tuple(range(layers)),
        readings=tuple(tuple(map(reading, range(len(texts)))) for _ in range(layers)),
    )
    return found(LensParameters(), Result(facts=facts))


DRAWN = {
    "attention": weights(layers=(0, 1), heads=(5,), layer=None),
    "rollout": weights(method="rollout", start=3),
    "summary": summary(),
    "tokens": surprisals(),
    "lens": readings(),
}


def extent(one: Analyzed) -> Extent:
    """How much a finding tells."""
    facts = one.result.facts
    match facts:
        case AttentionFacts(method="summary"):
            return Extent()
        case AttentionFacts() | LensFacts() | TokensFacts():
            layers, heads = (getattr(facts, name, None) for name in ("layers", "heads"))
            return Extent(
                positions=range(facts.start, facts.end),
                layers=1 if layers is None else len(layers),
                heads=1 if heads is None else len(heads),
            )
    raise AssertionError(facts)


async def draw(one: Analyzed, media_type: str = SVG) -> bytes:
    """The figure of a finding that fits; a warning is a failure."""
    pictures.check(one.parameters, extent(one))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return await pictures.draw(one, media_type)


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">2I", png[16:24])
    return width, height


def points(svg: bytes) -> list[float]:
    """Width and height of an SVG, in points of which an inch has 72."""
    root = ElementTree.fromstring(svg)
    return [float(root.attrib[side].removesuffix("pt")) for side in ("width", "height")]


def comments(svg: bytes) -> list[str]:
    """What the letters of an SVG, which are paths, say."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser)
    assert root.tag.endswith("svg")
    return [str(one.text).strip() for one in root.iter(ElementTree.Comment)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def svgs() -> dict[str, bytes]:
    """Each of the figures as SVG."""
    return {name: asyncio.run(draw(one)) for name, one in DRAWN.items()}


@pytest.mark.parametrize("name", DRAWN)
async def test_a_figure_is_the_same_bytes_every_time(name: str, svgs: dict[str, bytes]) -> None:
    assert await draw(DRAWN[name]) == svgs[name]


@pytest.mark.parametrize("name", ["attention", "tokens"])
async def test_a_png_is_the_same_bytes_every_time_and_as_large_as_the_svg(
    name: str, svgs: dict[str, bytes]
) -> None:
    png = await draw(DRAWN[name], PNG)
    assert await draw(DRAWN[name], PNG) == png
    assert size_of(png) == pytest.approx([side * 150 / 72 for side in points(svgs[name])], rel=0.02)


def test_figures_are_neither_tiny_nor_huge(svgs: dict[str, bytes]) -> None:
    for svg in svgs.values():
        assert all(50 < side < 1500 for side in points(svg))


@pytest.mark.parametrize("make", [weights, surprisals, readings])
async def test_a_figure_shows_what_was_found(make: Any) -> None:
    texts = (" a", " b")
    assert await draw(make(texts, seed=1)) != await draw(make(texts, seed=2))


@pytest.mark.parametrize("name", ["attention", "tokens", "lens"])
def test_a_figure_names_the_tokens(name: str, svgs: dict[str, bytes]) -> None:
    assert {"␣a", "⏎", "⇥⇥", "∅", "$x^2$", "□□"} <= set(comments(svgs[name]))


def test_a_figure_says_what_it_shows_and_of_which_state(svgs: dict[str, bytes]) -> None:
    said = {name: set(comments(svg)) for name, svg in svgs.items()}
    for name, one in DRAWN.items():
        assert f"cacher-tiny, {one.state.state_id}, version 1" in said[name]
    assert {"Attention", "layer 0, head 5", "layer 1, head 5", "query", "key"} <= said["attention"]
    assert "Attention rollout up to layer 0" in said["rollout"]
    assert "Attention of each head, mean over tokens 0 to 11" in said["summary"]
    assert "Surprisal, tokens 0 to 11, perplexity 3.25" in said["tokens"]
    assert {"embedding", "layer 2", "probability"} <= said["lens"]


async def test_sparse_rows_look_like_the_dense_ones_that_they_are_of() -> None:
    dense = weights()
    (tensor,) = dense.result.tensors
    width = len(NASTY)
    rows = [list(row) for row in struct.iter_unpack(f"<{width}f", tensor.data)]
    order = [sorted(range(width), key=lambda place, row=row: -row[place]) for row in rows]
    values = [row[place] for row, places in zip(rows, order, strict=True) for place in places]
    indices = [place for places in order for place in places]
    sparse = Result(
        facts=msgspec.structs.replace(dense.result.facts, format="sparse", top_k=width),
        tensors=(
            Tensor(
                name="indices",
                shape=tensor.shape,
                dtype="int64",
                data=struct.pack(f"<{len(indices)}q", *indices),
            ),
            Tensor(
                name="values",
                shape=tensor.shape,
                dtype="float32",
                data=struct.pack(f"<{len(values)}f", *values),
            ),
        ),
    )
    assert await draw(found(dense.parameters, sparse)) == await draw(dense)


async def test_a_map_says_what_it_leaves_out() -> None:
    said = comments(await draw(weights(threshold=0.25)))
    assert any(each.endswith("weights from 0.25 on") for each in said)
    assert "weight (by its square root)" in said


async def test_where_tokens_do_not_fit_their_positions_are_numbered() -> None:
    tokens = tuple(f"token{place}" for place in range(600))
    said = comments(await draw(weights(tokens, start=590)))
    assert {"token595", "0", "100"} <= set(said)
    assert "token0" not in said


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_a_label_is_short_visible_and_made_of_what_the_font_has(text: str) -> None:
    for font in (sheet.SANS, sheet.MONO):
        label = sheet.label(text, font)
        assert 1 <= len(label) <= 14
        assert not set(label) & set(" \n\t")
        assert label.isprintable()
        assert set(map(ord, label)) <= set(get_font(findfont(font)).get_charmap())


# not too much


@pytest.mark.parametrize(
    ("large", "unit"),
    [
        (named(1025, start=1024), "1025 tokens along a map"),
        (named(1, layers=tuple(range(65)), layer=None), "65 maps"),
        (named(1000, start=100, heads=(1, 2, 3)), "2700000 weights"),
        (surprisals(("a",) * 513), "513 tokens"),
        (readings(("a",) * 49), "49 positions"),
        (readings(("a",) * 40, layers=52), "2080 readings"),
    ],
    ids=["tokens", "maps", "weights", "surprisals", "positions", "readings"],
)
def test_more_than_a_figure_holds_is_refused_with_the_way_to_ask_for_less(
    large: Analyzed, unit: str
) -> None:
    with pytest.raises(ResultTooLarge, match=f"would take {unit}") as refused:
        pictures.check(large.parameters, extent(large))
    assert str(refused.value).split(". ")[1].startswith(("Name", "Ask"))


@pytest.mark.parametrize(
    "largest",
    [
        weights(("a",), layers=tuple(range(64)), layer=None, heads=(0,)),
        weights(("a",) * 1024, start=1023),
    ],
    ids=["maps", "tokens"],
)
async def test_the_largest_figures_have_a_bounded_number_of_pixels(largest: Analyzed) -> None:
    width, height = size_of(await draw(largest, PNG))
    assert width * height < 12_000_000
    assert max(width, height) < 1 << 15


async def test_only_so_many_pictures_are_drawn_or_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, enough = threading.Event(), threading.Event()

    def paint(_: Analyzed, media_type: str) -> bytes:
        begun.set()
        assert enough.wait(60)
        return media_type.encode()

    monkeypatch.setattr(pictures.tokens, "draw", paint)
    places = Turns(2, "large answers are being drawn or sent")

    async def ask(accept: str = SVG) -> Any:
        one = surprisals()
        return await forms.represent(wanted(accept, one.parameters, places), one, {})

    asked = [asyncio.ensure_future(ask()) for _ in range(2)]
    await asyncio.to_thread(begun.wait, 60)
    assert places.held == 2
    with pytest.raises(QueueFull, match="2 large answers are being drawn or sent"):
        await ask()
    assert (await ask(forms.JSON)).media_type == forms.JSON
    enough.set()
    assert [(await one).content for one in asked] == [SVG.encode()] * 2
    assert places.held == 0
    assert (await ask()).content == SVG.encode()


# not a must


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def wanted(accept: str, question: Parameters, places: Turns | None = None) -> forms.Wanted:
    return forms.Wanted(question, ranges(accept), None, places or Turns(1))


QUESTIONS: list[Parameters] = [AttentionParameters(), LensParameters(), TokensParameters()]


@pytest.mark.parametrize("question", QUESTIONS)
def test_pictures_are_offered_of_what_can_be_drawn(question: Parameters) -> None:
    assert wanted("image/*", question).form() == PNG
    assert wanted(f"image/*;q=0.5, {SVG}", question).form() == SVG
    assert wanted("*/*", question).form() == forms.JSON


def test_what_has_no_picture_says_what_it_has() -> None:
    with pytest.raises(NotAcceptable) as refused:
        wanted(PNG, NextParameters()).form()
    assert refused.value.facts["available"] == [forms.JSON, forms.SAFETENSORS, forms.NPY]
    assert "pip" not in str(refused.value)


@pytest.mark.usefixtures("without_matplotlib")
@pytest.mark.parametrize("question", QUESTIONS)
def test_without_matplotlib_a_client_is_told_how_pictures_are_had(question: Parameters) -> None:
    with pytest.raises(NotAcceptable, match=r"pip install cacher-api3\[pictures\]") as refused:
        wanted("image/*", question).form()
    assert PNG not in refused.value.facts["available"]
    assert wanted(f"{PNG}, {forms.JSON};q=0.1", question).form() == forms.JSON
    with pytest.raises(NotAcceptable) as other:
        wanted("text/html", question).form()
    assert "pip" not in str(other.value)


def test_a_server_starts_without_loading_matplotlib() -> None:
    code = "import sys, app.main; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
