"""The pytest plugin, as someone meets it who keeps recorded logs beside tests."""

import asyncio
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from app import bootstrap
from app.settings import Settings
from domain.content import NO_SCORES
from infra.log.migrate import migrate
from infra.log.sqlite_log import SqliteLog
from infra.models.catalogue import Catalogue
from tests.builders import BY, append, created, forwarded
from tests.end_to_end.calls import query
from tests.end_to_end.tampering import tampering
from tests.end_to_end.test_command_line import TINY, run
from tests.end_to_end.written import Log
from tests.support import clean_environment

pytest_plugins = ["pytester"]

CHECK = """
import pytest

@pytest.mark.cacher_log({arguments})
def test_nothing_changed(cacher_replay):
    cacher_replay.check()
"""


@pytest.fixture(scope="module")
def imported(models_kept: None) -> None:
    """Everything that loading a model imports: ``pytester`` makes each run forget its imports,
    and torch does not work if some of it is imported twice."""

    async def load() -> None:
        async with bootstrap.open_models(Settings(model_name="cacher-tiny", threads=1)) as models:
            await models.get(models.default)

    asyncio.run(load())


@pytest.fixture(autouse=True)
def only_this_plugin(imported: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin alone, whatever else is installed, and small settings for a busy machine."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name, value in TINY.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def folder(pytester: pytest.Pytester, log: Log) -> Path:
    """A folder of tests with a recorded log: a backup, which is one file."""
    result = run("backup", pytester.path / "recorded.db", "--database", log.database)
    assert result.exit_code == 0, result.stderr
    return pytester.path


def run_tests(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    options = ("-p", "app.pytest_plugin", "--strict-markers", "-p", "no:cacheprovider")
    return pytester.runpytest_inprocess(*options, *arguments)


def check(pytester: pytest.Pytester, arguments: str, *options: str) -> pytest.RunResult:
    """Run one test with the marker ``cacher_log(arguments)``."""
    pytester.makepyfile(CHECK.format(arguments=arguments))
    return run_tests(pytester, *options)


def state_ids(log: Log) -> list[str]:
    """Those about whose tokens the model said something, oldest first."""
    said = "type IN ('text_forwarded', 'tokens_generated', 'continuations_generated',"
    said += " 'beams_generated')"
    sql = f"SELECT state_id FROM events GROUP BY state_id HAVING max({said}) ORDER BY min(position)"
    return [state_id for (state_id,) in query(log.database, sql)]


def threads_of_ours() -> set[threading.Thread]:
    """Threads but those that all models share: for grammars that are tried, and analyses."""
    shared = ("checks", "analysis")
    return {one for one in threading.enumerate() if not one.name.startswith(shared)}


# a log that is replayed


@pytest.mark.usefixtures("models_of_its_own")
def test_each_state_is_a_test_and_an_unchanged_model_passes(
    pytester: pytest.Pytester, folder: Path, log: Log
) -> None:
    threads = threads_of_ours()
    result = check(pytester, '"recorded.db"', "-v")
    states = state_ids(log)
    result.assert_outcomes(passed=len(states), skipped=11 - len(states))
    result.stdout.fnmatch_lines([f"*::test_nothing_changed?{name}? PASSED*" for name in states])
    assert len(states) > 5
    assert threads_of_ours() <= threads
    assert not list(folder.glob("recorded.db-*"))


@pytest.fixture
def changed_model(folder: Path) -> Path:
    """The embedded model with one of its weights changed, beside the tests."""
    model = folder / "changed"
    shutil.copytree(Catalogue("cacher-tiny", ()).source("cacher-tiny").location, model)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in sorted(weights) if "mlp" in name and name.endswith("weight"))
    weights[name][:, :8] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.usefixtures("changed_model")
def test_a_changed_weight_fails_each_state_and_says_what_changed(
    pytester: pytest.Pytester, log: Log
) -> None:
    (first, *_) = state_ids(log)
    result = check(pytester, '"recorded.db", model="changed"', "-k", first)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            f"*test_nothing_changed?{first}?*",
            ">*cacher_replay.check()*",
            f"E *AssertionError: state {first}, * tokens",
            "E *  beyond its limit: sampled agreement 0.* is below 1.0",
            "E *  first change: version *, token *: drawn was '*' (#*), is *",
            "E *  agreement: drawn *% of *, likeliest *% of *",
            "E *  KL (nats): mean *, p99 *, max *; largest |delta logprob| *",
            "E *  numerics: weights was *, is *",
        ]
    )
    assert "torch.__trace" not in result.stdout.str()


@pytest.mark.usefixtures("changed_model")
def test_limits_of_the_marker_say_what_may_change(pytester: pytest.Pytester, log: Log) -> None:
    (first, *_) = state_ids(log)
    limits = "min_sampled_agreement=0, min_greedy_agreement=None"
    allowed = check(pytester, f'"recorded.db", model="changed", {limits}', "-k", first)
    allowed.assert_outcomes(passed=1)
    strict = f'"recorded.db", model="changed", {limits}, max_kl=1e-9'
    refused = check(pytester, strict, "-k", first)
    refused.assert_outcomes(failed=1)
    refused.stdout.fnmatch_lines(["E *beyond its limit: max KL * is above 1e-09"])


