"""Recorded logs as tests: which states there are to replay, and what comes of each."""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import msgspec
from anyio.from_thread import BlockingPortal, start_blocking_portal
from msgspec import Struct, structs

from app import bootstrap
from app.operations.regress import Regressor, Request
from app.operations.replays import Skipped, passages_said
from app.reports import wording
from app.settings import PREFIX, BadSetting, Settings, from_environment
from domain.baseline import Baseline
from domain.errors import NotComparable, Refusal
from domain.events import decode
from domain.ids import ModelId, StateId
from domain.log_errors import EventErased, LogError
from domain.models import Models
from domain.ports import LogReader
from domain.regress import Limits, StateRegression

K = TypeVar("K")
V = TypeVar("V")

SETTINGS: Final = ("dtype", "device", "strategy", "threads")
"""Settings that a recording may be given; they stand over those of the environment."""


class BadRecording(Exception):
    """A recording that cannot be replayed at all; says what is wrong with it."""


class Recording(Struct, frozen=True, kw_only=True):
    """A log that was recorded, and how to replay it.

    ``with_model`` says that the model of the settings stands in for that of each state;
    ``against`` is a baseline.
    """

    log: Path
    settings: Settings
    with_model: bool
    against: Path | None
    limits: Limits

    def states(self) -> dict[StateId, str | None]:
        """The states to replay, oldest first; for one that cannot be, the reason.

        Raises:
            BadRecording: there are none, or the log or the baseline cannot be read.
        """
        try:
            states = asyncio.run(self._states())
        except (LogError, Refusal, NotComparable) as error:
            raise BadRecording(str(error)) from error
        if all(reason is not None for reason in states.values()):
            reasons = "; ".join(dict.fromkeys(map(str, states.values())))
            raise BadRecording(f"{self.log} has no state to replay: {reasons or 'it is empty'}")
        return states

    async def _states(self) -> dict[StateId, str | None]:
        async with bootstrap.open_recorded(self.log) as reader:
            if self.against is not None:  # all of it must be there to be replayed
                with bootstrap.open_baseline(self.against) as baseline:
                    return dict.fromkeys(baseline.state_ids())
            return {one: await _reason(reader, one) for one in await reader.state_ids()}


async def _reason(reader: LogReader, state_id: StateId) -> str | None:
    """Why a state cannot be replayed, whatever the model."""
    try:
        passages_said([decode(row) for row in await reader.state_rows(state_id)])
    except EventErased:
        return "it was erased"
    except Skipped as reason:
        return str(reason)
    return None


def recording_of(folder: Path, log: Sequence[Any], options: Mapping[str, Any]) -> Recording:
    """What the arguments of a ``cacher_log`` marker mean; paths are relative to ``folder``.

    Raises:
        BadRecording: names what is wrong.
    """
    known = ("model", "against", *SETTINGS, *Limits.__struct_fields__)
    if len(log) != 1:
        raise BadRecording("cacher_log takes one log: its path")
    if unknown := options.keys() - set(known):
        raise BadRecording(f"cacher_log has no {sorted(unknown)[0]}; it has {', '.join(known)}")
    path, model, against = folder / log[0], options.get("model"), options.get("against")
    if not path.exists():
        raise BadRecording(f"there is no log at {path}")
    given = {name: options[name] for name in SETTINGS if options.get(name) is not None}
    if model is not None:
        # A folder beside the test, or the name of a model.
        given["model_name"] = folder / model if (folder / model).is_dir() else model
    try:
        limits = {name: value for name, value in options.items() if name in known[-6:]}
        return Recording(
            log=path,
            settings=_settings(given),
            with_model=model is not None,
            against=None if against is None else folder / against,
            limits=msgspec.convert(limits, Limits),
        )
    except (BadSetting, msgspec.ValidationError) as error:
        raise BadRecording(str(error)) from error


def _settings(given: Mapping[str, Any]) -> Settings:
    """Those of the environment, these, and leave to name any model that the log names."""
    ours = {f"{PREFIX}{name.upper()}": str(value) for name, value in given.items()}
    settings = from_environment({**os.environ, **ours})
    return structs.replace(settings, allowed_models=(*settings.allowed_models, "*"))


class Replayed(StateRegression, frozen=True, kw_only=True):
    """What became of a state; ``differences`` are those of the numerics, then and now."""

    differences: dict[str, tuple[Any, Any]]

    def check(self) -> None:
        """Fail if the state is beyond a limit.

        Raises:
            AssertionError: says which limit, and the first choice that changed.
        """
        __tracebackhide__ = True
        if self.failures:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """What became of the state, in a few lines."""
        differs = [
            f"  numerics: {name} was {was!r}, is {now!r}"
            for name, (was, now) in self.differences.items()
        ]
        return "\n".join([wording.explain(self), *differs])


class _Models(Models, Protocol):
    @property
    def default(self) -> ModelId:
        """The model that the settings name."""


class Replays:
    """Replays for one session of tests: models and logs are opened once, and closed at its end."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._portal: BlockingPortal
        self._logs: dict[Path, LogReader] = {}
        self._models: dict[Settings, _Models] = {}
        self._baselines: dict[Path, Baseline] = {}

    def __enter__(self) -> Self:
        # pytest collects what loggers say at any level: torch's compiler says thousands of lines.
        logging.getLogger("torch.__trace").addFilter(lambda record: False)
        self._portal = self._opened.enter_context(start_blocking_portal())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    def replay(self, recording: Recording, state_id: StateId) -> Replayed:
        """Replay one state.

        Raises:
            NotComparable, Refusal, LogError: it could not be replayed.
        """
        models = self._once(self._models, recording.settings, bootstrap.open_models)
        regressor = Regressor(
            self._once(self._logs, recording.log, bootstrap.open_recorded),
            models,
            baseline=None if recording.against is None else self._baseline(recording.against),
        )
        model_id = models.default if recording.with_model else None
        request = Request(state_ids=(state_id,), model_id=model_id, limits=recording.limits)
        found = self._portal.call(regressor.run, request)
        return Replayed(**structs.asdict(found.states[0]), differences=found.differences)

    def _once(
        self, kept: dict[K, V], key: K, opens: Callable[[K], AbstractAsyncContextManager[V]]
    ) -> V:
        if key not in kept:
            opening = self._portal.wrap_async_context_manager(opens(key))
            kept[key] = self._opened.enter_context(opening)
        return kept[key]

    def _baseline(self, path: Path) -> Baseline:
        if path not in self._baselines:
            self._baselines[path] = self._opened.enter_context(bootstrap.open_baseline(path))
        return self._baselines[path]
