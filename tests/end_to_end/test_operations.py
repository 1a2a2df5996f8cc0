"""Backups, figures and retention, as an operator meets them."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.app.api import eventually
from tests.end_to_end.calls import OPENING, query, verified, walk_chain
from tests.end_to_end.tampering import edit, tampering
from tests.end_to_end.test_command_line import change_token, head_of, refusal, run
from tests.end_to_end.written import Log, write_log
from tests.forking import FastServer, Nursery

pytestmark = pytest.mark.usefixtures("models_kept")

WRITERS = 3


class Writers:
    """Clients that go on writing until they are told to stop; ``answers`` counts them."""

    def __init__(self, server: FastServer) -> None:
        self.answers = 0
        self.refused: list[str] = []
        self._server, self._stop = server, threading.Event()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._write) for _ in range(WRITERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _write(self) -> None:
        with self._server.client() as client:
            body = {"text": OPENING, "config": {"store_logits": "full"}}
            state_id = client.post("/v1/states", json=body).json()["state_id"]
            while not self._stop.is_set():
                body = {"state_id": state_id, "text": " a"}
                answer = client.post("/v1/forward", json=body)
                self.refused += [] if answer.is_success else [answer.text]
                self.answers += 1


def until(writers: Writers, answers: int) -> None:
    """Wait for so many more answers."""
    wanted = writers.answers + answers
    eventually(lambda: writers.answers >= wanted or bool(writers.refused))


# backup


def test_a_backup_under_load_is_the_log_at_one_moment_and_can_be_served(
    nursery: Nursery, tmp_path: Path
) -> None:
    server = FastServer(nursery, tmp_path / "cacher.db")
    heads = []
    with server:
        writers = Writers(server)
        with writers.at_work():
            for number in range(2):
                until(writers, 3)
                result = run("backup", tmp_path / f"{number}.db", "--database", server.database)
                assert result.exit_code == 0, result.stderr
                heads.append(result.stdout.strip())
            until(writers, 3)
    assert writers.refused == []
    positions = [int(head.partition(":")[0]) for head in heads]
    assert 0 < positions[0] < positions[1]
    assert positions[1] < walk_chain(server.database).position
    for number, head in enumerate(heads):
        # Each was a head of the log, and is the head of its backup.
        assert head_of(tmp_path / f"{number}.db") == head
        assert_in(server.database, head)
    with FastServer(nursery, tmp_path / "1.db") as restored, restored.client() as client:
        at = client.get("/v1/audit/head").json()
        assert f"{at['position']}:{at['hash']}" == heads[1]
        report = verified(client)
        assert client.post("/v1/states", json={"text": OPENING}).status_code == 201
    assert (report["result"], report["divergences"]) == ("equal", [])
    assert report["events_checked"] == positions[1]


def assert_in(database: Path, head: str) -> None:
    position, _, digest = head.partition(":")
    sql = "SELECT lower(hex(hash)) FROM events WHERE position = ?"
    assert query(database, sql, int(position)) == [(digest,)]


@pytest.fixture
def forged(log: Log, tmp_path: Path) -> Path:
    """A log with a token changed, and its chain left as it was."""
    with tampering(log.database, tmp_path / "forged.db", rehash=False) as connection:
        edit(connection, log.positions["generated"], change_token)
    return tmp_path / "forged.db"


def test_backup_prints_the_head_of_what_it_copied(log: Log, tmp_path: Path) -> None:
    result = run("backup", tmp_path / "copy.db", "--database", log.database)
    assert (result.exit_code, result.stdout.strip()) == (0, head_of(log.database))
    assert f"sound: {len(log.positions)} events of 11 states" in result.stderr
    checked = run("backup", "--check", tmp_path / "copy.db")
    assert (checked.exit_code, checked.stdout.strip()) == (0, head_of(log.database))


def test_backup_of_a_forged_log_exits_with_1_and_takes_no_place(
    log: Log, forged: Path, tmp_path: Path
) -> None:
    result = run("backup", tmp_path / "copy.db", "--database", forged)
    assert (result.exit_code, result.stdout) == (1, "")
    position = log.positions["generated"]
    assert f"not sound: position {position}: a column was changed" in result.stderr
    assert not (tmp_path / "copy.db").exists()
    checked = run("backup", "--check", forged)
    assert (checked.exit_code, checked.stdout) == (1, "")


def test_backup_replaces_a_file_only_if_it_is_forced(log: Log, tmp_path: Path) -> None:
    arguments = ("backup", tmp_path / "copy.db", "--database", log.database)
    assert run(*arguments).exit_code == 0
    assert "is there already; --force replaces it" in refusal(run(*arguments))
    assert run(*arguments, "--force").exit_code == 0


def test_backup_of_what_is_not_there_could_not_be_done(tmp_path: Path) -> None:
    result = run("backup", tmp_path / "copy.db", "--database", tmp_path / "none.db")
    assert "there is no log at" in refusal(result)
    assert "there is no file" in refusal(run("backup", "--check", tmp_path / "none.db"))
    (tmp_path / "empty.db").touch()
    assert "is empty" in refusal(run("backup", "--check", tmp_path / "empty.db"))
    (tmp_path / "empty.db").unlink()
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".lock"]


def test_backup_of_an_erasable_log_says_that_its_keys_are_not_in_it(
    nursery: Nursery, tmp_path: Path
) -> None:
    server = FastServer(nursery, tmp_path / "cacher.db", CACHER_ERASABLE="1")
    with server, server.client() as client:
        assert client.post("/v1/states", json={"text": "My name is Ada."}).status_code == 201
        result = run("backup", tmp_path / "copy.db", "--database", server.database)
    assert result.exit_code == 0, result.stderr
    assert "a file of their own (<database>.keys), and not in the backup" in result.stderr
    copied = (tmp_path / "copy.db").read_bytes()
    assert b"Ada" not in copied
    assert not (tmp_path / "copy.db.keys").exists()


# figures


def test_stat_prints_the_figures_of_a_log_that_is_served(
    nursery: Nursery, log: Log, tmp_path: Path
) -> None:
    shutil.copyfile(log.database, tmp_path / "served.db")
    with FastServer(nursery, tmp_path / "served.db") as server, server.client() as client:
        log.delete(client, "opened")  # still in the WAL
        result = run("log", "stat", "--database", server.database, "--json")
        head = client.get("/v1/audit/head").json()
        text = run("log", "stat", "--database", server.database).stdout
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["head"] == f"{head['position']}:{head['hash']}"
    assert found["events"] == len(log.positions) + 1 == sum(found["events_by_type"].values())
    assert found["states"] == {"live": 9, "deleted": 2, "erased": 0}
    assert found["bytes"]["logits"] > 0
    assert found["bytes"]["wal"] > 0
    assert sum(found["fingerprints"].values()) <= found["events"]
    assert re.search(rf"^events +{len(log.positions) + 1}$", text, re.MULTILINE)
    assert re.search("^states +9 live, 2 deleted, 0 erased$", text, re.MULTILINE)


def test_stat_without_a_database_could_not_be_done(tmp_path: Path) -> None:
    assert "there is no log at" in refusal(run("log", "stat", "--database", tmp_path / "none.db"))


# retention of stored logits


def kept(database: Path) -> list[int]:
    found = query(database, "SELECT DISTINCT position FROM logits ORDER BY position")
    return [position for (position,) in found]


def test_a_server_keeps_the_newest_logits_and_verification_misses_none(
    nursery: Nursery, tmp_path: Path
) -> None:
    server = FastServer(nursery, tmp_path / "cacher.db", CACHER_LOGITS_MAX_BYTES="3000")
    with server, server.client() as client:
        write_log(client)
        report = client.post("/v1/replay/verify", json={"all": True}).json()
    (found,) = query(server.database, "SELECT bytes, released_until FROM logits_kept")
    (size,) = query(server.database, "SELECT sum(length(data)) FROM logits")
    assert (found[0],) == size
    assert found[0] <= 3000
    assert 0 < found[1] < kept(server.database)[0]
    assert (report["result"], report["divergences"]) == ("equal", [])
    assert run("backup", "--check", server.database).exit_code == 0


def test_prune_lets_go_at_once_and_the_chain_stays(log: Log, tmp_path: Path) -> None:
    database = tmp_path / "copy.db"
    shutil.copyfile(log.database, database)
    before = kept(database)
    assert len(before) > 3
    arguments = ("log", "prune-logits", "--database", database)
    assert "say how many with --max-days or --max-bytes" in refusal(run(*arguments))
    assert run(*arguments, "--max-days", 1).stdout.startswith("let go of the logits of 0 events")
    result = run(*arguments, "--max-bytes", 2000)
    assert result.exit_code == 0
    after = kept(database)
    assert 0 < len(after) < len(before)
    assert after == before[-len(after) :]
    gone = len(before) - len(after)
    assert result.stdout.startswith(f"let go of the logits of {gone} events, ")
    assert head_of(database) == head_of(log.database)
    assert run("verify", "--database", database).exit_code == 0


def test_prune_of_what_is_no_log_could_not_be_done_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2000))
    for name, why in (("image.png", "cannot be read as a log"), ("none.db", "there is no log at")):
        arguments = ("log", "prune-logits", "--max-bytes", 1, "--database", tmp_path / name)
        assert why in refusal(run(*arguments))
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_prune_is_refused_beside_a_server(nursery: Nursery, log: Log, tmp_path: Path) -> None:
    database = tmp_path / "served.db"
    shutil.copyfile(log.database, database)
    with FastServer(nursery, database) as server, server.client() as client:
        result = run("log", "prune-logits", "--database", database, "--max-bytes", 1)
        assert "another process writes to" in refusal(result)
        assert client.get("/ready").is_success
    assert kept(database) == kept(log.database)
