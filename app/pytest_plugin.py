"""A pytest plugin: each state of a recorded log is a test.

::

    @pytest.mark.cacher_log("recorded.db", model="cacher-tiny", max_kl=0.01)
    def test_the_model_still_says_the_same(cacher_replay):
        cacher_replay.check()

What it needs is imported when a test asks for it, and a model is loaded when the first one runs.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from app.recordings import Replayed, Replays

MARKER: Final = (
    "cacher_log(log, *, model=None, dtype=None, device=None, strategy=None, threads=None,"
    " against=None, min_sampled_agreement=1.0, min_greedy_agreement=1.0, max_kl_mean=None,"
    " max_kl_p99=None, max_kl=None, max_logprob_delta=None): run the test once for each state of"
    " a recorded log (a database or an export, relative to the test's file), which the fixture"
    " cacher_replay replays: with one model or each state's own, held against the log or a baseline"
)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ask for one test for each state of the log that the marker names; loads no model."""
    if "cacher_replay" not in metafunc.fixturenames:
        return
    from app.recordings import BadRecording, recording_of

    test = metafunc.definition
    marker = test.get_closest_marker("cacher_log")
    try:
        if marker is None:
            raise BadRecording("a test with cacher_replay needs the marker cacher_log")
        recording = recording_of(test.path.parent, marker.args, marker.kwargs)
        states = recording.states()
    except BadRecording as error:
        raise pytest.Collector.CollectError(f"{test.nodeid}: {error}") from error
    metafunc.parametrize(
        "cacher_replay",
        [
            pytest.param((recording, state_id), id=state_id, marks=_skip(reason))
            for state_id, reason in states.items()
        ],
        indirect=True,
    )


def _skip(reason: str | None) -> tuple[Any, ...]:
    return () if reason is None else (pytest.mark.skip(reason=reason),)


@pytest.fixture(scope="session")
def _cacher_replays() -> Iterator["Replays"]:
    from app.recordings import Replays

    with Replays() as replays:
        yield replays


@pytest.fixture
def cacher_replay(request: pytest.FixtureRequest, _cacher_replays: "Replays") -> "Replayed":
    """One state of the log that the marker ``cacher_log`` names, replayed.

    Its ``check`` fails the test if it is beyond a limit; ``summary``, ``worst`` and ``failures``
    say what was found.
    """
    recording, state_id = request.param
    return _cacher_replays.replay(recording, state_id)
