"""Make the two embedded models from nothing: stories, tokenizer, story teller and sentiment model.

One command writes both folders, each a complete local checkpoint:

    python scripts/train_embedded_models.py

The same seed on the same machine gives the same files.
"""

import argparse
import random
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from feelings import say_feeling
from stories import TONES, Story, retell, tell_story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2PreTrainedModel,
    PreTrainedTokenizerFast,
)

TELLER, CRITIC = "cacher-tiny", "cacher-tiny-sentiment"
END = "<|endoftext|>"
END_ID = 0
VOCABULARY = 1024
CONTEXT = 1024
FIRST_WINDOW = 64
TOKENS_PER_STEP = 2048
TEXTS_PER_STEP = 32
SAMPLE_SEEDS = (1, 2, 3)

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How much of everything to make; ``seed`` decides all random choices."""

    seed: int
    stories: int
    steps: int
    sentiment_steps: int
    sample_tokens: int

    @property
    def command(self) -> str:
        """The command line that repeats this recipe."""
        options = " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in vars(self).items()
        )
        return f"python scripts/train_embedded_models.py {options}"


def is_held_out(text: str) -> bool:
    """Whether a text is kept away from training: one in twenty, decided by its content."""
    return zlib.crc32(text.encode()) % 20 == 0


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every byte has a token, so any text comes back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def small_config(width: int, layers: int, heads: int, **more: Any) -> GPT2Config:
    """A GPT-2 configuration for the shared tokenizer, without dropout."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        **more,
    )


def to_stream(tokenizer: PreTrainedTokenizerFast, stories: list[Story]) -> torch.Tensor:
    """All stories as one stream of token ids [tokens], each after an end-of-text token."""
    rows = tokenizer([story.text for story in stories])["input_ids"]
    return torch.tensor([token for row in rows for token in (END_ID, *row)])


def story_starts(stream: torch.Tensor) -> list[int]:
    """Where the stories begin that have a full context of the stream from there on."""
    return [int(at) for at in (stream[:-CONTEXT] == END_ID).nonzero()]


def window_width(progress: float) -> int:
    """The window in tokens when a share ``progress`` of the training is done.

    The beginning of a story is enough to learn that names come back, and far quicker than whole
    stories are. Then the window grows slowly, which keeps what is learned, to the full context.
    """
    growth = min(1.0, max(0.0, (progress - 0.25) / 0.6))
    return int(FIRST_WINDOW * (CONTEXT / FIRST_WINDOW) ** growth)


