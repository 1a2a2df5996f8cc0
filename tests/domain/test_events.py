"""The storage contract: what a release has written, every later one reads."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.analysis.parameters import CompareParameters, Parameters
from domain.canonical import as_json
from domain.chain import COLUMNS, SEALED, Head, Row, follow, genesis, row_hash
from domain.content import Fragment
from domain.events import (
    ANALYZED,
    SCHEMA,
    ContinuationsGenerated,
    Event,
    FinishReason,
    HeadRewound,
    Recorded,
    StateAnalyzed,
    StateCreated,
    TokensGenerated,
    decode,
    encode,
    event_type,
    misnumbered,
    needs,
)
from domain.fingerprint import Fingerprint
from domain.ids import Position, StateId, Version
from domain.intents import GenerationStarted
from domain.log_errors import EventErased, UnknownEvent
from domain.origin import Origin
from domain.state import Deleted, Erased, Live, State, fold
from domain.transfer import source_in
from tests.builders import (
    FINGERPRINT,
    RECORDED_AT,
    analyzed,
    created,
    fragments,
    history,
    recorded,
    row,
    state_id,
)
from tests.domain import schema_1, schema_2, schema_3, schema_4
from tests.domain.replaying import Story, stories

DATA: Final = Path(__file__).parent / "data"
WRITTEN: Final = {1: schema_1, 2: schema_2, 3: schema_3, 4: schema_4}
"""What each schema's files hold."""


def rows_file(schema: int) -> Path:
    return DATA / f"events_schema_{schema}.jsonl"


def intents_file(schema: int) -> Path:
    return DATA / f"intents_schema_{schema}.jsonl"


def log_id(schema: int) -> str:
    return f"the log of schema {schema}"


def write_files() -> None:
    """Write the data files of this schema, once it has come to be. They are never changed."""
    head, lines = genesis(log_id(SCHEMA)), []
    for state, version, event in WRITTEN[SCHEMA].the_history():
        computed = hasattr(event, "start") or isinstance(event, StateCreated | StateAnalyzed)
        fingerprint = FINGERPRINT.id if computed else None
        columns = {"fingerprint": fingerprint, "source": schema_4.source(state, version)}
        one = row(event, version=version, head=head, state_id=state, **columns)
        head = Head(one.position, one.hash)
        lines.append(msgspec.json.encode(dict(zip(COLUMNS, one.columns(), strict=True))))
    begun = [as_json(one).encode() for one in WRITTEN[SCHEMA].intents()]
    for file, written in ((rows_file(SCHEMA), lines), (intents_file(SCHEMA), begun)):
        with file.open("xb") as stream:  # refuses to touch a file that is there
            stream.writelines(line + b"\n" for line in written)


def committed_rows(schema: int) -> list[Row]:
    return [msgspec.json.decode(line, type=Row) for line in rows_file(schema).open("rb")]


def committed(schema: int) -> list[Recorded]:
    return list(map(decode, committed_rows(schema)))


def committed_intents(schema: int) -> list[bytes]:
    return intents_file(schema).read_bytes().splitlines()


every_schema: Final = pytest.mark.parametrize("schema", WRITTEN)


# the committed files


@every_schema
def test_every_event_ever_written_still_decodes_to_what_it_was(schema: int) -> None:
    decoded = [(one.state_id, one.version, one.event) for one in committed(schema)]
    assert decoded == WRITTEN[schema].the_history()
    assert {one.schema for one in committed_rows(schema)} == {schema}


def test_every_event_of_this_schema_encodes_to_the_same_bytes() -> None:
    for one in committed_rows(SCHEMA):
        assert encode(decode(one).event) == one.payload


@every_schema
def test_nothing_that_was_ever_written_is_lost_when_it_is_encoded_again(schema: int) -> None:
    for one in committed_rows(schema):
        assert holds(json.loads(encode(decode(one).event)), json.loads(one.payload))


