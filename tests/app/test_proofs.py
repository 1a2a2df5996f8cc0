"""A log proves what it holds, to whoever kept a checkpoint and nothing else."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.cli import main
from app.operations.proofs import Proofs, note
from domain.chain import genesis, row_hash
from domain.errors import InvalidInput, LogAltered
from domain.ids import Position
from domain.merkle import (
    TILE,
    Checkpoint,
    continues,
    from_note,
    includes,
    root,
    to_note,
)
from infra.log.sqlite_log import SqliteLog
from infra.log.sqlite_reader import SqliteReader
from infra.signing import Ed25519Signer, verify_note
from tests.app.api import Json, assert_problem, create, ok
from tests.builders import BY, append, created
from tests.end_to_end.tampering import edit, tampering
from tests.support import clean_environment

SIZE = 2 * TILE + 90
SIZES = (0, 1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, SIZE - 1, SIZE)


async def add(log: SqliteLog, count: int) -> None:
    begun = len(await log.state_ids())
    appends = [append(created(), state=begun + number) for number in range(count)]
    await log.append(appends, provenance=BY)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of some tiles and a part of one. Change copies of it only."""

    async def write() -> None:
        async with await SqliteLog.open(written) as log:
            await add(log, SIZE)

    written = tmp_path_factory.mktemp("log") / "log.db"
    asyncio.run(write())
    return written


@pytest.fixture
def without_tiles(path: Path, tmp_path: Path) -> Path:
    """The same, as an earlier release left it."""
    with tampering(path, tmp_path / "old.db", rehash=False) as connection:
        connection.execute("DELETE FROM tiles")
    return tmp_path / "old.db"


def removed(path: Path, copy: Path, *positions: int) -> Path:
    """The same, with events removed behind its back."""
    with tampering(path, copy, rehash=False) as connection:
        connection.executemany("DELETE FROM events WHERE position = ?", [(p,) for p in positions])
    return copy


async def hashes(log: SqliteReader) -> list[bytes]:
    return [digest for _, digest in await log.hashes(after=Position(0), limit=-1)]


async def test_a_checkpoint_is_the_log_as_it_was_at_a_size(path: Path) -> None:
    async with await SqliteReader.open(path) as log:
        rows, proofs = await log.rows(), Proofs(log)
        for size in SIZES:
            newest = rows[size - 1] if size else await log.genesis()
            assert await proofs.checkpoint(size) == Checkpoint(
                log_id=log.log_id,
                size=size,
                position=newest.position,
                hash=newest.hash.hex(),
                root=root([row.hash for row in rows[:size]]).hex(),
            )
        assert await proofs.checkpoint() == await proofs.checkpoint(SIZE)


async def test_an_empty_log_has_a_checkpoint_that_all_of_its_later_ones_continue(
    tmp_path: Path,
) -> None:
    async with await SqliteLog.open(tmp_path / "log.db") as log:
        proofs = Proofs(log)
        empty = await proofs.checkpoint()
        assert (empty.size, empty.position) == (0, 0)
        assert empty.hash == genesis(log.log_id).hash.hex()
        assert continues(empty, empty, await proofs.consistency(0))
        await add(log, 3)
        assert continues(empty, await proofs.checkpoint(), await proofs.consistency(0))


async def test_every_event_is_proven_to_be_in_every_checkpoint_after_it(path: Path) -> None:
    async with await SqliteReader.open(path) as log:
        rows, proofs = await log.rows(), Proofs(log)
        for size in SIZES[1:]:
            checkpoint = await proofs.checkpoint(size)
            chosen = rows[:size] if size == SIZE else rows[max(size - 3, 0) : size]
            positions = [row.position for row in reversed(chosen)]
            found = await proofs.inclusions(positions, size)
            assert [proof.position for proof in found] == positions
            for row, proof in zip(reversed(chosen), found, strict=True):
                assert includes(checkpoint, row.hash, proof)


async def test_every_checkpoint_is_proven_to_continue_every_one_before_it(path: Path) -> None:
    async with await SqliteReader.open(path) as log:
        proofs = Proofs(log)
        checkpoints = {size: await proofs.checkpoint(size) for size in SIZES}
        for first in SIZES:
            for second in (size for size in SIZES if size >= first):
                proof = await proofs.consistency(first, second)
                assert continues(checkpoints[first], checkpoints[second], proof)


async def test_a_log_that_keeps_no_tiles_proves_the_same(path: Path, without_tiles: Path) -> None:
    async with (
        await SqliteReader.open(path) as log,
        await SqliteReader.open(without_tiles) as old,
    ):
        assert await old.tiles() == []
        known, computed = Proofs(log), Proofs(old)
        for size in SIZES:
            assert await computed.checkpoint(size) == await known.checkpoint(size)
            assert await computed.consistency(size) == await known.consistency(size)
        positions = [Position(at) for at in (1, TILE, TILE + 1, SIZE)]
        assert await computed.inclusions(positions) == await known.inclusions(positions)


