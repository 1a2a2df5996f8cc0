"""Fixtures that several tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.forking import ForkedServer, Nursery
from tests.support import Server

FIRST: Final = (
    "tests/test_docs.py",
    "tests/domain/",
    "tests/infra/log/",
    "tests/faults/test_failing_disk.py",
    "tests/faults/test_damaged_wal.py",
    "tests/faults/test_lost_power.py",
    "tests/test_benchmarks.py",
    "tests/infra/engine/test_strict_processors.py",
    "tests/infra/engine/test_families.py",
    "tests/infra/engine/test_contract.py",
    "tests/end_to_end/test_command_line.py",
    "tests/test_embedded_models_script.py",
    "tests/test_architecture.py",
)
"""These first, in this order: one worker compiles the kernels, for the pages, while the other has
tests that need none; and no worker is left alone with a long file at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; in each the tests stay as they are."""
    items.sort(key=lambda item: place(item.nodeid))


def place(nodeid: str) -> int:
    """Where a test comes in ``FIRST``, or behind all of these."""
    places = (at for at, name in enumerate(FIRST) if nodeid.startswith(name))
    return next(places, len(FIRST))


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where fast servers come from."""
    with Nursery() as process:
        yield process


@pytest.fixture(scope="session")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server on the embedded model, shared by all tests that do not kill it."""
    with ForkedServer(nursery, tmp_path_factory.mktemp("server") / "cacher.db") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "cacher.db"
