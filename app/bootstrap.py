"""The composition root: builds everything from the settings, in one lifespan."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, BinaryIO

from app.operations.transfer import Arrival, arrival, import_states, open_export
from app.service import MAX_LOOKS, Service, Surroundings
from app.settings import BadSetting, Settings
from domain.baseline import Baseline, BaselineWriter
from domain.config import StateConfig
from domain.ids import MAX_SEED, StateId
from domain.merkle import Checkpoint, origin
from domain.models import Classifier, LanguageModel
from domain.packing import GZIP_BEGIN
from domain.ports import LogReader, Provenance, Signer
from domain.report import Marks
from domain.upkeep import Checked, Released, Statistics
from infra.log import backup, keyring
from infra.log import files as log_files
from infra.log import migrate as migrations
from infra.log import statistics as log_statistics
from infra.log.marks import FileMarks
from infra.log.prune import prune
from infra.log.restore import restore
from infra.log.retention import Retention
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from infra.models.catalogue import Catalogue, Source
from infra.models.store import ModelStore
from infra.signing import BadKey, Ed25519Signer, read_key, verify_note

if TYPE_CHECKING:
    from infra.engine.loading import Loading

_PART_BYTES = 1 << 18
"""What is read of a file at a time."""

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
    open_signer(settings, log_id="")
    if settings.device == "cpu":
        return
    from infra.engine.devices import unusable  # imports torch, which takes seconds

    reason = unusable(settings.device)
    if reason is not None:
        raise BadSetting(f"CACHER_DEVICE is {settings.device!r}: {reason}")


def open_signer(settings: Settings, log_id: str) -> Signer | None:
    """The key that signs the checkpoints of a log, if there is one.

    Raises:
        BadSetting: the file that should hold it does not.
    """
    if settings.signing_key is None:
        return None
    try:
        return Ed25519Signer(origin(log_id), read_key(Path(settings.signing_key)))
    except BadKey as error:
        raise BadSetting(f"CACHER_SIGNING_KEY is {settings.signing_key!r}: {error}") from error


def signed_checkpoint(note: str, public_key: str) -> Checkpoint:
    """The checkpoint in a note, once its signature by a public key (PEM) has been checked.

    Raises:
        ValueError: the note holds none, is not signed by this key, or was changed.
        BadSetting: the key is no Ed25519 key.
    """
    try:
        return verify_note(note, public_key)
    except BadKey as error:
        raise BadSetting(str(error)) from error


@asynccontextmanager
async def open_service(settings: Settings) -> AsyncGenerator[Service, None]:
    """The service on its database and models; everything ends with it."""
    async with open_models(settings) as models:
        log = await SqliteLog.open(
            Path(settings.database),
            max_queue=settings.max_queue + MAX_LOOKS,  # whoever has a turn is not turned away here
            retention=retention(settings),
            erasable=settings.erasable,
        )
        try:
            service = Service(
                log,
                models,
                SURROUNDINGS,
                default_model=models.default,
                default_config=default_config(settings),
                max_queue=settings.max_queue,
                signer=open_signer(settings, log.log_id),
                marks=marks(settings),
            )
            try:
                yield service
            finally:
                await service.replays.close()
        finally:
            await log.close()


def marks(settings: Settings) -> Marks:
    """Where the mark of how far the log was verified is kept."""
    return FileMarks(Path(settings.database))


@asynccontextmanager
async def open_reader(settings: Settings) -> AsyncGenerator[LogReader, None]:
    """The log for reading alone: works beside a running server."""
    reader = await SqliteReader.open(Path(settings.database))
    try:
        yield reader
    finally:
        await reader.close()


@asynccontextmanager
async def open_recorded(path: Path) -> AsyncGenerator[LogReader, None]:
    """A history for reading alone: a log, or an export, which becomes a log of its own first.

    Raises:
        LogError: it is neither, or of another release.
        BrokenExport: the export does not prove what it holds.
    """
    with TemporaryDirectory(prefix="cacher-") as folder:
        if await asyncio.to_thread(_is_packed, path):
            database = Path(folder) / "cacher.db"
            await import_file(path, database)
            path = database
        async with await SqliteReader.open(path) as reader:
            yield reader


def _is_packed(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GZIP_BEGIN)) == GZIP_BEGIN


async def import_file(path: Path, database: Path) -> Arrival:
    """Restore an export of a whole log into a database without events, or add one of states.

    Raises:
        BrokenExport, StateExists, LogError: nothing was changed.
        OSError: the file cannot be read.
    """
    with await asyncio.to_thread(path.open, "rb") as file:
        reading = await open_export(iter(partial(file.read, _PART_BYTES), b""))
        if reading.header.kind == "log":
            head = await asyncio.to_thread(restore, reading, database)
            states = tuple(reading.versions)
            return Arrival(whole=True, states=states, events=reading.size, head=head)
        by = Provenance(
            actor="command line", request_id=uuid.uuid4().hex, recorded_at=SURROUNDINGS.now()
        )
        async with await SqliteLog.open(database) as log:
            return arrival(await import_states(log, reading, provenance=by))


def migrate(settings: Settings) -> list[str]:
    """Bring the database to this release's schema; names what was applied."""
    return [migration.name for migration in migrations.migrate(Path(settings.database))]


