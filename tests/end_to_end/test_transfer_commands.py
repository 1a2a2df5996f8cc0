"""``cacher export``, ``import`` and ``check``, as an operator and an auditor use them."""

import gzip
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from app import bootstrap
from app.cli import main
from app.cli.outputs import write
from domain.packing import Packer
from tests.end_to_end.calls import query, walk_chain
from tests.end_to_end.tampering import edit, tampering
from tests.end_to_end.written import Log
from tests.forking import FAST, FastServer, Nursery

pytestmark = pytest.mark.usefixtures("models_kept")

TINY = {"CACHER_MODEL_NAME": "cacher-tiny", **FAST}
EVENTS = "SELECT * FROM events ORDER BY position"


def run(*arguments: object, **settings: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)), env={**TINY, **settings})


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(result: Result) -> str:
    """What a command that did not do its work said."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def denial(result: Result) -> str:
    """What ``check`` said of an export that is not what was remembered."""
    assert result.exit_code == 1, result.output
    assert result.stdout.startswith("not proven: ")
    return result.stdout


def head_of(database: Path) -> str:
    sql = "SELECT position, lower(hex(hash)) FROM events ORDER BY position DESC LIMIT 1"
    position, digest = query(database, sql)[0]
    return f"{position}:{digest}"


def change_token(payload: dict[str, Any]) -> None:
    payload["content"]["tokens"][2] ^= 1


def packed(lines: list[bytes]) -> bytes:
    packer = Packer()
    return packer.pack(b"".join(lines)) + packer.end()


@pytest.fixture
def merged(log: Log) -> str:
    return log.place("merged")[1]


@pytest.fixture
def whole(log: Log, tmp_path: Path) -> Path:
    """An export of the whole log."""
    done(run("export", tmp_path / "log.gz", "--database", log.database))
    return tmp_path / "log.gz"


@pytest.fixture
def state(log: Log, merged: str, tmp_path: Path) -> Path:
    """An export of a state with many ancestors."""
    done(run("export", tmp_path / "state.gz", "--database", log.database, "--state", merged))
    return tmp_path / "state.gz"


@pytest.fixture
def checkpoint(log: Log, tmp_path: Path) -> Path:
    """The checkpoint of the log that both exports are of."""
    (tmp_path / "note").write_text(done(run("log", "head", "--database", log.database)))
    return tmp_path / "note"


# restoring


def test_a_restored_log_has_the_same_head_and_verifies(
    log: Log, whole: Path, tmp_path: Path
) -> None:
    restored = tmp_path / "restored.db"
    said = done(run("import", whole, "--database", restored))
    assert f"restored a log: {len(log.positions)} events of 11 states" in said
    assert f"head {head_of(log.database)}" in said
    assert query(restored, EVENTS) == query(log.database, EVENTS)
    verified = done(run("verify", "--database", restored, "--head", head_of(log.database)))
    assert verified.startswith("equal: ")


def test_a_server_goes_on_from_a_restored_log(
    nursery: Nursery, log: Log, whole: Path, merged: str, tmp_path: Path
) -> None:
    restored = tmp_path / "restored.db"
    done(run("import", whole, "--database", restored))
    body = {"state_id": merged, "max_tokens": 5, "ignore_eos": True}
    with FastServer(nursery, restored) as server, server.client() as client:
        assert client.post("/v1/generate/token", json=body).json()["token_ids"]
    assert walk_chain(restored).position == len(log.positions) + 1


def test_the_same_log_makes_the_same_file(log: Log, whole: Path, tmp_path: Path) -> None:
    done(run("export", tmp_path / "again.gz", "--database", log.database))
    assert (tmp_path / "again.gz").read_bytes() == whole.read_bytes()


# states


def test_states_move_from_log_to_log_and_verify_in_each(
    nursery: Nursery, log: Log, state: Path, merged: str, tmp_path: Path
) -> None:
    """From the first log to a second by command, from there to a third over HTTP."""
    second = tmp_path / "second.db"
    said = done(run("import", state, "--database", second))
    assert "added states: 19 events of 4 states" in said
    assert done(run("verify", "--database", second)).startswith("equal: 19 events")
    with FastServer(nursery, second) as server, server.client() as client:
        exported = client.get(f"/v1/states/{merged}/export").content
    with FastServer(nursery, tmp_path / "third.db") as server, server.client() as client:
        headers = {"Content-Type": "application/gzip"}
        answer = client.post("/v1/states/import", content=exported, headers=headers)
        assert answer.status_code == 201, answer.text
        moved = client.get(f"/v1/states/{merged}").json()
    with FastServer(nursery, log.database) as server, server.client() as client:
        assert client.get(f"/v1/states/{merged}").json() == moved
    assert done(run("verify", "--database", tmp_path / "third.db")).startswith("equal: 19 events")


def test_several_states_are_exported_at_once_to_standard_output(
    log: Log, merged: str, tmp_path: Path
) -> None:
    forked = log.place("forked")[1]
    states = ["--state", merged, "--state", forked, "--state", merged]
    result = run("export", "-", "--database", log.database, *states)
    assert result.exit_code == 0, result.stderr
    (tmp_path / "both.gz").write_bytes(result.stdout_bytes)
    header = json.loads(gzip.decompress(result.stdout_bytes).splitlines()[0])
    assert [one["state_id"] for one in header["states"]] == [merged, forked]
    said = done(run("import", tmp_path / "both.gz", "--database", tmp_path / "new.db"))
    assert "of 6 states" in said


def test_export_works_beside_a_running_server_and_import_does_not(
    nursery: Nursery, log: Log, state: Path, tmp_path: Path
) -> None:
    shutil.copyfile(log.database, tmp_path / "served.db")
    with FastServer(nursery, tmp_path / "served.db") as server, server.client() as client:
        log.delete(client, "opened")  # still in the WAL
        done(run("export", tmp_path / "live.gz", "--database", server.database))
        before = head_of(server.database)
        assert "another process writes" in refusal(
            run("import", state, "--database", server.database)
        )
        assert head_of(server.database) == before
    done(run("check", tmp_path / "live.gz", "--head", before))


# refusals


def test_a_file_is_not_replaced_unless_that_is_asked_for(log: Log, whole: Path) -> None:
    whole.write_bytes(b"something else")
    arguments = ("export", whole, "--database", log.database)
    assert "is there already" in refusal(run(*arguments))
    assert whole.read_bytes() == b"something else"
    done(run(*arguments, "--force"))
    assert whole.read_bytes() != b"something else"


def test_an_export_that_fails_leaves_no_file(log: Log, tmp_path: Path) -> None:
    for arguments in (
        ("--database", log.database, "--state", "state-0"),
        ("--database", tmp_path / "nowhere.db"),
    ):
        refusal(run("export", tmp_path / "out.gz", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_names_its_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    target, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    target.write_text("kept")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{target}'"):
            write(target, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["kept"]


def test_an_import_that_is_refused_changes_nothing(
    log: Log, whole: Path, state: Path, tmp_path: Path
) -> None:
    shutil.copyfile(log.database, tmp_path / "copy.db")
    lines = gzip.decompress(whole.read_bytes()).splitlines(keepends=True)
    (tmp_path / "cut.gz").write_bytes(packed(lines[:-1]))
    for file, database, why in (
        (state, "copy.db", "is in this log already"),
        (whole, "copy.db", "holds events"),
        (tmp_path / "cut.gz", "new.db", "cut off"),
        (log.database, "new.db", "no gzip file"),
        (tmp_path / "nowhere.gz", "new.db", "No such file"),
    ):
        assert why in refusal(run("import", file, "--database", tmp_path / database))
    assert query(tmp_path / "copy.db", EVENTS) == query(log.database, EVENTS)
    assert not (tmp_path / "new.db").exists()


# check


def test_a_whole_log_is_proven_by_any_remembered_head(log: Log, whole: Path) -> None:
    rows = query(log.database, "SELECT position, lower(hex(hash)) FROM events")
    for position, digest in (rows[0], rows[20], rows[-1]):
        said = done(run("check", whole, "--head", f"{position}:{digest}"))
        assert f"{position}:{digest} is in it" in said
    assert "is not in the log" in denial(run("check", whole, "--head", f"3:{'0' * 64}"))
    assert "is not in the log" in denial(run("check", whole, "--head", f"999:{rows[-1][1]}"))


def test_check_needs_nothing_but_the_files(
    whole: Path, log: Log, state: Path, checkpoint: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """In a process of its own, where there is neither a database nor a model."""
    nothing = {"CACHER_DATABASE": str(tmp_path / "none.db"), "CACHER_MODEL_NAME": "none"}
    remembered = {str(whole): ("--head", head_of(log.database))}
    remembered[str(state)] = ("--checkpoint", str(checkpoint))
    for file, options in remembered.items():
        result = nursery.run("check", file, *options, **nothing)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("proven: ")
    assert not (tmp_path / "none.db").exists()


def test_an_export_of_a_forged_log_is_denied_also_where_the_chain_was_hashed_anew(
    log: Log, merged: str, checkpoint: Path, tmp_path: Path
) -> None:
    database = tmp_path / "forged.db"
    with tampering(log.database, database, rehash=True) as connection:
        edit(connection, log.positions["continued"], change_token_of_continuation)
        connection.execute("DELETE FROM tiles")
    done(run("export", tmp_path / "log.gz", "--database", database))
    done(run("export", tmp_path / "state.gz", "--database", database, "--state", merged))
    done(run("check", tmp_path / "log.gz", "--head", head_of(database)))  # consistent in itself
    denial(run("check", tmp_path / "log.gz", "--head", head_of(log.database)))
    for file in ("log.gz", "state.gz"):
        denial(run("check", tmp_path / file, "--checkpoint", checkpoint))


def change_token_of_continuation(payload: dict[str, Any]) -> None:
    payload["continuations"][1]["content"]["tokens"][2] ^= 1


def test_a_changed_file_is_denied(state: Path, checkpoint: Path) -> None:
    lines = gzip.decompress(state.read_bytes()).splitlines(keepends=True)
    for at in (0, 1, 2, len(lines) // 2, len(lines) - 1):
        changed = [*lines[:at], lines[at].replace(b"a", b"b", 1), *lines[at + 1 :]]
        state.write_bytes(packed(changed))
        denial(run("check", state, "--checkpoint", checkpoint))


def test_a_head_alone_says_nothing_of_an_export_of_states(log: Log, state: Path) -> None:
    said = refusal(run("check", state, "--head", head_of(log.database)))
    assert "a head says nothing of the events of some states" in said


def test_an_export_is_proven_by_a_checkpoint_of_another_moment_and_a_proof_between(
    nursery: Nursery, log: Log, state: Path, whole: Path, merged: str, tmp_path: Path
) -> None:
    shutil.copyfile(log.database, tmp_path / "served.db")
    early, late, proof = tmp_path / "early", tmp_path / "late", tmp_path / "proof.json"
    later = tmp_path / "later.gz"
    with FastServer(nursery, tmp_path / "served.db") as server, server.client() as client:
        size = client.get("/v1/audit/head").json()["size"]
        early.write_text(client.get("/v1/audit/head", params={"size": 30}).json()["checkpoint"])
        log.delete(client, "opened")
        late.write_text(client.get("/v1/audit/head").json()["checkpoint"])
        later.write_bytes(client.get(f"/v1/states/{merged}/export").content)

        def prove(first: int, second: int) -> Path:
            ask = {"first": first, "second": second}
            proof.write_bytes(client.get("/v1/audit/proof", params=ask).content)
            return proof

        # the checkpoint is older than the export, then newer
        for file, note, sizes in ((later, early, (30, size + 1)), (state, late, (size, size + 1))):
            options = ("check", file, "--checkpoint", note)
            assert "first={}&second={}".format(*sizes) in refusal(run(*options))
            done(run(*options, "--consistency", prove(*sizes)))
            assert "second=" in refusal(run(*options, "--consistency", prove(3, 7)))
            changed = json.loads(prove(*sizes).read_bytes())
            changed["consistency"]["path"][0] = "0" * 64
            proof.write_text(json.dumps(changed))
            assert "does not continue" in denial(run(*options, "--consistency", proof))
    done(run("check", whole, "--checkpoint", early))  # a whole log needs no proof
    refusal(run("check", whole, "--checkpoint", late))


def test_an_export_is_proven_by_the_signature_in_it(log: Log, merged: str, tmp_path: Path) -> None:
    keys = [a_key(tmp_path / name) for name in ("key", "other")]
    signed = {"CACHER_SIGNING_KEY": str(tmp_path / "key")}
    file = tmp_path / "state.gz"
    done(run("export", file, "--database", log.database, "--state", merged, **signed))
    said = done(run("check", file, "--public-key", keys[0], "--head", head_of(log.database)))
    assert "whose signature is right" in said
    assert "no signature" in denial(run("check", file, "--public-key", keys[1]))
    refusal(run("check", file, "--public-key", keys[0], "--head", f"3:{'0' * 64}"))
    done(run("export", file, "--database", log.database, "--state", merged, "--force"))
    assert "no signature" in denial(run("check", file, "--public-key", keys[0]))


def a_key(path: Path) -> Path:
    """Make a private key; returns the file of its public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    public = Path(f"{path}.pub")
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(pem)
    return public


