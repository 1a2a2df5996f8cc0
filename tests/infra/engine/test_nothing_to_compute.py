"""A text without a token is an error for who asks, and none for anybody else."""

import pytest

from infra.engine.language_model import TransformersModel
from tests.infra.engine.asking import request, steps


async def test_a_generation_from_nothing_fails_and_the_engine_goes_on(
    tiny: TransformersModel,
) -> None:
    with pytest.raises(RuntimeError, match="none has anything to compute"):
        await steps(tiny, request((), 3))
    assert len(await steps(tiny, request((1, 2, 3), 3))) > 0
    assert tiny.counters().sequences == 0
