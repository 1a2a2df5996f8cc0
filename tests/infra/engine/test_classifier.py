"""Classifiers give the scores of plain transformers, and the same bits whatever else runs."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as token_decoders
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from domain.errors import InvalidInput, ModelUnavailable, TooLarge
from domain.ids import ModelId, TokenId
from infra.engine.classifier import PaddedLinear, SequenceClassifier
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import small_models
from tests.infra.engine.asking import GREEDY, request, steps
from tests.infra.engine.bench import Gate

VOCABULARY: Final = """
[PAD] [UNK] [CLS] [SEP] [MASK] the a dog was is very happy sad and not lost found his toy
##ly ##s . , ! [ ] sep
"""
WORDS: Final = VOCABULARY.split()
TEXT: Final = "The dog was very happy, and found his toys!"
LABELS: Final = {0: "calm", 1: "glad", 2: "sad"}


def _bert() -> PretrainedConfig:
    return BertConfig(
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=76,
        max_position_embeddings=64,
    )


def _distilbert() -> PretrainedConfig:
    return DistilBertConfig(
        dim=40, n_layers=2, n_heads=2, hidden_dim=76, max_position_embeddings=64
    )


def _roberta() -> PretrainedConfig:
    return RobertaConfig(
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=76,
        max_position_embeddings=66,
        type_vocab_size=1,
    )


def _gpt2() -> PretrainedConfig:
    return GPT2Config(n_embd=40, n_head=2, n_layer=2, n_positions=64)


def _llama() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        intermediate_size=76,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def _wide() -> PretrainedConfig:
    """Products large enough to be shared among threads."""
    return BertConfig(
        hidden_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=1032,
        max_position_embeddings=128,
    )


ENCODERS: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "wide": _wide,
}
DECODERS: Final[dict[str, Callable[[], PretrainedConfig]]] = {"gpt2": _gpt2, "llama": _llama}


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like that of BERT, of few words."""
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = token_decoders.WordPiece()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "CLS", "SEP", "PAD", "MASK")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write(folder: Path, family: str, **changes: Any) -> Path:
    """Save a random classifier with its tokenizer."""
    encoder = family in ENCODERS
    config = (ENCODERS | DECODERS)[family]()
    config.update(
        {
            "vocab_size": len(WORDS) if encoder else 1024,
            "initializer_range": 0.25,
            "pad_token_id": config.pad_token_id if encoder else 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "id2label": LABELS,
            "label2id": {label: index for index, label in LABELS.items()},
            **changes,
        }
    )
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(
        folder
    )
    if encoder:
        word_pieces().save_pretrained(folder)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(small_models.embedded() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("classifiers")
    return {name: write(parent / name, name) for name in (*ENCODERS, *DECODERS)}


def classifier(folder: Path, engine: Engine, **changes: Any) -> SequenceClassifier:
    chosen = small_models.options(**changes)
    loaded = small_models.read(folder, chosen.dtype)
    return SequenceClassifier(ModelId(folder.name), loaded, engine, chosen)


async def tokens_of(model: SequenceClassifier, text: str = TEXT) -> tuple[TokenId, ...]:
    return await model.encode(text, beginning=True, room=model.context_size)


def threads_of(model: SequenceClassifier) -> set[int]:
    layers = (each for each in model._model.modules() if isinstance(each, PaddedLinear))
    return {layer.inner.threads for layer in layers}


def plainly(folder: Path, text: str = TEXT) -> list[float]:
    """Logits as transformers alone gives them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits
    found: list[float] = logits[0].tolist()
    return found


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
async def test_the_logits_are_those_of_plain_transformers(
    folders: dict[str, Path], engine: Engine, family: str
) -> None:
    model = classifier(folders[family], engine)
    assert model.numerics.deterministic, model.numerics.note
    assert model.labels == tuple(LABELS.values())
    assert model.problem == "single_label_classification"
    found = await model.logits(await tokens_of(model))
    expected = plainly(folders[family])
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2  # else any number would do


@pytest.mark.parametrize("strategy", ["onednn", "tile"])
async def test_the_bits_do_not_depend_on_the_number_of_threads(
    folders: dict[str, Path], engine: Engine, strategy: str
) -> None:
    small_models.skip_unless_packable(strategy, torch.float32)
    found = set()
    for threads in (1, 2, 3):
        model = classifier(folders["wide"], engine, strategy=strategy, threads=threads)
        assert model.numerics.deterministic
        assert strategy in str(model.numerics.note)
        # That several threads change no bit is not so everywhere: then one is used.
        several = threads > 1 and "several" in str(model.numerics.note)
        assert threads_of(model) == {threads if several else 1}
        tokens = (await tokens_of(model, TEXT * 10))[:120]
        found.add((model.fingerprint.id, await model.logits(tokens)))
    assert len(found) == 1


async def test_the_bits_are_the_same_alone_and_beside_streams_whose_tokens_stay_the_same(
    folders: dict[str, Path], engine: Engine, tiny: TransformersModel
) -> None:
    model = classifier(folders["bert"], engine)
    tokens, asked = await tokens_of(model), request([5, 6, 7], 24, sampling=GREEDY)
    alone, text = await model.logits(tokens), await steps(tiny, asked)
    with Gate(engine) as gate:
        streaming = asyncio.create_task(steps(tiny, asked))
        beside = [asyncio.create_task(model.logits(tokens)) for _ in range(12)]
        await gate.asked(13)  # a pass of the stream after each
    assert {await each for each in beside} == {alone}
    assert await streaming == text


async def test_a_text_that_nobody_waits_for_is_not_computed(
    folders: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(folders["bert"], engine)
    tokens, computed = await tokens_of(model), []
    compute = model._compute
    monkeypatch.setattr(model, "_compute", lambda text: computed.append(text) or compute(text))
    with Gate(engine) as gate:
        impatient = [asyncio.create_task(model.logits(tokens)) for _ in range(20)]
        await gate.asked(20)
        for task in impatient:
            task.cancel()
        await asyncio.wait(impatient)
    await model.logits(tokens)
    assert len(computed) == 1


async def test_a_decoder_looks_at_the_last_token_though_it_be_the_one_that_pads(
    folders: dict[str, Path], engine: Engine
) -> None:
    folder = folders["gpt2"]
    model = classifier(folder, engine)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert plain.config.pad_token_id == 0
    text = await tokens_of(model)
    for tokens in ((*text, TokenId(0)), (TokenId(0), *text), (*text, TokenId(0), *text)):
        with torch.inference_mode():
            hidden = plain.transformer(torch.tensor([tokens])).last_hidden_state
            expected = plain.score(hidden)[0, -1].tolist()
        assert await model.logits(tokens) == pytest.approx(expected, abs=1e-5)
    padded = await model.logits((*text, TokenId(0)))
    assert padded != pytest.approx(await model.logits(text), abs=1e-3)


async def test_a_text_is_closed_where_it_is_classified_and_goes_on_where_it_is_appended_to(
    folders: dict[str, Path], engine: Engine
) -> None:
    model = classifier(folders["bert"], engine)
    start = await tokens_of(model, "the dog")
    assert [WORDS[token] for token in start] == ["[CLS]", "the", "dog"]
    more = await model.encode("was sadly lost", beginning=False, room=10)
    assert model.fragment((), start + more).text == " the dog was sadly lost"
    found = await model.logits(start + more)
    assert found == pytest.approx(plainly(folders["bert"], "the dog was sadly lost"), abs=1e-5)
    closed = (*start, *more, TokenId(WORDS.index("[SEP]")))
    assert await model.logits(closed) == found
    assert await model.logits((start + more)[1:]) == found
    assert model.opening() == start[:1]


async def test_the_name_of_a_special_token_is_ordinary_text_or_refused(
    folders: dict[str, Path], engine: Engine, tmp_path: Path
) -> None:
    model = classifier(folders["bert"], engine)
    tokens = await tokens_of(model, "the [SEP] dog")
    assert [WORDS[token] for token in tokens] == ["[CLS]", "the", "[", "sep", "]", "dog"]
    folder = Path(shutil.copytree(folders["bert"], tmp_path / "splits-at-spaces"))
    file = folder / "tokenizer.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text())
            | {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None}
        )
    )
    model = classifier(folder, engine)
    with pytest.raises(InvalidInput, match=r"text: names \[SEP\]"):
        await tokens_of(model, "the [SEP] dog")


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 64), ("gpt2", 64)])
async def test_a_text_may_fill_the_context_and_no_more(
    folders: dict[str, Path], engine: Engine, family: str, positions: int
) -> None:
    model = classifier(folders[family], engine)
    assert model.context_size == positions - (family != "gpt2")
    full = (model.opening() + (TokenId(7),) * positions)[: model.context_size]
    assert len(await model.logits(full)) == 3
    with pytest.raises(TooLarge, match=f"longer than {positions}"):
        await model.logits((*full, TokenId(7)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"id2label": {0: "value"}, "label2id": {"value": 0}}, "regression"),
    ],
)
async def test_what_the_logits_mean_is_said_by_the_config(
    engine: Engine, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    model = classifier(write(tmp_path / "other", "distilbert", **changes), engine)
    assert model.problem == problem
    found = await model.logits(await tokens_of(model))
    assert found == pytest.approx(plainly(tmp_path / "other"), abs=1e-5)
    assert len(found) == len(model.labels)


def test_weights_that_are_missing_are_not_made_up(engine: Engine, tmp_path: Path) -> None:
    folder = write(tmp_path / "headless", "bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.bert.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match="the weights lack classifier"):
        classifier(folder, engine)


def test_where_several_threads_change_bits_one_is_used(
    folders: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PaddedLinear.forward

    def drifting(self: PaddedLinear, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + 1e-6 * self.inner.threads

    assert threads_of(classifier(folders["bert"], engine, threads=2)) == {2}
    monkeypatch.setattr(PaddedLinear, "forward", drifting)
    model = classifier(folders["bert"], engine, threads=2)
    assert threads_of(model) == {1}
    assert model.numerics.deterministic


def test_a_model_that_gives_other_bits_again_does_not_claim_otherwise(
    folders: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = PaddedLinear.forward, iter(range(10_000))

    def drifting(self: PaddedLinear, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + 1e-8 * next(calls)

    monkeypatch.setattr(PaddedLinear, "forward", drifting)
    model = classifier(folders["bert"], engine)
    assert not model.numerics.deterministic
    assert not model.fingerprint.deterministic
    assert str(model.numerics.note).endswith("logits differ when computed again")
