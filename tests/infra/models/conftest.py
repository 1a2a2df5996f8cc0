"""Model folders that several tests share, and a hub that cannot be reached."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from infra.engine.engine import Engine
from tests.infra.engine import small_models


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small model; not to be changed."""
    return small_models.write(tmp_path_factory.mktemp("saved") / "small", small_models.smallest())


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes copies of it, to be changed at will."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    return make


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where files of the hub would be; nothing else of the hub can be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache
