"""From a source to a transformers model, its tokenizer and the digests of both.

Only safetensors files are read and no code that comes with a model is run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import nn

from domain.errors import ModelUnavailable, Refusal
from domain.ids import TokenId
from infra.models.catalogue import Source
from infra.models.config_file import is_classifier, read_json
from infra.models.tokenizer import Tokenizer

transformers.utils.logging.disable_progress_bar()

_FILES: Final = ["*.safetensors", "*.json", "*.txt", "tokenizer.model"]
_REMEDY: Final = (
    "What works without the hub: the embedded model 'cacher-tiny', or CACHER_MODEL_NAME set to a"
    " folder with config.json, the tokenizer's files and *.safetensors"
)
_OURS_ALONE: Final[dict[str, Any]] = {"local_files_only": True, "trust_remote_code": False}
_SHAPE: Final = ("vocab_size", "max_position_embeddings", "hidden_size")
_DECODER_SHAPE: Final = (*_SHAPE, "num_hidden_layers", "num_attention_heads")
_LENGTH_DEPENDENT_ROPE: Final = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Loaded:
    """A model as transformers built it, and what identifies it.

    ``config`` is the model's ``config.json``. ``identity`` goes into the numerics fingerprint: it
    names the files by their content, wherever they came from. No token ends a classifier's text.
    """

    model: nn.Module
    tokenizer: Tokenizer
    config: dict[str, Any]
    vocabulary_size: int
    width: int
    context_size: int
    eos_token_ids: frozenset[TokenId]
    revision: str | None
    identity: dict[str, Any]


def load(source: Source, dtype: torch.dtype, device: str = "cpu") -> Loaded:
    """Load a causal language model, or a sequence classifier, onto a device.

    Raises:
        ModelUnavailable: its files cannot be had or are not usable; says why.
        torch.OutOfMemoryError: a GPU has no room for it.
    """
    try:
        folder, revision = _folder(source)
        return _load_folder(source, folder, revision, dtype, device)
    except (OSError, EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ModelUnavailable(source.model_id, _reason(source, error), _REMEDY) from error
    except (Refusal, torch.OutOfMemoryError):
        raise
    except Exception as error:  # other people's files make the libraries raise anything
        reason = f"its files are not usable: {_reason(source, error)}"
        raise ModelUnavailable(source.model_id, reason, _REMEDY) from error


def _folder(source: Source) -> tuple[Path, str | None]:
    """The folder with the model's files, and the revision it was pinned to."""
    if source.kind != "hub":
        return Path(source.location), None
    folder = Path(snapshot_download(source.location, allow_patterns=_FILES))
    return folder, folder.name


def _load_folder(
    source: Source, folder: Path, revision: str | None, dtype: torch.dtype, device: str
) -> Loaded:
    written = read_json(folder / "config.json")
    classifier = is_classifier(written)
    _check_rope(written)
    config = transformers.AutoConfig.from_pretrained(folder, **_OURS_ALONE)
    _check_rope(config.to_dict())  # some families rewrite theirs
    _check_shape(config, _SHAPE if classifier else _DECODER_SHAPE)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError("there is no *.safetensors file; other formats are not read")
    fast = transformers.AutoTokenizer.from_pretrained(folder, **_OURS_ALONE)
    tokenizer = Tokenizer(fast, lossy=classifier)
    auto: Any = transformers.AutoModelForCausalLM
    attention: str | None = "eager"  # to be swapped for ours
    if classifier:
        auto, attention = transformers.AutoModelForSequenceClassification, None
    model: nn.Module
    model, found = auto.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        **_OURS_ALONE,
    )
    if found["missing_keys"]:  # transformers would make the numbers up
        raise ValueError(f"the weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    return Loaded(
        model=model.eval().requires_grad_(False).to(device),
        tokenizer=tokenizer,
        config=written,
        vocabulary_size=config.vocab_size,
        width=config.hidden_size,
        context_size=config.max_position_embeddings,
        eos_token_ids=frozenset() if classifier else _eos_token_ids(model, tokenizer),
        revision=revision,
        identity={
            "config": written,
            "weights": [_digest(file) for file in weights],
            "tokenizer": tokenizer.digest,
        },
    )


def _eos_token_ids(model: Any, tokenizer: Tokenizer) -> frozenset[TokenId]:
    """Tokens that end a text: those ``generate`` of transformers stops at."""
    named: int | list[int] | None = model.generation_config.eos_token_id
    if named is None:
        named = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset(map(TokenId, [named] if isinstance(named, int) else named))


def _check_shape(config: Any, names: Sequence[str]) -> None:
    """Refuse what is no transformer of the kind: recurrent models, positions without an end."""
    missing = [name for name in names if not hasattr(config, name)]
    if missing:
        raise ValueError(f"a config of type {config.model_type!r} has no {', '.join(missing)}")


def _check_rope(config: dict[str, Any]) -> None:
    """Refuse rotary positions whose angles depend on how long the batch is."""
    unusable = _LENGTH_DEPENDENT_ROPE & set(_rope_types(config))
    if unusable:
        raise ValueError(f"rope type {unusable.pop()!r} depends on the length of the batch")


def _rope_types(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("rope_type", "type") and isinstance(item, str):
                yield item
            else:
                yield from _rope_types(item)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _reason(source: Source, error: Exception) -> str:
    """The first line of what went wrong; a folder of the server is called by its model's name."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(source.location, source.model_id)
