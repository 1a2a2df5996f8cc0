"""A verification as JUnit XML: one test case for each state, and one for the log as a whole."""

import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal
from xml.etree import ElementTree

from domain.ids import StateId
from domain.report import Divergence, Drift, Report

LOG: Final = "the log"
"""The test case of what belongs to no state."""

Kind = Literal["failure", "error", "skipped"]

Outcome = tuple[Kind, str, str]
"""What became of a test case that did not pass: its type, and a text of some lines."""

_NOT_XML: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, however they are written."""


def junit(report: Report, states: Sequence[tuple[StateId, bool]], *, allow_drift: bool) -> str:
    """What verifying found; ``states`` are those verified, and whether each is erased.

    A divergence is a failure. What could not be held to the bit is an error, or if it is allowed
    skipped, as is what was erased.
    """
    not_held: Kind = "skipped" if allow_drift else "error"
    outcomes: dict[str | None, Outcome | None] = {None: _of_log(report, not_held)}
    for state_id, erased in states:
        outcomes[state_id] = (
            ("skipped", "erased", "erased: nothing to hold it to") if erased else None
        )
    for place, drifts in _by_state(report.drifts).items():
        outcomes[place] = (not_held, "drift", "\n".join(map(in_words, drifts)))
    for place, divergences in _by_state(report.divergences).items():
        outcomes[place] = ("failure", "divergence", "\n".join(map(in_words, divergences)))
    kinds = [outcome[0] for outcome in outcomes.values() if outcome]
    counts = {
        "tests": str(len(outcomes)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
    }
    suites = ElementTree.Element("testsuites", {"name": "cacher verify", **counts})
    head = f"head {report.head['position']}:{report.head['hash']}"
    suite = ElementTree.SubElement(suites, "testsuite", {"name": head, **counts})
    for name, outcome in outcomes.items():
        names = {"classname": "cacher.verify", "name": _xml(name or LOG)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if outcome is not None:
            kind, type_, text = outcome
            message = {"message": _xml(text.partition("\n")[0]), "type": type_}
            ElementTree.SubElement(case, kind, message).text = _xml(text)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _of_log(report: Report, not_held: Kind) -> Outcome | None:
    if report.result != "unverified":
        return None
    text = "\n".join(report.notes) or f"{report.drifts_found} events drift"
    return (not_held, "unverified", text)


def _by_state(
    found: Iterable[Divergence] | Iterable[Drift],
) -> dict[str | None, list[Divergence | Drift]]:
    grouped: dict[str | None, list[Divergence | Drift]] = {}
    for one in found:
        grouped.setdefault(one.state_id, []).append(one)
    return grouped


def in_words(found: Divergence | Drift) -> str:
    """A divergence or a drift on a line, for people."""
    place = f"position {found.position}, state {found.state_id} version {found.version}"
    match found:
        case Divergence():
            token = "" if found.token_position is None else f" at token {found.token_position}"
            return (
                f"divergent: {place}, {found.field}{token}:"
                f" recorded {found.expected!r}, now {found.actual!r}"
                f"{_likeliest(found)}{_differences(found)}"
            )
        case Drift():
            return (
                f"drift: {place}: |delta logprob| up to {found.max_logprob_delta:.3g},"
                f" first changed token {found.first_changed};"
                f" fingerprints differ in {', '.join(found.differences)}"
            )


def _likeliest(found: Divergence) -> str:
    said = ", ".join(
        f"{one.text!r} (#{one.token_id}, {one.logprob:.4f})" for one in found.alternatives
    )
    return f"; likeliest now: {said}" if said else ""


def _differences(found: Divergence) -> str:
    return f"; fingerprints differ in {', '.join(found.differences)}" if found.differences else ""


def _xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
