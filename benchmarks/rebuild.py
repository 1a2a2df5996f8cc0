"""Rebuilding a state against generating it, and generating against plain transformers."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from app.bootstrap import open_models
from app.settings import Settings
from benchmarks.table import seconds, show
from domain.config import GenerationParameters, SamplingParameters
from domain.ids import ModelId, TokenId
from domain.ports import Drawing, GenerationRequest
from infra.engine.language_model import TransformersModel
from infra.models.catalogue import source_of

PROMPT_TOKENS = 16
NEW_TOKENS = 512
ROUNDS = 3


def gpt2_shape(folder: Path) -> Path:
    """A model of GPT-2's shape (124 M parameters) with random weights, saved to a folder."""
    target = folder / "gpt2-shape"
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source_of("cacher-tiny").location)
    tokenizer.save_pretrained(target)
    return target


def request(tokens: tuple[TokenId, ...], new: int) -> GenerationRequest:
    """A greedy continuation that no end-of-sequence token of the shape cuts short."""
    sampling = SamplingParameters(temperature=0, top_k=0, top_p=1)
    return GenerationRequest(
        tokens=tokens,
        parameters=GenerationParameters(sampling=sampling, max_tokens=new),
        drawing=Drawing(
            sampling=sampling, seed=0, top_logprobs=0, store_logits="none", top_k_logits=1
        ),
        max_new=new,
        context_size=1024,
    )


async def generate(model: TransformersModel, tokens: tuple[TokenId, ...], new: int) -> list[int]:
    """Tokens that the engine draws."""
    return [step.drawn.token_id async for step in model.generate(request(tokens, new))]


async def run(threads: int) -> None:
    """Measure, alternating the arms, and print."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cacher-tiny", str(gpt2_shape(Path(folder)))):
            settings = Settings(model_name=name, threads=threads, hot_cache_bytes=2 << 30)
            async with open_models(settings) as models:
                await _measure(await models.get(models.default), name, threads)


async def _measure(model: TransformersModel, name: str, threads: int) -> None:
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(source_of(name).location)
    prompt = tuple(TokenId(1 + i) for i in range(PROMPT_TOKENS))
    times: dict[str, list[float]] = {"generate": [], "rebuild": [], "plain": []}
    for _ in range(ROUNDS):
        await model.forget()
        new: list[int] = []

        async def generating(new: list[int] = new) -> None:
            new += await generate(model, prompt, NEW_TOKENS)

        async def in_transformers(new: list[int] = new) -> None:
            torch.set_num_threads(threads or torch.get_num_threads())
            plain.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, PROMPT_TOKENS, dtype=torch.long),
                max_new_tokens=len(new),
                min_new_tokens=len(new),
                do_sample=False,
            )

        times["generate"].append(await seconds(generating))
        whole = prompt + tuple(TokenId(token) for token in new)
        await model.forget()
        times["rebuild"].append(await seconds(lambda whole=whole: generate(model, whole, 1)))
        times["plain"].append(await seconds(in_transformers))
        tokens = len(new)
    median = {arm: statistics.median(values) for arm, values in times.items()}
    show(
        f"{ModelId(Path(name).name)}: {tokens} tokens after {PROMPT_TOKENS}, one sequence",
        ("what", "seconds", "ratio"),
        [
            ("generate, plain transformers", f"{median['plain']:.3f}", "1"),
            _row("generate, engine", median["generate"], median["plain"]),
            _row("rebuild by prefill, against generating", median["rebuild"], median["generate"]),
        ],
    )


def _row(what: str, time_s: float, base_s: float) -> tuple[str, str, str]:
    return what, f"{time_s:.3f}", f"{base_s / time_s:.2f}x faster"
