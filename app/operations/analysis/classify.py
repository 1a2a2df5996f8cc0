"""Which class a text belongs to: by a classifier, or by the likelihood of labels."""

import asyncio

from app.operations.analysis.materials import Materials
from domain.analysis.classify import classified, likeliest_label
from domain.analysis.parameters import ClassifyParameters
from domain.analysis.result import Result
from domain.errors import FieldProblem, InvalidInput, TooLarge, invalid
from domain.fingerprint import Fingerprint
from domain.ids import TokenId
from domain.models import Classifier, LanguageModel
from domain.state import Live
from domain.work import ScoreRequest


async def classify(
    materials: Materials, state: Live, parameters: ClassifyParameters
) -> tuple[Result, Fingerprint]:
    """Classify the text of a state, or another one with its classifier.

    With ``labels``, what is classified is the text of the state and the other one after it.

    Raises:
        InvalidInput: labels that the model cannot be asked about, or none where it needs some.
        TooLarge: a text that does not fit into the model's context.
    """
    model = await materials.any_model(state)
    if model.model_type == "causal_lm":
        result = await _by_likelihood(model, state, parameters, private=materials.private)
    else:
        result = await _by_classifier(model, state, parameters)
    return result, model.fingerprint


async def _by_classifier(model: Classifier, state: Live, parameters: ClassifyParameters) -> Result:
    if parameters.labels is not None:
        known = ", ".join(map(repr, model.labels[:10]))
        raise invalid(
            "labels", f"must not be given: the classifier has its own, {known}; leave them out"
        )
    tokens = state.content.tokens
    if parameters.text is not None:
        room = model.context_size
        tokens = await _encode(model, parameters.text, beginning=True, room=room)
    logits = await model.logits(tokens)
    return await asyncio.to_thread(classified, logits, model.labels, model.problem)


async def _by_likelihood(
    model: LanguageModel, state: Live, parameters: ClassifyParameters, *, private: bool
) -> Result:
    labels = parameters.labels
    if labels is None:
        raise invalid("labels", "is required for a causal_lm state, or use a state of a classifier")
    before, room = state.content.tokens, model.context_size
    if parameters.text is not None:
        room -= len(before)
        before += await _encode(model, parameters.text, beginning=False, room=room)
    tokens = await _label_tokens(model, labels, room=model.context_size - len(before))
    requests = [ScoreRequest(tokens=before + own, start=len(before)) for own in tokens]
    scored = await model.score(requests, private=private)
    logprobs = [one.scores.logprobs for one in scored]
    return await asyncio.to_thread(likeliest_label, labels, tokens, logprobs)


async def _label_tokens(
    model: LanguageModel, labels: tuple[str, ...], *, room: int
) -> list[tuple[TokenId, ...]]:
    """The tokens of each label, as it goes on after a text."""
    tokens: list[tuple[TokenId, ...]] = []
    problems = []
    for index, label in enumerate(labels):
        try:
            own = await model.encode(label, beginning=False, room=room)
        except TooLarge:
            own = ()
            rule = f"does not fit: the text leaves room for {room} tokens"
        else:
            rule = "has no tokens in this model's vocabulary"
            if len(own) > room:
                rule = f"has {len(own)} tokens, the text leaves room for {room}"
        if label in labels[:index]:
            problems.append(FieldProblem(f"labels[{index}]", f"names {label!r} twice"))
        elif not 0 < len(own) <= room:
            problems.append(FieldProblem(f"labels[{index}]", rule))
        tokens.append(own)
    if problems:
        raise InvalidInput(*problems)
    return tokens


async def _encode(
    model: Classifier | LanguageModel, text: str, *, beginning: bool, room: int
) -> tuple[TokenId, ...]:
    """Tokens of a text that is not empty and fits."""
    if not text:
        raise invalid("text", "must not be empty; leave it out for the state's own")
    tokens = await model.encode(text, beginning=beginning, room=room)
    if not tokens:
        raise invalid("text", "has no tokens in this model's vocabulary")
    if len(tokens) > room:
        raise TooLarge(
            f"a text of {len(tokens)} tokens does not fit: there is room for {room}",
            tokens=len(tokens),
            room=room,
        )
    return tokens
