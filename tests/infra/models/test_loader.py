"""What the loader makes of other people's files; what it will not touch."""

import builtins
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from domain.errors import ModelUnavailable
from domain.ids import ModelId
from infra.models.catalogue import Source, source_of
from infra.models.config_file import is_classifier, read_config
from infra.models.loader import Loaded, load

Copy = Callable[[str], Path]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    return load(source_of(str(folder)), dtype)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        loaded(folder)
    message = str(caught.value)
    assert f"'{folder.name}'" in message
    assert "'cacher-tiny', or CACHER_MODEL_NAME" in message  # what works instead
    assert str(folder.parent) not in message  # clients learn no path of the server
    return message


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Exploit:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def test_a_folder_is_loaded_with_what_identifies_it(saved: Path) -> None:
    model = loaded(saved)
    assert (model.vocabulary_size, model.context_size) == (1024, 64)
    assert model.eos_token_ids == {0}
    assert model.config == json.loads((saved / "config.json").read_text())
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    assert not model.model.training
    assert len(model.identity["weights"]) == 1
    assert loaded(saved, torch.bfloat16).model.lm_head.weight.dtype is torch.bfloat16


def test_tokens_that_end_a_text_are_those_transformers_stops_at(copy: Copy) -> None:
    folder = copy("several")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [0, 7]}))
    assert loaded(folder).eos_token_ids == {0, 7}


def test_a_pickle_is_not_opened(copy: Copy, tmp_path: Path) -> None:
    folder, mark = copy("pickled"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(mark)))
    assert "there is no *.safetensors file" in refusal(folder)
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("model_type", ["gpt2", "of-its-own"])
def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    folder, mark, asked = copy("coded"), tmp_path / "mark", []
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\n")
    configure(
        folder,
        model_type=model_type,
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Config"},
    )
    monkeypatch.setattr(builtins, "input", lambda *prompt: asked.append(prompt) or "y")
    if model_type == "gpt2":
        assert type(loaded(folder).model).__name__ == "GPT2LMHeadModel"
    else:
        assert "contains custom code" in refusal(folder)
    assert asked == []
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 100])
def test_broken_safetensors_are_refused(copy: Copy, content: bytes) -> None:
    folder = copy("broken")
    (folder / "model.safetensors").write_bytes(content)
    assert "its files are not usable" in refusal(folder)


def test_safetensors_cut_short_are_refused(copy: Copy) -> None:
    folder = copy("cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    assert "its files are not usable" in refusal(folder)


def test_weights_that_are_missing_are_not_made_up(copy: Copy) -> None:
    folder = copy("lacking")
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the weights lack transformer.h.0.mlp.c_fc.weight" in refusal(folder)


def test_weights_of_another_shape_are_refused(copy: Copy) -> None:
    folder = copy("misshapen")
    configure(folder, n_positions=65)
    assert "its files are not usable" in refusal(folder)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("{", "not usable"),
        ("[]", "config.json is not an object"),
        ("{}", "model_type"),
        ('{"model_type": "no-such"}', "does not recognize"),
        ('{"model_type": "mamba"}', "has no max_position_embeddings, num_attention_heads"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "not usable"),
    ],
)
def test_a_config_that_is_no_decoder_is_refused(copy: Copy, written: str, reason: str) -> None:
    folder = copy("odd")
    (folder / "config.json").write_text(written)
    assert reason in refusal(folder)


def test_a_folder_without_a_config_is_refused(copy: Copy) -> None:
    folder = copy("bare")
    (folder / "config.json").unlink()
    assert "No such file" in refusal(folder)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_usable_tokenizer_is_refused(copy: Copy, content: str | None) -> None:
    folder = copy("mute")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    assert "its files are not usable" in refusal(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
    ],
)
def test_rope_that_depends_on_the_length_of_the_batch_is_refused(
    copy: Copy, rope: dict[str, Any]
) -> None:
    folder = copy("stretching")
    configure(folder, model_type="llama", **rope)
    assert "depends on the length of the batch" in refusal(folder)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_rope_that_the_family_itself_makes_so_is_refused(copy: Copy, name: str) -> None:
    folder = copy("rewritten")
    factors = [1.0] * 16
    rope: dict[str, Any] = {"type": name, "short_factor": factors, "long_factor": factors}
    rope["original_max_position_embeddings"] = 64
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    configure(folder, model_type="phi3", pad_token_id=0, rope_scaling=rope, **shape)
    assert "depends on the length of the batch" in refusal(folder)


def test_a_classifier_is_told_by_its_config_and_loaded_with_its_head() -> None:
    source = source_of("cacher-tiny-sentiment")
    model = load(source, torch.float32)
    assert type(model.model).__name__ == "GPT2ForSequenceClassification"
    assert model.eos_token_ids == frozenset()
    config = read_config(source)
    assert config is not None
    assert is_classifier(config)


def test_a_config_is_read_where_that_needs_no_download(saved: Path, tmp_path: Path) -> None:
    config = read_config(source_of(str(saved)))
    assert config is not None
    assert config["model_type"] == "gpt2"
    assert read_config(Source(ModelId("gpt2"), "hub", "gpt2", "")) is None
    assert read_config(Source(ModelId("empty"), "folder", str(tmp_path), "")) is None


def test_a_hub_name_without_the_hub_says_why_and_what_works(hub_cache: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        load(Source(ModelId("gpt2"), "hub", "gpt2", ""), torch.float32)
    message = str(caught.value)
    assert "offline" in message.lower() or "cannot find" in message.lower()
    assert "embedded model 'cacher-tiny'" in message


def test_a_hub_model_is_pinned_to_the_revision_that_was_loaded(
    saved: Path, hub_cache: Path
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = hub_cache / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / revision).symlink_to(saved)
    model = load(Source(ModelId("someone/small"), "hub", "someone/small", ""), torch.float32)
    assert model.revision == revision
    assert model.identity == loaded(saved).identity


def test_the_hub_is_never_asked_for_the_files_of_a_folder(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(huggingface_hub.utils._http, "get_session", unreachable)
    folder = copy("alone")
    (folder / "generation_config.json").unlink()
    assert loaded(folder).eos_token_ids == {0}


def test_the_files_of_a_gpt2_tokenizer_are_read(copy: Copy) -> None:
    folder = copy("gpt2-files")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    made.model.save(str(folder))
    assert sorted(file.name for file in folder.glob("*.txt")) == ["merges.txt"]
    tokenizer = loaded(folder).tokenizer
    text = "the cat, ein Käse 🧀 <|endoftext|>"
    tokens = tokenizer.encode(text, beginning=True)
    assert len(tokenizer.encode("the cat sat", beginning=False)) < 8  # merges are used
    assert tokenizer.fragment([], tokens).text == text
    assert tokenizer.eos_token_id == 0
    assert tokenizer.text_of(0) == ""