def prepare(settings: Settings) -> None:
    """Have the keys of an erasable log there, before anything is served.

    Raises:
        LogError: they are not, or the log is not erasable though it should be.
    """
    path = Path(settings.database)
    held = migrations.lock(path)
    try:
        keyring.prepare(path, erasable=settings.erasable)
    finally:
        held.release()


def back_up(
    settings: Settings, target: Path, *, replace: bool, progress: backup.Progress
) -> Checked:
    """Copy the log, also beside a running server, and check the copy."""
    return backup.back_up(Path(settings.database), target, replace=replace, progress=progress)


def check_backup(path: Path) -> Checked:
    """Whether a server could go on from a copy."""
    return backup.check(path)


def statistics(settings: Settings) -> Statistics:
    """The log in figures."""
    return log_statistics.statistics(Path(settings.database))


def prune_logits(settings: Settings) -> Released:
    """Let go of all stored logits that the settings do not keep; no server may be writing."""
    return prune(Path(settings.database), retention(settings), SURROUNDINGS.now())


def retention(settings: Settings) -> Retention:
    """How much of the stored logits is kept."""
    return Retention(max_days=settings.logits_max_days, max_bytes=settings.logits_max_bytes)


def files_of(database: Path) -> list[Path]:
    """All files that a log has, or would have once it needs them."""
    return log_files.files_of(database.resolve())


def writing(target: Path) -> AbstractContextManager[BinaryIO]:
    """A file to write that takes the place of ``target`` at the end, whole and on disk."""
    return log_files.writing(target)


def write_baseline(path: Path, *, k: int | None) -> AbstractContextManager[BaselineWriter]:
    """A baseline to be recorded, with the ``k`` largest logits of each place, or with all."""
    from infra.log.baseline import BaselineFileWriter  # imports numpy

    return BaselineFileWriter(path, k=k)


def open_baseline(path: Path) -> AbstractContextManager[Baseline]:
    """A recorded baseline.

    Raises:
        NotComparable: it is none, or was cut or altered.
    """
    from infra.log.baseline import BaselineFile

    return BaselineFile(path)


@asynccontextmanager
async def open_models(settings: Settings) -> AsyncGenerator[ModelStore, None]:
    """The models alone, with the engine that runs them.

    The engine is made beside, on the thread that loads models: whoever needs none does not wait.
    """
    catalogue = Catalogue(settings.model_name, settings.allowed_models)
    thread = ThreadPoolExecutor(1, thread_name_prefix="model-loader")
    engine = thread.submit(_engine, settings)

    def load(source: Source) -> LanguageModel | Classifier:
        return engine.result().load(source)

    try:
        yield ModelStore(catalogue, load, thread, max_models=settings.max_models)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        engine.result().close()


def _engine(settings: Settings) -> "Loading":
    # Here, since torch takes seconds to import.
    from infra.engine.loading import Loading
    from infra.engine.options import DTYPES, EngineOptions

    return Loading(
        EngineOptions(
            dtype=DTYPES[settings.dtype],
            strategy=settings.strategy,
            threads=settings.thread_count,
            hot_cache_bytes=settings.hot_cache_bytes // settings.max_models,
            host_cache_bytes=settings.host_cache_bytes // settings.max_models,
            max_batch=settings.max_batch,
            device=settings.device,
            max_result_bytes=settings.max_result_bytes,
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
