"""Requests to a loaded model, as tests make them."""

from collections.abc import Sequence
from typing import Any

from domain.config import GenerationParameters, SamplingParameters
from domain.ids import TokenId
from domain.work import Drawing, GenerationRequest, Redraw, Scored, ScoreRequest, Step
from infra.engine.language_model import TransformersModel

WARM = SamplingParameters(temperature=0.9, top_k=40, top_p=0.95)
GREEDY = SamplingParameters(temperature=0.0, top_k=0, top_p=1.0)


def drawing(sampling: SamplingParameters = WARM, seed: int = 42, **changes: Any) -> Drawing:
    chosen: dict[str, Any] = {"top_logprobs": 2, "store_logits": "none", "top_k_logits": 5}
    return Drawing(sampling=sampling, seed=seed, **(chosen | changes))


def request(
    tokens: Sequence[int],
    max_new: int,
    *,
    sampling: SamplingParameters = WARM,
    seed: int = 42,
    context_size: int = 1024,
    **changes: Any,
) -> GenerationRequest:
    return GenerationRequest(
        tokens=tuple(map(TokenId, tokens)),
        parameters=GenerationParameters(sampling=sampling, max_tokens=max(1, max_new)),
        drawing=drawing(sampling, seed, **changes),
        max_new=max_new,
        context_size=context_size,
    )


async def steps(model: TransformersModel, asked: GenerationRequest) -> list[Step]:
    """Every step of a generation."""
    return [step async for step in model.generate(asked)]


async def score(
    model: TransformersModel,
    tokens: Sequence[int],
    start: int,
    *redraws: Redraw,
    private: bool = False,
) -> Scored:
    """The scores of one text from ``start`` on."""
    asked = ScoreRequest(tokens=tuple(map(TokenId, tokens)), start=start, redraws=redraws)
    (scored,) = await model.score([asked], private=private)
    return scored


def tokens_of(made: Sequence[Step]) -> list[int]:
    return [step.drawn.token_id for step in made]


def redraw(start: int, count: int, asked: GenerationRequest) -> Redraw:
    """Asks what ``asked`` would draw at ``count`` positions from ``start`` on."""
    return Redraw(start=start, stop=start + count, drawing=asked.drawing)