def story_batches(stream: torch.Tensor, steps: int, rng: random.Random) -> Iterator[Batch]:
    """Growing windows of the stream [rows, width], about TOKENS_PER_STEP tokens in each batch.

    Every window starts at a story, half of them without its end-of-text token in front, because
    prompts mostly lack it.
    """
    begins = story_starts(stream)
    for step in range(steps):
        width = window_width(step / steps)
        starts = [rng.choice(begins) + rng.randint(0, 1) for _ in range(TOKENS_PER_STEP // width)]
        ids = torch.stack([stream[start : start + width] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def say_short(rng: random.Random) -> tuple[str, int, bool]:
    """A short text, its tone and whether it is held out."""
    text, tone = say_feeling(rng)
    return text, tone, is_held_out(text)


def say_part(rng: random.Random) -> tuple[str, int, bool]:
    """A part of a new story, its tone and whether the story is held out."""
    story = tell_story(rng)
    return retell(rng, story), story.tone, is_held_out(story.text)


def say_whole(rng: random.Random) -> tuple[str, int, bool]:
    """A new story, its tone and whether it is held out."""
    story = tell_story(rng)
    return story.text, story.tone, is_held_out(story.text)


SAYINGS: dict[str, Callable[[random.Random], tuple[str, int, bool]]] = {
    "short sentences": say_short,
    "parts of stories": say_part,
    "whole stories": say_whole,
}


def gather(rng: random.Random, kind: str, count: int, held_out: bool) -> list[tuple[str, int]]:
    """``count`` labelled texts of one kind from the wanted side of the held-out split."""
    found: list[tuple[str, int]] = []
    while len(found) < count:
        text, tone, is_out = SAYINGS[kind](rng)
        if is_out == held_out:
            found.append((text, tone))
    return found


def label_batch(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, int]]) -> Batch:
    """Texts as right-padded ids and mask [rows, longest] with their tones [rows]."""
    padded = tokenizer([text for text, _ in texts], padding=True, return_tensors="pt")
    labels = torch.tensor([tone for _, tone in texts])
    return {
        "input_ids": padded["input_ids"],
        "attention_mask": padded["attention_mask"],
        "labels": labels,
    }


def tone_batches(
    tokenizer: PreTrainedTokenizerFast, steps: int, rng: random.Random
) -> Iterator[Batch]:
    """Batches of one kind of text each, at shifted positions so that all of them are trained."""
    kinds = list(SAYINGS)
    for _ in range(steps):
        kind = rng.choices(kinds, weights=(7, 2, 1))[0]
        batch = label_batch(tokenizer, gather(rng, kind, TEXTS_PER_STEP, held_out=False))
        width = batch["input_ids"].shape[1]
        shift = rng.choice((0, rng.randint(0, CONTEXT - width)))
        yield {**batch, "position_ids": torch.arange(shift, shift + width)[None]}


def make_optimizers(model: GPT2PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, for it learns in half the steps; AdamW for the rest."""
    weights = dict(model.named_parameters())
    blocks = [name for name, weight in weights.items() if ".h." in name and weight.ndim == 2]
    others = [weights[name] for name in weights if name not in blocks]
    return [
        torch.optim.Muon([weights[name] for name in blocks], lr=2e-2, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def fit(model: GPT2PreTrainedModel, batches: Iterator[Batch], steps: int) -> float:
    """Train at full rate for half of the steps, then ever slower; the mean loss of the last tenth.

    The loss is in nats, a token or a text.
    """
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
        for optimizer in optimizers
    ]
    losses: list[float] = []
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        model.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"  step {step}/{steps}: loss {sum(losses[-100:]) / 100:.3f}", flush=True)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


@torch.inference_mode()
def held_out_loss(model: GPT2LMHeadModel, stream: torch.Tensor) -> tuple[float, float]:
    """Mean loss in nats a token over full contexts: at all positions, and at the last quarter.

    Every context starts at a story, as in training.
    """
    windows = torch.stack([stream[at : at + CONTEXT] for at in story_starts(stream)[::20]])
    logits = torch.cat([model(window[None]).logits for window in windows])
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none"
    )
    return float(losses.mean()), float(losses[:, -CONTEXT // 4 :].mean())


@torch.inference_mode()
def accuracy(model: GPT2ForSequenceClassification, batch: Batch) -> float:
    """The share of texts whose likelier label is the right one."""
    return float((model(**batch).logits.argmax(dim=-1) == batch["labels"]).float().mean())


def sample_story(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int
) -> str:
    """One story of at most ``tokens`` tokens, told from the end-of-text token alone."""
    torch.manual_seed(seed)
    start = torch.tensor([[END_ID]])
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, temperature=0.7, top_p=0.9,
        top_k=0, max_new_tokens=tokens,
    )  # fmt: skip
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def teller_card(
    recipe: Recipe, size: int, loss: float, held_out: tuple[float, float], samples: list[str]
) -> str:
    """The model card of the story teller."""
    told = "\n\n".join(
        f"Seed {seed}:\n\n> {story}" for seed, story in zip(SAMPLE_SEEDS, samples, strict=True)
    )
    return f"""# {TELLER}

A very small GPT-2 that tells very small stories in English. It ships with the repository, so that
everything runs on a fresh machine without a download. It knows nothing about the real world.

- Made by `{recipe.command}`
- Text: {recipe.stories} stories told by the grammar in `scripts/stories.py`, one in twenty held out
- Parameters: {size:,} (fp32, tied embeddings), context {CONTEXT} tokens
- Tokenizer: byte-level BPE with {VOCABULARY} tokens; any Unicode text round-trips exactly;
  `{END}` (id {END_ID}) begins, ends and pads
- Training loss: {loss:.3f} nats a token (mean of the last tenth of the steps)
- Held-out loss: {held_out[0]:.3f} nats a token over full contexts, {held_out[1]:.3f} in their last
  quarter

## Samples

Temperature 0.7, top_p 0.9, from `{END}` alone.

{told}
"""


def critic_card(recipe: Recipe, size: int, loss: float, scores: dict[str, float]) -> str:
    """The model card of the sentiment model."""
    lines = "\n".join(f"- {kind}: {score:.1%}" for kind, score in scores.items())
    return f"""# {CRITIC}

A very small GPT-2 classifier that says whether a little story or a short sentence ends on a
{TONES[0]} or a {TONES[1]} tone. It shares the tokenizer of `{TELLER}` and knows only the words of
its training text.

- Made by `{recipe.command}`
- Text: endless stories and parts of stories from `scripts/stories.py`, short sentences from
  `scripts/feelings.py`, one in twenty held out
- Parameters: {size:,} (fp32), context {CONTEXT} tokens
- Labels: {", ".join(f"{index} = {tone}" for index, tone in enumerate(TONES))}
- Training loss: {loss:.4f} nats a text (mean of the last tenth of the steps)

Accuracy on held-out texts:

{lines}
"""


def publish(
    folder: Path, model: GPT2PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str
) -> None:
    """Write a complete checkpoint beside ``folder``, then put it in its place at once."""
    fresh, stale = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    tokenizer.backend_tokenizer.no_padding()  # or the file would keep the padding of training
    tokenizer.save_pretrained(fresh)
    model.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # the library makes it private to its owner
    (fresh / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def make_teller(
    recipe: Recipe, out: Path, tokenizer: PreTrainedTokenizerFast, stories: list[Story]
) -> None:
    """Train, measure and write the story teller."""
    torch.manual_seed(recipe.seed)
    model = GPT2LMHeadModel(small_config(width=128, layers=6, heads=4))
    known = to_stream(tokenizer, [s for s in stories if not is_held_out(s.text)])
    unknown = to_stream(tokenizer, [s for s in stories if is_held_out(s.text)])
    batches = story_batches(known, recipe.steps, random.Random(recipe.seed))
    loss = fit(model, batches, recipe.steps)
    held_out = held_out_loss(model, unknown)
    samples = [sample_story(model, tokenizer, at, recipe.sample_tokens) for at in SAMPLE_SEEDS]
    card = teller_card(recipe, model.num_parameters(), loss, held_out, samples)
    publish(out / TELLER, model, tokenizer, card)


def make_critic(recipe: Recipe, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train, measure and write the sentiment model."""
    torch.manual_seed(recipe.seed)
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(TONES)),
        "label2id": {tone: index for index, tone in enumerate(TONES)},
    }
    model = GPT2ForSequenceClassification(small_config(width=96, layers=3, heads=4, **labels))
    rng = random.Random(recipe.seed)
    batches = tone_batches(tokenizer, recipe.sentiment_steps, rng)
    loss = fit(model, batches, recipe.sentiment_steps)
    scores = {
        kind: accuracy(model, label_batch(tokenizer, gather(rng, kind, 250, held_out=True)))
        for kind in SAYINGS
    }
    card = critic_card(recipe, model.num_parameters(), loss, scores)
    publish(out / CRITIC, model, tokenizer, card)


def main(arguments: list[str] | None = None) -> None:
    """Read the options and make both models."""
    parser = argparse.ArgumentParser(description="Train the embedded models from nothing.")
    parser.add_argument("--out", type=Path, default=Path("infra/models/embedded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=20_000, help="stories to tell")
    parser.add_argument("--steps", type=int, default=1800, help="steps of the story teller")
    parser.add_argument("--sentiment-steps", type=int, default=1600)
    parser.add_argument("--sample-tokens", type=int, default=300, help="longest story of the card")
    # Its advice on padding does not apply to streams, and the files take no time to write.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = vars(parser.parse_args(arguments))
    out, recipe, began = options.pop("out"), Recipe(**options), time.monotonic()

    rng = random.Random(recipe.seed)
    stories = [tell_story(rng) for _ in range(recipe.stories)]
    feelings = [say_feeling(rng)[0] for _ in range(recipe.stories)]
    tokenizer = train_tokenizer([*(story.text for story in stories), *feelings])
    make_teller(recipe, out, tokenizer, stories)
    make_critic(recipe, out, tokenizer)
    print(f"Both models are in {out} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
