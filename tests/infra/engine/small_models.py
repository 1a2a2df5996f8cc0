"""Small random models of several families, saved as folders that the real loader reads."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from domain.ids import ModelId
from infra.engine.engine import Engine
from infra.engine.executor import prepare
from infra.engine.forward import Prepared, Shape, Unsupported
from infra.engine.kv_store import Geometry, KVStore
from infra.engine.language_model import TransformersModel
from infra.engine.options import EngineOptions
from infra.engine.strategies.onednn import OneDnnStrategy
from infra.engine.strict.execution import Execution
from infra.models.catalogue import source_of
from infra.models.loader import Loaded, load

CACHER_TINY: Final = "cacher-tiny"
CONTEXT: Final = 192
_VOCABULARY: Final = 1024
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")
_GATED: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def _gpt2() -> PretrainedConfig:
    return GPT2Config(n_embd=64, n_head=4, n_layer=2, n_positions=CONTEXT)


def _llama() -> PretrainedConfig:
    return LlamaConfig(num_hidden_layers=2, intermediate_size=172, **_GATED)


def _qwen2() -> PretrainedConfig:
    return Qwen2Config(num_hidden_layers=3, intermediate_size=128, **_GATED)


def _qwen3() -> PretrainedConfig:
    return Qwen3Config(num_hidden_layers=2, intermediate_size=172, head_dim=32, **_GATED)


def _mistral() -> PretrainedConfig:
    return MistralConfig(num_hidden_layers=2, intermediate_size=128, sliding_window=40, **_GATED)


def _gpt_neox() -> PretrainedConfig:
    return GPTNeoXConfig(
        hidden_size=96,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=172,
        rotary_pct=0.25,
        max_position_embeddings=CONTEXT,
    )


def _opt() -> PretrainedConfig:
    return OPTConfig(
        hidden_size=80,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=172,
        word_embed_proj_dim=48,
        max_position_embeddings=CONTEXT,
    )


def _gemma2() -> PretrainedConfig:
    return Gemma2Config(
        num_hidden_layers=2,
        intermediate_size=172,
        head_dim=24,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=20.0,
        sliding_window=40,
        **_GATED | {"num_key_value_heads": 1},
    )


def _phi3() -> PretrainedConfig:
    return Phi3Config(
        num_hidden_layers=2,
        intermediate_size=172,
        partial_rotary_factor=0.5,
        **_GATED | {"num_key_value_heads": 1},
    )


def _gpt2_untied() -> PretrainedConfig:
    return GPT2Config(
        n_embd=60,
        n_head=3,
        n_layer=2,
        n_positions=CONTEXT,
        activation_function="gelu",
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    )


def _llama3() -> PretrainedConfig:
    return LlamaConfig(
        num_hidden_layers=2,
        intermediate_size=172,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        **_GATED | {"hidden_size": 80, "num_key_value_heads": 1},
    )


def _qwen2_mixed() -> PretrainedConfig:
    return Qwen2Config(
        num_hidden_layers=3,
        intermediate_size=172,
        use_sliding_window=True,
        sliding_window=40,
        max_window_layers=1,
        tie_word_embeddings=True,
        **_GATED,
    )


def wide(intermediate_size: int) -> PretrainedConfig:
    """Its widest tensor is large enough that torch would cut element-wise work across threads."""
    return LlamaConfig(num_hidden_layers=1, intermediate_size=intermediate_size, **_GATED)


FAMILIES: Final[dict[str, Callable[[], PretrainedConfig]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "gemma2": _gemma2,
    "phi3": _phi3,
}
"""Those that are promised, in shapes that fill no vector: heads of 20 and 24, widths of 172."""

SHAPES: Final[dict[str, tuple[Callable[[], PretrainedConfig], int]]] = {
    "gpt2-untied": (_gpt2_untied, 1000),
    "llama3": (_llama3, 1027),
    "qwen2-mixed": (_qwen2_mixed, 1024),
}
"""Other shapes of them, with the size of their vocabulary."""

EVERY_VOCABULARY: Final = 1000
"""Tokens that each of them has."""


def smallest() -> PretrainedConfig:
    """For tests that need some model and load it often."""
    return GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=64)


def embedded() -> Path:
    """The folder of the embedded model."""
    return Path(source_of(CACHER_TINY).location)


def write(
    folder: Path, config: PretrainedConfig, *, seed: int = 0, vocabulary: int = _VOCABULARY
) -> Path:
    """Save a random model of this config, with cacher-tiny's tokenizer, into ``folder``.

    Weights are larger than usual, so that attention matters and no two logits are close.
    """
    config.update(
        {
            "vocab_size": vocabulary,
            "initializer_range": 0.15,
            "init_std": 0.15,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copy(embedded() / name, folder / name)
    return folder


def skip_unless_packable(strategy: str, dtype: torch.dtype) -> None:
    """Skip a test that needs oneDNN to pack weights of this type, where the CPU is too old."""
    shape = Shape(
        geometry=Geometry(1, 1, 1, 1),
        dtype=dtype,
        device=torch.device("cpu"),
        context=1,
        vocabulary=1,
    )
    try:
        if strategy == "onednn":
            OneDnnStrategy(1).check(shape)
    except Unsupported as error:
        pytest.skip(str(error))


def device_for(strategy: str) -> str:
    """A GPU for the strategy that is made for it, where there is one."""
    return "cuda" if strategy == "cuda" and torch.cuda.is_available() else "cpu"


def read(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Loaded:
    """What the real loader makes of a folder, or of the name of an embedded model."""
    return load(source_of(str(folder)), dtype, device)


def prepared(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    strategy: str = "strict",
    threads: int = 2,
) -> Prepared:
    """A model loaded anew and made ready by a strategy."""
    loaded = read(folder, dtype, device_for(strategy))
    return made_ready(loaded, dtype, strategy=strategy, threads=threads)


def made_ready(
    loaded: Loaded, dtype: torch.dtype, *, strategy: str = "strict", threads: int = 2
) -> Prepared:
    """A loaded model made ready by a strategy; it is not to be used by itself after that."""
    return prepare(
        loaded.model,
        strategy,
        dtype,
        threads=threads,
        context=loaded.context_size,
        vocabulary=loaded.vocabulary_size,
        device=device_for(strategy),
    )


def on_threads(prepared: Prepared, threads: int) -> Prepared:
    """The same, of the strict strategy, run by another number of threads."""

    def bind(store: KVStore) -> Execution:
        execution = prepared.bind(store)
        assert isinstance(execution, Execution)
        return Execution(execution._program, store, prepared.shape.context, threads)

    return replace(prepared, bind=bind)


def options(**changes: Any) -> EngineOptions:
    """Settings for tests."""
    chosen: dict[str, Any] = {
        "dtype": torch.float32,
        "strategy": "strict",
        "threads": 2,
        "hot_cache_bytes": 1 << 26,
        "max_batch": 16,
        "device": device_for(changes.get("strategy", "strict")),
    }
    return EngineOptions(**(chosen | changes))


def language_model(folder: str | Path, engine: Engine, **changes: Any) -> TransformersModel:
    """A loaded model as the application sees it."""
    chosen = options(**changes)
    loaded = read(folder, chosen.dtype, chosen.device)
    return TransformersModel(ModelId(Path(folder).name), loaded, engine, chosen)
