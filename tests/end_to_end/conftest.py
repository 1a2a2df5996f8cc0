"""Fixtures of the tests that start servers of their own, and when the long ones run."""

import os
from collections.abc import Iterator

import pytest

from infra.engine import loading
from infra.engine.classifier import SequenceClassifier
from infra.engine.language_model import TransformersModel
from infra.engine.loading import Loading
from infra.engine.options import EngineOptions
from infra.models.catalogue import Source
from tests.end_to_end.written import Log, write_log
from tests.forking import FastServer, Nursery


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests run on ``make soak`` only."""
    if os.environ.get("SOAK") != "1":
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="long: run it with `make soak`"))


@pytest.fixture(scope="session")
def log(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """A log that was written over HTTP, by a server that has stopped. Change copies of it only."""
    server = FastServer(nursery, tmp_path_factory.mktemp("written") / "cacher.db")
    with server, server.client() as client:
        positions = write_log(client)
    return Log(server.database, positions)


class Kept(Loading):
    """Loads each embedded model once for all that ask for it, and outlives them."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._models: dict[Source, TransformersModel | SequenceClassifier] = {}

    def load(self, source: Source) -> TransformersModel | SequenceClassifier:
        if source.kind != "embedded":
            return super().load(source)
        if source not in self._models:
            self._models[source] = super().load(source)
        return self._models[source]

    def close(self) -> None:
        """Go on: there will be others."""

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="session")
def engines() -> Iterator[dict[EngineOptions, Kept]]:
    """Engines that go on from test to test."""
    found: dict[EngineOptions, Kept] = {}
    yield found
    for engine in found.values():
        engine.end()


@pytest.fixture(scope="module")
def models_kept(engines: dict[EngineOptions, Kept]) -> Iterator[None]:
    """What is run in this process finds its models loaded, as whoever was before left them."""

    def engine_for(options: EngineOptions) -> Kept:
        if options not in engines:
            engines[options] = Kept(options)
        return engines[options]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "Loading", engine_for)
        yield


@pytest.fixture
def models_of_its_own(models_kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test loads its models itself, and leaves nothing."""
    monkeypatch.setattr(loading, "Loading", Loading)
