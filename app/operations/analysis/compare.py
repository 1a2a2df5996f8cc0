"""Two states, or two versions of one, held against each other token by token."""

import struct

from msgspec.structs import asdict

from app.operations.analysis.materials import Materials
from app.operations.diff import next_tokens, speak_alike
from app.service import Service
from domain.analysis.compare import PLACE_BYTES, ComparedToken, CompareFacts, asked_places
from domain.analysis.parameters import CompareParameters, CompareWish, Parameters, Question
from domain.analysis.ranges import check_size
from domain.analysis.result import Result, Tensor
from domain.diff import diff
from domain.errors import FingerprintChanged, invalid
from domain.models import LanguageModel
from domain.plan import check_language
from domain.state import Live


async def settled(service: Service, question: Question) -> Parameters:
    """A question that stays the same: of a comparison, with the other state as it is now.

    Raises:
        StateNotFound, StateIsDeleted, StateIsErased, VersionNotFound: there is no such other state.
        InvalidInput: the other state is one of a classifier.
        ModelNotFound, ModelUnavailable, NotRunnable: its model cannot be had.
    """
    if not isinstance(question, CompareWish):
        return question
    other = await service.as_it_was(question.other_state_id, question.other_version)
    check_language(other, field="other_state_id")
    model = await service.model(other)
    return CompareParameters(
        other_state_id=other.state_id,
        other_version=other.version,
        other_fingerprint=model.fingerprint.id,
        start=question.start,
        end=question.end,
    )


async def compare_states(
    materials: Materials, model: LanguageModel, state: Live, parameters: CompareParameters
) -> Result:
    """Where another state, or another version of this one, says something else.

    Raises:
        NotFound, StateIsErased: there is no such other state.
        InvalidInput: its tokens mean something else, or there is no such range.
        ResultTooLarge: the range is too long.
        FingerprintChanged: its model has other numerics than when this was asked first.
    """
    other = await materials.state(parameters.other_state_id, parameters.other_version)
    models = model, await materials.model(other)
    begun, current = parameters.other_fingerprint, models[1].fingerprint.id
    if begun is not None and begun != current:
        raise FingerprintChanged(other.state_id, begun, current)
    if not speak_alike(*models):
        raise invalid(
            "other_state_id",
            f"is a state of {other.model_id}, whose vocabulary is not that of {state.model_id}:"
            " their distributions are over different tokens",
        )
    found = diff(state, other)
    asked = asked_places(found, parameters, min(each.context_size for each in models))
    remedy = "Ask for fewer positions with start and end"
    check_size(len(asked) * PLACE_BYTES, model.max_result_bytes, remedy)
    compared = [
        ComparedToken(**asdict(one), changed=one.top_a.token_id != one.top_b.token_id)
        for one in await next_tokens((state, other), models, asked, private=materials.private)
    ]
    facts = CompareFacts(
        a=found.a,
        b=found.b,
        same_model=found.same_model,
        common_prefix=found.common_prefix,
        start=asked.start,
        end=asked.stop,
        positions=tuple(compared),
        changed=sum(one.changed for one in compared),
    )
    kl = Tensor(
        name="kl",
        shape=(len(compared),),
        dtype="float64",
        data=struct.pack(f"<{len(compared)}d", *(one.kl for one in compared)),
        start=asked.start,
        end=asked.stop,
        inline=False,
    )
    return Result(facts=facts, tensors=(kl,))
