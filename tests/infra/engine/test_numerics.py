"""What a loaded model claims about its bits, what it refuses, and what names them."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, FalconConfig, GptOssConfig, PretrainedConfig

from domain.errors import ModelUnavailable
from infra.engine.blocks import BLOCK_TOKENS
from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from infra.engine.modules.strategy import measured_query_tile
from infra.engine.strategies.onednn import OneDnnStrategy
from tests.infra.engine import small_models

Load = Callable[..., TransformersModel]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.write(tmp_path_factory.mktemp("numerics") / "m", small_models.smallest())


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "elsewhere" / folder.name))


@pytest.fixture(scope="module")
def load(engine: Engine, folder: Path) -> Load:
    def loaded(source: Path = folder, **changes: object) -> TransformersModel:
        return small_models.language_model(source, engine, **changes)

    return loaded


@pytest.fixture(scope="module")
def model(load: Load) -> TransformersModel:
    return load()


def test_the_fingerprint_is_that_of_the_files_wherever_they_lie(
    load: Load, model: TransformersModel, copy: Path
) -> None:
    assert load(copy).fingerprint == model.fingerprint
    assert load(copy.rename(copy.with_name("renamed"))).fingerprint == model.fingerprint
    assert str(copy.parent) not in model.fingerprint.document


def test_threads_cache_and_batch_do_not_change_the_fingerprint(
    load: Load, model: TransformersModel
) -> None:
    other = load(threads=3, hot_cache_bytes=1 << 22, max_batch=2)
    assert other.fingerprint == model.fingerprint


def test_dtype_and_strategy_change_the_fingerprint(load: Load, model: TransformersModel) -> None:
    found = [
        model,
        load(dtype=torch.bfloat16, strategy="tile"),
        load(strategy="tile"),
        load(strategy="plain"),
    ]
    assert len({each.fingerprint.id for each in found}) == 4


def test_one_changed_weight_changes_the_fingerprint(
    load: Load, model: TransformersModel, copy: Path
) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["transformer.ln_f.bias"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    other = load(copy)
    assert other.fingerprint.id != model.fingerprint.id
    document, before = (msgspec.json.decode(each.fingerprint.document) for each in (other, model))
    assert {name for name in before if document[name] != before[name]} == {"golden", "weights"}


def test_another_tokenizer_changes_the_fingerprint(
    load: Load, model: TransformersModel, copy: Path
) -> None:
    file = copy / "tokenizer.json"
    description = msgspec.json.decode(file.read_bytes())
    description["normalizer"] = {"type": "Lowercase"}
    file.write_bytes(msgspec.json.encode(description))
    assert load(copy).fingerprint.id != model.fingerprint.id


def test_the_fingerprint_is_the_digest_of_a_document_that_names_everything(
    model: TransformersModel,
) -> None:
    document = msgspec.json.decode(model.fingerprint.document)
    digest = hashlib.sha256(model.fingerprint.document.encode()).hexdigest()
    assert model.fingerprint.id == digest == model.numerics.fingerprint
    assert {
        "torch",
        "transformers",
        "numpy",
        "device",
        "dtype",
        "strategy",
        "quantum",
        "query_tile",
        "block_tokens",
        "golden",
        "sampler",
        "config",
        "weights",
        "tokenizer",
    } < document.keys()


def test_plain_blas_is_served_without_the_claim_and_never_silently(load: Load) -> None:
    plain = load(strategy="plain")
    assert plain.numerics.deterministic is False
    assert plain.fingerprint.deterministic is False
    assert plain.numerics.note is not None
    assert "differ when computed" in plain.numerics.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["auto", "strict", "onednn", "tile"])
def test_the_claim_is_made_where_the_probe_found_it_kept(
    load: Load, strategy: str, dtype: torch.dtype
) -> None:
    small_models.skip_unless_packable(strategy, dtype)
    numerics = load(strategy=strategy, dtype=dtype).numerics
    assert numerics.deterministic is True
    assert numerics.note == "contract probed up to 64 tokens"
    assert numerics.strategy == ("strict" if strategy == "auto" else strategy)


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
UNSUPPORTED = {
    "attention of its own": FalconConfig(**SMALL),
    "attention sinks": GptOssConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=192,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "tokens that see later ones": BertConfig(
        **SMALL, intermediate_size=64, max_position_embeddings=192
    ),
}


@pytest.mark.parametrize("config", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_a_model_that_attends_in_another_way_is_refused(
    load: Load, tmp_path: Path, config: PretrainedConfig
) -> None:
    folder = small_models.write(tmp_path / "odd", config)
    with pytest.raises(ModelUnavailable, match=r"'odd'.*differ from plain transformers.*family"):
        load(folder, strategy="auto")


def test_weights_that_are_no_numbers_are_refused(load: Load, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match="differ from plain transformers by nan"):
        load(copy)


def test_rows_are_padded_so_that_every_tensor_is_whole_vectors() -> None:
    strategy = OneDnnStrategy(2)
    assert strategy.quantum({64, 128}) == 4
    assert strategy.quantum({172}) == 16
    assert strategy.quantum({50_257}) == 64
    assert all(strategy.quantum({width}) * width % 64 == 0 for width in range(1, 200))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_a_row_of_attention_is_the_same_in_any_number_of_whole_tiles(head_dim: int) -> None:
    tile = measured_query_tile(head_dim)
    query = torch.randn(2, 512, head_dim, generator=torch.Generator().manual_seed(head_dim))
    keys = torch.randn(2, head_dim, BLOCK_TOKENS, generator=torch.Generator().manual_seed(1))
    scores = query @ keys
    for count in (tile, 2 * tile, 3 * tile):
        assert torch.equal(query[:, :count] @ keys, scores[:, :count])
        assert torch.equal(query[:1, :count] @ keys[:1], scores[:1, :count])


IMPORTED_FIRST = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get(sys.argv[1]))
            os._exit(0)

sys.meta_path.insert(0, Watch())
import app.cli
print("nothing has loaded torch")
import infra.engine.loading
"""


@pytest.mark.parametrize(
    ("variable", "value"), [("GOMP_SPINCOUNT", "1000"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")]
)
def test_what_libraries_read_when_they_are_loaded_is_set_before_the_server_loads_torch(
    variable: str, value: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != variable}
    ran = subprocess.run(
        [sys.executable, "-uc", IMPORTED_FIRST, variable],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == ["nothing has loaded torch", value]