async def test_proofs_hold_while_events_are_added(tmp_path: Path) -> None:
    async with await SqliteLog.open(tmp_path / "log.db") as log:
        await add(log, TILE - 9)
        proofs = Proofs(log)
        first = await proofs.checkpoint()
        sizes = [first.size]
        for _ in range(20):
            adding = asyncio.create_task(add(log, 3))
            second = await proofs.checkpoint()
            assert continues(first, second, await proofs.consistency(first.size, second.size))
            proof = await proofs.inclusions([second.position], second.size)
            assert includes(second, bytes.fromhex(second.hash), proof[0])
            sizes.append(second.size)
            first = second
            await adding
        assert len(set(sizes)) >= 10
        assert min(sizes) < TILE < max(sizes)


REFUSED: list[tuple[str, tuple[Any, ...], str, str]] = [
    ("checkpoint", (SIZE + 1,), "size", f"must be from 0 to {SIZE}"),
    ("checkpoint", (-1,), "size", f"must be from 0 to {SIZE}"),
    ("inclusions", ([0], SIZE), "position", f"first {SIZE} events, which end at position {SIZE}"),
    ("inclusions", ([SIZE + 1], SIZE), "position", f"end at position {SIZE}; it is {SIZE + 1}"),
    ("inclusions", ([4], 3), "position", "first 3 events, which end at position 3; it is 4"),
    ("inclusions", ([TILE + 1], TILE), "position", f"end at position {TILE}"),
    ("inclusions", ([1], 0), "position", "first 0 events, which end at position 0"),
    ("inclusions", ([1], SIZE + 1), "size", f"must be from 0 to {SIZE}"),
    ("consistency", (3, 2), "first", "must be from 0 to 2, which is second; it is 3"),
    ("consistency", (-1, 2), "first", "must be from 0 to 2"),
    ("consistency", (1, SIZE + 1), "second", f"must be from 0 to {SIZE}"),
]


@pytest.mark.parametrize(("what", "arguments", "field", "message"), REFUSED)
async def test_what_the_log_does_not_have_is_refused_by_field_and_range(
    path: Path, what: str, arguments: tuple[Any, ...], field: str, message: str
) -> None:
    async with await SqliteReader.open(path) as log:
        with pytest.raises(InvalidInput) as refused:
            await getattr(Proofs(log), what)(*arguments)
    assert refused.value.facts["field"] == field
    assert message in str(refused.value)


async def test_nothing_is_proven_of_a_tile_whose_events_were_removed(
    path: Path, tmp_path: Path
) -> None:
    async with await SqliteReader.open(removed(path, tmp_path / "cut.db", 7)) as log:
        proofs = Proofs(log)
        for of_the_tile in (
            proofs.inclusions([Position(9)], SIZE),
            proofs.consistency(10, SIZE),
            proofs.checkpoint(TILE),
        ):
            with pytest.raises(LogAltered, match=f"after position 0, up to {TILE}"):
                await of_the_tile
        elsewhere = [Position(TILE + 1), Position(SIZE)]
        checkpoint = await proofs.checkpoint()
        for position, proof in zip(elsewhere, await proofs.inclusions(elsewhere), strict=True):
            ((_, digest),) = await log.hashes(after=Position(position - 1), limit=1)
            assert includes(checkpoint, digest, proof)


async def test_what_is_left_of_a_log_does_not_continue_what_it_was(
    path: Path, tmp_path: Path
) -> None:
    async with await SqliteReader.open(path) as log:
        kept = await Proofs(log).checkpoint(2 * TILE + 80)
        row = (await log.rows(after=Position(SIZE - 1)))[0]
    async with await SqliteReader.open(removed(path, tmp_path / "cut.db", SIZE - 30)) as log:
        proofs = Proofs(log)
        now = await proofs.checkpoint()
        assert now.size == SIZE - 1
        assert not continues(kept, now, await proofs.consistency(kept.size))
        (proof,) = await proofs.inclusions([row.position])
        assert includes(now, row.hash, proof)