def holds(now: Any, then: Any) -> bool:
    """Whether a value has everything that an earlier one has; objects may have gained fields."""
    if isinstance(then, dict):
        return all(name in now and holds(now[name], value) for name, value in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(map(holds, now, then))
    return bool(now == then)


@every_schema
def test_the_chain_of_the_committed_rows_still_holds(schema: int) -> None:
    head = genesis(log_id(schema))
    for one in committed_rows(schema):
        head = follow(head, one)
    assert head.position == len(WRITTEN[schema].the_history())


def state_of(schema: int, number: int) -> State | None:
    own = (one for one in committed(schema) if one.state_id == state_id(number))
    return fold(one for one in own if one.row.version is not None)


def test_the_rows_of_schema_1_lead_to_the_same_states() -> None:
    first, second = state_of(1, 0), state_of(1, 1)
    assert isinstance(first, Live)
    assert first.content.text == "tabcdef"
    assert (first.config.context_size, first.config.seed, first.version) == (32, None, 11)
    assert (first.config.on_full, first.dropped, first.content.partial) == ("stop", 0, {})
    assert isinstance(second, Deleted)


def test_the_rows_of_schema_2_lead_to_the_same_states() -> None:
    first, second, third = state_of(2, 0), state_of(2, 1), state_of(2, 2)
    assert isinstance(first, Live)
    assert (first.content.text, first.dropped, first.version) == ("defgjk", 6, 14)
    assert (first.config.on_full, first.config.logit_bias) == ("stop", {2: -1.0})
    assert isinstance(second, Deleted)
    assert isinstance(third, Live)
    assert (third.content.text, third.content.partial) == ("abcédefab", {4: "c3", 5: "a9"})


def test_the_rows_of_schema_3_lead_to_the_same_states() -> None:
    assert [state_of(3, number) for number in range(3)] == [state_of(2, n) for n in range(3)]
    erased, erased_later, imported = state_of(3, 3), state_of(3, 4), state_of(3, 5)
    assert isinstance(erased, Erased)
    assert isinstance(erased_later, Erased)
    assert (erased.version, erased_later.version) == (4, 3)
    assert isinstance(imported, Live)
    assert (imported.content.text, imported.version) == ("abcdé", 3)
    assert imported.created_at == "2025-12-31T23:59:59.999999Z"
    assert imported.modified_at == RECORDED_AT


def test_the_rows_of_schema_4_lead_to_the_same_states() -> None:
    assert [state_of(4, number) for number in range(6)] == [state_of(3, n) for n in range(6)]
    looked_into, classified = state_of(4, 6), state_of(4, 7)
    assert isinstance(looked_into, Live)
    assert (looked_into.content.text, looked_into.version) == ("abcd", 2)
    assert isinstance(classified, Live)
    assert (classified.content.text, classified.model_type) == ("abcd", "sequence_classification")


def test_the_rows_of_this_schema_hold_every_question_that_can_be_asked() -> None:
    decoded = [one.event for one in committed(SCHEMA)]
    asked = {type(one.parameters) for one in decoded if isinstance(one, StateAnalyzed)}
    assert asked == set(get_args(Parameters))


def test_the_row_of_an_analysis_has_the_version_that_it_saw_and_none_of_its_own() -> None:
    for one in committed_rows(4):
        assert list(misnumbered(one)) == []
        assert (one.version is None) == (one.type == ANALYZED)


@pytest.mark.parametrize(
    ("event", "columns", "wrong"),
    [
        (created(), {"version": None}, ["version"]),
        (created(), {"version": Version(0)}, ["version"]),
        (created(), {"at_version": Version(1)}, ["at_version"]),
        (created(), {"version": None, "at_version": Version(1)}, ["version", "at_version"]),
        (analyzed(), {"at_version": None}, ["at_version"]),
        (analyzed(), {"at_version": Version(-1)}, ["at_version"]),
        (analyzed(), {"version": Version(1)}, ["version"]),
        (analyzed(), {"version": Version(1), "at_version": None}, ["at_version", "version"]),
    ],
)
def test_a_row_has_a_version_or_saw_one(
    event: Event, columns: dict[str, Any], wrong: list[str]
) -> None:
    right = row(event)
    assert list(misnumbered(right)) == []
    changed = msgspec.structs.replace(right, **columns)
    assert [name for name, _ in misnumbered(changed)] == wrong


def compared(state: StateId, version: int) -> StateAnalyzed:
    other = CompareParameters(other_state_id=state, other_version=Version(version))
    return analyzed(parameters=other)


@pytest.mark.parametrize(
    ("event", "version"),
    [
        (analyzed(), 3),
        (compared(state_id(), 2), 3),
        (compared(state_id(), 5), 5),
        (compared(state_id(1), 2), None),
    ],
)
def test_an_analysis_needs_its_state_up_to_a_version(
    event: StateAnalyzed, version: int | None
) -> None:
    assert needs(recorded(event, version=3)) == version


def test_rows_that_were_imported_name_the_same_source() -> None:
    found = {(one.state_id, one.version): source_in(one) for one in committed_rows(3)}
    named = {place: source for place, source in found.items() if source is not None}
    assert named == schema_3.SOURCES
    assert not any(one.source for schema in (1, 2) for one in committed_rows(schema))


def test_the_rows_of_this_schema_hold_every_event_origin_and_reason_to_end() -> None:
    decoded = [one.event for one in committed(SCHEMA)]
    assert {type(one) for one in decoded} == set(get_args(Event))
    begun = [one for one in decoded if isinstance(one, StateCreated)]
    assert {type(one.origin) for one in begun} == set(get_args(Origin))
    reasons = {one.finish_reason for one in decoded if isinstance(one, TokensGenerated)}
    for one in decoded:
        if isinstance(one, ContinuationsGenerated):
            reasons |= {branch.finish_reason for branch in one.continuations}
    assert reasons == {None, *get_args(FinishReason)}


@every_schema
def test_every_intent_ever_written_still_decodes_to_what_it_was(schema: int) -> None:
    lines = committed_intents(schema)
    decoded = [msgspec.json.decode(line, type=GenerationStarted) for line in lines]
    assert decoded == WRITTEN[schema].intents()
    for one, line in zip(decoded, lines, strict=True):
        assert holds(json.loads(as_json(one)), json.loads(line))


def test_every_intent_of_this_schema_encodes_to_the_same_bytes() -> None:
    decoded = [
        msgspec.json.decode(line, type=GenerationStarted) for line in committed_intents(SCHEMA)
    ]
    assert [as_json(one).encode() for one in decoded] == committed_intents(SCHEMA)


def test_the_files_are_never_written_again() -> None:
    before = rows_file(SCHEMA).read_bytes()
    with pytest.raises(FileExistsError):
        write_files()
    assert rows_file(SCHEMA).read_bytes() == before


WRITTEN_FILES: Final = {
    "events_schema_1.jsonl": "58b588a154e1dfe845ca83593177347f8564651ef1aa0e9f861792fba8181dcd",
    "intents_schema_1.jsonl": "ce59f2f5e180f8d2082f4817bf96a0fe87bc14492448f4eea3011f8aa8571aa4",
    "events_schema_2.jsonl": "6783851ffe93875c8a2b932a1f635a985cd17128b03a44273fd522180436475b",
    "intents_schema_2.jsonl": "d4f3f01a78fbef7f7943d667b97660a2cbfc3321d25ea162a80ba042d71b65c3",
    "events_schema_3.jsonl": "31aeb1d023709228e71e360a21a224b53ef9ca80a59305a6663a599143716264",
    "intents_schema_3.jsonl": "d4f3f01a78fbef7f7943d667b97660a2cbfc3321d25ea162a80ba042d71b65c3",
    "events_schema_4.jsonl": "60ef8687c747700e3888f2bd6ed7299962b5cabc42d25be82f3c1e90afe985b6",
    "intents_schema_4.jsonl": "d4f3f01a78fbef7f7943d667b97660a2cbfc3321d25ea162a80ba042d71b65c3",
}


@pytest.mark.parametrize("name", WRITTEN_FILES)
def test_the_files_of_every_schema_are_byte_for_byte_what_they_were(name: str) -> None:
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == WRITTEN_FILES[name]


# what cannot be read


def changed(**columns: object) -> Row:
    return msgspec.structs.replace(row(created("abc"), position=Position(17)), **columns)


def test_a_newer_schema_is_refused_with_its_position() -> None:
    with pytest.raises(UnknownEvent, match=r"^position 17: schema .* is newer") as caught:
        decode(changed(schema=SCHEMA + 1))
    assert caught.value.position == 17


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ('{"type":"state_sold"}', "Invalid value 'state_sold'"),
        ('{"to_position":1}', "missing required field `type`"),
        ('{"type":"head_rewound"}', "missing required field `to_position`"),
        ('{"type":"head_rewound","to_position":"1"}', "Expected `int`"),
        ('{"type":"head_rewound","to_position":NaN}', "invalid"),
        ("[]", "Expected `object`"),
        ("", "truncated"),
        ('{"type":"state_deleted"} ...', "trailing characters"),
    ],
)
def test_a_payload_that_is_no_event_is_refused_with_its_position(payload: str, reason: str) -> None:
    with pytest.raises(UnknownEvent, match=r"^position 17: not a known event") as caught:
        decode(changed(payload=payload))
    assert reason in str(caught.value)
    assert caught.value.position == 17


