"""The server is killed again and again at any moment: nothing is lost."""

import os
import sys
from pathlib import Path

import pytest

from tests.end_to_end.calls import query
from tests.end_to_end.random_kills import TYPES, run
from tests.forking import FastServer, Nursery


def test_nothing_is_lost_in_three_kills(nursery: Nursery, tmp_path: Path) -> None:
    server = FastServer(nursery, tmp_path / "cacher.db")
    try:
        figures = run(server, kills=3, seed=1)
    finally:
        server.kill()
    assert figures["kills"] == 3
    assert figures["requests acknowledged"] > 0
    assert figures["requests cut off by a kill"] > 0


@pytest.mark.soak
def test_nothing_is_lost_in_many_kills(
    nursery: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FastServer(nursery, tmp_path / "cacher.db")
    kills = int(os.environ.get("SOAK_KILLS", "60"))
    try:
        figures = run(server, kills=kills, seed=2)
    finally:
        server.kill()
    with capsys.disabled():
        sys.stdout.write(f"\n{figures}\n")
    assert figures["kills"] == kills >= 50
    assert set(TYPES.values()) == {
        kind for (kind,) in query(server.database, "SELECT DISTINCT type FROM events")
    }
