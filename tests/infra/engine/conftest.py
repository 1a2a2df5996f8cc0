"""Models that several tests of the engine share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.engine.engine import Engine
from infra.engine.language_model import TransformersModel
from tests.infra.engine import small_models


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | Path]:
    """By name: the embedded model and small random ones of several families."""
    parent = tmp_path_factory.mktemp("models")
    made = {
        family: small_models.write(parent / family, make())
        for family, make in small_models.FAMILIES.items()
    }
    made |= {
        name: small_models.write(parent / name, make(), vocabulary=vocabulary)
        for name, (make, vocabulary) in small_models.SHAPES.items()
    }
    return {small_models.CACHER_TINY: small_models.CACHER_TINY, **made}


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.fixture(scope="session")
def tiny(engine: Engine) -> TransformersModel:
    """The embedded model with a cache that is never full."""
    return small_models.language_model(small_models.CACHER_TINY, engine)
