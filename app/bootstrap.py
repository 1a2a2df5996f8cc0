"""The composition root: builds everything from the settings, in one lifespan."""

import secrets
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from app.service import Service, Surroundings
from app.settings import BadSetting, Settings
from domain.config import StateConfig
from domain.ids import MAX_SEED, StateId
from domain.ports import LanguageModel, LogReader
from infra.log import migrate as migrations
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from infra.models.catalogue import Catalogue, Source
from infra.models.store import ModelStore

if TYPE_CHECKING:
    from infra.engine.loading import Loading

SURROUNDINGS = Surroundings(
    now=lambda: datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
    new_state_id=lambda: StateId(f"state-{uuid.uuid4().hex}"),
    fresh_seed=lambda: secrets.randbelow(MAX_SEED + 1),
)


def check(settings: Settings) -> None:
    """Find out early whether this machine has what the settings ask for.

    Raises:
        BadSetting: it has not.
    """
    if settings.device == "cpu":
        return
    from infra.engine.devices import unusable  # imports torch, which takes seconds

    reason = unusable(settings.device)
    if reason is not None:
        raise BadSetting(f"CACHER_DEVICE is {settings.device!r}: {reason}")


@asynccontextmanager
async def open_service(settings: Settings) -> AsyncGenerator[Service, None]:
    """The service on its database and models; everything ends with it."""
    async with open_models(settings) as models:
        log = await SqliteLog.open(Path(settings.database), max_queue=settings.max_queue)
        try:
            yield Service(
                log,
                models,
                SURROUNDINGS,
                default_model=models.default,
                default_config=default_config(settings),
                max_queue=settings.max_queue,
            )
        finally:
            await log.close()


@asynccontextmanager
async def open_reader(settings: Settings) -> AsyncGenerator[LogReader, None]:
    """The log for reading alone: works beside a running server."""
    reader = await SqliteReader.open(Path(settings.database))
    try:
        yield reader
    finally:
        await reader.close()


def migrate(settings: Settings) -> list[str]:
    """Bring the database to this release's schema; names what was applied."""
    return [migration.name for migration in migrations.migrate(Path(settings.database))]


@asynccontextmanager
async def open_models(settings: Settings) -> AsyncGenerator[ModelStore, None]:
    """The models alone, with the engine that runs them.

    The engine is made beside, on the thread that loads models: whoever needs none does not wait.
    """
    catalogue = Catalogue(settings.model_name, settings.allowed_models)
    thread = ThreadPoolExecutor(1, thread_name_prefix="model-loader")
    engine = thread.submit(_engine, settings)

    def load(source: Source) -> LanguageModel:
        return engine.result().load(source)

    try:
        yield ModelStore(catalogue, load, thread, max_models=settings.max_models)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        engine.result().close()


def _engine(settings: Settings) -> "Loading":
    # Here, since torch takes seconds to import.
    from infra.engine.language_model import DTYPES, EngineOptions
    from infra.engine.loading import Loading

    return Loading(
        EngineOptions(
            dtype=DTYPES[settings.dtype],
            strategy=settings.strategy,
            threads=settings.thread_count,
            hot_cache_bytes=settings.hot_cache_bytes // settings.max_models,
            host_cache_bytes=settings.host_cache_bytes // settings.max_models,
            max_batch=settings.max_batch,
            device=settings.device,
        )
    )


def default_config(settings: Settings) -> StateConfig:
    """The config of a state whose client sets nothing."""
    return StateConfig(
        temperature=settings.default_temperature,
        top_p=settings.default_top_p,
        top_k=0,
        seed=settings.default_seed,
        context_size=settings.default_context_size,
        store_logits=settings.logits_storage,
        top_k_logits=settings.top_k_logits,
    )
