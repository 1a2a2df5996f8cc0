"""Fixtures of the tests that start servers of their own, and when the long ones run."""

import os
from collections.abc import Iterator

import pytest

from tests.end_to_end.forking import FastServer, Nursery
from tests.end_to_end.written import Log, write_log


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests run on ``make soak`` only."""
    if os.environ.get("SOAK") != "1":
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="long: run it with `make soak`"))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where fast servers come from."""
    with Nursery() as process:
        yield process


@pytest.fixture(scope="session")
def log(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """A log that was written over HTTP, by a server that has stopped. Change copies of it only."""
    server = FastServer(nursery, tmp_path_factory.mktemp("written") / "cacher.db")
    with server, server.client() as client:
        positions = write_log(client)
    return Log(server.database, positions)
