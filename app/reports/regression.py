"""A regression as a table for the terminal, as JUnit XML, and as one page of HTML."""

import math
import re
from importlib import resources
from typing import Final
from xml.etree import ElementTree

from jinja2 import Environment, StrictUndefined
from msgspec import Struct, structs
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.reports import wording
from domain.regress import Place, Regression, StateRegression, Strip, Summary

LEVELS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""KL divergences (nats) from which on a token gets the next stronger colour."""

FIGURES: Final = ("tokens", "drawn", "likeliest", "KL mean", "KL p99", "KL max", "|Δ logprob|")

MOST_LINES: Final = 20
"""Lines of one kind below the table of the terminal."""

_BAR, _HEIGHT, _GAP = 7, 40, 7
"""Width of a place in a graph, height of the graph, and the gap between two strips (pixels)."""

_NOT_XML: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, however they are written."""


def _figures(found: Summary) -> tuple[str, ...]:
    """The cells under ``FIGURES``."""
    return (
        f"{found.tokens:,}",
        wording.percent(found.sampled_agreement),
        wording.percent(found.greedy_agreement),
        wording.divergence(found, found.kl_mean),
        wording.divergence(found, found.kl_p99),
        wording.divergence(found, found.kl_max),
        wording.short(found.max_logprob_delta),
    )


# the terminal


def table(regression: Regression) -> RenderableType:
    """One line for each state and one for all of them, then what is beyond its limit."""
    rows = Table(title=f"{regression.model} against {regression.before}", title_justify="left")
    rows.add_column("state", overflow="fold")
    for figure in FIGURES:
        rows.add_column(figure, justify="right")
    for state in regression.states:
        style = "red" if state.failures else "dim" if state.skipped else ""
        cells = ("skipped",) if state.summary is None else _figures(state.summary)
        rows.add_row(Text(state.state_id), *cells, style=style)
    if regression.overall is not None:
        rows.add_section()
        rows.add_row("all", *_figures(regression.overall), style="bold")
    changed = [
        f"changed: {state.state_id}, {first}"
        for state in regression.states
        if (first := wording.first_change(state))
    ]
    differs = [
        f"differs: {name}, was {was!r}, is {now!r}"
        for name, (was, now) in regression.differences.items()
    ]
    skipped = [
        f"skipped: {one.state_id}, {one.skipped}"
        for one in regression.states
        if wording.only_skipped(one)
    ]
    failed = [f"beyond its limit: {one}" for one in regression.failures]
    lines = [line for kind in (differs, skipped, changed, failed) for line in _some(kind)]
    left_out = sum(one.skipped is not None for one in regression.states)
    count = f"replayed {len(regression.states) - left_out} states, skipped {left_out}"
    return Group(rows, *map(Text, (count, *lines)))


def _some(lines: list[str]) -> list[str]:
    """The first of many lines."""
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"... and {more} more"] if more > 0 else [])]


# JUnit XML


def junit(regression: Regression) -> str:
    """One test case for each state, as continuous integration reads it."""
    states = regression.states
    counts = {
        "tests": str(len(states)),
        "failures": str(sum(bool(state.failures) for state in states)),
        "skipped": str(sum(wording.only_skipped(state) for state in states)),
    }
    suites = ElementTree.Element("testsuites", {"name": "cacher regress", **counts})
    name = f"{regression.model} against {regression.before}"
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _xml(name), **counts})
    facts = ElementTree.SubElement(suite, "properties")
    for fact in ("log", "before", "model", "fingerprint"):
        values = {"name": fact, "value": _xml(getattr(regression, fact))}
        ElementTree.SubElement(facts, "property", values)
    for state in states:
        _add_case(suite, state, regression.log)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ElementTree.Element, state: StateRegression, log: str) -> None:
    names = {"classname": _xml(f"cacher.{log}"), "name": _xml(state.state_id)}
    case = ElementTree.SubElement(suite, "testcase", names)
    if state.failures:
        message = {"message": _xml("; ".join(state.failures)), "type": "regression"}
        ElementTree.SubElement(case, "failure", message).text = _xml(wording.explain(state))
    elif state.skipped is not None:
        ElementTree.SubElement(case, "skipped", {"message": _xml(state.skipped)})
    else:
        ElementTree.SubElement(case, "system-out").text = _xml(wording.explain(state))


def _xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


# HTML


def html(regression: Regression) -> str:
    """One page that needs nothing else: no script, no other file, light and dark."""
    page = resources.files("app.reports").joinpath("regression.html").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(page).render(
        regression=regression,
        figures=FIGURES,
        overall=None if regression.overall is None else _figures(regression.overall),
        first=_first(regression),
        limits=[
            (name.replace("_", " "), value)
            for name, value in structs.asdict(regression.limits).items()
            if value is not None
        ],
        levels=[wording.short(level) for level in LEVELS],
        states=[_state(state) for state in regression.states],
        failed=sum(bool(state.failures) for state in regression.states),
        skipped=sum(wording.only_skipped(state) for state in regression.states),
    )


