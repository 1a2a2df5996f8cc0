"""Given a state, when a client wishes that it goes on, then a plan or a refusal."""

from typing import Any

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from domain import plan
from domain.config import (
    BeamParameters,
    ConfigChanges,
    Constraint,
    GenerationParameters,
    LogitsParameters,
    ModelType,
    SamplingParameters,
)
from domain.errors import FingerprintChanged, InvalidInput, NotRunnable, VersionConflict
from domain.plan import (
    MAX_DRAWN,
    MAX_KEPT_BYTES,
    MAX_SLIDES,
    BeamWish,
    ConstraintWish,
    GenerationPlan,
    GenerationWish,
)
from tests.builders import (
    MODEL_CONTEXT,
    SAMPLING,
    created,
    forwarded,
    generated,
    live,
    recorded,
    started,
)

# generate


def test_a_generation_takes_from_the_config_what_is_not_wished() -> None:
    state = live(created("abc", temperature=0.5, top_k=7, top_p=0.9, seed=11))
    assert plan.plan_generation(state, GenerationWish(), fresh_seed=99) == GenerationPlan(
        parameters=GenerationParameters(
            sampling=SamplingParameters(temperature=0.5, top_k=7, top_p=0.9), max_tokens=16
        ),
        seed=11,
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
    assert plan.plan_generation(state, wish, fresh_seed=99) == GenerationPlan(
        parameters=GenerationParameters(
            sampling=SamplingParameters(temperature=0.0, top_k=0, top_p=1.0),
            max_tokens=5,
            stop_sequences=("end",),
            stop_token_ids=(4,),
            top_logprobs=2,
        ),
        seed=3,
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
    assert plan.plan_generation(state, GenerationWish(seed=wished), 99).seed == planned


def test_every_sampling_setting_comes_from_the_config_or_from_the_wish() -> None:
    settings: dict[str, Any] = {
        "logit_bias": {5: -100.0},
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "bad_words_ids": ((1, 2),),
        "temperature": 0.75,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.125,
        "typical_p": 0.625,
    }
    expected = SamplingParameters(**settings)
    assert set(settings) == set(SamplingParameters.__struct_fields__)
    configured = plan.plan_generation(live(created(**settings)), GenerationWish(), 0)
    wished = plan.plan_generation(live(), GenerationWish(**settings), 0)
    assert configured.parameters.sampling == expected == wished.parameters.sampling


@pytest.mark.parametrize(
    "settings", [{"stop_sequences": ("end",)}, {"stop_token_ids": (4,)}, {"ignore_eos": True}]
)
def test_stops_come_from_the_config_and_a_wish_goes_before_it(settings: dict[str, Any]) -> None:
    state, off = (
        live(created(**settings)),
        {name: type(value)() for name, value in settings.items()},
    )
    for wish, expected in ((GenerationWish(), settings), (GenerationWish(**off), off)):
        parameters = plan.plan_generation(state, wish, 0).parameters
        assert {name: getattr(parameters, name) for name in settings} == expected


def test_more_tokens_than_any_context_holds_are_refused() -> None:
    with pytest.raises(InvalidInput, match="max_tokens: must be at most 8, the context_size"):
        plan.plan_generation(live(created(context_size=8)), GenerationWish(max_tokens=9), 0)


def test_a_state_that_slides_may_generate_more_than_it_holds_up_to_what_is_recorded() -> None:
    state, most = live(created(context_size=8, on_full="slide")), 4 * MAX_SLIDES
    wish = GenerationWish(max_tokens=most)
    assert plan.plan_generation(state, wish, 0).parameters.max_tokens == most
    with pytest.raises(InvalidInput, match=f"max_tokens: must be at most {most}"):
        plan.plan_generation(state, GenerationWish(max_tokens=most + 1), 0)


# several ways


@pytest.mark.parametrize(
    ("storage", "branches", "most"),
    [
        ("none", 1, MAX_DRAWN),
        ("none", 128, MAX_DRAWN // 128),
        ("top_k", 16, MAX_DRAWN // 16),
        ("full", 1, MAX_KEPT_BYTES // 200_000),
        ("full", 16, MAX_KEPT_BYTES // 200_000 // 16),
    ],
)
def test_several_ways_draw_no_more_tokens_together_than_can_be_recorded_with_what_is_kept(
    storage: str, branches: int, most: int
) -> None:
    kept = live(created(store_logits=storage)).config
    for count in (most, most + 1):
        parameters = GenerationParameters(sampling=SAMPLING, max_tokens=count)
        if count == most:
            plan.check_kept(kept, parameters, branches, vocabulary_size=50_000)
            continue
        with pytest.raises(InvalidInput, match=f"max_tokens: must be at most {most} for n"):
            plan.check_kept(kept, parameters, branches, vocabulary_size=50_000)


# constraints


@pytest.mark.parametrize(
    ("wish", "kind", "text"),
    [
        (ConstraintWish(regex="a+"), "regex", "a+"),
        (ConstraintWish(lark="start: /a/"), "lark", "start: /a/"),
        (ConstraintWish(json_schema=False), "json_schema", "false"),
        (
            ConstraintWish(json_schema={"b": 1, "a": "é"}),
            "json_schema",
            '{"b":1,"a":"é"}',
        ),
    ],
)
def test_a_constraint_is_kept_as_it_was_written(wish: ConstraintWish, kind: Any, text: str) -> None:
    assert wish.resolve() == Constraint(kind=kind, text=text)


@pytest.mark.parametrize("wish", [ConstraintWish(), ConstraintWish(regex="a", lark="b")])
def test_a_constraint_is_one_of_three(wish: ConstraintWish) -> None:
    with pytest.raises(InvalidInput, match="constraint: must have one of regex, json_schema"):
        wish.resolve()


# beams


def test_a_beam_search_takes_from_the_config_what_is_not_wished() -> None:
    state = live(created(repetition_penalty=2.0, stop_token_ids=(4,), ignore_eos=True))
    assert plan.plan_beams(state, BeamWish(max_length=5, num_beams=2), 8) == BeamParameters(
        logits=LogitsParameters(repetition_penalty=2.0),
        max_tokens=5,
        num_beams=2,
        stop_token_ids=(4,),
        ignore_eos=True,
    )


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"num_beams": 9}, "num_beams"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups"),
        ({"num_beams": 4, "diversity_penalty": 0.5}, "diversity_penalty"),
        ({"num_beams": 2, "num_return": 3}, "num_return"),
        ({"max_length": MODEL_CONTEXT + 1}, "max_length"),
    ],
)
def test_a_beam_search_that_cannot_be_is_refused_by_name(wish: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        plan.plan_beams(live(), BeamWish(**wish), 8)
    assert [problem.field for problem in refused.value.facts["errors"]] == [field]


# ids of tokens


def test_ids_outside_the_vocabulary_are_named_wherever_they_are() -> None:
    wish = ConfigChanges(
        logit_bias={8: 1.0, 7: 1.0, 5000: 1.0},
        stop_token_ids=(0, 9),
        bad_words_ids=((1,), (7, 8)),
    )
    with pytest.raises(InvalidInput) as refused:
        plan.check_tokens(wish, 8, "config.")
    assert [problem.field for problem in refused.value.facts["errors"]] == [
        "config.logit_bias.8",
        "config.logit_bias.5000",
        "config.stop_token_ids[1]",
        "config.bad_words_ids[1][1]",
    ]
    with pytest.raises(InvalidInput, match=r"^logit_bias\.5000: must be from 0 to 8$"):
        plan.check_tokens(GenerationWish(logit_bias={5000: 1.0}), 9)
    plan.check_tokens(wish, 5001)


# resume

BEGUN = started(seed=5)


def test_a_request_that_began_nothing_gets_a_fresh_seed() -> None:
    assert plan.seed_to_resume(None, live(created()), "f", 7) == 7


def test_a_cut_stream_gets_the_seed_it_began_with() -> None:
    assert plan.seed_to_resume(BEGUN, live(created()), BEGUN.fingerprint, 7) == BEGUN.seed


def test_a_cut_stream_is_refused_once_the_state_has_moved_on() -> None:
    with pytest.raises(VersionConflict) as refused:
        plan.seed_to_resume(BEGUN, live(created(), forwarded(3)), BEGUN.fingerprint, 7)
    assert refused.value.facts["current_version"] == 2


def test_a_cut_stream_is_refused_under_another_fingerprint_naming_both() -> None:
    with pytest.raises(FingerprintChanged) as refused:
        plan.seed_to_resume(BEGUN, live(created()), "another", 7)
    assert refused.value.facts["begun_fingerprint"] == BEGUN.fingerprint
    assert refused.value.facts["current_fingerprint"] == "another"


def test_what_was_cut_off_goes_on_where_it_ended() -> None:
    state = live(created(), generated(3))
    cut_off = recorded(generated(3), version=2, fingerprint="f")
    plan.check_resumable(cut_off, state, "f")
    with pytest.raises(VersionConflict):
        plan.check_resumable(cut_off, live(created(), generated(3), forwarded(4)), "f")
    with pytest.raises(FingerprintChanged):
        plan.check_resumable(cut_off, state, "g")


# models


def test_only_a_state_of_a_language_model_goes_on() -> None:
    state = live(created("abc"))
    plan.check_language(state)
    with pytest.raises(InvalidInput, match="state_id: is a state of a classifier"):
        plan.check_language(replace(state, model_type="sequence_classification"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (("sequence_classification", 512, 64), "it is a causal_lm state"),
        (("causal_lm", 98, 64), "tokens beyond 0 to 97"),
        (("causal_lm", 512, 7), "its context_size is 8, that of the model 7"),
    ],
)
def test_a_state_of_another_model_is_not_runnable(
    model: tuple[ModelType, int, int], reason: str
) -> None:
    state = live(created("abc", context_size=8))
    plan.check_runnable(state, "causal_lm", 512, 8)
    with pytest.raises(NotRunnable, match=reason):
        plan.check_runnable(state, *model)
