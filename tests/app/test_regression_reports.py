"""Reports of a regression: they say what it says, and nothing in a text can break them."""

import io
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any, Final
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from app.reports import regression as reports
from app.reports import wording
from domain.content import Alternative
from domain.ids import Position, StateId, TokenId, Version
from domain.regress import Limits, Place, Regression, StateRegression, Strip, Summary

HOSTILE: Final = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "{{ 7 * 7 }}",
    "]]></failure>",
    "[bold red]&amp;[/]",
    "\x00\x1b[31m\ud7ff",
)
VOID: Final = {"meta", "input"}


def place(at: int, text: str = " bear", *, kl: float = 0.0, now: int | None = None) -> Place:
    """A token; ``now`` is the token that is drawn in its place now."""
    token = TokenId(100 + at)
    drawn = token if now is None else TokenId(now)
    likely = [(token, text), (TokenId(7), " mouse"), (TokenId(8), "\n")]
    return Place(
        position=Position(5),
        version=Version(3),
        run="",
        token_position=at,
        token_id=token,
        text=text,
        sampled=(token, drawn),
        greedy=(None, drawn),
        logprobs=(-0.5, -0.75),
        kl=kl,
        kl_exact=False,
        alternatives=tuple(
            Alternative(token_id=one, text=said, logprob=-0.5 - n)
            for n, (one, said) in enumerate(likely)
        ),
    )


def summary(**fields: Any) -> Summary:
    given: dict[str, Any] = {
        "tokens": 17,
        "sampled": 17,
        "greedy": 0,
        "sampled_agreement": 1.0,
        "greedy_agreement": None,
        "first_changed": None,
        "kl_mean": 0.0,
        "kl_p99": 0.0,
        "kl_max": 0.0,
        "kl_exact": True,
        "max_logprob_delta": 0.0,
    }
    return Summary(**(given | fields))


def state(name: str = "state-1", **fields: Any) -> StateRegression:
    given: dict[str, Any] = {"summary": summary(), "worst": (), "failures": ()}
    return StateRegression(state_id=StateId(name), **(given | fields))


def changed_state(name: str = "state-changed", text: str = " bear") -> StateRegression:
    """A state that is beyond a limit, with one changed choice among 17 places."""
    places = [place(at, text, kl=10.0 ** -(at + 1)) for at in range(17)]
    places[8] = place(8, text, kl=0.5, now=7)
    return state(
        name,
        summary=summary(
            sampled_agreement=16 / 17, first_changed=places[8], kl_max=0.5, kl_exact=False
        ),
        worst=(Strip(places=tuple(places), worst=8),),
        failures=("sampled agreement 0.94 is below 1.0",),
    )


def regression(*states: StateRegression, **fields: Any) -> Regression:
    given: dict[str, Any] = {
        "log": "0123456789abcdef",
        "before": "the log",
        "model": "cacher-tiny",
        "fingerprint": "ab" * 32,
        "differences": {"dtype": ("float32", "bfloat16")},
        "limits": Limits(),
        "overall": summary(),
        "failures": tuple(f"state {s.state_id}: {one}" for s in states for one in s.failures),
    }
    return Regression(states=states, **(given | fields))


