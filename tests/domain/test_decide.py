"""Given events, when a client wishes something, then an event, a plan or a refusal."""

from typing import Any

import pytest
from msgspec import UNSET

from domain import decide
from domain.config import ConfigChanges, GenerationParameters, SamplingParameters
from domain.decide import GenerationPlan, GenerationWish
from domain.errors import (
    FingerprintChanged,
    InvalidInput,
    NotAPrefix,
    PreconditionFailed,
    StateIsDeleted,
    StateNotFound,
    TooLarge,
    VersionConflict,
)
from domain.events import (
    ConfigChanged,
    Fork,
    HeadRewound,
    StateCreated,
    StateDeleted,
    TextForwarded,
)
from domain.ids import Version
from domain.state import Live, fold
from tests.builders import (
    MODEL,
    MODEL_CONTEXT,
    RECORDED_AT,
    config,
    created,
    forwarded,
    fragment,
    generated,
    history,
    live,
    scores,
    started,
    state_id,
)

# which states take operations


def test_a_live_state_takes_operations() -> None:
    assert decide.live(live(), state_id()) == live()


def test_a_state_that_never_was_is_not_found() -> None:
    with pytest.raises(StateNotFound) as refused:
        decide.live(None, state_id(3))
    assert refused.value.facts == {"state_id": state_id(3)}


def test_a_deleted_state_says_when_and_that_its_events_stay() -> None:
    with pytest.raises(StateIsDeleted, match="its events stay readable") as refused:
        decide.live(fold(history(created(), StateDeleted())), state_id())
    assert refused.value.facts["deleted_at"] == RECORDED_AT


@pytest.mark.parametrize("if_match", [None, 2])
def test_the_right_precondition_holds(if_match: Version | None) -> None:
    decide.check_precondition(live(created(), forwarded(3)), if_match)


@pytest.mark.parametrize("if_match", [0, 1, 3])
def test_another_precondition_fails(if_match: Version) -> None:
    with pytest.raises(PreconditionFailed) as refused:
        decide.check_precondition(live(created(), forwarded(3)), if_match)
    assert refused.value.facts["expected_version"] == if_match
    assert refused.value.facts["current_version"] == 2


# create


def creation(text: str = "abc", **changes: Any) -> StateCreated:
    return decide.create(
        model_id=MODEL,
        model_type="causal_lm",
        model_revision=None,
        model_context=MODEL_CONTEXT,
        config=config(**changes),
        metadata={},
        content=fragment(text),
    )


def test_a_state_is_created() -> None:
    assert creation("abc", context_size=3) == created("abc", context_size=3)


def test_a_context_above_the_models_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"config\.context_size: must be at most 64"):
        creation(context_size=MODEL_CONTEXT + 1)


def test_content_above_the_context_is_too_large() -> None:
    with pytest.raises(TooLarge, match="4 tokens do not fit") as refused:
        creation("abcd", context_size=3)
    assert refused.value.facts == {"tokens": 4, "head_position": 0, "context_size": 3}


# forward


def test_text_is_forwarded_at_the_head() -> None:
    state = live(created("abc", context_size=5))
    event = decide.forward(state, fragment("de"), scores(2))
    assert event == TextForwarded(start=3, content=fragment("de"), scores=scores(2))


def test_text_that_does_not_fit_is_too_large() -> None:
    with pytest.raises(TooLarge) as refused:
        decide.forward(live(created("abc", context_size=4)), fragment("de"), scores(2))
    assert refused.value.facts == {"tokens": 2, "head_position": 3, "context_size": 4}


# generate


def test_a_generation_takes_from_the_config_what_is_not_wished() -> None:
    state = live(created("abc", temperature=0.5, top_k=7, top_p=0.9, seed=11))
    assert decide.plan_generation(state, GenerationWish(), fresh_seed=99) == GenerationPlan(
        parameters=GenerationParameters(
            sampling=SamplingParameters(temperature=0.5, top_k=7, top_p=0.9), max_tokens=16
        ),
        seed=11,
        max_new=16,
    )


def test_a_wish_goes_before_the_config() -> None:
    wish = GenerationWish(
        max_tokens=5,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        seed=3,
        stop_sequences=("end",),
        stop_token_ids=(4,),
        top_logprobs=2,
    )
    state = live(created("abc", temperature=0.5, top_k=7, top_p=0.9, seed=11))
    assert decide.plan_generation(state, wish, fresh_seed=99) == GenerationPlan(
        parameters=GenerationParameters(
            sampling=SamplingParameters(temperature=0.0, top_k=0, top_p=1.0),
            max_tokens=5,
            stop_sequences=("end",),
            stop_token_ids=(4,),
            top_logprobs=2,
        ),
        seed=3,
        max_new=5,
    )


@pytest.mark.parametrize(
    ("configured", "wished", "planned"),
    [
        (None, UNSET, 99),
        (None, None, 99),
        (11, UNSET, 11),
        (11, None, 99),
        (11, 0, 0),
        (0, UNSET, 0),
    ],
)
def test_a_fresh_seed_is_used_where_the_seed_is_null(
    configured: int | None, wished: Any, planned: int
) -> None:
    state = live(created(seed=configured))
    assert decide.plan_generation(state, GenerationWish(seed=wished), 99).seed == planned