def test_what_cannot_be_checked_says_why(log: Log, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a note")
    (tmp_path / "png").write_bytes(b"\x89PNG\r\n\x1a\n\xff" + bytes(200))
    (tmp_path / "empty").touch()
    head = head_of(log.database)
    for options, why in (
        ((whole,), "nothing to check against"),
        ((whole, "--head", "3"), "position:hash"),
        ((whole, "--checkpoint", tmp_path / "text"), "no checkpoint"),
        ((whole, "--checkpoint", tmp_path / "none"), "No such file"),
        ((whole, "--public-key", tmp_path / "text"), "no public key"),
        ((whole, "--head", head, "--consistency", tmp_path / "text"), "/v1/audit/proof"),
        ((tmp_path / "none", "--head", head), "No such file"),
        ((tmp_path, "--head", head), "Is a directory"),
        ((tmp_path / "png", "--head", head), "is no export"),
        ((tmp_path / "empty", "--head", head), "is no export"),
        ((whole, "--checkpoint", tmp_path / "png"), "--checkpoint must name a file of text"),
        ((whole, "--public-key", tmp_path / "png"), "--public-key must name a file of text"),
        ((whole, "--head", head, "--consistency", tmp_path / "png"), "/v1/audit/proof"),
    ):
        assert why in refusal(run("check", *options))


# reading an export in place of a log


@pytest.mark.parametrize("kind", ["a database", "a whole log", "a state"])
async def test_a_history_is_read_from_whatever_holds_it(
    log: Log, whole: Path, state: Path, merged: str, kind: str
) -> None:
    path = {"a database": log.database, "a whole log": whole, "a state": state}[kind]
    async with bootstrap.open_recorded(path) as reader:
        rows = await reader.state_rows(merged)
        size = await reader.size()
    sql = "SELECT payload FROM events WHERE state_id = ? ORDER BY version"
    assert [(row.payload,) for row in rows] == query(log.database, sql, merged)
    assert size == (19 if kind == "a state" else len(log.positions))