SKIPPED: Final = state("state-skipped", summary=None, skipped="its model cannot be had")
MIXED: Final = regression(state("state-fine"), changed_state(), SKIPPED)


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes, and text by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.unclosed: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.unclosed[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def shown(found: Regression) -> str:
    """The table as a terminal shows it."""
    console = Console(file=io.StringIO(), width=200)
    console.print(reports.table(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# HTML


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    text = reports.html(MIXED)
    page = Page(text)
    assert page.unclosed == []
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert {name for _, attributes in page.elements for name in attributes} & {"src"} == set()
    (policy,) = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_log_is_markup(text: str) -> None:
    plain = Counter(tag for tag, _ in Page(reports.html(every_text(" bear"))).elements)
    page = Page(reports.html(every_text(text)))
    assert Counter(tag for tag, _ in page.elements) == plain
    assert not [name for _, one in page.elements for name in one if name.startswith("on")]
    assert "49" not in page.text.replace("0.449", "")


def every_text(text: str) -> Regression:
    """The same text in every place where a log, a model or a machine has a say."""
    return regression(
        changed_state(text, text),
        state("state-skipped", summary=None, skipped=text),
        model=text,
        before=text,
        log=text,
        fingerprint=text,
        differences={text: (text, [text])},
    )


def test_the_page_shows_every_state_and_every_link_leads_somewhere() -> None:
    found = regression(*(state(f"state-{n}") for n in range(5)), changed_state(), SKIPPED)
    page = Page(reports.html(found))
    assert all(str(one.state_id) in page.text for one in found.states)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in page.of("a") if "href" in link]
    assert len(links) == len(found.states)
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_a_strip_shows_its_text_in_order_with_what_changed() -> None:
    text = reports.html(MIXED)
    assert len(re.findall(r'class="k\d(?: worst)?" title=', text)) == 17
    (ruby,) = re.findall(r"<ruby[^>]*>(.*?)</ruby>", text)
    assert ruby == " bear<rt> mouse</rt>"
    page = Page(text)
    assert "drawn was ' bear' (#108), is ' mouse' (#7)" in page.text
    assert "sampled agreement 0.94 is below 1.0" in page.text
    assert "its model cannot be had" in page.text


def test_the_graph_has_a_bar_for_each_place_and_a_dot_for_each_changed_one() -> None:
    page = Page(reports.html(MIXED))
    bars = page.of("rect")
    assert len(bars) == 17
    assert len(page.of("circle")) == 1
    heights = [int(bar["height"]) for bar in bars]
    assert max(heights) == heights[0] or heights[8] == max(heights)
    assert heights[0] > heights[3] > heights[6]


def test_a_clean_regression_says_so() -> None:
    page = Page(reports.html(regression(state())))
    assert "No state is beyond its limits" in page.text
    assert "100%" in page.text
    assert page.of("section") == []


def test_a_page_of_500_states_stays_small_enough_to_open() -> None:
    states = [changed_state(f"state-{n:032x}") for n in range(500)]
    assert len(reports.html(regression(*states))) < 5_000_000


@given(st.floats(0, 50), st.floats(0, 50))
def test_a_larger_divergence_never_looks_smaller(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= reports.level(low) <= reports.level(high) <= len(reports.LEVELS)


# JUnit XML


def test_junit_has_a_case_for_each_state() -> None:
    suites = ElementTree.fromstring(reports.junit(MIXED))
    assert {name: suites.attrib[name] for name in ("tests", "failures", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
    }
    cases = {case.attrib["name"]: case for case in suites.iter("testcase")}
    assert list(cases) == ["state-fine", "state-changed", "state-skipped"]
    assert cases["state-fine"].find("failure") is None
    failure = cases["state-changed"].find("failure")
    assert failure is not None
    assert failure.attrib["message"] == "sampled agreement 0.94 is below 1.0"
    assert "first change: version 3, token 8: drawn was ' bear' (#108)" in (failure.text or "")
    assert "max ≥ 0.5" in (failure.text or "")
    skipped = cases["state-skipped"].find("skipped")
    assert skipped is not None
    assert skipped.attrib["message"] == "its model cannot be had"


@settings(max_examples=50, deadline=None)
@given(st.text() | st.sampled_from(HOSTILE))
def test_junit_can_be_read_whatever_the_texts_hold(text: str) -> None:
    suites = ElementTree.fromstring(reports.junit(every_text(text)))
    assert len(list(suites.iter("testcase"))) == 2


# the terminal


def test_the_table_has_a_line_for_each_state_and_says_what_is_beyond() -> None:
    text = shown(MIXED)
    for name in ("state-fine", "state-changed", "state-skipped", "all"):
        assert re.search(rf"│ {name}\s", text)
    assert "94.12%" in text
    assert "beyond its limit: state state-changed: sampled agreement 0.94 is below 1.0" in text
    assert "skipped: state-skipped, its model cannot be had" in text
    assert "changed: state-changed, version 3, token 8: drawn was ' bear' (#108)" in text
    assert "differs: dtype, was 'float32', is 'bfloat16'" in text


def test_the_table_takes_no_text_for_its_own_markup() -> None:
    assert "[bold red]&amp;[/]" in shown(every_text("[bold red]&amp;[/]"))


def test_below_the_table_there_are_few_lines_of_a_kind() -> None:
    text = shown(regression(*(changed_state(f"state-{n:02d}") for n in range(50))))
    assert text.count("changed: state-") == text.count("beyond its limit: ") == 20
    assert text.count("... and 30 more") == 2


# words and numbers


@pytest.mark.parametrize(
    ("rate", "text"),
    [(None, "-"), (1.0, "100%"), (0.999999, "99.99%"), (0.5, "50.00%"), (1e-9, "0.01%"), (0, "0%")],
)
def test_only_what_is_whole_is_said_to_be(rate: float | None, text: str) -> None:
    assert wording.percent(rate) == text


def test_a_lower_bound_is_marked_as_one() -> None:
    assert wording.divergence(summary(kl_exact=False), 0.123456) == "≥ 0.123"
    assert wording.divergence(summary(), 0.123456) == "0.123"


def test_what_changed_in_two_ways_is_said_once() -> None:
    both = place(1, now=7)
    assert wording.change(both) == "version 3, token 1: drawn was ' bear' (#101), is ' mouse' (#7)"
    alike = [("drawn", TokenId(101), TokenId(7)), ("likeliest", TokenId(101), TokenId(7))]
    from msgspec.structs import replace

    both = replace(both, greedy=(TokenId(101), TokenId(7)))
    assert wording.choices(both) == alike
    assert wording.change(both).endswith("drawn and likeliest was ' bear' (#101), is ' mouse' (#7)")
    assert wording.change(place(1)) == "version 3, token 1: the same choice"
