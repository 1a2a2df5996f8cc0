"""Analyses leave with their log or their state, and what cannot be one is refused."""

from typing import Any

import msgspec
import pytest

from domain.analysis.parameters import CompareParameters
from domain.chain import Row, row_hash
from domain.errors import BrokenExport
from domain.events import Event, StateAnalyzed, StateDeleted
from domain.ids import Version
from domain.reading import Reading
from tests.builders import analyzed, created, forwarded, state_id
from tests.domain.exporting import chained, ended, lines_of_log, lines_of_states, read


def compared(number: int, version: int) -> StateAnalyzed:
    """A state that was held against one of this number."""
    return analyzed(
        parameters=CompareParameters(
            other_state_id=state_id(number), other_version=Version(version)
        )
    )


def looked() -> list[Row]:
    """Positions 2 and 4 are analyses of state 0 at versions 1 and 2."""
    return chained((0, created()), (0, analyzed()), (0, forwarded(3)), (0, compared(0, 1)))


def seeing(version: int, *happened: tuple[int, Event]) -> list[Row]:
    """Rows whose last one, an analysis, says that it saw another version."""
    *rows, last = chained(*happened)
    changed = msgspec.structs.replace(last, at_version=Version(version))
    return [*rows, msgspec.structs.replace(changed, hash=row_hash(changed))]


def refused(lines: list[bytes], match: str) -> None:
    with pytest.raises(BrokenExport, match=match):
        read(lines)


def test_a_log_comes_back_with_its_analyses() -> None:
    rows = looked()
    reading = Reading(ended(lines_of_log(rows, {})))
    assert [one.row for one in reading.events()] == rows
    assert reading.versions == {state_id(): 2}


def test_a_state_comes_with_its_analyses_or_without() -> None:
    rows = looked()
    for held in ((1, 2, 3, 4), (1, 3), (1, 2, 3), (1, 3, 4)):
        found = read(ended(lines_of_states(rows, {0: 2}, held, {})))
        assert [one.row for one in found] == [one for one in rows if one.position in held]


def test_an_analysis_of_what_was_not_there_is_refused() -> None:
    message = "it saw version 2, the state is at 1"
    rows = seeing(2, (0, created()), (0, analyzed()))
    refused(ended(lines_of_log(rows, {})), message)
    refused(ended(lines_of_states(rows, {0: 1}, (1, 2), {})), message)
    refused(ended(lines_of_log(chained((0, analyzed())), {})), "at_version is 0, not from 1 on")


def test_an_analysis_after_the_end_is_refused() -> None:
    rows = chained((0, created()), (0, StateDeleted()), (0, analyzed()))
    refused(ended(lines_of_log(rows, {})), "the state is at 2 and has ended")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"version": Version(2)}, "version is 2, not none beside at_version"),
        ({"version": Version(2), "at_version": None}, "at_version is None, not from 1 on"),
    ],
)
def test_an_analysis_with_a_version_is_refused(columns: dict[str, Any], message: str) -> None:
    first, last = chained((0, created()), (0, analyzed()))
    wrong = msgspec.structs.replace(last, **columns)
    wrong = msgspec.structs.replace(wrong, hash=row_hash(wrong))
    refused(ended(lines_of_log([first, wrong], {})), message)


def test_of_a_state_alone_what_compares_with_others_is_refused() -> None:
    rows = chained((1, created()), (0, created()), (0, compared(1, 1)))
    assert len(read(ended(lines_of_log(rows, {})))) == 3
    message = "it compares with what is not in the file"
    refused(ended(lines_of_states(rows, {0: 1}, (2, 3), {})), message)
    rows = chained((0, created()), (0, compared(0, 2)))
    refused(ended(lines_of_states(rows, {0: 1}, (1, 2), {})), message)