def _first(regression: Regression) -> str | None:
    """The first choice of the whole log that changed."""
    first = None if regression.overall is None else regression.overall.first_changed
    for state in regression.states:
        if first is not None and state.summary is not None and state.summary.first_changed == first:
            return f"state {state.state_id}, {wording.first_change(state)}"
    return None


class _Token(Struct, frozen=True, kw_only=True):
    """A token of a strip as the page shows it; ``now`` is what took its place."""

    text: str
    level: int
    now: str | None
    worst: bool
    title: str


class _Bar(Struct, frozen=True, kw_only=True):
    """A place of a graph (pixels)."""

    x: int
    y: int
    height: int
    level: int
    changed: bool
    title: str


class _Likely(Struct, frozen=True, kw_only=True):
    """One of the likeliest tokens now: its share, and whether it is the one that was recorded."""

    text: str
    share: str
    recorded: bool


class _Strip(Struct, frozen=True, kw_only=True):
    where: str
    change: str | None
    kl: str
    logprobs: str
    tokens: tuple[_Token, ...]
    likely: tuple[_Likely, ...]


class _State(Struct, frozen=True, kw_only=True):
    state: StateRegression
    status: str
    figures: tuple[str, ...] | None
    first: str | None
    strips: tuple[_Strip, ...]
    bars: tuple[_Bar, ...]
    width: int


def _state(state: StateRegression) -> _State:
    bars = _bars(state)
    first = wording.first_change(state)
    status = "beyond" if state.failures else "skipped" if state.skipped else "within"
    return _State(
        state=state,
        status="changed" if first and status == "within" else status,
        figures=None if state.summary is None else _figures(state.summary),
        first=first,
        strips=tuple(map(_strip, state.worst)),
        bars=bars,
        width=bars[-1].x + _BAR if bars else 0,
    )


def _strip(strip: Strip) -> _Strip:
    worst = strip.places[strip.worst]
    was, now = worst.logprobs
    return _Strip(
        where=wording.where(worst),
        change=wording.change(worst).partition(": ")[2] if worst.changed else None,
        kl=_kl(worst),
        logprobs=f"{was:.4f} → {now:.4f}",
        tokens=tuple(_token(one, at == strip.worst) for at, one in enumerate(strip.places)),
        likely=tuple(
            _Likely(
                text=visible(one.text) or f"#{one.token_id}",
                share=f"{math.exp(one.logprob):.1%}",
                recorded=one.token_id == worst.token_id,
            )
            for one in worst.alternatives
        ),
    )


def _token(place: Place, worst: bool) -> _Token:
    changed = wording.choices(place)
    return _Token(
        text=visible(place.text) or f"#{place.token_id}",
        level=level(place.kl),
        now=_now(place) if changed else None,
        worst=worst,
        title=f"{wording.change(place)}; KL {_kl(place)}",
    )


def _now(place: Place) -> str:
    """What is chosen now in place of the token: the one drawn, or else the likeliest one."""
    _, _, now = wording.choices(place)[0]
    texts = {one.token_id: one.text for one in place.alternatives}
    return visible(texts.get(now, "")) or f"#{now}"


def _bars(state: StateRegression) -> tuple[_Bar, ...]:
    """KL of each place that is shown, strip after strip, on a scale of powers of ten."""
    bars, x = [], 0
    for strip in state.worst:
        for place in strip.places:
            height = max(1, round(_HEIGHT * _share(place.kl)))
            bars.append(
                _Bar(
                    x=x,
                    y=_HEIGHT - height,
                    height=height,
                    level=level(place.kl),
                    changed=place.changed,
                    title=f"{wording.where(place)}: KL {_kl(place)}",
                )
            )
            x += _BAR
        x += _GAP
    return tuple(bars)


def _share(kl: float) -> float:
    """Where a divergence lies between the lowest level (0) and ten nats (1)."""
    lowest = math.log10(LEVELS[0]) - 1
    return min(1.0, max(0.0, (math.log10(kl) - lowest) / (1 - lowest))) if kl > 0 else 0.0


def _kl(place: Place) -> str:
    return ("" if place.kl_exact else "≥ ") + wording.short(place.kl)


def level(kl: float) -> int:
    """How many of ``LEVELS`` a divergence reaches."""
    return sum(kl >= one for one in LEVELS)


def visible(text: str) -> str:
    """A token's text on one line, with line breaks and control characters to be seen."""
    shown = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(chr(0x2400 + ord(one)) if ord(one) < 32 else one for one in shown)
