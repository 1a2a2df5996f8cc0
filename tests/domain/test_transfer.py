"""What an export proves of itself, and what it is refused for; where an imported event is from."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.chain import Row, row_hash
from domain.errors import BrokenExport, ExportTooNew, TooLarge
from domain.events import SCHEMA, Recorded, StateErased, decode
from domain.export import FORMAT, EventLine, FingerprintLine, Line, StateAt
from domain.ids import Position, StateId, Version
from domain.log_errors import UnknownEvent
from domain.merkle import to_note
from domain.packing import GZIP_BEGIN, LONGEST_LINE, Packer, unpacked_lines
from domain.reading import Reading
from domain.state import Live, fold
from domain.transfer import (
    happened_at,
    identity,
    original_row,
    source_in,
    source_of,
    stored,
)
from tests.builders import created, forwarded, histories, state_id
from tests.domain.exporting import (
    BLOBS,
    FINGERPRINT,
    LOG_ID,
    a_log,
    chained,
    checkpoint,
    ended,
    forked,
    inclusion,
    lines_of_log,
    lines_of_states,
    read,
)

ASKED = {1: 2}
HELD = (1, 2, 4, 6)
"""State 1 at its version 2, and what it comes from: state 0 up to version 2."""

WHOLE = lines_of_log(a_log())
STATES = lines_of_states(a_log(), ASKED, HELD)
KINDS = pytest.mark.parametrize("lines", [WHOLE, STATES], ids=["log", "state"])


def refused(lines: Sequence[bytes], match: str = ".") -> None:
    """An export that is read as far as it proves itself, and then refused."""
    with pytest.raises(BrokenExport, match=match):
        read(lines)


def replaced(lines: Sequence[Line], index: int, **fields: Any) -> list[Line]:
    """The lines with one of them changed."""
    changed = msgspec.structs.replace(lines[index], **fields)
    return [*lines[:index], changed, *lines[index + 1 :]]


def hashed_anew(line: EventLine) -> EventLine:
    """The line of an event whose hash is that of its columns."""
    return msgspec.structs.replace(line, hash=row_hash(line.row()).hex())


def place(lines: Sequence[Line], kind: type[Line], number: int = 0) -> int:
    """Where the n-th line of a kind is."""
    return [index for index, line in enumerate(lines) if isinstance(line, kind)][number]


# what is sound


def test_a_whole_log_comes_back_as_it_was() -> None:
    rows = a_log()
    found = read(ended(WHOLE))
    assert [one.row for one in found] == rows
    assert [one.recorded for one in found] == [decode(row) for row in rows]
    assert {one.fingerprint for one in found} == {FINGERPRINT}
    assert [one.logits for one in found] == [(), (), (), (), (), BLOBS]


def test_states_come_with_what_they_come_from_and_nothing_else() -> None:
    reading = Reading(ended(STATES))
    found = list(reading.events())
    assert [one.row for one in found] == [row for row in a_log() if row.position in HELD]
    assert reading.versions == {state_id(0): 2, state_id(1): 2}
    assert reading.header.states == (StateAt(state_id=state_id(1), version=Version(2)),)
    assert found[-1].logits == BLOBS


def test_an_empty_log_can_leave_too() -> None:
    assert read(ended(lines_of_log([]))) == []


@given(histories())
@settings(max_examples=40)
def test_every_history_comes_back_both_ways(history: list[Recorded]) -> None:
    rows = chained(*((0, one.event) for one in history))
    whole = ended(lines_of_log(rows, {}))
    states = ended(lines_of_states(rows, {0: len(rows)}, range(1, len(rows) + 1), {}))
    for lines in (whole, states):
        assert [one.row for one in read(lines)] == rows


def test_a_log_longer_than_a_tile_leads_to_its_root_and_to_those_before() -> None:
    rows = chained((0, created()), *((0, forwarded(3 + n)) for n in range(300)))
    reading = Reading(ended(lines_of_log(rows, {})))
    roots = dict(zip(range(1, 302), (reading.root() for _ in reading.events()), strict=True))
    for size in (255, 256, 257, 301):
        assert roots[size] == checkpoint(rows[:size]).root


# what was cut, changed, or put together


@KINDS
@given(data=st.data())
@settings(max_examples=120)
def test_a_byte_changed_anywhere_is_refused(lines: list[Line], data: st.DataObject) -> None:
    sound = b"".join(ended(lines))
    at = data.draw(st.integers(0, len(sound) - 1))
    changed = bytearray(sound)
    changed[at] ^= data.draw(st.integers(1, 255))
    refused(bytes(changed).splitlines(keepends=True))


@KINDS
def test_a_byte_changed_anywhere_in_the_end_is_refused(lines: list[Line]) -> None:
    *body, end = ended(lines)
    for at in range(len(end)):
        for mask in (0x01, 0x03, 0x07, 0x20):  # a line feed becomes a tab, a carriage return ...
            changed = bytearray(end)
            changed[at] ^= mask
            refused([*body, bytes(changed)])


@KINDS
def test_a_file_cut_at_any_line_is_refused(lines: list[Line]) -> None:
    sound = ended(lines)
    refused([], "no export")
    for count in range(1, len(sound)):
        refused(sound[:count], "cut off")


@KINDS
def test_a_file_that_lacks_any_line_is_refused_also_with_an_end_of_its_own(
    lines: list[Line],
) -> None:
    for index in range(len(lines)):
        refused(ended([*lines[:index], *lines[index + 1 :]]))


@KINDS
def test_a_file_with_any_line_twice_is_refused_also_with_an_end_of_its_own(
    lines: list[Line],
) -> None:
    for index in range(len(lines)):
        refused(ended([*lines[: index + 1], *lines[index:]]))


def test_a_file_that_goes_on_after_its_end_is_refused() -> None:
    sound = ended(WHOLE)
    refused([*sound, sound[-1]], "goes on")


@KINDS
@pytest.mark.parametrize(
    "change",
    [
        {"payload": "{}"},
        {"actor": "somebody else"},
        {"recorded_at": "2030-01-01T00:00:00.000000Z"},
        {"position": 7},
        {"version": 3},
        {"source": "{}"},
        {"previous_hash": "0" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_row_is_refused_by_its_hash_and_a_forged_hash_by_the_log(
    lines: list[Line], change: dict[str, Any]
) -> None:
    at = place(lines, EventLine, 1)
    changed = replaced(lines, at, **change)
    refused(ended(changed), "position")
    forged = hashed_anew(changed[at])  # type: ignore[arg-type]
    refused(ended([*changed[:at], forged, *changed[at + 1 :]]), "position")


def test_a_log_chained_anew_behind_a_change_does_not_lead_to_its_checkpoint() -> None:
    forged = chained((0, created("forged")), (0, forwarded(6)))
    true = chained((0, created()), (0, forwarded(3)))
    body = lines_of_log(forged, {})[1:]
    refused(ended([lines_of_log(true, {})[0], *body]), "do not lead to the checkpoint")


def test_a_log_that_lost_its_newest_events_does_not_lead_to_its_checkpoint() -> None:
    refused(ended(WHOLE[: place(WHOLE, EventLine, 5)]), "do not lead to the checkpoint")


def test_a_checkpoint_with_another_root_is_refused() -> None:
    at = msgspec.structs.replace(checkpoint(a_log()), root="0" * 64)
    refused(ended(replaced(WHOLE, 0, checkpoint=at)), "another checkpoint")
    noted = lines_of_log(a_log(), checkpoint=at, note=to_note(at))
    refused(ended(noted), "do not lead to the checkpoint")
    noted = lines_of_states(a_log(), ASKED, HELD, checkpoint=at, note=to_note(at))
    refused(ended(noted), "its proof does not lead to the root")


def test_a_state_without_a_proof_or_with_that_of_another_event_is_refused() -> None:
    at = place(STATES, EventLine, 1)
    refused(ended(replaced(STATES, at, inclusion=None)), "no proof")
    other = inclusion(a_log(), 4)
    refused(ended(replaced(STATES, at, inclusion=other)), "no proof")
    other = msgspec.structs.replace(other, position=Position(2))
    refused(ended(replaced(STATES, at, inclusion=other)), "does not lead to the root")


def test_a_proof_in_a_whole_log_is_refused() -> None:
    at = place(WHOLE, EventLine)
    refused(ended(replaced(WHOLE, at, inclusion=inclusion(a_log(), 1))), "no place")


def test_a_state_whose_ancestor_is_missing_or_too_short_is_refused() -> None:
    for held in ((4, 6), (1, 4, 6)):
        refused(ended(lines_of_states(a_log(), ASKED, held)), "version 2 of .* is missing")


def test_a_state_that_nobody_asked_for_is_refused() -> None:
    held = (1, 2, 3, 4, 6)
    refused(ended(lines_of_states(a_log(), ASKED, held)), "does not hold the states it names")
    held = (1, 2, 4, 5, 6)
    refused(ended(lines_of_states(a_log(), ASKED, held)), "does not hold the states it names")


def test_a_state_that_is_named_and_not_there_is_refused() -> None:
    for asked in ({1: 3}, {1: 2, 2: 1}, {1: 1}):
        lines = lines_of_states(a_log(), asked, HELD)
        refused(ended(lines), "does not hold the states it names")


def test_a_gap_in_the_versions_is_refused() -> None:
    held = (1, 2, 6)
    refused(ended(lines_of_states(a_log(), ASKED, held)), "version 2 where 1 must come")


def test_events_that_cannot_have_happened_are_refused() -> None:
    rows = chained((0, created()), (0, forwarded(9)))
    refused(ended(lines_of_log(rows, {})), "starts at 9")
    rows = chained((0, forwarded(3)))
    refused(ended(lines_of_log(rows, {})), "text_forwarded cannot happen")


@pytest.mark.parametrize(
    "logits", [{}, {6: BLOBS[:1]}, {6: BLOBS[::-1]}, {6: (b"other", b"second")}, {2: BLOBS}]
)
@pytest.mark.parametrize("kind", ["log", "state"])
def test_logits_that_are_not_those_of_the_digest_are_refused(
    kind: str, logits: dict[int, tuple[bytes, ...]]
) -> None:
    if kind == "log":
        lines = lines_of_log(a_log(), logits)
    else:
        lines = lines_of_states(a_log(), ASKED, HELD, logits)
    refused(ended(lines), "logits are")


def test_logits_that_were_let_go_of_may_be_missing() -> None:
    lines = lines_of_log(a_log(), {})
    assert read(ended(lines, released_until=6))[-1].logits == ()
    refused(ended(lines, released_until=5), "logits are missing")


def test_a_fingerprint_that_is_unsound_or_missing_is_refused() -> None:
    at = place(WHOLE, FingerprintLine)
    refused(
        ended(replaced(WHOLE, at, document='{"deterministic":true}')), "not that of its document"
    )
    refused(ended(replaced(WHOLE, at, deterministic=False)), "not that of its document")
    refused(ended([*WHOLE[:at], *WHOLE[at + 1 :]]), "is not in the file")


def test_what_a_newer_release_wrote_is_refused_as_such() -> None:
    for lines in (
        replaced(WHOLE, 0, version=FORMAT + 1),
        lines_of_log(chained((0, created()), schema=SCHEMA + 1), {}),
    ):
        with pytest.raises(ExportTooNew):
            read(ended(lines))
    unknown = b'{"line":"header","format":"cacher-export","version":2,"more":[1]}\n'
    with pytest.raises(ExportTooNew):
        read([unknown])


def test_an_event_of_a_type_that_is_not_its_own_is_refused() -> None:
    rows = chained((0, created()), (0, forwarded(3)), type="state_created")
    refused(ended(lines_of_log(rows, {})), "stored as 'state_created'")


def test_what_is_sealed_or_erased_has_no_place_in_a_log_that_is_not_erasable() -> None:
    for rows in (
        chained((0, created()), payload='{"sealed":"AAAA"}'),
        chained((0, created()), (0, StateErased())),
    ):
        refused(ended(lines_of_log(rows, {})), "not erasable")


def test_what_is_sealed_is_proven_but_not_read() -> None:
    rows = chained((0, created()), (0, forwarded(3)), payload='{"sealed":"AAAA"}')
    for lines in (
        lines_of_log(rows, {}, erasable=True),
        lines_of_states(rows, {0: 2}, (1, 2), {}, erasable=True),
    ):
        reading = Reading(ended(lines))
        assert [one.recorded for one in reading.events()] == [None, None]
        assert reading.sealed == 2
        refused(ended(replaced(lines, 1, payload='{"sealed":"AAAB"}')), "position 1")


def test_what_is_not_sealed_has_no_place_in_a_log_that_is_erasable() -> None:
    for lines in (
        lines_of_log(a_log(), erasable=True),
        lines_of_states(a_log(), ASKED, HELD, erasable=True),
    ):
        refused(ended(lines), "not sealed")


def test_sealed_or_not_every_version_that_is_named_must_be_there() -> None:
    rows = chained(
        (0, created()), (0, forwarded(3)), (1, forked(0, 1)), payload='{"sealed":"AAAA"}'
    )

    def lines(asked: dict[int, int], *held: int) -> list[bytes]:
        return ended(lines_of_states(rows, asked, held, {}, erasable=True))

    assert len(read(lines({0: 2}, 1, 2))) == 2
    for cut in (lines({0: 2}, 1), lines({0: 2}), lines({0: 2, 1: 1}, 1, 2), lines({1: 2}, 1, 3)):
        refused(cut, "does not hold the states it names")
    assert len(read(lines({1: 1}, 3))) == 1  # without keys nobody knows where it comes from


def test_the_newest_of_two_versions_that_are_named_must_be_there() -> None:
    first, *rest = lines_of_states(a_log(), {0: 2}, (1, 2), {})
    for versions in ((2, 3), (3, 2)):
        named = tuple(StateAt(state_id=state_id(0), version=Version(one)) for one in versions)
        header = msgspec.structs.replace(first, states=named)
        refused(ended([header, *rest]), "does not hold the states it names")


def test_an_id_that_no_state_has_is_refused() -> None:
    (row,) = chained((0, created()))
    for name in ("state-0", "../x", state_id() + "\n"):
        renamed = msgspec.structs.replace(row, state_id=StateId(name))
        renamed = msgspec.structs.replace(renamed, hash=row_hash(renamed))
        refused(ended(lines_of_log([renamed], {})), "is no state's id")


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"{}\n", b"[]\n", b"null\n", b'{"line":"header"}\n', b"\xff\n", b"[" * 9999],
)
def test_lines_that_are_none_are_refused(line: bytes) -> None:
    refused([line], "no export")
    sound = ended(WHOLE)
    refused([sound[0], line, *sound[1:]], "line 2")


# packing


def packed(data: bytes) -> bytes:
    packer = Packer()
    return packer.pack(data) + packer.end()


@given(st.lists(st.binary(max_size=20)), st.integers(1, 40))
@settings(max_examples=60)
def test_lines_come_out_as_they_went_in_however_the_file_is_cut_in_parts(
    texts: list[bytes], size: int
) -> None:
    lines = [text.replace(b"\n", b"") + b"\n" for text in texts]
    file = packed(b"".join(lines))
    assert file.startswith(GZIP_BEGIN)
    assert zlib.decompress(file, wbits=31) == b"".join(lines)
    parts = [file[start : start + size] for start in range(0, len(file), size)]
    assert list(unpacked_lines(parts)) == lines


def test_a_long_line_comes_out_whole() -> None:
    long = bytes(range(11, 256)) * 10_000 + b"\n"
    assert list(unpacked_lines([packed(b"a\n" + long + b"b\n")])) == [b"a\n", long, b"b\n"]


def test_a_line_that_is_longer_than_any_of_an_export_is_refused_before_it_is_unpacked() -> None:
    part = bytes(1 << 18)
    taken = 0

    def parts() -> Iterator[bytes]:
        nonlocal taken
        packer = Packer()
        yield packer.pack(b"header\n")
        while taken < 2 * LONGEST_LINE:
            taken += len(part)
            yield packer.pack(part)
        yield packer.pack(b"\n") + packer.end()

    lines = unpacked_lines(parts())
    assert next(lines) == b"header\n"
    assert taken < LONGEST_LINE / 10
    with pytest.raises(BrokenExport, match="a line of the file has more"):
        next(lines)
    assert taken < LONGEST_LINE * 1.1


def test_the_same_lines_make_the_same_file_however_they_are_given() -> None:
    packer = Packer()
    data = bytes(range(256)) * 50
    parts = [packer.pack(data[start : start + 7]) for start in range(0, len(data), 7)]
    assert b"".join(parts) + packer.end() == packed(data)
    assert packed(data)[4:8] == bytes(4)  # no time


@pytest.mark.parametrize(
    ("file", "match"),
    [
        (b"", "cut off"),
        (b"x", "cut off"),
        (b"PK\3\4" * 9, "no gzip file"),
        (packed(b"one\n")[:-1], "cut off"),
        (packed(b"one\n")[:12], "cut off"),
        (packed(b"one\n") + b"x", "goes on"),
        (packed(b"one\n") + packed(b"two\n"), "goes on"),
        (packed(b"one\ntwo"), "within a line"),
        (packed(b"one\n")[:-6] + bytes(6), "damaged"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_file_that_is_no_whole_gzip_file_is_refused(file: bytes, match: str, size: int) -> None:
    parts = [file[start : start + size] for start in range(0, len(file), size)]
    with pytest.raises(BrokenExport, match=match):
        list(unpacked_lines(parts))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = packed(bytes(100_000_000))
    assert len(bomb) < 200_000
    taken = 0

    def parts() -> Iterator[bytes]:
        nonlocal taken
        for start in range(0, len(bomb), 1000):
            taken += 1
            yield bomb[start : start + 1000]

    with pytest.raises(TooLarge):
        list(unpacked_lines(parts(), limit=1_000_000))
    assert taken * 1000 < len(bomb) / 20
    taken = 0
    with pytest.raises(BrokenExport, match="a line of the file has more"):
        list(unpacked_lines(parts()))
    assert taken * 1000 < len(bomb) / 10
    assert list(unpacked_lines([packed(bytes(9) + b"\n")], limit=10)) == [bytes(9) + b"\n"]
    with pytest.raises(TooLarge):
        list(unpacked_lines([packed(bytes(9) + b"\n")], limit=9))


# where an imported event comes from


def taken_in(row: Row, log_id: str, **columns: Any) -> Row:
    """The row that an event of a log has in another one."""
    given = {"position": Position(row.position + 70), "actor": "importer", "request_id": "import"}
    moved = msgspec.structs.replace(
        row, source=stored(source_of(row, log_id)), recorded_at="later", **(given | columns)
    )
    return msgspec.structs.replace(moved, hash=row_hash(moved))


def test_the_original_row_can_be_made_again_however_often_it_moved() -> None:
    original = a_log()[1]
    row, logs = original, ["a" * 32, "b" * 32, "c" * 32]
    for log_id in logs:
        row = taken_in(row, log_id)
        assert happened_at(row) == original.recorded_at
        assert identity(row, "elsewhere") == (logs[0], original.hash.hex())
    for log_id in reversed(logs):
        source = source_in(row)
        assert source is not None
        assert source.log_id == log_id
        row = original_row(row, source)
        assert row_hash(row) == row.hash
    assert row == original
    assert identity(original, logs[0]) == (logs[0], original.hash.hex())
    assert identity(original, logs[1]) != identity(original, logs[0])


def test_a_state_shows_when_its_events_happened_first() -> None:
    rows = [taken_in(row, LOG_ID) for row in chained((0, created()), (0, forwarded(3)))]
    state = fold(map(decode, rows))
    assert isinstance(state, Live)
    assert {row.recorded_at for row in rows} == {"later"}
    assert state.created_at == state.modified_at == chained((0, created()))[0].recorded_at


@pytest.mark.parametrize("source", ["", "{}", "null", "[" * 9999, '{"log_id":1}'])
def test_a_source_that_cannot_be_read_is_named_with_its_position(source: str) -> None:
    (row,) = chained((0, created()), source=source)
    for read_it in (source_in, happened_at, lambda row: source_of(row, LOG_ID)):
        with pytest.raises(UnknownEvent, match="position 1"):
            read_it(row)


def test_a_row_that_belies_its_source_is_refused() -> None:
    rows = chained((0, created()))
    true = stored(source_of(rows[0], "a" * 32))
    read(ended(lines_of_log(chained((0, created()), source=true, actor="importer"), {})))
    forged = chained((0, created("forged")), source=true, actor="importer")
    refused(ended(lines_of_log(forged, {})), "not what its source says")


@pytest.mark.parametrize("column", ["payload", "fingerprint", "source"])
def test_what_is_nested_without_an_end_is_refused(column: str) -> None:
    deep = '{"a":' * 9999
    if column == "fingerprint":
        at = place(WHOLE, FingerprintLine)
        digest = hashlib.sha256(deep.encode()).hexdigest()
        refused(ended(replaced(WHOLE, at, document=deep, id=digest)))
    else:
        refused(ended(lines_of_log(chained((0, created()), **{column: deep}), {})))