def test_a_test_may_judge_by_itself(pytester: pytest.Pytester, folder: Path, log: Log) -> None:
    (first, *_) = state_ids(log)
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.cacher_log("{folder.name}/../recorded.db")
        def test_figures(cacher_replay):
            assert cacher_replay.state_id == "{first}"
            assert cacher_replay.summary.tokens > 10
            assert cacher_replay.summary.kl_max < 1e-6
            assert cacher_replay.failures == ()
            assert cacher_replay.differences == {{}}
        """
    )
    shutil.copytree(folder, folder / folder.name, ignore=shutil.ignore_patterns("*"))
    run_tests(pytester, "-k", first).assert_outcomes(passed=1)


def test_a_baseline_takes_the_place_of_the_log(
    pytester: pytest.Pytester, folder: Path, log: Log
) -> None:
    (first, *_) = state_ids(log)
    baseline = folder / "baseline"
    recorded = run("regress", folder / "recorded.db", "--state", first, "--record", baseline)
    assert recorded.exit_code == 0, recorded.stderr
    result = check(pytester, '"recorded.db", against="baseline", max_kl=0', "-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*?{first}? PASSED*"])


def test_a_state_of_the_baseline_that_cannot_be_replayed_does_not_pass(
    pytester: pytest.Pytester, folder: Path, log: Log
) -> None:
    (first, *_) = state_ids(log)
    recorded = run("regress", log.database, "--state", first, "--record", folder / "baseline")
    assert recorded.exit_code == 0, recorded.stderr
    with tampering(log.database, folder / "sealed.db", rehash=True) as connection:
        payload = '{"sealed": "AAAA"}'
        connection.execute("UPDATE events SET payload = ? WHERE state_id = ?", (payload, first))
    alone = check(pytester, '"sealed.db"', "-k", first)
    alone.assert_outcomes(skipped=1)
    check(pytester, '"sealed.db", against="baseline"').assert_outcomes(errors=1)


def test_a_state_that_the_list_of_states_hides_is_a_test(
    pytester: pytest.Pytester, folder: Path, log: Log
) -> None:
    (first, *_) = state_ids(log)
    with tampering(log.database, folder / "hidden.db", rehash=False) as connection:
        connection.execute("UPDATE states SET created_position = -1 WHERE state_id = ?", (first,))
    check(pytester, '"hidden.db"', "-k", first).assert_outcomes(passed=1)


def test_an_export_is_a_recorded_log_too(pytester: pytest.Pytester, folder: Path, log: Log) -> None:
    (first, *_) = state_ids(log)
    export = folder / "recorded.cacher"
    written = run("export", export, "--database", log.database)
    assert written.exit_code == 0, written.stderr
    check(pytester, '"recorded.cacher"', "-k", first).assert_outcomes(passed=1)


# a log that cannot be replayed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('"none.db"', "there is no log at *none.db"),
        ('"text.db"', "*text.db cannot be read as a log: *"),
        ('"empty.db"', "*empty.db has no state to replay: it is empty"),
        ('"silent.db"', "*has no state to replay: no model said anything about its tokens"),
        ('"read.db"', "*nothing was said of its tokens: it is a sequence_classification state"),
        ("", "cacher_log takes one log: its path"),
        ('"recorded.db", "other.db"', "cacher_log takes one log: its path"),
        ('"recorded.db", kl=1', "cacher_log has no kl; it has model, against, *max_kl,*"),
        ('"recorded.db", max_kl="low"', "*Expected `float | null`, got `str`*max_kl*"),
        ('"recorded.db", max_kl=float("nan")', "max_kl must be a number of 0 or more, not nan*"),
        ('"recorded.db", dtype="float8"', "CACHER_DTYPE is 'float8': *"),
        ('"recorded.db", against="none"', "*none*"),
    ],
)
def test_what_cannot_be_replayed_is_an_error_of_collection(
    pytester: pytest.Pytester, folder: Path, arguments: str, message: str
) -> None:
    (folder / "text.db").write_text("no database at all " * 100)
    migrate(folder / "empty.db")
    asyncio.run(write_silent(folder / "silent.db"))
    asyncio.run(write_read(folder / "read.db"))
    result = check(pytester, arguments)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*::test_nothing_changed: {message}"])
    result.stdout.no_fnmatch_line("*Traceback*")


async def write_silent(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append([append(created())], provenance=BY)


async def write_read(path: Path) -> None:
    """The log of a classifier, which has a text that was appended and says nothing of tokens."""
    began = msgspec.structs.replace(created(), model_type="sequence_classification")
    added = msgspec.structs.replace(forwarded(3), scores=NO_SCORES)
    async with await SqliteLog.open(path) as log:
        await log.append([append(began), append(added, 1)], provenance=BY)


def test_the_fixture_needs_the_marker(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_alone(cacher_replay): pass")
    result = run_tests(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*::test_alone: a test with cacher_replay needs the marker*"])


# what it costs whoever does not use it

IMPORTED = """
import sys

def pytest_sessionfinish(session):
    ours = [name for name in sys.modules if name.split(".")[0] in ("app", "domain", "infra")]
    heavy = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
    print("imported", session.testscollected, sorted(ours)[:2], heavy)
"""


@pytest.mark.parametrize(
    ("test", "imported"),
    [
        ("def test_other(): pass", "imported 1 ['app', 'app.pytest_plugin'] []"),
        (CHECK.format(arguments='"recorded.db"'), "imported 11 ['app', 'app.bootstrap'] []"),
    ],
)
def test_collecting_imports_what_is_needed_and_no_torch(
    folder: Path, test: str, imported: str
) -> None:
    (folder / "conftest.py").write_text(IMPORTED)
    (folder / "test_it.py").write_text(test)
    options = ("-p", "app.pytest_plugin", "-p", "no:cacheprovider", "--collect-only", "-qs")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", folder, folder],
        env=clean_environment(PYTHONPATH=":".join(sys.path), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert imported in result.stdout


def test_the_marker_is_known_and_explained(pytester: pytest.Pytester) -> None:
    result = run_tests(pytester, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.cacher_log(log, ?, model=None, *"])