def test_a_payload_of_another_type_than_its_row_is_refused_with_its_position() -> None:
    message = "^position 17: stored as 'state_deleted', holds 'state_created'"
    with pytest.raises(UnknownEvent, match=message) as caught:
        decode(changed(type="state_deleted"))
    assert caught.value.position == 17


# what is sealed

CIPHERTEXT: Final = f'{SEALED}"AAAA"}}'


def test_a_sealed_payload_is_read_from_what_was_opened() -> None:
    event = created("abc")
    sealed = changed(payload=CIPHERTEXT, opened=encode(event))
    assert sealed.sealed
    assert decode(sealed).event == event


def test_a_sealed_payload_without_its_key_is_told_from_what_cannot_be_read() -> None:
    with pytest.raises(EventErased, match=r"^position 17: sealed, and there is no key") as caught:
        decode(changed(payload=CIPHERTEXT))
    assert caught.value.position == 17


def test_what_was_opened_is_no_column_and_never_stands_for_a_payload_that_is_not_sealed() -> None:
    plain = row(created("abc"))
    lying = msgspec.structs.replace(plain, opened=encode(created("xyz")))
    assert decode(lying).event == created("abc")
    assert (lying.columns(), row_hash(lying)) == (plain.columns(), row_hash(plain))


# what holds for every event


