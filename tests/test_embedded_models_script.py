"""The embedded models: their script makes loadable folders, and the committed ones are sound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_embedded_models.py"
COMMITTED = ROOT / "infra" / "models" / "embedded"
TELLER, CRITIC = "cacher-tiny", "cacher-tiny-sentiment"
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
AWKWARD = "  Zoë 👩‍👩‍👧 日本語 e\u0301\u0323 \x00\x1b\r\n\t مرحبا \u200d ﬁ .  "


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a run with almost no training."""
    out = tmp_path_factory.mktemp("embedded")
    sizes = ["--stories=300", "--steps=4", "--sentiment-steps=2", "--sample-tokens=5"]
    # On one thread: those of OpenMP spin, and others need their cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, SCRIPT, "--out", out, *sizes], env=environment, check=True, timeout=120
    )
    return out


@pytest.fixture(scope="module", params=["fresh", "committed"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each of the two places where embedded models lie."""
    if request.param == "committed":
        return COMMITTED
    made: Path = request.getfixturevalue("fresh")
    return made


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of one model, from local files alone."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder / name, local_files_only=True
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the story teller."""
    return load_tokenizer(folder, TELLER)


def test_the_story_teller_loads_and_reads_its_whole_context(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / TELLER, local_files_only=True)
    logits = model(torch.ones(1, 1024, dtype=torch.long)).logits
    assert logits.shape == (1, 1024, 1024)
    assert torch.isfinite(logits).all()


def test_the_sentiment_model_loads_with_its_labels(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / CRITIC, local_files_only=True
    )
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}
    assert model.config.pad_token_id == 0
    assert model(torch.ones(2, 5, dtype=torch.long)).logits.shape == (2, 2)


def test_both_models_share_one_tokenizer(folder: Path) -> None:
    ours, theirs = ((folder / name / "tokenizer.json").read_bytes() for name in (TELLER, CRITIC))
    assert ours == theirs


def test_the_special_token_begins_ends_and_pads(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert len(tokenizer) == 1024


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_awkward_text_round_trips(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD


def test_the_folders_hold_no_pickles_and_no_machine_paths(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert path.suffix in {"", ".json", ".md", ".safetensors"}
        if path.suffix in {".json", ".md"} and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            assert "_name_or_path" not in text
            assert not any(root in text for root in ("/tmp", "/home", "/root", "/work"))


def test_dropout_is_off(folder: Path) -> None:
    for name in (TELLER, CRITIC):
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        assert [value for key, value in config.items() if "drop" in key] == [0.0] * 4


def test_the_committed_models_are_small() -> None:
    files = [path for path in COMMITTED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    teller = AutoModelForCausalLM.from_pretrained(COMMITTED / TELLER, local_files_only=True)
    critic = AutoModelForSequenceClassification.from_pretrained(
        COMMITTED / CRITIC, local_files_only=True
    )
    assert teller.num_parameters() + critic.num_parameters() <= 3_000_000


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I am happy.", "positive"),
        ("She laughed and hugged her friend.", "positive"),
        ("He was sad and cried.", "negative"),
        ("I hate this movie.", "negative"),
    ],
)
def test_the_committed_sentiment_model_knows_simple_feelings(text: str, label: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        COMMITTED / CRITIC, local_files_only=True
    )
    encoded = load_tokenizer(COMMITTED, CRITIC)(text, return_tensors="pt")
    best = int(model(**encoded).logits.argmax())
    assert model.config.id2label[best] == label


def test_the_committed_story_teller_tells_a_story() -> None:
    tokenizer = load_tokenizer(COMMITTED, TELLER)
    model = AutoModelForCausalLM.from_pretrained(COMMITTED / TELLER, local_files_only=True)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=400)
    story = str(tokenizer.decode(ids[0]))
    assert story.startswith("Once upon a time, ")
    assert story.endswith((".<|endoftext|>", '."<|endoftext|>'))
