"""What a server signs, and proves to whoever remembers a checkpoint of it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from app.cli import main
from domain.chain import Row, row_hash
from domain.merkle import (
    Consistency,
    Inclusion,
    check_consistency,
    continues,
    from_note,
    includes,
    to_note,
)
from infra.log.sqlite_reader import SqliteReader
from infra.signing import verify_note
from tests.app.api import Json, create, forward, generate, ok
from tests.forking import FastServer, Nursery
from tests.support import Server, clean_environment


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "signing.pem"
    private = Ed25519PrivateKey.generate()
    file.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def signing(
    key: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that signs its checkpoints."""
    database = tmp_path_factory.mktemp("signing") / "cacher.db"
    with FastServer(nursery, database, CACHER_SIGNING_KEY=str(key)) as running:
        yield running


@pytest.fixture(scope="module")
def signed(signing: Server) -> Iterator[httpx.Client]:
    with signing.client() as connected:
        state_id = create(connected)["state_id"]
        for text in (" there", " was", " a", " bear"):
            forward(connected, state_id, text)
        yield connected


def head(client: httpx.Client, **parameters: int) -> Json:
    found: Json = ok(client.get("/v1/audit/head", params=parameters))
    return found


def proof(client: httpx.Client, **parameters: int) -> Json:
    found: Json = ok(client.get("/v1/audit/proof", params=parameters))
    return found


def test_a_remembered_checkpoint_is_proven_to_be_the_beginning_of_the_log(
    signed: httpx.Client, tmp_path: Path
) -> None:
    remembered = tmp_path / "checkpoint"
    remembered.write_text(head(signed)["checkpoint"])
    state_id = create(signed)["state_id"]
    generate(signed, state_id)
    kept = from_note(remembered.read_text())
    answer = proof(signed, first=kept.size)
    now = from_note(answer["checkpoint"])
    assert now.size > kept.size
    consistency = msgspec.convert(answer["consistency"], Consistency)
    assert continues(kept, now, consistency)
    assert (answer["first_root"], answer["second_root"]) == (kept.root, now.root)
    assert check_consistency(consistency, answer["first_root"], answer["second_root"])
    between = proof(signed, first=1, second=kept.size)
    assert from_note(between["checkpoint"]) == kept


def test_an_event_is_proven_to_be_in_a_remembered_checkpoint_unless_it_was_changed(
    signed: httpx.Client, signing: Server, tmp_path: Path
) -> None:
    kept = from_note(head(signed)["checkpoint"])
    generate(signed, create(signed)["state_id"])
    answer = proof(signed, position=2, size=kept.size)
    assert from_note(answer["checkpoint"]) == kept
    assert answer["root"] == kept.root
    included = msgspec.convert(answer["inclusion"], Inclusion)
    assert includes(kept, bytes.fromhex(answer["hash"]), included)
    rows = asyncio.run(_rows(signing.database))
    assert includes(kept, row_hash(rows[1]), included)
    changed = msgspec.structs.replace(rows[1], payload=rows[1].payload.replace("there", "THERE"))
    assert changed != rows[1]
    assert not includes(kept, row_hash(changed), included)


async def _rows(path: Path) -> list[Row]:
    async with await SqliteReader.open(path) as log:
        return await log.rows()


def test_checkpoints_are_signed_with_the_key_of_the_server(signed: httpx.Client) -> None:
    found = head(signed)
    answer = signed.get("/v1/audit/key")
    assert answer.headers["content-type"].startswith("application/x-pem-file")
    assert answer.text == found["public_key"]
    kept = verify_note(found["checkpoint"], answer.text)
    fields = ("log_id", "size", "position", "hash", "root")
    assert msgspec.structs.asdict(kept) == {name: found[name] for name in fields}
    assert head(signed)["checkpoint"] == found["checkpoint"]
    for parameters in ({"position": 1}, {"first": 1}):
        assert verify_note(proof(signed, **parameters)["checkpoint"], answer.text) == kept


def test_a_head_can_be_asked_for_as_it_was(signed: httpx.Client) -> None:
    before, size = head(signed), head(signed)["size"]
    generate(signed, create(signed)["state_id"])
    assert head(signed)["size"] > size
    assert head(signed, size=size) == before
    assert head(signed, size=0)["position"] == 0


def run(*arguments: object, **settings: str) -> Any:
    environment: dict[str, str | None] = {**clean_environment(**settings)}
    return CliRunner().invoke(main, ["log", "head", *map(str, arguments)], env=environment)


def test_the_command_line_prints_the_checkpoint_beside_a_running_server(
    signed: httpx.Client, signing: Server, key: Path
) -> None:
    found = head(signed)
    result = run("--database", signing.database, CACHER_SIGNING_KEY=str(key))
    assert (result.exit_code, result.stdout) == (0, found["checkpoint"])
    unsigned = run("--database", signing.database, "--size", 2)
    assert unsigned.stdout == to_note(from_note(head(signed, size=2)["checkpoint"]))
