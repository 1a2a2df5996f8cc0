"""Fixtures that several tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

import infra.engine  # noqa: F401 - sets how threads wait, before anything loads torch
from tests.support import Server

LONGEST: Final = ("test_docs.py", "test_benchmarks.py", "test_strict_processors.py")
"""These files first, in this order, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; in each the tests stay as they are."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server on the embedded model, shared by all tests that do not kill it."""
    with Server(tmp_path_factory.mktemp("server") / "cacher.db") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "cacher.db"
