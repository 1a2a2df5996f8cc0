"""The server's settings: one frozen struct, read from the environment once."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from app.decoding import field_problem
from domain.config import ContextSize, LogitsStorage, Temperature, TopKLogits, TopP
from domain.ids import Seed

PREFIX = "CACHER_"

Positive = Annotated[int, Meta(ge=1)]


class Settings(Struct, frozen=True, kw_only=True):
    """Every setting with its default; the variable is the name in capitals after ``CACHER_``.

    Lists (``api_keys``, ``allowed_models``) are comma-separated. ``threads`` 0 means one per core
    of the machine. ``default_seed`` may be ``null``: a fresh seed for every generation.
    ``hot_cache_bytes`` bounds the KV caches of all models together, ``host_cache_bytes`` what the
    host keeps of them where the device is a GPU. ``max_result_bytes`` bounds the tensors of one
    answer about the inside of a state.

    ``erasable`` matters when a log is made. ``signing_key`` is the path of a PEM file with an
    Ed25519 private key. Stored logits are kept as long and as many as the last two say; 0: for
    ever, and all of them.
    """

    model_name: Annotated[str, Meta(min_length=1)] = "gpt2"
    device: Literal["cpu", "cuda"] = "cpu"
    default_temperature: Temperature = 0.7
    default_top_p: TopP = 0.9
    default_seed: Seed | None = 42
    default_context_size: ContextSize = 2048
    logits_storage: LogitsStorage = "top_k"
    top_k_logits: TopKLogits = 20

    database: Annotated[str, Meta(min_length=1)] = "cacher.db"
    hot_cache_bytes: Annotated[int, Meta(ge=1 << 20)] = 1 << 30
    host_cache_bytes: Annotated[int, Meta(ge=0)] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    strategy: Literal["auto", "strict", "onednn", "tile", "cuda", "plain"] = "auto"
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    api_keys: tuple[str, ...] = ()
    allowed_models: tuple[str, ...] = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    max_batch: Annotated[int, Meta(ge=1, le=256)] = 32
    max_queue: Annotated[int, Meta(ge=1, le=100_000)] = 256
    max_models: Annotated[int, Meta(ge=1, le=64)] = 2
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 4 << 20
    max_import_bytes: Annotated[int, Meta(ge=1024)] = 64 << 20
    max_result_bytes: Annotated[int, Meta(ge=1 << 20)] = 64 << 20
    erasable: bool = False
    signing_key: str | None = None
    logits_max_days: Annotated[int, Meta(ge=0, le=36_500)] = 0
    logits_max_bytes: Annotated[int, Meta(ge=0)] = 0

    @property
    def thread_count(self) -> int:
        """Threads that matrix products may use."""
        return self.threads or os.cpu_count() or 1


class BadSetting(Exception):
    """A setting that cannot be used; names the variable, the value and what is allowed."""


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Read the settings.

    Raises:
        BadSetting: names every bad variable, or one under our prefix that is no setting.
    """
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    given = {
        key.removeprefix(PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(PREFIX)
    }
    problems = [
        f"{PREFIX}{name.upper()} is not a setting; settings are"
        f" {', '.join(PREFIX + known.upper() for known in fields)}"
        for name in given.keys() - fields.keys()
    ]
    values: dict[str, Any] = {}
    for name in given.keys() & fields.keys():
        text = given[name]
        raw: Any = [part.strip() for part in text.split(",") if part.strip()]
        try:
            is_list = fields[name].type == tuple[str, ...]
            values[name] = msgspec.convert(
                raw if is_list else text, fields[name].type, strict=False
            )
        except msgspec.ValidationError as error:
            message = field_problem("", error, fields[name].type).message
            problems.append(f"{PREFIX}{name.upper()} is {text!r}: {message}")
    if problems:
        raise BadSetting("\n".join(sorted(problems)))
    return Settings(**values)