@pytest.mark.parametrize(("held", "max_new"), [("abc", 5), ("abcdef", 2), ("abcdefgh", 0)])
def test_a_generation_ends_where_the_context_ends(held: str, max_new: int) -> None:
    state = live(created(held, context_size=8))
    plan = decide.plan_generation(state, GenerationWish(max_tokens=5), 0)
    assert (plan.max_new, plan.parameters.max_tokens) == (max_new, 5)


def test_more_tokens_than_any_context_holds_are_refused() -> None:
    with pytest.raises(InvalidInput, match="max_tokens: must be at most 8"):
        decide.plan_generation(live(created(context_size=8)), GenerationWish(max_tokens=9), 0)


# config


def test_settings_change() -> None:
    changes = ConfigChanges(temperature=0.5, context_size=3, seed=None)
    assert decide.change_config(live(created("abc")), changes, MODEL_CONTEXT) == ConfigChanged(
        changes=changes
    )


def test_changing_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one setting"):
        decide.change_config(live(), ConfigChanges(), MODEL_CONTEXT)


@pytest.mark.parametrize(("size", "limit"), [(65, "at most 64"), (2, "at least 3")])
def test_a_context_that_does_not_fit_is_refused(size: int, limit: str) -> None:
    with pytest.raises(InvalidInput, match=limit):
        decide.change_config(live(created("abc")), ConfigChanges(context_size=size), MODEL_CONTEXT)


# rewind


@pytest.mark.parametrize("position", [1, 2, 3])
def test_a_state_is_rewound(position: int) -> None:
    assert decide.rewind(live(created("abc")), position) == HeadRewound(to_position=position)


@pytest.mark.parametrize("position", [-1, 0, 4])
def test_rewinding_outside_the_state_is_refused(position: int) -> None:
    with pytest.raises(InvalidInput, match="position: must be from 1 to 3"):
        decide.rewind(live(created("abc")), position)


def test_a_state_is_rewound_to_an_earlier_version() -> None:
    then = live(created("abc"))
    now = live(created("abc"), forwarded(3, "de"), generated(5, "f"))
    assert decide.rewind_to(now, then) == HeadRewound(to_position=3)


@pytest.mark.parametrize(
    "now",
    [
        live(created("abc"), HeadRewound(to_position=2), forwarded(2, "x")),
        live(created("abc"), HeadRewound(to_position=2)),
    ],
)
def test_a_version_whose_tokens_were_cut_is_no_prefix(now: Live) -> None:
    with pytest.raises(NotAPrefix, match="fork that version instead"):
        decide.rewind_to(now, live(created("abc")))


# fork


def forked(parent: Live, position: int | None = None, **changes: Any) -> StateCreated:
    return decide.fork(
        parent,
        position=position,
        changes=ConfigChanges(**changes),
        metadata={"of": "a fork"},
        model_context=MODEL_CONTEXT,
    )


@pytest.mark.parametrize(("position", "text"), [(None, "abcd"), (4, "abcd"), (2, "ab"), (1, "a")])
def test_a_fork_begins_with_the_first_tokens_of_its_parent(position: int | None, text: str) -> None:
    parent = live(created("abc", seed=4), forwarded(3))
    event = forked(parent, position, temperature=0.5)
    assert event == StateCreated(
        origin=Fork(state_id=state_id(), version=2, head_position=len(text)),
        model_id=MODEL,
        model_type="causal_lm",
        model_revision=None,
        config=config(seed=4, temperature=0.5),
        metadata={"of": "a fork"},
        content=fragment(text),
    )


@pytest.mark.parametrize("position", [0, 4])
def test_a_fork_outside_its_parent_is_refused(position: int) -> None:
    with pytest.raises(InvalidInput, match="position: must be from 1 to 3"):
        forked(live(created("abc")), position)


def test_a_fork_with_a_context_above_the_models_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at most 64"):
        forked(live(), context_size=MODEL_CONTEXT + 1)


def test_a_fork_that_does_not_fit_its_context_is_too_large() -> None:
    with pytest.raises(TooLarge):
        forked(live(created("abc")), context_size=2)
    assert forked(live(created("abc")), 2, context_size=2).content == fragment("ab")


# delete


def test_a_state_is_deleted() -> None:
    assert decide.delete(live()) == StateDeleted()


# resume

BEGUN = started(seed=5)


def test_a_request_that_began_nothing_gets_a_fresh_seed() -> None:
    assert decide.seed_to_resume(None, live(created()), "f", 7) == 7


def test_a_cut_stream_gets_the_seed_it_began_with() -> None:
    assert decide.seed_to_resume(BEGUN, live(created()), BEGUN.fingerprint, 7) == BEGUN.seed


def test_a_cut_stream_is_refused_once_the_state_has_moved_on() -> None:
    with pytest.raises(VersionConflict) as refused:
        decide.seed_to_resume(BEGUN, live(created(), forwarded(3)), BEGUN.fingerprint, 7)
    assert refused.value.facts["current_version"] == 2


def test_a_cut_stream_is_refused_under_another_fingerprint_naming_both() -> None:
    with pytest.raises(FingerprintChanged) as refused:
        decide.seed_to_resume(BEGUN, live(created()), "another", 7)
    assert refused.value.facts["begun_fingerprint"] == BEGUN.fingerprint
    assert refused.value.facts["current_fingerprint"] == "another"