@given(stories())
def test_every_event_survives_its_encoding(story: Story) -> None:
    for one in history(*story.events):
        again = decode(row(one.event, position=one.position))
        assert again.event == one.event
        assert encode(again.event) == encode(one.event)
        assert event_type(again.event) == again.row.type


@given(fragments(min_size=0))
def test_the_pieces_of_a_fragment_are_its_text(fragment: Fragment) -> None:
    assert "".join(fragment.pieces()) == fragment.text
    assert len(fragment.pieces()) == len(fragment.tokens)
    assert Fragment.of(fragment.tokens, fragment.pieces()) == fragment


def test_the_payload_is_readable_without_this_program() -> None:
    assert encode(HeadRewound(to_position=3)) == '{"to_position":3,"type":"head_rewound"}'


# fingerprints

facts = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=4)


@given(facts, st.booleans())
def test_a_fingerprint_gives_back_the_facts_it_was_made_of(
    named: dict[str, object], deterministic: bool
) -> None:
    fingerprint = Fingerprint.of({**named, "deterministic": deterministic})
    assert fingerprint.is_sound()
    assert fingerprint.facts() == {**named, "deterministic": deterministic}
    assert fingerprint.deterministic is deterministic


@given(facts, st.booleans(), st.sampled_from(["id", "document", "deterministic"]))
def test_a_changed_fingerprint_is_not_sound(
    named: dict[str, object], deterministic: bool, column: str
) -> None:
    fingerprint = Fingerprint.of({**named, "deterministic": deterministic})
    other = Fingerprint.of({**named, "deterministic": not deterministic})
    value = getattr(other, column)
    assert not msgspec.structs.replace(fingerprint, **{column: value}).is_sound()


@pytest.mark.parametrize("document", ["", "[]", "{}", "{", '{"deterministic":"yes"}', "null"])
def test_a_document_without_the_claim_is_not_sound(document: str) -> None:
    digest = hashlib.sha256(document.encode()).hexdigest()
    assert not Fingerprint(id=digest, document=document, deterministic=True).is_sound()


def test_the_order_of_the_facts_makes_no_difference() -> None:
    one = Fingerprint.of({"deterministic": True, "torch": "2"})
    assert one == Fingerprint.of({"torch": "2", "deterministic": True})


def test_there_is_one_schema_file_for_each_schema() -> None:
    names = {file.name for file in DATA.glob("events_schema_*.jsonl")}
    assert names == {f"events_schema_{number}.jsonl" for number in range(1, SCHEMA + 1)}


if __name__ == "__main__":
    write_files()
