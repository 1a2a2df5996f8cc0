"""The storage contract: what a release has written, every later one reads."""

import hashlib
from pathlib import Path
from typing import Final, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.chain import Head, Row, follow, genesis
from domain.config import (
    ConfigChanges,
    GenerationParameters,
    Metadata,
    SamplingParameters,
    StateConfig,
)
from domain.errors import UnknownEvent
from domain.events import (
    SCHEMA,
    Alternative,
    ConfigChanged,
    Event,
    Fingerprint,
    FinishReason,
    Fork,
    Fragment,
    GenerationStarted,
    HeadRewound,
    New,
    Origin,
    Recorded,
    Scores,
    StateCreated,
    StateDeleted,
    StoredLogits,
    TextForwarded,
    TokensGenerated,
    as_json,
    decode,
    encode,
    event_type,
)
from domain.ids import MAX_SEED, ModelId, Position, StateId, TokenId, Version
from domain.state import Deleted, Live, fold
from tests.builders import FINGERPRINT, created, fragments, histories, row, state_id

DATA: Final = Path(__file__).parent / "data"
ROWS: Final = DATA / "events_schema_1.jsonl"
INTENTS: Final = DATA / "intents_schema_1.jsonl"
LOG_ID: Final = "the log of schema 1"

AWKWARD_TEXT: Final = 'tab\t quote" \\ é \u0000 \u2028 \U0001f600'
# The first token ends inside a character, the second completes it, the third is special.
SPLIT_CHARACTER: Final = Fragment(
    tokens=(TokenId(195), TokenId(169), TokenId(0)), text="é", ends=(0, 1, 1)
)
AWKWARD_NUMBERS: Final = Scores(
    logprobs=(-0.0, -1e-300, -123456789.125),
    ranks=(0, 1023, 2**31),
    entropies=(0.0, 0.1, 6.931471805599453),
    logsumexps=(5e-324, -1.7976931348623157e308, 1e16),
    logits_digests=("00" * 8, "0123456789abcdef", "ff" * 8),
)
ALL_PARAMETERS: Final = GenerationParameters(
    sampling=SamplingParameters(temperature=0.7, top_k=40, top_p=0.9),
    max_tokens=3,
    stop_sequences=("\n\n", "é"),
    stop_token_ids=(TokenId(0), TokenId(7)),
    top_logprobs=1,
)
GREEDY: Final = GenerationParameters(
    sampling=SamplingParameters(temperature=0.0, top_k=0, top_p=1.0), max_tokens=16
)
CONFIG: Final = StateConfig(
    temperature=0.7,
    top_p=1.0,
    top_k=0,
    seed=42,
    context_size=64,
    store_logits="none",
    top_k_logits=10,
)

# What the committed file holds is written out here and not made by shared builders: it is the
# same for ever, whatever they become.


def content_of(text: str) -> Fragment:
    return Fragment.of([TokenId(ord(letter)) for letter in text], list(text))


def scores_of(text: str) -> Scores:
    count = len(text)
    return Scores(
        logprobs=(-0.5,) * count,
        ranks=(0,) * count,
        entropies=(1.25,) * count,
        logsumexps=(3.5,) * count,
        logits_digests=("00" * 8,) * count,
    )


def began(text: str, origin: Origin, metadata: Metadata) -> StateCreated:
    return StateCreated(
        origin=origin,
        model_id=ModelId("cacher-tiny"),
        model_type="causal_lm",
        config=CONFIG,
        metadata=metadata,
        content=content_of(text),
    )


def added(start: int, text: str) -> TextForwarded:
    return TextForwarded(start=start, content=content_of(text), scores=scores_of(text))


def drawn(
    start: int,
    text: str,
    finish_reason: FinishReason | None,
    *,
    seed: int = 7,
    stored_logits: StoredLogits | None = None,
) -> TokensGenerated:
    return TokensGenerated(
        parameters=GREEDY,
        seed=seed,
        start=start,
        content=content_of(text),
        scores=scores_of(text),
        sampling_probabilities=(1.0,) * len(text),
        alternatives=((),) * len(text),
        stored_logits=stored_logits,
        finish_reason=finish_reason,
    )


def everything_about_a_generation(start: int) -> TokensGenerated:
    alternative = Alternative(token_id=TokenId(195), text="\ufffd", logprob=-0.25)
    return TokensGenerated(
        parameters=ALL_PARAMETERS,
        seed=MAX_SEED,
        start=start,
        content=SPLIT_CHARACTER,
        scores=AWKWARD_NUMBERS,
        sampling_probabilities=(1.0, 0.3333333333333333, 1e-09),
        alternatives=((alternative,), (), (alternative, alternative)),
        stored_logits=StoredLogits(kind="top_k", k=20, digest="ab" * 32),
        finish_reason="eos",
    )