async def test_a_log_written_anew_does_not_continue_what_it_was(path: Path, tmp_path: Path) -> None:
    async with await SqliteReader.open(path) as log:
        kept = await Proofs(log).checkpoint()
        row = (await log.rows(limit=1))[0]
        (proof,) = await Proofs(log).inclusions([row.position])
    with tampering(path, tmp_path / "forged.db", rehash=True) as connection:
        edit(connection, 1, lambda payload: payload.update(metadata={"who": "me"}))
        connection.execute("DELETE FROM tiles")
    async with await SqliteReader.open(tmp_path / "forged.db") as log:
        now, forged = await Proofs(log).checkpoint(), (await log.rows(limit=1))[0]
        assert forged.hash == row_hash(forged)  # the chain is whole
        assert now.root == root(await hashes(log)).hex()
        assert not continues(kept, now, await Proofs(log).consistency(kept.size))
        assert includes(kept, row.hash, proof)
        assert not includes(kept, forged.hash, proof)


# Over HTTP, and on the command line: without a key; tests/end_to_end/test_checkpoints.py has one.


def head(client: httpx.Client, **parameters: int) -> Json:
    found: Json = ok(client.get("/v1/audit/head", params=parameters))
    return found


def test_without_a_key_checkpoints_are_not_signed(client: httpx.Client) -> None:
    create(client)
    found = head(client)
    assert found["public_key"] is None
    assert found["checkpoint"] == to_note(from_note(found["checkpoint"]))
    problem = assert_problem(client.get("/v1/audit/key"), 404, "no-signing-key")
    assert "CACHER_SIGNING_KEY" in problem["detail"]


LATER = 2**53 - 1
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("head", {"size": LATER}, "size"),
    ("head", {"size": -1}, "size"),
    ("head", {"size": "x"}, "size"),
    ("head", {"size": 2**53}, "size"),
    ("proof", {}, "position"),
    ("proof", {"size": 1}, "position"),
    ("proof", {"second": 1}, "first"),
    ("proof", {"size": LATER}, "size"),
    ("proof", {"size": -1}, "size"),
    ("proof", {"second": LATER}, "second"),
    ("proof", {"second": -1}, "second"),
    ("proof", {"position": -1}, "position"),
    ("proof", {"position": 1, "first": 1}, "first"),
    ("proof", {"position": 1, "second": 1}, "second"),
    ("proof", {"first": 1, "size": 1}, "size"),
    ("proof", {"position": LATER}, "position"),
    ("proof", {"position": 0}, "position"),
    ("proof", {"position": 2, "size": 1}, "position"),
    ("proof", {"position": 1, "size": LATER}, "size"),
    ("proof", {"position": "x"}, "position"),
    ("proof", {"first": 2, "second": 1}, "first"),
    ("proof", {"first": 1, "second": LATER}, "second"),
    ("proof", {"first": LATER}, "first"),
    ("proof", {"first": -1}, "first"),
]


@pytest.mark.parametrize(("route", "parameters", "field"), BAD)
def test_what_cannot_be_proven_is_refused_by_field(
    client: httpx.Client, route: str, parameters: dict[str, Any], field: str
) -> None:
    create(client)
    create(client)
    answer = client.get(f"/v1/audit/{route}", params=parameters)
    assert_problem(answer, 400, "invalid-input", field)


def run(*arguments: object, **settings: str) -> Any:
    environment: dict[str, str | None] = {**clean_environment(**settings)}
    return CliRunner().invoke(main, ["log", "head", *map(str, arguments)], env=environment)


def test_the_command_line_says_what_it_cannot_do(path: Path, tmp_path: Path) -> None:
    for result, message in (
        (run("--database", path, "--size", SIZE + 1), f"size: must be from 0 to {SIZE}"),
        (run("--database", tmp_path / "none.db"), "there is no log at"),
    ):
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


@pytest.mark.parametrize("command", [("serve",), ("log", "head")])
def test_a_signing_key_that_is_none_stops_the_start(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    missing = tmp_path / "missing.pem"
    environment = clean_environment(
        CACHER_SIGNING_KEY=str(missing), CACHER_DATABASE=str(tmp_path / "cacher.db")
    )
    result = CliRunner().invoke(main, command, env={**environment})
    assert result.exit_code == 2
    assert f"CACHER_SIGNING_KEY is {str(missing)!r}: " in result.stderr
    assert f"openssl genpkey -algorithm ed25519 -out {missing}" in result.stderr


async def test_a_note_is_signed_in_the_name_of_its_log(path: Path) -> None:
    async with await SqliteReader.open(path) as log:
        checkpoint = await Proofs(log).checkpoint()
    signer = Ed25519Signer(f"cacher/{checkpoint.log_id}", Ed25519PrivateKey.generate())
    assert verify_note(note(checkpoint, signer), signer.public_key) == checkpoint
    another = Ed25519Signer("cacher/another", Ed25519PrivateKey.generate())
    with pytest.raises(ValueError, match="no signature"):
        verify_note(note(checkpoint, another), another.public_key)
