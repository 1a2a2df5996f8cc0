"""What all tests of faults share."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Logs are opened a thousand times here: each warns of the version of SQLite."""
    caplog.set_level(logging.CRITICAL)