def first_state() -> list[Event]:
    """Every kind of event but the deletion, and every reason to end."""
    kept = StoredLogits(kind="full", k=1, digest="cd" * 32)
    changed = ConfigChanges(
        temperature=2.5,
        top_p=0.5,
        top_k=3,
        seed=None,
        context_size=32,
        store_logits="full",
        top_k_logits=1,
    )
    metadata = {"plain": "text", "é": [1, 2.5, None, True, {"deep": ""}]}
    return [
        began(AWKWARD_TEXT, New(), metadata),
        added(len(AWKWARD_TEXT), "ab"),
        everything_about_a_generation(len(AWKWARD_TEXT) + 2),
        HeadRewound(to_position=3),
        drawn(3, "c", None),
        drawn(4, "d", "stop_sequence", seed=0),
        drawn(5, "e", "stop_token", stored_logits=kept),
        drawn(6, "f", "cancelled"),
        ConfigChanged(changes=ConfigChanges(context_size=7)),
        drawn(7, "", "context_full"),
        ConfigChanged(changes=changed),
    ]


def forked_state() -> list[Event]:
    origin = Fork(state_id=state_id(0), version=Version(5), head_position=3)
    return [began("tab", origin, {}), StateDeleted()]


def intents() -> list[GenerationStarted]:
    """What the committed file of intents holds."""
    return [
        GenerationStarted(
            state_id=state_id(number),
            base_version=Version(number + 1),
            parameters=parameters,
            seed=7 * number,
            fingerprint=FINGERPRINT.id,
        )
        for number, parameters in enumerate((GREEDY, ALL_PARAMETERS))
    ]


def the_history() -> list[tuple[StateId, Version, Event]]:
    """What the committed file holds."""
    return [
        (state_id(number), Version(version), event)
        for number, one in enumerate((first_state(), forked_state()))
        for version, event in enumerate(one, start=1)
    ]


def write_files() -> None:
    """Write the data files: done once, when schema 1 came to be. They are never written again."""
    head, lines = genesis(LOG_ID), []
    for state, version, event in the_history():
        computed = hasattr(event, "scores") or isinstance(event, StateCreated)
        fingerprint = FINGERPRINT.id if computed else None
        one = row(event, version=version, head=head, state_id=state, fingerprint=fingerprint)
        head = Head(one.position, one.hash)
        lines.append(msgspec.json.encode(one))
    for file, written in ((ROWS, lines), (INTENTS, [as_json(one).encode() for one in intents()])):
        with file.open("xb") as stream:  # refuses to touch a file that is there
            stream.writelines(line + b"\n" for line in written)


def committed_rows() -> list[Row]:
    return [msgspec.json.decode(line, type=Row) for line in ROWS.read_bytes().splitlines()]


# the committed file


def test_every_event_ever_written_still_decodes_to_what_it_was() -> None:
    decoded = [decode(one) for one in committed_rows()]
    assert [(one.state_id, one.version, one.event) for one in decoded] == the_history()


def test_every_event_ever_written_encodes_to_the_same_bytes() -> None:
    for one in committed_rows():
        assert encode(decode(one).event) == one.payload


def test_the_chain_of_the_committed_rows_still_holds() -> None:
    head = genesis(LOG_ID)
    for one in committed_rows():
        head = follow(head, one)
    assert head.position == len(the_history())


def test_the_committed_rows_lead_to_the_same_states() -> None:
    rows = list(map(decode, committed_rows()))
    first = fold(one for one in rows if one.state_id == state_id(0))
    second = fold(one for one in rows if one.state_id == state_id(1))
    assert isinstance(first, Live)
    assert first.content.text == "tabcdef"
    assert (first.config.context_size, first.config.seed, first.version) == (32, None, 11)
    assert isinstance(second, Deleted)


def test_the_committed_rows_hold_every_event_and_every_reason_to_end() -> None:
    decoded = [decode(one).event for one in committed_rows()]
    assert set(map(type, decoded)) == set(get_args(Event))
    reasons = {one.finish_reason for one in decoded if isinstance(one, TokensGenerated)}
    assert reasons == {None, *get_args(FinishReason)}


def test_every_intent_ever_written_still_decodes_to_what_it_was() -> None:
    lines = INTENTS.read_bytes().splitlines()
    decoded = [msgspec.json.decode(line, type=GenerationStarted) for line in lines]
    assert decoded == intents()
    assert [as_json(one).encode() for one in decoded] == lines


def test_the_files_are_never_written_again() -> None:
    before = ROWS.read_bytes()
    with pytest.raises(FileExistsError):
        write_files()
    assert ROWS.read_bytes() == before


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


# what holds for every event


@given(histories())
def test_every_event_survives_its_encoding(history: list[Recorded]) -> None:
    for one in history:
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
