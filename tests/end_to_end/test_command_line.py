"""``cacher serve``, ``cacher verify`` and ``cacher migrate``, as an operator meets them."""

import io
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
import rich_click as click
from click.testing import CliRunner, Result

from app.cli import main
from app.cli.group import Commands
from tests.end_to_end.calls import query
from tests.end_to_end.tampering import edit, remove, tampering
from tests.end_to_end.written import Log
from tests.forking import FAST, FastServer, Nursery
from tests.support import SERVE, clean_environment, free_port

pytestmark = pytest.mark.usefixtures("models_kept")

TINY = {"CACHER_MODEL_NAME": "cacher-tiny", **FAST}
NEWER = "INSERT INTO schema_migrations VALUES (99, 'from the future', '', '')"


def run(*arguments: object, **settings: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)), env={**TINY, **settings})


def refusal(result: Result) -> str:
    """What a command that did not do its work said."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def head_of(database: Path) -> str:
    sql = "SELECT position, lower(hex(hash)) FROM events ORDER BY position DESC LIMIT 1"
    position, digest = query(database, sql)[0]
    return f"{position}:{digest}"


def change_token(payload: dict[str, Any]) -> None:
    payload["content"]["tokens"][2] ^= 1


@pytest.fixture
def forged(log: Log, tmp_path: Path) -> Path:
    """A log with one token changed, and the chain hashed anew behind it."""
    with tampering(log.database, tmp_path / "forged.db", rehash=True) as connection:
        edit(connection, log.positions["generated"], change_token)
    return tmp_path / "forged.db"


@pytest.fixture
def shortened(log: Log, tmp_path: Path) -> Path:
    """A log whose last event of a deleted state, its deletion, was removed."""
    with tampering(log.database, tmp_path / "shortened.db", rehash=True) as connection:
        remove(connection, log.positions["deleted"])
    return tmp_path / "shortened.db"


def a_database(path: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


@pytest.fixture
def newer(log: Log, tmp_path: Path) -> Path:
    """A log that a newer release has written to."""
    shutil.copyfile(log.database, tmp_path / "newer.db")
    return a_database(tmp_path / "newer.db", NEWER)


# verify, in a process of its own


def test_verify_works_beside_a_running_server(nursery: Nursery, log: Log, tmp_path: Path) -> None:
    shutil.copyfile(log.database, tmp_path / "served.db")
    with FastServer(nursery, tmp_path / "served.db") as server, server.client() as client:
        log.delete(client, "opened")  # still in the WAL
        result = nursery.run("verify", "--database", server.database, "--json", **TINY)
        log.delete(client, "greedy")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["result"], report["divergences"], report["notes"]) == ("equal", [], [])
    assert report["events_checked"] == len(log.positions) + 1
    assert report["tokens_reused"] == 0
    assert report["tokens_recomputed"] > 0


def test_verify_of_a_forged_log_exits_with_1_and_names_the_place(
    nursery: Nursery, log: Log, forged: Path
) -> None:
    result = nursery.run("verify", "--database", forged, "--json", **TINY)
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    position, state_id, version = log.place("generated")
    token = log.start("generated") + 2
    assert report["result"] == "divergent"
    assert (position, state_id, version, "content.tokens", token) in [
        (d["position"], d["state_id"], d["version"], d["field"], d["token_position"])
        for d in report["divergences"]
    ]


# verify


def test_verify_of_a_clean_log_exits_with_0_and_prints_its_head(log: Log) -> None:
    result = run("verify", "--database", log.database)
    assert result.exit_code == 0, result.stderr
    first, *others = result.stdout.splitlines()
    assert first.startswith(f"equal: {len(log.positions)} events of 11 states, ")
    looks = query(log.database, "SELECT count(*) FROM events WHERE version IS NULL")
    assert looks[0][0] > 0
    assert set(others) == {f"analyses: {looks[0][0]}", f"head {head_of(log.database)}"}


def test_verify_changes_nothing(log: Log, tmp_path: Path) -> None:
    database = tmp_path / "read only" / "cacher.db"
    database.parent.mkdir()
    shutil.copyfile(log.database, database)
    before = database.read_bytes()
    assert run("verify", "--database", database).exit_code == 0
    assert database.read_bytes() == before
    assert not Path(f"{database}.lock").exists()


def test_verify_says_in_words_what_diverges(log: Log, forged: Path) -> None:
    result = run("verify", "--database", forged)
    assert result.exit_code == 1
    position, state_id, version = log.place("generated")
    token = log.start("generated") + 2
    place = f"divergent: position {position}, state {state_id} version {version}, content.tokens"
    assert any(
        line.startswith(f"{place} at token {token}: recorded ")
        for line in result.stdout.splitlines()
    )


def test_a_removed_end_is_found_with_a_remembered_head_only(log: Log, shortened: Path) -> None:
    assert run("verify", "--database", shortened).exit_code == 0
    result = run("verify", "--database", shortened, "--head", head_of(log.database), "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["divergences"]
    assert (found["field"], found["position"]) == ("head", len(log.positions))


def test_every_remembered_head_of_a_log_is_in_it(log: Log) -> None:
    assert run("verify", "--database", log.database, "--head", head_of(log.database)).exit_code == 0


@pytest.mark.parametrize("head", ["12", "12:", "x:" + "00" * 32, "12:xyz", "1:00", ""])
def test_a_head_that_is_none_is_refused(log: Log, head: str) -> None:
    result = run("verify", "--database", log.database, "--head", head)
    assert "--head must be position:hash" in refusal(result)


def test_verify_of_one_state_leaves_the_others_alone(log: Log, forged: Path) -> None:
    _, sampled, _ = log.place("generated")
    _, greedy, _ = log.place("greedy")
    good = run("verify", "--database", forged, "--state", greedy, "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["states_checked"] == 1
    assert run("verify", "--database", forged, "--state", greedy, "--state", sampled).exit_code == 1


def test_verify_of_a_state_that_is_not_there_could_not_be_done(log: Log) -> None:
    result = run("verify", "--database", log.database, "--state", "state-none")
    assert "there is no state 'state-none'" in refusal(result)


def test_another_fingerprint_exits_with_2_unless_drift_is_allowed(log: Log) -> None:
    arguments = ("verify", "--database", log.database)
    result = run(*arguments, CACHER_DTYPE="bfloat16")
    assert result.exit_code == 2
    assert result.stdout.startswith("unverified: ")
    assert "fingerprints differ in " in result.stdout
    assert "|delta logprob| up to " in result.stdout
    allowed = run(*arguments, "--allow-drift", "--json", CACHER_DTYPE="bfloat16")
    assert allowed.exit_code == 0
    report = json.loads(allowed.stdout)
    assert report["result"] == "unverified"
    assert report["drifts"][0]["differences"]["dtype"] == ["float32", "bfloat16"]


def test_allowing_drift_allows_nothing_else(log: Log, tmp_path: Path) -> None:
    with tampering(log.database, tmp_path / "copy.db", rehash=False) as connection:
        edit(connection, log.positions["generated"], change_token)
    result = run("verify", "--database", tmp_path / "copy.db", "--allow-drift")
    assert result.exit_code == 1


def test_verify_goes_on_from_the_mark_that_an_earlier_one_left(log: Log, tmp_path: Path) -> None:
    database = tmp_path / "cacher.db"
    shutil.copyfile(log.database, database)
    at = log.positions["kept in full"]
    first = run("verify", "--database", database, "--until", at, "--json")
    assert json.loads(first.stdout)["range"] == {"after": 0, "until": at}
    assert json.loads((tmp_path / "cacher.db.verified").read_text())["position"] == at
    then = run("verify", "--database", database, "--since-verified")
    assert then.exit_code == 0
    lines = then.stdout.splitlines()
    assert f"after position {at}, until {len(log.positions)}" in lines
    assert lines[-1].startswith(f"note: events up to {at} were not re-executed")
    assert f" {len(log.positions) - at}/{len(log.positions) - at} " in then.stderr
    assert "tokens/s" in then.stderr
    part = run("verify", "--database", database, "--after", at, "--until", at + 2, "--json")
    assert json.loads(part.stdout)["events_checked"] == 2
    for extra in (["--after", "1"], ["--state", "state-0"]):
        refused = run("verify", "--database", database, "--since-verified", *extra)
        assert "--since-verified is about the whole log" in refusal(refused)


def cases(path: Path) -> dict[str, list[ElementTree.Element]]:
    """The test cases of a JUnit file, each with what became of it."""
    return {case.attrib["name"]: list(case) for case in ElementTree.parse(path).iter("testcase")}


def counts(path: Path) -> tuple[int, ...]:
    suite = ElementTree.parse(path).getroot()[0]
    return tuple(int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))


def test_verify_writes_a_test_case_for_each_state(log: Log, forged: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.xml", tmp_path / "bad.xml"
    assert run("verify", "--database", log.database, "--junit", good).exit_code == 0
    assert counts(good) == (12, 0, 0, 0)
    states = {state_id for (state_id,) in query(log.database, "SELECT state_id FROM states")}
    assert set(cases(good)) == {"the log", *states}
    assert run("verify", "--database", forged, "--junit", bad).exit_code == 1
    position, state_id, version = log.place("generated")
    (failure,) = cases(bad)[state_id]
    tests, failures, *others = counts(bad)
    assert (tests, failures, others) == (12, len([c for c in cases(bad).values() if c]), [0, 0])
    lines = (failure.text or "").splitlines()
    place = f"divergent: position {position}, state {state_id} version {version}"
    assert failure.attrib == {"message": lines[0], "type": "divergence"}
    assert all(line.startswith("divergent: position ") for line in lines)
    token = log.start("generated") + 2
    (named,) = [line for line in lines if f"content.tokens at token {token}: recorded " in line]
    assert named.startswith(place)
    assert named.count("(#") == 5
    assert "; likeliest now: " in named


def test_a_drift_is_an_error_in_junit_unless_it_is_allowed(log: Log, tmp_path: Path) -> None:
    arguments = ("verify", "--database", log.database, "--junit", tmp_path / "drift.xml")
    drifting = "SELECT count(DISTINCT state_id) FROM events WHERE fingerprint IS NOT NULL"
    ((count,),) = query(log.database, f"{drifting} AND type != 'state_created'")
    assert run(*arguments, CACHER_DTYPE="bfloat16").exit_code == 2
    assert counts(tmp_path / "drift.xml") == (12, 0, count + 1, 0)
    assert run(*arguments, "--allow-drift", CACHER_DTYPE="bfloat16").exit_code == 0
    assert counts(tmp_path / "drift.xml") == (12, 0, 0, count + 1)


def test_verify_without_a_database_could_not_be_done(tmp_path: Path) -> None:
    result = run("verify", "--database", tmp_path / "none.db")
    assert f"there is no log at {tmp_path / 'none.db'}" in refusal(result)
    assert not list(tmp_path.iterdir())


def test_verify_of_a_newer_schema_could_not_be_done(newer: Path) -> None:
    message = refusal(run("verify", "--database", newer))
    assert "is at migration 99" in message
    assert "a newer release has written to it" in message


def test_verify_of_an_unmigrated_database_names_the_command_to_run(tmp_path: Path) -> None:
    database = a_database(tmp_path / "empty.db", "CREATE TABLE other (x)")
    assert "cacher migrate" in refusal(run("verify", "--database", database))


def test_verify_of_a_file_that_is_no_database_could_not_be_done(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("This is a story and no database. " * 100)
    assert "cannot be read as a log" in refusal(run("verify", "--database", tmp_path / "text.db"))


# migrate


def test_migrate_makes_a_database_once(tmp_path: Path) -> None:
    first = run("migrate", "--database", tmp_path / "new.db")
    assert (first.exit_code, first.stdout.splitlines()[0]) == (0, "applied events")
    assert (tmp_path / "new.db").exists()
    second = run("migrate", "--database", tmp_path / "new.db")
    assert (second.exit_code, second.stdout) == (0, "nothing to do\n")


def test_migrate_takes_its_database_from_the_environment(tmp_path: Path) -> None:
    result = run("migrate", CACHER_DATABASE=str(tmp_path / "named.db"))
    assert result.exit_code == 0
    assert (tmp_path / "named.db").exists()


def test_migrate_refuses_a_newer_schema(newer: Path) -> None:
    assert "is at migration 99" in refusal(run("migrate", "--database", newer))


# one writer


@pytest.fixture(scope="module")
def running(
    nursery: Nursery, log: Log, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FastServer]:
    database = tmp_path_factory.mktemp("running") / "cacher.db"
    shutil.copyfile(log.database, database)
    with FastServer(nursery, database) as server:
        yield server


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_a_second_writer_refuses_and_says_what_to_do(running: FastServer, command: str) -> None:
    message = refusal(run(command, "--database", running.database))
    assert f"another process writes to {running.database}" in message
    assert "Stop the server" in message
    assert "Traceback" not in message
    with running.client() as client:
        assert client.get("/ready").is_success


# serve


def test_serve_refuses_a_newer_schema(newer: Path) -> None:
    assert "is at migration 99" in refusal(run("serve", "--database", newer))


@pytest.mark.parametrize("command", ["serve", "verify", "migrate"])
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT", "eighty", "int"),
        ("PORT", "65536", "<= 65535"),
        ("DTYPE", "float16", "'float16'"),
        ("DEFAULT_SEED", "-1", ">= 0"),
        ("DATABSE", "x.db", "is not a setting; settings are CACHER_MODEL_NAME, "),
    ],
)
def test_a_bad_setting_is_refused_by_its_name_with_what_is_allowed(
    command: str, name: str, value: str, allowed: str
) -> None:
    message = refusal(run(command, **{f"CACHER_{name}": value}))
    assert f"CACHER_{name} is " in message
    assert allowed in message


def test_a_bad_option_is_refused_by_its_name() -> None:
    result = run("serve", "--port", "70000")
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_every_command_says_what_it_does() -> None:
    overview = run("--help").stdout
    for command, options in {
        "serve": ["--host", "--port", "--model", "--database"],
        "verify": [
            *("--database", "--model", "--state", "--after", "--until", "--since-verified"),
            *("--head", "--allow-drift", "--json", "--junit"),
        ],
        "migrate": ["--database"],
    }.items():
        assert command in overview
        text = run(command, "--help").stdout
        assert all(option in text for option in options)


def test_options_of_serve_stand_over_the_environment_and_sigterm_ends_it_in_order(
    tmp_path: Path,
) -> None:
    port, database = free_port(), tmp_path / "given.db"
    options = ["--port", str(port), "--database", str(database), "--model", "cacher-tiny"]
    ignored = {"CACHER_PORT": "1", "CACHER_DATABASE": str(tmp_path / "ignored.db")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", "--host", "127.0.0.1", *options],
        env=clean_environment(**ignored),
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(url, process)
    models = httpx.get(f"{url}/v1/models").json()
    assert models[0]["model_id"] == "cacher-tiny"
    state = httpx.post(f"{url}/v1/states", json={"text": "Once upon a time"}, timeout=120)
    assert state.status_code == 201  # the model was loaded, where nothing was before
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in messages
    assert database.exists()
    assert not Path(f"{database}-wal").exists()
    assert not (tmp_path / "ignored.db").exists()
    assert run("migrate", "--database", database).stdout == "nothing to do\n"


def wait_until_ready(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        assert process.poll() is None, "the server ended"
        try:
            httpx.get(f"{url}/ready", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError("the server did not become ready")


# what a command may write


@pytest.fixture
def own(log: Log, tmp_path: Path) -> Path:
    """A copy of the log with everything that may lie beside it, and links to some of it."""
    database = tmp_path / "own.db"
    shutil.copyfile(log.database, database)
    for suffix in (".keys", ".lock", ".verified"):
        Path(f"{database}{suffix}").write_text("kept")
    (tmp_path / "symbolic").symlink_to(database)
    (tmp_path / "hard").hardlink_to(database)
    return database


OWN = ["own.db", *(f"own.db{one}" for one in (".keys", "-wal", "-shm", ".lock", ".verified"))]
WRITING = {
    "export": ["export", "FILE", "--force"],
    "backup": ["backup", "FILE", "--force"],
    "verify": ["verify", "--junit", "FILE"],
}


def write_to(file: Path, database: Path, command: str) -> Result:
    arguments = [file if one == "FILE" else one for one in WRITING[command]]
    return run(*arguments, "--database", database)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("command", WRITING)
def test_no_command_writes_over_a_file_of_the_log(own: Path, command: str) -> None:
    before = contents(own.parent)
    for name in (*OWN, "symbolic", "hard"):
        assert "belongs to the log" in refusal(write_to(own.parent / name, own, command))
    assert contents(own.parent) == before


def test_a_log_is_safe_under_any_name(own: Path) -> None:
    """Names of files that are there only while another is written, or that would go with it."""
    for name, target in (("new.partial", "new"), ("new-wal", "new"), ("new.db.keys", "new.db")):
        log = own.parent / name
        shutil.copyfile(own, log)
        for command in ("export", "backup"):
            said = refusal(write_to(own.parent / target, log, command))
            assert "belongs to the log" in said
        assert log.read_bytes() == own.read_bytes()


@pytest.mark.parametrize("command", WRITING)
def test_only_a_regular_file_is_written_where_there_is_a_folder(
    own: Path, tmp_path: Path, command: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name, why in (
        ("/dev/null", "is no regular file"),
        ("pipe", "is no regular file"),
        (".", "file"),
        ("circle", "cannot be written"),
        ("none/file", "there is no folder"),
        ("own.db/file", "there is no folder"),
        ("x" * 300, "File name too long"),
    ):
        assert why in refusal(write_to(tmp_path / name, own, command))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_link_is_followed_and_stays(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "far"
    folder.mkdir()
    (tmp_path / "there").symlink_to(folder / "file")
    for number, command in enumerate(WRITING):
        assert write_to(tmp_path / "there", own, command).exit_code == 0, number
        assert (tmp_path / "there").is_symlink()
        assert [file.name for file in folder.iterdir() if file.suffix != ".lock"] == ["file"]


# what is printed


def printed_to(path: str | int, *arguments: object) -> tuple[int, str]:
    """Exit code and messages of a command whose standard output is this file."""
    errors = io.StringIO()
    with (
        open(path, "w") as out,  # noqa: PTH123
        redirect_stdout(out),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as exit_,
    ):
        main(list(map(str, arguments)))
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, errors.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--database", "LOG", "--state", "STATE"],
        ["regress", "LOG", "--state", "STATE"],
        ["regress", "LOG", "--state", "STATE", "--json", "-"],
        ["export", "-", "--database", "LOG"],
        ["backup", "--check", "LOG"],
        ["log", "head", "--database", "LOG"],
        ["log", "stat", "--database", "LOG"],
        ["migrate", "--database", "LOG"],
        ["verify", "--help"],
        ["--help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_where_nothing_can_be_printed_the_command_could_not_be_done(
    log: Log, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    for name, value in TINY.items():
        monkeypatch.setenv(name, value)
    words = {"LOG": log.database, "STATE": log.place("greedy")[1]}
    arguments = [str(words.get(one, one)) for one in arguments]
    code, said = printed_to("/dev/full", *arguments)
    assert (code, said.splitlines()[-1]) == (2, "cacher: standard output: No space left on device")
    reader, writer = os.pipe()
    os.close(reader)
    code, said = printed_to(writer, *arguments)
    assert (code, said.splitlines()[-1]) == (2, "cacher: standard output: Broken pipe")


def test_a_process_that_cannot_print_exits_with_2_and_one_line(log: Log) -> None:
    """Python itself would try once more at its end, and exit with 120."""
    for redirect in (">/dev/full", ">&-", ">/dev/full 2>&1"):
        command = f'exec "$0" -c "$1" log stat --database "$2" {redirect}'
        result = subprocess.run(
            ["/bin/sh", "-c", command, sys.executable, SERVE, log.database],
            env=clean_environment(**TINY),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == (0 if "2>&1" in redirect else 1)


def test_what_cannot_be_encoded_is_told_and_no_finding() -> None:
    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def says() -> None:
        click.echo("it is 3.50 \N{EURO SIGN}")

    result = CliRunner(charset="latin-1").invoke(group, ["says"])
    message = "cacher: standard output cannot show '\\u20ac': set PYTHONUTF8=1\n"
    assert (result.exit_code, result.stderr) == (2, message)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "cacher: interrupted\n"),
        (OSError(5, "Input/output error", "cacher.db"), "cacher: [Errno 5] "),
        (RuntimeError("a mistake of ours"), "Traceback"),
    ],
    ids=["interrupted", "a file", "a mistake"],
)
def test_whatever_ends_a_command_is_no_finding(error: BaseException, said: str) -> None:
    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def fails() -> None:
        raise error

    result = CliRunner().invoke(group, ["fails"])
    assert result.exit_code == 2
    assert result.stderr.startswith(said)
