"""``/metrics`` of a server whose model has a name that has to be escaped."""

import re
import shutil
from collections.abc import Iterator

import pytest
from litestar.testing import TestClient

from app import bootstrap
from app.main import create_app
from app.settings import Settings
from infra.models.catalogue import source_of
from tests.app.api import LONG_TEXT

pytestmark = pytest.mark.filterwarnings(
    "ignore::litestar.utils.deprecation.LitestarDeprecationWarning"
)

NAME = 'my "tiny" \\ model'
VALUE = re.compile(r'(\w+)(?:\{model="((?:[^"\\\n]|\\["\\n])*)"\})? (\d+)')


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The metrics after one generation."""
    folder = tmp_path_factory.mktemp("metrics")
    shutil.copytree(source_of("cacher-tiny").location, folder / NAME)
    settings = Settings(model_name=str(folder / NAME), database=str(folder / "log.db"), threads=1)
    bootstrap.migrate(settings)
    with TestClient(create_app(settings)) as client:
        state = client.post("/v1/states", json={"text": LONG_TEXT}).json()
        body = {"state_id": state["state_id"], "max_tokens": 1}
        assert client.post("/v1/generate/token", json=body).is_success
        yield client.get("/metrics").text.splitlines()


@pytest.fixture(scope="module")
def values(lines: list[str]) -> dict[str, int]:
    found = [VALUE.fullmatch(line) for line in lines if not line.startswith("#")]
    return {match[1]: int(match[3]) for match in found if match}


def test_every_metric_says_what_it_is_before_its_value(lines: list[str]) -> None:
    assert len(lines) % 3 == 0
    for help_line, type_line, value in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        match = VALUE.fullmatch(value)
        assert match, value
        name = match[1]
        assert re.fullmatch(rf"# HELP {name} [A-Z].*\.", help_line)
        kind = "counter" if name.endswith("_total") else "gauge"
        assert type_line == f"# TYPE {name} {kind}"


def test_a_model_name_is_escaped(lines: list[str]) -> None:
    labels = {match[2] for line in lines if (match := VALUE.fullmatch(line)) and match[2]}
    assert labels == {r"my \"tiny\" \\ model"}


def test_bytes_are_those_of_the_blocks_and_add_up(values: dict[str, int]) -> None:
    block = values["cacher_kv_block_bytes"]
    for name in ("capacity", "held", "cached"):
        assert values[f"cacher_kv_{name}_bytes"] == values[f"cacher_kv_blocks_{name}"] * block
    assert values["cacher_kv_cached_bytes"] == values["cacher_kv_misses_total"] * block > 0
    idle = ("held_bytes", "shared_bytes", "host_capacity_bytes", "host_cached_bytes", "sequences")
    assert {values[f"cacher_kv_{name}"] for name in idle} == {0}
    free, cached = values["cacher_kv_free_bytes"], values["cacher_kv_cached_bytes"]
    assert free + cached == values["cacher_kv_capacity_bytes"]
